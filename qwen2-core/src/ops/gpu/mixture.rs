//! A mixture of experts for one token, all of it on the device: which kernels, in which order.

use burn::tensor::{DType, Tensor};
use burn_cubecl::cubecl::calculate_cube_count_elemwise;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::cube::{cube, empty, own, rms_norm, tensor};
use super::dense::SizesLaunch;
use super::grouped::{self, VisitPlan};
use super::packed::{self, PackedPlan};
use super::product::{Input, Stored, few, gated_few, group_units, is_cuda, is_few};
use super::reduce::{UNITS, has_planes};
use crate::ops::packed::{Format, ROWS};
use crate::ops::{Mixture, RmsNorm, Stack, Weight};

/// Whether the kernels take a layer with these experts.
pub(crate) fn takes_mixture(h: &Tensor<2>, mixture: &Mixture<'_>) -> bool {
    let stack = mixture.stack;
    let alike = |weight: &Weight| Stored::of(weight) == Stored::of(&stack.gate);
    let [gate, up, down] = mixture.shared;
    let shared_is_few = [gate, up].into_iter().all(|linear| is_few(h, linear))
        && Stored::of(&down.weight).is_some();
    h.dims()[0] == 1
        && stack.count <= UNITS
        && Stored::of(&stack.gate).is_some()
        && [&stack.up, &stack.down].into_iter().all(alike)
        && is_few(h, mixture.router)
        && Stored::of(&mixture.router.weight) == Stored::of(&mixture.shared_gate.weight)
        && shared_is_few
}

/// As [`crate::ops::experts`] for one token, whose experts are chosen here; for what [`takes_mixture`].
pub(crate) fn mixture(h: Tensor<2>, norm: &RmsNorm, mixture: &Mixture<'_>) -> Tensor<2> {
    let stack = mixture.stack;
    let k = mixture.num_experts_per_tok;
    let x = rms_norm(&h, norm);
    let took = "`takes_mixture` was asked";
    let scores = few(Input::Plain(&x), &[mixture.router, mixture.shared_gate]).expect(took);
    let (ids, weights) = route(&cube(scores), stack.count, k, mixture.norm_topk_prob);
    let [gate, up, down] = mixture.shared;
    let shared = gated_few(Input::Plain(&x), gate, up).expect(took);
    let shared = few(Input::Plain(&shared), &[down]).expect(took);
    let x = cube(x);
    let gated = visits(&x, &ids, [&stack.gate, &stack.up], stack, true, k);
    let parts = visits(&gated, &ids, [&stack.down; 2], stack, false, k);
    let h = own(cube(h));
    let cols = h.meta.shape()[1];
    let client = h.client.clone();
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: a unit below `cols` adds to its element of `h` those of the `k` rows of `parts`, and of `shared`.
    unsafe {
        grouped::combine::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, cols, dim),
            dim,
            parts.into_buffer_arg(),
            cube(shared).into_buffer_arg(),
            weights.into_buffer_arg(),
            h.clone().into_buffer_arg(),
            cols as u32,
            k,
        );
    }
    tensor(h)
}

/// The `k` experts of the token, and what they and the shared one count.
fn route(scores: &CubeTensor, experts: usize, k: usize, normed: bool) -> (CubeTensor, CubeTensor) {
    let ids = empty(scores, [k], DType::I32);
    let weights = empty(scores, [k + 1], DType::F32);
    let client = scores.client.clone();
    // SAFETY: one cube reads the scores of all experts and of the gate behind them, and writes both.
    unsafe {
        grouped::route::launch_unchecked(
            &client,
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            scores.clone().into_buffer_arg(),
            ids.clone().into_buffer_arg(),
            weights.clone().into_buffer_arg(),
            experts as u32,
            k,
            normed,
        );
    }
    (ids, weights)
}

/// Products with the matrices of the experts `ids`, `[k, rows]`; `gated` of both, else of the first. `x` has one row,
/// or one for each.
fn visits(
    x: &CubeTensor,
    ids: &CubeTensor,
    matrices: [&Weight; 2],
    stack: &Stack,
    gated: bool,
    k: usize,
) -> CubeTensor {
    let [each_row, cols] = x.meta.shape().dims::<2>();
    let each = each_row > 1;
    let client = x.client.clone();
    let planes = has_planes(&client);
    let dim = CubeDim::new_1d(UNITS as u32);
    let rows = match matrices[0] {
        Weight::Dense(all) => all.dims()[0] / stack.count,
        Weight::Packed { shape, .. } => shape.rows,
    };
    let out = empty(x, [k, rows], DType::F32);
    let buffers = matrices.map(|matrix| match matrix {
        Weight::Dense(all) => cube(all.clone()),
        Weight::Packed { bytes, .. } => cube(bytes.clone()),
    });
    let [w0, w1] = buffers;
    let stored = Stored::of(matrices[0]).expect("`takes_mixture` was asked");
    // SAFETY: cube (part, visit) reads the matrix of its visit, whose id is below the number of experts that the
    // buffers hold, and its row of `x`; it writes its part of row `visit` of `out`.
    unsafe {
        match stored {
            Stored::Dense(numbers) => {
                let vectors = cols / numbers.per_vector();
                let group = group_units(rows * k, vectors);
                let plan = VisitPlan {
                    numbers,
                    group,
                    ahead: (vectors / group).clamp(1, 4),
                    gated,
                    each,
                    planes,
                };
                grouped::dense_visits::launch_unchecked(
                    &client,
                    CubeCount::Static(rows.div_ceil(UNITS / group) as u32, k as u32, 1),
                    dim,
                    x.clone().into_buffer_arg(),
                    ids.clone().into_buffer_arg(),
                    w0.into_buffer_arg(),
                    w1.into_buffer_arg(),
                    out.clone().into_buffer_arg(),
                    rows as u32,
                    vectors as u32,
                    plan,
                );
            }
            Stored::Packed(format) => {
                let eight_bits = format == Format::Q8;
                let plan = PackedPlan {
                    eight_bits,
                    n: 1,
                    matrices: 1,
                    gated,
                    normed: false,
                    biased: false,
                    adds: false,
                    planes,
                    ahead: packed::ahead(cols, eight_bits, gated),
                    halves: is_cuda(&client),
                };
                let (rows, fours) = (rows as u32, cols as u32 / 4);
                grouped::packed_visits::launch_unchecked(
                    &client,
                    CubeCount::Static(rows.div_ceil(ROWS as u32), k as u32, 1),
                    dim,
                    x.clone().into_buffer_arg(),
                    ids.clone().into_buffer_arg(),
                    w0.into_buffer_arg(),
                    w1.into_buffer_arg(),
                    out.clone().into_buffer_arg(),
                    SizesLaunch::new(rows, rows, rows, fours, 1, 0.0, 1.0),
                    each,
                    plan,
                );
            }
        }
    }
    out
}
