//! Grouped-query attention over the pages of a cache: tiles of keys, a running softmax
//! (arXiv:2205.14135), scores and sums in f32.
//!
//! The query heads that share keys are the rows of one product, so the cache is read once for all of
//! them.

// By its path, because the kernels' own crate (scripts/sanitize) takes this file by path as well.
#[path = "attention/tiles.rs"]
mod tiles;

use std::cell::Cell;
use std::mem::MaybeUninit;

use super::super::visible::{Distance, Visible};
use super::layout::{BLOCK, Dims, Layout};
use super::pool;
use super::simd::{Isa, Simd, exp, per_isa};
use crate::ops::PAGE;
use crate::ops::codes::GROUP;

/// Rows of one register tile: the query heads of a group, of one token or more.
const ROWS: usize = 8;
/// Keys of one tile: with their values they stay in the first two levels of cache. A tile lies in one
/// page.
const TILE: usize = 128;
const _: () = assert!(PAGE.is_multiple_of(TILE));
/// Tokens of one task.
const TOKENS: usize = 8;
/// Keys below which a second task over the same queries does not pay for the merge.
const MIN_KEYS: usize = 512;

/// One attention: `q` `[rotations, n, heads, head_dim]` over the pages, which are of one size.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a, L> {
    pub(crate) q: &'a [f32],
    pub(crate) pages: &'a [L],
    pub(crate) heads: usize,
    pub(crate) visible: Visible,
    /// Whether what is multiplied may be rounded to bf16.
    pub(crate) rounds: bool,
}

impl<L: Layout> Attention<'_, L> {
    /// Of each page.
    fn dims(&self) -> Dims {
        self.pages[0].dims()
    }

    /// Tokens.
    fn n(&self) -> usize {
        self.q.len() / self.visible.rotations() / (self.heads * self.dims().head_dim)
    }

    /// The page that holds a position, and the row of it there.
    fn place(&self, kv_head: usize, position: usize) -> (L, usize) {
        let capacity = self.dims().capacity;
        let page = self.pages[position / capacity];
        (page, kv_head * capacity + position % capacity)
    }
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
pub(crate) fn attention<L: Layout>(isa: Isa, args: Attention<'_, L>, out: &mut [MaybeUninit<f32>]) {
    let Attention {
        heads,
        pages,
        visible,
        ..
    } = args;
    let dims = args.dims();
    let Dims {
        kv_heads,
        capacity,
        head_dim,
    } = dims;
    let n = args.n();
    for page in pages {
        page.check();
        assert_eq!(page.dims(), dims, "pages of one size");
    }
    assert!(
        pages.len() == 1 || capacity.is_multiple_of(TILE),
        "tiles in pages"
    );
    assert_eq!(out.len(), n * heads * head_dim, "output length");
    assert_eq!(
        args.q.len(),
        visible.rotations() * out.len(),
        "query length"
    );
    assert_eq!(heads % kv_heads, 0, "heads of a group");
    assert!(
        visible.n_past + n <= pages.len() * capacity,
        "cache capacity"
    );
    let (first, end) = (visible.first(visible.n_past), visible.n_past + n);
    #[cfg(target_arch = "x86_64")]
    let by_tiles = tiles::takes(isa, args);
    #[cfg(not(target_arch = "x86_64"))]
    let by_tiles = false;
    let tokens = match by_tiles {
        #[cfg(target_arch = "x86_64")]
        true => tiles::TOKENS,
        _ => TOKENS,
    };
    let blocks = n.div_ceil(tokens);
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
    let whole = Out::Whole(out.as_mut_ptr().cast());
    let part = Out::Part(parts.as_mut_ptr());
    let task = |index: usize| {
        let (share, index) = (index % shares, index / shares);
        // The last blocks of a prompt have the most keys: first come, first done.
        let (block, kv_head) = (blocks - 1 - index / kv_heads, index % kv_heads);
        Task {
            kv_head,
            tokens: (block * tokens, ((block + 1) * tokens).min(n)),
            keys: (first + share * span, (first + (share + 1) * span).min(end)),
        }
    };
    let streams = |index| {
        let Task { kv_head, keys, .. } = task(index);
        let (page, row) = args.place(kv_head, keys.0);
        let n = (keys.1 - keys.0).min(capacity - keys.0 % capacity);
        page.streams(row..row + n)
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
        match by_tiles {
            #[cfg(target_arch = "x86_64")]
            true => tiles::run(args, task, target),
            _ => run(isa, args, task, target),
        }
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
fn merge(parts: &[f32], head_dim: usize, out: &mut [MaybeUninit<f32>]) {
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
        out.fill(MaybeUninit::new(0.0));
        // SAFETY: all of it was just written.
        let out = unsafe { out.assume_init_mut() };
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

/// The rows of a task: the query heads that share keys, token by token.
#[derive(Clone, Copy)]
struct Rows<'a, L> {
    args: Attention<'a, L>,
    task: Task,
    /// Heads of a token.
    group: usize,
}

impl<'a, L: Layout> Rows<'a, L> {
    fn new(args: Attention<'a, L>, task: Task) -> Self {
        let group = args.heads / args.dims().kv_heads;
        Self { args, task, group }
    }

    fn len(&self) -> usize {
        (self.task.tokens.1 - self.task.tokens.0) * self.group
    }

    /// The head that a row is, of all heads of all tokens.
    fn at(&self, row: usize) -> usize {
        let token = self.task.tokens.0 + row / self.group;
        token * self.args.heads + self.task.kv_head * self.group + row % self.group
    }

    fn position(&self, row: usize) -> usize {
        self.args.visible.n_past + self.task.tokens.0 + row / self.group
    }

    /// The query of a row in one of its rotations, by `1 / √head_dim` and in the basis of the keys; `out` is
    /// as wide as those.
    fn query(&self, row: usize, rotation: usize, out: &mut [f32]) {
        let Attention { q, heads, .. } = self.args;
        let head_dim = self.args.dims().head_dim;
        let first = rotation * self.args.n() * heads + self.at(row);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let (scaled, padding) = out.split_at_mut(head_dim);
        for (scaled, q) in scaled.iter_mut().zip(&q[first * head_dim..]) {
            *scaled = q * scale;
        }
        padding.fill(0.0);
        L::turn(out);
    }

    /// Brings home what the task found: `sums` `[rows, width]`.
    ///
    /// # Safety
    /// The task is one of [`attention`]'s, `out` the buffer that it gave it.
    #[inline(always)]
    unsafe fn write(&self, sums: &[f32], maxima: &[f32], totals: &[f32], out: Out) {
        let (d, head_dim) = (self.args.pages[0].width(), self.args.dims().head_dim);
        for row in 0..self.len() {
            let sums = &sums[row * d..][..head_dim];
            // SAFETY: the caller's promise: the row is this task's own.
            unsafe {
                match out {
                    Out::Whole(out) => {
                        let scale = 1.0 / totals[row];
                        for (k, sum) in sums.iter().enumerate() {
                            *out.add(self.at(row) * head_dim + k) = sum * scale;
                        }
                    }
                    Out::Part(out) => {
                        let out = out.add(self.at(row) * (head_dim + 2));
                        *out = maxima[row];
                        *out.add(1) = totals[row];
                        for (k, sum) in sums.iter().enumerate() {
                            *out.add(2 + k) = *sum;
                        }
                    }
                }
            }
        }
    }
}

thread_local! {
    /// The buffers of a task, kept for the next one.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

per_isa!(run, run_kernel<L: Layout>, (args: Attention<'_, L>, task: Task, out: Out));

/// # Safety
/// The instruction set of `S` is present; the lengths are those that [`attention`] checked.
#[inline(always)]
unsafe fn run_kernel<S: Simd, L: Layout>(args: Attention<'_, L>, task: Task, out: Out) {
    let (of_task, visible) = (Rows::new(args, task), args.visible);
    let (d, rows) = (args.pages[0].width(), of_task.len());
    let padded = rows.next_multiple_of(ROWS);
    let position = |row: usize| of_task.position(row);
    let rotations = visible.rotations();
    let mut scratch = SCRATCH.take();
    scratch.clear();
    scratch.resize(
        (rotations + 1) * padded * d + 2 * padded + ROWS * (TILE + d),
        0.0,
    );
    let (queries, rest) = scratch.split_at_mut(rotations * padded * d);
    let (sums, rest) = rest.split_at_mut(padded * d);
    let (maxima, rest) = rest.split_at_mut(padded);
    let (totals, rest) = rest.split_at_mut(padded);
    let (scores, mixed) = rest.split_at_mut(ROWS * TILE);
    maxima.fill(f32::NEG_INFINITY);
    // Queries in the order [rotations][rows / 8][d][8], which a tile of eight rows broadcasts from.
    for (rotation, queries) in queries.chunks_exact_mut(padded * d).enumerate() {
        for row in 0..rows {
            let query = &mut mixed[..d];
            of_task.query(row, rotation, query);
            let tile = &mut queries[row / ROWS * ROWS * d..][..ROWS * d];
            for (k, q) in query.iter().enumerate() {
                tile[k * ROWS + row % ROWS] = *q;
            }
        }
    }
    let mut tile = task.keys.0;
    while tile < task.keys.1 {
        // A tile ends where a chunk does, so that all its keys are as far from a query.
        let chunk_end = visible
            .chunk
            .map_or(usize::MAX, |chunk| (tile / chunk + 1) * chunk);
        let tile_end = ((tile / TILE + 1) * TILE).min(chunk_end).min(task.keys.1);
        for first in (0..padded).step_by(ROWS) {
            let seen: [(usize, usize); ROWS] = std::array::from_fn(|r| {
                if first + r >= rows {
                    return (tile, tile);
                }
                let position = position(first + r);
                let from = visible.first(position).max(tile);
                let to = (position + 1).min(tile_end);
                (from, to.max(from))
            });
            let some = seen.iter().filter(|(from, to)| from < to);
            let from = some
                .clone()
                .fold(usize::MAX, |least, (from, _)| least.min(*from));
            let to = some.fold(0, |most, (_, to)| most.max(*to));
            if from >= to {
                continue;
            }
            let rotation = |row: usize| match position(row.min(rows - 1)) {
                position if position < tile => Distance::Intra, // sees nothing here
                position => visible.distance(position, tile),
            };
            let rotated = |rotation: Distance| &queries[rotation as usize * padded * d..];
            let last = rotation(first + ROWS - 1);
            let q = if visible.chunk.is_none() || rotation(first) == last {
                &rotated(last)[first * d..][..ROWS * d]
            } else {
                // The tokens of these rows are of two chunks.
                for r in 0..ROWS {
                    let source = &rotated(rotation(first + r))[first * d..][..ROWS * d];
                    for k in 0..d {
                        mixed[k * ROWS + r] = source[k * ROWS + r];
                    }
                }
                &*mixed
            };
            // The groups of the published models have 6, 7 and 8 heads.
            let used = (rows - first).min(ROWS);
            // Whole blocks are scored; what a row does not see is struck out.
            let (low, high) = (from / BLOCK * BLOCK, to.next_multiple_of(BLOCK));
            let (cache, row_of_low) = args.place(task.kv_head, low);
            let mut factors = [1.0; ROWS];
            // SAFETY: `high <= capacity`, which is in blocks; the buffers have the lengths above.
            unsafe {
                let (q, out) = (q.as_ptr(), scores.as_mut_ptr());
                match used {
                    ..=6 => score::<S, L, 6>(q, cache, row_of_low, high - low, out),
                    7 => score::<S, L, 7>(q, cache, row_of_low, high - low, out),
                    _ => score::<S, L, ROWS>(q, cache, row_of_low, high - low, out),
                }
                for (r, (from, to)) in seen.into_iter().enumerate().take(used) {
                    let scores = &mut scores[r * TILE..][..high - low];
                    if from == to {
                        scores.fill(0.0);
                        continue;
                    }
                    scores[..from - low].fill(f32::NEG_INFINITY);
                    scores[to - low..].fill(f32::NEG_INFINITY);
                    let row = first + r;
                    factors[r] = soften::<S>(scores, &mut maxima[row], &mut totals[row]);
                }
                let weights = scores.as_ptr().add(from - low);
                let sums = sums.as_mut_ptr().add(first * d);
                let (row, n) = (row_of_low + from - low, to - from);
                match used {
                    ..=6 => weigh::<S, L, 6>(weights, cache, row, n, &factors, sums),
                    7 => weigh::<S, L, 7>(weights, cache, row, n, &factors, sums),
                    _ => weigh::<S, L, ROWS>(weights, cache, row, n, &factors, sums),
                }
            }
        }
        tile = tile_end;
    }
    // SAFETY: the rows are this task's own, in a buffer of the length that `attention` gave it.
    unsafe { of_task.write(sums, maxima, totals, out) };
    SCRATCH.set(scratch);
}

/// Scores of `R` of eight rows against the `n` keys (whole blocks) from `row` on into `out`, `[8][TILE]`.
///
/// # Safety
/// The instruction set of `S` is present; `q` is `[width][8]`, the cache has those keys.
#[inline(always)]
unsafe fn score<S: Simd, L: Layout, const R: usize>(
    q: *const f32,
    cache: L,
    row: usize,
    n: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's promise; a step takes whole vectors of keys that are there.
    unsafe {
        let mut at = 0;
        // Two vectors of keys share a broadcast where the registers suffice.
        while S::LANES == BLOCK && at + 2 * BLOCK <= n {
            score_step::<S, L, R, 2>(q, cache, row + at, out.add(at));
            at += 2 * BLOCK;
        }
        while at < n {
            score_step::<S, L, R, 1>(q, cache, row + at, out.add(at));
            at += S::LANES;
        }
    }
}

/// `R` rows against `V` vectors of keys.
///
/// # Safety
/// As [`score`].
#[inline(always)]
unsafe fn score_step<S: Simd, L: Layout, const R: usize, const V: usize>(
    q: *const f32,
    cache: L,
    row: usize,
    out: *mut f32,
) {
    let d = cache.width();
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[S::zero(); V]; R];
        let mut k = 0;
        while k < d {
            let mut scale = [S::zero(); V];
            let mut end = d;
            if L::SCALED {
                end = k + GROUP;
                for (v, scale) in scale.iter_mut().enumerate() {
                    *scale = cache.key_scale(row + v * BLOCK, k / GROUP);
                }
            }
            while k < end {
                // The line of two steps on: the keys come as fast as memory gives them.
                cache.prefetch_key::<S>(row, 2 * V * BLOCK * d + k * V * BLOCK);
                let mut key = [S::zero(); V];
                for (v, key) in key.iter_mut().enumerate() {
                    *key = cache.key(row + v * BLOCK, k);
                    if L::SCALED {
                        *key = key.mul(scale[v]);
                    }
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let q = S::splat(*q.add(k * ROWS + r));
                    for (acc, key) in acc.iter_mut().zip(key) {
                        *acc = key.mul_add(q, *acc);
                    }
                }
                k += 1;
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
///
/// # Safety
/// The instruction set of `S` is present.
#[inline(always)]
unsafe fn soften<S: Simd>(scores: &mut [f32], max: &mut f32, total: &mut f32) -> f32 {
    // SAFETY: a block holds whole vectors.
    unsafe {
        let mut most = S::splat(*max);
        for scores in scores.chunks_exact(S::LANES) {
            // A NaN is passed over here and comes out of the exponential.
            most = S::load(scores.as_ptr()).max(most);
        }
        let new = most.largest();
        let factor = exp(*max - new);
        let (mut sum, low) = (S::zero(), S::splat(-new));
        for scores in scores.chunks_exact_mut(S::LANES) {
            let weight = S::load(scores.as_ptr()).add(low).exp();
            weight.store(scores.as_mut_ptr());
            sum = sum.add(weight);
        }
        *max = new;
        *total = *total * factor + sum.sum();
        factor
    }
}

/// `sums[r] = sums[r] · factors[r] + Σ weights[r][j] · values[j]` for `R` of eight rows and the `n` values from `row` on.
///
/// # Safety
/// The instruction set of `S` is present; `weights` is `[8][TILE]`, `sums` `[8][width]`, the cache
/// has those values.
#[inline(always)]
unsafe fn weigh<S: Simd, L: Layout, const R: usize>(
    weights: *const f32,
    cache: L,
    row: usize,
    n: usize,
    factors: &[f32; ROWS],
    sums: *mut f32,
) {
    let d = cache.width();
    // SAFETY: the caller's promise; `k` stays below `d`.
    unsafe {
        let mut k = 0;
        while S::LANES == BLOCK && k + 2 * S::LANES <= d {
            weigh_step::<S, L, R, 2>(weights, cache, (row, k), n, factors, sums.add(k));
            k += 2 * S::LANES;
        }
        while k + S::LANES <= d {
            weigh_step::<S, L, R, 1>(weights, cache, (row, k), n, factors, sums.add(k));
            k += S::LANES;
        }
        for k in k..d {
            for (r, factor) in factors.iter().enumerate().take(R) {
                let mut sum = *sums.add(r * d + k) * factor;
                for j in 0..n {
                    sum += *weights.add(r * TILE + j) * cache.value_at(row + j, k);
                }
                *sums.add(r * d + k) = sum;
            }
        }
    }
}

/// `V` vectors of columns of [`weigh`]: those of a group at most, from column `k` on.
///
/// # Safety
/// As [`weigh`].
#[inline(always)]
unsafe fn weigh_step<S: Simd, L: Layout, const R: usize, const V: usize>(
    weights: *const f32,
    cache: L,
    (row, k): (usize, usize),
    n: usize,
    factors: &[f32; ROWS],
    sums: *mut f32,
) {
    let d = cache.width();
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[S::zero(); V]; R];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                let old = S::load(sums.add(r * d + v * S::LANES));
                *acc = old.mul_add(S::splat(factors[r]), S::zero());
            }
        }
        for j in 0..n {
            cache.prefetch_value::<S>(row + j, k);
            let mut value = [S::zero(); V];
            for (v, value) in value.iter_mut().enumerate() {
                *value = cache.value(row + j, k + v * S::LANES);
                if L::SCALED {
                    *value = value.mul(S::splat(cache.value_scale(row + j, k / GROUP)));
                }
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

// By its path as well.
#[cfg(test)]
#[path = "attention/tests.rs"]
mod tests;
