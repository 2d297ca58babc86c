//! GGUF files (ggml's format, written by llama.cpp): one or split, with config and vocabulary inside.

pub(crate) mod blocks;
mod config;
mod metadata;
mod names;
mod reader;
#[cfg(test)]
mod tests;
mod vocabulary;
pub(crate) mod write;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::mmap::{self, Mapped};
use super::safetensors::Entry;
use super::shards::Weights;
use super::{CONFIG, Encoding, GENERATION_CONFIG};
use crate::config::{DType, one_line};
use crate::error::{Error, ErrorKind, Result};
use blocks::Kind;
use metadata::Metadata;
use reader::{Header, Tensor};

/// The 57B model has 5771 matrices and vectors, one file of it at most as many.
const MAX_ENTRIES: usize = 1 << 14;

/// What a GGUF file holds beside its weights, as the files of a directory.
#[derive(Debug)]
pub(crate) struct Embedded {
    /// The first file.
    pub(crate) path: PathBuf,
    pub(crate) config: Vec<u8>,
    pub(crate) tokenizer: Vec<u8>,
    pub(crate) tokenizer_config: Vec<u8>,
    pub(crate) generation_config: Vec<u8>,
}

impl Embedded {
    /// The files by the names that they have in a directory.
    pub(super) fn files(&self) -> [(&'static str, &[u8]); 4] {
        [
            (CONFIG, &self.config),
            (GENERATION_CONFIG, &self.generation_config),
            ("tokenizer.json", &self.tokenizer),
            ("tokenizer_config.json", &self.tokenizer_config),
        ]
    }
}

/// Maps the file at `path`, and those that it was split into, and reads their headers.
///
/// # Errors
/// `NotFound` where one of several is missing, `InvalidFile` and `Unsupported` for what they hold.
pub(super) fn open(path: &Path) -> Result<(Weights, Embedded)> {
    let mut weights = Weights::empty();
    let mut first = None;
    for (number, path) in parts(path).into_iter().enumerate() {
        let mapped = map(&path)?;
        let header = reader::read(&mapped.bytes, &path)?;
        check_split(&header, number, &mapped, &path)?;
        weights.add_entries(path.clone(), mapped.clone(), entries(&header, &path)?)?;
        first.get_or_insert((header, mapped, path));
    }
    let Some((mut header, mapped, path)) = first else {
        unreachable!("a file is at least itself");
    };
    let experts = weights.layers_with(".mlp.gate.weight");
    // The keys are in the first file, what they are about may be in another.
    header
        .tensors
        .extend(weights.iter().filter_map(|(name, _, shape, _)| {
            let (name, _) = names::gguf_name(name)?;
            Some(Tensor {
                name,
                shape: shape.to_vec(),
                kind: Kind::F32,
                range: 0..0,
            })
        }));
    let metadata = Metadata {
        header: &header,
        file: &mapped.bytes,
        path: &path,
    };
    let vocabulary = vocabulary::vocabulary(&metadata)?;
    let config = config::config(&metadata, &experts)?;
    let generation_config = json!({ "eos_token_id": vocabulary.eos_token_ids });
    let embedded = Embedded {
        config: config.to_string().into_bytes(),
        tokenizer: vocabulary.tokenizer,
        tokenizer_config: vocabulary.tokenizer_config,
        generation_config: generation_config.to_string().into_bytes(),
        path,
    };
    Ok((weights, embedded))
}

/// `tokenizer.json` and `tokenizer_config.json` of the file at `path`, which need not have weights.
///
/// # Errors
/// As [`open`].
pub(crate) fn tokenizer(path: &Path) -> Result<(Vec<u8>, Vec<u8>)> {
    let Some(path) = parts(path).into_iter().next() else {
        unreachable!("a file is at least itself");
    };
    let mapped = map(&path)?;
    let header = reader::read(&mapped.bytes, &path)?;
    let metadata = Metadata {
        header: &header,
        file: &mapped.bytes,
        path: &path,
    };
    let vocabulary = vocabulary::vocabulary(&metadata)?;
    Ok((vocabulary.tokenizer, vocabulary.tokenizer_config))
}

/// The GGUF file that `path` means: itself by its ending, or the one in a directory that has no
/// `tokenizer.json`.
///
/// # Errors
/// As [`only_file`].
pub(crate) fn file_at(path: &Path) -> Result<Option<PathBuf>> {
    let ending = path.extension().unwrap_or_default();
    if ending.eq_ignore_ascii_case("gguf") && !path.is_dir() {
        return Ok(Some(path.to_owned()));
    }
    if path.is_dir() && !path.join("tokenizer.json").exists() {
        return only_file(path);
    }
    Ok(None)
}

fn map(path: &Path) -> Result<Mapped> {
    let real =
        fs::canonicalize(path).map_err(|error| Error::io("file cannot be opened", path, error))?;
    // Opening a pipe would hang.
    if !real.is_file() {
        return Err(Error::new(ErrorKind::InvalidFile, "not a regular file").with_path(path));
    }
    mmap::map(&real, path)
}

/// The tensors as the checkpoint has them: a stack of experts is many, counted before they are named.
fn entries(header: &Header, path: &Path) -> Result<Vec<Entry>> {
    let mut count = 0;
    for tensor in &header.tensors {
        count += names::count(tensor);
        if count > MAX_ENTRIES {
            return Err(Error::new(ErrorKind::InvalidFile, "not a valid GGUF model")
                .with_path(path)
                .with_key(one_line(&tensor.name))
                .with_why(format!("its experts make more than {MAX_ENTRIES} matrices"))
                .with_help("is it the model that its name says?"));
        }
    }
    let mut entries = Vec::with_capacity(count);
    for tensor in &header.tensors {
        let encoding = match tensor.kind {
            Kind::F32 => Encoding::Numbers(DType::F32),
            Kind::F16 => Encoding::Numbers(DType::F16),
            Kind::Bf16 => Encoding::Numbers(DType::BF16),
            kind => Encoding::Blocks(kind),
        };
        let tensors = names::checkpoint_tensors(tensor).into_iter();
        entries.extend(tensors.map(|(name, shape, range)| Entry {
            name,
            encoding,
            shape,
            range,
        }));
    }
    Ok(entries)
}

/// The file's parts: `model-00001-of-00003.gguf` and its like stand for all of theirs, any other for
/// itself.
fn parts(path: &Path) -> Vec<PathBuf> {
    match path.file_name().and_then(|name| name.to_str()) {
        Some(name) => part_names(name)
            .into_iter()
            .map(|name| path.with_file_name(name))
            .collect(),
        None => vec![path.to_owned()],
    }
}

/// As [`parts`], by names.
pub(super) fn part_names(name: &str) -> Vec<String> {
    let numbered = || -> Option<(&str, usize)> {
        let stem = name.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (base, number) = rest.rsplit_once('-')?;
        let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        (is_number(number) && is_number(count)).then_some(())?;
        Some((base, count.parse().ok()?))
    };
    match numbered() {
        Some((base, count)) if count > 0 => (1..=count)
            .map(|number| format!("{base}-{number:05}-of-{count:05}.gguf"))
            .collect(),
        _ => vec![name.to_owned()],
    }
}

/// A part must say that it is the one that its name says.
fn check_split(header: &Header, number: usize, mapped: &Mapped, path: &Path) -> Result<()> {
    const KEY: &str = "split.no";
    let metadata = Metadata {
        header,
        file: &mapped.bytes,
        path,
    };
    match metadata.integer(KEY)? {
        Some(found) if found != number as u64 => {
            let why = format!("part {found} of its model, its name says part {number}");
            Err(metadata.invalid(KEY, why))
        }
        _ => Ok(()),
    }
}

/// The GGUF file that a directory without `config.json` is there for.
///
/// # Errors
/// `InvalidArgument` if there are several, `Io` where the directory cannot be read.
pub(super) fn only_file(directory: &Path) -> Result<Option<PathBuf>> {
    let failed = |error| Error::io("directory cannot be opened", directory, error);
    let mut models = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let is_gguf = path
            .extension()
            .is_some_and(|extension| extension == "gguf");
        let first = parts(&path).into_iter().next();
        models.extend(first.filter(|first| is_gguf && *first == path));
    }
    models.sort();
    if models.len() > 1 {
        let names = models.iter().filter_map(|path| path.file_name());
        let names: Vec<_> = names.map(|name| name.to_string_lossy()).collect();
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "several models in one directory",
        )
        .with_path(directory)
        .with_why(names.join(", "))
        .with_help("give the path of one of them"));
    }
    Ok(models.pop())
}
