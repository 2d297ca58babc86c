//! The processor: our operations on burn-flex tensors, through burn's backend extension.
#![allow(unsafe_code)]

mod attention;
mod bf16_gemm;
mod elementwise;
mod matmul;
pub(crate) mod pool;
mod quantized;
pub(crate) mod simd;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Int, Shape, Tensor, TensorData};
use burn_flex::{Flex, FlexTensor};
use half::{bf16, f16};

use super::{Visible, packed};
use attention::Attention;
use matmul::Linear;
use simd::Isa;

/// The operations that burn's backends are extended by; shapes as in `ops/mod.rs`.
#[backend_extension(Flex)]
pub(crate) trait Qwen2Ops: Backend {
    fn qwen2_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
    fn qwen2_linear_bias(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
    /// `cols` is the width of `x`; `q8`: eight bits, else four.
    fn qwen2_packed_linear(
        x: FloatTensor<Self>,
        weight: IntTensor<Self>,
        rows: usize,
        q8: bool,
    ) -> FloatTensor<Self>;
    fn qwen2_packed_linear_bias(
        x: FloatTensor<Self>,
        weight: IntTensor<Self>,
        bias: FloatTensor<Self>,
        rows: usize,
        q8: bool,
    ) -> FloatTensor<Self>;
    fn qwen2_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self>;
    fn qwen2_rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
    fn qwen2_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
    fn qwen2_attention(
        q: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        n_past: usize,
        window: usize,
    ) -> FloatTensor<Self>;
}

impl Qwen2Ops for Flex {
    fn qwen2_linear(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
        flex_linear(&x, &weight, None)
    }

    fn qwen2_linear_bias(x: FlexTensor, weight: FlexTensor, bias: FlexTensor) -> FlexTensor {
        flex_linear(&x, &weight, Some(&bias))
    }

    fn qwen2_packed_linear(x: FlexTensor, weight: FlexTensor, rows: usize, q8: bool) -> FlexTensor {
        flex_packed_linear(&x, &weight, None, rows, q8)
    }

    fn qwen2_packed_linear_bias(
        x: FlexTensor,
        weight: FlexTensor,
        bias: FlexTensor,
        rows: usize,
        q8: bool,
    ) -> FlexTensor {
        flex_packed_linear(&x, &weight, Some(&bias), rows, q8)
    }

    fn qwen2_rms_norm(x: FlexTensor, weight: FlexTensor, eps: f64) -> FlexTensor {
        let (x, weight) = (x.to_contiguous(), as_f32(&weight));
        let shape = x.layout().shape().clone();
        let mut out = vec![0.0; shape.num_elements()];
        elementwise::rms_norm(
            Isa::selected(),
            elements(&x),
            elements(&weight),
            eps as f32,
            &mut out,
        );
        tensor(out, shape)
    }

    fn qwen2_rope(x: FlexTensor, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
        let (mut x, cos, sin) = (x.to_contiguous(), cos.to_contiguous(), sin.to_contiguous());
        let [heads, half] = [x.layout().shape()[1], cos.layout().shape()[1]];
        let (cos, sin) = (elements(&cos), elements(&sin));
        elementwise::rope(
            Isa::selected(),
            x.storage_mut::<f32>(),
            heads,
            cos,
            sin,
            half,
        );
        x
    }

    fn qwen2_swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        let (mut gate, up) = (gate.to_contiguous(), up.to_contiguous());
        elementwise::swiglu(Isa::selected(), gate.storage_mut::<f32>(), elements(&up));
        gate
    }

    fn qwen2_attention(
        q: FlexTensor,
        keys: FlexTensor,
        values: FlexTensor,
        n_past: usize,
        window: usize,
    ) -> FlexTensor {
        let window = (window < usize::MAX).then_some(window);
        let visible = Visible { n_past, window };
        let q = q.to_contiguous();
        match keys.dtype() {
            DType::F32 => flex_attention::<f32>(&q, &keys, &values, visible),
            DType::BF16 => flex_attention::<bf16>(&q, &keys, &values, visible),
            DType::F16 => flex_attention::<f16>(&q, &keys, &values, visible),
            other => unreachable!("caches are made as f32, bf16 or f16, not {other:?}"),
        }
    }
}

/// Whether the tensor lives where these kernels run.
pub(crate) fn takes<const D: usize>(x: &Tensor<D>) -> bool {
    x.device() == burn::tensor::Device::flex()
}

pub(crate) fn linear(x: Tensor<2>, weight: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
    let (x, weight) = (x.into_dispatch(), weight.clone().into_dispatch());
    Tensor::from_dispatch(match bias {
        Some(bias) => Dispatch::qwen2_linear_bias(x, weight, bias.clone().into_dispatch()),
        None => Dispatch::qwen2_linear(x, weight),
    })
}

pub(crate) fn packed_linear(
    x: Tensor<2>,
    shape: packed::Shape,
    bytes: &Tensor<1, Int>,
    bias: Option<&Tensor<1>>,
) -> Tensor<2> {
    let (x, bytes) = (x.into_dispatch(), bytes.clone().into_dispatch());
    let (rows, q8) = (shape.rows, shape.format == packed::Format::Q8);
    Tensor::from_dispatch(match bias {
        Some(bias) => {
            Dispatch::qwen2_packed_linear_bias(x, bytes, bias.clone().into_dispatch(), rows, q8)
        }
        None => Dispatch::qwen2_packed_linear(x, bytes, rows, q8),
    })
}

/// Rows of a packed table, read where they lie.
pub(crate) fn packed_embed(
    shape: packed::Shape,
    bytes: &Tensor<1, Int>,
    tokens: &[u32],
) -> Tensor<2> {
    let device = bytes.device();
    let Ok(table) = bytes.clone().try_into_primitive::<Flex>() else {
        unreachable!("the caller checked the device");
    };
    let mut rows = vec![0.0; tokens.len() * shape.cols];
    for (token, row) in tokens.iter().zip(rows.chunks_exact_mut(shape.cols)) {
        shape.unpack_row(table.bytes(), *token as usize, row);
    }
    Tensor::from_data(
        TensorData::new(rows, [tokens.len(), shape.cols]),
        (&device, DType::F32),
    )
}

pub(crate) fn rms_norm(x: Tensor<2>, weight: &Tensor<1>, eps: f64) -> Tensor<2> {
    let weight = weight.clone().into_dispatch();
    Tensor::from_dispatch(Dispatch::qwen2_rms_norm(x.into_dispatch(), weight, eps))
}

pub(crate) fn rope(x: Tensor<3>, cos: &Tensor<2>, sin: &Tensor<2>) -> Tensor<3> {
    let (cos, sin) = (cos.clone().into_dispatch(), sin.clone().into_dispatch());
    Tensor::from_dispatch(Dispatch::qwen2_rope(x.into_dispatch(), cos, sin))
}

pub(crate) fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::qwen2_swiglu(
        gate.into_dispatch(),
        up.into_dispatch(),
    ))
}

pub(crate) fn attention(
    q: Tensor<3>,
    keys: &Tensor<3>,
    values: &Tensor<3>,
    visible: Visible,
) -> Tensor<2> {
    let (keys, values) = (keys.clone().into_dispatch(), values.clone().into_dispatch());
    let window = visible.window.unwrap_or(usize::MAX);
    let out = Dispatch::qwen2_attention(q.into_dispatch(), keys, values, visible.n_past, window);
    Tensor::from_dispatch(out)
}

fn flex_linear(x: &FlexTensor, weight: &FlexTensor, bias: Option<&FlexTensor>) -> FlexTensor {
    let x = x.to_contiguous();
    let bias = bias.map(as_f32);
    let bias = bias.as_ref().map(elements::<f32>);
    match weight.dtype() {
        DType::F32 => linear_stored::<f32>(&x, weight, bias),
        #[cfg(target_arch = "x86_64")]
        DType::BF16 if takes_bf16_products(&x) => many_by_bf16(&x, weight, bias),
        DType::BF16 => linear_stored::<bf16>(&x, weight, bias),
        DType::F16 => linear_stored::<f16>(&x, weight, bias),
        other => unreachable!("weights are loaded as f32, bf16 or f16, not {other:?}"),
    }
}

/// Whether the bf16 dot products are wanted, there, and worth it.
#[cfg(target_arch = "x86_64")]
fn takes_bf16_products(x: &FlexTensor) -> bool {
    let n = x.layout().shape()[0];
    pool::takes_bf16_products()
        && n >= bf16_gemm::MIN_TOKENS
        && Isa::selected() >= Isa::Avx512
        && bf16_gemm::is_present()
}

#[cfg(target_arch = "x86_64")]
fn many_by_bf16(x: &FlexTensor, weight: &FlexTensor, bias: Option<&[f32]>) -> FlexTensor {
    let [n, inner] = [x.layout().shape()[0], x.layout().shape()[1]];
    let outer = weight.layout().shape()[0];
    let mut out = vec![0.0; n * outer];
    let args = Linear {
        x: elements(x),
        weight: elements::<bf16>(weight),
        bias,
        inner,
        outer,
    };
    bf16_gemm::linear(args, &mut out);
    tensor(out, Shape::new([n, outer]))
}

fn linear_stored<W: simd::Stored + burn::tensor::Element + bytemuck::Pod>(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&[f32]>,
) -> FlexTensor {
    let [n, inner] = [x.layout().shape()[0], x.layout().shape()[1]];
    let outer = weight.layout().shape()[0];
    let mut out = vec![0.0; n * outer];
    let args = Linear {
        x: elements(x),
        weight: elements::<W>(weight),
        bias,
        inner,
        outer,
    };
    matmul::linear(Isa::selected(), args, &mut out);
    tensor(out, Shape::new([n, outer]))
}

fn flex_packed_linear(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&FlexTensor>,
    rows: usize,
    q8: bool,
) -> FlexTensor {
    let x = x.to_contiguous();
    let bias = bias.map(as_f32);
    let [n, cols] = [x.layout().shape()[0], x.layout().shape()[1]];
    let format = if q8 {
        packed::Format::Q8
    } else {
        packed::Format::Q4
    };
    let weight = quantized::Packed {
        shape: packed::Shape { format, rows, cols },
        bytes: weight.bytes(),
        bias: bias.as_ref().map(elements::<f32>),
    };
    let mut out = vec![0.0; n * rows];
    let isa = Isa::selected();
    quantized::linear(
        isa,
        &quantized::Activations::new(isa, elements(&x), cols),
        weight,
        &mut out,
    );
    tensor(out, Shape::new([n, rows]))
}

fn flex_attention<W: simd::Stored + burn::tensor::Element + bytemuck::Pod>(
    q: &FlexTensor,
    keys: &FlexTensor,
    values: &FlexTensor,
    visible: Visible,
) -> FlexTensor {
    let [n, heads, head_dim] = [0, 1, 2].map(|i| q.layout().shape()[i]);
    let [kv_heads, capacity] = [0, 1].map(|i| keys.layout().shape()[i]);
    let mut out = vec![0.0; n * heads * head_dim];
    let (keys, values) = (elements::<W>(keys), elements::<W>(values));
    let q = elements(q);
    let args = Attention {
        q,
        keys,
        values,
        heads,
        kv_heads,
        head_dim,
        capacity,
        visible,
    };
    attention::attention(Isa::selected(), args, &mut out);
    tensor(out, Shape::new([n, heads * head_dim]))
}

fn as_f32(tensor: &FlexTensor) -> FlexTensor {
    use burn::backend::ops::FloatTensorOps as _;
    let tensor = tensor.to_contiguous();
    if tensor.dtype() == DType::F32 {
        return tensor;
    }
    Flex::float_cast(tensor, burn::tensor::FloatDType::F32)
}

/// The elements of a contiguous tensor.
fn elements<E: burn::tensor::Element + bytemuck::Pod>(tensor: &FlexTensor) -> &[E] {
    let Some((start, end)) = tensor.layout().contiguous_offsets() else {
        unreachable!("the callers made it contiguous");
    };
    &tensor.storage::<E>()[start..end]
}

fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}
