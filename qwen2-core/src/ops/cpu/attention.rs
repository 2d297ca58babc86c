//! Grouped-query attention over the cache, one query row at a time, scores in f32.

use super::super::Visible;
use super::matmul::dot;
use super::pool;
use super::simd::{Isa, Simd, Stored, exp, per_isa};

/// Queries of one head that one task handles.
const QUERIES: usize = 16;

/// One attention: `q` `[n, heads, head_dim]`, `keys` and `values` `[kv_heads, capacity, head_dim]`.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a, W> {
    pub(crate) q: &'a [f32],
    pub(crate) keys: &'a [W],
    pub(crate) values: &'a [W],
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) capacity: usize,
    pub(crate) visible: Visible,
}

#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: every task writes the rows of its own head and queries only.
unsafe impl Sync for Out {}

/// Computes `args` into `out`, `[n, heads · head_dim]`, on the threads of the current pool.
///
/// # Panics
/// If a length does not fit the shape.
pub(crate) fn attention<W: Stored>(isa: Isa, args: Attention<'_, W>, out: &mut [f32]) {
    let width = args.heads * args.head_dim;
    let n = args.q.len() / width;
    assert_eq!(args.q.len(), out.len(), "output length");
    assert_eq!(args.q.len(), n * width, "query length");
    assert_eq!(
        args.keys.len(),
        args.kv_heads * args.capacity * args.head_dim,
        "cache length"
    );
    assert_eq!(args.keys.len(), args.values.len(), "cache length");
    assert!(args.visible.n_past + n <= args.capacity, "cache capacity");
    let target = Out(out.as_mut_ptr());
    let blocks = n.div_ceil(QUERIES);
    pool::parallel(args.heads * blocks, &|task| {
        let (head, block) = (task / blocks, task % blocks);
        queries(
            isa,
            args,
            head,
            block * QUERIES,
            ((block + 1) * QUERIES).min(n),
            target,
        );
    });
}

per_isa!(queries, queries_kernel<W>, (
    args: Attention<'_, W>, head: usize, start: usize, end: usize, out: Out,
));

/// # Safety
/// The instruction set of `S` is present; the lengths are those that [`attention`] checked.
#[inline(always)]
unsafe fn queries_kernel<S: Simd, W: Stored>(
    args: Attention<'_, W>,
    head: usize,
    start: usize,
    end: usize,
    out: Out,
) {
    let d = args.head_dim;
    let kv_head = head / (args.heads / args.kv_heads);
    let cache = kv_head * args.capacity * d;
    let scale = 1.0 / (d as f32).sqrt();
    let mut scores = vec![0.0_f32; args.visible.n_past + end];
    for i in start..end {
        let position = args.visible.n_past + i;
        let first = args.visible.first(position);
        let scores = &mut scores[first..=position];
        let at = (i * args.heads + head) * d;
        // SAFETY: `position < capacity`, and the output row belongs to this task.
        unsafe {
            let q = args.q.as_ptr().add(at);
            for (j, score) in scores.iter_mut().enumerate() {
                let key = args.keys.as_ptr().add(cache + (first + j) * d);
                *score = dot::<S, W>(q, key, d) * scale;
            }
            softmax(scores);
            let values = args.values.as_ptr().add(cache + first * d);
            weighted_sum::<S, W>(scores, values, d, out.0.add(at));
        }
    }
}

/// Softmax in place, the maximum taken off first.
#[inline(always)]
fn softmax(scores: &mut [f32]) {
    let mut max = f32::NEG_INFINITY;
    for &score in scores.iter() {
        // `score > max` would lose a NaN, which must reach the output.
        max = if score > max || score.is_nan() {
            score
        } else {
            max
        };
    }
    let mut sums = [0.0_f32; 16];
    let mut chunks = scores.chunks_exact_mut(16);
    for chunk in &mut chunks {
        for (score, sum) in chunk.iter_mut().zip(&mut sums) {
            *score = exp(*score - max);
            *sum += *score;
        }
    }
    for score in chunks.into_remainder() {
        *score = exp(*score - max);
        sums[0] += *score;
    }
    let scale = 1.0 / sums.iter().sum::<f32>();
    for score in scores {
        *score *= scale;
    }
}

/// `out = Σ weights[j] · values[j]`, `values` `[len, d]`.
///
/// # Safety
/// The instruction set of `S` is present; `out` has `d` elements of this task's own.
#[inline(always)]
unsafe fn weighted_sum<S: Simd, W: Stored>(
    weights: &[f32],
    values: *const W,
    d: usize,
    out: *mut f32,
) {
    const UNROLL: usize = 4;
    // SAFETY: the caller's promise; `k` stays below `d`.
    unsafe {
        let mut k = 0;
        while k + UNROLL * S::LANES <= d {
            let mut sums = [S::zero(); UNROLL];
            for (j, weight) in weights.iter().enumerate() {
                let weight = S::splat(*weight);
                for (u, sum) in sums.iter_mut().enumerate() {
                    *sum = W::load::<S>(values.add(j * d + k + u * S::LANES)).mul_add(weight, *sum);
                }
            }
            for (u, sum) in sums.into_iter().enumerate() {
                sum.store(out.add(k + u * S::LANES));
            }
            k += UNROLL * S::LANES;
        }
        for k in k..d {
            let mut sum = 0.0;
            for (j, weight) in weights.iter().enumerate() {
                sum += *weight * (*values.add(j * d + k)).to_f32();
            }
            *out.add(k) = sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;

    /// The definition in f64.
    fn reference(args: Attention<'_, f32>) -> Vec<f32> {
        let (d, heads) = (args.head_dim, args.heads);
        let mut out = vec![0.0; args.q.len()];
        for (row, out) in out.chunks_mut(d).enumerate() {
            let (i, head) = (row / heads, row % heads);
            let kv = head / (heads / args.kv_heads) * args.capacity;
            let position = args.visible.n_past + i;
            let seen: Vec<usize> = (args.visible.first(position)..=position).collect();
            let dot = |j: usize| -> f64 {
                (0..d)
                    .map(|k| {
                        f64::from(args.q[row * d + k]) * f64::from(args.keys[(kv + j) * d + k])
                    })
                    .sum()
            };
            let weights: Vec<f64> = seen
                .iter()
                .map(|&j| (dot(j) / (d as f64).sqrt()).exp())
                .collect();
            let total: f64 = weights.iter().sum();
            for (k, out) in out.iter_mut().enumerate() {
                let sum: f64 = seen
                    .iter()
                    .zip(&weights)
                    .map(|(j, w)| w * f64::from(args.values[(kv + j) * d + k]))
                    .sum();
                *out = (sum / total) as f32;
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn attention_matches_the_definition_for_odd_shapes(
            n in 1usize..20, n_past in 0usize..30, kv_heads in 1usize..4, group in 1usize..8,
            half_dim in 1usize..70, window in proptest::option::of(1usize..12), spare in 0usize..3,
        ) {
            let (head_dim, heads, capacity) = (2 * half_dim, kv_heads * group, n_past + n + spare);
            let fill = |len: usize, f: f32| -> Vec<f32> { (0..len).map(|i| (i as f32 * f).sin()).collect() };
            let q = fill(n * heads * head_dim, 0.731);
            let keys = fill(kv_heads * capacity * head_dim, 0.377);
            let values = fill(kv_heads * capacity * head_dim, 0.913);
            let visible = Visible { n_past, window };
            let args = Attention { q: &q, keys: &keys, values: &values, heads, kv_heads, head_dim, capacity, visible };
            let want = reference(args);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; q.len()];
                attention(isa, args, &mut out);
                for (out, want) in out.iter().zip(&want) {
                    prop_assert!((out - want).abs() < 1e-5, "{isa:?}: {out} {want}");
                }
            }
            let round = |v: &[f32]| -> Vec<bf16> { v.iter().map(|v| bf16::from_f32(*v)).collect() };
            let (keys, values) = (round(&keys), round(&values));
            let wide = |v: &[bf16]| -> Vec<f32> { v.iter().map(|v| v.to_f32()).collect() };
            let (wide_keys, wide_values) = (wide(&keys), wide(&values));
            let want = reference(Attention { keys: &wide_keys, values: &wide_values, ..args });
            let args = Attention { q: &q, keys: &keys, values: &values, heads, kv_heads, head_dim, capacity, visible };
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; q.len()];
                attention(isa, args, &mut out);
                for (out, want) in out.iter().zip(&want) {
                    prop_assert!((out - want).abs() < 1e-5, "{isa:?}: {out} {want}");
                }
            }
        }
    }

    #[test]
    fn scores_beyond_the_f16_range_stay_finite() {
        let q = [400.0_f32; 8];
        let keys = [400.0_f32; 16];
        let values = [1.0_f32; 16];
        let visible = Visible {
            n_past: 1,
            window: None,
        };
        let args = Attention {
            q: &q,
            keys: &keys,
            values: &values,
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
            capacity: 2,
            visible,
        };
        let mut out = [0.0; 8];
        attention(Isa::selected(), args, &mut out);
        assert!(out.iter().all(|value| (value - 1.0).abs() < 1e-6));
    }
}
