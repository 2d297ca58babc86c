//! Every operation in plain tensors: what any backend runs, and the oracle of the kernels.

use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData, activation};

use super::{KeyValues, Linear, RmsNorm, RopeTables, Visible, Visit, Weight, packed};

pub(crate) fn project<const N: usize>(
    x: &Tensor<2>,
    norm: &RmsNorm,
    matrices: [&Linear; N],
) -> Tensor<2> {
    let x = rms_norm(x.clone(), norm);
    let parts = matrices.map(|matrix| linear(x.clone(), matrix));
    Tensor::cat(parts.into(), 1)
}

pub(crate) fn add_project(h: Tensor<2>, x: Tensor<2>, matrix: &Linear) -> Tensor<2> {
    h + linear(x, matrix)
}

pub(crate) fn swiglu(x: &Tensor<2>, norm: &RmsNorm, gate: &Linear, up: &Linear) -> Tensor<2> {
    gated(rms_norm(x.clone(), norm), gate, up)
}

fn gated(x: Tensor<2>, gate: &Linear, up: &Linear) -> Tensor<2> {
    activation::silu(linear(x.clone(), gate)) * linear(x, up)
}

pub(crate) fn experts(h: Tensor<2>, norm: &RmsNorm, visits: Vec<Visit<'_>>) -> Tensor<2> {
    let device = h.device();
    let x = rms_norm(h.clone(), norm);
    visits.into_iter().fold(h, |h, visit| {
        let tokens = ids(&visit.route.tokens, &device);
        let rows = x.clone().select(0, tokens.clone());
        let y = linear(gated(rows, visit.gate, visit.up), visit.down);
        let n = visit.route.weights.len();
        let weights = TensorData::new(visit.route.weights, [n, 1]);
        let y = y * Tensor::from_data(weights, &device);
        h.select_assign(0, tokens, y, IndexingUpdateOp::Add)
    })
}

pub(crate) fn append(
    qkv: Tensor<2>,
    tables: &RopeTables,
    cache: KeyValues,
    start: usize,
) -> (Tensor<3>, KeyValues) {
    let [kv_heads, _, head_dim] = cache.keys.dims();
    let [n, width] = qkv.dims();
    let heads = width / head_dim - 2 * kv_heads;
    let qkv = qkv.reshape([n, heads + 2 * kv_heads, head_dim]);
    let q = rope(qkv.clone().narrow(1, 0, heads), tables);
    let k = rope(qkv.clone().narrow(1, heads, kv_heads), tables);
    let v = qkv.narrow(1, heads + kv_heads, kv_heads);
    let write = |buffer: Tensor<3>, new: Tensor<3>| {
        let new = new.swap_dims(0, 1).cast(buffer.dtype());
        buffer.slice_assign([0..kv_heads, start..start + n, 0..head_dim], new)
    };
    let cache = KeyValues {
        keys: write(cache.keys, k),
        values: write(cache.values, v),
    };
    (q, cache)
}

/// `x Wᵀ + b`.
fn linear(x: Tensor<2>, matrix: &Linear) -> Tensor<2> {
    let weight = match &matrix.weight {
        Weight::Dense(weight) => weight.clone(),
        Weight::Packed { shape, bytes } => {
            let rows: Vec<u32> = (0..shape.rows as u32).collect();
            packed_embed(*shape, bytes, &rows)
        }
    };
    let weight = weight.transpose(); // [in, out]
    let y = if weight.dtype() == DType::F32 || cfg!(not(feature = "cuda")) {
        // One precision for both sides: backends differ in what they mix.
        x.matmul(weight.cast(DType::F32))
    } else {
        let dtype = weight.dtype();
        x.cast(dtype).matmul(weight).cast(DType::F32)
    };
    match &matrix.bias {
        Some(bias) => y + bias.clone().cast(DType::F32).unsqueeze(),
        None => y,
    }
}

fn rms_norm(x: Tensor<2>, norm: &RmsNorm) -> Tensor<2> {
    let mean = x.clone().square().mean_dim(1); // [n, 1]
    let scale = (mean + norm.eps).sqrt().recip();
    x * scale * norm.weight.clone().cast(DType::F32).unsqueeze()
}

fn rope(x: Tensor<3>, tables: &RopeTables) -> Tensor<3> {
    let half = x.dims()[2] / 2;
    let cos = tables.cos.clone().unsqueeze_dim::<3>(1); // [n, 1, head_dim / 2]
    let sin = tables.sin.clone().unsqueeze_dim::<3>(1);
    let a = x.clone().narrow(2, 0, half);
    let b = x.narrow(2, half, half);
    Tensor::cat(
        vec![
            a.clone() * cos.clone() - b.clone() * sin.clone(),
            b * cos + a * sin,
        ],
        2,
    )
}

pub(crate) fn attention(q: Tensor<3>, cache: &KeyValues, visible: Visible) -> Tensor<2> {
    let KeyValues { keys, values } = cache;
    let [n, heads, head_dim] = q.dims();
    let kv_heads = keys.dims()[0];
    let n_total = visible.n_past + n;
    let group = heads / kv_heads;
    // Query head h reads kv head h / group: the group is folded into the rows, nothing is repeated.
    let q = q
        .swap_dims(0, 1) // [heads, n, head_dim]
        .reshape([kv_heads, group * n, head_dim]);
    let k = keys.clone().narrow(1, 0, n_total).cast(DType::F32);
    let v = values.clone().narrow(1, 0, n_total).cast(DType::F32);
    // f32 scores: at layer 27 of 7B they exceed the f16 range (llama.cpp#7805).
    let scores = q.matmul(k.swap_dims(1, 2)) * (1.0 / (head_dim as f64).sqrt());
    let scores =
        scores.reshape([kv_heads, group, n, n_total]) + mask(n, n_total, visible, &values.device());
    let weights = activation::softmax(scores, 3).reshape([kv_heads, group * n, n_total]);
    weights
        .matmul(v) // [kv_heads, group · n, head_dim]
        .reshape([heads, n, head_dim])
        .swap_dims(0, 1)
        .reshape([n, heads * head_dim])
}

/// 0 where the query sees the position, a very negative number where it does not; `[1, 1, n, n_total]`.
fn mask(n: usize, n_total: usize, visible: Visible, device: &burn::tensor::Device) -> Tensor<4> {
    let mut mask = vec![f32::MIN; n * n_total];
    for (i, row) in mask.chunks_exact_mut(n_total).enumerate() {
        let position = visible.n_past + i;
        row[visible.first(position)..=position].fill(0.0);
    }
    Tensor::from_data(
        TensorData::new(mask, [1, 1, n, n_total]),
        (device, DType::F32),
    )
}

pub(crate) fn embed(table: &Tensor<2>, tokens: &[u32]) -> Tensor<2> {
    let ids = ids(tokens, &table.device());
    table.clone().select(0, ids).cast(DType::F32)
}

/// Places in a table; below 2^31, since config.rs bounds vocab_size and the context.
fn ids(places: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = places.iter().map(|&place| place as i32).collect();
    let n = ids.len();
    Tensor::from_data(TensorData::new(ids, [n]), (device, DType::I32))
}

pub(crate) fn packed_embed(
    shape: packed::Shape,
    bytes: &Tensor<1, Int>,
    tokens: &[u32],
) -> Tensor<2> {
    let device = bytes.device();
    let data = bytes.clone().into_data();
    let mut rows = vec![0.0; tokens.len() * shape.cols];
    for (token, row) in tokens.iter().zip(rows.chunks_exact_mut(shape.cols)) {
        shape.unpack_row(data.as_bytes(), *token as usize, row);
    }
    Tensor::from_data(
        TensorData::new(rows, [tokens.len(), shape.cols]),
        (&device, DType::F32),
    )
}
