//! SwiGLU (arXiv:2002.05202): `down(silu(gate(x)) · up(x))`.

use burn::tensor::Tensor;

use crate::ops::{self, Linear, RmsNorm};

#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
}

impl Mlp {
    /// `h + mlp(norm(h))`, `[n, hidden]`.
    pub(crate) fn forward(&self, h: Tensor<2>, norm: &RmsNorm) -> Tensor<2> {
        ops::mlp(h, norm, self.linears())
    }

    /// Gate, up and down.
    pub(super) fn linears(&self) -> [&Linear; 3] {
        [&self.gate_proj, &self.up_proj, &self.down_proj]
    }
}
