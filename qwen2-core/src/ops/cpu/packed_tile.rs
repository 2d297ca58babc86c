//! A few tokens times a few panels of packed weights, in the registers of every instruction set.
//!
//! Products of a block are summed as integers. A span's blocks are brought together by the weights'
//! scales, the spans by the activations': always in this order, however many tokens there are.

use std::ops::Range;

use half::f16;

use super::activations::{Activations, SPAN, SPAN_BLOCKS};
#[cfg(target_arch = "aarch64")]
use super::neon_tile;
use super::simd::Isa;
#[cfg(target_arch = "x86_64")]
use super::x86_tile;
use crate::ops::packed::{BLOCK, Beside, Format, GROUP, ROWS};

/// Most tokens of a long tile, one panel high, where there are registers for it.
pub(super) const LONG: usize = 8;
/// Most panels of a tile: they share the broadcasts of the activations.
pub(super) const PANELS: usize = 2;
/// Panels that one token reads side by side, at most.
pub(super) const STREAMS: usize = 4;
/// Pairs of blocks in a span.
pub(super) const SPAN_PAIRS: usize = SPAN_BLOCKS / 2;

/// Most tokens of a tile.
pub(super) const TOKENS: usize = 4;
/// Whether weights of eight bits are multiplied faster than those of four, once they are there.
pub(super) fn favours_eight_bits(isa: Isa) -> bool {
    !matches!(isa, Isa::Avx2 | Isa::Avx512)
}

/// Panels that one token reads side by side, each where it lies: so many places ask the memory for more at once
/// than one, whose fetches ahead end with a page.
pub(super) fn streams(isa: Isa) -> usize {
    match isa {
        Isa::Portable | Isa::AvxVnni => 1, // one panel after the other
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => 1,
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => STREAMS,
    }
}

/// Some tokens, some panels and some columns.
#[derive(Clone)]
pub(super) struct Tile<'a> {
    pub(super) x: &'a Activations,
    /// The first, and how many: 1, 2 or 4; in a long tile any up to 8.
    pub(super) tokens: (usize, usize),
    pub(super) format: Format,
    /// The panels' bytes, from the first pair of blocks on.
    pub(super) bytes: &'a [u8],
    pub(super) panel_bytes: usize,
    /// 1 or 2; of one token so many as [`streams`] tells, or fewer.
    pub(super) panels: usize,
    /// Pairs of blocks, from the start of a span on.
    pub(super) pairs: Range<usize>,
    /// Whether the panels behind its own come next; who does not ask ahead does not ask this.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) goes_on: bool,
}

/// The activations of a span, as pointers to those of the first token.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) quants: *const i8,
    pub(super) starts: *const i32,
    pub(super) firsts: *const i32,
    pub(super) scales: *const f32,
}

impl Tile<'_> {
    /// Adds the products to `sums`: rows of `stride`, one a token.
    ///
    /// # Panics
    /// If a length does not fit.
    pub(super) fn multiply(&self, isa: Isa, sums: &mut [f32], stride: usize) {
        let (first, tokens) = self.tokens;
        assert!(first + tokens <= self.x.n, "tokens");
        let (start, end) = (self.pairs.start, self.pairs.end);
        assert!(
            start % SPAN_PAIRS == 0 && end * 2 * BLOCK <= self.x.cols().next_multiple_of(2 * BLOCK),
            "columns"
        );
        let last = (self.panels - 1) * self.panel_bytes + (end - start) * self.format.pair_bytes();
        assert!(last <= self.bytes.len(), "packed length");
        assert!(
            (tokens - 1) * stride + self.panels * ROWS <= sums.len(),
            "room for sums"
        );
        macro_rules! call {
            ($module:ident::$kernel:ident, $panels:literal, $($n:literal)*) => {
                // SAFETY: `isa` was detected on this machine; the lengths were checked.
                unsafe {
                    match (tokens, self.format) {
                        $(
                            ($n, Format::Q8) => $module::$kernel::<$n, $panels, true, NOTHING>(self, sums, stride),
                            ($n, Format::Q4) => $module::$kernel::<$n, $panels, false, NOTHING>(self, sums, stride),
                            ($n, Format::Q8Zero) => $module::$kernel::<$n, $panels, true, ZEROS>(self, sums, stride),
                            ($n, Format::Q4Zero) => $module::$kernel::<$n, $panels, false, ZEROS>(self, sums, stride),
                            ($n, Format::Q8Halves) => {
                                $module::$kernel::<$n, $panels, true, SECOND_SCALES>(self, sums, stride);
                            }
                        )*
                        _ => unreachable!("tiles have 1, 2 or 4 tokens, long ones up to 8"),
                    }
                }
            };
        }
        match (isa, self.panels) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Vnni | Isa::Amx, 1) => call!(x86_tile::avx512_vnni, 1, 1 2 3 4 5 6 7 8),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Vnni | Isa::Amx, PANELS) => call!(x86_tile::avx512_vnni, 2, 1 2 4),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Vnni | Isa::Amx, STREAMS) => call!(x86_tile::avx512_vnni, 4, 1),
            #[cfg(target_arch = "x86_64")]
            (Isa::AvxVnni, 1) => call!(x86_tile::avx_vnni, 1, 1 2 4),
            #[cfg(target_arch = "x86_64")]
            (Isa::AvxVnni, PANELS) => call!(x86_tile::avx_vnni, 2, 1 2 4),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx2, 1) => call!(x86_tile::avx2, 1, 1 2 4),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx2, PANELS) => call!(x86_tile::avx2, 2, 1 2 4),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx2, STREAMS) => call!(x86_tile::avx2, 4, 1),
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon, 1) => call!(neon_tile::neon, 1, 1 2 4),
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon, PANELS) => call!(neon_tile::neon, 2, 1 2 4),
            #[cfg(target_arch = "aarch64")]
            (Isa::NeonDot, 1) => call!(neon_tile::dotprod, 1, 1 2 4),
            #[cfg(target_arch = "aarch64")]
            (Isa::NeonDot, PANELS) => call!(neon_tile::dotprod, 2, 1 2 4),
            #[cfg(target_arch = "aarch64")]
            (Isa::NeonI8mm, 1) => call!(neon_tile::i8mm, 1, 1 2 4),
            #[cfg(target_arch = "aarch64")]
            (Isa::NeonI8mm, PANELS) => call!(neon_tile::i8mm, 2, 1 2 4),
            _ => self.portable(sums, stride),
        }
    }

    /// Where the activations of the first token lie in a span.
    ///
    /// # Safety
    /// The span is inside the activations.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[inline(always)]
    pub(super) unsafe fn activations(&self, pair: usize) -> Span {
        let at = pair / SPAN_PAIRS * self.x.n + self.tokens.0;
        // SAFETY: the caller's promise.
        unsafe {
            Span {
                quants: self.x.quants.as_ptr().add(at * SPAN),
                starts: self.x.starts.as_ptr().add(at * SPAN_BLOCKS),
                firsts: self.x.firsts.as_ptr().add(at * SPAN_BLOCKS),
                scales: self.x.scales.as_ptr().add(at),
            }
        }
    }

    fn portable(&self, sums: &mut [f32], stride: usize) {
        for (i, p) in (0..self.tokens.1).flat_map(|i| (0..self.panels).map(move |p| (i, p))) {
            let panel = &self.bytes[p * self.panel_bytes..];
            let sums = &mut sums[i * stride + p * ROWS..][..ROWS];
            for span in self.pairs.clone().step_by(SPAN_PAIRS) {
                let pairs = span..self.pairs.end.min(span + SPAN_PAIRS);
                let mut parts = [0.0; ROWS];
                for block in pairs.start * 2..pairs.end * 2 {
                    self.portable_block(panel, self.tokens.0 + i, block, &mut parts);
                }
                let scale = self.x.scales[span / SPAN_PAIRS * self.x.n + self.tokens.0 + i];
                for (sum, part) in sums.iter_mut().zip(parts) {
                    *sum += part * scale;
                }
            }
        }
    }

    fn portable_block(&self, panel: &[u8], token: usize, block: usize, parts: &mut [f32; ROWS]) {
        let at = (block / SPAN_BLOCKS * self.x.n + token) * SPAN_BLOCKS + block % SPAN_BLOCKS;
        let xs = &self.x.quants[at * BLOCK..][..BLOCK];
        let sum = self.x.starts[at] / -Format::Q8.offset(); // of the activations
        let block = block - self.pairs.start * 2;
        let quants = &panel[self.format.quants_at(block)..][..self.format.block_bytes()];
        for (r, part) in parts.iter_mut().enumerate() {
            let mut totals = [0; 2]; // of the halves
            for (c, x) in xs.iter().enumerate() {
                let q = match self.format {
                    Format::Q8 | Format::Q8Zero | Format::Q8Halves => {
                        quants[c / 4 * GROUP + r * 4 + c % 4]
                    }
                    Format::Q4 | Format::Q4Zero => {
                        quants[c % 16 / 4 * GROUP + r * 4 + c % 4] >> (c / 16 * 4) & 15
                    }
                };
                totals[c / 16] += (i32::from(q) - self.format.offset()) * i32::from(*x);
            }
            let half = |at: usize| f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32();
            let other = || half(self.format.other_at(block, r));
            let scale = half(self.format.scale_at(block, r));
            let [first, second] = totals;
            *part += match self.format.beside() {
                Beside::Nothing => (first + second) as f32 * scale,
                Beside::Zeros => ((first + second) as f32 - other() * sum as f32) * scale,
                Beside::SecondScales => first as f32 * scale + second as f32 * other(),
            };
        }
    }
}

/// [`Beside`] as a parameter of kernels.
pub(super) const NOTHING: u8 = Beside::Nothing as u8;
/// As [`NOTHING`].
pub(super) const ZEROS: u8 = Beside::Zeros as u8;
/// As [`NOTHING`].
pub(super) const SECOND_SCALES: u8 = Beside::SecondScales as u8;

/// The format of kernels that are made for it.
pub(super) const fn format<const EIGHT: bool, const BESIDE: u8>() -> Format {
    match (EIGHT, BESIDE) {
        (true, NOTHING) => Format::Q8,
        (false, NOTHING) => Format::Q4,
        (true, ZEROS) => Format::Q8Zero,
        (false, ZEROS) => Format::Q4Zero,
        (true, SECOND_SCALES) => Format::Q8Halves,
        _ => panic!("there is no such format"),
    }
}
