//! Attention of a prompt on matrix units: 64 queries of a head at once over tiles of the cache, scores and sums in
//! registers (arXiv:2307.08691).

use burn_cubecl::cubecl::client::Client;
use burn_cubecl::cubecl::cmma::{MatrixIdent, MmaDefinition};
use burn_cubecl::cubecl::ir::features::MmaConfig;
use burn_cubecl::cubecl::ir::{ElemType, FloatKind};
use burn_cubecl::cubecl::{self, prelude::*};

use super::attention::Span;

/// Units of a cube.
pub(super) const UNITS: usize = PLANES * PLANE;
/// Queries of a cube.
pub(super) const QUERIES: usize = PLANES * ROWS;
/// Positions of a tile.
const TILE: usize = 64;
const PLANES: usize = 4;
const PLANE: usize = 32;
/// Queries of a plane: the rows of what the matrix units multiply.
const ROWS: usize = 16;
/// Numbers that are read at once.
const EIGHT: usize = 8;
/// Less than any score.
const LEAST: f32 = -1.0e30;

type Two<F> = Vector<F, Const<2>>;
type Eight<F> = Vector<F, Const<EIGHT>>;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PromptPlan {
    /// Query heads of a key head.
    pub(super) group: usize,
    pub(super) head_dim: usize,
}

/// Whether the device multiplies 16 rows by 8 columns of such numbers with sums in f32, and gathers them from shared
/// memory by an instruction (NVIDIA from sm_80 on).
pub(super) fn takes(client: &Client, elem: ElemType, head_dim: usize) -> bool {
    let matmul = &client.properties().features.matmul;
    let config = MmaConfig {
        a_type: elem,
        b_type: elem,
        cd_type: ElemType::Float(FloatKind::F32),
        m: 16,
        n: 8,
        k: 16,
    };
    head_dim.is_multiple_of(32)
        && head_dim <= 128
        && matmul.mma.contains(&config)
        && matmul.ldmatrix.contains(&elem)
}

/// Cube (block of queries, head): `q` and `out` `[n, heads, head_dim]`, the caches
/// `[kv_heads, capacity, head_dim]`. Positions from `n_past + n` on are not read.
///
/// The registers of a unit, of row `r` = lane / 4 and column pair `c` = lane % 4, are those of PTX's `mma.m16n8k16`:
/// of the left matrix rows r and r + 8 at 2c and 2c + 8, of the right one the same of its columns, of the sums rows r
/// and r + 8 at 2c.
#[cube(launch_unchecked)]
pub(super) fn attend_prompt<F: Float>(
    q: &[Two<f32>],
    keys: &[Eight<F>],
    values: &[Eight<F>],
    out: &mut [Two<f32>],
    span: Span,
    n: u32,
    #[comptime] plan: PromptPlan,
    #[define(F)] _dtype: ElemType,
) {
    let def = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    let eights = comptime!(plan.head_dim / EIGHT);
    // One more, so that the eight rows of a small matrix lie in different banks.
    let stride = comptime!(plan.head_dim / EIGHT + 1);
    let twos = comptime!(plan.head_dim / 2);
    let unit = UNIT_POS as usize;
    let lane = unit % PLANE;
    let row = lane / 4;
    let pair = lane % 4;
    let heads = CUBE_COUNT_Y as usize;
    let head = CUBE_POS_Y as usize;
    let n = n as usize;
    let n_past = span.n_past as usize;
    let window = clamp_max(span.window as usize, n_past + n);
    // The last queries see most: their cubes begin first.
    let block = ((n - 1) / QUERIES - CUBE_POS_X as usize) * QUERIES;
    let mine = block + unit / PLANE * ROWS + row;
    let buffer = head / comptime!(plan.group) * span.capacity as usize;

    let mut queries = Sequence::<Array<Two<F>>>::new();
    #[unroll]
    for step in 0..comptime!(plan.head_dim / 16) {
        let mut part = Array::<Two<F>>::new(4usize);
        #[unroll]
        for i in 0..4 {
            let t = mine + comptime!(i % 2 * 8);
            let d = comptime!(step * 8 + i / 2 * 4) + pair;
            let mut two = Two::<f32>::new(0.0f32);
            if t < n {
                two = q[(t * heads + head) * twos + d] * Two::new(span.scale);
            }
            part[i] = Two::cast_from(two);
        }
        queries.push(part);
    }
    let mut totals = Sequence::<Array<Two<f32>>>::new();
    #[unroll]
    for _ in 0..comptime!(plan.head_dim / 8) {
        totals.push(zeros());
    }
    // Of rows `row` and `row + 8`.
    let mut greatest = Array::<f32>::new(2usize);
    let mut sums = Array::<f32>::new(2usize);
    #[unroll]
    for half in 0..2 {
        greatest[half] = LEAST.runtime();
        sums[half] = 0.0f32;
    }

    let mut key_tile =
        Shared::<[Eight<F>]>::new_slice(comptime!(TILE * (plan.head_dim / EIGHT + 1)));
    let mut value_tile =
        Shared::<[Eight<F>]>::new_slice(comptime!(TILE * (plan.head_dim / EIGHT + 1)));
    let end = n_past + clamp_max(block + QUERIES, n);
    let first_seen = n_past + block + 1 - clamp_max(window, n_past + block + 1);
    let mut tile = first_seen / TILE * TILE;
    while tile < end {
        #[unroll]
        for share in 0..comptime!(TILE * (plan.head_dim / EIGHT) / UNITS) {
            let i = comptime!(share * UNITS) + unit;
            let position = i / eights;
            let column = i % eights;
            let mut key = Eight::<F>::new(F::new(0.0));
            let mut value = Eight::<F>::new(F::new(0.0));
            if tile + position < end {
                let at = (buffer + tile + position) * eights + column;
                key = keys[at];
                value = values[at];
            }
            key_tile[position * stride + column] = key;
            value_tile[position * stride + column] = value;
        }
        sync_cube();

        // Scores of eight positions each.
        let mut scores = Sequence::<Array<Two<f32>>>::new();
        #[unroll]
        for eight in 0..comptime!(TILE / 8) {
            let mut score = zeros();
            #[unroll]
            for double in 0..comptime!(plan.head_dim / 32) {
                let at =
                    (comptime!(eight * 8) + lane % 8) * stride + comptime!(double * 4) + lane / 8;
                let parts = def.load_matrix::<Eight<F>, Const<2>>(
                    &key_tile[at..at + 1],
                    MatrixIdent::B,
                    4usize,
                    false,
                );
                #[unroll]
                for i in 0..2 {
                    let left = queries.index(comptime!(double * 2 + i));
                    multiply::<F>(left, &parts, comptime!(2 * i), &mut score);
                }
            }
            scores.push(score);
        }
        // Only the tiles at the ends of what a query sees have positions that it does not.
        let ends = tile + TILE > n_past + block + 1 || tile + window < end;
        if ends {
            #[unroll]
            for eight in 0..comptime!(TILE / 8) {
                let score = scores.index_mut(eight);
                #[unroll]
                for half in 0..2 {
                    let last = n_past + mine + comptime!(half * 8);
                    let mut two = score[half];
                    #[unroll]
                    for i in 0..2 {
                        let position = tile + comptime!(eight * 8 + i) + pair * 2;
                        let visible = position <= last && position + window > last;
                        two.insert(i, select(visible, two.extract(i), LEAST.runtime()));
                    }
                    score[half] = two;
                }
            }
        }

        #[unroll]
        for half in 0..2 {
            let mut most = greatest[half];
            #[unroll]
            for eight in 0..comptime!(TILE / 8) {
                let two = scores.index(eight)[half];
                most = f32::max(most, f32::max(two.extract(0usize), two.extract(1usize)));
            }
            most = f32::max(most, plane_shuffle_xor(most, 1u32));
            most = f32::max(most, plane_shuffle_xor(most, 2u32));
            let factor = f32::exp(greatest[half] - most);
            greatest[half] = most;
            let mut sum = sums[half] * factor;
            #[unroll]
            for eight in 0..comptime!(TILE / 8) {
                let score = scores.index_mut(eight);
                let two = Two::exp(score[half] - Two::new(most));
                sum += two.extract(0usize) + two.extract(1usize);
                score[half] = two;
            }
            sums[half] = sum;
            #[unroll]
            for column in 0..comptime!(plan.head_dim / 8) {
                let total = totals.index_mut(column);
                total[half] = total[half] * Two::new(factor);
            }
        }

        // Sixteen positions by sixteen columns each.
        #[unroll]
        for step in 0..comptime!(TILE / 16) {
            let mut weights = Array::<Two<F>>::new(4usize);
            #[unroll]
            for i in 0..4 {
                let score = scores.index(comptime!(step * 2 + i / 2));
                weights[i] = Two::cast_from(score[comptime!(i % 2)]);
            }
            #[unroll]
            for double in 0..comptime!(plan.head_dim / 16) {
                let position = comptime!(step * 16) + lane % 16;
                let at = position * stride + comptime!(double * 2) + lane / 16;
                let parts = def.load_matrix::<Eight<F>, Const<2>>(
                    &value_tile[at..at + 1],
                    MatrixIdent::B,
                    4usize,
                    true,
                );
                #[unroll]
                for i in 0..2 {
                    let total = totals.index_mut(comptime!(double * 2 + i));
                    multiply::<F>(&weights, &parts, comptime!(2 * i), total);
                }
            }
        }
        sync_cube();
        tile += TILE;
    }

    #[unroll]
    for half in 0..2 {
        let mut sum = sums[half];
        sum += plane_shuffle_xor(sum, 1u32);
        sum += plane_shuffle_xor(sum, 2u32);
        let factor = 1.0 / sum;
        let t = mine + comptime!(half * 8);
        if t < n {
            #[unroll]
            for column in 0..comptime!(plan.head_dim / 8) {
                let total = totals.index(column)[half];
                out[(t * heads + head) * twos + comptime!(column * 4) + pair] =
                    total * Two::new(factor);
            }
        }
    }
}

#[cube]
fn zeros() -> Array<Two<f32>> {
    let mut both = Array::<Two<f32>>::new(2usize);
    both[0] = Two::new(0.0f32);
    both[1] = Two::new(0.0f32);
    both
}

/// Adds `left` times two of the parts, from `first` on.
#[cube]
fn multiply<F: Float>(
    left: &Array<Two<F>>,
    parts: &Array<Two<F>>,
    #[comptime] first: usize,
    sums: &mut Array<Two<f32>>,
) {
    let def = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    let mut right = Array::<Two<F>>::new(2usize);
    right[0] = parts[first];
    right[1] = parts[comptime!(first + 1)];
    def.execute_inplace(left, &right, sums);
}
