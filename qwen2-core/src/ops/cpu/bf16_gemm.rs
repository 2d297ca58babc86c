//! Many tokens times bf16 weights with the processor's bf16 dot product (AVX512-BF16) or, where it has
//! them, its matrix products (AMX).
//!
//! Activations are rounded to bf16, products are exact and summed in f32. The weights stay as they
//! are stored: each task turns a few of their rows into the interleaved order once, in its cache,
//! and multiplies all tokens with them.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

use half::bf16;

use super::amx;
use super::filled::filled;
use super::matmul::Linear;
use super::pool;
use super::product::{self, Product, Sums, Target};
use super::simd::{Isa, prefetch};

/// Fewer tokens than this do not pay for interleaving the weights.
pub(crate) const MIN_TOKENS: usize = 16;
/// Rows of a panel, interleaved together: two vectors.
const ROWS: usize = 32;
/// Most panels of a task for matrix products, so fast that they wait for activations that are read once
/// a panel.
const PANELS: usize = 4;
/// Columns of a block of activations: one cache line a token.
const BLOCK: usize = 32;

/// Columns that are interleaved at once: the first-level cache holds 16 KiB of weights.
const DEPTH: usize = 256;

/// Whether this machine has the instructions.
pub(crate) fn is_present() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// Products of the rounded activations with bf16 rows, some panels a task.
pub(crate) struct Blocks<'a> {
    isa: Isa,
    args: Linear<'a, bf16>,
    x: &'a Rounded,
    target: Target<'a>,
    /// Panels of a task.
    panels: usize,
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
        check(args, x);
        assert_eq!(x.n, target.tokens(), "activation shape");
        Self {
            isa,
            args,
            x,
            target,
            panels: match isa {
                Isa::Amx if args.outer.div_ceil(ROWS) >= 16 * pool::current_threads() => PANELS,
                Isa::Amx => 2,
                _ => 1,
            },
        }
    }
}

/// # Panics
/// If a length does not fit the shape, or the machine lacks the instructions.
fn check(args: Linear<'_, bf16>, x: &Rounded) {
    assert!(is_present(), "AVX512-BF16");
    assert_eq!(args.weight.len(), args.inner * args.outer, "weight length");
    assert_eq!(x.cols, args.inner, "activation width");
}

/// Weights of a panel that are interleaved next: [`multiply`] has them brought near meanwhile.
#[derive(Clone, Copy)]
struct Ahead<'a> {
    args: Linear<'a, bf16>,
    row: usize,
    start: usize,
}

impl Ahead<'_> {
    /// Asks for the lines of the weights' share from `done` of `all` on, `step` of them.
    #[inline]
    fn ask(self, done: usize, step: usize, all: usize) {
        let Linear { inner, outer, .. } = self.args;
        let columns = self.start..(self.start + DEPTH).min(inner);
        for row in ROWS * done / all..ROWS * (done + step) / all {
            let row = self.row + row;
            if row < outer {
                let lines = self.args.weight[row * inner..][columns.clone()].chunks(BLOCK);
                lines.for_each(|line| prefetch(line.as_ptr().addr()));
            }
        }
    }
}

/// The sums of all tokens with some panels of rows from `row` on, `[n, panels · 32]`; `next` is what
/// comes behind them.
fn sum(
    isa: Isa,
    args: Linear<'_, bf16>,
    x: &Rounded,
    (row, panels): (usize, usize),
    next: Ahead<'_>,
    (scratch, sums): (&mut Vec<u32>, &mut [f32]),
) {
    scratch.resize(panels * ROWS * DEPTH / 2, 0);
    sums.fill(0.0);
    assert_eq!(sums.len(), x.n * panels * ROWS, "sums");
    for start in (0..args.inner).step_by(DEPTH) {
        let depth = DEPTH.min(args.inner - start);
        for (panel, scratch) in scratch.chunks_mut(ROWS * DEPTH / 2).enumerate() {
            let row = (row + panel * ROWS).min(args.outer);
            // SAFETY: the instructions are there, and the lengths were checked.
            unsafe { interleave(args, row, start, depth, scratch) };
        }
        if isa == Isa::Amx {
            amx::multiply_bf16(
                &amx::Bf16 {
                    x: x.words[start / BLOCK * x.n..].as_flattened(),
                    n: x.n,
                    blocks: depth.div_ceil(BLOCK),
                    weights: scratch,
                    panels,
                },
                sums,
            );
            continue;
        }
        let strided = panels * ROWS;
        for (panel, scratch) in scratch.chunks(ROWS * DEPTH / 2).enumerate() {
            let sums = &mut sums[panel * ROWS..];
            let ahead = match start + depth < args.inner {
                true => Ahead {
                    args,
                    row: row + panel * ROWS,
                    start: start + depth,
                },
                false => next,
            };
            // SAFETY: as above.
            unsafe { multiply(x, (start, depth), scratch, (sums, strided), ahead) };
        }
    }
}

/// `silu(x gateᵀ) · (x upᵀ)`, rounded by the task that made it.
///
/// # Panics
/// If a length does not fit the shapes, or these have not as many rows.
pub(crate) fn swiglu(
    isa: Isa,
    gate: Linear<'_, bf16>,
    up: Linear<'_, bf16>,
    x: &Rounded,
) -> Rounded {
    check(gate, x);
    check(up, x);
    assert_eq!(gate.outer, up.outer, "a pair");
    let threads = pool::current_threads();
    Rounded::make(x.n, gate.outer, &|block, out| {
        let (mut scratch, mut sums) = SCRATCH.take();
        sums.resize(2 * x.n * ROWS, 0.0);
        let (gates, ups) = sums[..2 * x.n * ROWS].split_at_mut(x.n * ROWS);
        let row = block * ROWS;
        let ahead = |args, row| Ahead {
            args,
            row,
            start: 0,
        };
        let next = (ahead(up, row), ahead(gate, row + ROWS * threads));
        sum(isa, gate, x, (row, 1), next.0, (&mut scratch, gates));
        sum(isa, up, x, (row, 1), next.1, (&mut scratch, ups));
        product::gate(isa, gates, ups);
        // Rows past the last are sums of nothing.
        for (out, row) in out.iter_mut().zip(gates.as_chunks().0) {
            // SAFETY: the instructions are there.
            unsafe { round_block(row, out) };
        }
        SCRATCH.set((scratch, sums));
    })
}

impl Product for Blocks<'_> {
    fn tasks(&self) -> usize {
        self.args.outer.div_ceil(ROWS).div_ceil(self.panels)
    }

    fn weights(&self, task: usize) -> pool::Streams {
        let Linear { inner, outer, .. } = self.args;
        let rows = self.panels * ROWS;
        let rows = task * rows..((task + 1) * rows).min(outer);
        pool::streams(&self.args.weight[rows.start * inner..rows.end * inner], &[])
    }

    fn run(&self, task: usize) {
        let (row, n) = (task * self.panels * ROWS, self.x.n);
        let left = self.args.outer - row;
        let panels = self.panels.min(left.div_ceil(ROWS));
        let stride = panels * ROWS;
        let (mut scratch, mut sums) = SCRATCH.take();
        sums.resize(n * stride, 0.0);
        // Threads take tasks in turn, mostly.
        let next = Ahead {
            args: self.args,
            row: row + self.panels * ROWS * pool::current_threads(),
            start: 0,
        };
        let rows = (row, panels);
        sum(
            self.isa,
            self.args,
            self.x,
            rows,
            next,
            (&mut scratch, &mut sums),
        );
        let rows = (row, stride.min(left));
        // SAFETY: the lengths were checked, and the rows are this task's own.
        unsafe {
            self.target.take(
                self.isa,
                Sums {
                    values: &sums,
                    stride,
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

/// A block of one token.
type Line = [u32; BLOCK / 2];

/// Activations in bf16, pairs of columns as one word, block by block, so that a product takes a block
/// of all tokens from one stretch of memory; padded with zeros to whole blocks.
#[cfg_attr(test, derive(Debug, PartialEq))]
pub(crate) struct Rounded {
    /// `[blocks][n]`.
    words: Vec<Line>,
    n: usize,
    cols: usize,
}

impl Rounded {
    /// `x` `[n, cols]`.
    ///
    /// # Panics
    /// If the machine lacks the instructions.
    pub(crate) fn new(x: &[f32], cols: usize) -> Self {
        assert!(is_present(), "AVX512-BF16");
        Self::make(x.len() / cols, cols, &|block, out| {
            let width = BLOCK.min(cols - block * BLOCK);
            for (t, out) in out.iter_mut().enumerate() {
                let mut row = [0.0; BLOCK];
                row[..width].copy_from_slice(&x[t * cols + block * BLOCK..][..width]);
                // SAFETY: the instructions are there.
                unsafe { round_block(&row, out) };
            }
        })
    }

    /// What `fill(block, out)` makes of every block of all tokens; it writes them all.
    fn make(
        n: usize,
        cols: usize,
        fill: &(dyn Fn(usize, &mut [MaybeUninit<Line>]) + Sync),
    ) -> Self {
        let n_lines = cols.div_ceil(BLOCK) * n;
        // SAFETY: each block is written by its task.
        let words = unsafe {
            filled(n_lines, |words| {
                let blocks: Vec<_> = words.chunks_mut(n).map(Mutex::new).collect();
                pool::parallel(blocks.len(), &|block| {
                    // Each lock is taken once, by its own task.
                    let mut out = blocks[block].lock().unwrap_or_else(PoisonError::into_inner);
                    fill(block, &mut out);
                });
            })
        };
        Self { words, n, cols }
    }
}

/// Rounds to nearest, ties to even; NaN stays NaN, what is subnormal becomes zero.
///
/// # Safety
/// The instructions are present.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn round_block(x: &[f32; BLOCK], out: &mut MaybeUninit<Line>) {
    // SAFETY: 32 elements are read, 16 words written.
    unsafe {
        let low = _mm512_loadu_ps(x.as_ptr());
        let high = _mm512_loadu_ps(x.as_ptr().add(16));
        let words = _mm512_cvtne2ps_pbh(high, low);
        out.as_mut_ptr().cast::<__m512bh>().write_unaligned(words);
    }
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
    for pair in whole / 2..depth.next_multiple_of(BLOCK) / 2 {
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

/// Adds the products of all tokens with the interleaved columns to `sums`, `[n, stride]`.
///
/// # Safety
/// The instructions are present, `scratch` holds the `depth` columns from `start` on, which `x` has.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply(
    x: &Rounded,
    (start, depth): (usize, usize),
    scratch: &[u32],
    (sums, stride): (&mut [f32], usize),
    ahead: Ahead<'_>,
) {
    let first = start / BLOCK * x.n;
    let blocks = depth.div_ceil(BLOCK);
    let mut t = 0;
    while t < x.n {
        // SAFETY: tokens `t..t + N` of the blocks are inside `x` and `sums`.
        unsafe {
            let words = x.words.as_ptr().add(first + t);
            let (w, sums) = (scratch.as_ptr(), sums.as_mut_ptr().add(t * stride));
            let before = t;
            t += match x.n - t {
                12.. => tile::<12>(words, x.n, blocks, w, sums, stride),
                8.. => tile::<8>(words, x.n, blocks, w, sums, stride),
                4.. => tile::<4>(words, x.n, blocks, w, sums, stride),
                _ => tile::<1>(words, x.n, blocks, w, sums, stride),
            };
            ahead.ask(before, t - before, x.n);
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
/// As [`multiply`]; `N` tokens of `blocks` blocks, `n` lines apart, and `N` rows of sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile<const N: usize>(
    mut x: *const Line,
    n: usize,
    blocks: usize,
    mut w: *const u32,
    sums: *mut f32,
    stride: usize,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; N];
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = [0, 16].map(|half| _mm512_loadu_ps(sums.add(i * stride + half)));
        }
        for _ in 0..blocks {
            let words: *const u32 = x.cast();
            for p in 0..BLOCK / 2 {
                let w0 = bf16_words(_mm512_loadu_si512(w.cast()));
                let w1 = bf16_words(_mm512_loadu_si512(w.add(16).cast()));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = *words.add(i * (BLOCK / 2) + p) as i32;
                    let x = bf16_words(_mm512_set1_epi32(x));
                    acc[0] = _mm512_dpbf16_ps(acc[0], w0, x);
                    acc[1] = _mm512_dpbf16_ps(acc[1], w1, x);
                }
                w = w.add(ROWS);
            }
            x = x.wrapping_add(n);
        }
        for (i, acc) in acc.into_iter().enumerate() {
            _mm512_storeu_ps(sums.add(i * stride), acc[0]);
            _mm512_storeu_ps(sums.add(i * stride + 16), acc[1]);
        }
    }
    N
}

#[cfg(test)]
mod tests {
    use super::super::product::{Finish, run_all};
    use super::*;

    /// Those that the dispatch brings here.
    fn kernels() -> impl Iterator<Item = Isa> {
        Isa::available()
            .into_iter()
            .filter(|isa| *isa >= Isa::Avx512)
    }

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        if !is_present() {
            return; // nothing to test: the dispatch never comes here
        }
        let x: Vec<f32> = (0..200_000_u32)
            .map(|i| f32::from_bits(i.wrapping_mul(0x9E37_79B9)))
            .collect();
        let rounded = Rounded::new(&x, BLOCK);
        for (got, x) in rounded
            .words
            .as_flattened()
            .iter()
            .zip(x.as_chunks::<2>().0)
        {
            for (got, x) in [*got as u16, (got >> 16) as u16].into_iter().zip(x) {
                let want = bf16::from_f32(if x.is_subnormal() { 0.0 * x } else { *x });
                let got = bf16::from_bits(got);
                let both_nan = got.is_nan() && x.is_nan();
                assert!(both_nan || got.to_bits() == want.to_bits(), "{x}");
            }
        }
    }

    #[test]
    fn a_rounded_gate_is_the_gate_rounded() {
        if !is_present() {
            return;
        }
        let (n, inner, outer) = (19, 70, 75);
        let wave = |len: usize, f: f32| (0..len).map(move |i| (i as f32 * f).sin());
        let x: Vec<f32> = wave(n * inner, 0.37).collect();
        let [gate, up] = [0.11, 0.19].map(|f| {
            let w = wave(outer * inner, f).map(bf16::from_f32);
            w.collect::<Vec<_>>()
        });
        let linear = |weight| Linear {
            x: &x,
            weight,
            inner,
            outer,
        };
        let rounded = Rounded::new(&x, inner);
        let mut out = vec![f32::NAN; n * outer];
        for isa in kernels() {
            for (weight, finish) in [(&gate, Finish::Store), (&up, Finish::Gate)] {
                let target = Target::new(&mut out, outer, 0..outer, finish, None);
                run_all(&[&Blocks::new(isa, linear(weight), &rounded, target)]);
            }
            let got = swiglu(isa, linear(&gate), linear(&up), &rounded);
            assert_eq!(got, Rounded::new(&out, outer), "{isa:?}");
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
            (40, 64, 129),
            (130, 600, 2100),
        ] {
            let x: Vec<f32> = (0..n * inner).map(|i| (i as f32 * 0.37).sin()).collect();
            let w: Vec<bf16> = (0..outer * inner)
                .map(|i| bf16::from_f32((i as f32 * 0.11).cos()))
                .collect();
            let bias: Vec<f32> = (0..outer).map(|i| i as f32).collect();
            let args = Linear {
                x: &x,
                weight: &w,
                inner,
                outer,
            };
            let rounded = Rounded::new(&x, inner);
            for isa in kernels() {
                let mut out = vec![f32::NAN; n * outer];
                let target = Target::new(&mut out, outer, 0..outer, Finish::Store, Some(&bias));
                run_all(&[&Blocks::new(isa, args, &rounded, target)]);
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
                            "{isa:?} {n} {inner} {outer}: {out} {want}"
                        );
                    }
                }
            }
        }
    }
}
