//! The vocabulary of a GGUF file as the `tokenizer.json` and `tokenizer_config.json` it was made of.

use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use crate::error::{Error, ErrorKind, Result};

/// Qwen2's pre-tokenizer: `tokenizer.json` of every Qwen2 checkpoint has this expression.
const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TOKENS: &str = "tokenizer.ggml.tokens";
/// Kinds of tokens that ggml numbers.
pub(super) const NORMAL: i32 = 1;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;

/// The two files, and the ids that end a text.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pub(super) tokenizer: Vec<u8>,
    pub(super) tokenizer_config: Vec<u8>,
    pub(super) eos_token_ids: Vec<u32>,
}

/// # Errors
/// `Unsupported` for another tokenizer than Qwen2's, `InvalidFile` where something is missing.
pub(super) fn vocabulary(metadata: &Metadata<'_>) -> Result<Vocabulary> {
    check_kind(metadata)?;
    let tokens = metadata.texts(TOKENS)?;
    let kinds = metadata.integers("tokenizer.ggml.token_type")?;
    if !kinds.is_empty() && kinds.len() != tokens.len() {
        let why = format!("{} kinds of {} tokens", kinds.len(), tokens.len());
        return Err(metadata.invalid("tokenizer.ggml.token_type", why));
    }
    let kind = |id: usize| kinds.get(id).copied().unwrap_or_default();
    let mut vocab = Map::new();
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        if kind(id) == UNUSED {
            continue; // rows of the table without a token
        }
        if vocab.insert((*token).to_owned(), json!(id)).is_some() {
            return Err(metadata.invalid(TOKENS, format!("token {id} is there twice")));
        }
        if matches!(kind(id), CONTROL | USER_DEFINED) {
            added.push(json!({
                "id": id, "content": token, "special": kind(id) == CONTROL, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            }));
        }
    }
    let merges = metadata.texts("tokenizer.ggml.merges")?;
    let level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
    });
    let split = json!({
        "type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": false,
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level, "decoder": level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
            "merges": merges,
        },
    });
    let special = special_tokens(metadata, &tokens)?;
    let mut config = json!({ "tokenizer_class": "Qwen2Tokenizer" });
    for (name, _, token) in &special {
        config[*name] = json!(token);
    }
    if let Some(template) = metadata.text("tokenizer.chat_template")? {
        config["chat_template"] = json!(template);
    }
    Ok(Vocabulary {
        tokenizer: bytes(&tokenizer),
        tokenizer_config: bytes(&config),
        eos_token_ids: ends(&special, &tokens, &kind, metadata)?,
    })
}

fn check_kind(metadata: &Metadata<'_>) -> Result<()> {
    // June 2024's files do not all name the pre-tokenizer.
    for (key, known, may_miss) in [
        ("tokenizer.ggml.model", "gpt2", false),
        ("tokenizer.ggml.pre", "qwen2", true),
    ] {
        match metadata.text(key)? {
            None if may_miss => {}
            None => return Err(metadata.invalid(key, "missing")),
            Some(found) if found == known => {}
            Some(found) => {
                return Err(
                    Error::new(ErrorKind::Unsupported, "tokenizer of another kind")
                        .with_path(metadata.path)
                        .with_key(key)
                        .with_why(format!("expected {known}, found {}", found.escape_debug()))
                        .with_help("Qwen2 uses byte-level BPE; is this file from another model?"),
                );
            }
        }
    }
    Ok(())
}

type Special<'a> = Vec<(&'static str, usize, &'a str)>;

fn special_tokens<'a>(metadata: &Metadata<'_>, tokens: &[&'a str]) -> Result<Special<'a>> {
    let mut found = Vec::new();
    for (name, key) in [
        ("bos_token", "tokenizer.ggml.bos_token_id"),
        ("eos_token", "tokenizer.ggml.eos_token_id"),
        ("pad_token", "tokenizer.ggml.padding_token_id"),
    ] {
        let Some(id) = metadata.integer(key)? else {
            continue;
        };
        let Some(token) = tokens.get(id as usize) else {
            return Err(metadata.invalid(key, format!("{id}, there are {} tokens", tokens.len())));
        };
        found.push((name, id as usize, *token));
    }
    Ok(found)
}

/// As llama.cpp: the end token that is named, the end of a turn, and the control tokens that Qwen2 ends
/// texts with.
fn ends(
    special: &Special<'_>,
    tokens: &[&str],
    kind: &dyn Fn(usize) -> i32,
    metadata: &Metadata<'_>,
) -> Result<Vec<u32>> {
    let mut ends: Vec<u32> = special
        .iter()
        .filter(|(name, ..)| *name == "eos_token")
        .map(|(_, id, _)| *id as u32)
        .collect();
    let turn = metadata.integer("tokenizer.ggml.eot_token_id")?;
    ends.extend(
        turn.filter(|id| *id < tokens.len() as u64)
            .map(|id| id as u32),
    );
    let known = ["<|im_end|>", "<|endoftext|>"];
    let named = tokens.iter().enumerate();
    ends.extend(
        named
            .filter(|(id, token)| kind(*id) == CONTROL && known.contains(token))
            .map(|(id, _)| id as u32),
    );
    ends.sort_unstable();
    ends.dedup();
    Ok(ends)
}

fn bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}
