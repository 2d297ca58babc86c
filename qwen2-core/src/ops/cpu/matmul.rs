//! `x Wᵀ + b` over weights in their stored precision, read once per panel of tokens.

use super::pool;
use super::simd::{Isa, Simd, Stored, per_isa};

/// Weight rows and tokens of one register tile.
const TILE: usize = 4;
/// Tokens that share one pass over the weights; their activations stay in the second-level cache.
const PANEL: usize = 64;
/// Widest stretch of the inner dimension that a tile sums at once.
const DEPTH: usize = 2048;

/// One multiplication: `x` `[n, inner]`, `weight` `[outer, inner]`, `out` `[n, outer]`.
#[derive(Clone, Copy)]
pub(crate) struct Linear<'a, W> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [W],
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) inner: usize,
    pub(crate) outer: usize,
}

/// The output, which tasks write in disjoint columns.
#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: every task writes its own range of columns only.
unsafe impl Sync for Out {}

impl Out {
    /// # Safety
    /// `index` is inside the output and no other task writes it.
    unsafe fn write(self, index: usize, value: f32) {
        // SAFETY: the caller's promise.
        unsafe { *self.0.add(index) = value };
    }
    /// # Safety
    /// As [`Out::write`], and the element was written before.
    unsafe fn add(self, index: usize, value: f32) {
        // SAFETY: the caller's promise.
        unsafe { *self.0.add(index) += value };
    }
}

/// Computes `args` into `out`, `[n, outer]`, on the threads of the current pool.
///
/// # Panics
/// If a length does not fit the shape.
pub(crate) fn linear<W: Stored>(isa: Isa, args: Linear<'_, W>, out: &mut [f32]) {
    let Linear { inner, outer, .. } = args;
    assert_eq!(args.weight.len(), inner * outer, "weight length");
    assert!(
        args.bias.is_none_or(|bias| bias.len() == outer),
        "bias length"
    );
    assert_eq!(args.x.len() * outer, out.len() * inner, "activation length");
    let rows_per_task = rows_per_task(outer, pool::current_threads());
    let target = Out(out.as_mut_ptr());
    pool::parallel(outer.div_ceil(rows_per_task), &|task| {
        let rows = task * rows_per_task..((task + 1) * rows_per_task).min(outer);
        rows_of(isa, args, rows.start, rows.end, target);
    });
}

/// A few tasks per thread, so that a thread that is held up takes fewer; whole tiles each.
fn rows_per_task(outer: usize, threads: usize) -> usize {
    if threads == 1 {
        return outer.max(1);
    }
    outer.div_ceil(threads * 4).next_multiple_of(TILE).max(TILE)
}

per_isa!(rows_of, rows_kernel<W>, (args: Linear<'_, W>, start: usize, end: usize, out: Out));

/// # Safety
/// The instruction set of `S` is present; the lengths are those that [`linear`] checked.
#[inline(always)]
unsafe fn rows_kernel<S: Simd, W: Stored>(args: Linear<'_, W>, start: usize, end: usize, out: Out) {
    let n = args.x.len() / args.inner.max(1);
    // SAFETY: rows, tokens and depths below stay inside the checked lengths.
    unsafe {
        if n == 1 {
            for row in start..end {
                let w = args.weight.as_ptr().add(row * args.inner);
                let sum = dot::<S, W>(args.x.as_ptr(), w, args.inner);
                out.write(row, sum + args.bias.map_or(0.0, |bias| bias[row]));
            }
            return;
        }
        for first in (0..n).step_by(PANEL) {
            panel::<S, W>(args, (first, (first + PANEL).min(n)), (start, end), out);
        }
    }
}

/// # Safety
/// As [`rows_kernel`].
#[inline(always)]
unsafe fn panel<S: Simd, W: Stored>(
    args: Linear<'_, W>,
    tokens: (usize, usize),
    rows: (usize, usize),
    out: Out,
) {
    // SAFETY: the caller's promise; every index is below its end.
    unsafe {
        for t in tokens.0..tokens.1 {
            for row in rows.0..rows.1 {
                out.write(
                    t * args.outer + row,
                    args.bias.map_or(0.0, |bias| bias[row]),
                );
            }
        }
        for k in (0..args.inner).step_by(DEPTH) {
            let depth = DEPTH.min(args.inner - k);
            for row in (rows.0..rows.1).step_by(TILE) {
                for t in (tokens.0..tokens.1).step_by(TILE) {
                    let n_rows = TILE.min(rows.1 - row);
                    let n_tokens = TILE.min(tokens.1 - t);
                    let x = args.x.as_ptr().add(t * args.inner + k);
                    let w = args.weight.as_ptr().add(row * args.inner + k);
                    let sums = if n_rows == TILE && n_tokens == TILE {
                        tile::<S, W>(x, w, args.inner, depth)
                    } else {
                        edge::<S, W>(x, w, args.inner, depth, n_tokens, n_rows)
                    };
                    for (i, sums) in sums.iter().enumerate().take(n_tokens) {
                        for (j, sum) in sums.iter().enumerate().take(n_rows) {
                            out.add((t + i) * args.outer + row + j, *sum);
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
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[S::zero(); TILE]; TILE];
        let whole = depth / S::LANES * S::LANES;
        let mut k = 0;
        while k < whole {
            let mut rows = [S::zero(); TILE];
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
        let mut out = [[0.0; TILE]; TILE];
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

    fn check<W: Stored>(x: &[f32], w: &[W], bias: &[f32], inner: usize) {
        let stored: Vec<f32> = w.iter().map(|w| w.to_f32()).collect();
        let want = reference(x, &stored, bias, inner);
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; want.len()];
            let args = Linear {
                x,
                weight: w,
                bias: Some(bias),
                inner,
                outer: bias.len(),
            };
            linear(isa, args, &mut out);
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
            n in 1usize..11, inner in 1usize..200, outer in 1usize..23, seed in any::<u64>(),
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
        let (n, inner, outer) = (PANEL + 5, DEPTH + 37, 6);
        let x: Vec<f32> = (0..n * inner)
            .map(|i| (i as f32 * 0.37).sin() * 0.1)
            .collect();
        let w: Vec<f32> = (0..outer * inner)
            .map(|i| (i as f32 * 0.11).cos() * 0.1)
            .collect();
        check(&x, &w, &vec![0.5; outer], inner);
    }

    #[test]
    fn nan_and_infinity_pass_through() {
        let x = [1.0, f32::INFINITY, 0.0];
        let w = [1.0f32, 1.0, 1.0, f32::NAN, 0.0, 0.0];
        for isa in Isa::available() {
            let mut out = [0.0; 2];
            linear(
                isa,
                Linear {
                    x: &x,
                    weight: &w,
                    bias: None,
                    inner: 3,
                    outer: 2,
                },
                &mut out,
            );
            assert_eq!(out[0], f32::INFINITY);
            assert!(out[1].is_nan());
        }
    }
}
