//! The processor: our operations on burn-flex tensors, through burn's backend extension.
#![allow(unsafe_code)]

mod attention;
mod bf16_gemm;
mod elementwise;
mod experts;
mod matmul;
mod matrix;
pub(crate) mod pool;
mod product;
mod quantized;
pub(crate) mod simd;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Int, Shape, Tensor, TensorData};
use burn_flex::{Flex, FlexTensor};
use half::{bf16, f16};

use super::{KeyValues, Linear, RmsNorm, RopeTables, Route, Visible, Visit, Weight, packed};
use attention::{Append, Attention};
use matrix::{Element, Gated, Input, Matrices, Matrix, elements, matrix};
use product::{Finish, Target, run_all};
use simd::Isa;

/// The operations that burn's backends are extended by; shapes as in `ops/mod.rs`.
#[backend_extension(Flex)]
pub(crate) trait Qwen2Ops: Backend {
    fn qwen2_project(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        eps: f64,
        #[extension_type] matrices: Matrices<Self>,
    ) -> FloatTensor<Self>;
    fn qwen2_screened_head(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        eps: f64,
        #[extension_type] head: Matrix<Self>,
        #[extension_type] screen: Matrix<Self>,
    ) -> FloatTensor<Self>;
    fn qwen2_add_project(
        h: FloatTensor<Self>,
        x: FloatTensor<Self>,
        #[extension_type] matrix: Matrix<Self>,
    ) -> FloatTensor<Self>;
    fn qwen2_swiglu(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        eps: f64,
        #[extension_type] gate: Matrix<Self>,
        #[extension_type] up: Matrix<Self>,
    ) -> FloatTensor<Self>;
    fn qwen2_experts(
        h: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        eps: f64,
        #[extension_type] matrices: Matrices<Self>,
        routes: Vec<Route>,
    ) -> FloatTensor<Self>;
    fn qwen2_append(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        start: usize,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    fn qwen2_attention(
        q: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        n_past: usize,
        window: usize,
    ) -> FloatTensor<Self>;
}

impl Qwen2Ops for Flex {
    fn qwen2_project(
        x: FlexTensor,
        norm: FlexTensor,
        eps: f64,
        matrices: Matrices<Self>,
    ) -> FlexTensor {
        flex_project(&x, &norm, eps, &matrices.0)
    }

    fn qwen2_screened_head(
        x: FlexTensor,
        norm: FlexTensor,
        eps: f64,
        head: Matrix<Self>,
        screen: Matrix<Self>,
    ) -> FlexTensor {
        let mut logits = flex_project(&x, &norm, eps, &[screen]);
        let (Matrix::Packed(bytes, shape), [1, width]) = (head, dims(&logits)) else {
            unreachable!("one token, and a screened head is packed");
        };
        let x = normed(&x, &norm, eps);
        let isa = Isa::selected();
        let args = quantized::Packed {
            x: &quantized::Activations::new(isa, &x, shape.cols),
            shape,
            bytes: bytes.bytes(),
        };
        let logits_out = &mut logits.storage_mut::<f32>()[..width];
        let panels = quantized::best_panels(logits_out, super::SCREENED_PANELS);
        let target = Target::new(logits_out, width, 0..width, Finish::Store, None);
        quantized::some_panels(isa, args, &panels, target);
        logits
    }

    fn qwen2_add_project(h: FlexTensor, x: FlexTensor, matrix: Matrix<Self>) -> FlexTensor {
        let mut h = h.to_contiguous();
        let x = x.to_contiguous();
        let [n, width] = dims(&h);
        let input = Input::new(elements(&x), dims::<2>(&x)[1], &[&matrix]);
        let target = Target::new(
            &mut h.storage_mut::<f32>()[..n * width],
            width,
            0..width,
            Finish::Add,
            matrix.bias(),
        );
        run_all(&[&*matrix.product(&input, target, width)]);
        h
    }

    fn qwen2_swiglu(
        x: FlexTensor,
        norm: FlexTensor,
        eps: f64,
        gate: Matrix<Self>,
        up: Matrix<Self>,
    ) -> FlexTensor {
        let x = normed(&x, &norm, eps);
        let input = Input::new(&x, norm.layout().shape()[0], &[&gate, &up]);
        let (n, width) = (input.n(), gate.rows());
        let mut out = vec![0.0; n * width];
        Gated::run_all(vec![Gated::new((&gate, &up), &input, &mut out, 2 * width)]);
        tensor(out, Shape::new([n, width]))
    }

    fn qwen2_experts(
        h: FlexTensor,
        norm: FlexTensor,
        eps: f64,
        matrices: Matrices<Self>,
        routes: Vec<Route>,
    ) -> FlexTensor {
        experts::flex_experts(h, &norm, eps, &matrices.0, &routes)
    }

    fn qwen2_append(
        qkv: FlexTensor,
        cos: FlexTensor,
        sin: FlexTensor,
        keys: FlexTensor,
        values: FlexTensor,
        start: usize,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        match keys.dtype() {
            DType::F32 => flex_append::<f32>(&qkv, &cos, &sin, keys, values, start),
            DType::BF16 => flex_append::<bf16>(&qkv, &cos, &sin, keys, values, start),
            DType::F16 => flex_append::<f16>(&qkv, &cos, &sin, keys, values, start),
            other => unreachable!("caches are made as f32, bf16 or f16, not {other:?}"),
        }
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

pub(crate) fn project<const N: usize>(
    x: &Tensor<2>,
    norm: &RmsNorm,
    matrices: [&Linear; N],
) -> Tensor<2> {
    let (x, eps) = (x.clone().into_dispatch(), norm.eps);
    let norm = norm.weight.clone().into_dispatch();
    let matrices = Matrices(matrices.map(matrix).into());
    Tensor::from_dispatch(Dispatch::qwen2_project(x, norm, eps, matrices))
}

pub(crate) fn screened_head(
    x: &Tensor<2>,
    norm: &RmsNorm,
    head: &Linear,
    screen: &Weight,
) -> Tensor<2> {
    let (x, eps) = (x.clone().into_dispatch(), norm.eps);
    let norm = norm.weight.clone().into_dispatch();
    let screen = matrix(&Linear {
        weight: screen.clone(),
        bias: None,
    });
    Tensor::from_dispatch(Dispatch::qwen2_screened_head(
        x,
        norm,
        eps,
        matrix(head),
        screen,
    ))
}

pub(crate) fn add_project(h: Tensor<2>, x: Tensor<2>, linear: &Linear) -> Tensor<2> {
    let (h, x) = (h.into_dispatch(), x.into_dispatch());
    Tensor::from_dispatch(Dispatch::qwen2_add_project(h, x, matrix(linear)))
}

pub(crate) fn swiglu(x: &Tensor<2>, norm: &RmsNorm, gate: &Linear, up: &Linear) -> Tensor<2> {
    let (x, weight) = (
        x.clone().into_dispatch(),
        norm.weight.clone().into_dispatch(),
    );
    let out = Dispatch::qwen2_swiglu(x, weight, norm.eps, matrix(gate), matrix(up));
    Tensor::from_dispatch(out)
}

pub(crate) fn experts(h: Tensor<2>, norm: &RmsNorm, visits: Vec<Visit<'_>>) -> Tensor<2> {
    let (h, eps) = (h.into_dispatch(), norm.eps);
    let norm = norm.weight.clone().into_dispatch();
    let matrices = visits
        .iter()
        .flat_map(|visit| [visit.gate, visit.up, visit.down].map(matrix))
        .collect();
    let routes = visits.into_iter().map(|visit| visit.route).collect();
    let out = Dispatch::qwen2_experts(h, norm, eps, Matrices(matrices), routes);
    Tensor::from_dispatch(out)
}

pub(crate) fn append(
    qkv: Tensor<2>,
    tables: &RopeTables,
    cache: KeyValues,
    start: usize,
) -> (Tensor<3>, KeyValues) {
    let (cos, sin) = (
        tables.cos.clone().into_dispatch(),
        tables.sin.clone().into_dispatch(),
    );
    let (keys, values) = (cache.keys.into_dispatch(), cache.values.into_dispatch());
    let (q, keys, values) =
        Dispatch::qwen2_append(qkv.into_dispatch(), cos, sin, keys, values, start);
    let cache = KeyValues {
        keys: Tensor::from_dispatch(keys),
        values: Tensor::from_dispatch(values),
    };
    (Tensor::from_dispatch(q), cache)
}

pub(crate) fn attention(q: Tensor<3>, cache: &KeyValues, visible: Visible) -> Tensor<2> {
    let (keys, values) = (
        cache.keys.clone().into_dispatch(),
        cache.values.clone().into_dispatch(),
    );
    let window = visible.window.unwrap_or(usize::MAX);
    let out = Dispatch::qwen2_attention(q.into_dispatch(), keys, values, visible.n_past, window);
    Tensor::from_dispatch(out)
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
    let bytes = table.bytes();
    elementwise::by_row(&mut rows, shape.cols, &|i, row| {
        shape.unpack_row(bytes, tokens[i] as usize, row);
    });
    Tensor::from_data(
        TensorData::new(rows, [tokens.len(), shape.cols]),
        (&device, DType::F32),
    )
}

fn flex_project(
    x: &FlexTensor,
    norm: &FlexTensor,
    eps: f64,
    matrices: &[Matrix<Flex>],
) -> FlexTensor {
    let x = normed(x, norm, eps);
    let list: Vec<_> = matrices.iter().collect();
    let input = Input::new(&x, norm.layout().shape()[0], &list);
    let (n, width) = (input.n(), matrices.iter().map(Matrix::rows).sum());
    let mut out = vec![0.0; n * width];
    let mut first = 0;
    let products: Vec<_> = matrices
        .iter()
        .map(|matrix| {
            let columns = first..first + matrix.rows();
            first = columns.end;
            let target = Target::new(&mut out, width, columns, Finish::Store, matrix.bias());
            matrix.product(&input, target, width)
        })
        .collect();
    run_all(
        &products
            .iter()
            .map(|product| &**product)
            .collect::<Vec<_>>(),
    );
    drop(products);
    tensor(out, Shape::new([n, width]))
}

/// The norm of every row.
fn normed(x: &FlexTensor, norm: &FlexTensor, eps: f64) -> Vec<f32> {
    let x = x.to_contiguous();
    let x = elements(&x);
    let mut out = vec![0.0; x.len()];
    elementwise::rms_norm(Isa::selected(), x, elements(norm), eps as f32, &mut out);
    out
}

fn flex_append<W: Element>(
    qkv: &FlexTensor,
    cos: &FlexTensor,
    sin: &FlexTensor,
    mut keys: FlexTensor,
    mut values: FlexTensor,
    start: usize,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let qkv = qkv.to_contiguous();
    let [n, width] = dims(&qkv);
    let [kv_heads, capacity, head_dim] = dims(&keys);
    let heads = width / head_dim - 2 * kv_heads;
    let tables = elementwise::Tables {
        cos: elements(cos),
        sin: elements(sin),
        half: head_dim / 2,
    };
    let mut q = vec![0.0; n * heads * head_dim];
    let (isa, new) = (Isa::selected(), elements(&qkv));
    elementwise::rotate_queries(isa, new, width, tables, &mut q);
    let append = Append {
        kv_heads,
        head_dim,
        capacity,
        start,
    };
    let (keys_out, values_out) = (keys.storage_mut::<W>(), values.storage_mut::<W>());
    elementwise::append(isa, new, width, tables, append, keys_out, values_out);
    (tensor(q, Shape::new([n, heads, head_dim])), keys, values)
}

fn flex_attention<W: Element>(
    q: &FlexTensor,
    keys: &FlexTensor,
    values: &FlexTensor,
    visible: Visible,
) -> FlexTensor {
    let [n, heads, head_dim] = dims(q);
    let [kv_heads, capacity, _] = dims(keys);
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

fn dims<const D: usize>(tensor: &FlexTensor) -> [usize; D] {
    std::array::from_fn(|i| tensor.layout().shape()[i])
}

fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}
