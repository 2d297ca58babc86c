//! Root mean square norm (arXiv:1910.07467), a row a cube.

use burn_cubecl::cubecl::{self, prelude::*};

use super::reduce::{UNITS, group_sum};

/// `out` = `x / sqrt(mean(x²) + eps) · weight`, rows of `cols`.
#[cube(launch_unchecked)]
pub(super) fn rms_norm<F: Float>(
    x: &[f32],
    weight: &[f32],
    out: &mut [F],
    cols: u32,
    eps: f32,
    #[comptime] planes: bool,
    #[define(F)] _dtype: ElemType,
) {
    let cols = cols as usize;
    let row = CUBE_POS * cols;
    let mut square = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < cols {
        let value = x[row + i];
        square = fma(value, value, square);
        i += UNITS;
    }
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let square = group_sum(square, &mut shared, UNITS, planes);
    let scale = 1.0 / f32::sqrt(square / f32::cast_from(cols as u32) + eps);
    let mut i = UNIT_POS as usize;
    while i < cols {
        out[row + i] = F::cast_from(x[row + i] * scale * weight[i]);
        i += UNITS;
    }
}
