//! The matrices of a call as burn's extension takes them, and the product of activations with each.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, ExtensionType};
use burn::tensor::{DType, Tensor};
use burn_flex::{Flex, FlexTensor};
use half::{bf16, f16};

use super::activations::Activations;
use super::product::{Finish, Pair, Product, Target, run_all};
use super::simd::{self, Isa};
#[cfg(target_arch = "x86_64")]
use super::{bf16_gemm, pool};
use super::{matmul, quantized};
use crate::ops::{Linear, Weight, packed};

/// A matrix in the form that the kernels take.
#[derive(ExtensionType)]
pub(crate) enum Matrix<B: Backend> {
    Dense(FloatTensor<B>),
    DenseBias(FloatTensor<B>, FloatTensor<B>),
    Packed(IntTensor<B>, packed::Shape),
    PackedBias(IntTensor<B>, packed::Shape, FloatTensor<B>),
}

/// The parameters as the extension's types.
pub(crate) fn matrix(linear: &Linear) -> Matrix<Dispatch> {
    let bias = linear.bias.clone().map(Tensor::into_dispatch);
    match (&linear.weight, bias) {
        (Weight::Dense(weight), None) => Matrix::Dense(weight.clone().into_dispatch()),
        (Weight::Dense(weight), Some(bias)) => {
            Matrix::DenseBias(weight.clone().into_dispatch(), bias)
        }
        (Weight::Packed { shape, bytes }, None) => {
            Matrix::Packed(bytes.clone().into_dispatch(), *shape)
        }
        (Weight::Packed { shape, bytes }, Some(bias)) => {
            Matrix::PackedBias(bytes.clone().into_dispatch(), *shape, bias)
        }
    }
}

impl Matrix<Flex> {
    /// `out_features`.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Dense(weight) | Self::DenseBias(weight, _) => weight.layout().shape()[0],
            Self::Packed(_, shape) | Self::PackedBias(_, shape, _) => shape.rows,
        }
    }

    /// Whether the other is of the same shape and kept alike, so that its products are cut alike.
    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Dense(a) | Self::DenseBias(a, _), Self::Dense(b) | Self::DenseBias(b, _)) => {
                a.dtype() == b.dtype() && a.layout().shape() == b.layout().shape()
            }
            (
                Self::Packed(_, a) | Self::PackedBias(_, a, _),
                Self::Packed(_, b) | Self::PackedBias(_, b, _),
            ) => a == b,
            _ => false,
        }
    }

    /// Biases are loaded as f32.
    pub(crate) fn bias(&self) -> Option<&[f32]> {
        match self {
            Self::Dense(_) | Self::Packed(..) => None,
            Self::DenseBias(_, bias) | Self::PackedBias(_, _, bias) => Some(elements(bias)),
        }
    }

    /// The product with `input` as tasks; `total`: the rows of all the products of the job.
    pub(crate) fn product<'a>(
        &'a self,
        input: &'a Input<'_>,
        target: Target<'a>,
        total: usize,
    ) -> Box<dyn Product + 'a> {
        match self {
            Self::Dense(weight) | Self::DenseBias(weight, _) => input.dense(weight, target, total),
            Self::Packed(bytes, shape) | Self::PackedBias(bytes, shape, _) => {
                let Some(x) = &input.quantized else {
                    unreachable!("made when the matrix is packed");
                };
                let args = packed_by(x, *shape, bytes);
                Box::new(quantized::Panels::new(input.isa, args, target, total))
            }
        }
    }
}

fn packed_by<'a>(
    x: &'a Activations,
    shape: packed::Shape,
    bytes: &'a FlexTensor,
) -> quantized::Packed<'a> {
    let bytes = bytes.bytes();
    quantized::Packed { x, shape, bytes }
}

/// A product that stores gates, and the one that multiplies them with its sums; `alike`: both are cut
/// alike.
pub(crate) struct Gated<'a> {
    gates: Box<dyn Product + 'a>,
    ups: Box<dyn Product + 'a>,
    alike: bool,
}

impl<'a> Gated<'a> {
    /// SwiGLU of `input` into `out`, `[n, intermediate]`; `total` as in [`Matrix::product`].
    pub(crate) fn new(
        (gate, up): (&'a Matrix<Flex>, &'a Matrix<Flex>),
        input: &'a Input<'_>,
        out: &mut [f32],
        total: usize,
    ) -> Self {
        let width = gate.rows();
        let mut target = |finish| Target::new(out, width, 0..width, finish, None);
        Self {
            alike: gate.is_like(up),
            gates: gate.product(input, target(Finish::Store), total),
            ups: up.product(input, target(Finish::Gate), total),
        }
    }

    /// Does all of them: each task its share of both products, or where those are not cut alike, the
    /// gates first.
    pub(crate) fn run_all(list: Vec<Self>) {
        if list.iter().all(|gated| gated.alike) {
            let pairs: Vec<_> = list
                .into_iter()
                .map(|gated| Pair(gated.gates, gated.ups))
                .collect();
            return run_all(
                &pairs
                    .iter()
                    .map(|pair| pair as &dyn Product)
                    .collect::<Vec<_>>(),
            );
        }
        run_all(&list.iter().map(|gated| &*gated.gates).collect::<Vec<_>>());
        run_all(&list.iter().map(|gated| &*gated.ups).collect::<Vec<_>>());
    }
}

/// Activations in every form that some matrices want them in.
pub(crate) struct Input<'a> {
    isa: Isa,
    n: usize,
    /// Empty where the numbers came in another form.
    x: &'a [f32],
    width: usize,
    quantized: Option<Activations>,
    #[cfg(target_arch = "x86_64")]
    rounded: Option<bf16_gemm::Rounded>,
}

impl<'a> Input<'a> {
    /// `x` `[n, width]`.
    pub(crate) fn new(x: &'a [f32], width: usize, matrices: &[&Matrix<Flex>]) -> Self {
        let isa = Isa::selected();
        let packed = matrices
            .iter()
            .any(|m| matches!(m, Matrix::Packed(..) | Matrix::PackedBias(..)));
        Self {
            isa,
            n: x.len() / width,
            x,
            width,
            quantized: packed.then(|| Activations::new(isa, x, width)),
            #[cfg(target_arch = "x86_64")]
            rounded: {
                let is_bf16 = |m: &&Matrix<Flex>| match m {
                    Matrix::Dense(w) | Matrix::DenseBias(w, _) => w.dtype() == DType::BF16,
                    _ => false,
                };
                // Only where it is wanted, there, and worth it.
                (pool::takes_bf16_products()
                    && x.len() / width >= bf16_gemm::MIN_TOKENS
                    && isa >= Isa::Avx512
                    && bf16_gemm::is_present()
                    && matrices.iter().any(is_bf16))
                .then(|| bf16_gemm::Rounded::new(x, width))
            },
        }
    }

    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// SwiGLU in the form that `down` takes, where its tasks make that themselves: of many tokens, if
    /// the three are of a kind.
    pub(crate) fn swiglu(
        &self,
        gate: &Matrix<Flex>,
        up: &Matrix<Flex>,
        down: &Matrix<Flex>,
    ) -> Option<Input<'static>> {
        let mut out = Input {
            isa: self.isa,
            n: self.n,
            x: &[],
            width: gate.rows(),
            quantized: None,
            #[cfg(target_arch = "x86_64")]
            rounded: None,
        };
        match (gate, up, down) {
            (
                Matrix::Packed(gate, shape),
                Matrix::Packed(up, up_shape),
                Matrix::Packed(..) | Matrix::PackedBias(..),
            ) if self.n >= quantized::MANY => {
                let x = self.quantized.as_ref()?;
                let (gate, up) = (packed_by(x, *shape, gate), packed_by(x, *up_shape, up));
                out.quantized = Some(quantized::swiglu(self.isa, gate, up));
            }
            #[cfg(target_arch = "x86_64")]
            (
                Matrix::Dense(gate),
                Matrix::Dense(up),
                Matrix::Dense(down) | Matrix::DenseBias(down, _),
            ) if [gate, up, down].iter().all(|w| w.dtype() == DType::BF16) => {
                let x = self.rounded.as_ref()?;
                let (gate, up) = (self.args(gate), self.args(up));
                out.rounded = Some(bf16_gemm::swiglu(self.isa, gate, up, x));
            }
            _ => return None,
        }
        Some(out)
    }

    fn dense<'b>(
        &'b self,
        weight: &'b FlexTensor,
        target: Target<'b>,
        total: usize,
    ) -> Box<dyn Product + 'b> {
        match weight.dtype() {
            DType::F32 => self.stored::<f32>(weight, target, total),
            #[cfg(target_arch = "x86_64")]
            DType::BF16 if let Some(x) = &self.rounded => Box::new(bf16_gemm::Blocks::new(
                self.isa,
                self.args(weight),
                x,
                target,
            )),
            DType::BF16 => self.stored::<bf16>(weight, target, total),
            DType::F16 => self.stored::<f16>(weight, target, total),
            other => unreachable!("weights are loaded as f32, bf16 or f16, not {other:?}"),
        }
    }

    fn stored<'b, W: Element>(
        &'b self,
        weight: &'b FlexTensor,
        target: Target<'b>,
        total: usize,
    ) -> Box<dyn Product + 'b> {
        Box::new(matmul::Rows::new(
            self.isa,
            self.args::<W>(weight),
            target,
            total,
        ))
    }

    fn args<'b, W: Element>(&'b self, weight: &'b FlexTensor) -> matmul::Linear<'b, W> {
        let outer = weight.layout().shape()[0];
        matmul::Linear {
            x: self.x,
            weight: elements(weight),
            inner: self.width,
            outer,
        }
    }
}

/// An element type of burn's that the kernels take.
pub(crate) trait Element: simd::Stored + burn::tensor::Element + bytemuck::Pod {}
impl Element for f32 {}
impl Element for bf16 {}
impl Element for f16 {}

/// The elements of a contiguous tensor.
pub(crate) fn elements<E: burn::tensor::Element + bytemuck::Pod>(tensor: &FlexTensor) -> &[E] {
    let Some((start, end)) = tensor.layout().contiguous_offsets() else {
        unreachable!("the callers made it contiguous");
    };
    &tensor.storage::<E>()[start..end]
}
