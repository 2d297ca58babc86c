//! One matrix of the network, dense in the precision it is stored in, or packed.

use burn::tensor::{Int, Tensor};

use crate::ops::{self, packed};

/// `y = x Wᵀ + b`, the weight `[out_features, in_features]`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Tensor<1>>,
}

/// A matrix as the loader chose to keep it.
#[derive(Debug, Clone)]
pub(crate) enum Weight {
    /// `[out_features, in_features]`, as checkpoints store it.
    Dense(Tensor<2>),
    /// Blocks of few bits, bytes in the order of `ops/packed.rs`.
    Packed {
        shape: packed::Shape,
        bytes: Tensor<1, Int>,
    },
}

impl Linear {
    /// `x` `[n, in_features]` → `[n, out_features]`, f32.
    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.weight.multiply(x, self.bias.as_ref())
    }
}

impl Weight {
    /// `x Wᵀ + b`: `x` `[n, in_features]` → `[n, out_features]`, f32.
    pub(crate) fn multiply(&self, x: Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
        match self {
            Self::Dense(weight) => ops::linear(x, weight, bias),
            Self::Packed { shape, bytes } => ops::packed_linear(x, *shape, bytes, bias),
        }
    }

    /// Rows `tokens` as f32, `[n, in_features]`: the matrix as an embedding table.
    pub(crate) fn rows(&self, tokens: &[u32]) -> Tensor<2> {
        match self {
            Self::Dense(weight) => ops::embed(weight, tokens),
            Self::Packed { shape, bytes } => ops::packed_embed(*shape, bytes, tokens),
        }
    }
}
