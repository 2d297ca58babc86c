//! Many tokens times weights in bf16 with the processor's bf16 dot product (AVX512-BF16) or, where it has
//! them, its matrix products (AMX).
//!
//! Activations are rounded to bf16, and so are packed weights; products are exact and summed in f32. The
//! weights stay as they are stored: each task brings a few of their rows into the interleaved order once,
//! in its cache, and multiplies all tokens with them.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

use super::amx;
use super::filled::filled;
use super::interleave::{BLOCK, Part, ROWS, Weights};
use super::lines::{self, Line, flat};
use super::pool;
use super::product::{self, Product, Sums, Target};
use super::simd::Isa;

/// From so many tokens on bf16 weights pay for being interleaved.
const MANY: usize = 16;
/// Most panels of a task for matrix products, so fast that they wait for activations that are read once
/// a panel: those of a stretch and the sums stay in the second-level cache.
const PANELS: usize = 8;
/// From so many tokens on packed weights pay for becoming bf16, where there are matrix products.
const MANY_PACKED: usize = 64;
/// Columns that are interleaved at once for dot products: the first-level cache holds 16 KiB of weights.
const DEPTH: usize = 256;
/// Columns that are interleaved at once for matrix products: the first-level cache holds 32 KiB of weights,
/// and sums are loaded and stored for each stretch.
const TILE_DEPTH: usize = 512;

/// Whether this machine has the instructions.
pub(crate) fn is_present() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// Whether products of `n` tokens with bf16 weights are those of bf16: only where it is wanted, too.
pub(crate) fn is_for_dense(isa: Isa, n: usize) -> bool {
    pool::takes_bf16_products() && n >= MANY && isa >= Isa::Avx512 && is_present()
}

/// Whether products of `n` tokens with packed weights are those of bf16: it rounds activations less than
/// eight bits do, and matrix products are faster than any others.
pub(crate) fn is_for_packed(isa: Isa, n: usize) -> bool {
    n >= MANY_PACKED && isa == Isa::Amx
}

/// Products of the rounded activations with rows of weights, some panels a task.
pub(crate) struct Blocks<'a> {
    isa: Isa,
    weights: Weights<'a>,
    x: &'a Rounded,
    target: Target<'a>,
    /// Panels of a task.
    panels: usize,
}

impl<'a> Blocks<'a> {
    /// # Panics
    /// If a length does not fit the shape, or the machine lacks the instructions.
    pub(crate) fn new(isa: Isa, weights: Weights<'a>, x: &'a Rounded, target: Target<'a>) -> Self {
        check(weights, x);
        assert_eq!(x.n, target.tokens(), "activation shape");
        Self {
            isa,
            weights,
            x,
            target,
            panels: match isa {
                Isa::Amx => task_panels(weights.rows(), PANELS),
                _ => 1,
            },
        }
    }
}

/// How many panels of so many rows a task has for matrix products, at most `most`: each thread as many.
fn task_panels(rows: usize, most: usize) -> usize {
    let (panels, threads) = (rows.div_ceil(ROWS), pool::current_threads());
    panels.div_ceil(threads * panels.div_ceil(threads * most))
}

/// # Panics
/// If a length does not fit the shape, or the machine lacks the instructions.
fn check(weights: Weights<'_>, x: &Rounded) {
    assert!(is_present(), "AVX512-BF16");
    weights.check();
    assert_eq!(x.cols, weights.cols(), "activation width");
}

/// Weights of a panel that are interleaved next: [`multiply`] has them brought near meanwhile.
type Ahead<'a> = (Weights<'a>, Part);

/// The sums of all tokens with some panels of rows from `row` on, `[n, panels · 32]`; `next` is what
/// comes behind them.
fn sum(
    isa: Isa,
    weights: Weights<'_>,
    x: &Rounded,
    (row, panels): (usize, usize),
    next: Ahead<'_>,
    (scratch, sums): (&mut Vec<Line<u32>>, &mut [f32]),
) {
    let most = depth(isa);
    let depth = |start: usize| most.min(x.cols - start);
    let panel_words = ROWS * depth(0).next_multiple_of(BLOCK) / 2;
    let scratch = lines::room(scratch, panels * panel_words);
    assert_eq!(sums.len(), x.n * panels * ROWS, "sums");
    let part = |panel: usize, start: usize| Part {
        row: row + panel * ROWS,
        start,
        depth: depth(start),
    };
    for start in (0..x.cols).step_by(most) {
        for (panel, scratch) in scratch.chunks_mut(panel_words).enumerate() {
            // SAFETY: the instructions are there, and the lengths were checked.
            unsafe { weights.interleave(part(panel, start), scratch) };
        }
        let ahead = |panel: usize| match start + most < x.cols {
            true => (weights, part(panel, start + most)),
            false => (
                next.0,
                Part {
                    row: next.1.row + panel * ROWS,
                    ..next.1
                },
            ),
        };
        if isa == Isa::Amx {
            let args = amx::Bf16 {
                x: &flat(&x.words)[start / BLOCK * x.n * lines::WORDS..],
                n: x.n,
                blocks: depth(start).div_ceil(BLOCK),
                weights: scratch,
                panels,
            };
            amx::multiply_bf16(&args, start > 0, sums, &|panel, share| {
                let (weights, part) = ahead(panel);
                weights.ask(part, share);
            });
            continue;
        }
        if start == 0 {
            sums.fill(0.0);
        }
        let strided = panels * ROWS;
        for (panel, scratch) in scratch.chunks(panel_words).enumerate() {
            let sums = &mut sums[panel * ROWS..];
            let columns = (start, depth(start));
            // SAFETY: as above.
            unsafe { multiply(x, columns, scratch, (sums, strided), ahead(panel)) };
        }
    }
}

/// The first columns of a panel.
fn first_part(isa: Isa, row: usize) -> Part {
    Part {
        row,
        start: 0,
        depth: depth(isa),
    }
}

/// Columns that are interleaved at once.
fn depth(isa: Isa) -> usize {
    if isa == Isa::Amx { TILE_DEPTH } else { DEPTH }
}

/// `silu(x gateᵀ) · (x upᵀ)`, rounded by the task that made it.
///
/// # Panics
/// If a length does not fit the shapes, or these have not as many rows.
pub(crate) fn swiglu(isa: Isa, gate: Weights<'_>, up: Weights<'_>, x: &Rounded) -> Rounded {
    check(gate, x);
    check(up, x);
    assert_eq!(gate.rows(), up.rows(), "a pair");
    let panels = match isa {
        Isa::Amx => task_panels(gate.rows(), PANELS / 2),
        _ => 1,
    };
    let next_task = panels * ROWS * pool::current_threads();
    Rounded::make(x.n, gate.rows(), panels, &|task, out| {
        let (row, panels) = (task * panels * ROWS, out.len() / x.n);
        let (mut scratch, mut sums) = SCRATCH.take();
        let stride = panels * ROWS;
        let room = lines::room(&mut sums, 2 * x.n * stride);
        let (gates, ups) = room.split_at_mut(x.n * stride);
        let next = (
            (up, first_part(isa, row)),
            (gate, first_part(isa, row + next_task)),
        );
        let rows = (row, panels);
        sum(isa, gate, x, rows, next.0, (&mut scratch, gates));
        sum(isa, up, x, rows, next.1, (&mut scratch, ups));
        product::gate(isa, gates, ups);
        // Rows past the last are sums of nothing.
        for (panel, out) in out.chunks_mut(x.n).enumerate() {
            for (out, row) in out.iter_mut().zip(gates.chunks(stride)) {
                // SAFETY: the instructions are there.
                out.write(unsafe { round_block(&row.as_chunks().0[panel]) });
            }
        }
        SCRATCH.set((scratch, sums));
    })
}

impl Product for Blocks<'_> {
    fn tasks(&self) -> usize {
        self.weights.rows().div_ceil(ROWS).div_ceil(self.panels)
    }

    fn weights(&self, task: usize) -> pool::Streams {
        let rows = self.panels * ROWS;
        let end = ((task + 1) * rows).min(self.weights.rows());
        self.weights.streams(task * rows..end)
    }

    fn run(&self, task: usize) {
        let (row, n) = (task * self.panels * ROWS, self.x.n);
        let left = self.weights.rows() - row;
        let panels = self.panels.min(left.div_ceil(ROWS));
        let stride = panels * ROWS;
        let (mut scratch, mut sums) = SCRATCH.take();
        let room = lines::room(&mut sums, n * stride);
        // Threads take tasks in turn, mostly.
        let next = first_part(self.isa, row + self.panels * ROWS * pool::current_threads());
        sum(
            self.isa,
            self.weights,
            self.x,
            (row, panels),
            (self.weights, next),
            (&mut scratch, room),
        );
        let rows = (row, stride.min(left));
        // SAFETY: the lengths were checked, and the rows are this task's own.
        unsafe {
            self.target.take(
                self.isa,
                Sums {
                    values: room,
                    stride,
                    tokens: (0, n),
                    rows,
                },
            );
        }
        SCRATCH.set((scratch, sums));
    }
}

/// The interleaved weights and the sums of a task.
type Scratch = (Vec<Line<u32>>, Vec<Line<f32>>);

thread_local! {
    /// Kept for the next task.
    static SCRATCH: Cell<Scratch> = const { Cell::new((Vec::new(), Vec::new())) };
}

/// A block of a token that is to be written.
type Unset = MaybeUninit<Line<u32>>;

/// Activations in bf16, pairs of columns as one word, block by block, so that a product takes a block
/// of all tokens from one stretch of memory; padded with zeros to whole blocks.
#[cfg_attr(test, derive(Debug, PartialEq))]
pub(crate) struct Rounded {
    /// `[blocks][n]`, a block of a token each.
    words: Vec<Line<u32>>,
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
        Self::make(x.len() / cols, cols, 1, &|block, out| {
            let width = BLOCK.min(cols - block * BLOCK);
            for (t, out) in out.iter_mut().enumerate() {
                let mut row = [0.0; BLOCK];
                row[..width].copy_from_slice(&x[t * cols + block * BLOCK..][..width]);
                // SAFETY: the instructions are there.
                out.write(unsafe { round_block(&row) });
            }
        })
    }

    /// What `fill(task, out)` makes of all tokens, `per_task` blocks in a task; it writes them all.
    fn make(
        n: usize,
        cols: usize,
        per_task: usize,
        fill: &(dyn Fn(usize, &mut [Unset]) + Sync),
    ) -> Self {
        let n_lines = cols.div_ceil(BLOCK) * n;
        // SAFETY: each block is written by its task.
        let words = unsafe {
            filled(n_lines, |words| {
                let tasks: Vec<_> = words.chunks_mut(per_task * n).map(Mutex::new).collect();
                pool::parallel(tasks.len(), &|task| {
                    // Each lock is taken once, by its own task.
                    let mut out = tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
                    fill(task, &mut out);
                });
            })
        };
        Self { words, n, cols }
    }
}

/// Rounds to nearest, ties to even; NaN stays NaN, what is subnormal becomes zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn round_block(x: &[f32; BLOCK]) -> Line<u32> {
    // SAFETY: 32 elements are read; both types are 64 bytes of plain numbers.
    unsafe {
        let low = _mm512_loadu_ps(x.as_ptr());
        let high = _mm512_loadu_ps(x.as_ptr().add(16));
        std::mem::transmute::<__m512bh, Line<u32>>(_mm512_cvtne2ps_pbh(high, low))
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
            ahead.0.ask(ahead.1, (before, t - before, x.n));
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
    mut x: *const Line<u32>,
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
    use half::bf16;

    use super::super::product::{Finish, run_all};
    use super::super::quantized::tests::pack;
    use super::*;
    use crate::ops::packed::{Format, Shape};

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
        for (got, x) in flat(&rounded.words).iter().zip(x.as_chunks::<2>().0) {
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
        let linear = |weight| Weights::Dense(weight, inner);
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
            let args = Weights::Dense(&w, inner);
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

    #[test]
    fn packed_weights_are_multiplied_as_they_round() {
        if !is_present() {
            return; // nothing to test: the dispatch never comes here
        }
        for (format, n, rows, cols) in [
            (Format::Q8, 70, 75, 96),
            (Format::Q4, 64, 33, 1216),
            (Format::Q8, 97, 530, 70),
        ] {
            let shape = Shape { format, rows, cols };
            let w: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.11).cos()).collect();
            let bytes = pack(shape, &w);
            let x: Vec<f32> = (0..n * cols).map(|i| (i as f32 * 0.37).sin()).collect();
            let rounded = Rounded::new(&x, cols);
            let round = |x: f32| bf16::from_f32(x).to_f64();
            for isa in kernels() {
                let mut out = vec![f32::NAN; n * rows];
                let target = Target::new(&mut out, rows, 0..rows, Finish::Store, None);
                run_all(&[&Blocks::new(
                    isa,
                    Weights::Packed(&bytes, shape),
                    &rounded,
                    target,
                )]);
                let mut row = vec![0.0; cols];
                for r in 0..rows {
                    shape.unpack_row(&bytes, r, &mut row);
                    for t in 0..n {
                        let products = row.iter().zip(&x[t * cols..]);
                        let want: f64 = products.map(|(w, x)| round(*w) * round(*x)).sum();
                        let got = out[t * rows + r];
                        // Some weights lie between two numbers of bf16.
                        let most = 1e-4 * cols as f32;
                        assert!(
                            (got - want as f32).abs() < most,
                            "{isa:?} {format:?}: {got} {want}"
                        );
                    }
                }
            }
        }
    }
}
