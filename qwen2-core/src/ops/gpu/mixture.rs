//! A mixture of experts for a few tokens, all of it on the device: which kernels, in which order.

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
    stack.count <= UNITS
        && Stored::of(&stack.gate).is_some()
        && [&stack.up, &stack.down].into_iter().all(alike)
        && is_few(h, mixture.router)
        && Stored::of(&mixture.router.weight) == Stored::of(&mixture.shared_gate.weight)
        && shared_is_few
}

/// As [`crate::ops::experts`] for a few tokens, whose experts are chosen here; for what [`takes_mixture`].
pub(crate) fn mixture(h: Tensor<2>, norm: &RmsNorm, mixture: &Mixture<'_>) -> Tensor<2> {
    let stack = mixture.stack;
    let k = mixture.num_experts_per_tok;
    let x = rms_norm(&h, norm, DType::F32);
    let took = "`takes_mixture` was asked";
    let scores = few(Input::Plain(&x), &[mixture.router, mixture.shared_gate]).expect(took);
    let (ids, weights) = route(&cube(scores), stack.count, k, mixture.norm_topk_prob);
    let [gate, up, down] = mixture.shared;
    let shared = gated_few(Input::Plain(&x), gate, up).expect(took);
    let shared = few(Input::Plain(&shared), &[down]).expect(took);
    let x = cube(x);
    let gated = visits(&x, &ids, [&stack.gate, &stack.up], stack, true);
    let parts = visits(&gated, &ids, [&stack.down; 2], stack, false);
    let h = own(cube(h));
    let [n, cols] = h.meta.shape().dims::<2>();
    let total = n * cols;
    let client = h.client.clone();
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: a unit below `total` adds to its element of `h` those of its token's `k` rows of `parts`, and of `shared`.
    unsafe {
        grouped::combine::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, total, dim),
            dim,
            parts.into_buffer_arg(),
            cube(shared).into_buffer_arg(),
            weights.into_buffer_arg(),
            h.clone().into_buffer_arg(),
            cols as u32,
            total as u32,
            k,
        );
    }
    tensor(h)
}

/// The `k` experts of each token, and what they and the shared one count.
fn route(scores: &CubeTensor, experts: usize, k: usize, normed: bool) -> (CubeTensor, CubeTensor) {
    let n = scores.meta.shape()[0];
    let ids = empty(scores, [n * k], DType::I32);
    let weights = empty(scores, [n, k + 1], DType::F32);
    let client = scores.client.clone();
    // SAFETY: a cube a token reads its scores of all experts and of the gate behind them, and writes its part of both.
    unsafe {
        grouped::route::launch_unchecked(
            &client,
            CubeCount::Static(n as u32, 1, 1),
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

/// Products with the matrices of the experts `ids`, `[visits, rows]`; `gated` of both, else of the first. As many visits
/// share a row of `x` as there are for each.
fn visits(
    x: &CubeTensor,
    ids: &CubeTensor,
    matrices: [&Weight; 2],
    stack: &Stack,
    gated: bool,
) -> CubeTensor {
    let [n, cols] = x.meta.shape().dims::<2>();
    let all = ids.meta.shape()[0];
    let per_row = all / n;
    let client = x.client.clone();
    let planes = has_planes(&client);
    let dim = CubeDim::new_1d(UNITS as u32);
    let rows = match matrices[0] {
        Weight::Dense(all) => all.dims()[0] / stack.count,
        Weight::Packed { shape, .. } => shape.rows,
    };
    let out = empty(x, [all, rows], DType::F32);
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
                let group = group_units(rows * all, vectors);
                let plan = VisitPlan {
                    numbers,
                    group,
                    ahead: (vectors / group).clamp(1, 4),
                    gated,
                    per_row,
                    planes,
                };
                grouped::dense_visits::launch_unchecked(
                    &client,
                    CubeCount::Static(rows.div_ceil(UNITS / group) as u32, all as u32, 1),
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
                    CubeCount::Static(rows.div_ceil(ROWS as u32), all as u32, 1),
                    dim,
                    x.clone().into_buffer_arg(),
                    ids.clone().into_buffer_arg(),
                    w0.into_buffer_arg(),
                    w1.into_buffer_arg(),
                    out.clone().into_buffer_arg(),
                    SizesLaunch::new(rows, rows, rows, fours, 1, 0.0, 1.0),
                    per_row,
                    plan,
                );
            }
        }
    }
    out
}
