//! Every kernel against the portable default on the processor, on the device that `QWEN2_TEST_DEVICE` names.

use burn::tensor::{DType, Device};

use super::check::{Kind, kinds, matrix, near, norms, pair, tables, values, wave};
use super::*;
use crate::ops::packed::Format;
use crate::ops::{CacheFormat, Mixture, Stack};

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
            let ours = values(swiglu(&x, &norm, [&gate, &o, &q[0]]));
            let theirs = portable::swiglu(&x_ref, &norm_ref, &gate_ref, &o_ref);
            assert_near(&ours, &values(theirs), tolerance, &what);
        }
    }
}

/// Products of prompts by Hopper's bulk copies, with cubes of each size, whole ones and parts.
#[test]
#[allow(clippy::print_stderr)]
fn cubes_of_every_size_multiply() {
    let Some(device) = device("cubes_of_every_size_multiply") else {
        return;
    };
    for rows in matmul::ROWS {
        for (n, cols, out) in [(9, 64, 40), (300, 192, 272), (256, 128, 128)] {
            let [x, x_ref] = pair(&wave(n * cols, 0.37), [n, cols], &device);
            let [w, w_ref] = pair(&wave(out * cols, 0.71), [out, cols], &device);
            if !product::is_cuda(&cube::raw(x.clone()).client) {
                eprintln!("cubes_of_every_size_multiply: skipped, this is not CUDA");
                return;
            }
            let [x, w] = [x, w].map(|tensor| tensor.cast(DType::BF16));
            let ours = match matmul::bf16_by(rows, x, w) {
                Ok(ours) => ours,
                Err(why) => {
                    eprintln!("cubes_of_every_size_multiply: skipped, {why}");
                    return;
                }
            };
            let [x_ref, w_ref] =
                [x_ref, w_ref].map(|tensor| tensor.cast(DType::BF16).cast(DType::F32));
            let theirs = x_ref.matmul(w_ref.transpose());
            let what = format!("{n} rows of {cols} by {out}, {rows} at once");
            assert_near(&values(ours), &values(theirs), 1e-5, &what);
        }
    }
}

/// Matrices that are rows of one, as the loader puts them, are multiplied at once; the result is that of each.
#[test]
fn matrices_behind_each_other_are_one() {
    let Some(device) = device("matrices_behind_each_other_are_one") else {
        return;
    };
    let (cols, rows) = (256, [64, 32, 64]);
    for kind in kinds(&device) {
        let [all, all_ref] = matrix(kind, [rows.iter().sum(), cols], true, &device);
        let parts = |all: &Linear| {
            let mut first = 0;
            rows.map(|rows| {
                let at = first..first + rows;
                first = at.end;
                let bias = all.bias.clone().map(|bias| bias.narrow(0, at.start, rows));
                Linear {
                    weight: all.weight.rows(at),
                    bias,
                    adapters: Vec::new(),
                }
            })
        };
        let [ours, theirs] = [parts(&all), parts(&all_ref)];
        let [q, k, v] = &ours;
        let united = product::united(9, &[q, k, v]).expect("they lie behind each other");
        assert_eq!(united.out_features(), all.out_features());
        assert!(
            product::united(9, &[q, v]).is_none(),
            "not behind each other"
        );
        for n in [3, 9, 40] {
            let what = format!("{kind:?}, {n} rows");
            let [x, x_ref] = pair(&wave(n * cols, 0.37), [n, cols], &device);
            let [norm, norm_ref] = norms(cols, &device);
            let tolerance = if n > 8 { 2e-2 } else { 2e-5 };
            let out = values(project(&x, &norm, [q, k, v]));
            let want = values(portable::project(&x_ref, &norm_ref, theirs.each_ref()));
            assert_near(&out, &want, tolerance, &what);
            let [halves, halves_ref] = [&all, &all_ref].map(|all| {
                [0..64, 64..128].map(|rows| Linear {
                    weight: all.weight.rows(rows),
                    bias: None,
                    adapters: Vec::new(),
                })
            });
            let out = values(swiglu(&x, &norm, [&halves[0], &halves[1], &all]));
            let want = portable::swiglu(&x_ref, &norm_ref, &halves_ref[0], &halves_ref[1]);
            assert_near(&out, &values(want), tolerance, &what);
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
    let mut dtypes = vec![(DType::F32, 2e-5)];
    let halves = [(DType::F16, 2e-3), (DType::BF16, 1e-2)];
    dtypes.extend(halves.into_iter().filter(|of| device.supports_dtype(of.0)));
    let shapes = [
        (4, 2, 64, None),
        (7, 1, 128, None),
        (6, 2, 40, Some(50)),
        (2, 2, 16, Some(1)),
        (2, 1, 32, Some(40)),
    ];
    for ((dtype, tolerance), (heads, kv_heads, head_dim, window)) in dtypes
        .into_iter()
        .flat_map(|of| shapes.map(|shape| (of, shape)))
    {
        let format = CacheFormat::Floats(dtype);
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
            let what =
                format!("{n} after {n_past}, {heads} heads of {head_dim}, {window:?}, {dtype:?}");
            assert_near(&values(q.clone()), &values(q_ref.clone()), 1e-5, &what);
            let out = values(attention(q, ours, visible));
            let want = values(portable::attention(q_ref, theirs, visible));
            assert_near(&out, &want, tolerance, &what);
            n_past += n;
        }
    }
}

/// A step that is told its place by the device is the one that is told by the host.
#[test]
fn a_place_on_the_device_is_one_on_the_host() {
    let Some(device) = device("a_place_on_the_device_is_one_on_the_host") else {
        return;
    };
    let capacity = 512;
    for (heads, kv_heads, head_dim, window) in [
        (4, 2, 64, None),
        (7, 1, 128, None),
        (6, 2, 40, Some(50)),
        (2, 2, 16, Some(1)),
    ] {
        let format = CacheFormat::Floats(DType::F32);
        let on = [&device, &Device::flex()];
        let [page, mut theirs] = on
            .map(|on| KeyValues::zeros(format, [kv_heads, capacity, head_dim], on))
            .map(|page| vec![page]);
        assert!(takes_places(heads, &page[0]));
        let [whole, whole_ref] = on.map(|on| tables(capacity, head_dim / 2, on));
        let [token, at] = replay::place(&device);
        let place = Place {
            token,
            n_past: at,
            angles: whole.keys,
        };
        for n_past in [0, 1, 2, 62, 63, 64, 65, 300, 511] {
            let width = (heads + 2 * kv_heads) * head_dim;
            let [qkv, qkv_ref] = pair(&wave(width, 0.37 + n_past as f32), [1, width], &device);
            let visible = Visible {
                n_past,
                window,
                chunk: None,
            };
            replay::set(&place, 3, n_past);
            let out = values(attend_at(qkv, &page[0], &place, window));
            let row = |table: &Tensor<2>| table.clone().narrow(0, n_past, 1);
            let angles = crate::ops::Angles {
                cos: row(&whole_ref.keys.cos),
                sin: row(&whole_ref.keys.sin),
            };
            let tables_ref = RopeTables {
                keys: angles.clone(),
                queries: angles,
                chunk: None,
            };
            let (q_ref, pages) = portable::append(qkv_ref, &tables_ref, theirs, n_past);
            theirs = pages;
            let what = format!("after {n_past}, {heads} heads of {head_dim}, {window:?}");
            let want = values(portable::attention(q_ref, &theirs, visible));
            assert_near(&out, &want, 2e-5, &what);
        }
    }
}

#[test]
fn the_best_is_the_first_of_the_highest() {
    let Some(device) = device("the_best_is_the_first_of_the_highest") else {
        return;
    };
    let [token, at] = replay::place(&device);
    let angles = crate::ops::Angles {
        cos: Tensor::zeros([1, 1], &device),
        sin: Tensor::zeros([1, 1], &device),
    };
    let place = Place {
        token,
        n_past: at,
        angles,
    };
    let number =
        |tensor: &Tensor<1, Int>| tensor.clone().into_data().as_slice::<i32>().expect("i32")[0];
    let both = |row: &[f32]| {
        replay::set(&place, 7, 41);
        let [row, _] = pair(row, [1, row.len()], &device);
        let best = replay::best(&row, &place);
        let likely = replay::likeliest(&row, &best).into_data();
        let likely = replay::read_likeliest(likely.as_slice::<i32>().expect("i32"));
        (number(&best.found), likely)
    };
    let likeliest = |row: &[f32]| both(row).1;
    let ask = |row: &[f32]| {
        let (found, likely) = both(row);
        assert_eq!(number(&place.n_past), 42);
        assert_eq!(number(&place.token), found.max(0), "the next token");
        assert!(
            likely.is_none() || found >= 0,
            "the likeliest of no numbers"
        );
        if let Some(likely) = likely {
            let shares = row.len().div_ceil(256).min(128);
            assert!(likely.len() >= shares, "{} of {shares}", likely.len());
            let least = likely
                .iter()
                .fold(f32::INFINITY, |least, (_, x)| least.min(*x));
            let all = row.iter().zip(0..).filter(|(x, _)| **x >= least);
            let all: Vec<_> = all.map(|(x, token)| (token, *x)).collect();
            assert_eq!(likely, all, "all that are as high as the least of them");
        }
        found
    };
    // Logits without ties are few enough to be read, those of one value are not.
    let row: Vec<f32> = wave(151_936, 0.713).iter().map(|x| x * x * x).collect();
    assert!(likeliest(&row).is_some_and(|likely| likely.len() >= 128));
    assert_eq!(likeliest(&[1.0; 5_000]), None);
    for n in [1, 2, 255, 256, 257, 5_000, 65_537, 151_936] {
        let mut row: Vec<f32> = wave(n, 0.71).iter().map(|x| (x * 40.0).round()).collect();
        let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let first = row.iter().position(|x| *x == highest).expect("one");
        assert_eq!(ask(&row), first as i32, "{n}");
        row[n - 1] = highest + 1.0;
        assert_eq!(ask(&row), n as i32 - 1, "the last of {n}");
        let mut only = vec![f32::NEG_INFINITY; n];
        assert_eq!(ask(&only), -1, "no highest of {n}");
        only[n / 2] = -1e30;
        assert_eq!(ask(&only), (n / 2) as i32, "one of {n}");
        for bad in [f32::NAN, f32::INFINITY] {
            let mut row = row.clone();
            row[n / 3] = bad;
            assert_eq!(ask(&row), -1, "{bad} in {n}");
        }
    }
}

/// Experts that kernels choose are those that the host chooses.
#[test]
fn a_mixture_chosen_on_the_device_is_one_chosen_on_the_host() {
    let Some(device) = device("a_mixture_chosen_on_the_device_is_one_chosen_on_the_host") else {
        return;
    };
    let stacked = |kind, count: usize, rows: usize, cols: usize| {
        matrix(kind, [count * rows, cols], false, &device).map(|linear| match linear.weight {
            Weight::Packed { shape, bytes } => {
                let shape = crate::ops::packed::Shape { rows, ..shape };
                Weight::Packed { shape, bytes }
            }
            dense => dense,
        })
    };
    for kind in kinds(&device) {
        for (n, count, k, norm_topk_prob, hidden, intermediate) in [
            (1, 60, 8, true, 128, 48),
            (1, 2, 1, false, 32, 320),
            (3, 60, 8, false, 128, 48),
            (8, 5, 2, true, 32, 320),
        ] {
            let what = format!("{kind:?}, {k} of {count} for {n}");
            let [h, h_ref] = pair(&wave(n * hidden, 0.37), [n, hidden], &device);
            let [norm, norm_ref] = norms(hidden, &device);
            let [router, router_ref] = matrix(kind, [count, hidden], false, &device);
            let [own_gate, own_gate_ref] = matrix(kind, [1, hidden], false, &device);
            let gates = stacked(kind, count, intermediate, hidden);
            let ups = matrix(kind, [intermediate, hidden], false, &device);
            let downs = stacked(kind, count, hidden, intermediate);
            let own_down = matrix(kind, [hidden, intermediate], false, &device);
            let [gate, gate_ref] = gates;
            let [down, down_ref] = downs;
            let stack = Stack {
                count,
                up: gate.clone(),
                gate,
                down,
            };
            let mixture = Mixture {
                router: &router,
                shared_gate: &own_gate,
                stack: &stack,
                shared: [&ups[0], &ups[0], &own_down[0]],
                num_experts_per_tok: k,
                norm_topk_prob,
            };
            assert!(takes_mixture(&h, &mixture), "{what}");
            let ours = values(super::mixture(h, &norm, &mixture));

            let x = &norm_ref;
            let scores = portable::project(&h_ref, x, [&router_ref, &own_gate_ref]);
            let scores = values(scores);
            let plain = |weight: Weight| Linear {
                weight,
                bias: None,
                adapters: Vec::new(),
            };
            let own = [&ups[1], &ups[1], &own_down[1]].map(Linear::clone);
            let mut each = Vec::new();
            for (token, scores) in scores.chunks_exact(count + 1).enumerate() {
                let exps: Vec<f32> = scores[..count].iter().map(|score| score.exp()).collect();
                let mut order: Vec<usize> = (0..count).collect();
                order.sort_by(|a, b| exps[*b].total_cmp(&exps[*a]).then(a.cmp(b)));
                order.truncate(k);
                let kept: f32 = order.iter().map(|expert| exps[*expert]).sum();
                let all: f32 = exps.iter().sum();
                let divisor = if norm_topk_prob { kept } else { all };
                for expert in order {
                    let parts = [&gate_ref, &gate_ref, &down_ref];
                    let linears = parts.map(|weight| plain(weight.part(expert, count)));
                    each.push((linears, token, exps[expert] / divisor));
                }
                let gate = 1.0 / (1.0 + (-scores[count]).exp());
                each.push((own.clone(), token, gate));
            }
            let visits = each.iter().map(|([gate, up, down], token, weight)| Visit {
                gate,
                up,
                down,
                route: crate::ops::Route {
                    tokens: vec![*token as u32],
                    weights: vec![*weight],
                },
            });
            let theirs = values(portable::experts(h_ref, x, visits.collect()));
            assert_near(&ours, &theirs, 5e-5, &what);
        }
    }
}

/// Activations of Qwen2 have outliers far above what f16 holds; nothing between weights and sums is kept in it.
#[test]
fn outliers_stay_numbers() {
    let Some(device) = device("outliers_stay_numbers") else {
        return;
    };
    for kind in kinds(&device) {
        for n in [1, 12] {
            let (cols, rows) = (128, 48);
            let mut x = wave(n * cols, 0.37);
            x.iter_mut().step_by(37).for_each(|x| *x *= 3e6);
            let [x, x_ref] = pair(&x, [n, cols], &device);
            let [w, w_ref] = matrix(kind, [rows, cols], true, &device);
            let [h, h_ref] = pair(&wave(n * rows, 0.21), [n, rows], &device);
            let ours = values(add_project(h, &x, &w));
            let theirs = values(portable::add_project(h_ref, x_ref, &w_ref));
            assert!(theirs.iter().any(|y| y.abs() > 1e5), "{kind:?}: no outlier");
            let tolerance = if n > 8 { 2e-2 } else { 2e-5 };
            assert_near(&ours, &theirs, tolerance, &format!("{kind:?}, {n}"));
        }
    }
}
