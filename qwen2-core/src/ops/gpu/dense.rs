//! Few rows times dense matrices: each group of units takes some rows of the weights and all of `x`.

use burn_cubecl::cubecl::{self, prelude::*};

use super::reduce::{UNITS, group_sums, sums_room};
use super::words::{Four, Numbers, Words, number};

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) numbers: Numbers,
    /// Rows of `x`, or more: those past the last are the last once more, and come to nothing.
    pub(super) n: usize,
    /// Units that share a row of the weights.
    pub(super) group: usize,
    /// Rows of the weights that a group computes; 1 with `gated`.
    pub(super) rows: usize,
    /// Vectors of a row that a unit has in flight.
    pub(super) ahead: usize,
    /// Matrices side by side, or two whose results become one.
    pub(super) matrices: usize,
    /// SwiGLU: `silu(w0 x) · (w1 x)`.
    pub(super) gated: bool,
    /// `x` goes through the norm.
    pub(super) normed: bool,
    pub(super) biased: bool,
    /// The product is added to what `out` holds.
    pub(super) adds: bool,
    pub(super) planes: bool,
}

/// Where the rows of the matrices end, and the row's length in vectors of the weights.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Sizes {
    pub(super) end0: u32,
    pub(super) end1: u32,
    pub(super) end2: u32,
    pub(super) vectors: u32,
    /// Rows of `x`.
    pub(super) n: u32,
    pub(super) eps: f32,
    /// What the product counts, where it is added.
    pub(super) factor: f32,
}

/// Vector `at` of a row of the matrix that has it; in a gated plan the second row is one of `w1`.
#[cube]
fn load(
    w0: &[Words],
    w1: &[Words],
    w2: &[Words],
    row: usize,
    at: usize,
    sizes: &Sizes,
    #[comptime] second: bool,
    #[comptime] plan: Plan,
) -> Words {
    let vectors = sizes.vectors as usize;
    if comptime!(plan.gated) {
        if comptime!(second) {
            w1[row * vectors + at]
        } else {
            w0[row * vectors + at]
        }
    } else if comptime!(plan.matrices == 1) {
        w0[row * vectors + at]
    } else {
        let end0 = sizes.end0 as usize;
        let end1 = sizes.end1 as usize;
        if row < end0 {
            w0[row * vectors + at]
        } else if row < end1 {
            w1[(row - end0) * vectors + at]
        } else {
            w2[(row - end1) * vectors + at]
        }
    }
}

/// `out` `[n, rows]` from `x` `[n, cols]`.
#[cube(launch_unchecked)]
pub(super) fn dense_product(
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
    #[comptime] plan: Plan,
) {
    let group = comptime!(plan.group);
    let per_group = comptime!(plan.rows);
    let dots = comptime!(if plan.gated { 2 } else { plan.rows });
    let n = comptime!(plan.n);
    let ahead = comptime!(plan.ahead);
    let width = comptime!(plan.numbers.per_vector());
    let fours = comptime!(plan.numbers.per_vector() / 4);

    let unit = UNIT_POS as usize;
    let lane = unit % group;
    let total = sizes.end2 as usize;
    let vectors = sizes.vectors as usize;
    let filled = sizes.n as usize;
    let first = (CUBE_POS * comptime!(UNITS / plan.group) + unit / group) * per_group;

    let mut sums = Array::<f32>::new(comptime!(dots * n));
    let mut squares = Array::<f32>::new(n);
    #[unroll]
    for i in 0..comptime!(dots * n) {
        sums[i] = 0.0f32;
    }
    #[unroll]
    for t in 0..n {
        squares[t] = 0.0f32;
    }

    let mut words = Array::<Words>::new(comptime!(dots * ahead));
    let mut v = lane;
    while v < vectors {
        // All loads first and no branch, so that they are under way together; what lies past the end of
        // a row is read from its last vector and counts nothing.
        #[unroll]
        for a in 0..ahead {
            let at = clamp_max(v + a * group, vectors - 1);
            #[unroll]
            for r in 0..dots {
                let row = if comptime!(plan.gated) {
                    clamp_max(first, total - 1)
                } else {
                    clamp_max(first + r, total - 1)
                };
                words[a * dots + r] = load(
                    w0,
                    w1,
                    w2,
                    row,
                    at,
                    &sizes,
                    comptime!(plan.gated && r == 1),
                    plan,
                );
            }
        }
        #[unroll]
        for t in 0..n {
            let row = clamp_max(t, filled - 1) * vectors * fours;
            #[unroll]
            for a in 0..ahead {
                let at = v + a * group;
                let inside = at < vectors;
                #[unroll]
                for f in 0..fours {
                    let place = clamp_max(at, vectors - 1) * fours + f;
                    let four = select(inside, x[row + place], Four::new(0.0f32));
                    let mut scaled = four;
                    if comptime!(plan.normed) {
                        scaled = four * norm[place];
                        let square = four * four;
                        squares[t] = squares[t]
                            + (square.extract(0usize) + square.extract(1usize))
                            + (square.extract(2usize) + square.extract(3usize));
                    }
                    #[unroll]
                    for r in 0..dots {
                        let word = words[a * dots + r];
                        #[unroll]
                        for i in 0..4usize {
                            let w = number(word, comptime!(f * 4 + i), plan.numbers);
                            sums[t * dots + r] = fma(w, scaled.extract(i), sums[t * dots + r]);
                        }
                    }
                }
            }
        }
        v += comptime!(plan.group * plan.ahead);
    }

    let mut shared = Shared::<[f32]>::new_slice(comptime!(sums_room(plan.planes)));
    let cols = f32::cast_from(vectors as u32 * comptime!(width as u32));
    if comptime!(plan.normed) {
        group_sums(&mut squares, &mut shared, n, group, plan.planes);
    }
    group_sums(
        &mut sums,
        &mut shared,
        comptime!(dots * n),
        group,
        plan.planes,
    );
    #[unroll]
    for t in 0..n {
        if comptime!(plan.normed) {
            let scale = 1.0 / f32::sqrt(squares[t] / cols + sizes.eps);
            #[unroll]
            for r in 0..dots {
                sums[t * dots + r] = sums[t * dots + r] * scale;
            }
        }
        if comptime!(plan.gated) {
            if lane == 0 && first < total && t < filled {
                let gate = sums[t * dots];
                out[t * total + first] = gate / (1.0 + f32::exp(-gate)) * sums[t * dots + 1];
            }
        } else {
            #[unroll]
            for r in 0..dots {
                let row = first + r;
                if lane == 0 && row < total && t < filled {
                    let mut y = sums[t * dots + r];
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
    }
}

/// The bias of a row of matrices side by side.
#[cube]
pub(super) fn bias(
    b0: &[f32],
    b1: &[f32],
    b2: &[f32],
    row: usize,
    sizes: &Sizes,
    #[comptime] matrices: usize,
) -> f32 {
    if comptime!(matrices == 1) {
        b0[row]
    } else {
        let end0 = sizes.end0 as usize;
        let end1 = sizes.end1 as usize;
        if row < end0 {
            b0[row]
        } else if row < end1 {
            b1[row - end0]
        } else {
            b2[row - end1]
        }
    }
}
