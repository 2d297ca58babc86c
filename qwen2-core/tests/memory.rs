//! What loading costs in memory: the stored weights and little more.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Write as _;
use std::path::Path;

use qwen2_core::{Device, GenerateOptions, Model, Prompt};
use serde_json::{Map, Value, json};

/// A line of `/proc/self/status`, in bytes.
fn status(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}

/// A checkpoint of about 100 MB in bf16, all weights zero, with the tokenizer of a fixture.
fn write_checkpoint(directory: &Path) -> u64 {
    let (hidden, intermediate, layers, vocab, kv) = (512, 2048, 4, 65_536, 128);
    let mut config = common::json(common::fixture("tied").join("config.json"));
    for (key, value) in [
        ("hidden_size", hidden),
        ("intermediate_size", intermediate),
        ("num_hidden_layers", layers),
        ("max_window_layers", layers),
        ("vocab_size", vocab),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 2),
    ] {
        config[key] = json!(value);
    }
    config["torch_dtype"] = json!("bfloat16");
    fs::write(directory.join("config.json"), config.to_string()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(common::fixture("tied").join(name), directory.join(name)).unwrap();
    }
    let mut shapes: Vec<(String, Vec<u64>)> = vec![
        ("model.embed_tokens.weight".into(), vec![vocab, hidden]),
        ("model.norm.weight".into(), vec![hidden]),
    ];
    for i in 0..layers {
        let mut push = |name: &str, shape: &[u64]| {
            shapes.push((format!("model.layers.{i}.{name}"), shape.to_vec()))
        };
        push("input_layernorm.weight", &[hidden]);
        push("post_attention_layernorm.weight", &[hidden]);
        for (name, rows) in [("q", hidden), ("k", kv), ("v", kv)] {
            push(&format!("self_attn.{name}_proj.weight"), &[rows, hidden]);
            push(&format!("self_attn.{name}_proj.bias"), &[rows]);
        }
        push("self_attn.o_proj.weight", &[hidden, hidden]);
        push("mlp.gate_proj.weight", &[intermediate, hidden]);
        push("mlp.up_proj.weight", &[intermediate, hidden]);
        push("mlp.down_proj.weight", &[hidden, intermediate]);
    }
    let (mut header, mut at) = (Map::new(), 0);
    for (name, shape) in shapes {
        let end = at + 2 * shape.iter().product::<u64>();
        header.insert(
            name,
            json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}),
        );
        at = end;
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = fs::File::create(directory.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.write_all(&vec![0; at as usize]).unwrap();
    at
}

/// The bound: peak resident memory ≤ stored weights + 10 %.
#[test]
fn loading_and_answering_peaks_at_the_stored_weights_and_a_tenth() {
    let directory = tempfile::tempdir().unwrap();
    let stored = write_checkpoint(directory.path());
    let answer = |path: &Path| {
        let model = Model::builder(path).device(Device::cpu()).load().unwrap();
        let options = GenerateOptions::greedy().ignore_eos(true).max_new_tokens(4);
        let prompt = Prompt::Tokens(vec![1, 2, 3]);
        model.generate(prompt, &options).unwrap();
    };
    // The program itself is read while it runs: once with a few weights.
    answer(&common::fixture("tied"));
    let before = status("VmRSS");
    answer(directory.path());
    let peak = status("VmHWM") - before;
    assert!(
        peak <= stored + stored / 10,
        "{peak} bytes for {stored} stored"
    );
    assert!(
        peak >= stored / 2,
        "the weights were not used: {peak} of {stored}"
    );
}
