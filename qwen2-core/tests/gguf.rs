//! GGUF files give what the checkpoint gives that they were made of.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use common::{demo, fixture, ids, json, max_difference, root, rows, unrounded};
use qwen2_core::{DType, ErrorKind, Message, Quantization, Tokenizer, convert, inspect, quantize};
use serde_json::{Value, json as value};

fn gguf(name: &str) -> PathBuf {
    root().join("conformance/gguf").join(name)
}

const PAIRS: [(&str, &str); 2] = [
    ("moe.gguf", "moe"),
    ("bf16_shards-00001-of-00002.gguf", "bf16_shards"),
];

#[test]
fn logits_equal_those_of_the_checkpoint() {
    for (file, name) in PAIRS {
        let tokens = ids(&json(fixture(name).join("reference.json"))["tokens"]);
        let want = unrounded(fixture(name)).load().unwrap();
        let got = unrounded(gguf(file)).load().unwrap();
        assert_eq!(
            got.logits(&tokens).unwrap().values,
            want.logits(&tokens).unwrap().values,
            "{name}"
        );
        let (got, want) = (got.config(), want.config());
        assert_eq!(got.parameter_count(), want.parameter_count());
        assert_eq!(
            (got.rms_norm_eps, got.rope_theta, got.tie_word_embeddings),
            (want.rms_norm_eps, want.rope_theta, want.tie_word_embeddings)
        );
    }
}

#[test]
fn the_embedded_vocabulary_and_template_are_those_of_the_checkpoint() {
    for (file, name) in PAIRS {
        let got = Tokenizer::load(gguf(file)).unwrap();
        let want = Tokenizer::load(fixture(name)).unwrap();
        assert_eq!(got.vocab_size(), want.vocab_size());
        assert_eq!(got.eos_token_id(), want.eos_token_id());
        assert_eq!(got.pad_token_id(), want.pad_token_id());
        assert_eq!(got.chat_template(), want.chat_template());
        for text in [
            "Hello, the quick brown fox!",
            "你好 <|im_end|>",
            "e\u{301}  \n\n x",
        ] {
            assert_eq!(got.encode(text).unwrap(), want.encode(text).unwrap());
            assert_eq!(
                got.encode_with_special_tokens(text).unwrap(),
                want.encode_with_special_tokens(text).unwrap()
            );
        }
        let messages = [Message::user("Hello")];
        assert_eq!(
            got.encode_chat(&messages, true).unwrap(),
            want.encode_chat(&messages, true).unwrap()
        );
        let ends = unrounded(gguf(file)).load().unwrap();
        let ends = &ends.generation_config().eos_token_ids;
        assert!(want.eos_token_id().is_some_and(|id| ends.contains(&id)));
    }
}

/// llama.cpp's Q4_K_M, whose types are mixed, against transformers with the numbers of the gguf package.
#[test]
fn mixed_k_quants_give_the_logits_of_the_numbers_that_they_stand_for() {
    let directory = root().join("conformance/gguf_mixed");
    let reference = json(directory.join("reference.json"));
    let file = directory.join("model.gguf");
    let (tokens, want) = (ids(&reference["tokens"]), rows(&reference["logits"]));
    let found = inspect(&file, |_| ControlFlow::Continue(())).unwrap();
    let formats: Vec<_> = found.formats.keys().map(String::as_str).collect();
    assert_eq!(formats, ["Q4_K", "Q6_K", "f32"]);
    let size = want.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    assert!(size > 3.0, "{size}");
    let exact = unrounded(file.clone()).dtype(DType::F32);
    let exact = exact.load().unwrap().logits(&tokens).unwrap().values;
    let difference = max_difference(&exact, &want);
    assert!(difference <= 1e-4, "{difference} of {size}");
    // Packed in q8: its rounding, and that of activations to eight bits.
    let packed = unrounded(file).load().unwrap();
    let packed = packed.logits(&tokens).unwrap().values;
    let difference = max_difference(&packed, &want);
    assert!(
        difference > 0.0 && difference <= 0.05 * size,
        "{difference} of {size}"
    );
}

#[test]
fn packing_a_file_gives_what_packing_its_checkpoint_gives() {
    let directory = tempfile::tempdir().unwrap();
    for (file, name) in PAIRS {
        let tokens = ids(&json(fixture(name).join("reference.json"))["tokens"]);
        let to = directory.path().join(name);
        quantize(gguf(file), &to, Quantization::Q8, |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
        let want = unrounded(fixture(name))
            .quantize(Quantization::Q8)
            .load()
            .unwrap();
        let want = want.logits(&tokens).unwrap().values;
        let stored = unrounded(to).load().unwrap();
        assert_eq!(stored.logits(&tokens).unwrap().values, want, "{name}");
        let loaded = unrounded(gguf(file))
            .quantize(Quantization::Q8)
            .load()
            .unwrap();
        assert_eq!(loaded.logits(&tokens).unwrap().values, want, "{name}");
    }
}

#[test]
fn a_checkpoint_comes_back_from_gguf_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    for name in [
        "tied",
        "untied",
        "f16",
        "bf16_shards",
        "yarn",
        "yarn5",
        "head_dim_explicit",
        "moe",
    ] {
        let tokens = ids(&json(fixture(name).join("reference.json"))["tokens"]);
        let file = directory.path().join(format!("{name}.gguf"));
        convert(fixture(name), &file, None, |_| ControlFlow::Continue(())).unwrap();
        let back = directory.path().join(name);
        convert(&file, &back, None, |_| ControlFlow::Continue(())).unwrap();
        let want = unrounded(fixture(name)).load().unwrap();
        let values = want.logits(&tokens).unwrap().values;
        for place in [file, back] {
            let got = unrounded(place.clone()).load().unwrap();
            assert_eq!(got.logits(&tokens).unwrap().values, values, "{name}");
            assert_eq!(
                got.tokenizer().chat_template(),
                want.tokenizer().chat_template()
            );
            assert_eq!(got.context_length(), want.context_length(), "{name}");
            let text = "quick brown <|im_end|>";
            let [got, want] = [&got, &want].map(|model| model.tokenizer().encode(text).unwrap());
            assert_eq!(got, want);
        }
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 16);
}

/// A copy of the YaRN fixture with another `rope_scaling`.
fn with_yarn(to: &Path, scaling: Value) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(fixture("yarn")).unwrap() {
        let from = entry.unwrap().path();
        fs::copy(&from, to.join(from.file_name().unwrap())).unwrap();
    }
    let mut config = json(to.join("config.json"));
    config["rope_scaling"] = scaling;
    fs::write(to.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn keys_of_vllm_come_back_from_gguf_and_what_it_has_no_key_for_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let tokens = ids(&json(fixture("yarn").join("reference.json"))["tokens"]);
    let yarn = value!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20});
    let mut scaling = yarn.clone();
    scaling["extrapolation_factor"] = value!(0.5);
    scaling["attention_factor"] = value!(1.25);
    let from = directory.path().join("vllm");
    with_yarn(&from, scaling);
    let file = directory.path().join("vllm.gguf");
    convert(&from, &file, None, |_| ControlFlow::Continue(())).unwrap();
    let logits = |path: &Path| {
        let model = unrounded(path.to_owned()).load().unwrap();
        model.logits(&tokens).unwrap().values
    };
    assert_eq!(logits(&file), logits(&from));
    assert!(max_difference(&logits(&from), &logits(&fixture("yarn"))) > 0.01);
    let mut scaling = yarn;
    scaling["truncate"] = value!(false);
    let from = directory.path().join("whole");
    with_yarn(&from, scaling);
    let file = directory.path().join("whole.gguf");
    let error = convert(&from, file, None, |_| ControlFlow::Continue(())).unwrap_err();
    assert_eq!(
        (error.kind(), error.key()),
        (ErrorKind::Unsupported, Some("rope_scaling.truncate"))
    );
}

#[test]
fn a_quantized_file_holds_what_packing_makes() {
    let directory = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (5..40).collect();
    for quantization in [Quantization::Q8, Quantization::Q4] {
        let file = directory
            .path()
            .join(format!("{}.gguf", quantization.name()));
        quantize(demo(), &file, quantization, |_| ControlFlow::Continue(())).unwrap();
        let got = unrounded(file).load().unwrap();
        let want = unrounded(demo()).quantize(quantization).load().unwrap();
        assert_eq!(
            got.logits(&tokens).unwrap().values,
            want.logits(&tokens).unwrap().values
        );
    }
}

#[test]
fn what_gguf_cannot_say_is_refused_and_nothing_is_left() {
    let directory = tempfile::tempdir().unwrap();
    for (name, key) in [
        ("sliding", "use_sliding_window"),
        ("moe_normed_mixed", "norm_topk_prob"),
    ] {
        let file = directory.path().join(format!("{name}.gguf"));
        let error = convert(fixture(name), file, None, |_| ControlFlow::Continue(())).unwrap_err();
        assert_eq!(
            (error.kind(), error.key()),
            (ErrorKind::Unsupported, Some(key))
        );
    }
    let file = directory.path().join("there.gguf");
    let error = convert(fixture("tied"), &file, None, |_| ControlFlow::Break(())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    std::fs::write(&file, b"mine").unwrap();
    let error = convert(fixture("tied"), &file, None, |_| ControlFlow::Continue(())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
}
