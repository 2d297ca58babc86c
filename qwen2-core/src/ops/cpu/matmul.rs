//! `x Wᵀ + b` over weights in their stored precision: of a few tokens as a stream of the weights, of many
//! by `dense_gemm`.

use std::cell::Cell;

use super::cut::Cut;
use super::dense_gemm::{self, MIN_TOKENS, PASS};
use super::pool;
use super::product::{Product, Sums, Target};
use super::simd::{Isa, Simd, Stored, per_isa};

/// Weight rows and tokens of one register tile.
const TILE: usize = 4;
/// Most rows whose sums are kept at once.
const MOST_ROWS: usize = 512;
/// How many bytes ahead one token's products ask for weights.
const AHEAD: usize = 1024;
/// Rows that one token reads side by side, or half of them: so many places ask the memory for more at once than one, whose fetches
/// ahead end with a page.
const STREAMS: usize = 8;
/// Widest stretch of the inner dimension that a tile sums at once.
const DEPTH: usize = 2048;

/// One multiplication: `x` `[n, inner]`, `weight` `[outer, inner]`.
#[derive(Clone, Copy)]
pub(crate) struct Linear<'a, W> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [W],
    pub(crate) inner: usize,
    pub(crate) outer: usize,
}

impl<W> Linear<'_, W> {
    /// # Panics
    /// If a length does not fit the shape.
    pub(super) fn check(&self, target: &Target<'_>) {
        assert_eq!(self.weight.len(), self.inner * self.outer, "weight length");
        assert_eq!(
            self.x.len(),
            target.tokens() * self.inner,
            "activation length"
        );
    }
}

/// [`Linear`] in tasks of some rows each.
pub(crate) struct Rows<'a, W> {
    isa: Isa,
    args: Linear<'a, W>,
    target: Target<'a>,
    cut: Cut,
    /// The activations of one token in the order that its products take them, where that is another.
    split: Option<Vec<f32>>,
}

impl<'a, W: Stored> Rows<'a, W> {
    /// `total`: the rows of all the products of the job.
    ///
    /// # Panics
    /// If a length does not fit the shape.
    pub(crate) fn new(isa: Isa, args: Linear<'a, W>, target: Target<'a>, total: usize) -> Self {
        args.check(&target);
        let (threads, len) = (pool::current_threads(), args.outer);
        let cut = match target.tokens() {
            0..MIN_TOKENS => Cut::halving(
                len,
                args.inner * size_of::<W>(),
                (STREAMS, STREAMS),
                threads,
            ),
            _ => {
                // Sums and turned weights in the second-level cache, and a few tasks for each thread.
                let panel = dense_gemm::panel_rows(isa.lanes());
                let panels = total.div_ceil(panel * 8 * threads);
                Cut::Even {
                    len,
                    per_task: panel * panels.min(4),
                }
            }
        };
        Self {
            isa,
            args,
            target,
            cut,
            split: (W::SPLITS && target.tokens() == 1).then(|| split(args.x, isa.lanes())),
        }
    }
}

/// `x` with every `2 · lanes` elements as those at even places, then those at odd ones; what makes no
/// whole stretch stays.
fn split(x: &[f32], lanes: usize) -> Vec<f32> {
    let mut out = x.to_vec();
    let stretches = out.chunks_exact_mut(2 * lanes);
    for (out, x) in stretches.zip(x.chunks_exact(2 * lanes)) {
        for (i, pair) in x.as_chunks::<2>().0.iter().enumerate() {
            (out[i], out[lanes + i]) = (pair[0], pair[1]);
        }
    }
    out
}

impl<W: Stored> Product for Rows<'_, W> {
    fn tasks(&self) -> usize {
        self.cut.tasks()
    }

    fn weights(&self, task: usize) -> pool::Streams {
        let rows = self.cut.lines(task);
        pool::streams(
            &self.args.weight[rows.start * self.args.inner..rows.end * self.args.inner],
            &[],
        )
    }

    fn run(&self, task: usize) {
        let rows = self.cut.lines(task);
        for start in rows.clone().step_by(MOST_ROWS) {
            // SAFETY: the rows are this task's own.
            unsafe { self.multiply((start, MOST_ROWS.min(rows.end - start))) };
        }
    }
}

impl<W: Stored> Rows<'_, W> {
    /// Does some rows: the first and their number.
    ///
    /// # Safety
    /// No other thread does one of them meanwhile.
    unsafe fn multiply(&self, rows: (usize, usize)) {
        let n = self.target.tokens();
        let (mut sums, mut turned) = SCRATCH.take();
        let stride = match n {
            0..MIN_TOKENS => rows.1,
            _ => rows
                .1
                .next_multiple_of(dense_gemm::panel_rows(self.isa.lanes())),
        };
        for first in (0..n).step_by(PASS) {
            let tokens = (first, PASS.min(n - first));
            sums.clear();
            sums.resize(tokens.1 * stride, 0.0);
            if n < MIN_TOKENS {
                let x = self.split.as_deref().unwrap_or(self.args.x);
                few(self.isa, Linear { x, ..self.args }, rows, &mut sums);
            } else {
                dense_gemm::add_products(self.isa, self.args, tokens, rows, &mut turned, &mut sums);
            }
            let values = Sums {
                values: &sums,
                stride,
                tokens,
                rows,
            };
            // SAFETY: the lengths were checked; the rest is the caller's promise.
            unsafe { self.target.take(self.isa, values) };
        }
        SCRATCH.with(|scratch| scratch.set((sums, turned)));
    }
}

thread_local! {
    /// The sums of a task and its turned weights, kept for the next one. They come back by `with`, since
    /// `LocalKey::set` goes through an initialization, which took 1 % of a token.
    static SCRATCH: Cell<(Vec<f32>, Vec<f32>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

per_isa!(few, few_kernel<W: Stored>, (args: Linear<'_, W>, rows: (usize, usize), sums: &mut [f32]));

/// The sums of all tokens and some rows (first and number) into `sums`, `[tokens, rows]`, zeros before.
///
/// # Safety
/// The instruction set of `S` is present; the rows are inside the checked lengths.
#[inline(always)]
unsafe fn few_kernel<S: Simd, W: Stored>(
    args: Linear<'_, W>,
    rows: (usize, usize),
    sums: &mut [f32],
) {
    let (inner, tokens) = (args.inner, args.x.len() / args.inner);
    // SAFETY: the caller's promise; every index is below its end.
    unsafe {
        let x = args.x.as_ptr();
        let w = args.weight.as_ptr().add(rows.0 * inner);
        if args.x.len() == inner {
            // One token in all: its activations are in the order of `side_by_side`.
            if S::LANES * STREAMS <= 64 {
                stretches::<S, W, { STREAMS / 2 }>(x, w, inner, sums); // for want of registers
            } else {
                stretches::<S, W, STREAMS>(x, w, inner, sums);
            }
            return;
        }
        for k in (0..inner).step_by(DEPTH) {
            let depth = DEPTH.min(inner - k);
            for row in (0..rows.1).step_by(TILE) {
                for t in (0..tokens).step_by(TILE) {
                    let n_rows = TILE.min(rows.1 - row);
                    let n_tokens = TILE.min(tokens - t);
                    let (x, w) = (x.add(t * inner + k), w.add(row * inner + k));
                    let tile = if n_rows == TILE && n_tokens == TILE {
                        tile::<S, W>(x, w, inner, depth)
                    } else {
                        edge::<S, W>(x, w, inner, depth, n_tokens, n_rows)
                    };
                    for (i, tile) in tile.iter().enumerate().take(n_tokens) {
                        for (j, sum) in tile.iter().enumerate().take(n_rows) {
                            sums[(t + i) * rows.1 + row + j] += *sum;
                        }
                    }
                }
            }
        }
    }
}

/// Sums of `TILE` tokens × `TILE` rows over `depth` elements.
///
/// # Safety
/// `x` and `w` point at `TILE` rows of `depth` elements, `stride` apart.
#[inline(always)]
unsafe fn tile<S: Simd, W: Stored>(
    x: *const f32,
    w: *const W,
    stride: usize,
    depth: usize,
) -> [[f32; TILE]; TILE] {
    const HALF: usize = TILE / 2;
    // SAFETY: the caller's promise.
    unsafe {
        if S::REGISTERS == 1 {
            return rows::<S, W, TILE>(x, w, stride, depth);
        }
        // Half of the rows after the other: the sums of all would take every register.
        let low = rows::<S, W, HALF>(x, w, stride, depth);
        let high = rows::<S, W, HALF>(x, w.add(HALF * stride), stride, depth);
        std::array::from_fn(|i| {
            std::array::from_fn(|j| {
                if j < HALF {
                    low[i][j]
                } else {
                    high[i][j - HALF]
                }
            })
        })
    }
}

/// As [`tile`], of `R` rows.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn rows<S: Simd, W: Stored, const R: usize>(
    x: *const f32,
    w: *const W,
    stride: usize,
    depth: usize,
) -> [[f32; R]; TILE] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[S::zero(); R]; TILE];
        let whole = depth / S::LANES * S::LANES;
        let mut k = 0;
        while k < whole {
            let mut rows = [S::zero(); R];
            for (j, row) in rows.iter_mut().enumerate() {
                *row = W::load::<S>(w.add(j * stride + k));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let token = S::load(x.add(i * stride + k));
                for (sum, row) in sums.iter_mut().zip(rows) {
                    *sum = token.mul_add(row, *sum);
                }
            }
            k += S::LANES;
        }
        let mut out = [[0.0; R]; TILE];
        for (i, out) in out.iter_mut().enumerate() {
            for (j, out) in out.iter_mut().enumerate() {
                *out = sums[i][j].sum();
                for k in whole..depth {
                    *out += *x.add(i * stride + k) * (*w.add(j * stride + k)).to_f32();
                }
            }
        }
        out
    }
}

/// As [`tile`], for what is left at the borders.
///
/// # Safety
/// As [`tile`], with `n_tokens` and `n_rows` rows.
#[inline(always)]
unsafe fn edge<S: Simd, W: Stored>(
    x: *const f32,
    w: *const W,
    stride: usize,
    depth: usize,
    n_tokens: usize,
    n_rows: usize,
) -> [[f32; TILE]; TILE] {
    let mut out = [[0.0; TILE]; TILE];
    for (i, out) in out.iter_mut().enumerate().take(n_tokens) {
        for (j, out) in out.iter_mut().enumerate().take(n_rows) {
            // SAFETY: the caller's promise.
            *out = unsafe { dot::<S, W>(x.add(i * stride), w.add(j * stride), depth) };
        }
    }
    out
}

/// The products of one token, whose activations are in the order of [`side_by_side`], with as many rows as `sums`
/// has places. Each of `R` stretches of the rows continues where its last one ended.
///
/// # Safety
/// The instruction set of `S` is present; the pointers have `inner` elements for each row.
#[inline(always)]
unsafe fn stretches<S: Simd, W: Stored, const R: usize>(
    x: *const f32,
    w: *const W,
    inner: usize,
    sums: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let stretch = sums.len() / R;
        for row in 0..stretch {
            let mut rows = [w; R];
            for (i, start) in rows.iter_mut().enumerate() {
                *start = w.add((i * stretch + row) * inner);
            }
            let products = side_by_side::<S, W, R>(x, rows, inner);
            for (i, product) in products.into_iter().enumerate() {
                sums[i * stretch + row] = product;
            }
        }
        for (row, sum) in sums.iter_mut().enumerate().skip(R * stretch) {
            [*sum] = side_by_side::<S, W, 1>(x, [w.add(row * inner)], inner);
        }
    }
}

/// Dot products of `R` rows of `n` elements with `x` in the order of [`Stored::load_pair`].
///
/// # Safety
/// The instruction set of `S` is present; all pointers have `n` elements.
#[inline(always)]
unsafe fn side_by_side<S: Simd, W: Stored, const R: usize>(
    x: *const f32,
    rows: [*const W; R],
    n: usize,
) -> [f32; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[S::zero(); 2]; R];
        let mut k = 0;
        while k + 2 * S::LANES <= n {
            let (x, x_second) = (S::load(x.add(k)), S::load(x.add(k + S::LANES)));
            for (row, sums) in rows.iter().zip(&mut sums) {
                S::prefetch(row.wrapping_add(k).wrapping_byte_add(AHEAD));
                let (first, second) = W::load_pair::<S>(row.add(k));
                sums[0] = first.mul_add(x, sums[0]);
                sums[1] = second.mul_add(x_second, sums[1]);
            }
            k += 2 * S::LANES;
        }
        let mut out = [0.0; R];
        for ((out, row), sums) in out.iter_mut().zip(rows).zip(sums) {
            *out = sums[0].add(sums[1]).sum();
            for k in k..n {
                *out += *x.add(k) * (*row.add(k)).to_f32();
            }
        }
        out
    }
}

/// Dot product of `n` elements.
///
/// # Safety
/// The instruction set of `S` is present; both pointers have `n` elements.
#[inline(always)]
pub(crate) unsafe fn dot<S: Simd, W: Stored>(x: *const f32, w: *const W, n: usize) -> f32 {
    // Four sums hide the latency of the multiply-add.
    const UNROLL: usize = 4;
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [S::zero(); UNROLL];
        let mut k = 0;
        while k + UNROLL * S::LANES <= n {
            for (u, sum) in sums.iter_mut().enumerate() {
                let at = k + u * S::LANES;
                *sum = W::load::<S>(w.add(at)).mul_add(S::load(x.add(at)), *sum);
            }
            k += UNROLL * S::LANES;
        }
        while k + S::LANES <= n {
            sums[0] = W::load::<S>(w.add(k)).mul_add(S::load(x.add(k)), sums[0]);
            k += S::LANES;
        }
        let mut sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum();
        for k in k..n {
            sum += *x.add(k) * (*w.add(k)).to_f32();
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::super::product::{Finish, run_all};
    use super::*;

    /// The definition, summed in f64.
    fn reference(x: &[f32], w: &[f32], bias: &[f32], inner: usize) -> Vec<f32> {
        x.chunks(inner)
            .flat_map(|x| {
                w.chunks(inner).zip(bias).map(move |(w, bias)| {
                    let sum: f64 = x
                        .iter()
                        .zip(w)
                        .map(|(x, w)| f64::from(*x) * f64::from(*w))
                        .sum();
                    (sum + f64::from(*bias)) as f32
                })
            })
            .collect()
    }

    fn product<W: Stored>(
        isa: Isa,
        x: &[f32],
        weight: &[W],
        bias: Option<&[f32]>,
        inner: usize,
    ) -> Vec<f32> {
        let outer = weight.len() / inner;
        let mut out = vec![f32::NAN; x.len() / inner * outer];
        let args = Linear {
            x,
            weight,
            inner,
            outer,
        };
        let target = Target::new(&mut out, outer, 0..outer, Finish::Store, bias);
        run_all(&[&Rows::new(isa, args, target, outer)]);
        out
    }

    fn check<W: Stored>(x: &[f32], w: &[W], bias: &[f32], inner: usize) {
        let stored: Vec<f32> = w.iter().map(|w| w.to_f32()).collect();
        let want = reference(x, &stored, bias, inner);
        for isa in Isa::available() {
            let out = product(isa, x, w, Some(bias), inner);
            for (out, want) in out.iter().zip(&want) {
                // f32 sums of `inner` products of size ≤ 1: rounding grows with √inner at worst.
                assert!(
                    (out - want).abs() <= 1e-6 * (inner as f32).max(8.0),
                    "{isa:?}: {out} {want}"
                );
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn linear_matches_the_definition_for_odd_shapes(
            n in 1usize..40, inner in 1usize..300, outer in 1usize..90, seed in any::<u64>(),
        ) {
            let mut state = seed | 1;
            let mut next = move || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            let x: Vec<f32> = (0..n * inner).map(|_| next()).collect();
            let w: Vec<f32> = (0..outer * inner).map(|_| next()).collect();
            let bias: Vec<f32> = (0..outer).map(|_| next()).collect();
            check(&x, &w, &bias, inner);
            check(&x, &w.iter().map(|w| bf16::from_f32(*w)).collect::<Vec<_>>(), &bias, inner);
            check(&x, &w.iter().map(|w| f16::from_f32(*w)).collect::<Vec<_>>(), &bias, inner);
        }
    }

    #[test]
    fn panels_and_depths_beyond_one_block_are_summed() {
        let (n, inner, outer) = (PASS + 5, DEPTH + 37, 6);
        let x: Vec<f32> = (0..n * inner)
            .map(|i| (i as f32 * 0.37).sin() * 0.1)
            .collect();
        let w: Vec<f32> = (0..outer * inner)
            .map(|i| (i as f32 * 0.11).cos() * 0.1)
            .collect();
        let halves: Vec<_> = w.iter().map(|w| bf16::from_f32(*w)).collect();
        for n in [1, 5, PASS + 1, n] {
            check(&x[..n * inner], &w, &vec![0.5; outer], inner);
            check(&x[..n * inner], &halves, &vec![0.5; outer], inner);
        }
    }

    #[test]
    fn nan_and_infinity_pass_through() {
        let x = [1.0, f32::INFINITY, 0.0];
        let w = [1.0f32, 1.0, 1.0, f32::NAN, 0.0, 0.0];
        for isa in Isa::available() {
            let out = product(isa, &x, &w, None, 3);
            assert_eq!(out[0], f32::INFINITY);
            assert!(out[1].is_nan());
        }
    }
}
