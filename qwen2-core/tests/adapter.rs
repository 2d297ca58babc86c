//! LoRA adapters give what PEFT gives, and damaged ones are refused by name.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use common::{fixture, floats, ids, json, max_difference, root, rows, unrounded};
use qwen2_core::{ErrorKind, GenerateOptions, Prompt, Quantization, Request, merge_lora, quantize};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json as value};

fn adapter(name: &str) -> PathBuf {
    root().join("conformance/adapters").join(name)
}

#[test]
fn logits_equal_those_of_peft() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["plain", "patterns", "second"] {
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

#[test]
fn adapters_beside_the_weights_give_the_same_and_leave_the_model_alone() {
    for name in ["plain", "patterns", "second"] {
        let reference = json(adapter(name).join("reference.json"));
        let base = fixture(reference["base"].as_str().unwrap());
        let (tokens, want) = (ids(&reference["tokens"]), rows(&reference["logits"]));
        let model = unrounded(base).load().unwrap();
        let before = model.logits(&tokens).unwrap().values;
        let adapted = model.with_adapter(adapter(name)).unwrap();
        let got = adapted.logits(&tokens).unwrap().values;
        let size = want.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let difference = max_difference(&got, &want);
        assert!(
            difference <= 1e-4 * (size / 4.0).max(1.0),
            "{name}: {difference} of {size}"
        );
        // Token by token, as a generation goes.
        let options = GenerateOptions::greedy().max_new_tokens(8);
        let merged = unrounded(fixture(reference["base"].as_str().unwrap()))
            .adapter(adapter(name))
            .load()
            .unwrap();
        assert_eq!(
            adapted.generate(&tokens[..], &options).unwrap().tokens,
            merged.generate(&tokens[..], &options).unwrap().tokens
        );
        assert_eq!(model.logits(&tokens).unwrap().values, before);
        assert_eq!(adapted.adapters(), [adapter(name)]);
        assert!(model.adapters().is_empty());
        assert!(adapted.memory().weights > model.memory().weights);
    }
}

/// Two adapters of PEFT's: none, either, and both at once, each for a request of its own, in one engine.
#[test]
fn several_at_once_equal_peft_request_by_request() {
    let vectors = json(root().join("conformance/adapters/together.json"));
    let cases = vectors["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    let model = unrounded(fixture("tied")).load().unwrap();
    let of = |case: &Value| {
        let names = case["adapters"].as_array().unwrap().iter();
        names.fold(model.clone(), |model, name| {
            let path = adapter(name.as_str().unwrap());
            model.with_adapter(path).unwrap()
        })
    };
    let engine = model.engine().build().unwrap();
    let submitted: Vec<_> = cases
        .iter()
        .map(|case| {
            let (model, want) = (of(case), floats(&case["logits"]));
            let tokens = ids(&case["tokens"]);
            let logits = model.logits(&tokens).unwrap();
            let last = &logits.values[logits.values.len() - logits.vocab_size..];
            let size = want.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
            let difference = max_difference(last, &want);
            assert!(
                difference <= 1e-4 * (size / 4.0).max(1.0),
                "{}: {difference} of {size}",
                case["name"]
            );
            let mut options = GenerateOptions::greedy().max_new_tokens(12);
            options.ignore_eos = true;
            let request = Request::new(Prompt::Tokens(tokens), &options).model(&model);
            (engine.submit_request(request).unwrap(), case)
        })
        .collect();
    for (stream, case) in submitted {
        let got = stream.finish().unwrap().tokens;
        assert_eq!(got, ids(&case["greedy"]), "{}", case["name"]);
    }
}

#[test]
fn several_adapters_add_up_and_go_on_side_by_side() {
    let directory = tempfile::tempdir().unwrap();
    let second = directory.path().join("second");
    write_adapter(
        &second,
        &[
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.mlp.down_proj",
        ],
        "tied",
    );
    let tokens = ids(&json(adapter("plain").join("reference.json"))["tokens"]);
    let model = unrounded(fixture("tied")).load().unwrap();
    let first = model.with_adapter(adapter("plain")).unwrap();
    let both = first.with_adapter(&second).unwrap();
    let merged = directory.path().join("merged");
    merge_lora(fixture("tied"), adapter("plain"), &merged, None, |_| {
        ControlFlow::Continue(())
    })
    .unwrap();
    let want = unrounded(merged).adapter(&second).load().unwrap();
    let want = want.logits(&tokens).unwrap().values;
    let alone: Vec<_> = [&model, &first, &both]
        .map(|model| model.logits(&tokens).unwrap().values)
        .into();
    assert!(max_difference(&alone[2], &want) <= 1e-4);
    assert!(max_difference(&alone[2], &alone[1]) > 0.01);
    std::thread::scope(|scope| {
        let threads: Vec<_> = [&model, &first, &both, &first]
            .map(|model| scope.spawn(|| model.logits(&tokens).unwrap().values))
            .into();
        let together: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert_eq!(together[..3], alone);
        assert_eq!(together[3], alone[1]);
    });
}

#[test]
fn experts_and_packed_weights_have_adapters_beside_them() {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("experts");
    let modules = [
        "model.layers.0.mlp.experts.1.gate_proj",
        "model.layers.0.mlp.experts.1.down_proj",
        "model.layers.0.mlp.shared_expert.up_proj",
        "model.layers.1.mlp.gate",
        "lm_head",
    ];
    write_adapter(&to, &modules, "moe");
    let tokens = ids(&json(fixture("moe").join("reference.json"))["tokens"]);
    let model = unrounded(fixture("moe")).load().unwrap();
    let adapted = model.with_adapter(&to).unwrap().logits(&tokens).unwrap();
    let merged = unrounded(fixture("moe")).adapter(&to).load().unwrap();
    let merged = merged.logits(&tokens).unwrap();
    let plain = model.logits(&tokens).unwrap();
    assert!(max_difference(&adapted.values, &merged.values) <= 2e-4);
    assert!(max_difference(&adapted.values, &plain.values) > 0.01);
    // Packed weights stay as they are: no rounding comes on top of the adapter.
    let packed = unrounded(fixture("tied")).quantize(Quantization::Q8).load();
    let packed = packed.unwrap();
    let plain = packed.logits(&tokens).unwrap();
    let adapted = packed.with_adapter(adapter("plain")).unwrap();
    let difference = max_difference(&adapted.logits(&tokens).unwrap().values, &plain.values);
    assert!(difference > 0.01, "{difference}");
}

#[test]
fn what_cannot_be_beside_the_weights_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("table");
    write_adapter(&to, &["model.embed_tokens"], "tied");
    let model = unrounded(fixture("tied")).load().unwrap();
    let error = model.with_adapter(&to).unwrap_err();
    assert_eq!(
        (error.kind(), error.key()),
        (ErrorKind::Unsupported, Some("model.embed_tokens.weight"))
    );
    let error = model.with_adapter(adapter("patterns").join("nowhere"));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::NotFound);
    let other = unrounded(fixture("head_dim_10")).load().unwrap();
    let error = other.with_adapter(adapter("plain")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFile);
}

/// An adapter of rank 3 for some modules of a fixture, as PEFT would save it.
fn write_adapter(to: &Path, modules: &[&str], base: &str) {
    let mut shapes = std::collections::HashMap::new();
    let file = fs::read(fixture(base).join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&file).unwrap();
    let mut data = Vec::new();
    for module in modules {
        let shape = stored.tensor(&format!("{module}.weight")).unwrap();
        let &[outputs, inputs] = shape.shape() else {
            panic!("{module} is no matrix");
        };
        for (half, shape) in [("lora_A", [3, inputs]), ("lora_B", [outputs, 3])] {
            let name = format!("base_model.model.{module}.{half}.weight");
            let wave = |i: usize| (i as f32 * 0.7 + name.len() as f32).sin() * 0.3;
            let bytes: Vec<u8> = (0..shape[0] * shape[1])
                .flat_map(|i| wave(i).to_le_bytes())
                .collect();
            data.push((name, shape, bytes));
        }
    }
    for (name, shape, bytes) in &data {
        let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap();
        shapes.insert(name.clone(), view);
    }
    fs::create_dir(to).unwrap();
    let bytes = safetensors::serialize(&shapes, None).unwrap();
    fs::write(to.join("adapter_model.safetensors"), bytes).unwrap();
    let config = value!({"peft_type": "LORA", "r": 3, "lora_alpha": 3, "bias": "none"});
    fs::write(to.join("adapter_config.json"), config.to_string()).unwrap();
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
