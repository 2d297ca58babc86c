//! Grouped-query attention over the cache: tiles of keys, a running softmax (arXiv:2205.14135),
//! scores and sums in f32.
//!
//! The query heads that share keys are the rows of one product, so the cache is read once for all of
//! them. Keys lie in blocks of 16 positions, `[kv_heads, capacity / 16, head_dim, 16]`: a vector
//! holds one element of 16 keys, and no sum runs across a vector. Values lie position by position,
//! `[kv_heads, capacity, head_dim]`.

use std::cell::Cell;

use super::super::Visible;
use super::pool;
use super::simd::{Isa, Simd, Stored, exp, per_isa};

/// Positions of one block of keys; the capacity of a cache is a multiple of it.
pub(crate) const BLOCK: usize = 16;
/// Rows of one register tile: the query heads of a group, of one token or more.
const ROWS: usize = 8;
/// Keys of one tile: with their values they stay in the first two levels of cache.
const TILE: usize = 128;
/// Values that are asked for ahead of their use.
const AHEAD: usize = 64;
/// Tokens of one task.
const TOKENS: usize = 8;
/// Keys below which a second task over the same queries does not pay for the merge.
const MIN_KEYS: usize = 512;

/// One attention: `q` `[n, heads, head_dim]` over the cache.
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

/// The queries of some tokens against some of the keys.
#[derive(Clone, Copy)]
struct Task {
    kv_head: usize,
    tokens: (usize, usize),
    keys: (usize, usize),
}

/// Where the results of a task go.
#[derive(Clone, Copy)]
enum Out {
    /// `[n, heads, head_dim]`, divided by the sums.
    Whole(*mut f32),
    /// `[n, heads, head_dim + 2]`: the maximum, the sum of the exponentials, the weighted values.
    Part(*mut f32),
}
// SAFETY: every task writes the rows of its own heads and tokens, in a buffer of its own keys.
unsafe impl Sync for Out {}
// SAFETY: as above.
unsafe impl Send for Out {}

/// Computes `args` into `out`, `[n, heads · head_dim]`, on the threads of the current pool.
///
/// # Panics
/// If a length does not fit the shape.
pub(crate) fn attention<W: Stored>(isa: Isa, args: Attention<'_, W>, out: &mut [f32]) {
    let Attention {
        heads,
        kv_heads,
        head_dim,
        capacity,
        visible,
        ..
    } = args;
    let n = args.q.len() / (heads * head_dim);
    assert_eq!(args.q.len(), out.len(), "output length");
    assert_eq!(args.q.len(), n * heads * head_dim, "query length");
    assert_eq!(heads % kv_heads, 0, "heads of a group");
    assert_eq!(capacity % BLOCK, 0, "capacity in blocks");
    assert_eq!(
        args.keys.len(),
        kv_heads * capacity * head_dim,
        "cache length"
    );
    assert_eq!(args.keys.len(), args.values.len(), "cache length");
    assert!(visible.n_past + n <= capacity, "cache capacity");
    let (first, end) = (visible.first(visible.n_past), visible.n_past + n);
    let blocks = n.div_ceil(TOKENS);
    let shares = shares(end - first, kv_heads * blocks);
    let span = (end - first).div_ceil(shares).next_multiple_of(TILE);
    let shares = (end - first).div_ceil(span);
    let row = head_dim + 2;
    let mut parts = vec![
        0.0_f32;
        if shares > 1 {
            shares * n * heads * row
        } else {
            0
        }
    ];
    let whole = Out::Whole(out.as_mut_ptr());
    let part = Out::Part(parts.as_mut_ptr());
    let task = |index: usize| {
        let (share, index) = (index % shares, index / shares);
        // The last blocks of a prompt have the most keys: first come, first done.
        let (block, kv_head) = (blocks - 1 - index / kv_heads, index % kv_heads);
        Task {
            kv_head,
            tokens: (block * TOKENS, ((block + 1) * TOKENS).min(n)),
            keys: (first + share * span, (first + (share + 1) * span).min(end)),
        }
    };
    let streams = |index| {
        let Task { kv_head, keys, .. } = task(index);
        let start = (kv_head * capacity + keys.0) * head_dim;
        let end = (kv_head * capacity + keys.1) * head_dim;
        pool::streams(&args.keys[start..end], &args.values[start..end])
    };
    pool::parallel_streams(kv_heads * blocks * shares, &streams, &|index| {
        let (share, task) = (index % shares, task(index));
        let target = match part {
            Out::Part(parts) if shares > 1 => {
                // SAFETY: the buffer has `shares` parts of this size.
                Out::Part(unsafe { parts.add(share * n * heads * row) })
            }
            _ => whole,
        };
        run(isa, args, task, target);
    });
    if shares > 1 {
        merge(&parts, head_dim, out);
    }
}

/// Into how many stretches of keys a small number of tasks is cut, so that no thread idles.
fn shares(keys: usize, tasks: usize) -> usize {
    let threads = pool::current_threads();
    if threads == 1 || tasks >= 2 * threads {
        return 1;
    }
    keys.div_ceil(MIN_KEYS)
        .min((4 * threads).div_ceil(tasks))
        .max(1)
}

/// Adds up what the tasks found in their shares of the keys.
fn merge(parts: &[f32], head_dim: usize, out: &mut [f32]) {
    let row = head_dim + 2;
    let part = out.len() / head_dim * row;
    for (index, out) in out.chunks_exact_mut(head_dim).enumerate() {
        let rows = || {
            parts
                .chunks_exact(part)
                .map(|part| &part[index * row..][..row])
        };
        let max = rows().fold(
            f32::NEG_INFINITY,
            |max, row| if row[0] > max { row[0] } else { max },
        );
        let mut sum = 0.0;
        out.fill(0.0);
        for row in rows() {
            let weight = exp(row[0] - max);
            sum += row[1] * weight;
            for (out, value) in out.iter_mut().zip(&row[2..]) {
                *out += value * weight;
            }
        }
        for out in out {
            *out /= sum;
        }
    }
}

thread_local! {
    /// The buffers of a task, kept for the next one.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

per_isa!(run, run_kernel<W>, (args: Attention<'_, W>, task: Task, out: Out));

/// # Safety
/// The instruction set of `S` is present; the lengths are those that [`attention`] checked.
#[inline(always)]
unsafe fn run_kernel<S: Simd, W: Stored>(args: Attention<'_, W>, task: Task, out: Out) {
    let d = args.head_dim;
    let group = args.heads / args.kv_heads;
    let rows = (task.tokens.1 - task.tokens.0) * group;
    let padded = rows.next_multiple_of(ROWS);
    let at = |row: usize| {
        let (token, head) = (
            task.tokens.0 + row / group,
            task.kv_head * group + row % group,
        );
        token * args.heads + head
    };
    let mut scratch = SCRATCH.take();
    scratch.clear();
    scratch.resize(2 * padded * d + 2 * padded + ROWS * TILE, 0.0);
    let (queries, rest) = scratch.split_at_mut(padded * d);
    let (sums, rest) = rest.split_at_mut(padded * d);
    let (maxima, rest) = rest.split_at_mut(padded);
    let (totals, scores) = rest.split_at_mut(padded);
    maxima.fill(f32::NEG_INFINITY);
    // Queries in the order [rows / 8][d][8], which a tile of eight rows broadcasts from.
    let scale = 1.0 / (d as f32).sqrt();
    for row in 0..rows {
        let q = &args.q[at(row) * d..][..d];
        let tile = &mut queries[row / ROWS * ROWS * d..][..ROWS * d];
        for (k, q) in q.iter().enumerate() {
            tile[k * ROWS + row % ROWS] = q * scale;
        }
    }
    let base = task.kv_head * args.capacity * d;
    let mut tile = task.keys.0 / TILE * TILE;
    while tile < task.keys.1 {
        for first in (0..padded).step_by(ROWS) {
            let seen: [(usize, usize); ROWS] = std::array::from_fn(|r| {
                if first + r >= rows {
                    return (tile, tile);
                }
                let position = args.visible.n_past + task.tokens.0 + (first + r) / group;
                let from = args.visible.first(position).max(task.keys.0).max(tile);
                let to = (position + 1).min(task.keys.1).min(tile + TILE);
                (from, to.max(from))
            });
            let visible = seen.iter().filter(|(from, to)| from < to);
            let from = visible
                .clone()
                .fold(usize::MAX, |least, (from, _)| least.min(*from));
            let to = visible.fold(0, |most, (_, to)| most.max(*to));
            if from >= to {
                continue;
            }
            // Whole blocks are scored; what a row does not see is struck out.
            let (low, high) = (from / BLOCK * BLOCK, to.next_multiple_of(BLOCK));
            let mut factors = [1.0; ROWS];
            // SAFETY: `high <= capacity`, which is in blocks; the buffers have the lengths above.
            unsafe {
                let keys = args.keys.as_ptr().add(base + low * d);
                let q = queries.as_ptr().add(first * d);
                score::<S, W>(q, keys, d, high - low, scores.as_mut_ptr());
                for (r, (from, to)) in seen.into_iter().enumerate() {
                    let scores = &mut scores[r * TILE..][..high - low];
                    if from == to {
                        scores.fill(0.0);
                        continue;
                    }
                    scores[..from - low].fill(f32::NEG_INFINITY);
                    scores[to - low..].fill(f32::NEG_INFINITY);
                    let row = first + r;
                    factors[r] = soften(scores, &mut maxima[row], &mut totals[row]);
                }
                let values = args.values.as_ptr().add(base + from * d);
                let weights = scores.as_ptr().add(from - low);
                let sums = sums.as_mut_ptr().add(first * d);
                weigh::<S, W>(weights, values, d, to - from, &factors, sums);
            }
        }
        tile += TILE;
    }
    for row in 0..rows {
        let sums = &sums[row * d..][..d];
        // SAFETY: the row is this task's own, in a buffer of the length that `attention` gave it.
        unsafe {
            match out {
                Out::Whole(out) => {
                    let scale = 1.0 / totals[row];
                    for (k, sum) in sums.iter().enumerate() {
                        *out.add(at(row) * d + k) = sum * scale;
                    }
                }
                Out::Part(out) => {
                    let out = out.add(at(row) * (d + 2));
                    *out = maxima[row];
                    *out.add(1) = totals[row];
                    for (k, sum) in sums.iter().enumerate() {
                        *out.add(2 + k) = *sum;
                    }
                }
            }
        }
    }
    SCRATCH.set(scratch);
}

/// Scores of eight rows against `n` keys (whole blocks) into `out`, `[8][TILE]`.
///
/// # Safety
/// The instruction set of `S` is present; `q` is `[d][8]`, `keys` has `n / 16` blocks.
#[inline(always)]
unsafe fn score<S: Simd, W: Stored>(
    q: *const f32,
    keys: *const W,
    d: usize,
    n: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's promise; a step takes whole vectors of keys that are there.
    unsafe {
        let mut at = 0;
        // Two vectors of keys share a broadcast where the registers suffice.
        while S::LANES == BLOCK && at + 2 * BLOCK <= n {
            score_step::<S, W, 2>(q, keys.add(at * d), d, out.add(at));
            at += 2 * BLOCK;
        }
        while at < n {
            let start = keys.add(at / BLOCK * BLOCK * d + at % BLOCK);
            score_step::<S, W, 1>(q, start, d, out.add(at));
            at += S::LANES;
        }
    }
}

/// Eight rows against `V` vectors of keys.
///
/// # Safety
/// As [`score`].
#[inline(always)]
unsafe fn score_step<S: Simd, W: Stored, const V: usize>(
    q: *const f32,
    keys: *const W,
    d: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[S::zero(); V]; ROWS];
        for k in 0..d {
            // The line of two steps on: the keys come as fast as memory gives them.
            S::prefetch(keys.wrapping_add(2 * V * BLOCK * d + k * V * BLOCK));
            let mut key = [S::zero(); V];
            for (v, key) in key.iter_mut().enumerate() {
                *key = W::load::<S>(keys.add(v * BLOCK * d + k * BLOCK));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let q = S::splat(*q.add(k * ROWS + r));
                for (acc, key) in acc.iter_mut().zip(key) {
                    *acc = key.mul_add(q, *acc);
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (v, acc) in acc.into_iter().enumerate() {
                acc.store(out.add(r * TILE + v * S::LANES));
            }
        }
    }
}

/// Turns the scores of one row into weights against the new maximum; what the sums so far are to be
/// multiplied with. The length is a multiple of the block.
#[inline(always)]
fn soften(scores: &mut [f32], max: &mut f32, total: &mut f32) -> f32 {
    let mut most = [f32::NEG_INFINITY; BLOCK];
    for scores in scores.chunks_exact(BLOCK) {
        for (most, score) in most.iter_mut().zip(scores) {
            // A NaN is passed over here and comes out of the exponential.
            *most = if *score > *most { *score } else { *most };
        }
    }
    let new = most
        .into_iter()
        .fold(*max, |max, x| if x > max { x } else { max });
    let factor = exp(*max - new);
    let mut sums = [0.0_f32; BLOCK];
    for scores in scores.chunks_exact_mut(BLOCK) {
        for (score, sum) in scores.iter_mut().zip(&mut sums) {
            *score = exp(*score - new);
            *sum += *score;
        }
    }
    *max = new;
    *total = *total * factor + sums.iter().sum::<f32>();
    factor
}

/// `sums[r] = sums[r] · factors[r] + Σ weights[r][j] · values[j]`, `values` `[n, d]`.
///
/// # Safety
/// The instruction set of `S` is present; `weights` is `[8][TILE]`, `sums` `[8][d]`.
#[inline(always)]
unsafe fn weigh<S: Simd, W: Stored>(
    weights: *const f32,
    values: *const W,
    d: usize,
    n: usize,
    factors: &[f32; ROWS],
    sums: *mut f32,
) {
    // SAFETY: the caller's promise; `k` stays below `d`.
    unsafe {
        let mut k = 0;
        while S::LANES == BLOCK && k + 2 * S::LANES <= d {
            weigh_step::<S, W, 2>(weights, values.add(k), d, n, factors, sums.add(k));
            k += 2 * S::LANES;
        }
        while k + S::LANES <= d {
            weigh_step::<S, W, 1>(weights, values.add(k), d, n, factors, sums.add(k));
            k += S::LANES;
        }
        for k in k..d {
            for (r, factor) in factors.iter().enumerate() {
                let mut sum = *sums.add(r * d + k) * factor;
                for j in 0..n {
                    sum += *weights.add(r * TILE + j) * (*values.add(j * d + k)).to_f32();
                }
                *sums.add(r * d + k) = sum;
            }
        }
    }
}

/// `V` vectors of columns of [`weigh`].
///
/// # Safety
/// As [`weigh`].
#[inline(always)]
unsafe fn weigh_step<S: Simd, W: Stored, const V: usize>(
    weights: *const f32,
    values: *const W,
    d: usize,
    n: usize,
    factors: &[f32; ROWS],
    sums: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[S::zero(); V]; ROWS];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                let old = S::load(sums.add(r * d + v * S::LANES));
                *acc = old.mul_add(S::splat(factors[r]), S::zero());
            }
        }
        for j in 0..n {
            S::prefetch(values.wrapping_add((j + AHEAD) * d));
            let mut value = [S::zero(); V];
            for (v, value) in value.iter_mut().enumerate() {
                *value = W::load::<S>(values.add(j * d + v * S::LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(r * TILE + j));
                for (acc, value) in acc.iter_mut().zip(value) {
                    *acc = value.mul_add(weight, *acc);
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (v, acc) in acc.into_iter().enumerate() {
                acc.store(sums.add(r * d + v * S::LANES));
            }
        }
    }
}

/// Where new positions go, and how the cache lies.
#[derive(Clone, Copy)]
pub(crate) struct Append {
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) capacity: usize,
    /// The first of the new positions.
    pub(crate) start: usize,
}

impl Append {
    /// Writes the key of head `kv_head` at `start + i`.
    ///
    /// # Panics
    /// If the position is outside the cache.
    #[inline(always)]
    pub(crate) fn key<W: Stored>(self, cache: &mut [W], i: usize, kv_head: usize, key: &[f32]) {
        let position = self.start + i;
        let block = (kv_head * self.capacity + position / BLOCK * BLOCK) * self.head_dim;
        let lanes = &mut cache[block..][..BLOCK * self.head_dim];
        for (lanes, key) in lanes.chunks_exact_mut(BLOCK).zip(key) {
            lanes[position % BLOCK] = W::from_f32(*key);
        }
    }

    /// Writes the value of head `kv_head` at `start + i`.
    ///
    /// # Panics
    /// If the position is outside the cache.
    #[inline(always)]
    pub(crate) fn value<W: Stored>(self, cache: &mut [W], i: usize, kv_head: usize, value: &[f32]) {
        let at = (kv_head * self.capacity + self.start + i) * self.head_dim;
        for (out, value) in cache[at..][..self.head_dim].iter_mut().zip(value) {
            *out = W::from_f32(*value);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;

    /// One attention in plain order: keys and values `[kv_heads, n_past + n, head_dim]`.
    struct Case {
        q: Vec<f32>,
        keys: Vec<f32>,
        values: Vec<f32>,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        visible: Visible,
    }

    impl Case {
        fn new(n: usize, visible: Visible, (kv_heads, group): (usize, usize), d: usize) -> Self {
            let wave = |len: usize, f: f32| (0..len).map(|i| (i as f32 * f).sin()).collect();
            let len = kv_heads * (visible.n_past + n) * d;
            Self {
                q: wave(n * kv_heads * group * d, 0.731),
                keys: wave(len, 0.377),
                values: wave(len, 0.913),
                heads: kv_heads * group,
                kv_heads,
                head_dim: d,
                visible,
            }
        }

        fn length(&self) -> usize {
            self.keys.len() / self.kv_heads / self.head_dim
        }

        /// The definition in f64, over the cache as `W` rounds it.
        fn reference<W: Stored>(&self) -> Vec<f32> {
            let (d, heads, length) = (self.head_dim, self.heads, self.length());
            let round = |x: f32| f64::from(W::from_f32(x).to_f32());
            let mut out = vec![0.0; self.q.len()];
            for (row, out) in out.chunks_mut(d).enumerate() {
                let (i, head) = (row / heads, row % heads);
                let kv = head / (heads / self.kv_heads) * length;
                let position = self.visible.n_past + i;
                let seen: Vec<usize> = (self.visible.first(position)..=position).collect();
                let dot = |j: usize| -> f64 {
                    let keys = &self.keys[(kv + j) * d..][..d];
                    let products = self.q[row * d..][..d].iter().zip(keys);
                    products.map(|(q, k)| f64::from(*q) * round(*k)).sum()
                };
                let weights: Vec<f64> = seen
                    .iter()
                    .map(|&j| (dot(j) / (d as f64).sqrt()).exp())
                    .collect();
                let total: f64 = weights.iter().sum();
                for (k, out) in out.iter_mut().enumerate() {
                    let weighted = seen.iter().zip(&weights);
                    let sum: f64 = weighted
                        .map(|(j, w)| w * round(self.values[(kv + j) * d + k]))
                        .sum();
                    *out = (sum / total) as f32;
                }
            }
            out
        }

        /// The kernel's result, in a cache with `spare` blocks; what is not written is NaN.
        fn run<W: Stored>(&self, isa: Isa, spare: usize) -> Vec<f32> {
            let (d, length) = (self.head_dim, self.length());
            let capacity = (length.div_ceil(BLOCK) + spare) * BLOCK;
            let unwritten = W::from_f32(f32::NAN);
            let mut keys = vec![unwritten; self.kv_heads * capacity * d];
            let mut values = keys.clone();
            let append = Append {
                kv_heads: self.kv_heads,
                head_dim: d,
                capacity,
                start: 0,
            };
            for row in 0..self.kv_heads * length {
                let (head, position) = (row / length, row % length);
                append.key(&mut keys, position, head, &self.keys[row * d..][..d]);
                append.value(&mut values, position, head, &self.values[row * d..][..d]);
            }
            let args = Attention {
                q: &self.q,
                keys: &keys,
                values: &values,
                heads: self.heads,
                kv_heads: self.kv_heads,
                head_dim: d,
                capacity,
                visible: self.visible,
            };
            let mut out = vec![f32::NAN; self.q.len()];
            attention(isa, args, &mut out);
            out
        }

        fn check<W: Stored>(&self, spare: usize) {
            let want = self.reference::<W>();
            for isa in Isa::available() {
                for (out, want) in self.run::<W>(isa, spare).iter().zip(&want) {
                    assert!((out - want).abs() < 1e-5, "{isa:?}: {out} {want}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn attention_matches_the_definition_for_odd_shapes(
            n in 1usize..20, n_past in 0usize..300, kv_heads in 1usize..4, group in 1usize..10,
            half_dim in 1usize..70, window in proptest::option::of(1usize..160), spare in 0usize..3,
        ) {
            let visible = Visible { n_past, window };
            let case = Case::new(n, visible, (kv_heads, group), 2 * half_dim);
            case.check::<f32>(spare);
            case.check::<bf16>(spare);
            case.check::<f16>(spare);
        }
    }

    #[test]
    fn shares_of_the_keys_add_up() {
        let pool = std::sync::Arc::new(pool::Pool::new(3).expect("threads start"));
        pool::with_pool(&pool, || {
            for (n, n_past, window) in [(1, 4099, None), (1, 4099, Some(3000)), (3, 2000, None)] {
                assert!(shares(n_past, 2) > 1);
                Case::new(n, Visible { n_past, window }, (2, 7), 64).check::<f16>(1);
            }
        });
    }

    #[test]
    fn scores_beyond_the_f16_range_stay_finite() {
        let mut case = Case::new(
            1,
            Visible {
                n_past: 1,
                window: None,
            },
            (1, 1),
            8,
        );
        case.q.fill(400.0);
        case.keys.fill(400.0);
        case.values.fill(1.0);
        for isa in Isa::available() {
            assert!(
                case.run::<f32>(isa, 0)
                    .iter()
                    .all(|out| (out - 1.0).abs() < 1e-6)
            );
        }
    }

    #[test]
    fn a_nan_reaches_the_output_of_its_row() {
        let mut case = Case::new(
            2,
            Visible {
                n_past: 3,
                window: None,
            },
            (1, 2),
            16,
        );
        case.q[16] = f32::NAN; // the second head of the first token
        for isa in Isa::available() {
            let out = case.run::<f32>(isa, 0);
            assert!(out[16..32].iter().all(|out| out.is_nan()), "{isa:?}");
            assert!(
                out[..16]
                    .iter()
                    .chain(&out[32..])
                    .all(|out| out.is_finite()),
                "{isa:?}"
            );
        }
    }
}
