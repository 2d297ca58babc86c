//! What is computed number by number.

use burn_cubecl::cubecl::{self, prelude::*};

/// `out` = `silu(gate) · up`, `total` numbers in rows of `width`. Rows of `gate` and `up` are `stride` apart, those of
/// `up` begin at `first_up`: with both in one buffer they lie side by side.
#[cube(launch_unchecked)]
pub(super) fn silu_times<F: Float>(
    gate: &[f32],
    up: &[f32],
    out: &mut [F],
    width: u32,
    stride: u32,
    first_up: u32,
    total: u32,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < total as usize {
        let width = width as usize;
        let at = ABSOLUTE_POS / width * stride as usize + ABSOLUTE_POS % width;
        let g = gate[at];
        let y = g / (1.0 + f32::exp(-g)) * up[at + first_up as usize];
        out[ABSOLUTE_POS] = F::cast_from(y);
    }
}

/// `total` numbers in another type.
#[cube(launch_unchecked)]
pub(super) fn convert<F: Float>(
    x: &[f32],
    out: &mut [F],
    total: u32,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < total as usize {
        out[ABSOLUTE_POS] = F::cast_from(x[ABSOLUTE_POS]);
    }
}
