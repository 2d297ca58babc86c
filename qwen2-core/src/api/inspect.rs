//! What a checkpoint is, without reading its weights.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use super::stored::kept_bytes;
use crate::checkpoint::{Checkpoint, Progress, Source, names};
use crate::config::{DType, GenerationConfig, ModelConfig};
use crate::error::Result;

/// What [`inspect`] finds.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct CheckpointInfo {
    /// Of `config.json`, or of a GGUF file's metadata.
    pub config: ModelConfig,
    /// Of `generation_config.json`, or of a GGUF file's metadata.
    pub generation_config: GenerationConfig,
    /// Bytes of all tensors as they are stored.
    pub stored_bytes: u64,
    /// Bytes of the weights in memory if they are loaded with no other wish.
    pub weight_bytes: u64,
    /// Bytes by how they are stored: `bf16`, `Q4_K`…
    pub formats: BTreeMap<String, u64>,
    /// The precision that most bytes are in which are numbers.
    pub dtype: Option<DType>,
}

/// Reads the configs and the headers of the weights, and checks that the tensors are those that the
/// config calls for. An id of the hub is downloaded first.
///
/// # Errors
/// As [`ModelBuilder::load`](crate::ModelBuilder::load).
pub fn inspect(
    source: impl Into<Source>,
    mut progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<CheckpointInfo> {
    let checkpoint = Checkpoint::open(&source.into(), &mut progress)?;
    let tied = names::audit(&checkpoint)?;
    let mut formats = BTreeMap::new();
    let mut weight_bytes = 0;
    for (name, _) in names::expected(&checkpoint.config, tied) {
        let stored = checkpoint.tensor(&name)?;
        *formats.entry(stored.encoding.to_string()).or_default() += stored.stored_bytes();
        weight_bytes += kept_bytes(&name, &stored);
    }
    Ok(CheckpointInfo {
        stored_bytes: checkpoint.total_bytes(),
        weight_bytes,
        formats,
        dtype: match checkpoint.config.packed {
            true => checkpoint.config.dtype,
            false => checkpoint.dtype(),
        },
        config: checkpoint.config,
        generation_config: checkpoint.generation_config,
    })
}
