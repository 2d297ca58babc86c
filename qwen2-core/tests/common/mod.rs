//! Where the vectors are, and how the tests open models.
#![allow(dead_code)] // every test binary uses a part
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use qwen2_core::{DType, Device, Model, ModelBuilder};
use serde_json::Value;

pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

pub fn fixture(name: &str) -> PathBuf {
    root().join("conformance/models").join(name)
}

pub fn demo() -> PathBuf {
    root().join("examples/demo-model")
}

/// The device that these tests run on: `QWEN2_TEST_DEVICE`, else the CPU.
pub fn device() -> Device {
    std::env::var("QWEN2_TEST_DEVICE")
        .unwrap_or_else(|_| "cpu".to_owned())
        .parse()
        .unwrap()
}

pub fn builder(path: PathBuf) -> ModelBuilder {
    Model::builder(path).device(device())
}

pub fn load(path: PathBuf) -> Model {
    builder(path).load().unwrap()
}

/// With a cache that rounds nothing, as the references were computed.
pub fn unrounded(path: PathBuf) -> ModelBuilder {
    builder(path).kv_cache(DType::F32)
}

pub fn json(path: PathBuf) -> Value {
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

pub fn floats(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap() as f32)
        .collect()
}

/// Rows of numbers, flattened.
pub fn rows(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().flat_map(floats).collect()
}

pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // A NaN must not compare as equal.
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |max, x| if x > max || x.is_nan() { x } else { max })
}
