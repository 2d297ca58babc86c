//! Every operation in plain tensors: what any backend runs, and the oracle of the kernels.

use burn::tensor::{DType, Int, Tensor, TensorData, activation};

use super::{Visible, packed};

pub(crate) fn linear(x: Tensor<2>, weight: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
    let weight = weight.clone().transpose(); // [in, out]
    let y = if weight.dtype() == DType::F32 || cfg!(not(feature = "cuda")) {
        // One precision for both sides: backends differ in what they mix.
        x.matmul(weight.cast(DType::F32))
    } else {
        let dtype = weight.dtype();
        x.cast(dtype).matmul(weight).cast(DType::F32)
    };
    match bias {
        Some(bias) => y + bias.clone().cast(DType::F32).unsqueeze(),
        None => y,
    }
}

pub(crate) fn rms_norm(x: Tensor<2>, weight: &Tensor<1>, eps: f64) -> Tensor<2> {
    let mean = x.clone().square().mean_dim(1); // [n, 1]
    let scale = (mean + eps).sqrt().recip();
    x * scale * weight.clone().cast(DType::F32).unsqueeze()
}

pub(crate) fn rope(x: Tensor<3>, cos: &Tensor<2>, sin: &Tensor<2>) -> Tensor<3> {
    let half = x.dims()[2] / 2;
    let cos = cos.clone().unsqueeze_dim::<3>(1); // [n, 1, head_dim / 2]
    let sin = sin.clone().unsqueeze_dim::<3>(1);
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

pub(crate) fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    activation::silu(gate) * up
}

pub(crate) fn attention(
    q: Tensor<3>,
    keys: &Tensor<3>,
    values: &Tensor<3>,
    visible: Visible,
) -> Tensor<2> {
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
    // Ids are below 2^31: config.rs bounds vocab_size.
    let ids: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
    let device = table.device();
    let n = ids.len();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [n]), (&device, DType::I32));
    table.clone().select(0, ids).cast(DType::F32)
}

pub(crate) fn packed_linear(
    x: Tensor<2>,
    shape: packed::Shape,
    bytes: &Tensor<1, Int>,
    bias: Option<&Tensor<1>>,
) -> Tensor<2> {
    let rows: Vec<u32> = (0..shape.rows as u32).collect();
    linear(x, &packed_embed(shape, bytes, &rows), bias)
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
