//! Few rows times packed matrices (`ops/packed.rs`), and packed rows as numbers: a cube takes a panel.

use burn_cubecl::cubecl::{self, prelude::*};

use super::dense::{Sizes, bias};
use super::reduce::{UNITS, group_sums};
use super::words::{Four, Words, byte, from_f16, nibble, raised_nibble, two_f16};
use crate::ops::packed::{Format, ROWS};

/// Units that read one panel side by side.
const SIDE: usize = 32;
/// Groups of units of a cube, each with its own columns.
const SIDES: usize = UNITS / SIDE;

/// What a kernel is compiled for; as [`super::dense::Plan`] has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PackedPlan {
    pub(super) eight_bits: bool,
    pub(super) n: usize,
    pub(super) matrices: usize,
    pub(super) gated: bool,
    pub(super) normed: bool,
    pub(super) biased: bool,
    pub(super) adds: bool,
    pub(super) planes: bool,
    /// Pairs of blocks that a unit has in flight.
    pub(super) ahead: usize,
    /// The device converts f16 itself.
    pub(super) halves: bool,
}

/// Vectors of two blocks of a panel.
const fn pair_vectors(eight_bits: bool) -> usize {
    match eight_bits {
        true => Format::Q8.pair_bytes() / 16,
        false => Format::Q4.pair_bytes() / 16,
    }
}

/// Pairs of blocks that a unit should have in flight for rows of so many columns.
pub(super) fn ahead(cols: usize, eight_bits: bool, gated: bool) -> usize {
    let pairs = cols.div_ceil(64 * SIDES);
    let most = match (eight_bits, gated) {
        (false, false) => 4,
        (true, true) => 1,
        _ => 2,
    };
    pairs.next_power_of_two().min(most)
}

/// Four scales of a panel: of rows `rows · 4` on, from the vector that holds them.
#[cube]
fn four_scales(words: Words, odd: bool, #[comptime] halves: bool) -> Four {
    let low = select(odd, words.extract(2usize), words.extract(0usize));
    let high = select(odd, words.extract(3usize), words.extract(1usize));
    let (first, second) = two_f16(low, halves);
    let (third, fourth) = two_f16(high, halves);
    let mut scales = Four::new(0.0f32);
    scales.insert(0usize, first);
    scales.insert(1usize, second);
    scales.insert(2usize, third);
    scales.insert(3usize, fourth);
    scales
}

/// Four columns of row `t` of `x` times the norm's; zeros behind the last column.
#[cube]
fn columns(
    x: &[Four],
    norm: &[Four],
    t: usize,
    place: usize,
    sizes: &Sizes,
    #[comptime] normed: bool,
) -> Four {
    let fours = sizes.vectors as usize;
    let inside = place < fours;
    let place = clamp_max(place, fours - 1);
    let row = clamp_max(t, sizes.n as usize - 1);
    let mut four = x[row * fours + place];
    if comptime!(normed) {
        four = four * norm[place];
    }
    select(inside, four, Four::new(0.0f32))
}

/// Adds the products of four columns of four rows in eight bits.
#[cube]
fn eight_bit_sums(
    x: &[Four],
    norm: &[Four],
    words: Words,
    scales: Four,
    sums: &mut Array<f32>,
    place: usize,
    sizes: &Sizes,
    #[comptime] at: usize,
    #[comptime] dots: usize,
    #[comptime] plan: PackedPlan,
) {
    #[unroll]
    for t in 0..comptime!(plan.n) {
        let four = columns(x, norm, t, place, sizes, plan.normed);
        #[unroll]
        for r in 0..4usize {
            let word = words.extract(r);
            let mut dot = byte(word, 0usize, 128u32) * four.extract(0usize);
            #[unroll]
            for i in 1..4usize {
                dot = fma(byte(word, i, 128u32), four.extract(i), dot);
            }
            let place = comptime!((t * dots + at) * 4 + r);
            sums[place] = fma(scales.extract(r), dot, sums[place]);
        }
    }
}

/// Adds the products of eight columns, 16 apart in fours, of four rows in four bits. The bits stay where
/// they are in the word; the columns are divided by what that makes of them, a power of two.
#[cube]
fn four_bit_sums(
    x: &[Four],
    norm: &[Four],
    words: Words,
    scales: Four,
    sums: &mut Array<f32>,
    place: usize,
    sizes: &Sizes,
    #[comptime] at: usize,
    #[comptime] dots: usize,
    #[comptime] plan: PackedPlan,
) {
    #[unroll]
    for t in 0..comptime!(plan.n) {
        let low = columns(x, norm, t, place, sizes, plan.normed);
        let high = columns(x, norm, t, place + 4, sizes, plan.normed);
        let low1 = low.extract(1usize) * 0.003_906_25;
        let low2 = low.extract(2usize) * 0.000_015_258_789;
        let high0 = high.extract(0usize) * 0.0625;
        let high1 = high.extract(1usize) * 0.000_244_140_63;
        let low3 = low.extract(3usize) * 0.003_906_25;
        let high3 = high.extract(3usize) * 0.000_244_140_63;
        #[unroll]
        for r in 0..4usize {
            let word = words.extract(r);
            // Nibbles 0 to 4, then 5, 6 and 7 as 1, 2 and 3.
            let rest = word >> 16;
            let mut dot = raised_nibble(word, 0u32) * low.extract(0usize);
            dot = fma(raised_nibble(word, 1u32), high0, dot);
            dot = fma(raised_nibble(word, 2u32), low1, dot);
            dot = fma(raised_nibble(word, 3u32), high1, dot);
            dot = fma(raised_nibble(word, 4u32), low2, dot);
            dot = fma(
                raised_nibble(rest, 1u32),
                high.extract(2usize) * 0.0625,
                dot,
            );
            dot = fma(raised_nibble(rest, 2u32), low3, dot);
            dot = fma(raised_nibble(rest, 3u32), high3, dot);
            let place = comptime!((t * dots + at) * 4 + r);
            sums[place] = fma(scales.extract(r), dot, sums[place]);
        }
    }
}

/// Adds the products of a panel, four rows a unit, to `sums` `[n, dots, 4]`; in a gated plan those of the
/// same panel of `up` as well.
#[cube]
pub(super) fn panel_sums(
    x: &[Four],
    norm: &[Four],
    weights: &[Words],
    up: &[Words],
    panel: usize,
    sums: &mut Array<f32>,
    sizes: &Sizes,
    #[comptime] plan: PackedPlan,
) {
    let ahead = comptime!(plan.ahead);
    let dots = comptime!(if plan.gated { 2 } else { 1 });
    // Vectors of a pair that a unit takes.
    let blocks = comptime!(if plan.eight_bits { 2 } else { 1 });
    let pair_size = comptime!(pair_vectors(plan.eight_bits));
    let unit = UNIT_POS as usize;
    let lane = unit % SIDE;
    let rows = lane % 4;
    let odd = rows % 2 == 1;
    let pairs = (sizes.vectors as usize + 15) / 16;
    // Where the unit's columns lie in a pair, in vectors of `x`, and its scales.
    let block = if comptime!(plan.eight_bits) {
        0usize.runtime()
    } else {
        lane / 16
    };
    let within = if comptime!(plan.eight_bits) {
        lane / 4
    } else {
        block * 8 + lane % 16 / 4
    };
    let scales_at = block * 2 + rows / 2;
    let mut words = Array::<Words>::new(comptime!(ahead * dots * blocks));
    let mut scales = Array::<Words>::new(comptime!(ahead * dots * blocks));
    let mut pair = unit / SIDE;
    while pair < pairs {
        // Several at a time: a pair past the last is read from the last, and meets columns that are zero.
        #[unroll]
        for a in 0..ahead {
            let base = (panel * pairs + clamp_max(pair + a * SIDES, pairs - 1)) * pair_size;
            #[unroll]
            for d in 0..dots {
                #[unroll]
                for b in 0..blocks {
                    let to = comptime!((a * dots + d) * blocks + b);
                    let quants = base + 4 + b * SIDE + lane;
                    let scale = base + b * 2 + scales_at;
                    if comptime!(d == 0) {
                        words[to] = weights[quants];
                        scales[to] = weights[scale];
                    } else {
                        words[to] = up[quants];
                        scales[to] = up[scale];
                    }
                }
            }
        }
        #[unroll]
        for a in 0..ahead {
            let place = (pair + a * SIDES) * 16 + within;
            #[unroll]
            for d in 0..dots {
                #[unroll]
                for b in 0..blocks {
                    let from = comptime!((a * dots + d) * blocks + b);
                    let four = four_scales(scales[from], odd, plan.halves);
                    if comptime!(plan.eight_bits) {
                        let place = place + b * 8;
                        eight_bit_sums(
                            x,
                            norm,
                            words[from],
                            four,
                            sums,
                            place,
                            sizes,
                            d,
                            dots,
                            plan,
                        );
                    } else {
                        four_bit_sums(
                            x,
                            norm,
                            words[from],
                            four,
                            sums,
                            place,
                            sizes,
                            d,
                            dots,
                            plan,
                        );
                    }
                }
            }
        }
        pair += comptime!(plan.ahead * SIDES);
    }
}

/// What [`row_sums`] needs of shared memory.
pub(super) const ROW_SUMS_ROOM: usize = UNITS * 5;

/// The sum of each of the 16 rows of a panel over all units, for the first 16 units.
#[cube]
pub(super) fn row_sums(
    sums: &Array<f32>,
    shared: &mut [f32],
    #[comptime] at: usize,
    #[comptime] planes: bool,
) -> f32 {
    let unit = UNIT_POS as usize;
    let mut sum = 0.0f32;
    if comptime!(planes) {
        let lane = unit % SIDE;
        #[unroll]
        for r in 0..4usize {
            let mut part = sums[comptime!(at * 4 + r)];
            part += plane_shuffle_xor(part, 4u32);
            part += plane_shuffle_xor(part, 8u32);
            part += plane_shuffle_xor(part, 16u32);
            if lane < 4 {
                shared[unit / SIDE * ROWS + lane * 4 + r] = part;
            }
        }
        sync_cube();
        if unit < ROWS {
            #[unroll]
            for side in 0..SIDES {
                sum += shared[side * ROWS + unit];
            }
        }
        sync_cube();
    } else {
        #[unroll]
        for r in 0..4usize {
            shared[(unit % 4 * 4 + r) * 64 + unit / 4] = sums[comptime!(at * 4 + r)];
        }
        sync_cube();
        // Sixteen units a row, four numbers each.
        let from = unit / 16 * 64 + unit % 16;
        let part = (shared[from] + shared[from + 16]) + (shared[from + 32] + shared[from + 48]);
        // Behind what is read, so that no barrier is needed between; the next call's first one is behind both.
        shared[4 * UNITS + unit] = part;
        sync_cube();
        if unit < ROWS {
            #[unroll]
            for i in 0..16usize {
                sum += shared[4 * UNITS + unit * 16 + i];
            }
        }
    }
    sum
}

/// `out` `[n, rows]` from `x` `[n, cols]`; `vectors` of the sizes counts those of `x`.
#[cube(launch_unchecked)]
pub(super) fn packed_product(
    x: &[Four],
    norm: &[Four],
    w0: &[Words],
    w1: &[Words],
    w2: &[Words],
    b0: &[f32],
    b1: &[f32],
    b2: &[f32],
    out: &mut [f32],
    sizes: Sizes,
    #[comptime] plan: PackedPlan,
) {
    let n = comptime!(plan.n);
    let dots = comptime!(if plan.gated { 2 } else { 1 });
    let unit = UNIT_POS as usize;
    let fours = sizes.vectors as usize;
    let filled = sizes.n as usize;
    let end0 = sizes.end0 as usize;
    let end1 = sizes.end1 as usize;
    let total = sizes.end2 as usize;
    let mut sums = Array::<f32>::new(comptime!(n * dots * 4));
    #[unroll]
    for i in 0..comptime!(n * dots * 4) {
        sums[i] = 0.0f32;
    }
    // The matrices' panels follow each other.
    let panels0 = (end0 + 15) / 16;
    let panels1 = panels0 + (end1 - end0 + 15) / 16;
    let panel = CUBE_POS;
    let mut row = panel * ROWS + unit;
    let mut end = total;
    if comptime!(plan.gated) {
        panel_sums(x, norm, w0, w1, panel, &mut sums, &sizes, plan);
    } else if comptime!(plan.matrices == 1) {
        panel_sums(x, norm, w0, w0, panel, &mut sums, &sizes, plan);
    } else if panel < panels0 {
        panel_sums(x, norm, w0, w0, panel, &mut sums, &sizes, plan);
        end = end0;
    } else if panel < panels1 {
        panel_sums(x, norm, w1, w1, panel - panels0, &mut sums, &sizes, plan);
        row = end0 + (panel - panels0) * ROWS + unit;
        end = end1;
    } else {
        panel_sums(x, norm, w2, w2, panel - panels1, &mut sums, &sizes, plan);
        row = end1 + (panel - panels1) * ROWS + unit;
    }

    let mut shared = Shared::<[f32]>::new_slice(comptime!(ROW_SUMS_ROOM));
    let mut squares = Array::<f32>::new(n);
    if comptime!(plan.normed) {
        #[unroll]
        for t in 0..n {
            let mut square = 0.0f32;
            let mut place = unit;
            while place < fours {
                let four = x[clamp_max(t, filled - 1) * fours + place];
                let of_four = four * four;
                square += (of_four.extract(0usize) + of_four.extract(1usize))
                    + (of_four.extract(2usize) + of_four.extract(3usize));
                place += UNITS;
            }
            squares[t] = square;
        }
        group_sums(&mut squares, &mut shared, n, UNITS, plan.planes);
    }
    #[unroll]
    for t in 0..n {
        let scale = if comptime!(plan.normed) {
            1.0 / f32::sqrt(squares[t] / f32::cast_from(fours as u32 * 4) + sizes.eps)
        } else {
            1.0f32.runtime()
        };
        let first = row_sums(&sums, &mut shared, comptime!(t * dots), plan.planes) * scale;
        if comptime!(plan.gated) {
            let up = row_sums(&sums, &mut shared, comptime!(t * dots + 1), plan.planes) * scale;
            if unit < ROWS && row < end && t < filled {
                out[t * total + row] = first / (1.0 + f32::exp(-first)) * up;
            }
        } else if unit < ROWS && row < end && t < filled {
            let mut y = first;
            if comptime!(plan.biased) {
                y += bias(b0, b1, b2, row, &sizes, plan.matrices);
            }
            if comptime!(plan.adds) {
                y = fma(y, sizes.factor, out[t * total + row]);
            }
            out[t * total + row] = y;
        }
    }
}

/// Rows of a packed matrix as numbers, `out` `[tokens, cols]`: a unit writes four columns of a row.
#[cube(launch_unchecked)]
pub(super) fn unpack<F: Float>(
    weights: &[Words],
    tokens: &[u32],
    out: &mut [F],
    fours: u32,
    n: u32,
    #[comptime] all: bool,
    #[comptime] eight_bits: bool,
    #[define(F)] _dtype: ElemType,
) {
    let pair_size = comptime!(pair_vectors(eight_bits));
    let fours = fours as usize;
    if ABSOLUTE_POS < fours * n as usize {
        let index = ABSOLUTE_POS / fours;
        let place = ABSOLUTE_POS % fours;
        let row = if comptime!(all) {
            index
        } else {
            tokens[index] as usize
        };
        let pairs = (fours + 15) / 16;
        let base = (row / ROWS * pairs + place / 16) * pair_size;
        let block = place % 16 / 8;
        let group = place % 8;
        let r = row % ROWS;
        let scales = weights[base + block * 2 + r / 8].extract_dynamic(r % 8 / 2);
        let scale = from_f16(select(r % 2 == 1, scales >> 16, scales & 0xffff));
        if comptime!(eight_bits) {
            let word = weights[base + 4 + block * 32 + group * 4 + r / 4].extract_dynamic(r % 4);
            #[unroll]
            for i in 0..4usize {
                out[ABSOLUTE_POS * 4 + i] = F::cast_from(byte(word, i, 128u32) * scale);
            }
        } else {
            let word =
                weights[base + 4 + block * 16 + group % 4 * 4 + r / 4].extract_dynamic(r % 4);
            let shifted = select(group / 4 == 1, word >> 4, word);
            #[unroll]
            for i in 0..4usize {
                out[ABSOLUTE_POS * 4 + i] = F::cast_from(nibble(shifted, i, false) * scale);
            }
        }
    }
}
