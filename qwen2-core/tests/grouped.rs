//! Checkpoints of GPTQ and AWQ give the logits of the numbers they stand for.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use common::{ids, json, max_difference, root, rows, unrounded};
use qwen2_core::{DType, ErrorKind, Quantization, convert, inspect, quantize};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json as value};

const NAMES: [&str; 6] = [
    "gptq4",
    "gptq4_order",
    "gptq4_v2",
    "gptq8",
    "awq",
    "gptq4_moe",
];

fn grouped(name: &str) -> PathBuf {
    root().join("conformance/grouped").join(name)
}

#[test]
fn logits_equal_those_of_the_numbers() {
    for name in NAMES {
        let reference = json(grouped(name).join("reference.json"));
        let (tokens, want) = (ids(&reference["tokens"]), rows(&reference["logits"]));
        let size = want.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let exact = unrounded(grouped(name)).dtype(DType::F32).load().unwrap();
        let difference = max_difference(&exact.logits(&tokens).unwrap().values, &want);
        // The project's 1e-4 is for logits of size 4.
        assert!(
            difference <= 2.5e-5 * size,
            "{name}: {difference} of {size}"
        );
        // Packed, activations are rounded to eight bits.
        let packed = unrounded(grouped(name)).load().unwrap();
        let difference = max_difference(&packed.logits(&tokens).unwrap().values, &want);
        assert!(difference <= 0.05 * size, "{name}: {difference} of {size}");
        assert!(
            packed.memory().weights < exact.memory().weights / 2,
            "{name}"
        );
    }
}

#[test]
fn a_checkpoint_is_converted_and_packed_from_its_numbers() {
    let directory = tempfile::tempdir().unwrap();
    for name in NAMES {
        let tokens = ids(&json(grouped(name).join("reference.json"))["tokens"]);
        let logits = |path: &Path, dtype| {
            let builder = unrounded(path.to_owned());
            let model = match dtype {
                Some(dtype) => builder.dtype(dtype).load(),
                None => builder.load(),
            };
            model.unwrap().logits(&tokens).unwrap().values
        };
        let dense = directory.path().join(format!("{name}-f32"));
        convert(grouped(name), &dense, Some(DType::F32), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(
            logits(&dense, None),
            logits(&grouped(name), Some(DType::F32))
        );
        let packed = directory.path().join(format!("{name}-q8"));
        quantize(grouped(name), &packed, Quantization::Q8, |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
        let want = unrounded(grouped(name))
            .quantize(Quantization::Q8)
            .load()
            .unwrap();
        assert_eq!(logits(&packed, None), want.logits(&tokens).unwrap().values);
    }
    let found = inspect(grouped("gptq4"), |_| ControlFlow::Continue(())).unwrap();
    let formats: Vec<_> = found.formats.keys().map(String::as_str).collect();
    assert_eq!(formats, ["f16", "grouped"]);
    assert!(found.weight_bytes > found.stored_bytes / 2);
}

/// The checksum of zip and PNG.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

#[test]
fn numbers_are_bit_for_bit_those_of_numpy() {
    assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    let directory = tempfile::tempdir().unwrap();
    for (name, matrices) in NAMES.map(|name| (name, if name == "gptq4_moe" { 19 } else { 7 })) {
        let dense = directory.path().join(name);
        convert(grouped(name), &dense, Some(DType::F32), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
        let bytes = fs::read(dense.join("model.safetensors")).unwrap();
        let stored = SafeTensors::deserialize(&bytes).unwrap();
        let reference = json(grouped(name).join("reference.json"));
        let want = reference["crc32"].as_object().unwrap();
        assert_eq!(want.len(), matrices, "{name}");
        for (matrix, want) in want {
            let view = stored.tensor(matrix).unwrap();
            assert_eq!(view.dtype(), safetensors::Dtype::F32);
            assert_eq!(u64::from(crc32(view.data())), *want, "{name}: {matrix}");
        }
    }
}

type Tensors = BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;

/// A copy of a checkpoint with other tensors and another `quantization_config`.
fn changed(name: &str, change: impl Fn(&mut Tensors, &mut Value)) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(grouped(name).join(file), directory.path().join(file)).unwrap();
    }
    let bytes = fs::read(grouped(name).join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors = stored
        .iter()
        .map(|(name, view)| {
            let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            (name.to_owned(), tensor)
        })
        .collect();
    let mut config = json(grouped(name).join("config.json"));
    change(&mut tensors, &mut config["quantization_config"]);
    let views: BTreeMap<&str, TensorView<'_>> = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| {
            (
                name.as_str(),
                TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
            )
        })
        .collect();
    safetensors::serialize_to_file(views, None, &directory.path().join("model.safetensors"))
        .unwrap();
    fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    directory
}

const STEM: &str = "model.layers.0.mlp.down_proj";

#[test]
fn damage_is_a_typed_error_that_names_the_tensor_or_the_key() {
    type Change = fn(&mut Tensors, &mut Value);
    let cases: [(&str, &str, Change, ErrorKind); 10] = [
        (
            "gptq4",
            "model.layers.0.mlp.down_proj.g_idx",
            |tensors, _| {
                tensors.get_mut(&format!("{STEM}.g_idx")).unwrap().2[..4]
                    .copy_from_slice(&3_i32.to_le_bytes());
            },
            ErrorKind::InvalidFile,
        ),
        (
            "gptq4",
            "model.layers.0.mlp.down_proj.g_idx",
            |tensors, _| {
                tensors.get_mut(&format!("{STEM}.g_idx")).unwrap().2[..4]
                    .copy_from_slice(&(-1_i32).to_le_bytes());
            },
            ErrorKind::InvalidFile,
        ),
        (
            "gptq4",
            "model.layers.0.mlp.down_proj.qzeros",
            |tensors, _| {
                let (_, shape, bytes) = tensors.get_mut(&format!("{STEM}.qzeros")).unwrap();
                bytes.truncate(bytes.len() / shape[0] * (shape[0] - 1));
                shape[0] -= 1;
            },
            ErrorKind::InvalidFile,
        ),
        (
            "gptq4",
            "model.layers.0.mlp.down_proj.scales",
            |tensors, _| {
                let (_, shape, _) = tensors.get_mut(&format!("{STEM}.scales")).unwrap();
                shape.reverse();
            },
            ErrorKind::InvalidFile,
        ),
        (
            "gptq4",
            "model.layers.0.mlp.down_proj.scales",
            |tensors, _| {
                let (dtype, shape, bytes) = tensors.get_mut(&format!("{STEM}.scales")).unwrap();
                (*dtype, shape[1]) = (safetensors::Dtype::I32, shape[1] / 2);
                assert_eq!(bytes.len(), 4 * shape[0] * shape[1]);
            },
            ErrorKind::InvalidFile,
        ),
        (
            "gptq4",
            "model.layers.0.mlp.down_proj.qzeros",
            |_, config| {
                config["group_size"] = value!(16);
            },
            ErrorKind::InvalidFile,
        ),
        (
            "gptq4",
            "bits",
            |_, config| config["bits"] = value!(3),
            ErrorKind::Unsupported,
        ),
        (
            "awq",
            "bits",
            |_, config| config["bits"] = value!(8),
            ErrorKind::Unsupported,
        ),
        (
            "awq",
            "version",
            |_, config| config["version"] = value!("gemv"),
            ErrorKind::Unsupported,
        ),
        (
            "gptq4",
            "checkpoint_format",
            |_, config| {
                config["checkpoint_format"] = value!("marlin");
            },
            ErrorKind::Unsupported,
        ),
    ];
    for (name, key, change, kind) in cases {
        let directory = changed(name, change);
        let error = unrounded(directory.path().to_owned()).load().unwrap_err();
        assert_eq!(error.kind(), kind, "{key}: {error}");
        assert!(error.key().unwrap().ends_with(key), "{key}: {error}");
        assert!(error.path().is_some() && error.help().is_some(), "{error}");
    }
}

#[test]
fn what_is_missing_is_listed() {
    let directory = changed("gptq4", |tensors, _| {
        tensors.remove(&format!("{STEM}.scales")).unwrap();
    });
    let error = unrounded(directory.path().to_owned()).load().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFile);
    assert!(error.to_string().contains("down_proj.scales"), "{error}");
    let directory = changed("awq", |tensors, _| {
        tensors.retain(|name, _| !name.starts_with(STEM));
    });
    let error = unrounded(directory.path().to_owned()).load().unwrap_err();
    assert!(
        error
            .to_string()
            .contains("1 missing: model.layers.0.mlp.down_proj.weight"),
        "{error}"
    );
}
