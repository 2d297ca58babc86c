//! Many tokens times bf16 weights with the processor's bf16 dot product (AVX512-BF16).
//!
//! Activations are rounded to bf16, products are exact and summed in f32. The weights stay as they
//! are stored: each task turns a few of their rows into the interleaved order once, in its cache,
//! and multiplies all tokens with them.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use half::bf16;

use super::matmul::Linear;
use super::pool;

/// Fewer tokens than this do not pay for interleaving the weights.
pub(crate) const MIN_TOKENS: usize = 16;
/// Rows that a task interleaves at once: two vectors.
const ROWS: usize = 32;
/// Tokens of one register tile.
const TOKENS: usize = 12;
/// Columns that are interleaved at once: 64 KiB of weights.
const DEPTH: usize = 1024;

/// Whether this machine has the instructions.
pub(crate) fn is_present() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: every task writes its own range of columns only.
unsafe impl Sync for Out {}

/// Computes `args` into `out`, `[n, outer]`, on the threads of the current pool.
///
/// # Panics
/// If a length does not fit the shape, or the machine lacks the instructions.
pub(crate) fn linear(args: Linear<'_, bf16>, out: &mut [f32]) {
    let Linear { inner, outer, .. } = args;
    assert!(is_present(), "AVX512-BF16");
    assert_eq!(args.weight.len(), inner * outer, "weight length");
    assert!(
        args.bias.is_none_or(|bias| bias.len() == outer),
        "bias length"
    );
    assert_eq!(args.x.len() * outer, out.len() * inner, "activation length");
    let x = Rounded::new(args.x, inner);
    let panels = outer.div_ceil(ROWS);
    let target = Out(out.as_mut_ptr());
    pool::parallel(panels, &|panel| {
        let mut scratch = vec![0_u32; ROWS * DEPTH / 2];
        for start in (0..inner).step_by(DEPTH) {
            let depth = DEPTH.min(inner - start);
            // SAFETY: the instructions are there, the lengths were checked, and the columns of
            // this panel are this task's own.
            unsafe {
                interleave(args, panel * ROWS, start, depth, &mut scratch);
                multiply(args, &x, panel * ROWS, start, depth, &scratch, target);
            }
        }
    });
}

/// Activations in bf16, pairs of columns as one word, rows padded to whole pairs.
struct Rounded {
    pairs: Vec<u32>,
    /// Words of a row.
    stride: usize,
    n: usize,
}

impl Rounded {
    fn new(x: &[f32], inner: usize) -> Self {
        let n = x.len() / inner;
        let stride = inner.div_ceil(2);
        let mut pairs = vec![0_u32; n * stride];
        let per_task = n.div_ceil(pool::current_threads() * 2).max(1);
        let tasks: Vec<_> = pairs
            .chunks_mut(per_task * stride)
            .map(std::sync::Mutex::new)
            .collect();
        pool::parallel(tasks.len(), &|task| {
            // Each lock is taken once, by its own task.
            let mut pairs = tasks[task]
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let rows = x[task * per_task * inner..].chunks_exact(inner);
            for (pairs, x) in pairs.chunks_exact_mut(stride).zip(rows) {
                for (pair, x) in pairs.iter_mut().zip(x.chunks(2)) {
                    let high = x.get(1).map_or(0, |x| u32::from(round(*x)));
                    *pair = u32::from(round(x[0])) | high << 16;
                }
            }
        });
        Self { pairs, stride, n }
    }
}

/// To nearest, ties to even; NaN stays NaN.
#[inline(always)]
fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    (if x.is_nan() {
        bits >> 16 | 0x40
    } else {
        rounded
    }) as u16
}

/// Brings `depth` columns of 32 rows into the order `[pair of columns][row]`.
///
/// # Safety
/// The instructions are present; the columns are inside `args.weight`, whose length is checked.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn interleave(
    args: Linear<'_, bf16>,
    row: usize,
    start: usize,
    depth: usize,
    out: &mut [u32],
) {
    let rows = ROWS.min(args.outer - row);
    let whole = depth / 32 * 32;
    for half in 0..2 {
        for k in (0..whole).step_by(32) {
            let mut tile = [_mm512_setzero_si512(); 16];
            for (r, tile) in tile.iter_mut().enumerate() {
                let r = half * 16 + r;
                if r < rows {
                    let at = (row + r) * args.inner + start + k;
                    // SAFETY: 32 columns from `start + k` on are inside the row.
                    *tile = unsafe { _mm512_loadu_si512(args.weight.as_ptr().add(at).cast()) };
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
    for pair in whole / 2..depth.div_ceil(2) {
        for r in 0..ROWS {
            let word = |k: usize| {
                if r < rows && k < depth {
                    u32::from(args.weight[(row + r) * args.inner + start + k].to_bits())
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

/// Multiplies all tokens with the interleaved columns; the first columns start from the bias.
///
/// # Safety
/// The instructions are present, `scratch` holds the columns, `out` is `[n, outer]` and nobody else
/// writes the columns from `row` on.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply(
    args: Linear<'_, bf16>,
    x: &Rounded,
    row: usize,
    start: usize,
    depth: usize,
    scratch: &[u32],
    out: Out,
) {
    let pairs = depth.div_ceil(2);
    let mut t = 0;
    while t < x.n {
        let tokens = TOKENS.min(x.n - t);
        // SAFETY: tokens `t..t + tokens` and their words from `start / 2` on are inside `x`.
        unsafe {
            let first = x.pairs.as_ptr().add(t * x.stride + start / 2);
            let target = Tile {
                args,
                row,
                t,
                begin: start == 0,
                out,
            };
            match tokens {
                12 => target.run::<12>(first, x.stride, pairs, scratch.as_ptr()),
                8.. => {
                    target.run::<8>(first, x.stride, pairs, scratch.as_ptr());
                    t += 8;
                    continue;
                }
                4.. => {
                    target.run::<4>(first, x.stride, pairs, scratch.as_ptr());
                    t += 4;
                    continue;
                }
                _ => {
                    target.run::<1>(first, x.stride, pairs, scratch.as_ptr());
                    t += 1;
                    continue;
                }
            }
        }
        t += TOKENS;
    }
}

/// The same bits as pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_words(words: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes of plain numbers.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
}

/// Where a register tile goes.
struct Tile<'a> {
    args: Linear<'a, bf16>,
    row: usize,
    t: usize,
    begin: bool,
    out: Out,
}

impl Tile<'_> {
    /// # Safety
    /// As [`multiply`]; `N` tokens of `pairs` words, `stride` apart.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn run<const N: usize>(self, x: *const u32, stride: usize, pairs: usize, w: *const u32) {
        let outer = self.args.outer;
        let rows = ROWS.min(outer - self.row);
        let mask = |half: usize| -> __mmask16 {
            let left = rows.saturating_sub(half * 16).min(16);
            ((1_u32 << left) - 1) as __mmask16
        };
        let masks = [mask(0), mask(1)];
        // SAFETY: the caller's promise; the masks cut off columns behind the last row.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); 2]; N];
            for (i, acc) in acc.iter_mut().enumerate() {
                for (half, acc) in acc.iter_mut().enumerate() {
                    let column = self.row + half * 16;
                    if !self.begin {
                        let from = self.out.0.wrapping_add((self.t + i) * outer + column);
                        *acc = _mm512_maskz_loadu_ps(masks[half], from);
                    } else if let Some(bias) = self.args.bias {
                        *acc =
                            _mm512_maskz_loadu_ps(masks[half], bias.as_ptr().wrapping_add(column));
                    }
                }
            }
            for p in 0..pairs {
                let w0 = _mm512_loadu_si512(w.add(p * ROWS).cast());
                let w1 = _mm512_loadu_si512(w.add(p * ROWS + 16).cast());
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(*x.add(i * stride + p) as i32);
                    acc[0] = _mm512_dpbf16_ps(acc[0], bf16_words(w0), bf16_words(x));
                    acc[1] = _mm512_dpbf16_ps(acc[1], bf16_words(w1), bf16_words(x));
                }
            }
            for (i, acc) in acc.iter().enumerate() {
                for (half, acc) in acc.iter().enumerate() {
                    let to = self
                        .out
                        .0
                        .wrapping_add((self.t + i) * outer + self.row + half * 16);
                    _mm512_mask_storeu_ps(to, masks[half], *acc);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        for i in 0..200_000_u32 {
            let x = f32::from_bits(i.wrapping_mul(0x9E37_79B9));
            let want = bf16::from_f32(x);
            if x.is_nan() {
                assert!(bf16::from_bits(round(x)).is_nan());
            } else {
                assert_eq!(round(x), want.to_bits(), "{x}");
            }
        }
    }

    #[test]
    fn products_match_the_definition_for_odd_shapes() {
        if !is_present() {
            return; // nothing to test: the dispatch never comes here
        }
        for (n, inner, outer) in [
            (1, 2, 1),
            (16, 64, 32),
            (17, 33, 5),
            (31, 1030, 37),
            (50, 2100, 65),
            (12, 96, 48),
        ] {
            let x: Vec<f32> = (0..n * inner).map(|i| (i as f32 * 0.37).sin()).collect();
            let w: Vec<bf16> = (0..outer * inner)
                .map(|i| bf16::from_f32((i as f32 * 0.11).cos()))
                .collect();
            let bias: Vec<f32> = (0..outer).map(|i| i as f32).collect();
            let mut out = vec![f32::NAN; n * outer];
            linear(
                Linear {
                    x: &x,
                    weight: &w,
                    bias: Some(&bias),
                    inner,
                    outer,
                },
                &mut out,
            );
            for (t, out) in out.chunks(outer).enumerate() {
                for (r, out) in out.iter().enumerate() {
                    let sum: f64 = (0..inner)
                        .map(|k| {
                            let x = bf16::from_f32(x[t * inner + k]);
                            x.to_f64() * w[r * inner + k].to_f64()
                        })
                        .sum();
                    let want = (sum + f64::from(bias[r])) as f32;
                    assert!(
                        (out - want).abs() < 1e-5 * inner as f32,
                        "{n} {inner} {outer}: {out} {want}"
                    );
                }
            }
        }
    }
}
