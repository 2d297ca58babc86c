//! `qwen2 info`: what a checkpoint or an adapter is, and what it needs.

mod adapter;
mod report;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use qwen2_core::{
    DType, Device, KvCacheType, LongContext, ModelConfig, Quantization, inspect, weight_bytes,
};

use crate::args::InfoArgs;
use crate::failure::Failure;
use crate::{demo, load, output};

/// Configs have a kilobyte; what is much larger is something else.
const MAX_CONFIG: u64 = 16 << 20;

/// A model, and what was asked about it.
pub(super) struct Facts {
    name: String,
    /// As its file has it, before it is stretched.
    trained: ModelConfig,
    config: ModelConfig,
    stored: Option<Stored>,
    dtype: Option<DType>,
    quantization: Option<Quantization>,
    /// Bytes of the weights as `--dtype` or `--quantize` wants them.
    asked_bytes: Option<u64>,
    kv_cache: Option<KvCacheType>,
    context_length: usize,
    long_context: LongContext,
    device: String,
}

/// What the headers of the weights say.
struct Stored {
    container: &'static str,
    /// Bytes of all tensors.
    bytes: u64,
    /// In memory, if they are loaded with no other wish.
    weight_bytes: u64,
    /// Bytes by how they are stored.
    formats: BTreeMap<String, u64>,
}

pub(crate) fn run(args: &InfoArgs) -> Result<(), Failure> {
    if let Some(model) = &args.model
        && Path::new(model).join(adapter::CONFIG).is_file()
    {
        return adapter::run(Path::new(model), args.json);
    }
    let mut facts = match &args.model {
        None => of_checkpoint(demo::directory()?.as_os_str())?,
        Some(model) => match config_of(model) {
            Some(config) => of_config(&config)?,
            None => of_checkpoint(model)?,
        },
    };
    if let Some(dtype) = &args.dtype {
        facts.dtype = Some(dtype.parse()?);
        facts.change_weights("--dtype")?;
    }
    if let Some(quantization) = &args.quantize {
        facts.quantization = Some(quantization.parse()?);
        facts.change_weights("--quantize")?;
    }
    if let Some(kv_cache) = &args.kv_cache {
        facts.kv_cache = Some(kv_cache.parse()?);
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
    if let Some(by) = &args.long_context {
        facts.long_context = by.parse()?;
    }
    let by = facts.long_context;
    facts.config = facts.trained.stretched_to(facts.context_length, by)?;
    facts.device = args.device.parse::<Device>()?.resolved()?.to_string();
    match args.json {
        true => output::print_json(&facts.json()),
        false => output::print(&facts.lines()),
    }
}

/// The config that `model` means where there are no weights: itself, or the one in a directory.
fn config_of(model: &OsStr) -> Option<PathBuf> {
    let path = Path::new(model);
    if path
        .extension()
        .is_some_and(|extension| extension == "json")
        && path.is_file()
    {
        return Some(path.to_owned());
    }
    let config = path.join("config.json");
    let is_weights = |entry: fs::DirEntry| {
        let path = entry.path();
        path.extension()
            .is_some_and(|extension| extension == "safetensors")
    };
    let has_weights = fs::read_dir(path).ok()?.flatten().any(is_weights);
    (config.is_file() && !has_weights).then_some(config)
}

fn of_config(path: &Path) -> Result<Facts, Failure> {
    let unreadable = |why: &dyn std::fmt::Display| {
        Failure::new(
            format!("cannot be read: {}: {why}", path.display()),
            "is this the config.json of a model?",
        )
    };
    let size = fs::metadata(path)
        .map_err(|error| unreadable(&error))?
        .len();
    if size > MAX_CONFIG {
        return Err(unreadable(&format!("{size} bytes, at most {MAX_CONFIG}")));
    }
    let bytes = fs::read(path).map_err(|error| unreadable(&error))?;
    let config = ModelConfig::from_json(&bytes, path)?;
    // config.json is what every model calls it; its directory has the name.
    let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let name = match path.file_name() {
        Some(name) if name == "config.json" => real.parent().and_then(Path::file_name),
        _ => path.file_stem(),
    };
    let name = name.unwrap_or(path.as_os_str()).to_string_lossy();
    let dtype = config.dtype;
    Ok(Facts::new(name.into_owned(), config, dtype))
}

/// Weights whose headers are read; of an id of a hub they must be here first.
fn of_checkpoint(model: &OsStr) -> Result<Facts, Failure> {
    let source = load::source(model);
    let found = load::with_bar("reading", |progress| inspect(source, progress))?;
    let real = fs::canonicalize(model).unwrap_or_else(|_| PathBuf::from(model));
    let name = real.file_name().unwrap_or(model).to_string_lossy();
    Ok(Facts {
        stored: Some(Stored {
            container: found.container,
            bytes: found.stored_bytes,
            weight_bytes: found.weight_bytes,
            formats: found.formats,
        }),
        ..Facts::new(name.into_owned(), found.config, found.dtype)
    })
}

impl Facts {
    fn new(name: String, config: ModelConfig, dtype: Option<DType>) -> Self {
        Self {
            name,
            context_length: config.context_length(),
            trained: config.clone(),
            config,
            stored: None,
            dtype,
            quantization: None,
            asked_bytes: None,
            kv_cache: None,
            long_context: LongContext::default(),
            device: String::new(),
        }
    }

    /// The weights become what the option says.
    fn change_weights(&mut self, option: &str) -> Result<(), Failure> {
        if self.config.packed {
            return Err(Failure::usage(
                format!("{option} cannot change a packed model"),
                "leave it out, or ask about the checkpoint that it was made of",
            ));
        }
        let dtype = self.dtype.unwrap_or(DType::F32);
        self.asked_bytes = Some(weight_bytes(&self.config, dtype, self.quantization));
        Ok(())
    }

    /// In memory; unknown where only headers could tell.
    fn weight_bytes(&self) -> Option<u64> {
        let of_config = || {
            let plain = !self.config.packed && self.config.group_quantization.is_none();
            let dtype = self.dtype.filter(|_| plain)?;
            Some(weight_bytes(&self.config, dtype, None))
        };
        let stored = || Some(self.stored.as_ref()?.weight_bytes);
        self.asked_bytes.or_else(stored).or_else(of_config)
    }

    /// Whether the weights are kept as numbers.
    fn is_dense(&self) -> bool {
        let dense = |name: &String| name.parse::<DType>().is_ok();
        match (self.asked_bytes, &self.stored) {
            (Some(_), _) => self.quantization.is_none(),
            (None, Some(stored)) => stored.formats.keys().all(dense) && !self.config.packed,
            (None, None) => !self.config.packed && self.config.group_quantization.is_none(),
        }
    }

    fn kv_cache(&self) -> KvCacheType {
        self.kv_cache.unwrap_or_else(|| match self.is_dense() {
            true => self.dtype.unwrap_or(DType::F32).default_kv_cache(),
            false => KvCacheType::F16,
        })
    }

    fn cache_bytes(&self, kv_cache: KvCacheType) -> u64 {
        self.config.kv_bytes_per_token(kv_cache) * self.context_length as u64
    }

    fn memory_bytes(&self) -> Option<u64> {
        Some(self.weight_bytes()? + self.cache_bytes(self.kv_cache()))
    }
}
