//! Tiles of packed weights on x86-64: with integer dot products (VNNI) of 64 or 32 bytes, and with
//! AVX2's multiplications.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;
use std::ops::Range;

use super::activations::{SPAN, SPAN_BLOCKS};
use super::packed_tile::{NOTHING, SECOND_SCALES, SPAN_PAIRS, Tile, ZEROS, format};
use super::simd::Simd;
use super::x86::{Avx2, Avx512};
use crate::ops::packed::{BLOCK, ROWS};

/// A vector of bytes, four for each row, and sums of their products as integers.
///
/// # Safety
/// Every function requires the instruction set of the implementation; a load reads four bytes for
/// each of [`Simd::LANES`] rows.
trait Bytes: Copy {
    /// A number for each row.
    type Floats: Simd;
    unsafe fn load(pointer: *const u8) -> Self;
    unsafe fn splat(word: i32) -> Self;
    /// The lower four bits of each byte, and the upper.
    unsafe fn nibbles(self) -> (Self, Self);
    /// The sums, and of each row four products of unsigned weights with signed activations.
    unsafe fn add_products(self, weights: Self, x: Self) -> Self;
    unsafe fn to_floats(self) -> Self::Floats;
}

#[derive(Clone, Copy)]
struct Zmm(__m512i);

// SAFETY (every block below): the caller guarantees the instruction set and the pointers, by the
// contract of `Bytes`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Bytes for Zmm {
    type Floats = Avx512;
    #[inline(always)]
    unsafe fn load(pointer: *const u8) -> Self {
        unsafe { Self(_mm512_loadu_si512(pointer.cast())) }
    }
    #[inline(always)]
    unsafe fn splat(word: i32) -> Self {
        unsafe { Self(_mm512_set1_epi32(word)) }
    }
    #[inline(always)]
    unsafe fn nibbles(self) -> (Self, Self) {
        unsafe {
            let low = _mm512_set1_epi8(15);
            let high = _mm512_srli_epi16::<4>(self.0);
            (
                Self(_mm512_and_si512(self.0, low)),
                Self(_mm512_and_si512(high, low)),
            )
        }
    }
    #[inline(always)]
    unsafe fn add_products(self, weights: Self, x: Self) -> Self {
        unsafe { Self(_mm512_dpbusd_epi32(self.0, weights.0, x.0)) }
    }
    #[inline(always)]
    unsafe fn to_floats(self) -> Avx512 {
        unsafe { Avx512(_mm512_cvtepi32_ps(self.0)) }
    }
}

#[derive(Clone, Copy)]
struct Ymm(__m256i);

// SAFETY (every block below): as for Zmm.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Bytes for Ymm {
    type Floats = Avx2;
    #[inline(always)]
    unsafe fn load(pointer: *const u8) -> Self {
        unsafe { Self(_mm256_loadu_si256(pointer.cast())) }
    }
    #[inline(always)]
    unsafe fn splat(word: i32) -> Self {
        unsafe { Self(_mm256_set1_epi32(word)) }
    }
    #[inline(always)]
    unsafe fn nibbles(self) -> (Self, Self) {
        unsafe {
            let low = _mm256_set1_epi8(15);
            let high = _mm256_srli_epi16::<4>(self.0);
            (
                Self(_mm256_and_si256(self.0, low)),
                Self(_mm256_and_si256(high, low)),
            )
        }
    }
    #[inline(always)]
    unsafe fn add_products(self, weights: Self, x: Self) -> Self {
        unsafe { Self(_mm256_dpbusd_avx_epi32(self.0, weights.0, x.0)) }
    }
    #[inline(always)]
    unsafe fn to_floats(self) -> Avx2 {
        unsafe { Avx2(_mm256_cvtepi32_ps(self.0)) }
    }
}

/// # Safety
/// The instruction set is present; `tile` has `N` tokens and `P` panels, and its lengths were
/// checked.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn avx512_vnni<
    const N: usize,
    const P: usize,
    const EIGHT: bool,
    const BESIDE: u8,
>(
    tile: &Tile<'_>,
    sums: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { vnni::<Zmm, N, P, EIGHT, BESIDE>(tile, sums.as_mut_ptr(), stride) }
}

/// # Safety
/// As [`avx512_vnni`].
#[target_feature(enable = "avxvnni,avx2,fma,f16c")]
pub(super) unsafe fn avx_vnni<
    const N: usize,
    const P: usize,
    const EIGHT: bool,
    const BESIDE: u8,
>(
    tile: &Tile<'_>,
    sums: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { by_panels::<Ymm, N, P, EIGHT, BESIDE>(tile, sums, stride) }
}

/// One panel after the other, two vectors high: there are no registers for more sums.
///
/// # Safety
/// As [`avx512_vnni`], with the instruction set of `B`.
#[inline(always)]
unsafe fn by_panels<
    B: Bytes,
    const N: usize,
    const P: usize,
    const EIGHT: bool,
    const BESIDE: u8,
>(
    tile: &Tile<'_>,
    sums: &mut [f32],
    stride: usize,
) {
    for p in 0..P {
        let tile = Tile {
            bytes: &tile.bytes[p * tile.panel_bytes..],
            ..tile.clone()
        };
        let sums = sums[p * ROWS..].as_mut_ptr();
        // SAFETY: the caller's promise.
        unsafe { vnni::<B, N, 2, EIGHT, BESIDE>(&tile, sums, stride) }
    }
}

/// `V` vectors of rows.
///
/// Arrays of vectors are filled by loops: what `map` or `from_fn` is given may stay a function without the
/// instruction set, called in the innermost loop.
///
/// # Safety
/// As [`avx512_vnni`], with the instruction set of `B`; `sums` are those of the tile.
#[inline(always)]
unsafe fn vnni<B: Bytes, const N: usize, const V: usize, const EIGHT: bool, const BESIDE: u8>(
    tile: &Tile<'_>,
    sums: *mut f32,
    stride: usize,
) {
    let format = format::<EIGHT, BESIDE>(); // a constant of this function
    let lanes = B::Floats::LANES;
    // SAFETY: every pointer stays inside the lengths that `Tile::multiply` checked.
    unsafe {
        let zero = B::Floats::zero();
        let place = |i: usize, v: usize| sums.add(i * stride + v * lanes);
        let mut acc = [[zero; V]; N];
        for (i, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = B::Floats::load(place(i, v));
            }
        }
        // The panel of each vector; the first of its rows there.
        let mut panels = [tile.bytes.as_ptr(); V];
        for (v, panel) in panels.iter_mut().enumerate() {
            *panel = panel.add(v * lanes / ROWS * tile.panel_bytes);
        }
        let row = |v: usize| v * lanes % ROWS;
        let mut pair = tile.pairs.start;
        while pair < tile.pairs.end {
            let mut x = tile.activations(pair);
            let mut parts = [[zero; V]; N];
            let end = tile.pairs.end.min(pair + SPAN_PAIRS);
            while pair < end {
                let ahead = ahead(tile, pair);
                if N == 1 {
                    for panel in panels.iter().step_by(ROWS / lanes) {
                        ask::<B::Floats>(panel.wrapping_add(ahead), format.head_bytes());
                    }
                }
                for half in 0..2 {
                    // The offset of the weights times the sum of the activations; where the second halves
                    // of blocks have scales of their own, that of the first ones, and that of the second.
                    let mut totals = [[B::splat(0); V]; N];
                    let mut seconds = [[B::splat(0); V]; N];
                    for (i, totals) in totals.iter_mut().enumerate() {
                        let start = *x.starts.add(i * SPAN_BLOCKS + half);
                        let first = *x.firsts.add(i * SPAN_BLOCKS + half);
                        if BESIDE == SECOND_SCALES {
                            *totals = [B::splat(first); V];
                            seconds[i] = [B::splat(start - first); V];
                        } else if BESIDE == NOTHING {
                            let start = if EIGHT { start } else { start / 16 }; // 8 of 128
                            *totals = [B::splat(start); V];
                        }
                    }
                    // A number that the compiler does not see: unrolled, it brings what is asked for together.
                    let groups = if N == 1 { std::hint::black_box(4) } else { 4 };
                    for g in 0..groups {
                        // Columns 4 g.. and 16 + 4 g.. of the block.
                        let mut w = [(B::splat(0), B::splat(0)); V];
                        for (v, w) in w.iter_mut().enumerate() {
                            let quants =
                                panels[v].add(format.quants_at(half) + g * 64 + row(v) * 4);
                            let first = B::load(quants);
                            if N == 1 && row(v) == 0 {
                                ask::<B::Floats>(quants.wrapping_add(ahead), LINE);
                                if EIGHT {
                                    ask::<B::Floats>(quants.wrapping_add(ahead + 256), LINE);
                                }
                            }
                            *w = if EIGHT {
                                (first, B::load(quants.add(256)))
                            } else {
                                first.nibbles()
                            };
                        }
                        for (i, totals) in totals.iter_mut().enumerate() {
                            let at = i * SPAN + half * BLOCK + g * 4;
                            let columns: *const i32 = x.quants.add(at).cast();
                            let first = B::splat(columns.read_unaligned());
                            let second = B::splat(columns.add(4).read_unaligned());
                            for (total, w) in totals.iter_mut().zip(&w) {
                                *total = total.add_products(w.0, first);
                            }
                            let totals = match BESIDE {
                                SECOND_SCALES => &mut seconds[i],
                                _ => totals,
                            };
                            for (total, w) in totals.iter_mut().zip(&w) {
                                *total = total.add_products(w.1, second);
                            }
                        }
                    }
                    let (mut scales, mut others) = ([zero; V], [zero; V]);
                    for v in 0..V {
                        let at = panels[v].add(format.scale_at(half, row(v)));
                        scales[v] = B::Floats::load_f16(at.cast());
                        if BESIDE != NOTHING {
                            let at = panels[v].add(format.other_at(half, row(v)));
                            others[v] = B::Floats::load_f16(at.cast());
                        }
                    }
                    for (i, parts) in parts.iter_mut().enumerate() {
                        // -128 times the sum of the activations, brought to minus that sum.
                        let start = *x.starts.add(i * SPAN_BLOCKS + half) as f32 / 128.0;
                        for v in 0..V {
                            let mut total = totals[i][v].to_floats();
                            if BESIDE == ZEROS {
                                total = others[v].mul_add(B::Floats::splat(start), total);
                            }
                            parts[v] = total.mul_add(scales[v], parts[v]);
                            if BESIDE == SECOND_SCALES {
                                parts[v] = seconds[i][v].to_floats().mul_add(others[v], parts[v]);
                            }
                        }
                    }
                }
                for panel in &mut panels {
                    *panel = panel.add(format.pair_bytes());
                }
                (x.quants, x.starts) = (x.quants.add(2 * BLOCK), x.starts.add(2));
                x.firsts = x.firsts.add(2);
                pair += 1;
            }
            for (i, (acc, parts)) in acc.iter_mut().zip(&parts).enumerate() {
                let scale = B::Floats::splat(*x.scales.add(i));
                for (acc, part) in acc.iter_mut().zip(parts) {
                    *acc = part.mul_add(scale, *acc);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            for (v, acc) in acc.iter().enumerate() {
                acc.store(place(i, v));
            }
        }
    }
}

/// A block of sixteen rows, two vectors of four columns of each, and `N` tokens of it.
struct Block<'a, const N: usize> {
    weights: *const u8,
    /// How much further on lie the weights that one token asks for meanwhile.
    ahead: usize,
    /// Columns of the first token; `SPAN` on, those of the next.
    x: *const i8,
    /// Those at even places, then those at odd ones, of each token; where weights have eight bits.
    words: &'a [[i16; BLOCK]; N],
}

impl<const N: usize> Block<'_, N> {
    /// Weights of eight bits, groups of four columns: products of two are sums of 32.
    ///
    /// # Safety
    /// AVX2 is present, and the block is there.
    #[inline(always)]
    unsafe fn eight_bits(&self, starts: [i32; N], groups: Range<usize>) -> [[__m256i; 2]; N] {
        // SAFETY: the caller's promise.
        unsafe {
            let mut totals = [[_mm256_setzero_si256(); 2]; N];
            for (totals, start) in totals.iter_mut().zip(starts) {
                *totals = [_mm256_set1_epi32(start); 2];
            }
            for g in groups {
                let split = |both: Ymm| {
                    let even = _mm256_and_si256(both.0, _mm256_set1_epi16(0xFF));
                    (even, _mm256_srli_epi16::<8>(both.0))
                };
                let weights = self.weights.add(g * 64);
                if N == 1 {
                    ask::<Avx2>(weights.wrapping_add(self.ahead), LINE);
                }
                let weights = [split(Ymm::load(weights)), split(Ymm::load(weights.add(32)))];
                for (totals, words) in totals.iter_mut().zip(self.words) {
                    let pairs: *const i32 = words.as_ptr().cast();
                    let even = _mm256_set1_epi32(pairs.add(g).read_unaligned());
                    let odd = _mm256_set1_epi32(pairs.add(8 + g).read_unaligned());
                    for (total, w) in totals.iter_mut().zip(weights) {
                        *total = _mm256_add_epi32(*total, _mm256_madd_epi16(w.0, even));
                        *total = _mm256_add_epi32(*total, _mm256_madd_epi16(w.1, odd));
                    }
                }
            }
            totals
        }
    }

    /// Weights of four bits: eight products of two, each at most 15 · 127, stay below 2^15.
    ///
    /// # Safety
    /// As [`Self::eight_bits`].
    #[inline(always)]
    unsafe fn four_bits(&self, starts: [i32; N]) -> [[__m256i; 2]; N] {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[_mm256_setzero_si256(); 2]; N];
            // A number that the compiler does not see: unrolled, it keeps more sums than there are registers.
            for g in 0..std::hint::black_box(4) {
                let weights = self.weights.add(g * 64);
                if N == 1 {
                    ask::<Avx2>(weights.wrapping_add(self.ahead), LINE);
                }
                let weights = [
                    Ymm::load(weights).nibbles(),
                    Ymm::load(weights.add(32)).nibbles(),
                ];
                for (i, sums) in sums.iter_mut().enumerate() {
                    let columns: *const i32 = self.x.add(i * SPAN).cast();
                    let first = _mm256_set1_epi32(columns.add(g).read_unaligned());
                    let second = _mm256_set1_epi32(columns.add(4 + g).read_unaligned());
                    for (sum, w) in sums.iter_mut().zip(weights) {
                        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(w.0.0, first));
                        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(w.1.0, second));
                    }
                }
            }
            for (sums, start) in sums.iter_mut().zip(starts) {
                for sum in sums {
                    let total = _mm256_madd_epi16(*sum, _mm256_set1_epi16(1));
                    *sum = _mm256_add_epi32(total, _mm256_set1_epi32(start));
                }
            }
            sums
        }
    }
}

/// # Safety
/// As [`avx512_vnni`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn avx2<const N: usize, const P: usize, const EIGHT: bool, const BESIDE: u8>(
    tile: &Tile<'_>,
    sums: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { multiplied::<N, P, EIGHT, BESIDE>(tile, sums.as_mut_ptr(), stride) }
}

/// # Safety
/// As [`avx512_vnni`], with AVX2, FMA and F16C.
#[inline(always)]
unsafe fn multiplied<const N: usize, const P: usize, const EIGHT: bool, const BESIDE: u8>(
    tile: &Tile<'_>,
    sums: *mut f32,
    stride: usize,
) {
    let format = format::<EIGHT, BESIDE>();
    let mut words = [[[0; BLOCK]; N]; SPAN_BLOCKS];
    for pair in tile.pairs.clone().step_by(SPAN_PAIRS) {
        let blocks = 2 * (tile.pairs.end.min(pair + SPAN_PAIRS) - pair);
        let first = (pair - tile.pairs.start) * 2;
        // SAFETY: as in `vnni`.
        unsafe {
            let x = tile.activations(pair);
            if EIGHT {
                for (b, words) in words.iter_mut().enumerate().take(blocks) {
                    for (i, words) in words.iter_mut().enumerate() {
                        split(x.quants.add(i * SPAN + b * BLOCK), words);
                    }
                }
            }
            for p in 0..P {
                let panel = tile.bytes.as_ptr().add(p * tile.panel_bytes);
                let numbers = |at: usize| Avx2::load_f16(panel.add(at).cast());
                let mut parts = [[Avx2::zero(); 2]; N];
                for (b, words) in words.iter().enumerate().take(blocks) {
                    let starts = block_starts::<N>(x.starts, b);
                    let firsts = block_starts::<N>(x.firsts, b);
                    let pair = (first + b) / 2;
                    let ahead = ahead(tile, tile.pairs.start + pair);
                    if N == 1 && b % 2 == 0 {
                        let at = pair * format.pair_bytes() + ahead;
                        ask::<Avx2>(panel.wrapping_add(at), format.head_bytes());
                    }
                    let block = Block {
                        ahead,
                        weights: panel.add(format.quants_at(first + b)),
                        x: x.quants.add(b * BLOCK),
                        words,
                    };
                    let (totals, seconds) = match (EIGHT, BESIDE) {
                        (true, NOTHING) => (block.eight_bits(starts, 0..8), None),
                        (true, SECOND_SCALES) => {
                            let rests = std::array::from_fn(|i| starts[i] - firsts[i]);
                            let seconds = block.eight_bits(rests, 4..8);
                            (block.eight_bits(firsts, 0..4), Some(seconds))
                        }
                        (true, _) => (block.eight_bits([0; N], 0..8), None),
                        // 8 of 128
                        (false, NOTHING) => (block.four_bits(starts.map(|start| start / 16)), None),
                        (false, _) => (block.four_bits([0; N]), None),
                    };
                    for half in 0..2 {
                        let scale = numbers(format.scale_at(first + b, half * 8));
                        let other = match BESIDE {
                            NOTHING => Avx2::zero(),
                            _ => numbers(format.other_at(first + b, half * 8)),
                        };
                        for (i, parts) in parts.iter_mut().enumerate() {
                            let mut total = Ymm(totals[i][half]).to_floats();
                            if BESIDE == ZEROS {
                                let start = Avx2::splat(starts[i] as f32 / 128.0);
                                total = other.mul_add(start, total);
                            }
                            parts[half] = total.mul_add(scale, parts[half]);
                            if let Some(seconds) = &seconds {
                                let second = Ymm(seconds[i][half]).to_floats();
                                parts[half] = second.mul_add(other, parts[half]);
                            }
                        }
                    }
                }
                for (i, parts) in parts.into_iter().enumerate() {
                    let scale = Avx2::splat(*x.scales.add(i));
                    for (half, part) in parts.into_iter().enumerate() {
                        let sum = sums.add(i * stride + p * ROWS + half * 8);
                        part.mul_add(scale, Avx2::load(sum)).store(sum);
                    }
                }
            }
        }
    }
}

/// How far ahead a token's products ask for weights: at 1 to 8 KiB a core alone reads as fast as any read test,
/// and without asking 15 % slower (Zen 3), since what the processor fetches by itself ends with a page.
const AHEAD: usize = 2048;
/// What one request brings.
const LINE: usize = 64;

/// How many bytes further on lies what a token asks for at a pair: about [`AHEAD`], in whole pairs; behind its
/// panel's end, in the panel that comes after those of the tile; where none does, what is there already.
#[inline(always)]
fn ahead(tile: &Tile<'_>, pair: usize) -> usize {
    let pairs = AHEAD.div_ceil(tile.format.pair_bytes());
    let bytes = pairs * tile.format.pair_bytes();
    match tile.pairs.end - pair > pairs {
        true => bytes,
        false if tile.goes_on => bytes + (tile.panels - 1) * tile.panel_bytes,
        false => 0,
    }
}

/// Asks for some bytes; where there are none nothing comes of it. A core has few places for what it waits for: so
/// each line is asked for where one is multiplied, which is 1.05 times as fast as nine or more at once.
#[inline(always)]
fn ask<S: Simd>(bytes: *const u8, len: usize) {
    for line in (0..len).step_by(LINE) {
        S::prefetch(bytes.wrapping_add(line));
    }
}

/// What sums of a block of `N` tokens begin with.
///
/// # Safety
/// The block is there.
#[inline(always)]
unsafe fn block_starts<const N: usize>(starts: *const i32, block: usize) -> [i32; N] {
    let mut out = [0; N];
    for (i, out) in out.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *out = unsafe { *starts.add(i * SPAN_BLOCKS + block) };
    }
    out
}

/// A block of activations as words: those at even places, then those at odd ones.
///
/// # Safety
/// AVX2 is present, and the block is there.
#[inline(always)]
unsafe fn split(x: *const i8, out: &mut [i16; BLOCK]) {
    // SAFETY: 32 bytes are read, 32 words written.
    unsafe {
        let x = _mm256_loadu_si256(x.cast());
        let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
        let out: *mut __m256i = out.as_mut_ptr().cast();
        _mm256_storeu_si256(out, even);
        _mm256_storeu_si256(out.add(1), _mm256_srai_epi16::<8>(x));
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::super::activations::Activations;
    use super::super::simd::Isa;
    use super::*;
    use crate::ops::packed::{self, Format, Shape};

    /// The integer dot product by AVX2, so that the kernel around it runs where VNNI is not.
    #[derive(Clone, Copy)]
    struct Emulated(__m256i);

    // SAFETY (every block below): as for Zmm.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Bytes for Emulated {
        type Floats = Avx2;
        #[inline(always)]
        unsafe fn load(pointer: *const u8) -> Self {
            unsafe { Self(Ymm::load(pointer).0) }
        }
        #[inline(always)]
        unsafe fn splat(word: i32) -> Self {
            unsafe { Self(Ymm::splat(word).0) }
        }
        #[inline(always)]
        unsafe fn nibbles(self) -> (Self, Self) {
            let (low, high) = unsafe { Ymm(self.0).nibbles() };
            (Self(low.0), Self(high.0))
        }
        #[inline(always)]
        unsafe fn add_products(self, weights: Self, x: Self) -> Self {
            unsafe {
                let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x.0));
                let even =
                    _mm256_madd_epi16(_mm256_and_si256(weights.0, _mm256_set1_epi16(0xFF)), even);
                let odd = _mm256_madd_epi16(
                    _mm256_srli_epi16::<8>(weights.0),
                    _mm256_srai_epi16::<8>(x.0),
                );
                Self(_mm256_add_epi32(self.0, _mm256_add_epi32(even, odd)))
            }
        }
        #[inline(always)]
        unsafe fn to_floats(self) -> Avx2 {
            unsafe { Ymm(self.0).to_floats() }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn emulated<const N: usize, const P: usize, const EIGHT: bool, const BESIDE: u8>(
        tile: &Tile<'_>,
        sums: &mut [f32],
        stride: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { by_panels::<Emulated, N, P, EIGHT, BESIDE>(tile, sums, stride) }
    }

    fn compare<const N: usize, const P: usize, const EIGHT: bool, const BESIDE: u8>() {
        let format = format::<EIGHT, BESIDE>();
        let (rows, cols) = (ROWS * P, 256 + 64);
        let shape = Shape { format, rows, cols };
        let noise = |r: usize, b: usize, i: usize| (r * 7919 + b * 104_729 + i * 1009) % 251;
        let quant = |noise: usize| match format {
            Format::Q8 | Format::Q8Halves => noise as i16 - 125,
            _ => noise as i16 % 16,
        };
        let block = |r: usize, b: usize| packed::Block {
            scale: f16::from_f32((noise(r, b, 40) as f32 - 125.0) * 1e-3),
            other: f16::from_f32(noise(r, b, 41) as f32 / 12.0 - 3.0),
            quants: std::array::from_fn(|i| quant(noise(r, b, i)) as i8),
        };
        let mut bytes = vec![0; shape.bytes()];
        for (panel, out) in bytes.chunks_mut(shape.panel_bytes()).enumerate() {
            shape.place_panel(panel, &block, out);
        }
        let x: Vec<f32> = (0..N * cols).map(|i| (i as f32 * 0.73).sin()).collect();
        let tile = Tile {
            x: &Activations::new(Isa::Avx2, &x, cols),
            tokens: (0, N),
            format,
            bytes: &bytes,
            panel_bytes: shape.panel_bytes(),
            panels: P,
            pairs: 0..cols / 64,
            goes_on: false,
        };
        let (mut want, mut got) = (vec![1.0; N * rows], vec![1.0; N * rows]);
        tile.multiply(Isa::Avx2, &mut want, rows);
        // SAFETY: as `Tile::multiply` just checked.
        unsafe { emulated::<N, P, EIGHT, BESIDE>(&tile, &mut got, rows) };
        assert_eq!(got, want, "{format:?}, {N} tokens, {P} panels");
    }

    #[test]
    fn the_narrow_vnni_kernel_gives_the_bits_of_avx2() {
        if !Isa::available().contains(&Isa::Avx2) {
            return;
        }
        compare::<1, 1, true, NOTHING>();
        compare::<2, 2, false, NOTHING>();
        compare::<4, 2, true, NOTHING>();
        compare::<4, 1, true, ZEROS>();
        compare::<4, 2, false, ZEROS>();
        compare::<1, 1, true, SECOND_SCALES>();
        compare::<4, 2, true, SECOND_SCALES>();
    }
}
