//! Every kernel against the portable default on the processor, on the device that `QWEN2_TEST_DEVICE` names.

use burn::tensor::{DType, Device};

use super::check::{Kind, kinds, matrix, near, norms, pair, tables, values, wave};
use super::*;
use crate::ops::CacheFormat;
use crate::ops::packed::Format;

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

fn assert_near(ours: &[f32], theirs: &[f32], tolerance: f32, what: &str) {
    if let Err(why) = near(ours, theirs, tolerance) {
        panic!("{what}: {why}");
    }
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
            let tables = on.map(|on| tables(n, head_dim / 2, on));
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
