//! Every operation in plain tensors: what any backend runs, and the oracle of the kernels.

use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData, activation};

use super::codes::{Bits, GROUP, padded};
use super::key_values::Codes;
use super::{
    Angles, KeyValues, Linear, RmsNorm, RopeTables, Visible, Visit, Weight, matmul, packed,
};

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
    pages: Vec<KeyValues>,
    start: usize,
) -> (Tensor<3>, Vec<KeyValues>) {
    let first = &pages[0];
    let (kv_heads, head_dim, capacity) = (first.kv_heads(), first.head_dim(), first.capacity());
    let [n, width] = qkv.dims();
    let heads = width / head_dim - 2 * kv_heads;
    let qkv = qkv.reshape([n, heads + 2 * kv_heads, head_dim]);
    let q = qkv.clone().narrow(1, 0, heads);
    let rotations = tables.queries.cos.dims()[0] / n;
    let queries = (0..rotations).map(|rotation| rope(q.clone(), &tables.queries, rotation));
    let q = Tensor::cat(queries.collect(), 0);
    let k = rope(qkv.clone().narrow(1, heads, kv_heads), &tables.keys, 0).swap_dims(0, 1);
    let v = qkv.narrow(1, heads + kv_heads, kv_heads).swap_dims(0, 1);
    let mut done = 0;
    let pages = pages.into_iter().enumerate().map(|(index, page)| {
        let at = start + done - index * capacity;
        let rows = (n - done).min(capacity - at);
        let part = |x: &Tensor<3>| x.clone().narrow(1, done, rows);
        let page = write(page, part(&k), part(&v), at);
        done += rows;
        page
    });
    let pages = pages.collect();
    (q, pages)
}

/// Keys and values `[kv_heads, n, head_dim]` to a page from position `start` on.
fn write(page: KeyValues, k: Tensor<3>, v: Tensor<3>, start: usize) -> KeyValues {
    let [kv_heads, n, _] = k.dims();
    let write = |buffer: Tensor<3>, new: Tensor<3>| {
        let [_, _, width] = buffer.dims();
        let new = new.cast(buffer.dtype());
        buffer.slice_assign([0..kv_heads, start..start + n, 0..width], new)
    };
    match page {
        KeyValues::Floats { keys, values } => KeyValues::Floats {
            keys: write(keys, k),
            values: write(values, v),
        },
        KeyValues::Codes {
            bits,
            head_dim,
            keys,
            values,
        } => {
            let write = |codes: Codes, new: Tensor<3>| {
                let (words, scales) = encode(new, bits, codes.scales.dtype());
                let [_, _, width] = codes.words.dims();
                let place = [0..kv_heads, start..start + n, 0..width];
                Codes {
                    words: codes.words.slice_assign(place, words),
                    scales: write(codes.scales, scales),
                }
            };
            KeyValues::Codes {
                bits,
                head_dim,
                keys: write(keys, turn(k)),
                values: write(values, v),
            }
        }
    }
}

/// The last dimension in whole groups, padded with zeros: `[groups, 32]`.
fn groups(rows: Tensor<3>) -> Tensor<2> {
    let [heads, n, head_dim] = rows.dims();
    let width = padded(head_dim);
    let rows = match width - head_dim {
        0 => rows,
        missing => {
            let zeros = Tensor::zeros([heads, n, missing], &rows.device());
            Tensor::cat(vec![rows, zeros], 2)
        }
    };
    rows.reshape([heads * n * width / GROUP, GROUP])
}

/// Each group times the Hadamard matrix; the padding becomes part of the row.
fn turn(rows: Tensor<3>) -> Tensor<3> {
    let [heads, n, head_dim] = rows.dims();
    let scale = 1.0 / (GROUP as f32).sqrt();
    let sign = |i: usize| match ((i / GROUP) & (i % GROUP)).count_ones() % 2 {
        0 => scale,
        _ => -scale,
    };
    let matrix = (0..GROUP * GROUP).map(sign).collect::<Vec<_>>();
    let matrix = TensorData::new(matrix, [GROUP, GROUP]);
    let matrix = Tensor::from_data(matrix, (&rows.device(), DType::F32));
    groups(rows)
        .matmul(matrix)
        .reshape([heads, n, padded(head_dim)])
}

/// Codes in words, and their scales, by the rule of `ops/codes.rs`.
fn encode(rows: Tensor<3>, bits: Bits, scales: DType) -> (Tensor<3, Int>, Tensor<3>) {
    let [heads, n, head_dim] = rows.dims();
    let width = padded(head_dim);
    let x = groups(rows);
    let (low, high) = bits.range();
    let (most, least) = (x.clone().max_dim(1), x.clone().min_dim(1));
    let least_wins = most.clone().lower_equal(least.clone().neg());
    let extreme = most.mask_where(least_wins, least);
    let scale = match bits {
        Bits::Eight => extreme.abs() / high,
        Bits::Four => extreme / low,
    };
    // A NaN or an infinity makes the scale NaN.
    let scale = (scale + x.clone().sum_dim(1) * 0.0).cast(scales);
    let factor = scale.clone().cast(DType::F32);
    let codes = (x / factor.clone()).round().clamp(low, high);
    let [all, _] = codes.dims();
    let codes = codes.mask_fill(factor.equal_elem(0.0).expand([all, GROUP]), 0.0);
    let per_word = 32 / bits.count();
    let codes = codes
        .int()
        .cast(DType::I32)
        .reshape([all * GROUP / per_word, per_word]);
    let mask = (1 << bits.count()) - 1;
    let part = |i: usize| {
        let code = codes.clone().narrow(1, i, 1);
        // The highest one keeps its sign, so that no number passes what 32 bits hold (ndarray checks).
        let code = match i + 1 == per_word {
            true => code,
            false => code.bitwise_and_scalar(mask),
        };
        code.bitwise_left_shift_scalar((i * bits.count()) as i32)
    };
    let words = (1..per_word).fold(part(0), |words, i| words.bitwise_or(part(i)));
    (
        words.reshape([heads, n, bits.words(width)]),
        scale.reshape([heads, n, width / GROUP]),
    )
}

/// What codes stand for, `[kv_heads, n, width]`.
fn decode(codes: &Codes, bits: Bits, n: usize) -> Tensor<3> {
    let words = codes.words.clone().narrow(1, 0, n);
    let scales = codes.scales.clone().narrow(1, 0, n);
    let [heads, _, n_words] = words.dims();
    let [_, _, n_groups] = scales.dims();
    let words = words.reshape([heads * n * n_words, 1]);
    let (mask, half) = ((1 << bits.count()) - 1, 1 << (bits.count() - 1));
    let part = |i: usize| {
        let shifted = words
            .clone()
            .bitwise_right_shift_scalar((i * bits.count()) as i32);
        // The sign: half of the range further on and back.
        let code = shifted.bitwise_and_scalar(mask) + half;
        code.bitwise_and_scalar(mask) - half
    };
    let parts = (0..32 / bits.count()).map(part).collect();
    let x = Tensor::cat(parts, 1).float().cast(DType::F32);
    let x = x.reshape([heads * n * n_groups, GROUP]);
    let scales = scales.cast(DType::F32).reshape([heads * n * n_groups, 1]);
    (x * scales).reshape([heads, n, n_groups * GROUP])
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
    // One precision for both sides: backends differ in what they mix.
    let y = matmul(x, weight.cast(DType::F32));
    match &matrix.bias {
        Some(bias) => y + bias.clone().cast(DType::F32).unsqueeze(),
        None => y,
    }
}

pub(crate) fn rms_norm(x: Tensor<2>, norm: &RmsNorm) -> Tensor<2> {
    let mean = x.clone().square().mean_dim(1); // [n, 1]
    let scale = (mean + norm.eps).sqrt().recip();
    x * scale * norm.weight.clone().cast(DType::F32).unsqueeze()
}

/// `x` `[n, heads, head_dim]` by one of the rotations.
fn rope(x: Tensor<3>, angles: &Angles, rotation: usize) -> Tensor<3> {
    let [n, _, head_dim] = x.dims();
    let half = head_dim / 2;
    let rows = |table: &Tensor<2>| {
        table
            .clone()
            .narrow(0, rotation * n, n)
            .unsqueeze_dim::<3>(1)
    };
    let (cos, sin) = (rows(&angles.cos), rows(&angles.sin)); // [n, 1, head_dim / 2]
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

pub(crate) fn attention(q: Tensor<3>, pages: &[KeyValues], visible: Visible) -> Tensor<2> {
    let [rows, heads, head_dim] = q.dims();
    let (kv_heads, rotations) = (pages[0].kv_heads(), visible.rotations());
    let n = rows / rotations;
    let n_total = visible.n_past + n;
    let group = heads / kv_heads;
    let q = match &pages[0] {
        KeyValues::Floats { .. } => q,
        KeyValues::Codes { .. } => turn(q),
    };
    let (k, v): (Vec<_>, Vec<_>) = (0..n_total)
        .step_by(pages[0].capacity())
        .zip(pages)
        .map(|(start, page)| read(page, (n_total - start).min(page.capacity())))
        .unzip();
    let (k, v) = (Tensor::cat(k, 1), Tensor::cat(v, 1));
    let width = q.dims()[2];
    let device = v.device();
    let scores = |rotation: usize| {
        // Query head h reads kv head h / group: the group is folded into the rows, nothing is
        // repeated.
        let q = q.clone().narrow(0, rotation * n, n).swap_dims(0, 1); // [heads, n, width]
        let q = q.reshape([kv_heads, group * n, width]);
        // f32 scores: at layer 27 of 7B they exceed the f16 range (llama.cpp#7805).
        let scores = matmul(q, k.clone().swap_dims(1, 2)) * (1.0 / (head_dim as f64).sqrt());
        scores.reshape([kv_heads, group, n, n_total])
    };
    let met = |rotation: usize| scores(rotation) * meets(rotation, n, n_total, visible, &device);
    let scores = match rotations {
        1 => scores(0),
        _ => (1..rotations).fold(met(0), |sum, rotation| sum + met(rotation)),
    };
    let scores = scores + mask(n, n_total, visible, &device);
    let weights = activation::softmax(scores, 3).reshape([kv_heads, group * n, n_total]);
    matmul(weights, v) // [kv_heads, group · n, width]
        .narrow(2, 0, head_dim)
        .reshape([heads, n, head_dim])
        .swap_dims(0, 1)
        .reshape([n, heads * head_dim])
}

/// The first `n` keys and values of a page as f32, `[kv_heads, n, width]` each.
fn read(page: &KeyValues, n: usize) -> (Tensor<3>, Tensor<3>) {
    match page {
        KeyValues::Floats { keys, values } => {
            let part = |x: &Tensor<3>| x.clone().narrow(1, 0, n).cast(DType::F32);
            (part(keys), part(values))
        }
        KeyValues::Codes {
            bits, keys, values, ..
        } => (decode(keys, *bits, n), decode(values, *bits, n)),
    }
}

/// 1 where the query meets the position in this rotation, else 0; `[1, 1, n, n_total]`.
fn meets(
    rotation: usize,
    n: usize,
    n_total: usize,
    visible: Visible,
    device: &Device,
) -> Tensor<4> {
    let mut meets = vec![0.0; n * n_total];
    for (i, row) in meets.chunks_exact_mut(n_total).enumerate() {
        let position = visible.n_past + i;
        for (key, meets) in row[..=position].iter_mut().enumerate() {
            if visible.distance(position, key) as usize == rotation {
                *meets = 1.0;
            }
        }
    }
    let meets = TensorData::new(meets, [1, 1, n, n_total]);
    Tensor::from_data(meets, (device, DType::F32))
}

/// 0 where the query sees the position, a very negative number where it does not; `[1, 1, n, n_total]`.
fn mask(n: usize, n_total: usize, visible: Visible, device: &Device) -> Tensor<4> {
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
    embed_ids(table, ids(tokens, &table.device()))
}

pub(super) fn embed_ids(table: &Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
    table.clone().select(0, ids).cast(DType::F32)
}

/// Places in a table; below 2^31, since config.rs bounds vocab_size and the context.
pub(super) fn ids(places: &[u32], device: &Device) -> Tensor<1, Int> {
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

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use super::*;
    use crate::ops::{CacheFormat, cpu};

    fn wave<const D: usize>(dims: [usize; D], f: f32) -> Tensor<D> {
        let n = dims.iter().product();
        let values: Vec<f32> = (0..n).map(|i| (i as f32 * f).sin()).collect();
        Tensor::from_data(TensorData::new(values, dims), (&Device::flex(), DType::F32))
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().expect("f32")
    }

    /// A prompt in two parts through both: the kernels' order in the cache is their own, so what
    /// comes out of attention is compared. Codes may differ by one where a sum falls on an edge.
    #[test]
    fn kernels_append_and_attend_as_tensors_do() {
        let formats = [
            (CacheFormat::Floats(DType::F32), 1e-5),
            (CacheFormat::Floats(DType::BF16), 1e-5),
            (CacheFormat::Codes(Bits::Eight), 2e-3),
            (CacheFormat::Codes(Bits::Four), 3e-2),
        ];
        for (format, tolerance) in formats {
            for (head_dim, chunk, window) in [
                (64, None, None),
                (10, Some(7), None),
                (40, Some(4), Some(9)),
            ] {
                let (heads, kv_heads) = (6, 2);
                let rotations = chunk.map_or(1, |_| 3);
                let page = KeyValues::zeros(format, [kv_heads, 128, head_dim], &Device::flex());
                let (mut ours, mut theirs) = (vec![page; 2], Vec::new());
                theirs.clone_from(&ours);
                for (n_past, n) in [(0, 13), (13, 6), (19, 130)] {
                    let width = (heads + 2 * kv_heads) * head_dim;
                    let qkv = wave([n, width], 0.37 + n as f32);
                    let angles = |rows, f| Angles {
                        cos: wave([rows, head_dim / 2], f),
                        sin: wave([rows, head_dim / 2], f + 0.1),
                    };
                    let tables = RopeTables {
                        keys: angles(n, 0.8),
                        queries: angles(rotations * n, 0.7),
                        chunk,
                    };
                    let visible = Visible {
                        n_past,
                        window,
                        chunk,
                    };
                    let touched = n_past / 128..(n_past + n).div_ceil(128);
                    let start = n_past - touched.start * 128;
                    let pages = ours.drain(touched.clone()).collect();
                    let (q_ours, pages) = cpu::append(qkv.clone(), &tables, pages, start);
                    ours.splice(touched.start..touched.start, pages);
                    let pages = theirs.drain(touched.clone()).collect();
                    let (q_theirs, pages) = append(qkv, &tables, pages, start);
                    theirs.splice(touched.start..touched.start, pages);
                    let ours = values(cpu::attention(q_ours.clone(), &ours, visible, false));
                    let theirs = values(attention(q_theirs.clone(), &theirs, visible));
                    for (a, b) in values(q_ours).iter().zip(values(q_theirs)) {
                        assert!((a - b).abs() < 1e-5);
                    }
                    assert_eq!(ours.len(), n * heads * head_dim);
                    for (a, b) in ours.iter().zip(&theirs) {
                        assert!((a - b).abs() < tolerance, "{format:?} {head_dim}: {a} {b}");
                    }
                }
            }
        }
    }
}
