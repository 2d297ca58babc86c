//! Tiles of packed weights on NEON: by integer dot products or matrix products where the machine has
//! them, by widening multiplications elsewhere.
#![cfg(target_arch = "aarch64")]

use std::arch::aarch64::*;
use std::arch::asm;
use std::array::from_fn;

use super::activations::{SPAN, SPAN_BLOCKS};
use super::packed_tile::{NOTHING, SECOND_SCALES, SPAN_PAIRS, Tile, ZEROS, format};
use crate::ops::packed::{BLOCK, GROUP};

/// All columns of a block.
const WHOLE: u8 = 0;
/// Its first 16.
const FIRST: u8 = 1;
/// Its last 16.
const SECOND: u8 = 2;

/// How the products of a block are summed. A vector of weights holds four columns of four rows.
trait Block {
    /// A block of `N` tokens times a block of `V` vectors of rows, all of it or a half (`PART`);
    /// eight-bit weights without their offset, those of four bits with it.
    ///
    /// # Safety
    /// The instruction set is present; the weights lie at `quants`, groups [`GROUP`] bytes apart, the
    /// activations at `xs`, tokens [`SPAN`] apart.
    unsafe fn sums<const N: usize, const V: usize, const Q8: bool, const PART: u8>(
        quants: *const u8,
        xs: *const i8,
    ) -> [[int32x4_t; V]; N];
}

/// Columns `4 g..` and `16 + 4 g..` of a block of weights.
///
/// # Safety
/// As [`Block::sums`].
#[inline(always)]
unsafe fn weights<const Q8: bool>(quants: *const u8, g: usize) -> (int8x16_t, int8x16_t) {
    // SAFETY: the caller's promise.
    unsafe {
        let first = vld1q_u8(quants.add(g * GROUP));
        let (first, second) = if Q8 {
            let flip = vdupq_n_u8(128);
            let second = vld1q_u8(quants.add((g + 4) * GROUP));
            (veorq_u8(first, flip), veorq_u8(second, flip))
        } else {
            (vandq_u8(first, vdupq_n_u8(15)), vshrq_n_u8::<4>(first))
        };
        (vreinterpretq_s8_u8(first), vreinterpretq_s8_u8(second))
    }
}

/// Both halves of a block of activations.
///
/// # Safety
/// As [`Block::sums`].
#[inline(always)]
unsafe fn halves<const N: usize>(xs: *const i8) -> [(int8x16_t, int8x16_t); N] {
    // SAFETY: the caller's promise.
    from_fn(|i| unsafe { (vld1q_s8(xs.add(i * SPAN)), vld1q_s8(xs.add(i * SPAN + 16))) })
}

/// Products in 16 bits, for every aarch64.
struct Widening;

impl Block for Widening {
    #[inline(always)]
    unsafe fn sums<const N: usize, const V: usize, const Q8: bool, const PART: u8>(
        quants: *const u8,
        xs: *const i8,
    ) -> [[int32x4_t; V]; N] {
        // SAFETY: the caller's promise.
        unsafe {
            // Four columns of two rows each, in 16 and in 32 bits.
            let mut short = [[(vdupq_n_s16(0), vdupq_n_s16(0)); V]; N];
            let mut long = [[(vdupq_n_s32(0), vdupq_n_s32(0)); V]; N];
            for g in 0..4 {
                let w: [_; V] = from_fn(|v| weights::<Q8>(quants.add(v * 16), g));
                for i in 0..N {
                    let columns: *const i32 = xs.add(i * SPAN + g * 4).cast();
                    let four =
                        |at: *const i32| vreinterpretq_s8_s32(vdupq_n_s32(at.read_unaligned()));
                    let (first, second) = (four(columns), four(columns.add(4)));
                    for (v, w) in w.iter().enumerate() {
                        let (low, high) = &mut short[i][v];
                        if PART != SECOND {
                            *low = vmlal_s8(*low, vget_low_s8(w.0), vget_low_s8(first));
                            *high = vmlal_high_s8(*high, w.0, first);
                        }
                        if PART != FIRST {
                            *low = vmlal_s8(*low, vget_low_s8(w.1), vget_low_s8(second));
                            *high = vmlal_high_s8(*high, w.1, second);
                        }
                        // Two products of eight bits stay below 2^15, as do eight of four bits.
                        if Q8 || g == 3 {
                            let sums = &mut long[i][v];
                            sums.0 = vpadalq_s16(sums.0, *low);
                            sums.1 = vpadalq_s16(sums.1, *high);
                            (*low, *high) = (vdupq_n_s16(0), vdupq_n_s16(0));
                        }
                    }
                }
            }
            long.map(|long| long.map(|(low, high)| vpaddq_s32(low, high)))
        }
    }
}

/// Dot products of four bytes (`sdot`).
struct Dots;

/// Adds to each of four sums its row of `$weights` times bytes `4 · $lane..` of `$x`.
macro_rules! sdot {
    ($sums:expr, $weights:expr, $x:expr, $lane:literal) => {
        // The intrinsic is not stable yet.
        asm!(
            concat!("sdot {sums:v}.4s, {weights:v}.16b, {x:v}.4b[", $lane, "]"),
            sums = inout(vreg) $sums,
            weights = in(vreg) $weights,
            x = in(vreg) $x,
            options(pure, nomem, nostack, preserves_flags),
        )
    };
}

impl Block for Dots {
    #[inline(always)]
    unsafe fn sums<const N: usize, const V: usize, const Q8: bool, const PART: u8>(
        quants: *const u8,
        xs: *const i8,
    ) -> [[int32x4_t; V]; N] {
        // SAFETY: the caller's promise.
        unsafe {
            let x = halves::<N>(xs);
            let mut sums = [[vdupq_n_s32(0); V]; N];
            macro_rules! groups {
                ($($g:literal)*) => {$(
                    let w: [_; V] = from_fn(|v| weights::<Q8>(quants.add(v * 16), $g));
                    for (sums, x) in sums.iter_mut().zip(x) {
                        for (sum, w) in sums.iter_mut().zip(w) {
                            if PART != SECOND {
                                sdot!(*sum, w.0, x.0, $g);
                            }
                            if PART != FIRST {
                                sdot!(*sum, w.1, x.1, $g);
                            }
                        }
                    }
                )*};
            }
            groups!(0 1 2 3);
            sums
        }
    }
}

/// Products of two rows and two tokens, eight columns at once (`smmla`): for even numbers of tokens.
struct Pairs;

/// Adds to `sums` two rows of eight weights times two of eight activations.
///
/// # Safety
/// The instruction set is present.
#[inline(always)]
unsafe fn smmla(sums: &mut int32x4_t, weights: int32x4_t, x: int64x2_t) {
    // SAFETY: the caller's promise. (The intrinsic is not stable yet.)
    unsafe {
        asm!(
            "smmla {sums:v}.4s, {weights:v}.16b, {x:v}.16b",
            sums = inout(vreg) *sums,
            weights = in(vreg) weights,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
}

/// Adds columns `8 · E..` and `16 + 8 · E..`: of two tokens in turn the sums of the first two rows, and
/// of the last two.
///
/// # Safety
/// As [`Block::sums`].
#[inline(always)]
unsafe fn eight_columns<
    const N: usize,
    const V: usize,
    const Q8: bool,
    const PART: u8,
    const E: usize,
>(
    quants: *const u8,
    x: &[[int64x2_t; 2]; N],
    sums: &mut [[[int32x4_t; 2]; V]; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let w: [_; V] = from_fn(|v| {
            let a = weights::<Q8>(quants.add(v * 16), 2 * E);
            let b = weights::<Q8>(quants.add(v * 16), 2 * E + 1);
            [(a.0, b.0), (a.1, b.1)].map(|(a, b)| {
                let (a, b) = (vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b));
                [vzip1q_s32(a, b), vzip2q_s32(a, b)]
            })
        });
        for (sums, x) in sums.iter_mut().zip(x.chunks_exact(2)) {
            let halves = match PART {
                WHOLE => 0..2,
                FIRST => 0..1,
                _ => 1..2,
            };
            for half in halves {
                let (a, b) = (x[0][half], x[1][half]);
                let x = if E == 0 {
                    vzip1q_s64(a, b)
                } else {
                    vzip2q_s64(a, b)
                };
                for (sums, w) in sums.iter_mut().zip(w) {
                    smmla(&mut sums[0], w[half][0], x);
                    smmla(&mut sums[1], w[half][1], x);
                }
            }
        }
    }
}

impl Block for Pairs {
    #[inline(always)]
    unsafe fn sums<const N: usize, const V: usize, const Q8: bool, const PART: u8>(
        quants: *const u8,
        xs: *const i8,
    ) -> [[int32x4_t; V]; N] {
        // SAFETY: the caller's promise.
        unsafe {
            let x = halves::<N>(xs).map(|(a, b)| [a, b].map(|x| vreinterpretq_s64_s8(x)));
            let mut sums = [[[vdupq_n_s32(0); 2]; V]; N]; // of pairs: the second half stays
            eight_columns::<N, V, Q8, PART, 0>(quants, &x, &mut sums);
            eight_columns::<N, V, Q8, PART, 1>(quants, &x, &mut sums);
            from_fn(|i| {
                sums[i / 2].map(|[first, last]| match i % 2 {
                    0 => vuzp1q_s32(first, last),
                    _ => vuzp2q_s32(first, last),
                })
            })
        }
    }
}

/// Takes `V` vectors of rows at once: what the registers hold.
///
/// # Safety
/// The instruction set is present; `tile` has `N` tokens and `P` panels, and its lengths were
/// checked.
#[inline(always)]
unsafe fn multiply<
    B: Block,
    const N: usize,
    const P: usize,
    const V: usize,
    const EIGHT: bool,
    const BESIDE: u8,
>(
    tile: &Tile<'_>,
    sums: &mut [f32],
    stride: usize,
) {
    let format = format::<EIGHT, BESIDE>();
    // SAFETY: every pointer stays inside the lengths that `Tile::multiply` checked.
    unsafe {
        for quarter in (0..4 * P).step_by(V) {
            let sums = sums.as_mut_ptr().add(quarter * 4);
            let place = |i: usize, v: usize| sums.add(i * stride + v * 4);
            let mut acc: [[_; V]; N] = from_fn(|i| from_fn(|v| vld1q_f32(place(i, v))));
            let panel = tile.bytes.as_ptr().add(quarter / 4 * tile.panel_bytes);
            let mut pair = tile.pairs.start;
            while pair < tile.pairs.end {
                let x = tile.activations(pair);
                let mut parts = [[vdupq_n_f32(0.0); V]; N];
                let end = tile.pairs.end.min(pair + SPAN_PAIRS);
                for b in 0..2 * (end - pair) {
                    let block = (pair - tile.pairs.start) * 2 + b;
                    let quants = panel.add(format.quants_at(block) + quarter % 4 * 16);
                    let numbers = |at: usize| -> [_; V] {
                        from_fn(|v| {
                            let bytes = vld1_u8(panel.add(at + v * 8)); // of no alignment
                            vcvt_f32_f16(vreinterpret_f16_u8(bytes))
                        })
                    };
                    let scales = numbers(format.scale_at(block, quarter % 4 * 4));
                    let others = match BESIDE {
                        NOTHING => [vdupq_n_f32(0.0); V],
                        _ => numbers(format.other_at(block, quarter % 4 * 4)),
                    };
                    let xs = x.quants.add(b * BLOCK);
                    if BESIDE == SECOND_SCALES {
                        let firsts = B::sums::<N, V, EIGHT, FIRST>(quants, xs);
                        let seconds = B::sums::<N, V, EIGHT, SECOND>(quants, xs);
                        for (i, parts) in parts.iter_mut().enumerate() {
                            for v in 0..V {
                                let (first, second) = (firsts[i][v], seconds[i][v]);
                                parts[v] = vfmaq_f32(parts[v], vcvtq_f32_s32(first), scales[v]);
                                parts[v] = vfmaq_f32(parts[v], vcvtq_f32_s32(second), others[v]);
                            }
                        }
                        continue;
                    }
                    let totals = B::sums::<N, V, EIGHT, WHOLE>(quants, xs);
                    for (i, (parts, totals)) in parts.iter_mut().zip(totals).enumerate() {
                        let sum = *x.starts.add(i * SPAN_BLOCKS + b); // of the activations, times -128
                        let start = vdupq_n_s32(match (EIGHT, BESIDE) {
                            (true, NOTHING) | (false, ZEROS) => 0,
                            (false, _) => sum / 16, // 8 of 128
                            (true, _) => -sum,      // what `weights` has taken off
                        });
                        for v in 0..V {
                            let mut total = vcvtq_f32_s32(vaddq_s32(totals[v], start));
                            if BESIDE == ZEROS {
                                let sum = vdupq_n_f32(sum as f32 / 128.0);
                                total = vfmaq_f32(total, others[v], sum);
                            }
                            parts[v] = vfmaq_f32(parts[v], total, scales[v]);
                        }
                    }
                }
                for (i, (acc, parts)) in acc.iter_mut().zip(parts).enumerate() {
                    let scale = vdupq_n_f32(*x.scales.add(i));
                    for (acc, part) in acc.iter_mut().zip(parts) {
                        *acc = vfmaq_f32(*acc, part, scale);
                    }
                }
                pair = end;
            }
            for (i, acc) in acc.into_iter().enumerate() {
                for (v, acc) in acc.into_iter().enumerate() {
                    vst1q_f32(place(i, v), acc);
                }
            }
        }
    }
}

/// The kernel of an instruction set: for so many tokens, how products are summed and how many vectors of rows
/// are taken at once.
macro_rules! kernel {
    ($name:ident, $features:literal, $($tokens:pat => $block:ident, $vectors:literal;)*) => {
        /// # Safety
        /// As [`multiply`].
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name<
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
            unsafe {
                match N {
                    $($tokens => {
                        multiply::<$block, N, P, $vectors, EIGHT, BESIDE>(tile, sums, stride);
                    })*
                }
            }
        }
    };
}

kernel!(neon, "neon", 1 => Widening, 4; 2 => Widening, 2; _ => Widening, 1;);
kernel!(dotprod, "neon,dotprod", 1 | 2 => Dots, 4; _ => Dots, 2;);
kernel!(i8mm, "neon,dotprod,i8mm", 1 => Dots, 4; 2 => Pairs, 4; _ => Pairs, 2;);
