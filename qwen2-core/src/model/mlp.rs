//! SwiGLU (arXiv:2002.05202): `down(silu(gate(x)) · up(x))`.

use burn::tensor::Tensor;

use crate::ops::{self, Linear, RmsNorm};
use crate::profile::part;

#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
}

impl Mlp {
    /// `h + mlp(norm(h))`, `[n, hidden]`.
    pub(crate) fn forward(&self, h: Tensor<2>, norm: &RmsNorm) -> Tensor<2> {
        // [n, intermediate]
        let gated = part("norm, gate up", || {
            ops::swiglu(&h, norm, &self.gate_proj, &self.up_proj)
        });
        part("down, add", || ops::add_project(h, gated, &self.down_proj))
    }
}
