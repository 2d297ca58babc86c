//! `config.json` and `generation_config.json`: what a checkpoint says about itself, checked.

mod fields;
mod groups;
mod kv_cache;
mod long_context;
mod read;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Serialize, Serializer};

pub(crate) use fields::{json_why, one_line};
pub use groups::{GroupMethod, GroupQuantization};
pub use kv_cache::KvCacheType;
pub use long_context::{DualChunkAttention, LongContext};

use crate::error::{Error, ErrorKind, Result};
use read::MAX_CONTEXT;
pub(crate) use read::MAX_LAYERS;

/// The architecture of a checkpoint, under the names of its `config.json`.
///
/// Read from both forms that exist: that of June 2024 (`rope_theta`, `rope_scaling`,
/// `torch_dtype`) and that of transformers 5 (`rope_parameters`, `layer_types`, `dtype`).
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelConfig {
    /// `qwen2` or `qwen2_moe`.
    pub model_type: String,
    /// Width of the residual stream, at most 262,144.
    pub hidden_size: usize,
    /// Width of the dense MLP, at most 1,048,576.
    pub intermediate_size: usize,
    /// Layers, at most 1024.
    pub num_hidden_layers: usize,
    /// Query heads, at most 4096.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of a head, even, at most 4096; `hidden_size / num_attention_heads` if not stored.
    pub head_dim: usize,
    /// Rows of the embedding table, at most 16,777,216.
    pub vocab_size: usize,
    /// Positions without YaRN, at most 2^30; default 32,768. See [`ModelConfig::context_length`].
    pub max_position_embeddings: usize,
    /// What RMSNorm adds to the mean square, above 0; default 1e-6.
    pub rms_norm_eps: f64,
    /// Whether the embedding table is the head as well, where no `lm_head.weight` is stored.
    pub tie_word_embeddings: bool,
    /// Base of the rotary frequencies, above 0; default 10,000 as in transformers.
    pub rope_theta: f64,
    /// How positions beyond the trained ones are reached; `None`: plain.
    pub rope_scaling: Option<RopeScaling>,
    /// Attention in chunks, for sequences that are longer than one; of `rope_scaling` it takes nothing
    /// but the length that was trained, for `None` in `original_max_position_embeddings`.
    pub dual_chunk_attention: Option<DualChunkAttention>,
    /// Per layer, how many positions it looks back including its own; `None`: all.
    pub layer_sliding_windows: Vec<Option<usize>>,
    /// The precision that the config announces; the stored tensors decide.
    pub dtype: Option<DType>,
    /// Beginning of text; Qwen2 never adds it by itself.
    pub bos_token_id: Option<u32>,
    /// The ids that end a generation, one number or a list in the file.
    pub eos_token_ids: Vec<u32>,
    /// The experts of `qwen2_moe`.
    pub moe: Option<MoeConfig>,
    /// Whether the matrices are stored packed, as [`quantize`](crate::quantize) writes them.
    pub packed: bool,
    /// How the matrices are stored, if GPTQ or AWQ has quantized them.
    pub group_quantization: Option<GroupQuantization>,
}

/// `quant_method` and `version` of checkpoints that are packed in our own way (docs/formats.md).
pub(crate) const PACKED: &str = "qwen2-packed";
pub(crate) const PACKED_VERSION: usize = 1;

/// transformers' and vLLM's.
const DEFAULT_BETA_FAST: f64 = 32.0;
const DEFAULT_BETA_SLOW: f64 = 1.0;

/// How the rotary frequencies are stretched.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// YaRN (arXiv:2309.00071).
    #[non_exhaustive]
    Yarn {
        /// Stretch, at least 1.
        factor: f64,
        /// Positions the model was trained on.
        original_max_position_embeddings: usize,
        /// What cosine and sine are multiplied by; `None`: `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
        /// Rotations above which a dimension is left alone; default 32.
        beta_fast: f64,
        /// Rotations below which a dimension is stretched fully; default 1.
        beta_slow: f64,
        /// How much of a dimension that is left alone is left alone, above 0 and at most 1; default 1.
        /// vLLM's key.
        extrapolation_factor: f64,
        /// Whether the ends between which dimensions are stretched in part are whole ones; default true.
        truncate: bool,
    },
}

/// The sparse layers of `qwen2_moe`.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MoeConfig {
    /// Routed experts of a layer, at most 1024, and 4096 in all layers.
    pub num_experts: usize,
    /// Experts that each token visits.
    pub num_experts_per_tok: usize,
    /// Width of a routed expert.
    pub moe_intermediate_size: usize,
    /// Width of the expert that every token visits.
    pub shared_expert_intermediate_size: usize,
    /// Whether the chosen experts' weights are scaled to sum to 1; false in Qwen2.
    pub norm_topk_prob: bool,
    /// Every how many layers one is sparse.
    pub decoder_sparse_step: usize,
    /// Layers that are dense in any case.
    pub mlp_only_layers: Vec<usize>,
}

/// The precision of stored numbers.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
}

/// The checkpoint's own wishes for generation, from `generation_config.json`.
///
/// A key that the file does not have, or that it has as `null`, is `None` (or an empty list).
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct GenerationConfig {
    /// Whether to sample; false: greedy.
    pub do_sample: Option<bool>,
    /// At least 0.
    pub temperature: Option<f32>,
    /// 0 means off.
    pub top_k: Option<usize>,
    /// 0 to 1.
    pub top_p: Option<f32>,
    /// 0 to 1.
    pub min_p: Option<f32>,
    /// Above 0; 1 means off.
    pub repetition_penalty: Option<f32>,
    /// New tokens at most.
    pub max_new_tokens: Option<usize>,
    /// The ids that end a generation, one number or a list in the file.
    pub eos_token_ids: Vec<u32>,
    /// Beginning of text.
    pub bos_token_id: Option<u32>,
    /// Padding.
    pub pad_token_id: Option<u32>,
}

impl Default for ModelConfig {
    /// What transformers' `Qwen2Config()` gives: 32 layers, 4096 wide.
    fn default() -> Self {
        Self {
            model_type: "qwen2".to_owned(),
            hidden_size: 4096,
            intermediate_size: 22016,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: 128,
            vocab_size: 151_936,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            rope_theta: 10_000.0,
            rope_scaling: None,
            dual_chunk_attention: None,
            layer_sliding_windows: vec![None; 32],
            dtype: None,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            moe: None,
            packed: false,
            group_quantization: None,
        }
    }
}

impl ModelConfig {
    /// Reads a `config.json`; `path` is only named in errors.
    ///
    /// Keys that transformers' `Qwen2Config` has a harmless default for may be absent; the sizes
    /// may not, because a wrong guess would only show as a wrong shape later.
    ///
    /// # Errors
    /// `InvalidFile` for text that is not JSON, values of the wrong type or out of range, and
    /// values that contradict each other; `Unsupported` for another model type, activation, rotary
    /// scaling or a quantized checkpoint. Each names the key.
    pub fn from_json(bytes: &[u8], path: &Path) -> Result<Self> {
        read::model_config(bytes, path)
    }

    /// Tokens that prompt and answer may have together: `max_position_embeddings`, or what YaRN
    /// stretches the trained length to, if that is more.
    pub fn context_length(&self) -> usize {
        match &self.rope_scaling {
            None => self.max_position_embeddings,
            Some(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                ..
            }) => {
                let stretched = factor * *original_max_position_embeddings as f64;
                self.max_position_embeddings
                    .max((stretched as usize).min(MAX_CONTEXT))
            }
        }
    }

    /// Weights of the network, embeddings included, a tied table counted once.
    pub fn parameter_count(&self) -> u64 {
        let hidden = self.hidden_size as u64;
        let table = self.vocab_size as u64 * hidden;
        let q = (self.num_attention_heads * self.head_dim) as u64;
        let kv = (self.num_key_value_heads * self.head_dim) as u64;
        let attention = 2 * q * hidden + 2 * kv * hidden + q + 2 * kv;
        let layers: u64 = (0..self.num_hidden_layers)
            .map(|layer| attention + 2 * hidden + self.mlp_parameter_count(layer))
            .sum();
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        tables * table + layers + hidden
    }

    fn mlp_parameter_count(&self, layer: usize) -> u64 {
        let hidden = self.hidden_size as u64;
        let mlp = |width: usize| 3 * hidden * width as u64;
        match self.moe.as_ref().filter(|moe| moe.is_sparse(layer)) {
            None => mlp(self.intermediate_size),
            Some(moe) => {
                let experts = moe.num_experts as u64;
                let routers = experts * hidden + hidden;
                let routed = experts * mlp(moe.moe_intermediate_size);
                routers + routed + mlp(moe.shared_expert_intermediate_size)
            }
        }
    }

    /// Bytes of keys and values that one token takes in all layers (on GPUs the scales of `Q8` and
    /// `Q4` take twice as much).
    pub fn kv_bytes_per_token(&self, kv_cache: impl Into<KvCacheType>) -> u64 {
        let row = self.num_key_value_heads * kv_cache.into().row_bytes(self.head_dim);
        2 * self.num_hidden_layers as u64 * row as u64
    }
}

impl MoeConfig {
    /// Whether a layer has experts instead of one MLP.
    pub fn is_sparse(&self, layer: usize) -> bool {
        !self.mlp_only_layers.contains(&layer)
            && (layer + 1).is_multiple_of(self.decoder_sparse_step)
    }
}

impl DType {
    /// `f32`, `f16` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    /// `float32`, `float16` or `bfloat16`, as configs have it.
    pub(crate) fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    /// What a model with weights of this precision keeps its keys and values in, unless asked
    /// otherwise: f32 beside f32, so that nothing is rounded; else f16, which has three bits
    /// of mantissa more than bf16.
    pub fn default_kv_cache(self) -> KvCacheType {
        match self {
            Self::F32 => KvCacheType::F32,
            Self::F16 | Self::BF16 => KvCacheType::F16,
        }
    }

    /// Bytes of one number.
    pub fn size_in_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for DType {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl FromStr for DType {
    type Err = Error;

    /// Takes our names and torch's (`bfloat16`).
    ///
    /// # Errors
    /// `InvalidArgument` for any other name.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "f32" | "float32" => Ok(Self::F32),
            "f16" | "float16" => Ok(Self::F16),
            "bf16" | "bfloat16" => Ok(Self::BF16),
            _ => Err(Error::new(ErrorKind::InvalidArgument, "unknown dtype")
                .with_key("dtype")
                .with_why(name)
                .with_help("f32, f16 and bf16 are known")),
        }
    }
}

impl GenerationConfig {
    /// Reads a `generation_config.json`; `path` is only named in errors.
    ///
    /// # Errors
    /// `InvalidFile` for text that is not JSON and for values of the wrong type or out of range.
    pub fn from_json(bytes: &[u8], path: &Path) -> Result<Self> {
        read::generation_config(bytes, path)
    }
}

#[cfg(test)]
mod tests;
