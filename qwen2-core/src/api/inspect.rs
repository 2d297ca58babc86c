//! What a checkpoint or an adapter is, without reading its weights.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::Path;

use super::quantize::Quantization;
use super::stored::kept_bytes;
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::{Checkpoint, Progress, Source, names};
use crate::config::{DType, GenerationConfig, ModelConfig};
use crate::error::Result;
use crate::ops::packed;

/// What [`inspect`] finds.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct CheckpointInfo {
    /// Of `config.json`, or of a GGUF file's metadata.
    pub config: ModelConfig,
    /// Of `generation_config.json`, or of a GGUF file's metadata.
    pub generation_config: GenerationConfig,
    /// `safetensors` or `gguf`.
    pub container: &'static str,
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
        weight_bytes += kept_bytes(&name, &stored, true);
    }
    Ok(CheckpointInfo {
        stored_bytes: checkpoint.total_bytes(),
        container: match checkpoint.embedded() {
            Some(_) => "gguf",
            None => "safetensors",
        },
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

/// Bytes that the weights of such a model take in memory: matrices in `dtype`, or packed where
/// `quantization` packs them, vectors in f32.
pub fn weight_bytes(config: &ModelConfig, dtype: DType, quantization: Option<Quantization>) -> u64 {
    let bytes = |(name, shape): (String, Vec<usize>)| {
        let elements: usize = shape.iter().product();
        let &[rows, cols] = shape.as_slice() else {
            return elements * size_of::<f32>();
        };
        match quantization.and_then(|quantization| quantization.format(&name)) {
            Some(format) => packed::Shape { format, rows, cols }.bytes(),
            None => elements * dtype.size_in_bytes(),
        }
    };
    let tensors = names::expected(config, config.tie_word_embeddings);
    tensors.into_iter().map(|tensor| bytes(tensor) as u64).sum()
}

/// What [`inspect_adapter`] finds.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct AdapterInfo {
    /// The model that it was made for, as PEFT names it.
    pub base_model: Option<String>,
    /// The projections that it changes: `q_proj`, `v_proj`…
    pub modules: BTreeSet<String>,
    /// Matrices that it changes.
    pub matrices: usize,
    /// The ranks of its matrices.
    pub ranks: BTreeSet<usize>,
    /// The smallest and the largest factor of its products, from `lora_alpha` and the rank.
    pub scales: [f32; 2],
    /// Numbers in all its matrices.
    pub parameters: u64,
    /// Bytes in memory beside the weights, in f32.
    pub bytes: u64,
}

/// Reads the LoRA adapter in the directory `path`, as PEFT saves it.
///
/// # Errors
/// As [`ModelBuilder::adapter`](crate::ModelBuilder::adapter) while loading.
pub fn inspect_adapter(path: impl AsRef<Path>) -> Result<AdapterInfo> {
    let adapter = Adapter::open(path.as_ref())?;
    let mut info = AdapterInfo {
        base_model: adapter.base_model.clone(),
        modules: BTreeSet::new(),
        matrices: 0,
        ranks: BTreeSet::new(),
        scales: [f32::INFINITY, f32::NEG_INFINITY],
        parameters: adapter.bytes() / size_of::<f32>() as u64,
        bytes: adapter.bytes(),
    };
    for (name, rank, scale) in adapter.matrices() {
        let module = name.trim_end_matches(".weight").rsplit('.').next();
        info.modules.extend(module.map(str::to_owned));
        info.matrices += 1;
        info.ranks.insert(rank);
        info.scales = [info.scales[0].min(scale), info.scales[1].max(scale)];
    }
    if info.matrices == 0 {
        info.scales = [0.0; 2];
    }
    Ok(info)
}
