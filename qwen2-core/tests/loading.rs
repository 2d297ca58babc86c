//! Sources, contexts, devices and vocabularies that a loader must take or refuse.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::{builder, fixture, ids, json, load};
use qwen2_core::{Device, ErrorKind, GenerateOptions, Model, Prompt, Quantization, Tokenizer};

fn copy(name: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    directory
}

#[test]
fn a_vocabulary_smaller_than_the_tokenizers_is_refused() {
    // 296 ids and 320 rows: as many more ids as make it 330.
    let directory = copy("tied");
    let path = directory.path().join("tokenizer.json");
    let mut tokenizer = json(path.clone());
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let next = added
        .iter()
        .map(|token| token["id"].as_u64().unwrap())
        .max()
        .unwrap()
        + 1;
    let template = added[0].clone();
    for id in next..330 {
        let mut token = template.clone();
        token["id"] = id.into();
        token["content"] = format!("<|extra_{id}|>").into();
        tokenizer["added_tokens"]
            .as_array_mut()
            .unwrap()
            .push(token);
    }
    fs::write(&path, tokenizer.to_string()).unwrap();
    let error = Model::load(directory.path()).unwrap_err();
    assert_eq!(
        (error.kind(), error.key()),
        (ErrorKind::InvalidFile, Some("vocab_size"))
    );
    assert!(error.to_string().contains("config.json"), "{error}");
    assert!(error.help().is_some());
}

#[test]
fn a_missing_tokenizer_names_its_file() {
    let directory = copy("tied");
    fs::remove_file(directory.path().join("tokenizer.json")).unwrap();
    let error = Model::load(directory.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    let error = Tokenizer::load(directory.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn a_device_that_is_not_there_is_refused_before_anything_is_read() {
    let missing = ["cuda", "metal", "vulkan", "wgpu", "ndarray"]
        .into_iter()
        .find(|name| !Device::compiled().contains(name));
    if let Some(name) = missing {
        let error = Model::builder("/no/such/directory")
            .device(name.parse().unwrap())
            .load()
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DeviceUnavailable);
        assert_eq!(error.key(), Some(name));
    }
}

#[test]
fn the_stop_set_is_the_union_over_the_files() {
    let model = load(fixture("tied"));
    let config = json(fixture("tied").join("config.json"));
    let stop = &model.generation_config().eos_token_ids;
    assert!(stop.contains(&(config["eos_token_id"].as_u64().unwrap() as u32)));
    assert!(stop.contains(&model.tokenizer().eos_token_id().unwrap()));
}

#[test]
fn packed_weights_stay_close_to_the_stored_ones() {
    let reference = json(fixture("gqa7").join("reference.json"));
    let tokens = ids(&reference["tokens"]);
    let exact = load(fixture("gqa7")).logits(&tokens).unwrap();
    // Two layers of width 32 to 64, logits up to 4: 8 bits lose little, 4 bits visibly.
    for (quantization, bound) in [(Quantization::Q8, 0.005), (Quantization::Q4, 0.5)] {
        let model = builder(fixture("gqa7"))
            .quantize(quantization)
            .load()
            .unwrap();
        let logits = model.logits(&tokens).unwrap();
        let divergence = mean_divergence(&exact.values, &logits.values, exact.vocab_size);
        assert!(divergence < bound, "{quantization:?}: {divergence}");
        assert!(divergence > 0.0, "{quantization:?} was not applied");
        let options = GenerateOptions::greedy()
            .ignore_eos(true)
            .max_new_tokens(20);
        let generation = model
            .generate(Prompt::Tokens(tokens.clone()), &options)
            .unwrap();
        assert_eq!(generation.tokens.len(), 20);
    }
}

/// Mean Kullback-Leibler divergence of the softmax of `b` from that of `a`, row by row, in nats.
fn mean_divergence(a: &[f32], b: &[f32], width: usize) -> f64 {
    let softmax = |row: &[f32]| -> Vec<f64> {
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        row.iter().map(|x| f64::from(*x).exp() / sum).collect()
    };
    let rows: Vec<f64> = a
        .chunks(width)
        .zip(b.chunks(width))
        .map(|(a, b)| {
            softmax(a)
                .iter()
                .zip(softmax(b))
                .map(|(p, q)| p * (p / q).ln())
                .sum()
        })
        .collect();
    rows.iter().sum::<f64>() / rows.len() as f64
}

#[test]
fn settings_of_zero_are_refused_by_name() {
    let refused = |builder: qwen2_core::ModelBuilder| {
        let error = builder.load().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        error.key().map(str::to_owned)
    };
    let key = refused(builder(fixture("tied")).context_length(0));
    assert_eq!(key.as_deref(), Some("context_length"));
    let key = refused(builder(fixture("tied")).threads(0));
    assert_eq!(key.as_deref(), Some("threads"));
}

#[cfg(unix)]
#[test]
fn a_tokenizer_outside_of_the_models_directory_or_in_a_pipe_is_refused() {
    let directory = copy("tied");
    let inside = directory.path().join("tokenizer.json");
    let outside = tempfile::tempdir().unwrap();
    fs::copy(&inside, outside.path().join("secret")).unwrap();
    fs::remove_file(&inside).unwrap();
    std::os::unix::fs::symlink(outside.path().join("secret"), &inside).unwrap();
    let error = Model::load(directory.path()).unwrap_err();
    let refused = (ErrorKind::InvalidFile, Some(inside.as_path()));
    assert_eq!((error.kind(), error.path()), refused, "{error}");
    fs::remove_file(&inside).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&inside).status();
    assert!(made.unwrap().success());
    for error in [
        Model::load(directory.path()).unwrap_err(),
        Tokenizer::load(directory.path()).unwrap_err(),
    ] {
        assert_eq!((error.kind(), error.path()), refused, "{error}");
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }
}
