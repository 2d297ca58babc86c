//! Products of activations with matrices: which kernel, and burn's matrix product for many rows.

use burn::tensor::{DType, Int, Tensor};
use burn_cubecl::cubecl::calculate_cube_count_elemwise;
use burn_cubecl::cubecl::client::Client;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::cube::{cast, cube, elem, empty, integers, own, raw, tensor};
use super::dense::{self, Plan, SizesLaunch};
use super::matmul;
use super::packed::{self, PackedPlan};
use super::reduce::{UNITS, has_planes};
use super::words::Numbers;
use crate::ops::packed::{Format, ROWS, Shape};
use crate::ops::{Linear, RmsNorm, Weight};

/// Rows of `x` that the kernels take at once; above, a matrix product reuses weights better.
pub(super) const FEW: usize = 8;
/// Units that fill a large device.
const MANY_UNITS: usize = 132 * 1024;

/// Rows of `x` as a product takes them.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    Plain(&'a Tensor<2>),
    Normed(&'a Tensor<2>, &'a RmsNorm),
}

/// What a kernel is to make of the products.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Finish {
    SideBySide,
    Gated,
    Add,
}

/// How the matrices are stored, if all are alike and a kernel reads it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    Dense(Numbers),
    Packed(Format),
}

impl Stored {
    pub(super) fn of(weight: &Weight) -> Option<Self> {
        match weight {
            Weight::Dense(weight) => {
                let numbers = match weight.dtype() {
                    DType::F32 => Numbers::F32,
                    DType::F16 => Numbers::F16,
                    DType::BF16 => Numbers::Bf16,
                    _ => return None,
                };
                let whole = weight.dims()[1].is_multiple_of(numbers.per_vector());
                whole.then_some(Self::Dense(numbers))
            }
            Weight::Packed { shape, .. } => shape
                .cols
                .is_multiple_of(4)
                .then_some(Self::Packed(shape.format)),
        }
    }

    fn of_all(matrices: &[&Linear]) -> Option<Self> {
        let first = Self::of(&matrices[0].weight)?;
        let alike = |linear: &&Linear| Self::of(&linear.weight) == Some(first);
        matrices.iter().all(alike).then_some(first)
    }
}

fn buffer(weight: &Weight) -> CubeTensor {
    match weight {
        Weight::Dense(weight) => cube(weight.clone()),
        Weight::Packed { bytes, .. } => cube(bytes.clone()),
    }
}

/// The matrices' products side by side, if a kernel takes so few rows.
pub(super) fn few(x: Input<'_>, matrices: &[&Linear]) -> Option<Tensor<2>> {
    launch(x, matrices, Finish::SideBySide, None, 1.0)
}

/// `silu(gate(x)) · up(x)`, likewise.
pub(super) fn gated_few(x: Input<'_>, gate: &Linear, up: &Linear) -> Option<Tensor<2>> {
    launch(x, &[gate, up], Finish::Gated, None, 1.0)
}

/// Whether [`add_few`] takes these rows and this matrix.
pub(super) fn is_few(x: &Tensor<2>, matrix: &Linear) -> bool {
    fits(x, &[matrix]).is_some()
}

/// `h + factor · (x Wᵀ + b)`, in the memory of `h` if nobody else holds it.
pub(super) fn add_few(h: Tensor<2>, x: &Tensor<2>, matrix: &Linear, factor: f32) -> Tensor<2> {
    launch(Input::Plain(x), &[matrix], Finish::Add, Some(h), factor).expect("`is_few` was asked")
}

fn fits(x: &Tensor<2>, matrices: &[&Linear]) -> Option<Stored> {
    let [n, _] = x.dims();
    if n > FEW || matrices.len() > 3 {
        return None;
    }
    Stored::of_all(matrices)
}

fn launch(
    input: Input<'_>,
    matrices: &[&Linear],
    finish: Finish,
    h: Option<Tensor<2>>,
    factor: f32,
) -> Option<Tensor<2>> {
    let (x, norm) = match input {
        Input::Plain(x) => (x, None),
        Input::Normed(x, norm) => (x, Some(norm)),
    };
    let stored = fits(x, matrices)?;
    let biased = matrices[0].bias.is_some();
    if matrices
        .iter()
        .any(|matrix| matrix.bias.is_some() != biased)
    {
        return None;
    }
    let [n, cols] = x.dims();
    let x = cube(x.clone());
    let client = x.client.clone();
    let rows: Vec<usize> = matrices
        .iter()
        .map(|matrix| matrix.out_features())
        .collect();
    let gated = finish == Finish::Gated;
    let total = match gated {
        true => rows[0],
        false => rows.iter().sum(),
    };
    let out = match h {
        Some(h) => own(cube(h)),
        None => empty(&x, [n, total], DType::F32),
    };
    let at = |i: usize| i.min(matrices.len() - 1);
    let weight = |i: usize| buffer(&matrices[at(i)].weight).into_buffer_arg();
    // What a plan does not read is bound to something that is there.
    let bias = |i: usize| match &matrices[at(i)].bias {
        Some(bias) => cube(bias.clone()).into_buffer_arg(),
        None => x.clone().into_buffer_arg(),
    };
    let weights_of_norm = match norm {
        Some(norm) => cube(norm.weight.clone()),
        None => x.clone(),
    };
    let end0 = rows[0];
    let end1 = end0
        + if gated {
            0
        } else {
            rows.get(1).copied().unwrap_or(0)
        };
    let sizes = |vectors: usize| {
        SizesLaunch::new(
            end0 as u32,
            end1 as u32,
            total as u32,
            vectors as u32,
            n as u32,
            norm.map_or(0.0, |norm| norm.eps as f32),
            factor,
        )
    };
    let planes = has_planes(&client);
    let adds = finish == Finish::Add;
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: the kernels read rows below `rows` of weights that have them and the `n` rows of `x`, and
    // write `out` `[n, total]`; `fits` has seen that rows are whole vectors.
    unsafe {
        match stored {
            Stored::Dense(numbers) => {
                let vectors = cols / numbers.per_vector();
                let per_group = match gated || total < 2 {
                    true => 1,
                    false => 2,
                };
                let group = group_units(total.div_ceil(per_group), vectors);
                let plan = Plan {
                    numbers,
                    n: n.next_power_of_two(), // few kernels to compile
                    group,
                    rows: per_group,
                    ahead: (vectors / group).clamp(1, 4),
                    matrices: matrices.len(),
                    gated,
                    normed: norm.is_some(),
                    biased,
                    adds,
                    planes,
                };
                let cubes = total.div_ceil(per_group * (UNITS / group));
                dense::dense_product::launch_unchecked(
                    &client,
                    CubeCount::Static(cubes as u32, 1, 1),
                    dim,
                    x.clone().into_buffer_arg(),
                    weights_of_norm.into_buffer_arg(),
                    weight(0),
                    weight(1),
                    weight(2),
                    bias(0),
                    bias(1),
                    bias(2),
                    out.clone().into_buffer_arg(),
                    sizes(vectors),
                    plan,
                );
            }
            Stored::Packed(format) => {
                assert!(format.is_plain(), "loaded for the processor alone");
                let panels = |rows: &usize| rows.div_ceil(ROWS);
                let cubes: usize = match gated {
                    true => panels(&total),
                    false => rows.iter().map(panels).sum(),
                };
                let plan = PackedPlan {
                    eight_bits: format == Format::Q8,
                    n: n.next_power_of_two(),
                    matrices: matrices.len(),
                    gated,
                    normed: norm.is_some(),
                    biased,
                    adds,
                    planes,
                    ahead: packed::ahead(cols, format == Format::Q8, gated),
                    halves: is_cuda(&client),
                };
                packed::packed_product::launch_unchecked(
                    &client,
                    CubeCount::Static(cubes as u32, 1, 1),
                    dim,
                    x.clone().into_buffer_arg(),
                    weights_of_norm.into_buffer_arg(),
                    weight(0),
                    weight(1),
                    weight(2),
                    bias(0),
                    bias(1),
                    bias(2),
                    out.clone().into_buffer_arg(),
                    sizes(cols / 4),
                    plan,
                );
            }
        }
    }
    Some(tensor(out))
}

/// Units that share a row, so that the device is full and each has a vector.
pub(super) fn group_units(groups: usize, vectors: usize) -> usize {
    [32, 64, 128, 256]
        .into_iter()
        .find(|&units| groups * units >= MANY_UNITS || units >= vectors)
        .unwrap_or(UNITS)
}

/// What rows of `x` are to be given to [`linear`] in, for all of the matrices, so that it need not make that of them.
pub(super) fn input_type(x: &Tensor<2>, matrices: &[&Linear]) -> DType {
    let [n, _] = x.dims();
    let is_bf16 = |matrix: &&Linear| match &matrix.weight {
        Weight::Dense(weight) => weight.dtype() == DType::BF16,
        Weight::Packed { shape, .. } => shape.cols.is_multiple_of(4),
    };
    match n > FEW && matrices.iter().all(is_bf16) && is_cuda(&raw(x.clone()).client) {
        true => DType::BF16, // as transformers does
        false => DType::F32,
    }
}

/// `x Wᵀ + b` for any number of rows, f32.
pub(super) fn linear(x: &Tensor<2>, matrix: &Linear) -> Tensor<2> {
    if let Some(y) = few(Input::Plain(x), &[matrix]) {
        return y;
    }
    let dtype = input_type(x, &[matrix]);
    let x = cast(x, dtype);
    let weight = match &matrix.weight {
        Weight::Dense(weight) => weight.clone(),
        Weight::Packed { shape, bytes } if shape.cols.is_multiple_of(4) => {
            unpacked(*shape, bytes, None, dtype)
        }
        Weight::Packed { shape, bytes } => {
            let rows: Vec<u32> = (0..shape.rows as u32).collect();
            crate::ops::portable::packed_embed(*shape, bytes, &rows)
        }
    };
    let y = match (dtype, weight.dtype()) {
        (DType::BF16, _) => matmul::bf16(x, weight),
        (_, DType::F32) => times(x, weight.transpose()),
        // f16 has no room for the outliers of Qwen2's activations; tf32 has all of its digits.
        _ => x.matmul(weight.cast(DType::F32).transpose()),
    };
    match &matrix.bias {
        Some(bias) => y + bias.clone().unsqueeze(),
        None => y,
    }
}

/// `x · y` in f32.
pub(super) fn times<const D: usize>(x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
    match is_cuda(&raw(x.clone()).client) {
        true => matmul::f32(x, y),
        false => x.matmul(y),
    }
}

/// The matrices as one, if they lie behind each other in one buffer and many rows are multiplied with them.
pub(super) fn united(n: usize, matrices: &[&Linear]) -> Option<Linear> {
    if n <= FEW || matrices.len() < 2 {
        return None;
    }
    let cubes = |of: &dyn Fn(&Linear) -> Option<CubeTensor>| {
        let parts = matrices.iter().map(|matrix| of(matrix));
        super::cube::behind(&parts.collect::<Option<Vec<_>>>()?)
    };
    let weight = match &matrices[0].weight {
        Weight::Dense(_) => Weight::Dense(tensor(cubes(&|matrix| match &matrix.weight {
            Weight::Dense(weight) => Some(raw(weight.clone())),
            Weight::Packed { .. } => None,
        })?)),
        Weight::Packed { shape, .. } => {
            let shape = *shape;
            let bytes = cubes(&|matrix| match &matrix.weight {
                Weight::Packed { shape: of, bytes }
                    if (of.format, of.cols) == (shape.format, shape.cols) =>
                {
                    Some(raw(bytes.clone()))
                }
                _ => None,
            })?;
            let (last, others) = matrices.split_last()?;
            let whole = |matrix: &&Linear| matrix.out_features().is_multiple_of(ROWS);
            if !others.iter().all(whole) {
                return None;
            }
            let others: usize = others.iter().map(|matrix| matrix.out_features()).sum();
            Weight::Packed {
                shape: Shape {
                    rows: others + last.out_features(),
                    ..shape
                },
                bytes: integers(bytes),
            }
        }
    };
    let biases = || matrices.iter().map(|matrix| matrix.bias.clone());
    let bias = match biases().collect::<Option<Vec<_>>>() {
        None if biases().flatten().next().is_some() => return None,
        None => None,
        Some(parts) => {
            let joined = cubes(&|matrix| matrix.bias.clone().map(raw));
            Some(joined.map_or_else(|| Tensor::cat(parts, 0), tensor))
        }
    };
    Some(Linear {
        weight,
        bias,
        adapters: Vec::new(),
    })
}

/// Whether this is an NVIDIA GPU by CUDA: it has every type that a kernel may ask for.
pub(super) fn is_cuda(client: &Client) -> bool {
    client.name() == "cuda"
}

/// Rows of a packed matrix, all without `tokens`.
pub(super) fn unpacked(
    shape: Shape,
    bytes: &Tensor<1, Int>,
    tokens: Option<&Tensor<1, Int>>,
    dtype: DType,
) -> Tensor<2> {
    let weights = cube(bytes.clone());
    let n = tokens.map_or(shape.rows, |tokens| tokens.dims()[0]);
    let out = empty(&weights, [n, shape.cols], dtype);
    let client = weights.client.clone();
    let dim = CubeDim::new_1d(UNITS as u32);
    let ids = tokens.map_or_else(|| weights.clone(), |ids| cube(ids.clone()));
    // SAFETY: a unit below `n · cols / 4` writes four numbers of `out`, from the block of the matrix
    // that has them; tokens are below the vocabulary's size, which callers check.
    unsafe {
        packed::unpack::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, n * shape.cols / 4, dim),
            dim,
            weights.into_buffer_arg(),
            ids.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            (shape.cols / 4) as u32,
            n as u32,
            tokens.is_none(),
            shape.format == Format::Q8,
            elem(dtype),
        );
    }
    tensor(out)
}
