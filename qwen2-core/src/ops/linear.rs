//! The parameters of a network: matrices, dense in the precision they are stored in or packed, and
//! norms.

use std::ops::Range;

use burn::tensor::{Int, Tensor};

use super::{LowRank, packed};

/// `y = x Wᵀ + b`, the weight `[out_features, in_features]`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Tensor<1>>,
    /// What is added to the product.
    pub(crate) adapters: Vec<LowRank>,
}

impl Linear {
    /// Rows of the matrix.
    pub(crate) fn out_features(&self) -> usize {
        match &self.weight {
            Weight::Dense(weight) => weight.dims()[0],
            Weight::Packed { shape, .. } => shape.rows,
        }
    }
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

impl Weight {
    /// One of `n` matrices behind each other; the shape of packed ones is that of one.
    pub(crate) fn part(&self, index: usize, n: usize) -> Self {
        match self {
            Self::Dense(all) => {
                let rows = all.dims()[0] / n;
                Self::Dense(all.clone().narrow(0, index * rows, rows))
            }
            Self::Packed { shape, bytes } => {
                let len = bytes.dims()[0] / n;
                Self::Packed {
                    shape: *shape,
                    bytes: bytes.clone().narrow(0, index * len, len),
                }
            }
        }
    }

    /// Some of the rows; of a packed matrix whole panels, but for the last.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Self {
        match self {
            Self::Dense(all) => Self::Dense(all.clone().narrow(0, rows.start, rows.len())),
            Self::Packed { shape, bytes } => {
                let panel = bytes.dims()[0] / shape.panels();
                let first = rows.start / packed::ROWS;
                let shape = packed::Shape {
                    rows: rows.len(),
                    ..*shape
                };
                Self::Packed {
                    shape,
                    bytes: bytes
                        .clone()
                        .narrow(0, first * panel, shape.panels() * panel),
                }
            }
        }
    }
}

/// Root mean square norm (arXiv:1910.07467) over the last dimension.
#[derive(Debug, Clone)]
pub(crate) struct RmsNorm {
    /// `[hidden]`, f32.
    pub(crate) weight: Tensor<1>,
    pub(crate) eps: f64,
}
