//! Adapters beside matrices (LoRA, arXiv:2106.09685): `y = x Wᵀ + Σ (x downᵀ) upᵀ`, by the operations
//! that the matrices go through.

use burn::tensor::{DType, IndexingUpdateOp, Tensor, TensorData, activation};

use super::portable::{self, ids};
use super::{Linear, RmsNorm, Visit, base_add_project, base_project};

/// What an adapter adds to a matrix: `down` `[rank, in_features]`, `up` `[out_features, rank]`, scaled.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    pub(crate) down: Linear,
    pub(crate) up: Linear,
}

/// Adds to `y`, the product of `norm(x)` with the matrices side by side, what their adapters give.
pub(super) fn add_normed(
    mut y: Tensor<2>,
    x: &Tensor<2>,
    norm: &RmsNorm,
    matrices: &[&Linear],
) -> Tensor<2> {
    let [n, _] = y.dims();
    let mut first = 0;
    for matrix in matrices {
        let columns = first..first + matrix.out_features();
        first = columns.end;
        for LowRank { down, up } in &matrix.adapters {
            let low = base_project(x, norm, [down]);
            let part = y.clone().slice([0..n, columns.clone()]);
            let part = base_add_project(part, low, up);
            y = y.slice_assign([0..n, columns.clone()], part);
        }
    }
    y
}

/// Adds to `y`, the product of `x` with the matrix, what its adapters give.
pub(super) fn add(y: Tensor<2>, x: &Tensor<2>, matrix: &Linear) -> Tensor<2> {
    matrix.adapters.iter().fold(y, |y, LowRank { down, up }| {
        base_add_project(y, product(x, down), up)
    })
}

/// `silu(gate) · up` of the two products side by side, `[n, 2 · intermediate]`.
pub(super) fn gated(products: Tensor<2>) -> Tensor<2> {
    let width = products.dims()[1] / 2;
    let gate = products.clone().narrow(1, 0, width);
    activation::silu(gate) * products.narrow(1, width, width)
}

/// As [`super::experts`], visit by visit.
pub(super) fn experts(h: Tensor<2>, norm: &RmsNorm, visits: Vec<Visit<'_>>) -> Tensor<2> {
    let device = h.device();
    let x = portable::rms_norm(h.clone(), norm);
    visits.into_iter().fold(h, |h, visit| {
        let tokens = ids(&visit.route.tokens, &device);
        let rows = x.clone().select(0, tokens.clone());
        let through = |x: &Tensor<2>, matrix| add(product(x, matrix), x, matrix);
        let gated = activation::silu(through(&rows, visit.gate)) * through(&rows, visit.up);
        let y = through(&gated, visit.down);
        let n = visit.route.weights.len();
        let weights = TensorData::new(visit.route.weights, [n, 1]);
        let y = y * Tensor::from_data(weights, (&device, DType::F32));
        h.select_assign(0, tokens, y, IndexingUpdateOp::Add)
    })
}

/// `x Wᵀ`, without adapters.
fn product(x: &Tensor<2>, matrix: &Linear) -> Tensor<2> {
    let zero = Tensor::zeros(
        [x.dims()[0], matrix.out_features()],
        (&x.device(), DType::F32),
    );
    base_add_project(zero, x.clone(), matrix)
}
