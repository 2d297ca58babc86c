//! The processor: our operations on burn-flex tensors, through burn's backend extension.
#![allow(unsafe_code)]

mod activations;
mod amx;
mod attention;
mod bf16_gemm;
mod cut;
mod dense_gemm;
mod elementwise;
mod experts;
mod filled;
pub(super) mod fit;
mod interleave;
mod layout;
mod lines;
mod many;
mod matmul;
mod matrix;
mod neon;
mod neon_tile;
mod packed_tile;
pub(crate) mod pool;
mod product;
mod quantized;
pub(super) mod room;
pub(crate) mod simd;
mod x86;
mod x86_tile;

use std::mem::MaybeUninit;
use std::ops::Range;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, ExtensionType, backend_extension};
use burn::tensor::{DType, Int, Shape, Tensor, TensorData};
use burn_flex::{Flex, FlexTensor};
use half::{bf16, f16};

use super::codes::Bits;
use super::{
    Angles, KeyValues, Linear, RmsNorm, RopeTables, Route, Visible, Visit, Weight, packed,
};
use attention::Attention;
use elementwise::New;
use filled::filled;
use layout::{Coded, CodedMut, Codes, CodesWriter, Dims, Floats, FloatsWriter, Layout};
use many::Many;
use matrix::{Element, Gated, Input, Matrix, elements, matrix};
use product::{Finish, Target, run_all};
use simd::Isa;

use crate::profile::part;

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
    fn qwen2_mlp(
        h: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        eps: f64,
        #[extension_type] gate: Matrix<Self>,
        #[extension_type] up: Matrix<Self>,
        #[extension_type] down: Matrix<Self>,
    ) -> FloatTensor<Self>;
    fn qwen2_experts(
        h: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        eps: f64,
        #[extension_type] matrices: Matrices<Self>,
        routes: Vec<Route>,
    ) -> FloatTensor<Self>;
    fn qwen2_queries(
        qkv: FloatTensor<Self>,
        #[extension_type] angles: Rotations<Self>,
        heads: usize,
    ) -> FloatTensor<Self>;
    /// Rows `rows` of `qkv` to one page, from position `start` of it on.
    fn qwen2_append(
        qkv: FloatTensor<Self>,
        #[extension_type] angles: Rotations<Self>,
        #[extension_type] page: Page<Self>,
        rows: Range<usize>,
        start: usize,
    ) -> Page<Self>;
    fn qwen2_attention(
        q: FloatTensor<Self>,
        #[extension_type] pages: Pages<Self>,
        visible: Visible,
        rounds: bool,
    ) -> FloatTensor<Self>;
}

/// Any number of matrices.
type Matrices<B> = Many<Matrix<B>>;
/// The pages of a layer.
type Pages<B> = Many<Page<B>>;

/// Cosines and sines.
#[derive(ExtensionType)]
pub(crate) struct Rotations<B: Backend> {
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
}

impl Rotations<Dispatch> {
    fn new(angles: &Angles) -> Self {
        Self {
            cos: angles.cos.clone().into_dispatch(),
            sin: angles.sin.clone().into_dispatch(),
        }
    }
}

impl Rotations<Flex> {
    fn tables(&self) -> elementwise::Tables<'_> {
        elementwise::Tables {
            cos: elements(&self.cos),
            sin: elements(&self.sin),
            half: dims::<2>(&self.cos)[1],
        }
    }
}

/// A page of keys and values.
#[derive(ExtensionType)]
pub(crate) enum Page<B: Backend> {
    /// Keys, values.
    Floats(FloatTensor<B>, FloatTensor<B>),
    /// Codes and scales of the keys, of the values; the bits and `head_dim`.
    Codes(
        IntTensor<B>,
        FloatTensor<B>,
        IntTensor<B>,
        FloatTensor<B>,
        Bits,
        usize,
    ),
}

impl Page<Dispatch> {
    fn new(page: KeyValues) -> Self {
        match page {
            KeyValues::Floats { keys, values } => {
                Self::Floats(keys.into_dispatch(), values.into_dispatch())
            }
            KeyValues::Codes {
                bits,
                head_dim,
                keys,
                values,
            } => Self::Codes(
                keys.words.into_dispatch(),
                keys.scales.into_dispatch(),
                values.words.into_dispatch(),
                values.scales.into_dispatch(),
                bits,
                head_dim,
            ),
        }
    }

    fn into_key_values(self) -> KeyValues {
        let codes = |words, scales| super::key_values::Codes {
            words: Tensor::from_dispatch(words),
            scales: Tensor::from_dispatch(scales),
        };
        match self {
            Self::Floats(keys, values) => KeyValues::Floats {
                keys: Tensor::from_dispatch(keys),
                values: Tensor::from_dispatch(values),
            },
            Self::Codes(key_words, key_scales, value_words, value_scales, bits, head_dim) => {
                KeyValues::Codes {
                    bits,
                    head_dim,
                    keys: codes(key_words, key_scales),
                    values: codes(value_words, value_scales),
                }
            }
        }
    }
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
            x: &activations::Activations::new(isa, &x, shape.cols),
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
        let x = x.to_contiguous();
        let input = Input::new(elements(&x), dims::<2>(&x)[1], &[&matrix]);
        add_product(h.to_contiguous(), &input, &matrix)
    }

    fn qwen2_mlp(
        h: FlexTensor,
        norm: FlexTensor,
        eps: f64,
        gate: Matrix<Self>,
        up: Matrix<Self>,
        down: Matrix<Self>,
    ) -> FlexTensor {
        let h = h.to_contiguous();
        let mut out = Vec::new();
        let gated = part("norm, gate up", || {
            let x = normed(&h, &norm, eps);
            let input = Input::new(&x, norm.layout().shape()[0], &[&gate, &up]);
            if let Some(gated) = input.swiglu(&gate, &up, &down) {
                return gated;
            }
            let width = gate.rows();
            out = vec![0.0; input.n() * width];
            Gated::run_all(vec![Gated::new((&gate, &up), &input, &mut out, 2 * width)]);
            Input::new(&out, width, &[&down])
        });
        part("down, add", || add_product(h, &gated, &down))
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

    fn qwen2_queries(qkv: FlexTensor, angles: Rotations<Self>, heads: usize) -> FlexTensor {
        let qkv = qkv.to_contiguous();
        let [_, width] = dims(&qkv);
        let tables = angles.tables();
        let rows = tables.cos.len() / tables.half; // rotations · n
        let head_dim = 2 * tables.half;
        let mut q = vec![0.0; rows * heads * head_dim];
        elementwise::rotate_queries(Isa::selected(), elements(&qkv), width, tables, &mut q);
        tensor(q, Shape::new([rows, heads, head_dim]))
    }

    fn qwen2_append(
        qkv: FlexTensor,
        angles: Rotations<Self>,
        page: Page<Self>,
        rows: Range<usize>,
        start: usize,
    ) -> Page<Self> {
        let qkv = qkv.to_contiguous();
        let [_, width] = dims(&qkv);
        let new = New {
            qkv: &elements(&qkv)[rows.start * width..rows.end * width],
            width,
            angles: angles.tables().rows(rows),
            start,
        };
        match page {
            Page::Floats(mut keys, mut values) => {
                match keys.dtype() {
                    DType::F32 => append_floats::<f32>(new, &mut keys, &mut values),
                    DType::BF16 => append_floats::<bf16>(new, &mut keys, &mut values),
                    DType::F16 => append_floats::<f16>(new, &mut keys, &mut values),
                    other => unreachable!("caches are made as f32, bf16 or f16, not {other:?}"),
                }
                Page::Floats(keys, values)
            }
            Page::Codes(mut kc, mut ks, mut vc, mut vs, bits, head_dim) => {
                let [kv_heads, _, _] = dims(&kc);
                let heads = coded_mut(&mut kc, &mut ks, kv_heads)
                    .zip(coded_mut(&mut vc, &mut vs, kv_heads));
                let heads = heads.map(|(keys, values)| CodesWriter {
                    bits,
                    head_dim,
                    keys,
                    values,
                });
                elementwise::append(Isa::selected(), new, heads.collect());
                Page::Codes(kc, ks, vc, vs, bits, head_dim)
            }
        }
    }

    fn qwen2_attention(
        q: FlexTensor,
        pages: Pages<Self>,
        visible: Visible,
        rounds: bool,
    ) -> FlexTensor {
        let floats = |page: &Page<Self>| match page {
            Page::Floats(keys, _) => keys.dtype(),
            Page::Codes(.., bits, _) => match bits {
                Bits::Eight => DType::I8,
                Bits::Four => DType::U8,
            },
        };
        match floats(&pages.0[0]) {
            DType::F32 => flex_attention(&q, &all(&pages, float_page::<f32>), visible, rounds),
            DType::BF16 => flex_attention(&q, &all(&pages, float_page::<bf16>), visible, rounds),
            DType::F16 => flex_attention(&q, &all(&pages, float_page::<f16>), visible, rounds),
            DType::I8 => flex_attention(&q, &all(&pages, coded_page::<8>), visible, rounds),
            DType::U8 => flex_attention(&q, &all(&pages, coded_page::<4>), visible, rounds),
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
    let matrices = Many(matrices.map(matrix).into());
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
        adapters: Vec::new(),
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

pub(crate) fn mlp(h: Tensor<2>, norm: &RmsNorm, matrices: [&Linear; 3]) -> Tensor<2> {
    let (h, weight) = (h.into_dispatch(), norm.weight.clone().into_dispatch());
    let [gate, up, down] = matrices.map(matrix);
    Tensor::from_dispatch(Dispatch::qwen2_mlp(h, weight, norm.eps, gate, up, down))
}

pub(crate) fn experts(h: Tensor<2>, norm: &RmsNorm, visits: Vec<Visit<'_>>) -> Tensor<2> {
    let (h, eps) = (h.into_dispatch(), norm.eps);
    let norm = norm.weight.clone().into_dispatch();
    let matrices = visits
        .iter()
        .flat_map(|visit| [visit.gate, visit.up, visit.down].map(matrix))
        .collect();
    let routes = visits.into_iter().map(|visit| visit.route).collect();
    let out = Dispatch::qwen2_experts(h, norm, eps, Many(matrices), routes);
    Tensor::from_dispatch(out)
}

pub(crate) fn append(
    qkv: Tensor<2>,
    tables: &RopeTables,
    pages: Vec<KeyValues>,
    start: usize,
) -> (Tensor<3>, Vec<KeyValues>) {
    let ([n, width], first) = (qkv.dims(), &pages[0]);
    let heads = width / first.head_dim() - 2 * first.kv_heads();
    let capacity = first.capacity();
    let qkv = qkv.into_dispatch();
    let mut done = 0;
    let pages = pages.into_iter().enumerate().map(|(index, page)| {
        let at = start + done - index * capacity;
        let rows = done..n.min(done + capacity - at);
        done = rows.end;
        let (page, angles) = (Page::new(page), Rotations::new(&tables.keys));
        Dispatch::qwen2_append(qkv.clone(), angles, page, rows, at).into_key_values()
    });
    let pages = pages.collect();
    let q = Dispatch::qwen2_queries(qkv, Rotations::new(&tables.queries), heads);
    (Tensor::from_dispatch(q), pages)
}

pub(crate) fn attention(
    q: Tensor<3>,
    pages: &[KeyValues],
    visible: Visible,
    rounds: bool,
) -> Tensor<2> {
    let pages = Many(pages.iter().cloned().map(Page::new).collect());
    Tensor::from_dispatch(Dispatch::qwen2_attention(
        q.into_dispatch(),
        pages,
        visible,
        rounds,
    ))
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

/// `h` plus the product.
fn add_product(mut h: FlexTensor, input: &Input<'_>, matrix: &Matrix<Flex>) -> FlexTensor {
    let [n, width] = dims(&h);
    let target = Target::new(
        &mut h.storage_mut::<f32>()[..n * width],
        width,
        0..width,
        Finish::Add,
        matrix.bias(),
    );
    run_all(&[&*matrix.product(input, target, width)]);
    h
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
    let fill = |out: &mut [MaybeUninit<f32>]| {
        let mut first = 0;
        let products: Vec<_> = matrices
            .iter()
            .map(|matrix| {
                let columns = first..first + matrix.rows();
                first = columns.end;
                let target = Target::unset(out, width, columns, matrix.bias());
                matrix.product(&input, target, width)
            })
            .collect();
        run_all(
            &products
                .iter()
                .map(|product| &**product)
                .collect::<Vec<_>>(),
        );
    };
    // SAFETY: the products have all columns, of all tokens.
    let out = unsafe { filled(n * width, fill) };
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

fn append_floats<W: Element>(new: New<'_>, keys: &mut FlexTensor, values: &mut FlexTensor) {
    let [_, capacity, head_dim] = dims(keys);
    let head = capacity * head_dim;
    let heads = keys.storage_mut::<W>().chunks_mut(head);
    let heads = heads.zip(values.storage_mut::<W>().chunks_mut(head));
    let heads = heads.map(|(keys, values)| FloatsWriter {
        head_dim,
        keys,
        values,
    });
    elementwise::append(Isa::selected(), new, heads.collect());
}

fn all<'a, L>(pages: &'a Pages<Flex>, one: impl Fn(&'a Page<Flex>) -> L) -> Vec<L> {
    pages.0.iter().map(one).collect()
}

fn float_page<W: Element>(page: &Page<Flex>) -> Floats<'_, W> {
    let Page::Floats(keys, values) = page else {
        unreachable!("a cache keeps its format");
    };
    let [kv_heads, capacity, head_dim] = dims(keys);
    Floats {
        dims: Dims {
            kv_heads,
            capacity,
            head_dim,
        },
        keys: elements(keys),
        values: elements(values),
    }
}

fn coded_page<const BITS: usize>(page: &Page<Flex>) -> Codes<'_, BITS> {
    let Page::Codes(key_codes, key_scales, value_codes, value_scales, _, head_dim) = page else {
        unreachable!("a cache keeps its format");
    };
    let [kv_heads, capacity, _] = dims(key_codes);
    Codes {
        dims: Dims {
            kv_heads,
            capacity,
            head_dim: *head_dim,
        },
        keys: coded(key_codes, key_scales),
        values: coded(value_codes, value_scales),
    }
}

fn flex_attention<L: Layout>(
    q: &FlexTensor,
    pages: &[L],
    visible: Visible,
    rounds: bool,
) -> FlexTensor {
    let q = q.to_contiguous();
    let [rows, heads, head_dim] = dims(&q); // rotations · n
    let n = rows / visible.rotations();
    let args = Attention {
        q: elements(&q),
        pages,
        heads,
        visible,
        rounds: rounds || pool::takes_bf16_products(),
    };
    let fill = |out: &mut [MaybeUninit<f32>]| attention::attention(Isa::selected(), args, out);
    // SAFETY: attention writes every head of every token.
    let out = unsafe { filled(n * heads * head_dim, fill) };
    tensor(out, Shape::new([n, heads * head_dim]))
}

fn coded<'a>(words: &'a FlexTensor, scales: &'a FlexTensor) -> Coded<'a> {
    Coded {
        codes: bytemuck::cast_slice(elements::<i32>(words)),
        scales: elements(scales),
    }
}

/// Those of each head.
fn coded_mut<'a>(
    words: &'a mut FlexTensor,
    scales: &'a mut FlexTensor,
    kv_heads: usize,
) -> impl Iterator<Item = CodedMut<'a>> {
    let codes: &mut [u8] = bytemuck::cast_slice_mut(words.storage_mut::<i32>());
    let scales = scales.storage_mut::<bf16>();
    let (head_codes, head_scales) = (codes.len() / kv_heads, scales.len() / kv_heads);
    let parts = codes
        .chunks_mut(head_codes)
        .zip(scales.chunks_mut(head_scales));
    parts.map(|(codes, scales)| CodedMut { codes, scales })
}

fn dims<const D: usize>(tensor: &FlexTensor) -> [usize; D] {
    std::array::from_fn(|i| tensor.layout().shape()[i])
}

fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}
