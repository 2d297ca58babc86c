//! Checkpoints that are packed once and for all.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use common::{builder, demo, fixture, ids, json};
use qwen2_core::{DType, Error, ErrorKind, GenerateOptions, Message, Quantization, quantize};

fn pack(from: PathBuf, to: &Path, quantization: Quantization) -> Result<(), Error> {
    quantize(from, to, quantization, |_| ControlFlow::Continue(()))
}

fn refusal(result: Result<impl Sized, Error>) -> (ErrorKind, String) {
    let error = result.err().unwrap();
    assert!(error.help().is_some(), "{error}");
    (error.kind(), error.to_string())
}

#[test]
fn a_packed_directory_is_what_packing_while_loading_gives() {
    let directory = tempfile::tempdir().unwrap();
    for quantization in [Quantization::Q8, Quantization::Q4] {
        for name in ["tied", "untied", "head_dim_10", "bf16_shards"] {
            let to = directory
                .path()
                .join(format!("{name}-{}", quantization.name()));
            pack(fixture(name), &to, quantization).unwrap();
            let tokens = ids(&json(fixture(name).join("reference.json"))["tokens"]);
            let stored = builder(to.clone()).load().unwrap();
            let packed = builder(fixture(name))
                .quantize(quantization)
                .load()
                .unwrap();
            let copied = builder(to).preload(true).load().unwrap();
            let want = packed.logits(&tokens).unwrap().values;
            for model in [&stored, &copied] {
                assert_eq!(model.logits(&tokens).unwrap().values, want, "{name}");
            }
            let per_token = [&stored, &packed].map(|model| model.memory().cache_per_token);
            assert_eq!(per_token[0], per_token[1], "{name}");
        }
    }
    let left: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(left.len(), 8, "nothing but the directories: {left:?}");
}

#[test]
fn preloading_changes_no_number() {
    for name in ["tied", "f16", "bf16_shards"] {
        let tokens = ids(&json(fixture(name).join("reference.json"))["tokens"]);
        let [mapped, copied] = [false, true].map(|preload| {
            let model = builder(fixture(name)).preload(preload).load().unwrap();
            model.logits(&tokens).unwrap().values
        });
        assert_eq!(mapped, copied, "{name}");
    }
}

#[test]
fn a_packed_demo_model_talks() {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("demo");
    let mut last = None;
    let steps = |progress| {
        last = Some(progress);
        ControlFlow::Continue(())
    };
    quantize(demo(), &to, Quantization::Q8, steps).unwrap();
    let last = last.unwrap();
    assert_eq!(last.bytes_done, last.bytes_total);
    let size = |path: PathBuf| fs::metadata(path.join("model.safetensors")).unwrap().len();
    assert!(size(to.clone()) < size(demo()) * 6 / 10);
    let model = builder(to).load().unwrap();
    let options = GenerateOptions::greedy();
    let answer = model
        .chat(&[Message::user("What is 12 plus 30?")], &options)
        .unwrap();
    assert!(answer.text.contains("42"), "{}", answer.text);
}

#[test]
fn what_is_packed_cannot_be_kept_in_another_way() {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("packed");
    pack(fixture("tied"), &to, Quantization::Q4).unwrap();
    let again = pack(
        to.clone(),
        &directory.path().join("again"),
        Quantization::Q4,
    );
    let quantize = builder(to.clone()).quantize(Quantization::Q8).load();
    let dtype = builder(to.clone()).dtype(DType::F32).load();
    for (result, key) in [
        (again.map(|()| None), "quantize"),
        (quantize.map(Some), "quantize"),
        (dtype.map(Some), "dtype"),
    ] {
        let (kind, text) = refusal(result);
        assert_eq!(kind, ErrorKind::InvalidArgument);
        assert!(text.starts_with("checkpoint is packed already: "), "{text}");
        assert!(text.ends_with(&format!(": {key}")), "{text}");
    }
}

#[test]
fn nothing_is_left_of_what_fails() {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("packed");
    let stopped = quantize(
        fixture("tied"),
        &to,
        Quantization::Q8,
        |progress| match progress.bytes_done {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        },
    );
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    fs::create_dir(&to).unwrap();
    let (kind, text) = refusal(pack(fixture("tied"), &to, Quantization::Q8));
    assert_eq!(kind, ErrorKind::InvalidArgument);
    assert!(text.starts_with("destination exists: "), "{text}");
    assert_eq!(fs::read_dir(&to).unwrap().count(), 0, "and is not touched");
    let nowhere = directory.path().join("no/such/place");
    assert_eq!(
        refusal(pack(fixture("tied"), &nowhere, Quantization::Q8)).0,
        ErrorKind::NotFound
    );
}

#[test]
fn damage_is_told_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("packed");
    pack(fixture("tied"), &to, Quantization::Q4).unwrap();
    let config = fs::read_to_string(to.join("config.json")).unwrap();
    let with = |from: &str, into: &str| {
        assert!(config.contains(from), "{config}");
        fs::write(to.join("config.json"), config.replace(from, into)).unwrap();
        refusal(builder(to.clone()).load())
    };
    let (kind, text) = with("\"version\": 1", "\"version\": 2");
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(
        text.starts_with("packing is of another version: "),
        "{text}"
    );
    let (kind, text) = with("\"quantization_config\"", "\"another\"");
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(
        text.starts_with("dtype of a tensor is not supported: "),
        "{text}"
    );
    assert!(text.ends_with(": U8"), "{text}");
    let reference: serde_json::Value = serde_json::from_str(&config).unwrap();
    let size = format!("\"intermediate_size\": {}", reference["intermediate_size"]);
    let (kind, text) = with(&size, "\"intermediate_size\": 640");
    assert_eq!(kind, ErrorKind::InvalidFile);
    assert!(
        text.starts_with("packed tensor has the wrong shape: "),
        "{text}"
    );
}
