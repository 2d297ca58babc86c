//! Every kernel against the portable default on the processor, on the device that `QWEN2_TEST_DEVICE` names.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::*;
use crate::ops::fit::Effort;
use crate::ops::packed::{Format, Shape};
use crate::ops::{Angles, CacheFormat};

/// The device under test; without one, a test says that it is skipped.
#[allow(clippy::print_stderr)]
fn device(test: &str) -> Option<Device> {
    let name = std::env::var("QWEN2_TEST_DEVICE").unwrap_or_default();
    match name.as_str() {
        "" | "cpu" | "ndarray" => {
            eprintln!("{test}: skipped, QWEN2_TEST_DEVICE names no GPU");
            None
        }
        name => {
            let device: crate::Device = name.parse().expect("a device");
            Some(device.open().expect("the device opens").1)
        }
    }
}

fn wave(n: usize, f: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * f).sin()).collect()
}

fn tensor<const D: usize>(values: Vec<f32>, dims: [usize; D], to: (&Device, DType)) -> Tensor<D> {
    let data = TensorData::new(values, dims).convert_dtype(to.1);
    Tensor::from_data(data, to)
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    let data = x.into_data().convert_dtype(DType::F32);
    data.try_to_vec().expect("f32")
}

fn assert_near(ours: &[f32], theirs: &[f32], tolerance: f32, what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let most = theirs.iter().fold(1.0_f32, |most, x| most.max(x.abs()));
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        let error = (a - b).abs();
        assert!(
            error <= tolerance * most,
            "{what}: {a} instead of {b} at {i}"
        );
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Dense(DType),
    Packed(Format),
}

/// The same matrix on both devices.
fn matrix(kind: Kind, [rows, cols]: [usize; 2], bias: bool, on: &Device) -> [Linear; 2] {
    let w: Vec<f32> = wave(rows * cols, 0.71).iter().map(|x| x * 0.1).collect();
    [on, &Device::flex()].map(|device| {
        let weight = match kind {
            Kind::Dense(dtype) => Weight::Dense(tensor(w.clone(), [rows, cols], (device, dtype))),
            Kind::Packed(format) => {
                let shape = Shape { format, rows, cols };
                let mut bytes = vec![0; shape.bytes()];
                for (panel, out) in bytes.chunks_mut(shape.panel_bytes()).enumerate() {
                    let row = |i: usize, out: &mut [f32]| {
                        out.copy_from_slice(&w[i * cols..][..cols]);
                    };
                    shape.pack_panel(panel, Effort::Search, &row, out);
                }
                let words: Vec<u32> = bytes
                    .chunks_exact(4)
                    .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                    .collect();
                let n = words.len();
                let bytes = match *device == Device::flex() {
                    true => {
                        let data = TensorData::new(bytes, [4 * n]);
                        Tensor::<1, Int>::from_data(data, (device, DType::U8))
                    }
                    false => {
                        let data = TensorData::new(words, [n]);
                        Tensor::<1, Int>::from_data(data, (device, DType::U32))
                    }
                };
                Weight::Packed { shape, bytes }
            }
        };
        Linear {
            weight,
            bias: bias.then(|| tensor(wave(rows, 0.3), [rows], (device, DType::F32))),
            adapters: Vec::new(),
        }
    })
}

fn kinds(device: &Device) -> Vec<Kind> {
    let mut kinds = vec![
        Kind::Dense(DType::F32),
        Kind::Packed(Format::Q8),
        Kind::Packed(Format::Q4),
    ];
    for dtype in [DType::F16, DType::BF16] {
        if device.supports_dtype(dtype) {
            kinds.push(Kind::Dense(dtype));
        }
    }
    kinds
}

fn pair(values: &[f32], dims: [usize; 2], device: &Device) -> [Tensor<2>; 2] {
    [device, &Device::flex()].map(|on| tensor(values.to_vec(), dims, (on, DType::F32)))
}

fn norms(cols: usize, device: &Device) -> [RmsNorm; 2] {
    let weight: Vec<f32> = wave(cols, 0.9).iter().map(|x| 1.0 + 0.5 * x).collect();
    [device, &Device::flex()].map(|on| RmsNorm {
        weight: tensor(weight.clone(), [cols], (on, DType::F32)),
        eps: 1e-6,
    })
}

/// Matrices through the kernels for few rows, and through products for many; bf16 products round.
#[test]
fn products_are_those_of_tensors() {
    let Some(device) = device("products_are_those_of_tensors") else {
        return;
    };
    for kind in kinds(&device) {
        for (n, cols, rows) in [
            (1, 64, [16, 16, 16]),
            (1, 904, [33, 7, 18]),
            (3, 128, [96, 32, 32]),
            (8, 328, [64, 16, 16]),
            (9, 96, [40, 8, 8]),
            (1, 2560, [600, 2, 2]),
        ] {
            let what = format!("{kind:?}, {n} rows of {cols}");
            let tolerance = if n > 8 { 2e-2 } else { 2e-5 };
            let [x, x_ref] = pair(&wave(n * cols, 0.37), [n, cols], &device);
            let [norm, norm_ref] = norms(cols, &device);
            let each = rows.map(|rows| matrix(kind, [rows, cols], true, &device));
            let [q, k, v] = &each;
            let ours = values(project(&x, &norm, [&q[0], &k[0], &v[0]]));
            let theirs = portable::project(&x_ref, &norm_ref, [&q[1], &k[1], &v[1]]);
            assert_near(&ours, &values(theirs), tolerance, &what);

            let [h, h_ref] = pair(&wave(n * rows[0], 0.21), [n, rows[0]], &device);
            let [o, o_ref] = matrix(kind, [rows[0], cols], false, &device);
            let kept = h.clone();
            let ours = values(add_project(h, &x, &o));
            let theirs = portable::add_project(h_ref.clone(), x_ref.clone(), &o_ref);
            assert_near(&ours, &values(theirs), tolerance, &what);
            assert_eq!(values(kept), values(h_ref), "what others hold stays");

            let [gate, gate_ref] = matrix(kind, [rows[0], cols], false, &device);
            let ours = values(swiglu(&x, &norm, &gate, &o));
            let theirs = portable::swiglu(&x_ref, &norm_ref, &gate_ref, &o_ref);
            assert_near(&ours, &values(theirs), tolerance, &what);
        }
    }
}

#[test]
fn rows_of_packed_matrices_are_unpacked_exactly() {
    let Some(device) = device("rows_of_packed_matrices_are_unpacked_exactly") else {
        return;
    };
    for format in [Format::Q8, Format::Q4] {
        let [ours, theirs] = matrix(Kind::Packed(format), [50, 100], false, &device);
        let tokens = [49, 0, 17, 17];
        let Weight::Packed { shape, bytes } = &theirs.weight else {
            unreachable!("packed");
        };
        let want = values(portable::packed_embed(*shape, bytes, &tokens));
        assert_eq!(values(embed(&ours.weight, &tokens)), want, "{format:?}");
    }
}

/// A prompt in parts, then single tokens, over more than one tile, with and without a window.
#[test]
fn attention_is_that_of_tensors() {
    let Some(device) = device("attention_is_that_of_tensors") else {
        return;
    };
    for (heads, kv_heads, head_dim, window) in [
        (4, 2, 64, None),
        (7, 1, 128, None),
        (6, 2, 40, Some(50)),
        (2, 2, 16, Some(1)),
    ] {
        let format = CacheFormat::Floats(DType::F32);
        let on = [&device, &Device::flex()];
        let mut pages = on.map(|on| vec![KeyValues::zeros(format, [kv_heads, 256, head_dim], on)]);
        let mut n_past = 0;
        for n in [5, 70, 1, 9, 1, 100, 1] {
            let width = (heads + 2 * kv_heads) * head_dim;
            let qkv = pair(&wave(n * width, 0.37 + n as f32), [n, width], &device);
            let half = head_dim / 2;
            let (cos, sin) = (wave(n * half, 0.8), wave(n * half, 0.9));
            let tables = on.map(|on| {
                let angles = Angles {
                    cos: tensor(cos.clone(), [n, half], (on, DType::F32)),
                    sin: tensor(sin.clone(), [n, half], (on, DType::F32)),
                };
                RopeTables {
                    keys: angles.clone(),
                    queries: angles,
                    chunk: None,
                }
            });
            let visible = Visible {
                n_past,
                window,
                chunk: None,
            };
            let [qkv, qkv_ref] = qkv;
            let [ours, theirs] = &mut pages;
            let (q, page) = append(qkv, &tables[0], std::mem::take(ours), n_past);
            *ours = page;
            let (q_ref, page) =
                portable::append(qkv_ref, &tables[1], std::mem::take(theirs), n_past);
            *theirs = page;
            let what = format!("{n} after {n_past}, {heads} heads of {head_dim}, {window:?}");
            assert_near(&values(q.clone()), &values(q_ref.clone()), 1e-5, &what);
            let out = values(attention(q, ours, visible));
            let want = values(portable::attention(q_ref, theirs, visible));
            assert_near(&out, &want, 2e-5, &what);
            n_past += n;
        }
    }
}
