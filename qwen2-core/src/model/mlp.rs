//! SwiGLU (arXiv:2002.05202): `down(silu(gate(x)) · up(x))`.

use burn::tensor::Tensor;

use super::linear::Linear;
use crate::ops;

#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
}

impl Mlp {
    /// `x` `[n, hidden]` → `[n, hidden]`.
    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let gate = self.gate_proj.forward(x.clone()); // [n, intermediate]
        let up = self.up_proj.forward(x); // [n, intermediate]
        self.down_proj.forward(ops::swiglu(gate, up))
    }
}
