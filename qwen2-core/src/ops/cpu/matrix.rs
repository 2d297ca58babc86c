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
use super::{bf16_gemm, interleave::Weights};
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

    /// The form of `n` tokens' activations that its product takes.
    fn form(&self, isa: Isa, n: usize) -> Form {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Packed(..) | Self::PackedBias(..) if bf16_gemm::is_for_packed(isa, n) => {
                Form::Rounded
            }
            Self::Packed(..) | Self::PackedBias(..) => Form::Quantized,
            #[cfg(target_arch = "x86_64")]
            Self::Dense(weight) | Self::DenseBias(weight, _)
                if weight.dtype() == DType::BF16 && bf16_gemm::is_for_dense(isa, n) =>
            {
                Form::Rounded
            }
            Self::Dense(_) | Self::DenseBias(..) => Form::Plain,
        }
    }

    /// As products of bf16 take it.
    ///
    /// # Panics
    /// If it is dense and not of bf16.
    #[cfg(target_arch = "x86_64")]
    fn weights(&self) -> Weights<'_> {
        match self {
            Self::Dense(weight) | Self::DenseBias(weight, _) => {
                Weights::Dense(elements(weight), weight.layout().shape()[1])
            }
            Self::Packed(bytes, shape) | Self::PackedBias(bytes, shape, _) => {
                Weights::Packed(bytes.bytes(), *shape)
            }
        }
    }

    /// The product with `input` as tasks; `total`: the rows of all the products of the job.
    pub(crate) fn product<'a>(
        &'a self,
        input: &'a Input<'_>,
        target: Target<'a>,
        total: usize,
    ) -> Box<dyn Product + 'a> {
        match (self, self.form(input.isa, input.n)) {
            #[cfg(target_arch = "x86_64")]
            (_, Form::Rounded) => {
                let (weights, x) = (self.weights(), input.rounded());
                Box::new(bf16_gemm::Blocks::new(input.isa, weights, x, target))
            }
            (Self::Dense(weight) | Self::DenseBias(weight, _), _) => {
                input.dense(weight, target, total)
            }
            (Self::Packed(bytes, shape) | Self::PackedBias(bytes, shape, _), _) => {
                let args = input.packed(bytes, *shape);
                Box::new(quantized::Panels::new(input.isa, args, target, total))
            }
        }
    }
}

/// A form of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// f32.
    Plain,
    /// Eight bits.
    Quantized,
    /// bf16.
    #[cfg(target_arch = "x86_64")]
    Rounded,
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
        let (isa, n) = (Isa::selected(), x.len() / width);
        let wanted = |form| matrices.iter().any(|matrix| matrix.form(isa, n) == form);
        Self {
            isa,
            n,
            x,
            width,
            quantized: wanted(Form::Quantized).then(|| Activations::new(isa, x, width)),
            #[cfg(target_arch = "x86_64")]
            rounded: wanted(Form::Rounded).then(|| bf16_gemm::Rounded::new(x, width)),
        }
    }

    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// SwiGLU in the form that `down` takes, where its tasks make that themselves: of many tokens, if
    /// the three take the same.
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
        let form = down.form(self.isa, self.n);
        if [gate, up]
            .iter()
            .any(|m| m.form(self.isa, self.n) != form || m.bias().is_some())
        {
            return None;
        }
        match (form, gate, up) {
            #[cfg(target_arch = "x86_64")]
            (Form::Rounded, ..) => {
                let (gate, up) = (gate.weights(), up.weights());
                out.rounded = Some(bf16_gemm::swiglu(self.isa, gate, up, self.rounded()));
            }
            (Form::Quantized, Matrix::Packed(gate, shape), Matrix::Packed(up, up_shape))
                if self.n >= quantized::MANY =>
            {
                let (gate, up) = (self.packed(gate, *shape), self.packed(up, *up_shape));
                out.quantized = Some(quantized::swiglu(self.isa, gate, up));
            }
            _ => return None,
        }
        Some(out)
    }

    #[cfg(target_arch = "x86_64")]
    fn rounded(&self) -> &bf16_gemm::Rounded {
        let Some(x) = &self.rounded else {
            unreachable!("made when a matrix takes it");
        };
        x
    }

    fn packed<'b>(&'b self, bytes: &'b FlexTensor, shape: packed::Shape) -> quantized::Packed<'b> {
        let Some(x) = &self.quantized else {
            unreachable!("made when a matrix takes it");
        };
        let bytes = bytes.bytes();
        quantized::Packed { x, shape, bytes }
    }

    fn dense<'b>(
        &'b self,
        weight: &'b FlexTensor,
        target: Target<'b>,
        total: usize,
    ) -> Box<dyn Product + 'b> {
        match weight.dtype() {
            DType::F32 => self.stored::<f32>(weight, target, total),
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
