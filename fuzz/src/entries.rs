//! One function for each target: an input is read, or refused by an error that says where and what to do.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::OnceLock;

use crate::budget::within;
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::{Checkpoint, Encoding, Source, names};
use crate::config::{DType, GenerationConfig, LongContext, ModelConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::sections::{sections, with_files};
use crate::text::{Message, Tokenizer};

/// What a reader may take for itself, and for each byte of its input: a name of a tensor is kept
/// with its place, a token in three tables.
const BASE: usize = 1 << 20;
const PER_BYTE: usize = 64;
/// Tables of Unicode that regular expressions are compiled with.
const EXPRESSIONS: usize = 64 << 20;

/// A GGUF file with its config, tokenizer and weights.
pub fn gguf(input: &[u8]) {
    with_files(&[("model.gguf", input)], |directory| {
        let path = directory.join("model.gguf");
        within(BASE + PER_BYTE * input.len(), || open(&path));
        let Some((tokenizer, config)) = read(crate::checkpoint::gguf::tokenizer(&path)) else {
            return;
        };
        // A part of the inputs: it takes ten times as long as all before.
        if input.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)) < 16 {
            within(EXPRESSIONS + PER_BYTE * input.len(), || {
                read(Tokenizer::from_bytes(
                    &tokenizer,
                    Some(&config),
                    None,
                    &path,
                ));
            });
        }
    });
}

/// config.json, generation_config.json, an index and two shards, or the one file without an index.
pub fn checkpoint(input: &[u8]) {
    let [config, generation, index, first, second] = sections(input);
    let single = index.is_empty();
    let files = [
        ("config.json", config),
        ("generation_config.json", generation),
        ("model.safetensors.index.json", index),
        ("model.safetensors", if single { first } else { b"" }),
        ("a.safetensors", if single { b"" } else { first }),
        ("b.safetensors", if single { b"" } else { second }),
    ];
    with_files(&files, |directory| {
        within(BASE + PER_BYTE * input.len(), || open(directory));
    });
}

/// A `quantization_config` and the weights that it is about.
pub fn grouped(input: &[u8]) {
    let [quantization, weights] = sections(input);
    let mut config = serde_json::json!({
        "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8, "tie_word_embeddings": true,
    });
    let Ok(quantization) = serde_json::from_slice::<serde_json::Value>(quantization) else {
        return;
    };
    config["quantization_config"] = quantization;
    let config = config.to_string().into_bytes();
    let files = [("config.json", &config[..]), ("model.safetensors", weights)];
    with_files(&files, |directory| {
        within(BASE + PER_BYTE * input.len(), || open(directory));
    });
}

/// tokenizer.json, tokenizer_config.json, chat_template.jinja and a text.
pub fn tokenizer(input: &[u8]) {
    let [tokenizer, config, template, text] = sections(input);
    let config = (!config.is_empty()).then_some(config);
    let template = std::str::from_utf8(template).ok();
    let template = template.filter(|template| !template.is_empty());
    let path = Path::new("/m/tokenizer.json");
    let text = String::from_utf8_lossy(text);
    within(EXPRESSIONS + PER_BYTE * input.len(), || {
        let Some(tokenizer) = read(Tokenizer::from_bytes(tokenizer, config, template, path)) else {
            return;
        };
        let tokens = match tokenizer.encode(&text) {
            Ok(tokens) => tokens,
            Err(error) => return described(&error),
        };
        tokenizer.decode(&tokens, false).expect("its own tokens");
        let special = tokenizer.encode_with_special_tokens(&text);
        special.map_or_else(|error| described(&error), drop);
        if let Err(error) = tokenizer.encode_chat(&[Message::user(&*text)], true) {
            described(&error);
        }
    });
}

/// A config.json or a generation_config.json, and what follows from it.
pub fn config(input: &[u8]) {
    let path = Path::new("/m/config.json");
    within(BASE + PER_BYTE * input.len(), || {
        if let Some(generation) = read(GenerationConfig::from_json(input, path)) {
            let numbers = [generation.temperature, generation.repetition_penalty];
            assert!(numbers.into_iter().flatten().all(f32::is_finite));
        }
        let Some(config) = read(ModelConfig::from_json(input, path)) else {
            return;
        };
        assert!(config.context_length() > 0 && config.parameter_count() > 0);
        assert!(config.kv_bytes_per_token(DType::F32) > 0);
        for by in [
            LongContext::Yarn,
            LongContext::YarnWhenNeeded,
            LongContext::DualChunk,
        ] {
            let longer = 4 * config.context_length();
            match config.stretched_to(longer, by) {
                Ok(stretched) => assert!(stretched.context_length() >= longer.min(1 << 30)),
                Err(error) => assert_eq!(error.kind(), ErrorKind::InvalidArgument),
            }
        }
    });
}

/// A chat template and the messages that it is given, a line each.
pub fn template(input: &[u8]) {
    let [template, messages] = sections(input);
    let (Ok(template), Ok(messages)) =
        (std::str::from_utf8(template), std::str::from_utf8(messages))
    else {
        return;
    };
    let message = |(number, line): (usize, &str)| match number % 2 {
        0 => Message::user(line),
        _ => Message::assistant(line),
    };
    let messages: Vec<Message> = messages.lines().enumerate().map(message).collect();
    let path = Path::new("/m/tokenizer.json");
    let tokenizer =
        Tokenizer::from_bytes(plain_tokenizer(), None, Some(template), path).expect("valid");
    if let Err(error) = tokenizer.encode_chat(&messages, true) {
        described(&error);
    }
}

/// A fixture's tokenizer without the regular expression, which takes longest to compile.
fn plain_tokenizer() -> &'static [u8] {
    static JSON: OnceLock<Vec<u8>> = OnceLock::new();
    JSON.get_or_init(|| {
        let fixture = include_str!("../../conformance/models/tied/tokenizer.json");
        let mut json: serde_json::Value = serde_json::from_str(fixture).expect("json");
        json["pre_tokenizer"] = json["decoder"].clone();
        json["normalizer"] = serde_json::Value::Null;
        json.to_string().into_bytes()
    })
}

/// adapter_config.json and adapter_model.safetensors.
pub fn adapter(input: &[u8]) {
    let [config, weights] = sections(input);
    let files = [
        ("adapter_config.json", config),
        ("adapter_model.safetensors", weights),
    ];
    let shapes = ["q_proj", "v_proj"].map(|name| {
        let name = format!("model.layers.0.self_attn.{name}.weight");
        (name, vec![4, 8])
    });
    with_files(&files, |directory| {
        within(EXPRESSIONS + PER_BYTE * input.len(), || {
            let Some(adapter) = read(Adapter::open(directory)) else {
                return;
            };
            if read(adapter.check(&shapes)).is_some() {
                for (name, _) in shapes {
                    (0..4).for_each(|row| adapter.add(&name, row, &mut [0.0; 8]));
                }
            }
        });
    });
}

/// Opens a checkpoint, and reads every tensor of one that its config agrees with.
fn open(path: &Path) {
    let source = Source::from(path);
    let Some(checkpoint) = read(Checkpoint::open(
        &source,
        &mut |_| ControlFlow::Continue(()),
    )) else {
        return;
    };
    let Some(tied) = read(names::audit(&checkpoint)) else {
        return;
    };
    for (name, shape) in names::expected(&checkpoint.config, tied) {
        let tensor = checkpoint.tensor(&name).expect("audited");
        let mut row = vec![0.0; *shape.last().expect("a dimension")];
        if let Some(groups) = &tensor.groups {
            (0..shape[0]).for_each(|output| groups.row(output, &mut row));
            groups.has_blocks(32);
        } else if let Encoding::Blocks(kind) = tensor.encoding {
            let rows = tensor.bytes.chunks_exact(kind.row_bytes(row.len()));
            assert_eq!(rows.len() * row.len(), shape.iter().product::<usize>());
            rows.for_each(|bytes| kind.dequantize(bytes, &mut row));
        } else if tensor.encoding != Encoding::Packed {
            let numbers = shape.iter().product::<usize>();
            assert_eq!(
                tensor.bytes.len(),
                numbers * tensor.encoding.size_in_bytes()
            );
        }
    }
}

/// What was read; an error must say in which file, and what to do.
fn read<T>(outcome: Result<T>) -> Option<T> {
    outcome
        .map_err(|error| {
            described(&error);
            assert!(error.path().is_some(), "no file: {error:?}");
            let in_file = matches!(
                error.kind(),
                ErrorKind::InvalidFile | ErrorKind::Unsupported
            );
            assert!(!in_file || error.help().is_some(), "no help: {error:?}");
        })
        .ok()
}

/// One line, of a length that a person reads, and no bug of ours.
fn described(error: &Error) {
    let text = error.to_string();
    assert!(
        !text.chars().any(char::is_control),
        "not one line: {text:?}"
    );
    assert!(text.len() < 4096, "{} bytes: {text}", text.len());
    assert_ne!(error.kind(), ErrorKind::Internal, "{error:?}");
}
