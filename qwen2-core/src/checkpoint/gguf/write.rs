//! A checkpoint as one GGUF file, written whole or not at all.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::Value;

use super::blocks::Kind;
use super::config::yarn_attention_factor;
use super::names::gguf_name;
use super::vocabulary::{CONTROL, NORMAL, UNUSED, USER_DEFINED};
use crate::checkpoint::write::Partial;
use crate::checkpoint::{Checkpoint, names};
use crate::config::{ModelConfig, RopeScaling};
use crate::error::{Error, ErrorKind, Result};

const VERSION: u32 = 3;
const ALIGNMENT: usize = 32;
const TOKENIZER: &str = "tokenizer.json";

/// A tensor that is to be written.
#[derive(Debug)]
pub(crate) struct Planned {
    name: String,
    /// Row-major.
    shape: Vec<usize>,
    pub(crate) kind: Kind,
    /// The checkpoint's tensors that it consists of: one, or the experts of a layer.
    sources: Vec<String>,
}

impl Planned {
    fn len(&self) -> usize {
        let numbers: usize = self.shape.iter().product();
        self.kind.row_bytes(numbers)
    }
}

/// The tensors of a GGUF file of this model; `kind` says how a matrix `[rows, cols]` of this name is to
/// be stored.
pub(crate) fn plan(
    config: &ModelConfig,
    tied: bool,
    kind: &dyn Fn(&str, usize) -> Result<Kind>,
) -> Result<Vec<Planned>> {
    let mut plan: Vec<Planned> = Vec::new();
    for (source, shape) in names::expected(config, tied) {
        let Some((name, expert)) = gguf_name(&source) else {
            return Err(Error::new(ErrorKind::Internal, "tensor has no GGUF name").with_key(source));
        };
        if let Some(stack) = plan.iter_mut().rev().find(|planned| planned.name == name) {
            stack.shape[0] += 1;
            stack.sources.push(source);
            continue;
        }
        let (kind, shape) = match (expert, shape.as_slice()) {
            (Some(_), &[rows, cols]) => (kind(&source, cols)?, vec![1, rows, cols]),
            // ggml wants vectors and the small matrices of a router in f32.
            (None, &[1, cols]) => (Kind::F32, vec![cols]),
            (None, &[rows, cols]) if name.ends_with("ffn_gate_inp.weight") => {
                (Kind::F32, vec![rows, cols])
            }
            (None, &[rows, cols]) => (kind(&source, cols)?, vec![rows, cols]),
            _ => (Kind::F32, shape),
        };
        plan.push(Planned {
            name,
            shape,
            kind,
            sources: vec![source],
        });
    }
    Ok(plan)
}

/// Writes `plan` with what `checkpoint` says of itself; `bytes` gives those of one of its tensors in a
/// kind. Everything is written beside `destination` first and renamed at the end.
///
/// # Errors
/// `InvalidArgument` if `destination` exists, `Unsupported` for what the format cannot say, what
/// `bytes` returns, and what writing says.
pub(crate) fn write(
    checkpoint: &Checkpoint,
    destination: &Path,
    plan: &[Planned],
    bytes: &mut dyn FnMut(&str, Kind) -> Result<Vec<u8>>,
) -> Result<()> {
    let partial = Partial::beside(destination)?;
    let header = header(checkpoint, plan)?;
    let path = partial.path().join("model.gguf");
    let failed = |error| Error::io("file cannot be written", &path, error);
    let mut file = BufWriter::new(File::create(&path).map_err(failed)?);
    file.write_all(&header).map_err(failed)?;
    for planned in plan {
        for source in &planned.sources {
            let bytes = bytes(source, planned.kind)?;
            assert_eq!(
                bytes.len() * planned.sources.len(),
                planned.len(),
                "{source}"
            );
            file.write_all(&bytes).map_err(failed)?;
        }
        let padding = planned.len().next_multiple_of(ALIGNMENT) - planned.len();
        file.write_all(&[0; ALIGNMENT][..padding]).map_err(failed)?;
    }
    let file = file
        .into_inner()
        .map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)?;
    drop(file);
    fs::rename(&path, destination)
        .map_err(|error| Error::io("file cannot be renamed into place", destination, error))
}

fn header(checkpoint: &Checkpoint, plan: &[Planned]) -> Result<Vec<u8>> {
    let mut keys = Keys::default();
    model_keys(checkpoint, plan, &mut keys)?;
    vocabulary_keys(checkpoint, &mut keys)?;
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((plan.len() as u64).to_le_bytes());
    bytes.extend(keys.n.to_le_bytes());
    bytes.extend(keys.bytes);
    let mut offset = 0_usize;
    for planned in plan {
        put_text(&mut bytes, &planned.name);
        bytes.extend((planned.shape.len() as u32).to_le_bytes());
        for dim in planned.shape.iter().rev() {
            bytes.extend((*dim as u64).to_le_bytes());
        }
        bytes.extend(planned.kind.id().to_le_bytes());
        bytes.extend((offset as u64).to_le_bytes());
        offset += planned.len().next_multiple_of(ALIGNMENT);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    Ok(bytes)
}

fn model_keys(checkpoint: &Checkpoint, plan: &[Planned], keys: &mut Keys) -> Result<()> {
    let config = &checkpoint.config;
    let architecture = if config.moe.is_some() {
        "qwen2moe"
    } else {
        "qwen2"
    };
    let unsupported = |key: &str, why: &str| {
        Err(Error::new(ErrorKind::Unsupported, "GGUF cannot say this")
            .with_path(checkpoint.config_path())
            .with_key(key)
            .with_why(why)
            .with_help("keep the checkpoint in safetensors form"))
    };
    if config.layer_sliding_windows.iter().any(Option::is_some) {
        return unsupported(
            "use_sliding_window",
            "llama.cpp's qwen2 has no sliding windows",
        );
    }
    keys.text("general.architecture", architecture);
    let name = checkpoint.path().file_stem().unwrap_or_default();
    keys.text("general.name", &name.to_string_lossy());
    keys.u32("general.file_type", file_type(plan));
    keys.u32("general.quantization_version", 2);
    let key = |name: &str| format!("{architecture}.{name}");
    for (name, number) in [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
    ] {
        keys.u32(&key(name), number as u32);
    }
    keys.f32(
        &key("attention.layer_norm_rms_epsilon"),
        config.rms_norm_eps,
    );
    keys.f32(&key("rope.freq_base"), config.rope_theta);
    if let Some(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings,
        attention_factor,
        beta_fast,
        beta_slow,
        extrapolation_factor,
        truncate,
    }) = &config.rope_scaling
    {
        if !truncate {
            return unsupported("rope_scaling.truncate", "llama.cpp truncates");
        }
        keys.text(&key("rope.scaling.type"), "yarn");
        keys.f32(&key("rope.scaling.factor"), *factor);
        keys.u32(
            &key("rope.scaling.original_context_length"),
            *original_max_position_embeddings as u32,
        );
        keys.f32(&key("rope.scaling.yarn_beta_fast"), *beta_fast);
        keys.f32(&key("rope.scaling.yarn_beta_slow"), *beta_slow);
        if *extrapolation_factor != 1.0 {
            keys.f32(&key("rope.scaling.yarn_ext_factor"), *extrapolation_factor);
        }
        if let Some(attention_factor) = attention_factor {
            let relative = attention_factor / yarn_attention_factor(*factor);
            keys.f32(&key("rope.scaling.attn_factor"), relative);
        }
    }
    if config.dual_chunk_attention.is_some() {
        return unsupported(
            "dual_chunk_attention_config",
            "llama.cpp has no attention in chunks",
        );
    }
    if let Some(moe) = &config.moe {
        if moe.norm_topk_prob {
            return unsupported(
                "norm_topk_prob",
                "llama.cpp's qwen2moe does not scale the weights",
            );
        }
        if (0..config.num_hidden_layers).any(|layer| !moe.is_sparse(layer)) {
            return unsupported(
                "mlp_only_layers",
                "all layers of llama.cpp's qwen2moe have experts",
            );
        }
        for (name, number) in [
            ("expert_count", moe.num_experts),
            ("expert_used_count", moe.num_experts_per_tok),
            ("expert_feed_forward_length", moe.moe_intermediate_size),
            (
                "expert_shared_feed_forward_length",
                moe.shared_expert_intermediate_size,
            ),
        ] {
            keys.u32(&key(name), number as u32);
        }
    }
    Ok(())
}

/// ggml's number of what most matrices are (`llama_ftype`).
fn file_type(plan: &[Planned]) -> u32 {
    let bytes_of = |kind: Kind| -> usize {
        let same = plan
            .iter()
            .filter(|planned| planned.kind == kind && planned.shape.len() > 1);
        same.map(Planned::len).sum()
    };
    let types = [
        (Kind::F32, 0),
        (Kind::F16, 1),
        (Kind::Q4_0, 2),
        (Kind::Q8_0, 7),
        (Kind::Bf16, 32),
    ];
    let most = types.into_iter().max_by_key(|(kind, _)| bytes_of(*kind));
    most.map_or(0, |(_, number)| number)
}

/// `tokenizer.json` and `tokenizer_config.json` as llama.cpp's converter writes them.
fn vocabulary_keys(checkpoint: &Checkpoint, keys: &mut Keys) -> Result<()> {
    let tokenizer = json(checkpoint, TOKENIZER)?.unwrap_or_default();
    let config = json(checkpoint, "tokenizer_config.json")?.unwrap_or_default();
    let invalid = |key: &str| {
        Error::new(ErrorKind::InvalidFile, "invalid tokenizer file")
            .with_path(checkpoint.path().join(TOKENIZER))
            .with_key(key)
            .with_help("download tokenizer.json again")
    };
    let Some(vocab) = tokenizer["model"]["vocab"].as_object() else {
        return Err(invalid("model.vocab"));
    };
    let mut tokens = vec![None; checkpoint.config.vocab_size];
    let mut set = |token: &'_ Value, id: &Value, kind: i32| {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok())?;
        *tokens.get_mut(id)? = Some((token.as_str()?.to_owned(), kind));
        Some(())
    };
    for (token, id) in vocab {
        let token = Value::String(token.clone());
        set(&token, id, NORMAL).ok_or_else(|| invalid("model.vocab"))?;
    }
    for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let is_special = added["special"].as_bool().unwrap_or_default();
        let kind = if is_special { CONTROL } else { USER_DEFINED };
        set(&added["content"], &added["id"], kind).ok_or_else(|| invalid("added_tokens"))?;
    }
    let tokens: Vec<(String, i32)> = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)))
        .collect();
    keys.text("tokenizer.ggml.model", "gpt2");
    keys.text("tokenizer.ggml.pre", "qwen2");
    keys.texts(
        "tokenizer.ggml.tokens",
        tokens.iter().map(|(token, _)| token.as_str()),
    );
    keys.integers(
        "tokenizer.ggml.token_type",
        tokens.iter().map(|(_, kind)| *kind),
    );
    let merges = tokenizer["model"]["merges"].as_array();
    let merges: Option<Vec<String>> = merges.and_then(|merges| merges.iter().map(merge).collect());
    let merges = merges.ok_or_else(|| invalid("model.merges"))?;
    keys.texts("tokenizer.ggml.merges", merges.iter().map(String::as_str));
    for (name, key) in [
        ("bos_token", "tokenizer.ggml.bos_token_id"),
        ("eos_token", "tokenizer.ggml.eos_token_id"),
        ("pad_token", "tokenizer.ggml.padding_token_id"),
    ] {
        let token = &config[name];
        let token = token.as_str().or_else(|| token["content"].as_str());
        let id = token.and_then(|token| tokens.iter().position(|(text, _)| text == token));
        if let Some(id) = id {
            keys.u32(key, id as u32);
        }
    }
    keys.bool("tokenizer.ggml.add_bos_token", false);
    let own = checkpoint.companion("chat_template.jinja")?;
    let own = own.and_then(|bytes| String::from_utf8(bytes).ok());
    let template = own.as_deref().or_else(|| config["chat_template"].as_str());
    if let Some(template) = template {
        keys.text("tokenizer.chat_template", template);
    }
    Ok(())
}

/// `["a", "b"]`, or `"a b"` as older files have it.
fn merge(value: &Value) -> Option<String> {
    match value.as_array().map(Vec::as_slice) {
        Some([left, right]) => Some(format!("{} {}", left.as_str()?, right.as_str()?)),
        _ => value.as_str().map(str::to_owned),
    }
}

fn json(checkpoint: &Checkpoint, name: &str) -> Result<Option<Value>> {
    let Some(bytes) = checkpoint.companion(name)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| {
        Error::new(ErrorKind::InvalidFile, "file is not valid JSON")
            .with_path(checkpoint.path().join(name))
            .with_why(error.to_string())
            .with_source(error)
            .with_help("download the file again")
    })
}

/// Keys and values in the making.
#[derive(Default)]
struct Keys {
    n: u64,
    bytes: Vec<u8>,
}

impl Keys {
    fn key(&mut self, key: &str, kind: u32) {
        self.n += 1;
        put_text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.bytes.extend(value.to_le_bytes());
    }

    fn f32(&mut self, key: &str, value: f64) {
        self.key(key, 6);
        self.bytes.extend((value as f32).to_le_bytes());
    }

    fn bool(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.bytes.push(value.into());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        put_text(&mut self.bytes, value);
    }

    fn list(&mut self, key: &str, kind: u32, n: usize) {
        self.key(key, 9);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((n as u64).to_le_bytes());
    }

    fn texts<'a>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'a str>) {
        self.list(key, 8, values.len());
        values.for_each(|value| put_text(&mut self.bytes, value));
    }

    fn integers(&mut self, key: &str, values: impl ExactSizeIterator<Item = i32>) {
        self.list(key, 5, values.len());
        values.for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
