//! Many tokens times bf16 weights with the processor's bf16 dot product (AVX512-BF16).
//!
//! Activations are rounded to bf16, products are exact and summed in f32. The weights stay as they
//! are stored: each task turns a few of their rows into the interleaved order once, in its cache,
//! and multiplies all tokens with them.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;
use std::cell::Cell;

use half::bf16;

use super::matmul::Linear;
use super::pool;
use super::product::{Product, Sums, Target};
use super::simd::Isa;

/// Fewer tokens than this do not pay for interleaving the weights.
pub(crate) const MIN_TOKENS: usize = 16;
/// Rows that a task interleaves at once: two vectors.
const ROWS: usize = 32;
/// Columns that are interleaved at once: 64 KiB of weights.
const DEPTH: usize = 1024;

/// Whether this machine has the instructions.
pub(crate) fn is_present() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// Products of the rounded activations with bf16 rows, 32 rows a task.
pub(crate) struct Blocks<'a> {
    isa: Isa,
    args: Linear<'a, bf16>,
    x: &'a Rounded,
    target: Target<'a>,
}

impl<'a> Blocks<'a> {
    /// `x` are the activations of `args`, rounded.
    ///
    /// # Panics
    /// If a length does not fit the shape, or the machine lacks the instructions.
    pub(crate) fn new(
        isa: Isa,
        args: Linear<'a, bf16>,
        x: &'a Rounded,
        target: Target<'a>,
    ) -> Self {
        assert!(is_present(), "AVX512-BF16");
        args.check(&target);
        assert_eq!(
            (x.n, x.stride),
            (target.tokens(), args.inner.div_ceil(2)),
            "activation shape"
        );
        Self {
            isa,
            args,
            x,
            target,
        }
    }
}

impl Product for Blocks<'_> {
    fn tasks(&self) -> usize {
        self.args.outer.div_ceil(ROWS)
    }

    fn weights(&self, task: usize) -> pool::Streams {
        let Linear { inner, outer, .. } = self.args;
        let rows = task * ROWS..((task + 1) * ROWS).min(outer);
        pool::streams(&self.args.weight[rows.start * inner..rows.end * inner], &[])
    }

    fn run(&self, task: usize) {
        let Linear { inner, outer, .. } = self.args;
        let (row, n) = (task * ROWS, self.x.n);
        let (mut scratch, mut sums) = SCRATCH.take();
        scratch.resize(ROWS * DEPTH / 2, 0);
        sums.clear();
        sums.resize(n * ROWS, 0.0);
        for start in (0..inner).step_by(DEPTH) {
            let depth = DEPTH.min(inner - start);
            // SAFETY: the instructions are there, and the lengths were checked.
            unsafe {
                interleave(self.args, row, start, depth, &mut scratch);
                multiply(self.x, start, depth, &scratch, &mut sums);
            }
        }
        let rows = (row, ROWS.min(outer - row));
        // SAFETY: the lengths were checked, and the rows are this task's own.
        unsafe {
            self.target.take(
                self.isa,
                Sums {
                    values: &sums,
                    stride: ROWS,
                    tokens: (0, n),
                    rows,
                },
            );
        }
        SCRATCH.set((scratch, sums));
    }
}

thread_local! {
    /// The interleaved weights and the sums of a task, kept for the next one.
    static SCRATCH: Cell<(Vec<u32>, Vec<f32>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

/// Activations in bf16, pairs of columns as one word, rows padded to whole pairs.
pub(crate) struct Rounded {
    pairs: Vec<u32>,
    /// Words of a row.
    stride: usize,
    n: usize,
}

impl Rounded {
    /// `x` `[n, inner]`.
    ///
    /// # Panics
    /// If the machine lacks the instructions.
    pub(crate) fn new(x: &[f32], inner: usize) -> Self {
        assert!(is_present(), "AVX512-BF16");
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
                // SAFETY: the instructions are there.
                unsafe { round_row(x, pairs) };
            }
        });
        drop(tasks);
        Self { pairs, stride, n }
    }
}

/// Rounds a row to pairs.
///
/// # Safety
/// The instructions are present.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn round_row(x: &[f32], pairs: &mut [u32]) {
    let (whole, rest) = x.as_chunks::<32>();
    let (out, last) = pairs.split_at_mut(whole.len() * 16);
    for (x, out) in whole.iter().zip(out.as_chunks_mut::<16>().0) {
        // SAFETY: 32 elements are read, 16 words written.
        unsafe {
            let (low, high) = (
                _mm512_loadu_ps(x.as_ptr()),
                _mm512_loadu_ps(x[16..].as_ptr()),
            );
            let words = _mm512_cvtne2ps_pbh(high, low);
            out.as_mut_ptr().cast::<__m512bh>().write_unaligned(words);
        }
    }
    for (pair, x) in last.iter_mut().zip(rest.chunks(2)) {
        let high = x.get(1).map_or(0, |x| u32::from(round(*x)));
        *pair = u32::from(round(x[0])) | high << 16;
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

/// Adds the products of all tokens with the interleaved columns to `sums`, `[n, 32]`.
///
/// # Safety
/// The instructions are present, `scratch` holds the `depth` columns from `start` on, which `x` has.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply(x: &Rounded, start: usize, depth: usize, scratch: &[u32], sums: &mut [f32]) {
    let pairs = depth.div_ceil(2);
    let mut t = 0;
    while t < x.n {
        // SAFETY: tokens `t..t + N` and their words from `start / 2` on are inside `x` and `sums`.
        unsafe {
            let words = x.pairs.as_ptr().add(t * x.stride + start / 2);
            let (w, sums) = (scratch.as_ptr(), sums.as_mut_ptr().add(t * ROWS));
            t += match x.n - t {
                12.. => tile::<12>(words, x.stride, pairs, w, sums),
                8.. => tile::<8>(words, x.stride, pairs, w, sums),
                4.. => tile::<4>(words, x.stride, pairs, w, sums),
                _ => tile::<1>(words, x.stride, pairs, w, sums),
            };
        }
    }
}

/// The same bits as pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_words(words: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes of plain numbers.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
}

/// Adds to the sums of `N` tokens; `N`.
///
/// # Safety
/// As [`multiply`]; `N` tokens of `pairs` words, `stride` apart, and `N` rows of sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile<const N: usize>(
    x: *const u32,
    stride: usize,
    pairs: usize,
    w: *const u32,
    sums: *mut f32,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; N];
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = [0, 16].map(|half| _mm512_loadu_ps(sums.add(i * ROWS + half)));
        }
        for p in 0..pairs {
            let w0 = bf16_words(_mm512_loadu_si512(w.add(p * ROWS).cast()));
            let w1 = bf16_words(_mm512_loadu_si512(w.add(p * ROWS + 16).cast()));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = bf16_words(_mm512_set1_epi32(*x.add(i * stride + p) as i32));
                acc[0] = _mm512_dpbf16_ps(acc[0], w0, x);
                acc[1] = _mm512_dpbf16_ps(acc[1], w1, x);
            }
        }
        for (i, acc) in acc.into_iter().enumerate() {
            _mm512_storeu_ps(sums.add(i * ROWS), acc[0]);
            _mm512_storeu_ps(sums.add(i * ROWS + 16), acc[1]);
        }
    }
    N
}

#[cfg(test)]
mod tests {
    use super::super::product::{Finish, run_all};
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
            let args = Linear {
                x: &x,
                weight: &w,
                inner,
                outer,
            };
            let target = Target::new(&mut out, outer, 0..outer, Finish::Store, Some(&bias));
            let rounded = Rounded::new(&x, inner);
            run_all(&[&Blocks::new(Isa::selected(), args, &rounded, target)]);
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
