//! `qwen2 info`: what a checkpoint is and what it needs, from its files' names and its config.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use qwen2_core::{DType, Device, KvCacheType, LongContext, ModelConfig, inspect, instruction_set};
use serde_json::{Value, json};

use crate::args::InfoArgs;
use crate::failure::Failure;
use crate::output::{self, human_bytes, human_count};
use crate::{demo, load};

/// Configs have a kilobyte; what is much larger is something else.
const MAX_CONFIG: u64 = 16 << 20;

struct Facts {
    name: String,
    config: ModelConfig,
    /// Bytes of the weight files.
    stored_bytes: Option<u64>,
    /// Bytes of the weights in memory, where their headers were read.
    weight_bytes: Option<u64>,
    /// Bytes by how they are stored, where the headers were read.
    formats: Option<BTreeMap<String, u64>>,
    dtype: Option<DType>,
    context_length: usize,
}

pub(crate) fn run(args: &InfoArgs) -> Result<(), Failure> {
    let mut facts = match &args.model {
        None => of_directory(&demo::directory()?)?,
        Some(model) => match directory_of(model) {
            Some(directory) => match of_directory(&directory)? {
                // What its matrices become is for their headers to say.
                facts if facts.config.group_quantization.is_some() => of_checkpoint(model)?,
                facts => facts,
            },
            None => of_checkpoint(model)?,
        },
    };
    if let Some(dtype) = &args.dtype {
        facts.dtype = Some(dtype.parse()?);
    }
    if let Some(wanted) = args.context_length {
        if wanted == 0 {
            return Err(Failure::usage(
                "context_length is 0",
                "leave it out for all the model can",
            ));
        }
        facts.context_length = wanted;
    }
    let by = args
        .long_context
        .as_deref()
        .map_or(Ok(LongContext::default()), str::parse)?;
    facts.config = facts.config.stretched_to(facts.context_length, by)?;
    match args.json {
        true => output::print_json(&facts.json()),
        false => output::print(&facts.lines()),
    }
}

/// The directory that `model` names, itself or by a weight file in it.
fn directory_of(model: &OsStr) -> Option<PathBuf> {
    let path = Path::new(model);
    match path.extension() {
        _ if path.join("config.json").exists() => Some(path.to_owned()),
        Some(extension) if extension == "safetensors" && path.is_file() => {
            let parent = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            Some(parent.unwrap_or(Path::new(".")).to_owned())
        }
        _ => None,
    }
}

fn of_directory(directory: &Path) -> Result<Facts, Failure> {
    let path = directory.join("config.json");
    let unreadable = |why: &dyn std::fmt::Display| {
        Failure::new(
            format!("cannot be read: {}: {why}", path.display()),
            "is this the directory of a checkpoint?",
        )
    };
    let size = fs::metadata(&path)
        .map_err(|error| unreadable(&error))?
        .len();
    if size > MAX_CONFIG {
        return Err(unreadable(&format!("{size} bytes, at most {MAX_CONFIG}")));
    }
    let config =
        ModelConfig::from_json(&fs::read(&path).map_err(|error| unreadable(&error))?, &path)?;
    let name = fs::canonicalize(directory)
        .ok()
        .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    Ok(Facts {
        name: name.unwrap_or_else(|| directory.display().to_string()),
        stored_bytes: Some(stored_bytes(directory)?),
        weight_bytes: None,
        formats: None,
        dtype: config.dtype,
        context_length: config.context_length(),
        config,
    })
}

fn stored_bytes(directory: &Path) -> Result<u64, Failure> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            bytes += fs::metadata(&path)?.len();
        }
    }
    Ok(bytes)
}

/// A GGUF file, or an id of the hub, whose files must be here first.
fn of_checkpoint(model: &OsStr) -> Result<Facts, Failure> {
    let source = load::source(model);
    let found = load::with_bar("reading", |progress| inspect(source, progress))?;
    let name = Path::new(model).file_name().unwrap_or(model);
    Ok(Facts {
        name: name.to_string_lossy().into_owned(),
        stored_bytes: Some(found.stored_bytes),
        weight_bytes: Some(found.weight_bytes),
        formats: Some(found.formats),
        dtype: found.dtype,
        context_length: found.config.context_length(),
        config: found.config,
    })
}

impl Facts {
    fn weight_bytes(&self) -> Option<u64> {
        if self.config.packed {
            return self.stored_bytes;
        }
        if !self.is_dense() {
            return self.weight_bytes;
        }
        self.dtype
            .map(|dtype| self.config.parameter_count() * dtype.size_in_bytes() as u64)
    }

    /// Whether the weights are numbers, which `--dtype` may change.
    fn is_dense(&self) -> bool {
        let dense = |name: &String| name.parse::<DType>().is_ok();
        self.formats
            .as_ref()
            .is_none_or(|formats| formats.keys().all(dense))
    }

    fn cache_bytes_per_token(&self) -> u64 {
        let cache = match self.config.packed || !self.is_dense() {
            true => KvCacheType::F16,
            false => self.dtype.unwrap_or(DType::F32).default_kv_cache(),
        };
        self.config.kv_bytes_per_token(cache)
    }

    fn cache_bytes(&self) -> u64 {
        self.cache_bytes_per_token() * self.context_length as u64
    }

    fn packed_cache_bytes(&self, kv_cache: KvCacheType) -> u64 {
        self.config.kv_bytes_per_token(kv_cache) * self.context_length as u64
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "model_type": self.config.model_type,
            "parameters": self.config.parameter_count(),
            "stored_bytes": self.stored_bytes,
            "dtype": self.dtype.map(DType::name),
            "formats": self.formats,
            "context_length": self.context_length,
            "weight_bytes": self.weight_bytes(),
            "cache_bytes_per_token": self.cache_bytes_per_token(),
            "cache_bytes": self.cache_bytes(),
            "cache_bytes_q8": self.packed_cache_bytes(KvCacheType::Q8),
            "cache_bytes_q4": self.packed_cache_bytes(KvCacheType::Q4),
            "devices": Device::compiled(),
            "instruction_set": instruction_set(),
            "threads": threads(),
            "config": self.config,
            "version": env!("CARGO_PKG_VERSION"),
        })
    }

    fn lines(&self) -> String {
        let config = &self.config;
        let dtype = match (&self.formats, self.dtype) {
            (Some(formats), _) if !self.is_dense() => {
                formats.keys().cloned().collect::<Vec<_>>().join(", ")
            }
            (_, Some(dtype)) => dtype.name().to_owned(),
            _ => "dtype not announced".to_owned(),
        };
        let stored = self.stored_bytes.map_or_else(
            || dtype.clone(),
            |bytes| format!("{}, {dtype}", human_bytes(bytes)),
        );
        let weights = self
            .weight_bytes()
            .map_or_else(|| "unknown".to_owned(), human_bytes);
        let architecture = format!(
            "{}, {} layers of width {}, {} heads over {} of keys and values",
            config.model_type,
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        );
        let rows = [
            ("model", self.name.clone()),
            ("architecture", architecture),
            ("parameters", human_count(config.parameter_count())),
            ("stored", stored),
            ("context", format!("{} tokens", self.context_length)),
            ("weights", weights),
            (
                "cache",
                format!(
                    "{} for the whole context ({} in q8, {} in q4), {} a token",
                    human_bytes(self.cache_bytes()),
                    human_bytes(self.packed_cache_bytes(KvCacheType::Q8)),
                    human_bytes(self.packed_cache_bytes(KvCacheType::Q4)),
                    human_bytes(self.cache_bytes_per_token())
                ),
            ),
            ("devices", Device::compiled().join(", ")),
            (
                "processor",
                format!("{}, {} threads", instruction_set(), threads()),
            ),
        ];
        rows.iter()
            .map(|(name, value)| format!("{name:<14}{value}\n"))
            .collect()
    }
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
