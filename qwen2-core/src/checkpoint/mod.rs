//! A checkpoint on disk: its config, its tensors by name, and where its other files are.

pub(crate) mod adapter;
mod directory;
pub(crate) mod gguf;
pub(crate) mod groups;
#[cfg(feature = "hub")]
mod hub;
mod hub_id;
mod join;
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

pub(crate) use shards::aligned;
pub use source::Source;

use crate::config::{DType, GenerationConfig, ModelConfig};
use crate::error::{Error, ErrorKind, Result};
use directory::Directory;
use safetensors::Extra;
use shards::Weights;
use source::Place;

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
/// Published configs have a kilobyte.
const MAX_CONFIG: u64 = 16 << 20;
/// Qwen2's tokenizer.json has seven megabytes.
const MAX_COMPANION: u64 = 256 << 20;

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
    home: Home,
    pub(crate) config: ModelConfig,
    pub(crate) generation_config: GenerationConfig,
    weights: Weights,
}

/// What holds the files beside the weights.
#[derive(Debug)]
enum Home {
    Directory(Directory),
    Gguf(Box<gguf::Embedded>),
}

/// What the bytes of a tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    Numbers(DType),
    /// Panels of blocks of few bits, `[panels, bytes of a panel]`.
    Packed,
    /// Blocks of a GGUF file, row by row.
    Blocks(gguf::blocks::Kind),
    /// 32-bit words, a part of a matrix in groups.
    Words,
    /// A matrix in groups, by [`StoredTensor::groups`].
    Grouped,
}

impl Encoding {
    /// Bytes of one element, which its place is a multiple of.
    pub(crate) fn size_in_bytes(self) -> usize {
        match self {
            Self::Numbers(dtype) => dtype.size_in_bytes(),
            Self::Packed | Self::Blocks(_) | Self::Grouped => 1,
            Self::Words => size_of::<u32>(),
        }
    }
}

impl std::fmt::Display for Encoding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Numbers(dtype) => dtype.fmt(f),
            Self::Packed => f.write_str("u8"),
            Self::Blocks(kind) => f.write_str(kind.name()),
            Self::Words => f.write_str("i32"),
            Self::Grouped => f.write_str("grouped"),
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
    /// A matrix in groups, of which `bytes` are the integers.
    pub(crate) groups: Option<groups::Groups>,
}

impl StoredTensor {
    /// Bytes of the file that it takes.
    pub(crate) fn stored_bytes(&self) -> u64 {
        match &self.groups {
            Some(groups) => groups.stored_bytes(),
            None => self.bytes.len() as u64,
        }
    }
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
        let (home, weights, config, generation_config) = match source.place(progress)? {
            Place::Directory(path) => Self::of_directory(&path)?,
            Place::Gguf(path) => Self::of_gguf(&path)?,
        };
        let checkpoint = Self {
            home,
            config,
            generation_config,
            weights,
        };
        if progress(Progress::new(0, checkpoint.total_bytes())).is_break() {
            return Err(cancelled(checkpoint.path()));
        }
        Ok(checkpoint)
    }

    fn of_directory(path: &Path) -> Result<Parts> {
        let directory = Directory::open(path)?;
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
        let extra = match (config.packed, config.group_quantization) {
            (true, _) => Extra::Packed,
            (false, Some(_)) => Extra::Words,
            (false, None) => Extra::Nothing,
        };
        let mut weights = Weights::open(&directory, extra)?;
        if let Some(quantization) = config.group_quantization {
            weights.join_groups(quantization)?;
        }
        Ok((
            Home::Directory(directory),
            weights,
            config,
            generation_config,
        ))
    }

    fn of_gguf(path: &Path) -> Result<Parts> {
        let (weights, embedded) = gguf::open(path)?;
        let config = ModelConfig::from_json(&embedded.config, path)?;
        let generation_config = GenerationConfig::from_json(&embedded.generation_config, path)?;
        Ok((
            Home::Gguf(Box::new(embedded)),
            weights,
            config,
            generation_config,
        ))
    }

    /// The directory or the file, as the caller wrote it or where the hub's cache has it.
    pub(crate) fn path(&self) -> &Path {
        match &self.home {
            Home::Directory(directory) => directory.path(),
            Home::Gguf(embedded) => &embedded.path,
        }
    }

    /// The file that the config is in, for errors about its values.
    pub(crate) fn config_path(&self) -> PathBuf {
        match &self.home {
            Home::Directory(directory) => directory.path().join(CONFIG),
            Home::Gguf(embedded) => embedded.path.clone(),
        }
    }

    /// What a GGUF file holds beside its weights; `None` for a directory.
    pub(crate) fn embedded(&self) -> Option<&gguf::Embedded> {
        match &self.home {
            Home::Directory(_) => None,
            Home::Gguf(embedded) => Some(embedded),
        }
    }

    /// The contents of a file beside the weights; `None` if there is none.
    ///
    /// # Errors
    /// As [`Directory::read`].
    pub(crate) fn companion(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match &self.home {
            Home::Directory(directory) => directory.read(name, MAX_COMPANION),
            Home::Gguf(embedded) => {
                let mut files = embedded.files().into_iter();
                Ok(files
                    .find(|file| file.0 == name)
                    .map(|file| file.1.to_vec()))
            }
        }
    }

    /// Whether matrices are stored in blocks of few bits that are not our own.
    pub(crate) fn has_blocks(&self) -> bool {
        self.weights.has_blocks()
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// `InvalidFile` if no file has it.
    pub(crate) fn tensor(&self, name: &str) -> Result<StoredTensor> {
        self.weights.tensor(name).ok_or_else(|| {
            Error::new(ErrorKind::InvalidFile, format!("no tensor named {name}"))
                .with_path(self.path())
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

type Parts = (Home, Weights, ModelConfig, GenerationConfig);

/// The error of a loading that its progress callback stopped.
pub(crate) fn cancelled(at: &Path) -> Error {
    Error::new(ErrorKind::Cancelled, "loading was cancelled").with_path(at)
}
