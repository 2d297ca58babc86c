//! Attention of many tokens by AMX: queries, keys, weights and values are rounded to bf16, scores, softmax
//! and sums are f32.
#![cfg(target_arch = "x86_64")]

use std::cell::Cell;
use std::ops::Range;

use super::super::amx;
use super::super::bf16_gemm::round_block;
use super::super::interleave::{self, ROWS as PANEL, pairs};
use super::super::lines::{self, Line, WORDS, flat};
use super::super::simd::{Avx512, Isa, Simd};
use super::{Attention, BLOCK, Layout, Out, Rows, TILE, Task, soften};
use crate::ops::codes::GROUP;

/// Tokens of one task: what is made of its keys and values serves all of them.
pub(super) const TOKENS: usize = 32;
/// Columns of a block of queries or weights.
const COLUMNS: usize = interleave::BLOCK;
const _: () = assert!(TILE.is_multiple_of(PANEL) && PANEL == COLUMNS && BLOCK == WORDS);

/// Whether these are the products of `args`: where they may round, and the same queries meet all keys.
pub(super) fn takes<L: Layout>(isa: Isa, args: Attention<'_, L>) -> bool {
    args.rounds
        && isa == Isa::Amx
        && args.n() >= TOKENS
        && args.visible.chunk.is_none()
        && args.pages[0].width().is_multiple_of(COLUMNS)
}

/// The buffers of a task, kept for the next one.
#[derive(Default)]
struct Scratch {
    /// `[width / 32][rows]`.
    queries: Vec<Line<u32>>,
    /// `[keys / 32][width / 2][32 keys]`, pairs of elements.
    keys: Vec<Line<u32>>,
    /// `[width / 32][keys / 2][32 elements]`, pairs of keys.
    values: Vec<Line<u32>>,
    /// `[keys / 32][rows]`.
    weights: Vec<Line<u32>>,
    /// `[rows, keys]`.
    scores: Vec<Line<f32>>,
    /// `[rows, width]`.
    sums: Vec<Line<f32>>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// As [`super::run`].
///
/// # Panics
/// If there is no AMX.
pub(super) fn run<L: Layout>(args: Attention<'_, L>, task: Task, out: Out) {
    assert!(amx::is_present(), "AMX");
    // SAFETY: the dispatch comes here with all of them; `attention` checked the lengths.
    unsafe { run_task(args, task, out) };
}

/// # Safety
/// The instructions are present; the lengths are those that `attention` checked.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn run_task<L: Layout>(args: Attention<'_, L>, task: Task, out: Out) {
    let (rows, visible) = (Rows::new(args, task), args.visible);
    let (n, width) = (rows.len(), args.pages[0].width());
    let mut scratch = SCRATCH.take();
    let (mut maxima, mut totals) = (vec![f32::NEG_INFINITY; n], vec![0.0; n]);
    let queries = lines::whole(&mut scratch.queries, width / COLUMNS * n);
    let mut query = vec![0.0; width];
    for row in 0..n {
        rows.query(row, 0, &mut query);
        for (block, query) in query.as_chunks::<COLUMNS>().0.iter().enumerate() {
            queries[block * n + row] = round_block(query);
        }
    }
    let sums = lines::room(&mut scratch.sums, n * width);
    sums.fill(0.0);
    let last = rows.position(n - 1);
    let mut tile = task.keys.0;
    while tile < task.keys.1.min(last + 1) {
        let (start, end) = (tile, ((tile / TILE + 1) * TILE).min(task.keys.1));
        tile = end;
        if visible.first(rows.position(0)) >= end {
            continue;
        }
        let low = start / BLOCK * BLOCK;
        let n_keys = (end - low).next_multiple_of(PANEL);
        let keys = lines::whole(&mut scratch.keys, n_keys * width / 2 / WORDS);
        let values = lines::whole(&mut scratch.values, n_keys * width / 2 / WORDS);
        let weights = lines::whole(&mut scratch.weights, n_keys / COLUMNS * n);
        let scores = lines::room(&mut scratch.scores, n * n_keys);
        let (cache, row) = args.place(task.kv_head, low);
        // SAFETY: whole blocks of keys are in the cache, and so are the values of these positions.
        unsafe {
            gather_keys(cache, row, (end - low).next_multiple_of(BLOCK), keys);
            gather_values(cache, row, start - low..end - low, values);
        }
        let product = amx::Bf16 {
            x: flat(queries),
            n,
            blocks: width / COLUMNS,
            weights: flat(keys),
            panels: n_keys / PANEL,
        };
        amx::multiply_bf16(&product, false, scores, &|_, _| ());
        for (r, scores) in scores.chunks_exact_mut(n_keys).enumerate() {
            let position = rows.position(r);
            let from = visible.first(position).max(start);
            let to = (position + 1).min(end);
            if from >= to {
                scores.fill(0.0);
            } else {
                scores[..from - low].fill(f32::NEG_INFINITY);
                scores[to - low..].fill(f32::NEG_INFINITY);
                // SAFETY: the instructions are there.
                let factor = unsafe { soften::<Avx512>(scores, &mut maxima[r], &mut totals[r]) };
                let sums = &mut sums[r * width..][..width];
                sums.iter_mut().for_each(|sum| *sum *= factor);
            }
            for (block, scores) in scores.as_chunks::<COLUMNS>().0.iter().enumerate() {
                weights[block * n + r] = round_block(scores);
            }
        }
        let product = amx::Bf16 {
            x: flat(weights),
            n,
            blocks: n_keys / COLUMNS,
            weights: flat(values),
            panels: width / PANEL,
        };
        amx::multiply_bf16(&product, true, sums, &|_, _| ());
    }
    // SAFETY: the rows are this task's own, in a buffer of the length that `attention` gave it.
    unsafe { rows.write(sums, &maxima, &totals, out) };
    SCRATCH.set(scratch);
}

/// `n` keys, whole blocks, from `row` on, and zeros behind them.
///
/// # Safety
/// The instructions are present, and the cache has the keys.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn gather_keys<L: Layout>(cache: L, row: usize, n: usize, out: &mut [Line<u32>]) {
    let pairs_of_key = cache.width() / 2;
    for (panel, out) in out.chunks_exact_mut(2 * pairs_of_key).enumerate() {
        for half in 0..2 {
            let first = panel * PANEL + half * BLOCK;
            // SAFETY: the caller's promise.
            let key = |k: usize| unsafe {
                let key = cache.key::<Avx512>(row + first, k);
                match L::SCALED {
                    true => key.mul(cache.key_scale(row + first, k / GROUP)),
                    false => key,
                }
            };
            for pair in 0..pairs_of_key {
                out[2 * pair + half] = match first < n {
                    true => pairs(key(2 * pair).0, key(2 * pair + 1).0),
                    false => Line::default(),
                };
            }
        }
    }
}

/// The values of the positions `there`, counted from `row` on, and zeros before and behind them.
///
/// # Safety
/// The instructions are present, and the cache has the values.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn gather_values<L: Layout>(
    cache: L,
    row: usize,
    there: Range<usize>,
    out: &mut [Line<u32>],
) {
    let panel_lines = out.len() / (cache.width() / PANEL);
    for (panel, out) in out.chunks_exact_mut(panel_lines).enumerate() {
        for (pair, out) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            for (half, out) in out.iter_mut().enumerate() {
                let k = panel * PANEL + half * WORDS;
                // SAFETY: the caller's promise.
                let value = |position: usize| unsafe {
                    if !there.contains(&position) {
                        return Avx512::zero();
                    }
                    let value = cache.value::<Avx512>(row + position, k);
                    match L::SCALED {
                        true => {
                            let scale = cache.value_scale(row + position, k / GROUP);
                            value.mul(Avx512::splat(scale))
                        }
                        false => value,
                    }
                };
                *out = pairs(value(2 * pair).0, value(2 * pair + 1).0);
            }
        }
    }
}
