//! What a GPU must compute right before it gets a model: our operations beside the portable ones.

use std::sync::{Mutex, PoisonError};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::{append, attention, project};
use crate::ops::fit::Effort;
use crate::ops::packed::{Format, Shape};
use crate::ops::portable;
use crate::ops::{Angles, CacheFormat, KeyValues, Linear, RmsNorm, RopeTables, Visible, Weight};

/// Rows of the products that are compared: decode, few streams, and prompts of odd and even lengths.
const ROWS: [usize; 5] = [1, 7, 64, 500, 512];
/// Tokens that follow each other in the attention that is compared.
const LENGTHS: [usize; 5] = [37, 1, 67, 3, 1];

/// Devices that passed. Their kernels need not be compiled and compared again in this process.
static PASSED: Mutex<Vec<Device>> = Mutex::new(Vec::new());

/// Compares products and attention with the portable operations on the processor.
///
/// # Errors
/// What was wrong, in words.
pub(crate) fn check(device: &Device) -> Result<(), String> {
    let mut passed = PASSED.lock().unwrap_or_else(PoisonError::into_inner);
    if passed.contains(device) {
        return Ok(());
    }
    for kind in kinds(device) {
        for n in ROWS {
            product(kind, n, device)?;
        }
    }
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        if device.supports_dtype(dtype) {
            heads(dtype, device)?;
        }
    }
    passed.push(device.clone());
    Ok(())
}

fn product(kind: Kind, n: usize, device: &Device) -> Result<(), String> {
    let (rows, cols) = (96, 256);
    let [x, x_ref] = pair(&wave(n * cols, 0.37), [n, cols], device);
    let [norm, norm_ref] = norms(cols, device);
    let [ours, theirs] = matrix(kind, [rows, cols], true, device);
    let ours = values(project(&x, &norm, [&ours]));
    let theirs = values(portable::project(&x_ref, &norm_ref, [&theirs]));
    // Many rows are multiplied in bf16 or tf32 where the device has matrix units.
    let tolerance = if n > 8 { 2e-2 } else { 1e-4 };
    near(&ours, &theirs, tolerance).map_err(|why| format!("{n} rows by {kind:?}: {why}"))
}

fn heads(dtype: DType, device: &Device) -> Result<(), String> {
    let (kv_heads, width) = (1, 3 * 64);
    let on = [device, &Device::flex()];
    let format = CacheFormat::Floats(dtype);
    // Prompts over a cache of 16-bit numbers are read by matrix units where the device has them.
    let tolerance = if dtype == DType::F32 { 1e-3 } else { 2e-2 };
    let [mut ours, mut theirs] =
        on.map(|on| vec![KeyValues::zeros(format, [kv_heads, 256, 64], on)]);
    let mut n_past = 0;
    for n in LENGTHS {
        let [qkv, qkv_ref] = pair(&wave(n * width, 0.37 + n as f32), [n, width], device);
        let [tables, tables_ref] = on.map(|on| tables(n, 32, on));
        let (q, page) = append(qkv, &tables, ours, n_past);
        let (q_ref, page_ref) = portable::append(qkv_ref, &tables_ref, theirs, n_past);
        (ours, theirs) = (page, page_ref);
        let visible = Visible {
            n_past,
            window: None,
            chunk: None,
        };
        let out = values(attention(q, &ours, visible));
        let want = values(portable::attention(q_ref, &theirs, visible));
        near(&out, &want, tolerance)
            .map_err(|why| format!("attention, {n} after {n_past}, {dtype:?}: {why}"))?;
        n_past += n;
    }
    Ok(())
}

/// Whether no value is further off than the share `tolerance` of the largest one, or of 1.
pub(super) fn near(ours: &[f32], theirs: &[f32], tolerance: f32) -> Result<(), String> {
    if ours.len() != theirs.len() {
        return Err(format!("{} values instead of {}", ours.len(), theirs.len()));
    }
    let most = theirs.iter().fold(1.0_f32, |most, x| most.max(x.abs()));
    let is_near = |(a, b): (&f32, &f32)| (a - b).abs() <= tolerance * most; // never NaN
    match ours.iter().zip(theirs).position(|pair| !is_near(pair)) {
        None => Ok(()),
        Some(i) => Err(format!("{} instead of {} at {i}", ours[i], theirs[i])),
    }
}

/// What the weights of a matrix are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Dense(DType),
    Packed(Format),
}

/// Those that the device has.
pub(super) fn kinds(device: &Device) -> Vec<Kind> {
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

pub(super) fn wave(n: usize, f: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * f).sin()).collect()
}

pub(super) fn tensor<const D: usize>(
    values: Vec<f32>,
    dims: [usize; D],
    to: (&Device, DType),
) -> Tensor<D> {
    let data = TensorData::new(values, dims).convert_dtype(to.1);
    Tensor::from_data(data, to)
}

pub(super) fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    let data = x.into_data().convert_dtype(DType::F32);
    data.try_to_vec().expect("f32")
}

/// The same matrix on both devices.
pub(super) fn matrix(kind: Kind, [rows, cols]: [usize; 2], bias: bool, on: &Device) -> [Linear; 2] {
    let w: Vec<f32> = wave(rows * cols, 0.71).iter().map(|x| x * 0.1).collect();
    [on, &Device::flex()].map(|device| {
        let weight = match kind {
            Kind::Dense(dtype) => Weight::Dense(tensor(w.clone(), [rows, cols], (device, dtype))),
            Kind::Packed(format) => packed(&w, Shape { format, rows, cols }, device),
        };
        Linear {
            weight,
            bias: bias.then(|| tensor(wave(rows, 0.3), [rows], (device, DType::F32))),
            adapters: Vec::new(),
        }
    })
}

fn packed(w: &[f32], shape: Shape, device: &Device) -> Weight {
    let mut bytes = vec![0; shape.bytes()];
    for (panel, out) in bytes.chunks_mut(shape.panel_bytes()).enumerate() {
        let row = |i: usize, out: &mut [f32]| {
            out.copy_from_slice(&w[i * shape.cols..][..shape.cols]);
        };
        shape.pack_panel(panel, Effort::Search, &row, out);
    }
    let bytes = if *device == Device::flex() {
        let n = bytes.len();
        Tensor::<1, Int>::from_data(TensorData::new(bytes, [n]), (device, DType::U8))
    } else {
        let words: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        let n = words.len();
        Tensor::<1, Int>::from_data(TensorData::new(words, [n]), (device, DType::U32))
    };
    Weight::Packed { shape, bytes }
}

/// The same values on both devices.
pub(super) fn pair(values: &[f32], dims: [usize; 2], device: &Device) -> [Tensor<2>; 2] {
    [device, &Device::flex()].map(|on| tensor(values.to_vec(), dims, (on, DType::F32)))
}

pub(super) fn norms(cols: usize, device: &Device) -> [RmsNorm; 2] {
    let weight: Vec<f32> = wave(cols, 0.9).iter().map(|x| 1.0 + 0.5 * x).collect();
    [device, &Device::flex()].map(|on| RmsNorm {
        weight: tensor(weight.clone(), [cols], (on, DType::F32)),
        eps: 1e-6,
    })
}

/// Angles of `n` tokens, `half` of them for each.
pub(super) fn tables(n: usize, half: usize, on: &Device) -> RopeTables {
    let angles = Angles {
        cos: tensor(wave(n * half, 0.8), [n, half], (on, DType::F32)),
        sin: tensor(wave(n * half, 0.9), [n, half], (on, DType::F32)),
    };
    RopeTables {
        keys: angles.clone(),
        queries: angles,
        chunk: None,
    }
}
