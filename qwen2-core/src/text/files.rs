//! The tokenizer's files, parsed and checked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::bpe::Bpe;
use crate::config::one_line;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::fenced;

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
/// Qwen2's tokenizer.json has seven megabytes.
const MAX_FILE: u64 = 256 << 20;
const DOWNLOAD: &str = "download tokenizer.json again, or convert the tokenizer with \
     AutoTokenizer.from_pretrained(directory).save_pretrained(directory)";

/// The bytes of the files beside a checkpoint.
pub(super) struct TokenizerFiles {
    pub(super) path: PathBuf,
    pub(super) tokenizer: Vec<u8>,
    pub(super) config: Option<Vec<u8>>,
    pub(super) chat_template: Option<String>,
}

/// What is read from `tokenizer_config.json`.
#[derive(Debug, Default)]
pub(super) struct TokenizerConfig {
    /// `bos_token`, `eos_token`, `pad_token` and `unk_token`, where they are set.
    pub(super) special_tokens: BTreeMap<&'static str, String>,
    pub(super) chat_template: Option<String>,
    /// `added_tokens_decoder`: transformers adds those that tokenizer.json lacks.
    pub(super) added_tokens: Vec<(u32, AddedToken)>,
}

/// The crate's tokenizer with our model.
pub(super) type BpeTokenizer = tokenizers::TokenizerImpl<
    Bpe,
    tokenizers::NormalizerWrapper,
    tokenizers::PreTokenizerWrapper,
    tokenizers::PostProcessorWrapper,
    tokenizers::DecoderWrapper,
>;

/// The parts of `tokenizer.json` that we check ourselves; the crate reads the rest.
#[derive(Deserialize)]
struct Header {
    #[serde(default)]
    added_tokens: Vec<AddedEntry>,
    #[serde(default)]
    decoder: Value,
    model: ModelHeader,
}

#[derive(Deserialize)]
struct AddedEntry {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct ModelHeader {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    dropout: Option<f32>,
}

/// Gives the contents of a file by its name, if it is there.
pub(crate) type ReadFile<'a> = &'a dyn Fn(&str) -> Result<Option<Vec<u8>>>;

impl TokenizerFiles {
    /// `path`: a directory, or a tokenizer.json whose neighbours are read as well.
    pub(super) fn read(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Self::of(path.join(TOKENIZER), &|name| {
                read_if_there(&path.join(name))
            });
        }
        let directory = path.parent().unwrap_or(Path::new(""));
        Self::of(path.to_owned(), &|name| match name {
            TOKENIZER => read_if_there(path),
            name => read_if_there(&directory.join(name)),
        })
    }

    /// What `read` gives; `path` is tokenizer.json's, for messages.
    pub(super) fn of(path: PathBuf, read: ReadFile<'_>) -> Result<Self> {
        let tokenizer = read(TOKENIZER)?.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "tokenizer not found")
                .with_path(&path)
                .with_why("no such file")
                .with_help(DOWNLOAD)
        })?;
        let template_path = path.with_file_name(TEMPLATE);
        let chat_template = read(TEMPLATE)?
            .map(|bytes| utf8(&bytes, &template_path).map(str::to_owned))
            .transpose()?;
        Ok(Self {
            config: read(CONFIG)?,
            path,
            tokenizer,
            chat_template,
        })
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    let failed = |error| Error::io("cannot read the tokenizer", path, error);
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    // Opening a pipe would hang.
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return Err(
            invalid(path).with_why(format!("not a regular file of at most {MAX_FILE} bytes"))
        );
    }
    std::fs::read(path).map(Some).map_err(failed)
}

/// `tokenizer.json` as the tokenizers crate reads it, with what it would do silently refused:
/// other ids than the file's, cropping, padding, dropout.
pub(super) fn parse_tokenizer(bytes: &[u8], path: &Path) -> Result<BpeTokenizer> {
    let text = utf8(bytes, path)?;
    let header: Header = serde_json::from_str(text).map_err(|error| invalid_json(error, path))?;
    check_kind(&header, path)?;
    // The crate's own indexing may panic on a hostile file; that is a bad file, not our bug.
    let mut tokenizer = fenced(|| serde_json::from_slice::<BpeTokenizer>(bytes))
        .map_err(|_| invalid(path).with_why("the tokenizers crate panicked on it"))?
        .map_err(|error| invalid_json(error, path))?;
    tokenizer
        .with_padding(None)
        .with_truncation(None)
        .map_err(|error| invalid(path).with_why(one_line(&error.to_string())))?;
    for added in header.added_tokens {
        check_id(&tokenizer, &added.content, added.id, path)?;
    }
    Ok(tokenizer)
}

fn check_kind(header: &Header, path: &Path) -> Result<()> {
    let unsupported = |key: &str, why: String, help: &str| {
        Err(
            Error::new(ErrorKind::Unsupported, "tokenizer of another kind")
                .with_path(path)
                .with_key(key)
                .with_why(why)
                .with_help(help),
        )
    };
    let other = "Qwen2 uses byte-level BPE; is this file from another model?";
    if let Some(kind) = header.model.kind.as_deref().filter(|&kind| kind != "BPE") {
        let why = format!("expected BPE, found {}", one_line(kind));
        return unsupported("model.type", why, other);
    }
    if !is_byte_level(&header.decoder) {
        return unsupported("decoder", "expected ByteLevel".to_owned(), other);
    }
    if header.model.dropout.is_some_and(|dropout| dropout != 0.0) {
        let why = "tokens would differ from call to call".to_owned();
        return unsupported(
            "model.dropout",
            why,
            "set it to null: dropout is for training",
        );
    }
    Ok(())
}

fn is_byte_level(decoder: &Value) -> bool {
    let in_sequence = decoder["decoders"].as_array();
    decoder["type"] == "ByteLevel" || in_sequence.is_some_and(|list| list.iter().any(is_byte_level))
}

/// The crate numbers added tokens by itself and only logs when the file says otherwise.
fn check_id(tokenizer: &BpeTokenizer, token: &str, id: u32, path: &Path) -> Result<()> {
    match tokenizer.token_to_id(token) {
        Some(found) if found != id => Err(invalid(path)
            .with_key(one_line(&format!("added token {token:?}")))
            .with_why(format!("its id is {id}, but its place makes it {found}"))),
        _ => Ok(()),
    }
}

/// Adds the tokens of the config that tokenizer.json lacks, as transformers does.
pub(super) fn add_from_config(
    tokenizer: &mut BpeTokenizer,
    added: &[(u32, AddedToken)],
    path: &Path,
) -> Result<()> {
    let known = tokenizer.get_added_tokens_decoder();
    let missing: Vec<_> = added
        .iter()
        .filter(|(id, _)| !known.contains_key(id))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let tokens = missing.iter().map(|(_, token)| token.clone());
    fenced(|| tokenizer.add_tokens(tokens))
        .map_err(|_| invalid(path).with_why("the tokenizers crate panicked on its added tokens"))?
        .map_err(|error| invalid(path).with_why(one_line(&error.to_string())))?;
    missing
        .iter()
        .try_for_each(|(id, token)| check_id(tokenizer, &token.content, *id, path))
}

/// `tokenizer_config.json`.
pub(super) fn parse_config(bytes: &[u8], tokenizer_path: &Path) -> Result<TokenizerConfig> {
    let path = &tokenizer_path.with_file_name(CONFIG);
    let value: Value =
        serde_json::from_str(utf8(bytes, path)?).map_err(|error| invalid_json(error, path))?;
    let Value::Object(config) = value else {
        return Err(wrong_type(path, "(whole file)", "an object", &value));
    };
    let mut special_tokens = BTreeMap::new();
    for key in ["bos_token", "eos_token", "pad_token", "unk_token"] {
        if let Some(content) = token_content(&config, key, path)? {
            special_tokens.insert(key, content);
        }
    }
    Ok(TokenizerConfig {
        special_tokens,
        chat_template: chat_template(&config, path)?,
        added_tokens: added_tokens(&config, path)?,
    })
}

/// A token is written as a string or as an object with `content`.
fn token_content(config: &Map<String, Value>, key: &str, path: &Path) -> Result<Option<String>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(content)) => Ok(Some(content.clone())),
        Some(value) => match value.get("content").and_then(Value::as_str) {
            Some(content) => Ok(Some(content.to_owned())),
            None => Err(wrong_type(
                path,
                key,
                "a string or an object with content",
                value,
            )),
        },
    }
}

/// A template is a string, or a list of named ones of which `default` is taken.
fn chat_template(config: &Map<String, Value>, path: &Path) -> Result<Option<String>> {
    let key = "chat_template";
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(list)) => list
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(|template| Some(template.to_owned()))
            .ok_or_else(|| {
                invalid(path)
                    .with_key(key)
                    .with_why("a list without a template named default")
                    .with_help("name one template default, or put it into chat_template.jinja")
            }),
        Some(value) => Err(wrong_type(
            path,
            key,
            "a string or a list of named templates",
            value,
        )),
    }
}

fn added_tokens(config: &Map<String, Value>, path: &Path) -> Result<Vec<(u32, AddedToken)>> {
    let key = "added_tokens_decoder";
    let entries = match config.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(value) => return Err(wrong_type(path, key, "an object", value)),
    };
    let mut tokens = Vec::with_capacity(entries.len());
    for (id, entry) in entries {
        let key = format!("{key}.{}", one_line(id));
        let id: u32 = id.parse().map_err(|_| {
            invalid(path)
                .with_key(&key)
                .with_why("the key is not a token id")
        })?;
        let Some(content) = entry["content"].as_str() else {
            return Err(wrong_type(path, &key, "an object with content", entry));
        };
        let flag = |name: &str| entry[name].as_bool().unwrap_or(false);
        let token = AddedToken::from(content, flag("special"))
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .normalized(entry["normalized"].as_bool().unwrap_or(!flag("special")));
        tokens.push((id, token));
    }
    tokens.sort_by_key(|(id, _)| *id);
    Ok(tokens)
}

pub(super) fn invalid(path: &Path) -> Error {
    Error::new(ErrorKind::InvalidFile, "invalid tokenizer file")
        .with_path(path)
        .with_help(DOWNLOAD)
}

fn wrong_type(path: &Path, key: &str, expected: &str, found: &Value) -> Error {
    let found = match found {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object without it",
    };
    invalid(path)
        .with_key(key)
        .with_why(format!("expected {expected}, found {found}"))
        .with_help(format!(
            "compare {} with the original checkpoint's",
            path.display()
        ))
}

fn invalid_json(error: serde_json::Error, path: &Path) -> Error {
    // serde_json's message ends with the line and the column, and may hold text of the file.
    let text = error.to_string();
    let (message, place) = text.split_at(text.rfind(" at line ").unwrap_or(text.len()));
    let message = one_line(message);
    let why = match error.is_eof() {
        true => format!("the file is cut off: {message}{place}"),
        false => format!("{message}{place}"),
    };
    invalid(path).with_why(why).with_source(error)
}

fn utf8<'b>(bytes: &'b [u8], path: &Path) -> Result<&'b str> {
    std::str::from_utf8(bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
        let column = before
            .iter()
            .rev()
            .take_while(|&&byte| byte != b'\n')
            .count()
            + 1;
        invalid(path)
            .with_why(format!("not UTF-8 at line {line} column {column}"))
            .with_source(error)
    })
}
