//! GPUs: our operations as `#[cube]` kernels, one source for CUDA, Vulkan, Metal and WebGPU.
//!
//! Few rows, a decode step, go through kernels that read each weight once; many rows, a prompt, through
//! burn's matrix product, packed weights as numbers first. What no kernel takes, the portable default does.
#![allow(unsafe_code)]
// The language of `#[cube]` functions is part of Rust's.
#![allow(
    clippy::assign_op_pattern,
    clippy::manual_div_ceil,
    clippy::manual_is_multiple_of,
    clippy::needless_range_loop
)]

mod attention;
mod cache;
mod check;
mod choice;
mod cube;
mod dense;
mod elementwise;
mod grouped;
mod matmul;
mod mixture;
mod norm;
mod packed;
mod product;
mod prompt;
mod reduce;
pub(crate) mod replay;
#[cfg(test)]
mod tests;
mod words;

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};

use super::{KeyValues, Linear, Place, RmsNorm, RopeTables, Visible, Visit, Weight, portable};
pub(crate) use check::check;
pub(crate) use cube::takes;
pub(crate) use mixture::{mixture, takes_mixture};
use product::{Input, few, linear, unpacked};

/// As [`super::project`].
pub(crate) fn project<const N: usize>(
    x: &Tensor<2>,
    norm: &RmsNorm,
    matrices: [&Linear; N],
) -> Tensor<2> {
    if let Some(y) = few(Input::Normed(x, norm), &matrices) {
        return y;
    }
    let x = cube::rms_norm(x, norm, product::input_type(x, &matrices));
    if let Some(all) = product::united(x.dims()[0], &matrices) {
        return linear(&x, &all);
    }
    let parts = matrices.map(|matrix| linear(&x, matrix));
    match N {
        1 => parts.into_iter().next().expect("one"),
        _ => Tensor::cat(parts.into(), 1),
    }
}

/// As [`super::matmul`].
pub(crate) fn matmul<const D: usize>(x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
    product::times(x, y)
}

/// The norm alone, as f32.
pub(crate) fn normed(x: &Tensor<2>, norm: &RmsNorm) -> Tensor<2> {
    cube::rms_norm(x, norm, DType::F32)
}

/// As [`super::add_project`].
pub(crate) fn add_project(h: Tensor<2>, x: &Tensor<2>, matrix: &Linear) -> Tensor<2> {
    match product::is_few(x, matrix) {
        true => product::add_few(h, x, matrix, 1.0),
        false => h + linear(x, matrix),
    }
}

/// `silu(gate(x)) · up(x)` of `x` after the norm, as `down` takes it.
pub(crate) fn swiglu(h: &Tensor<2>, norm: &RmsNorm, [gate, up, down]: [&Linear; 3]) -> Tensor<2> {
    product::gated_few(Input::Normed(h, norm), gate, up).unwrap_or_else(|| {
        let x = cube::rms_norm(h, norm, product::input_type(h, &[gate, up]));
        let dtype = product::input_type(h, &[down]);
        match product::united(x.dims()[0], &[gate, up]) {
            Some(both) => cube::silu_halves(linear(&x, &both), dtype),
            None => cube::silu_times(linear(&x, gate), linear(&x, up), dtype),
        }
    })
}

/// As [`super::experts`].
pub(crate) fn experts(h: Tensor<2>, norm: &RmsNorm, visits: Vec<Visit<'_>>) -> Tensor<2> {
    let device = h.device();
    let [n, _] = h.dims();
    let x = normed(&h, norm);
    visits.into_iter().fold(h, |h, visit| {
        let (tokens, weights) = (visit.route.tokens, visit.route.weights);
        let is_alone = n == 1;
        let rows = match is_alone {
            true => x.clone(),
            false => x.clone().select(0, portable::ids(&tokens, &device)),
        };
        let gated =
            product::gated_few(Input::Plain(&rows), visit.gate, visit.up).unwrap_or_else(|| {
                let (gate, up) = (linear(&rows, visit.gate), linear(&rows, visit.up));
                let dtype = product::input_type(&rows, &[visit.down]);
                cube::silu_times(gate, up, dtype)
            });
        if is_alone && product::is_few(&gated, visit.down) {
            return product::add_few(h, &gated, visit.down, weights[0]);
        }
        let weights = TensorData::new(weights, [tokens.len(), 1]);
        let y = linear(&gated, visit.down) * Tensor::from_data(weights, &device);
        h.select_assign(0, portable::ids(&tokens, &device), y, IndexingUpdateOp::Add)
    })
}

/// As [`super::append`]; codes and several rotations go the portable way.
pub(crate) fn append(
    qkv: Tensor<2>,
    tables: &RopeTables,
    mut pages: Vec<KeyValues>,
    start: usize,
) -> (Tensor<3>, Vec<KeyValues>) {
    let takes = match &pages[..] {
        [KeyValues::Floats { .. }] => tables.chunk.is_none(),
        _ => false,
    };
    if !takes {
        return portable::append(qkv, tables, pages, start);
    }
    let Some(KeyValues::Floats { keys, values }) = pages.pop() else {
        unreachable!("matched above");
    };
    let (q, keys, values) = cube::rope_append(qkv, &tables.keys, keys, values, start);
    (q, vec![KeyValues::Floats { keys, values }])
}

/// Whether the kernels take a place on the device for these heads and this page.
pub(crate) fn takes_places(heads: usize, page: &KeyValues) -> bool {
    let KeyValues::Floats { keys, .. } = page else {
        return false;
    };
    let [kv_heads, _, head_dim] = keys.dims();
    takes(keys) && head_dim.is_multiple_of(8) && attends(heads, kv_heads, head_dim)
}

fn attends(heads: usize, kv_heads: usize, head_dim: usize) -> bool {
    head_dim.is_multiple_of(4)
        && head_dim <= 4 * reduce::UNITS
        && heads / kv_heads <= attention::MAX_GROUP
}

/// As [`super::append`] and [`super::attention`] of one token where `place` says, into a page that nobody else holds;
/// for what [`takes_places`].
pub(crate) fn attend_at(
    qkv: Tensor<2>,
    page: &KeyValues,
    place: &Place,
    window: Option<usize>,
) -> Tensor<2> {
    let KeyValues::Floats { keys, values } = page else {
        unreachable!("`takes_places` was asked");
    };
    cube::attend_placed(qkv, keys, values, place, window)
}

/// As [`super::attention`]; what its kernel does not take goes the portable way.
pub(crate) fn attention(q: Tensor<3>, pages: &[KeyValues], visible: Visible) -> Tensor<2> {
    let [_, heads, head_dim] = q.dims();
    match pages {
        [KeyValues::Floats { keys, values }]
            if visible.chunk.is_none() && attends(heads, keys.dims()[0], head_dim) =>
        {
            cube::attend(q, keys, values, visible.n_past, visible.window)
        }
        _ => portable::attention(q, pages, visible),
    }
}

/// Whether the matrix lies where these kernels run.
pub(crate) fn on_gpu(weight: &Weight) -> bool {
    match weight {
        Weight::Dense(weight) => takes(weight),
        Weight::Packed { bytes, .. } => cube::is_here(bytes.clone().into_dispatch()),
    }
}

/// As [`super::settled`].
pub(crate) fn settled<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    cube::tensor(cube::cube(tensor))
}

/// As [`super::embed`].
pub(crate) fn embed(table: &Weight, tokens: &[u32]) -> Tensor<2> {
    match table {
        Weight::Dense(table) => portable::embed(table, tokens),
        Weight::Packed { shape, bytes } => match shape.cols.is_multiple_of(4) {
            true => {
                let ids = portable::ids(tokens, &bytes.device());
                unpacked(*shape, bytes, Some(&ids), DType::F32)
            }
            false => portable::packed_embed(*shape, bytes, tokens),
        },
    }
}

/// As [`super::embed`] of the one token in a buffer; whether it can, [`embeds_places`] says.
pub(crate) fn embed_at(table: &Weight, token: &Tensor<1, Int>) -> Tensor<2> {
    match table {
        Weight::Dense(table) => portable::embed_ids(table, token.clone()),
        Weight::Packed { shape, bytes } => unpacked(*shape, bytes, Some(token), DType::F32),
    }
}

/// Whether rows of the table can be told by ids on the device.
pub(crate) fn embeds_places(table: &Weight) -> bool {
    match table {
        Weight::Dense(_) => true,
        Weight::Packed { shape, .. } => shape.cols.is_multiple_of(4),
    }
}
