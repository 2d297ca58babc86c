//! A checkpoint on disk: its config, its tensors by name, and where its other files are.

mod directory;
#[cfg(feature = "hub")]
mod hub;
pub(crate) mod mmap;
pub(crate) mod names;
mod safetensors;
mod shards;
mod source;
#[cfg(test)]
mod tests;
pub(crate) mod write;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bytes::Bytes;

pub use source::Source;

use crate::config::{DType, GenerationConfig, ModelConfig};
use crate::error::{Error, ErrorKind, Result};
use directory::Directory;
use shards::Weights;

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
/// Published configs have a kilobyte.
const MAX_CONFIG: u64 = 16 << 20;

/// How far loading has come.
///
/// A download counts first; then counting starts again with the weights that are read.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes in all.
    pub bytes_total: u64,
}

impl Progress {
    pub(crate) fn new(bytes_done: u64, bytes_total: u64) -> Self {
        Self {
            bytes_done,
            bytes_total,
        }
    }
}

/// An opened checkpoint; its weight files are mapped, not read.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    directory: Directory,
    pub(crate) config: ModelConfig,
    pub(crate) generation_config: GenerationConfig,
    weights: Weights,
}

/// What the bytes of a tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    Numbers(DType),
    /// Panels of blocks of few bits, `[panels, bytes of a panel]`.
    Packed,
}

impl Encoding {
    /// Bytes of one element.
    pub(crate) fn size_in_bytes(self) -> usize {
        match self {
            Self::Numbers(dtype) => dtype.size_in_bytes(),
            Self::Packed => 1,
        }
    }
}

impl std::fmt::Display for Encoding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Numbers(dtype) => dtype.fmt(f),
            Self::Packed => f.write_str("u8"),
        }
    }
}

/// One tensor as it is stored.
#[derive(Clone, Debug)]
pub(crate) struct StoredTensor {
    pub(crate) encoding: Encoding,
    pub(crate) shape: Vec<usize>,
    /// Little-endian numbers, row-major, aligned to their size, or panels; a slice of the mapped file.
    pub(crate) bytes: Bytes,
}

impl Checkpoint {
    /// Opens `source`: reads the configs, maps the weights and checks their headers. What the
    /// tensors should be is [`names::audit`]'s to say.
    ///
    /// # Errors
    /// `NotFound`, `PermissionDenied` and `Io` for files, `InvalidFile` and `Unsupported` for what
    /// they hold, `Network` for downloads, `Cancelled` if `progress` breaks.
    pub(crate) fn open(
        source: &Source,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Self> {
        let directory = Directory::open(&source.directory(progress)?)?;
        let config_path = directory.path().join(CONFIG);
        let Some(bytes) = directory.read(CONFIG, MAX_CONFIG)? else {
            return Err(Error::new(ErrorKind::NotFound, "no such file")
                .with_path(config_path)
                .with_help("is this the directory of a checkpoint? download config.json again"));
        };
        let config = ModelConfig::from_json(&bytes, &config_path)?;
        let generation_config = match directory.read(GENERATION_CONFIG, MAX_CONFIG)? {
            Some(bytes) => {
                GenerationConfig::from_json(&bytes, &directory.path().join(GENERATION_CONFIG))?
            }
            None => GenerationConfig::default(),
        };
        let weights = Weights::open(&directory, config.packed)?;
        if progress(Progress::new(0, weights.total_bytes())).is_break() {
            return Err(cancelled(directory.path()));
        }
        Ok(Self {
            directory,
            config,
            generation_config,
            weights,
        })
    }

    /// The directory, as the caller wrote it or where the hub's cache has it.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The path of `config.json`, for errors about its values.
    pub(crate) fn config_path(&self) -> PathBuf {
        self.directory().join(CONFIG)
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// `InvalidFile` if no file has it.
    pub(crate) fn tensor(&self, name: &str) -> Result<StoredTensor> {
        self.weights.tensor(name).ok_or_else(|| {
            Error::new(ErrorKind::InvalidFile, format!("no tensor named {name}"))
                .with_path(self.directory())
                .with_help("do config.json and the weights belong to one checkpoint?")
        })
    }

    /// Says that the tensor's bytes in the file are done with: the system may take their memory back.
    pub(crate) fn release(&self, name: &str) {
        self.weights.release(name);
    }

    /// The names of all stored tensors, sorted.
    #[cfg(test)]
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.weights.iter().map(|(name, ..)| name)
    }

    /// Bytes of all stored tensors.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.weights.total_bytes()
    }

    /// The precision that most of the stored bytes are in.
    pub(crate) fn dtype(&self) -> Option<DType> {
        self.weights.dtype()
    }
}

/// The error of a loading that its progress callback stopped.
pub(crate) fn cancelled(at: &Path) -> Error {
    Error::new(ErrorKind::Cancelled, "loading was cancelled").with_path(at)
}
