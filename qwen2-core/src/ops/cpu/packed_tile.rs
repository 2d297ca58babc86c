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
use crate::ops::packed::{BLOCK, Format, GROUP, ROWS};

/// Most tokens of a tile.
pub(super) const TOKENS: usize = 4;
/// Most tokens of a long tile, one panel high, where there are registers for it.
pub(super) const LONG: usize = 8;
/// Most panels of a tile: they share the broadcasts of the activations.
pub(super) const PANELS: usize = 2;
/// Pairs of blocks in a span.
pub(super) const SPAN_PAIRS: usize = SPAN_BLOCKS / 2;

/// Some tokens, some panels and some columns.
#[derive(Clone)]
pub(super) struct Tile<'a> {
    pub(super) x: &'a Activations,
    /// The first, and how many: 1, 2 or 4; in a long tile up to 8.
    pub(super) tokens: (usize, usize),
    pub(super) format: Format,
    /// The panels' bytes, from the first pair of blocks on.
    pub(super) bytes: &'a [u8],
    /// From one panel to the next.
    pub(super) panel_bytes: usize,
    /// 1 or 2.
    pub(super) panels: usize,
    /// Pairs of blocks, from the start of a span on.
    pub(super) pairs: Range<usize>,
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
                            ($n, Format::Q8) => $module::$kernel::<$n, $panels, true, false>(self, sums, stride),
                            ($n, Format::Q4) => $module::$kernel::<$n, $panels, false, false>(self, sums, stride),
                            ($n, Format::Q8Zero) => $module::$kernel::<$n, $panels, true, true>(self, sums, stride),
                            ($n, Format::Q4Zero) => $module::$kernel::<$n, $panels, false, true>(self, sums, stride),
                        )*
                        _ => unreachable!("tiles have 1, 2 or 4 tokens, long ones up to 8"),
                    }
                }
            };
        }
        match (isa, self.panels) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Vnni | Isa::Amx, 1) => call!(x86::avx512_vnni, 1, 1 2 3 4 5 6 7 8),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Vnni | Isa::Amx, PANELS) => call!(x86::avx512_vnni, 2, 1 2 4),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx2, 1) => call!(x86::avx2, 1, 1 2 4),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx2, PANELS) => call!(x86::avx2, 2, 1 2 4),
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

    /// Where the activations of the first token lie in a span, a pointer each to quants, starts and
    /// scales.
    ///
    /// # Safety
    /// The span is inside the activations.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[inline(always)]
    pub(super) unsafe fn activations(&self, pair: usize) -> (*const i8, *const i32, *const f32) {
        let at = pair / SPAN_PAIRS * self.x.n + self.tokens.0;
        // SAFETY: the caller's promise.
        unsafe {
            (
                self.x.quants.as_ptr().add(at * SPAN),
                self.x.starts.as_ptr().add(at * SPAN_BLOCKS),
                self.x.scales.as_ptr().add(at),
            )
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
            let mut total = -self.format.offset() * sum;
            for (c, x) in xs.iter().enumerate() {
                let q = match self.format {
                    Format::Q8 | Format::Q8Zero => quants[c / 4 * GROUP + r * 4 + c % 4],
                    Format::Q4 | Format::Q4Zero => {
                        quants[c % 16 / 4 * GROUP + r * 4 + c % 4] >> (c / 16 * 4) & 15
                    }
                };
                total += i32::from(q) * i32::from(*x);
            }
            let half = |at: usize| f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32();
            let mut total = total as f32;
            if self.format.has_zeros() {
                total -= half(self.format.zero_at(block, r)) * sum as f32;
            }
            *part += total * half(self.format.scale_at(block, r));
        }
    }
}

/// The format of kernels that are made for it.
pub(super) const fn format<const EIGHT: bool, const ZEROS: bool>() -> Format {
    match (EIGHT, ZEROS) {
        (true, false) => Format::Q8,
        (false, false) => Format::Q4,
        (true, true) => Format::Q8Zero,
        (false, true) => Format::Q4Zero,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, ROWS, SPAN, SPAN_BLOCKS, SPAN_PAIRS, Tile, format};

    /// # Safety
    /// The instruction set is present; `tile` has `N` tokens and `P` panels, and its lengths were
    /// checked.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub(super) unsafe fn avx512_vnni<
        const N: usize,
        const P: usize,
        const EIGHT: bool,
        const ZEROS: bool,
    >(
        tile: &Tile<'_>,
        sums: &mut [f32],
        stride: usize,
    ) {
        let format = format::<EIGHT, ZEROS>(); // a constant of this function
        let low = _mm512_set1_epi8(15);
        // SAFETY: every pointer stays inside the lengths that `Tile::multiply` checked.
        unsafe {
            let sums = sums.as_mut_ptr();
            let place = |i: usize, p: usize| sums.add(i * stride + p * ROWS);
            let mut acc: [[__m512; P]; N] =
                std::array::from_fn(|i| std::array::from_fn(|p| _mm512_loadu_ps(place(i, p))));
            let mut panels: [*const u8; P] =
                std::array::from_fn(|p| tile.bytes.as_ptr().add(p * tile.panel_bytes));
            let mut pair = tile.pairs.start;
            while pair < tile.pairs.end {
                let (mut quants, mut starts, scales) = tile.activations(pair);
                let mut parts = [[_mm512_setzero_ps(); P]; N];
                let end = tile.pairs.end.min(pair + SPAN_PAIRS);
                while pair < end {
                    for half in 0..2 {
                        // The offset of the weights times the sum of the activations.
                        let mut totals: [[__m512i; P]; N] = std::array::from_fn(|i| {
                            let start = _mm512_set1_epi32(*starts.add(i * SPAN_BLOCKS + half));
                            [if ZEROS {
                                _mm512_setzero_si512()
                            } else if EIGHT {
                                start
                            } else {
                                _mm512_srai_epi32::<4>(start) // 8 of 128
                            }; P]
                        });
                        for g in 0..4 {
                            // Columns 4 g.. and 16 + 4 g.. of the block.
                            let w = panels.map(|panel| {
                                let quants = panel.add(format.quants_at(half) + g * 64);
                                let first = _mm512_loadu_si512(quants.cast());
                                if EIGHT {
                                    (first, _mm512_loadu_si512(quants.add(256).cast()))
                                } else {
                                    let high = _mm512_srli_epi16::<4>(first);
                                    (_mm512_and_si512(first, low), _mm512_and_si512(high, low))
                                }
                            });
                            for (i, totals) in totals.iter_mut().enumerate() {
                                let at = i * SPAN + half * BLOCK + g * 4;
                                let columns: *const i32 = quants.add(at).cast();
                                let first = _mm512_set1_epi32(columns.read_unaligned());
                                let second = _mm512_set1_epi32(columns.add(4).read_unaligned());
                                for (total, w) in totals.iter_mut().zip(w) {
                                    *total = _mm512_dpbusd_epi32(*total, w.0, first);
                                }
                                for (total, w) in totals.iter_mut().zip(w) {
                                    *total = _mm512_dpbusd_epi32(*total, w.1, second);
                                }
                            }
                        }
                        let numbers = |panel: *const u8, at: usize| {
                            _mm512_cvtph_ps(_mm256_loadu_si256(panel.add(at).cast()))
                        };
                        let scales = panels.map(|panel| numbers(panel, format.scale_at(half, 0)));
                        let zeros = panels.map(|panel| match ZEROS {
                            true => numbers(panel, format.zero_at(half, 0)),
                            false => _mm512_setzero_ps(),
                        });
                        for (i, (parts, totals)) in parts.iter_mut().zip(totals).enumerate() {
                            // -128 times the sum of the activations, brought to minus that sum.
                            let start = *starts.add(i * SPAN_BLOCKS + half) as f32 / 128.0;
                            for p in 0..P {
                                let mut total = _mm512_cvtepi32_ps(totals[p]);
                                if ZEROS {
                                    total = _mm512_fmadd_ps(zeros[p], _mm512_set1_ps(start), total);
                                }
                                parts[p] = _mm512_fmadd_ps(total, scales[p], parts[p]);
                            }
                        }
                    }
                    panels = panels.map(|panel| panel.add(format.pair_bytes()));
                    (quants, starts) = (quants.add(2 * BLOCK), starts.add(2));
                    pair += 1;
                }
                for (i, (acc, parts)) in acc.iter_mut().zip(parts).enumerate() {
                    let scale = _mm512_set1_ps(*scales.add(i));
                    for (acc, part) in acc.iter_mut().zip(parts) {
                        *acc = _mm512_fmadd_ps(part, scale, *acc);
                    }
                }
            }
            for (i, acc) in acc.into_iter().enumerate() {
                for (p, acc) in acc.into_iter().enumerate() {
                    _mm512_storeu_ps(place(i, p), acc);
                }
            }
        }
    }

    /// # Safety
    /// As [`avx512_vnni`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn avx2<
        const N: usize,
        const P: usize,
        const EIGHT: bool,
        const ZEROS: bool,
    >(
        tile: &Tile<'_>,
        sums: &mut [f32],
        stride: usize,
    ) {
        let format = format::<EIGHT, ZEROS>();
        // SAFETY: as in `avx512_vnni`; a half is eight rows, 32 bytes of every group.
        unsafe {
            for half in 0..2 * P {
                let sums = sums.as_mut_ptr().add(half * 8);
                let mut acc: [_; N] =
                    std::array::from_fn(|i| _mm256_loadu_ps(sums.add(i * stride)));
                let panel = tile.bytes.as_ptr().add(half / 2 * tile.panel_bytes);
                let mut pair = tile.pairs.start;
                while pair < tile.pairs.end {
                    let (xs, starts, x_scales) = tile.activations(pair);
                    let mut parts = [_mm256_setzero_ps(); N];
                    let end = tile.pairs.end.min(pair + SPAN_PAIRS);
                    for b in 0..2 * (end - pair) {
                        let block = (pair - tile.pairs.start) * 2 + b;
                        let quants = panel.add(format.quants_at(block) + half % 2 * 32);
                        let numbers =
                            |at: usize| _mm256_cvtph_ps(_mm_loadu_si128(panel.add(at).cast()));
                        let scale = numbers(format.scale_at(block, half % 2 * 8));
                        let zero = match ZEROS {
                            true => numbers(format.zero_at(block, half % 2 * 8)),
                            false => _mm256_setzero_ps(),
                        };
                        for (i, part) in parts.iter_mut().enumerate() {
                            let columns = xs.add(i * SPAN + b * BLOCK).cast();
                            let start = *starts.add(i * SPAN_BLOCKS + b);
                            let total = match (EIGHT, ZEROS) {
                                (true, _) => eight_bits::<ZEROS>(quants, columns),
                                (false, false) => four_bits(quants, columns, start / 16), // 8 of 128
                                (false, true) => four_bits(quants, columns, 0),
                            };
                            let mut total = _mm256_cvtepi32_ps(total);
                            if ZEROS {
                                let start = _mm256_set1_ps(start as f32 / 128.0);
                                total = _mm256_fmadd_ps(zero, start, total);
                            }
                            *part = _mm256_fmadd_ps(total, scale, *part);
                        }
                    }
                    for (i, (acc, part)) in acc.iter_mut().zip(parts).enumerate() {
                        *acc = _mm256_fmadd_ps(part, _mm256_set1_ps(*x_scales.add(i)), *acc);
                    }
                    pair = end;
                }
                for (i, acc) in acc.into_iter().enumerate() {
                    _mm256_storeu_ps(sums.add(i * stride), acc);
                }
            }
        }
    }

    /// A block of eight rows, 64 bytes apart, with a block of activations; `PLAIN`: without an offset.
    ///
    /// # Safety
    /// The instruction set is present, and the blocks are there.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn eight_bits<const PLAIN: bool>(quants: *const u8, columns: *const i32) -> __m256i {
        let flip = _mm256_set1_epi8(if PLAIN { 0 } else { -128 });
        let ones = _mm256_set1_epi16(1);
        let mut total = _mm256_setzero_si256();
        for g in 0..8 {
            // SAFETY: the caller's promise.
            let (w, x) = unsafe {
                (
                    _mm256_loadu_si256(quants.add(g * 64).cast()),
                    _mm256_set1_epi32(columns.add(g).read_unaligned()),
                )
            };
            let w = _mm256_xor_si256(w, flip); // -127..=127
            // |x| · (w with the sign of x): two products stay below 2^15.
            let p = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
            total = _mm256_add_epi32(total, _mm256_madd_epi16(p, ones));
        }
        total
    }

    /// As [`eight_bits`]; `start` takes the offset off.
    ///
    /// # Safety
    /// As [`eight_bits`].
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn four_bits(quants: *const u8, columns: *const i32, start: i32) -> __m256i {
        let low = _mm256_set1_epi8(15);
        let ones = _mm256_set1_epi16(1);
        let mut total = _mm256_set1_epi32(start);
        for g in 0..4 {
            // SAFETY: the caller's promise.
            let (both, xa, xb) = unsafe {
                (
                    _mm256_loadu_si256(quants.add(g * 64).cast()),
                    _mm256_set1_epi32(columns.add(g).read_unaligned()),
                    _mm256_set1_epi32(columns.add(g + 4).read_unaligned()),
                )
            };
            let first = _mm256_and_si256(both, low);
            let second = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
            let p = _mm256_add_epi16(
                _mm256_maddubs_epi16(first, xa),
                _mm256_maddubs_epi16(second, xb),
            );
            total = _mm256_add_epi32(total, _mm256_madd_epi16(p, ones));
        }
        total
    }
}
