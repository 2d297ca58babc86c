//! A mixture of experts for a few tokens, chosen and computed on the device: the experts' matrices lie behind each
//! other in one buffer, and a kernel reads from another one which of them it multiplies with.

use burn_cubecl::cubecl::{self, prelude::*};

use super::choice::{key, number, reduce};
use super::dense::Sizes;
use super::packed::{PackedPlan, ROW_SUMS_ROOM, panel_sums, row_sums};
use super::reduce::{UNITS, group_sum, group_sums, sums_room};
use super::words::{self, Four, Numbers, Words};
use crate::ops::packed::ROWS;

/// The experts of a token, a cube a token: `scores` are those of the router, up to [`UNITS`] of them, and that of the
/// shared expert's gate. `ids` has the `k` likeliest, of equals the first, and `weights` their shares, then the shared
/// expert's: a softmax over all scores, or with `normed` over those kept.
#[cube(launch_unchecked)]
pub(super) fn route(
    scores: &[f32],
    ids: &mut [u32],
    weights: &mut [f32],
    experts: u32,
    #[comptime] k: usize,
    #[comptime] normed: bool,
) {
    let unit = UNIT_POS as usize;
    let experts = experts as usize;
    let inside = unit < experts;
    let token = CUBE_POS_X as usize;
    let scores = &scores[token * (experts + 1)..(token + 1) * (experts + 1)];
    let first_id = token * k;
    let first_weight = token * comptime!(k + 1);
    let score = scores[clamp_max(unit, experts - 1)];
    let mut keys = Shared::<[u32]>::new_slice(UNITS);
    let mut places = Shared::<[u32]>::new_slice(UNITS);
    let mut sums = Shared::<[f32]>::new_slice(UNITS);
    keys[unit] = key(score);
    places[unit] = unit as u32;
    reduce(&mut keys, &mut places);
    let most = number(keys[0]);
    let exp = select(inside, f32::exp(score - most), 0.0f32);
    let sum = group_sum(exp, &mut sums, UNITS, false);
    sync_cube();
    let mut left = select(inside, key(exp), 0u32.runtime());
    let mut kept = 0.0f32;
    for i in 0..k {
        keys[unit] = left;
        places[unit] = unit as u32;
        reduce(&mut keys, &mut places);
        let chosen = clamp_max(places[0] as usize, experts - 1);
        let share = number(keys[0]);
        kept += share;
        sync_cube();
        if unit == 0 {
            ids[first_id + i] = chosen as u32;
            weights[first_weight + i] = share;
        }
        left = select(unit == chosen, 0u32.runtime(), left);
    }
    if unit == 0 {
        let divisor = if comptime!(normed) { kept } else { sum };
        for i in 0..k {
            weights[first_weight + i] = weights[first_weight + i] / divisor;
        }
        weights[first_weight + k] = 1.0 / (1.0 + f32::exp(-scores[experts]));
    }
}

/// Cube (panel, visit): `out` `[visits, rows]` of the visit's expert, whose panels are `w0`'s and, gated, `w1`'s; so many
/// visits share a row of `x`.
#[cube(launch_unchecked)]
pub(super) fn packed_visits(
    x: &[Four],
    ids: &[u32],
    w0: &[Words],
    w1: &[Words],
    out: &mut [f32],
    sizes: Sizes,
    #[comptime] per_row: usize,
    #[comptime] plan: PackedPlan,
) {
    let dots = comptime!(if plan.gated { 2 } else { 1 });
    let unit = UNIT_POS as usize;
    let slot = CUBE_POS_Y as usize;
    let total = sizes.end2 as usize;
    let panels = CUBE_COUNT_X as usize;
    let panel = ids[slot] as usize * panels + CUBE_POS_X as usize;
    let row = CUBE_POS_X as usize * ROWS + unit;
    let first = slot / per_row * sizes.vectors as usize;
    let x = &x[first..first + sizes.vectors as usize];
    let mut sums = Array::<f32>::new(comptime!(dots * 4));
    #[unroll]
    for i in 0..comptime!(dots * 4) {
        sums[i] = 0.0f32;
    }
    panel_sums(x, x, w0, w1, panel, &mut sums, &sizes, plan);
    let mut shared = Shared::<[f32]>::new_slice(comptime!(ROW_SUMS_ROOM));
    let first = row_sums(&sums, &mut shared, 0usize, plan.planes);
    if comptime!(plan.gated) {
        let up = row_sums(&sums, &mut shared, 1usize, plan.planes);
        if unit < ROWS && row < total {
            out[slot * total + row] = first / (1.0 + f32::exp(-first)) * up;
        }
    } else if unit < ROWS && row < total {
        out[slot * total + row] = first;
    }
}

/// What a kernel of dense matrices is compiled for; as [`super::dense::Plan`] has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct VisitPlan {
    pub(super) numbers: Numbers,
    /// Units that share a row of the weights.
    pub(super) group: usize,
    /// Vectors of a row that a unit has in flight.
    pub(super) ahead: usize,
    pub(super) gated: bool,
    /// Visits that share a row of `x`.
    pub(super) per_row: usize,
    pub(super) planes: bool,
}

/// As [`packed_visits`]: a group of units takes a row of the expert's matrix, gated of both.
#[cube(launch_unchecked)]
pub(super) fn dense_visits(
    x: &[Four],
    ids: &[u32],
    w0: &[Words],
    w1: &[Words],
    out: &mut [f32],
    rows: u32,
    vectors: u32,
    #[comptime] plan: VisitPlan,
) {
    let dots = comptime!(if plan.gated { 2 } else { 1 });
    let fours = comptime!(plan.numbers.per_vector() / 4);
    let ahead = comptime!(plan.ahead);
    let group = comptime!(plan.group);
    let unit = UNIT_POS as usize;
    let lane = unit % group;
    let slot = CUBE_POS_Y as usize;
    let rows = rows as usize;
    let vectors = vectors as usize;
    let row = CUBE_POS_X as usize * comptime!(UNITS / plan.group) + unit / group;
    let from = (ids[slot] as usize * rows + clamp_max(row, rows - 1)) * vectors;
    let first = slot / plan.per_row * vectors * fours;
    let mut sums = Array::<f32>::new(dots);
    #[unroll]
    for d in 0..dots {
        sums[d] = 0.0f32;
    }
    let mut words = Array::<Words>::new(comptime!(dots * ahead));
    let mut v = lane;
    while v < vectors {
        // All loads first; what lies past the end is read from the last vector and counts nothing.
        #[unroll]
        for a in 0..ahead {
            let at = from + clamp_max(v + a * group, vectors - 1);
            words[a * dots] = w0[at];
            if comptime!(plan.gated) {
                words[a * dots + 1] = w1[at];
            }
        }
        #[unroll]
        for a in 0..ahead {
            let at = v + a * group;
            let inside = at < vectors;
            #[unroll]
            for f in 0..fours {
                let place = first + clamp_max(at, vectors - 1) * fours + f;
                let four = select(inside, x[place], Four::new(0.0f32));
                #[unroll]
                for d in 0..dots {
                    let word = words[a * dots + d];
                    #[unroll]
                    for i in 0..4usize {
                        let w = words::number(word, comptime!(f * 4 + i), plan.numbers);
                        sums[d] = fma(w, four.extract(i), sums[d]);
                    }
                }
            }
        }
        v += comptime!(plan.group * plan.ahead);
    }
    let mut shared = Shared::<[f32]>::new_slice(comptime!(sums_room(plan.planes)));
    group_sums(&mut sums, &mut shared, dots, group, plan.planes);
    if lane == 0 && row < rows {
        if comptime!(plan.gated) {
            let gate = sums[0];
            out[slot * rows + row] = gate / (1.0 + f32::exp(-gate)) * sums[1];
        } else {
            out[slot * rows + row] = sums[0];
        }
    }
}

/// `h` plus what the `k` visits of each token gave, `[n, k, cols]`, and the shared expert, times their weights.
#[cube(launch_unchecked)]
pub(super) fn combine(
    visits: &[f32],
    shared: &[f32],
    weights: &[f32],
    h: &mut [f32],
    cols: u32,
    total: u32,
    #[comptime] k: usize,
) {
    let cols = cols as usize;
    if ABSOLUTE_POS < total as usize {
        let token = ABSOLUTE_POS / cols;
        let column = ABSOLUTE_POS % cols;
        let weights = &weights[token * comptime!(k + 1)..(token + 1) * comptime!(k + 1)];
        let mut sum = h[ABSOLUTE_POS];
        #[unroll]
        for i in 0..k {
            sum = fma(weights[i], visits[(token * k + i) * cols + column], sum);
        }
        h[ABSOLUTE_POS] = fma(weights[k], shared[ABSOLUTE_POS], sum);
    }
}
