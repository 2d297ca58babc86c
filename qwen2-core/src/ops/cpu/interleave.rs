//! Rows of weights of any form as bf16 in the order that products of pairs take them: 32 rows at once,
//! `[pair of columns][row]`.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::lines::Line;
use super::pool;
use super::simd::prefetch;
use crate::ops::packed::{self, Beside, Format, GROUP, Shape};

/// Rows that are interleaved together: two vectors, two panels of packed weights.
pub(super) const ROWS: usize = 2 * packed::ROWS;
/// Columns of a block of activations: one cache line a token. What is interleaved is padded to them.
pub(super) const BLOCK: usize = 32;
const _: () = assert!(BLOCK == packed::BLOCK);

/// A matrix in the form that it is kept in.
#[derive(Clone, Copy)]
pub(crate) enum Weights<'a> {
    /// Rows of so many columns.
    Dense(&'a [bf16], usize),
    Packed(&'a [u8], Shape),
}

/// Some columns of 32 rows: the first row, the first column, a whole number of blocks before it, and how
/// many columns.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) row: usize,
    pub(super) start: usize,
    pub(super) depth: usize,
}

impl Weights<'_> {
    /// `in_features`.
    pub(super) fn cols(self) -> usize {
        match self {
            Self::Dense(_, cols) => cols,
            Self::Packed(_, shape) => shape.cols,
        }
    }

    /// `out_features`.
    pub(super) fn rows(self) -> usize {
        match self {
            Self::Dense(weight, cols) => weight.len() / cols,
            Self::Packed(_, shape) => shape.rows,
        }
    }

    /// # Panics
    /// If the length does not fit the shape.
    pub(super) fn check(self) {
        match self {
            Self::Dense(weight, cols) => {
                assert!(weight.len().is_multiple_of(cols), "weight length");
            }
            Self::Packed(bytes, shape) => assert_eq!(bytes.len(), shape.bytes(), "packed length"),
        }
    }

    /// Where rows lie, the first of them a multiple of 32.
    pub(super) fn streams(self, rows: Range<usize>) -> pool::Streams {
        match self {
            Self::Dense(weight, cols) => {
                pool::streams(&weight[rows.start * cols..rows.end * cols], &[])
            }
            Self::Packed(bytes, shape) => {
                let panel = shape.panel_bytes();
                let (first, end) = (rows.start / packed::ROWS, rows.end.div_ceil(packed::ROWS));
                pool::streams(&bytes[first * panel..end * panel], &[])
            }
        }
    }

    /// Asks for the lines of the share of a part from `done` of `all` on, `step` of them.
    #[inline]
    pub(super) fn ask(self, part: Part, (done, step, all): (usize, usize, usize)) {
        let share = |lines: usize| lines * done / all..lines * (done + step) / all;
        match self {
            Self::Dense(weight, cols) => {
                let columns = part.start..(part.start + part.depth).min(cols);
                for row in share(ROWS) {
                    if let Some(row) = weight.get((part.row + row) * cols..)
                        && let Some(row) = row.get(columns.clone())
                    {
                        let lines = row.chunks(BLOCK);
                        lines.for_each(|line| prefetch(line.as_ptr().addr()));
                    }
                }
            }
            Self::Packed(bytes, shape) => {
                let pair = shape.format.pair_bytes();
                let first = part.row / packed::ROWS * shape.panel_bytes();
                let start = first + part.start / (2 * BLOCK) * pair;
                let lines = part.depth.min(shape.cols).div_ceil(2 * BLOCK) * pair / GROUP;
                for panel in [start, start + shape.panel_bytes()] {
                    for line in share(lines) {
                        // Past the end it asks for nothing that matters.
                        prefetch(bytes.as_ptr().addr() + panel + line * GROUP);
                    }
                }
            }
        }
    }

    /// Brings a part into order. What is past the matrix becomes zero.
    ///
    /// # Safety
    /// AVX-512 with BW and BF16 is present, the length was [checked](Self::check), and the columns, of
    /// blocks but for the last, are inside the matrix.
    pub(super) unsafe fn interleave(self, part: Part, out: &mut [u32]) {
        assert!(
            part.depth.next_multiple_of(BLOCK) / 2 * ROWS <= out.len(),
            "room for a part"
        );
        assert!(
            part.start.is_multiple_of(BLOCK) && part.start + part.depth <= self.cols(),
            "columns"
        );
        // SAFETY: the rest is the caller's promise.
        unsafe {
            match self {
                Self::Dense(weight, cols) => interleave(weight, cols, part, out),
                Self::Packed(bytes, shape) => match shape.format {
                    Format::Q8 | Format::Q8Zero | Format::Q8Halves => {
                        unpack::<true>(bytes, shape, part, out);
                    }
                    Format::Q4 | Format::Q4Zero => unpack::<false>(bytes, shape, part, out),
                },
            }
        }
    }
}

/// A part of dense rows.
///
/// # Safety
/// As [`Weights::interleave`], which has checked the columns and the room.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn interleave(weight: &[bf16], cols: usize, part: Part, out: &mut [u32]) {
    let Part { row, start, depth } = part;
    let rows = ROWS.min((weight.len() / cols).saturating_sub(row));
    let whole = depth / BLOCK * BLOCK;
    for half in 0..2 {
        for k in (0..whole).step_by(BLOCK) {
            let mut tile = [_mm512_setzero_si512(); 16];
            for (r, tile) in tile.iter_mut().enumerate() {
                let r = half * 16 + r;
                if r < rows {
                    let at = (row + r) * cols + start + k;
                    // SAFETY: 32 columns from `start + k` on are inside the row.
                    *tile = unsafe { _mm512_loadu_si512(weight.as_ptr().add(at).cast()) };
                }
            }
            transpose(&mut tile);
            for (p, tile) in tile.iter().enumerate() {
                let at = (k / 2 + p) * ROWS + half * 16;
                // SAFETY: `out` has `depth / 2` words for each of the 32 rows.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(at).cast(), *tile) };
            }
        }
    }
    for pair in whole / 2..depth.next_multiple_of(BLOCK) / 2 {
        for r in 0..ROWS {
            let word = |k: usize| {
                if r < rows && k < depth {
                    u32::from(weight[(row + r) * cols + start + k].to_bits())
                } else {
                    0
                }
            };
            out[pair * ROWS + r] = word(2 * pair) | word(2 * pair + 1) << 16;
        }
    }
}

/// Transposes 16 × 16 words.
#[target_feature(enable = "avx512f,avx512bw")]
fn transpose(t: &mut [__m512i; 16]) {
    let mut a = [_mm512_setzero_si512(); 16];
    for i in (0..16).step_by(4) {
        let (lo01, hi01) = (
            _mm512_unpacklo_epi32(t[i], t[i + 1]),
            _mm512_unpackhi_epi32(t[i], t[i + 1]),
        );
        let (lo23, hi23) = (
            _mm512_unpacklo_epi32(t[i + 2], t[i + 3]),
            _mm512_unpackhi_epi32(t[i + 2], t[i + 3]),
        );
        a[i] = _mm512_unpacklo_epi64(lo01, lo23);
        a[i + 1] = _mm512_unpackhi_epi64(lo01, lo23);
        a[i + 2] = _mm512_unpacklo_epi64(hi01, hi23);
        a[i + 3] = _mm512_unpackhi_epi64(hi01, hi23);
    }
    // Now a[4 i + c] holds column 4 l + c of rows 4 i..4 i + 4 in its lane l.
    for c in 0..4 {
        let (r0, r1, r2, r3) = (a[c], a[4 + c], a[8 + c], a[12 + c]);
        let (l01, h01) = (
            _mm512_shuffle_i32x4::<0x88>(r0, r1),
            _mm512_shuffle_i32x4::<0xDD>(r0, r1),
        );
        let (l23, h23) = (
            _mm512_shuffle_i32x4::<0x88>(r2, r3),
            _mm512_shuffle_i32x4::<0xDD>(r2, r3),
        );
        t[c] = _mm512_shuffle_i32x4::<0x88>(l01, l23);
        t[8 + c] = _mm512_shuffle_i32x4::<0xDD>(l01, l23);
        t[4 + c] = _mm512_shuffle_i32x4::<0x88>(h01, h23);
        t[12 + c] = _mm512_shuffle_i32x4::<0xDD>(h01, h23);
    }
}

/// A part of packed rows, rounded to bf16.
///
/// # Safety
/// As [`Weights::interleave`], which has checked the columns and the room; `EIGHT` is that of the format.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn unpack<const EIGHT: bool>(bytes: &[u8], shape: Shape, part: Part, out: &mut [u32]) {
    let first = part.row / packed::ROWS;
    for half in 0..2 {
        let Some(panel) = bytes.chunks(shape.panel_bytes()).nth(first + half) else {
            // Rows that are none.
            for rows in out.as_chunks_mut::<ROWS>().0 {
                rows[half * packed::ROWS..][..packed::ROWS].fill(0);
            }
            continue;
        };
        let blocks = part.start / BLOCK..(part.start + part.depth).div_ceil(BLOCK);
        for (i, block) in blocks.enumerate() {
            // SAFETY: the block is inside the panel, its 16 pairs of columns are inside `out`.
            unsafe {
                let out = out
                    .as_mut_ptr()
                    .add(i * BLOCK / 2 * ROWS + half * packed::ROWS);
                unpack_block::<EIGHT>(shape.format, panel, block, out);
            }
        }
    }
}

/// Two rows of numbers rounded to bf16 and laid side by side: words of the first's in their low halves, the
/// second's in their high ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn pairs(even: __m512, odd: __m512) -> Line<u32> {
    const ORDER: [i16; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 32 {
            order[i] = (i / 2 + i % 2 * 16) as i16;
            i += 1;
        }
        order
    };
    // SAFETY: 32 words are read; all the types are 64 bytes of plain numbers.
    unsafe {
        let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
        let words = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
        std::mem::transmute::<__m512i, Line<u32>>(_mm512_permutexvar_epi16(order, words))
    }
}

/// A block of 16 rows.
///
/// # Safety
/// The instructions are present, the panel has the block, and `out` has 16 rows of 32 words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn unpack_block<const EIGHT: bool>(
    format: Format,
    panel: &[u8],
    block: usize,
    out: *mut u32,
) {
    // SAFETY: 16 halves lie at `at`.
    let halves =
        |at: usize| unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(panel.as_ptr().add(at).cast())) };
    let scale = halves(format.scale_at(block, 0));
    let offset = _mm512_set1_ps(-format.offset() as f32);
    // Of the first half of the block and of the second one, what quants are multiplied by and what is added.
    let (scales, adds) = match format.beside() {
        Beside::Nothing => ([scale; 2], [_mm512_mul_ps(scale, offset); 2]),
        Beside::Zeros => {
            let zero = halves(format.other_at(block, 0));
            let add = _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_setzero_ps(), zero));
            ([scale; 2], [add; 2])
        }
        Beside::SecondScales => {
            let second = halves(format.other_at(block, 0));
            let adds = [scale, second].map(|scale| _mm512_mul_ps(scale, offset));
            ([scale, second], adds)
        }
    };
    let mask = _mm512_set1_epi32(if EIGHT { 0xFF } else { 0xF });
    // Four columns of bytes, `half` of the block, to two pairs from `pair` on.
    let store = |quants: __m512i, half: usize, pair: usize| {
        let value = |quants: __m512i| {
            let quant = _mm512_cvtepi32_ps(_mm512_and_si512(quants, mask));
            _mm512_fmadd_ps(quant, scales[half], adds[half])
        };
        let values = [
            value(quants),
            value(_mm512_srli_epi32::<8>(quants)),
            value(_mm512_srli_epi32::<16>(quants)),
            value(_mm512_srli_epi32::<24>(quants)),
        ];
        for (i, [even, odd]) in values.as_chunks::<2>().0.iter().enumerate() {
            let words = pairs(*even, *odd);
            // SAFETY: the pair is inside `out`.
            unsafe {
                out.add((pair + i) * ROWS)
                    .cast::<Line<u32>>()
                    .write_unaligned(words)
            };
        }
    };
    let quants = &panel[format.quants_at(block)..][..format.block_bytes()];
    for (group, quants) in quants.as_chunks::<GROUP>().0.iter().enumerate() {
        // SAFETY: 64 bytes.
        let quants = unsafe { _mm512_loadu_si512(quants.as_ptr().cast()) };
        if EIGHT {
            store(quants, group / 4, 2 * group);
        } else {
            store(quants, 0, 2 * group);
            store(_mm512_srli_epi32::<4>(quants), 1, BLOCK / 4 + 2 * group);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::quantized::tests::{pack, pack_blocks};
    use super::*;

    #[test]
    fn packed_rows_become_what_they_stand_for_rounded() {
        if !super::super::bf16_gemm::is_present() {
            return; // nothing to test: the dispatch never comes here
        }
        for format in [
            Format::Q8,
            Format::Q4,
            Format::Q4Zero,
            Format::Q8Zero,
            Format::Q8Halves,
        ] {
            let shape = Shape {
                format,
                rows: 75,
                cols: 224,
            };
            let w: Vec<f32> = (0..75 * 224).map(|i| (i as f32 * 0.37).sin()).collect();
            let bytes = match format.is_plain() {
                true => pack(shape, &w),
                false => pack_blocks(shape),
            };
            let weights = Weights::Packed(&bytes, shape);
            weights.check();
            for (row, start, depth) in [(0, 0, 224), (32, 64, 160), (64, 192, 32)] {
                let part = Part { row, start, depth };
                let mut out = vec![u32::MAX; depth / 2 * ROWS];
                // SAFETY: the instructions are there, and the lengths were checked.
                unsafe { weights.interleave(part, &mut out) };
                let mut want = vec![0.0; shape.cols];
                for r in 0..ROWS {
                    match row + r < shape.rows {
                        true => shape.unpack_row(&bytes, row + r, &mut want),
                        false => want.fill(0.0),
                    }
                    for k in 0..depth {
                        let word = out[k / 2 * ROWS + r] >> (k % 2 * 16);
                        let got = bf16::from_bits(word as u16).to_f32();
                        let want = want[start + k];
                        // Zeros with a fraction are rounded once more on the way.
                        let most = want.abs() / 256.0 + 1e-5;
                        assert!(
                            (got - want).abs() <= most,
                            "{format:?} {r} {k}: {got} {want}"
                        );
                    }
                }
            }
        }
    }
}
