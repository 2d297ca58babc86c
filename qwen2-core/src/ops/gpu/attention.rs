//! Grouped-query attention over a cache in one buffer: positions in tiles with a running softmax
//! (arXiv:2205.14135), split over cubes that a second kernel joins (flash decoding).

use burn_cubecl::cubecl::{self, prelude::*};

use super::reduce::{UNITS, group_sum, plane_wide_max};
use super::words::Four;

/// Positions of a tile.
pub(super) const TILE: usize = 64;
/// Units that share a position's dot products.
const SHARE: usize = UNITS / TILE;
/// Units that take one head's softmax.
const SIDE: usize = 32;
/// Query heads of a key head at most: one softmax for each [`SIDE`] units.
pub(super) const MAX_GROUP: usize = UNITS / SIDE;
/// Less than any score.
const LEAST: f32 = -1.0e30;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct AttentionPlan {
    /// Query heads of a key head.
    pub(super) group: usize,
    pub(super) head_dim: usize,
    /// Whether there are several cubes for a query.
    pub(super) split: bool,
    /// One token, whose position is read from the device; the length of a split follows from it. Its query and key
    /// are turned here, and its key and value written.
    pub(super) placed: bool,
    pub(super) planes: bool,
}

/// Where things are, in positions.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Span {
    pub(super) n_past: u32,
    /// How far a query looks back, itself included.
    pub(super) window: u32,
    pub(super) capacity: u32,
    /// Positions of a split, whole tiles.
    pub(super) length: u32,
    pub(super) scale: f32,
}

/// Cube (split, key head, query): `q` and `out` `[n, kv_heads, group, head_dim]`. With splits, `out` has
/// them in front of `head_dim`, not yet divided, and `stats` the greatest score and the sum of each. Where
/// the plan is `placed`, `q` are the token's queries, keys and values `[heads + 2 · kv_heads, head_dim]` as they
/// were multiplied, `cos` and `sin` `[capacity, head_dim / 2]`, and the last splits may have no positions.
#[cube(launch_unchecked)]
pub(super) fn attend<F: Float>(
    q: &[Four],
    cos: &[Four],
    sin: &[Four],
    keys: &mut [Vector<F, Const<4>>],
    values: &mut [Vector<F, Const<4>>],
    place: &[u32],
    out: &mut [Four],
    stats: &mut [f32],
    span: Span,
    #[comptime] plan: AttentionPlan,
    #[define(F)] _dtype: ElemType,
) {
    let group = comptime!(plan.group);
    let fours = comptime!(plan.head_dim / 4);
    let slices = comptime!(UNITS / (plan.head_dim / 4));
    let unit = UNIT_POS as usize;
    let head = CUBE_POS_Y as usize;
    let kv_heads = CUBE_COUNT_Y as usize;
    let t = CUBE_POS_Z as usize;
    let splits = CUBE_COUNT_X as usize;
    let split = CUBE_POS_X as usize;
    let from_query = (t * kv_heads + head) * group;

    let n_past = if comptime!(plan.placed) {
        place[0] as usize
    } else {
        span.n_past as usize
    };
    let last = n_past + t + 1;
    let window = span.window as usize;
    let length = if comptime!(plan.placed) {
        let seen = clamp_max(n_past + CUBE_COUNT_Z as usize, window);
        let share = (seen + splits - 1) / splits;
        (share + comptime!(TILE - 1)) / TILE * TILE
    } else {
        span.length as usize
    };
    let visible = select(last > window, last - clamp_max(window, last), 0usize);
    let first = visible + split * length;
    let end = clamp_max(first + length, last);
    let buffer = head * span.capacity as usize;

    let mut queries = Shared::<[Four]>::new_slice(comptime!(plan.group * plan.head_dim / 4));
    let mut scores = Shared::<[f32]>::new_slice(comptime!(MAX_GROUP * UNITS));
    let mut factors = Shared::<[f32]>::new_slice(MAX_GROUP);
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    // The token's own key and value.
    let mut fresh = Shared::<[Four]>::new_slice(comptime!(plan.head_dim / 2));
    if comptime!(plan.placed) {
        let angles = n_past * comptime!(plan.head_dim / 8);
        let mut i = unit;
        while i < comptime!(plan.group * plan.head_dim / 4) {
            let turned = turn(
                q,
                cos,
                sin,
                head * group + i / fours,
                i % fours,
                angles,
                plan.head_dim,
            );
            queries[i] = turned * Four::new(span.scale);
            i += UNITS;
        }
        if unit < fours {
            let heads = kv_heads * group;
            let key = turn(q, cos, sin, heads + head, unit, angles, plan.head_dim);
            let key = Vector::<F, Const<4>>::cast_from(key);
            let value = q[(heads + kv_heads + head) * fours + unit];
            let value = Vector::<F, Const<4>>::cast_from(value);
            fresh[unit] = Four::cast_from(key);
            fresh[fours + unit] = Four::cast_from(value);
            // The split that has the position writes it.
            if first <= n_past && n_past < end {
                keys[(buffer + n_past) * fours + unit] = key;
                values[(buffer + n_past) * fours + unit] = value;
            }
        }
    } else {
        let mut i = unit;
        while i < comptime!(plan.group * plan.head_dim / 4) {
            queries[i] = q[from_query * fours + i] * Four::new(span.scale);
            i += UNITS;
        }
    }
    sync_cube();

    // Of head unit / SIDE.
    let mut greatest = LEAST.runtime();
    let mut sum = 0.0f32;
    let lane = unit % SIDE;
    let of_head = unit / SIDE;
    // Of all heads, four elements, the positions of a slice.
    let column = unit % fours;
    let slice = unit / fours;
    let mut totals = Array::<Four>::new(group);
    #[unroll]
    for j in 0..group {
        totals[j] = Four::new(0.0f32);
    }

    let mut tile = first;
    while tile < end {
        let position = tile + unit / SHARE;
        let share = unit % SHARE;
        let mut dots = Array::<f32>::new(group);
        #[unroll]
        for j in 0..group {
            dots[j] = 0.0f32;
        }
        if position < end {
            let mut d = share;
            while d < fours {
                let at = (buffer + position) * fours + d;
                let key = if comptime!(plan.placed) {
                    let mut key = fresh[d];
                    if position != n_past {
                        key = Four::cast_from(keys[at]);
                    }
                    key
                } else {
                    Four::cast_from(keys[at])
                };
                #[unroll]
                for j in 0..group {
                    let product = key * queries[j * fours + d];
                    dots[j] = dots[j]
                        + (product.extract(0usize) + product.extract(1usize))
                        + (product.extract(2usize) + product.extract(3usize));
                }
                d += SHARE;
            }
        }
        #[unroll]
        for j in 0..group {
            scores[j * UNITS + unit] = dots[j];
        }
        sync_cube();

        // A lane has the positions lane and lane + 32 of the tile.
        let mut mine = Array::<f32>::new(comptime!(TILE / SIDE));
        let mut most = greatest;
        #[unroll]
        for k in 0..comptime!(TILE / SIDE) {
            let place = lane + k * SIDE;
            let mut score = LEAST.runtime();
            if tile + place < end && of_head < group {
                score = 0.0f32;
                #[unroll]
                for s in 0..SHARE {
                    score += scores[of_head * UNITS + place * SHARE + s];
                }
            }
            mine[k] = score;
            most = f32::max(most, score);
        }
        let most = plane_wide_max(most, &mut shared, plan.planes);
        let factor = f32::exp(greatest - most);
        greatest = most;
        sync_cube();
        let mut part = 0.0f32;
        #[unroll]
        for k in 0..comptime!(TILE / SIDE) {
            let place = lane + k * SIDE;
            let weight = select(mine[k] > LEAST * 0.5, f32::exp(mine[k] - most), 0.0f32);
            part += weight;
            if of_head < group {
                scores[of_head * UNITS + place] = weight;
            }
        }
        sum = sum * factor + group_sum(part, &mut shared, SIDE, plan.planes);
        if lane == 0 && of_head < group {
            factors[of_head] = factor;
        }
        sync_cube();

        if slice < slices {
            #[unroll]
            for j in 0..group {
                totals[j] = totals[j] * Four::new(factors[j]);
            }
            let stop = clamp_max(comptime!(TILE), end - tile);
            let mut p = slice;
            while p < stop {
                let at = (buffer + tile + p) * fours + column;
                let value = if comptime!(plan.placed) {
                    let mut value = fresh[fours + column];
                    if tile + p != n_past {
                        value = Four::cast_from(values[at]);
                    }
                    value
                } else {
                    Four::cast_from(values[at])
                };
                #[unroll]
                for j in 0..group {
                    totals[j] = totals[j] + value * Four::new(scores[j * UNITS + p]);
                }
                p += slices;
            }
        }
        sync_cube();
        tile += TILE;
    }

    if lane == 0 && of_head < group {
        factors[of_head] = 1.0 / sum;
        if comptime!(plan.split) {
            let place = ((from_query + of_head) * splits + split) * 2;
            stats[place] = greatest;
            stats[place + 1] = sum;
        }
    }
    let mut joined = Shared::<[Four]>::new_slice(UNITS);
    #[unroll]
    for j in 0..group {
        joined[unit] = totals[j];
        sync_cube();
        if unit < fours {
            let mut total = Four::new(0.0f32);
            for s in 0..slices {
                total = total + joined[s * fours + unit];
            }
            if comptime!(plan.split) {
                out[((from_query + j) * splits + split) * fours + unit] = total;
            } else {
                out[(from_query + j) * fours + unit] = total * Four::new(factors[j]);
            }
        }
        sync_cube();
    }
}

/// Four numbers of a head of `rows`, from `4 · place` on, after the rotary embedding (arXiv:2104.09864, half-split
/// pairing) by the angles from `angles` on.
#[cube]
fn turn(
    rows: &[Four],
    cos: &[Four],
    sin: &[Four],
    head: usize,
    place: usize,
    angles: usize,
    #[comptime] head_dim: usize,
) -> Four {
    let half = comptime!(head_dim / 8);
    let first = head * comptime!(head_dim / 4);
    let mine = rows[first + place];
    let angle = angles + place % half;
    let (c, s) = (cos[angle], sin[angle]);
    if place < half {
        mine * c - rows[first + place + half] * s
    } else {
        mine * c + rows[first + place - half] * s
    }
}

/// The most splits that [`join`] takes.
pub(super) const MAX_SPLITS: usize = UNITS;

/// Joins the splits of a head: a cube a head.
#[cube(launch_unchecked)]
pub(super) fn join(
    parts: &[Four],
    stats: &[f32],
    out: &mut [Four],
    splits: u32,
    #[comptime] head_dim: usize,
    #[comptime] planes: bool,
) {
    let fours = comptime!(head_dim / 4);
    let slices = comptime!(UNITS / (head_dim / 4));
    let splits = splits as usize;
    let unit = UNIT_POS as usize;
    let first = CUBE_POS * splits;
    let mut factors = Shared::<[f32]>::new_slice(UNITS);
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    // A unit a split.
    let at = clamp_max(unit, splits - 1);
    let mine = stats[(first + at) * 2];
    factors[unit] = plane_wide_max(mine, &mut shared, planes);
    sync_cube();
    let mut greatest = factors[0];
    #[unroll]
    for side in 1..comptime!(UNITS / SIDE) {
        greatest = f32::max(greatest, factors[side * SIDE]);
    }
    sync_cube();
    let factor = select(unit < splits, f32::exp(mine - greatest), 0.0f32);
    factors[unit] = factor;
    let sum = group_sum(
        factor * stats[(first + at) * 2 + 1],
        &mut shared,
        UNITS,
        planes,
    );
    sync_cube();
    // A slice of the splits, four elements a unit.
    let column = unit % fours;
    let slice = unit / fours;
    let mut total = Four::new(0.0f32);
    if slice < slices {
        let mut split = slice;
        while split < splits {
            total = total + parts[(first + split) * fours + column] * Four::new(factors[split]);
            split += slices;
        }
    }
    let mut joined = Shared::<[Four]>::new_slice(UNITS);
    joined[unit] = total;
    sync_cube();
    if unit < fours {
        let mut all = Four::new(0.0f32);
        for s in 0..slices {
            all = all + joined[s * fours + unit];
        }
        out[CUBE_POS * fours + unit] = all * Four::new(1.0 / sum);
    }
}
