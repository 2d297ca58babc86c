//! LoRA adapters give what PEFT gives, and damaged ones are refused by name.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use common::{fixture, ids, json, max_difference, root, rows, unrounded};
use qwen2_core::{ErrorKind, Quantization, merge_lora, quantize};
use serde_json::{Value, json as value};

fn adapter(name: &str) -> PathBuf {
    root().join("conformance/adapters").join(name)
}

#[test]
fn logits_equal_those_of_peft() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["plain", "patterns"] {
        let reference = json(adapter(name).join("reference.json"));
        let base = fixture(reference["base"].as_str().unwrap());
        let (tokens, want) = (ids(&reference["tokens"]), rows(&reference["logits"]));
        let check = |got: Vec<f32>| {
            let size = want.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
            let difference = max_difference(&got, &want);
            assert!(
                difference <= 1e-4 * (size / 4.0).max(1.0),
                "{name}: {difference} of {size}"
            );
        };
        let loaded = unrounded(base.clone())
            .adapter(adapter(name))
            .load()
            .unwrap();
        check(loaded.logits(&tokens).unwrap().values);
        for to in [name.to_owned(), format!("{name}.gguf")] {
            let to = directory.path().join(to);
            merge_lora(&base, adapter(name), &to, None, |_| {
                ControlFlow::Continue(())
            })
            .unwrap();
            check(
                unrounded(to)
                    .load()
                    .unwrap()
                    .logits(&tokens)
                    .unwrap()
                    .values,
            );
        }
        // Packed, the merged weights are what is packed.
        let merged = directory.path().join(name);
        let q8 = |path: &Path| unrounded(path.to_owned()).quantize(Quantization::Q8);
        assert_eq!(
            q8(&base)
                .adapter(adapter(name))
                .load()
                .unwrap()
                .logits(&tokens)
                .unwrap()
                .values,
            q8(&merged).load().unwrap().logits(&tokens).unwrap().values
        );
    }
}

/// A copy of an adapter with another config.
fn changed(name: &str, key: &str, new: Value) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let to = |file: &str| directory.path().join(file);
    fs::copy(
        adapter(name).join("adapter_model.safetensors"),
        to("adapter_model.safetensors"),
    )
    .unwrap();
    let mut config = json(adapter(name).join("adapter_config.json"));
    config[key] = new;
    fs::write(to("adapter_config.json"), config.to_string()).unwrap();
    directory
}

#[test]
fn what_cannot_be_added_is_refused_by_name() {
    use ErrorKind::{InvalidFile, Unsupported};
    for (key, new, kind) in [
        ("peft_type", value!("IA3"), Unsupported),
        ("use_dora", value!(true), Unsupported),
        ("bias", value!("all"), Unsupported),
        ("modules_to_save", value!(["lm_head"]), Unsupported),
        ("layer_replication", value!([[0, 2]]), Unsupported),
        ("r", value!(0), InvalidFile),
        ("r", value!(8), InvalidFile),
        ("lora_alpha", value!("8"), InvalidFile),
        ("alpha_pattern", value!({"(": 3}), InvalidFile),
    ] {
        let directory = changed("plain", key, new);
        let builder = unrounded(fixture("tied")).adapter(directory.path());
        let error = builder.load().unwrap_err();
        assert_eq!((error.kind(), error.key()), (kind, Some(key)), "{error}");
        assert!(error.path().is_some() && error.help().is_some());
    }
    // Another model's shapes, and a model without such a matrix.
    for (name, base, message) in [
        ("plain", "head_dim_10", "tensor has the wrong shape"),
        ("patterns", "moe", "adapter is for another model"),
    ] {
        let error = unrounded(fixture(base))
            .adapter(adapter(name))
            .load()
            .unwrap_err();
        assert_eq!(error.kind(), InvalidFile);
        assert!(error.to_string().starts_with(message), "{error}");
    }
}

#[test]
fn a_pickle_is_never_read_and_a_packed_base_is_refused() {
    let directory = changed("plain", "r", value!(4));
    let at = |file: &str| directory.path().join(file);
    fs::rename(at("adapter_model.safetensors"), at("adapter_model.bin")).unwrap();
    let error = unrounded(fixture("tied"))
        .adapter(directory.path())
        .load()
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.help().unwrap().contains("pickle"), "{error}");
    let packed = at("packed");
    quantize(fixture("tied"), &packed, Quantization::Q8, |_| {
        ControlFlow::Continue(())
    })
    .unwrap();
    let error = unrounded(packed)
        .adapter(adapter("plain"))
        .load()
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.key()),
        (ErrorKind::InvalidArgument, Some("adapter"))
    );
    let error = unrounded(fixture("tied"))
        .adapter(at("nowhere"))
        .load()
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}
