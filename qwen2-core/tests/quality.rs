//! What packing costs: divergence from float32, and answers of the demo model that go wrong.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use common::{builder, demo, fixture, ids, json, unrounded};
use half::f16;
use qwen2_core::{DType, GenerateOptions, KvCacheType, Logits, Model, Prompt, Quantization};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

/// Mean Kullback-Leibler divergence of `other` from `exact`, over every position.
fn divergence(exact: &Logits, other: &Logits) -> f64 {
    let rows = |logits: &Logits| -> Vec<Vec<f64>> {
        let rows = logits.values.chunks(logits.vocab_size);
        rows.map(log_softmax).collect()
    };
    let (exact, other) = (rows(exact), rows(other));
    assert_eq!(exact.len(), other.len());
    let of_row = |(p, q): (&Vec<f64>, &Vec<f64>)| -> f64 {
        p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
    };
    exact.iter().zip(&other).map(of_row).sum::<f64>() / exact.len() as f64
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x));
    let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
    row.iter().map(|x| f64::from(x - max) - sum.ln()).collect()
}

fn exact(path: std::path::PathBuf) -> Model {
    unrounded(path).dtype(DType::F32).load().unwrap()
}

fn packed(path: std::path::PathBuf, quantization: Quantization) -> Model {
    builder(path).quantize(quantization).load().unwrap()
}

/// Questions with their answers, as the demo model gives them.
fn conversations() -> Vec<Vec<u32>> {
    let evaluation = json(demo().join("evaluation.json"));
    let cases = evaluation["questions"].as_array().unwrap();
    cases
        .iter()
        .step_by(3)
        .map(|case| [ids(&case["prompt_tokens"]), ids(&case["tokens"])].concat())
        .collect()
}

fn mean_divergence(exact: &Model, other: &Model, texts: &[Vec<u32>]) -> f64 {
    let of_text = |tokens: &Vec<u32>| {
        divergence(
            &exact.logits(tokens).unwrap(),
            &other.logits(tokens).unwrap(),
        )
    };
    texts.iter().map(of_text).sum::<f64>() / texts.len() as f64
}

/// Percent of the held-out questions that are answered right.
fn accuracy(model: &Model) -> f64 {
    let evaluation = json(demo().join("evaluation.json"));
    let cases = evaluation["questions"].as_array().unwrap();
    let options = GenerateOptions::greedy().max_new_tokens(200);
    let right = cases.iter().filter(|case| {
        let prompt = Prompt::Tokens(ids(&case["prompt_tokens"]));
        model.generate(prompt, &options).unwrap().text == case["answer"].as_str().unwrap()
    });
    100.0 * right.count() as f64 / cases.len() as f64
}

#[test]
fn q8_diverges_by_less_than_a_thousandth() {
    let texts = conversations();
    assert!(texts.len() > 50);
    let kl = mean_divergence(&exact(demo()), &packed(demo(), Quantization::Q8), &texts);
    assert!(kl > 0.0 && kl <= 1e-3, "demo model: {kl}");
    for name in [
        "tied",
        "untied",
        "mqa",
        "gqa7",
        "head_dim_10",
        "yarn",
        "sliding",
    ] {
        let tokens = ids(&json(fixture(name).join("reference.json"))["tokens"]);
        let other = packed(fixture(name), Quantization::Q8);
        let kl = mean_divergence(&exact(fixture(name)), &other, &[tokens]);
        assert!(kl > 0.0 && kl <= 1e-3, "{name}: {kl}");
    }
}

#[test]
fn packed_models_answer_as_well() {
    let whole = accuracy(&exact(demo()));
    for (quantization, points) in [(Quantization::Q8, 0.5), (Quantization::Q4, 2.0)] {
        let accuracy = accuracy(&packed(demo(), quantization));
        assert!(
            accuracy >= whole - points,
            "{quantization:?}: {accuracy} %, exact {whole} %"
        );
    }
}

#[test]
fn a_packed_cache_diverges_little_and_answers_as_well() {
    let (whole, texts) = (exact(demo()), conversations());
    let right = accuracy(&whole);
    for (kv_cache, most, points) in [(KvCacheType::Q8, 1e-4, 0.5), (KvCacheType::Q4, 3e-2, 2.0)] {
        let model = unrounded(demo()).dtype(DType::F32).kv_cache(kv_cache);
        let model = model.load().unwrap();
        let kl = mean_divergence(&whole, &model, &texts);
        assert!(kl > 0.0 && kl <= most, "{kv_cache}: {kl}");
        let accuracy = accuracy(&model);
        assert!(
            accuracy >= right - points,
            "{kv_cache}: {accuracy} %, exact {right} %"
        );
        for name in ["tied", "gqa7", "head_dim_10", "yarn", "sliding", "moe"] {
            let tokens = ids(&json(fixture(name).join("reference.json"))["tokens"]);
            let model = builder(fixture(name)).kv_cache(kv_cache).load().unwrap();
            let kl = mean_divergence(&exact(fixture(name)), &model, &[tokens]);
            assert!(kl > 0.0 && kl <= most, "{name} {kv_cache}: {kl}");
        }
    }
}

/// Qwen2-7B's keys have channels many times the size of the others. Here such are planted:
/// one channel of the keys times 16, the queries' divided by it, which exact numbers do not notice.
#[test]
fn a_large_channel_of_the_keys_does_not_spoil_a_packed_cache() {
    let directory = tempfile::tempdir().unwrap();
    let config = json(demo().join("config.json"));
    let number = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, heads) = (number("hidden_size"), number("num_attention_heads"));
    let head_dim = hidden / heads;
    write_changed(&demo(), directory.path(), &|name, width, values| {
        let factor = match name {
            _ if name.contains("k_proj") => 16.0,
            _ if name.contains("q_proj") => 1.0 / 16.0,
            _ => return,
        };
        for (row, values) in values.chunks_mut(width).enumerate() {
            // A rotary pair: what turns together has one size.
            if row % (head_dim / 2) == 5 {
                values.iter_mut().for_each(|x| *x *= factor);
            }
        }
    });
    let planted = || unrounded(directory.path().to_owned());
    let (whole, texts) = (exact(demo()), &conversations()[..20]);
    let same = mean_divergence(&whole, &planted().load().unwrap(), texts);
    assert!(same < 1e-6, "{same}");
    for (kv_cache, most) in [(KvCacheType::Q8, 1e-3), (KvCacheType::Q4, 0.35)] {
        let model = planted().kv_cache(kv_cache).load().unwrap();
        let kl = mean_divergence(&whole, &model, texts);
        assert!(kl > 0.0 && kl <= most, "{kv_cache}: {kl}");
    }
}

/// Same bits a weight, same weights packed: the search for the scale has to pay.
#[test]
fn q4_diverges_no_more_than_llama_cpps_q4_0() {
    let directory = tempfile::tempdir().unwrap();
    write_q4_0(&demo(), directory.path());
    let exact = exact(demo());
    let texts = conversations();
    let theirs = unrounded(directory.path().to_owned()).load().unwrap();
    let theirs = mean_divergence(&exact, &theirs, &texts);
    let ours = mean_divergence(&exact, &packed(demo(), Quantization::Q4), &texts);
    assert!(ours > 0.0 && ours <= theirs, "ours {ours}, Q4_0 {theirs}");
}

/// The checkpoint with every matrix but the table rounded to Q4_0, in f32: what llama.cpp computes
/// with, were its activations not rounded.
fn write_q4_0(from: &Path, to: &Path) {
    write_changed(from, to, &|name, width, values| {
        if width > 1 && name != "model.embed_tokens.weight" {
            assert_eq!(width % 32, 0, "{name}");
            values.chunks_mut(32).for_each(q4_0);
        }
    });
}

/// The checkpoint in f32, with `change(name, columns, values)` done to every tensor; a vector has one
/// column.
fn write_changed(from: &Path, to: &Path, change: &dyn Fn(&str, usize, &mut [f32])) {
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let file = fs::read(from.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut bytes: HashMap<String, (Vec<usize>, Vec<u8>)> = HashMap::new();
    for (name, view) in tensors.tensors() {
        assert_eq!(view.dtype(), Dtype::BF16, "{name}");
        let wide = |pair: &[u8]| half::bf16::from_le_bytes([pair[0], pair[1]]).to_f32();
        let mut values: Vec<f32> = view.data().chunks(2).map(wide).collect();
        let columns = view.shape().get(1).copied().unwrap_or(1);
        change(&name, columns, &mut values);
        let data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        bytes.insert(name, (view.shape().to_vec(), data));
    }
    let views: HashMap<_, _> = bytes
        .iter()
        .map(|(name, (shape, data))| {
            let view = TensorView::new(Dtype::F32, shape.clone(), data).unwrap();
            (name.clone(), view)
        })
        .collect();
    let serialized = safetensors::serialize(&views, None).unwrap();
    fs::write(to.join("model.safetensors"), serialized).unwrap();
}

/// llama.cpp's reference quantizer of one block (`quantize_row_q4_0_ref`), and back.
fn q4_0(block: &mut [f32]) {
    let largest = block
        .iter()
        .fold(0.0_f32, |max, x| if x.abs() > max.abs() { *x } else { max });
    let d = largest / -8.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let d = f16::from_f32(d).to_f32();
    for x in block {
        let q = ((*x * inverse + 8.5) as i32).min(15);
        *x = (q - 8) as f32 * d;
    }
}
