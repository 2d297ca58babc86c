//! How positions beyond the trained ones are reached: YaRN, or dual chunk attention.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::fields::Fields;
use super::read::MAX_CONTEXT;
use super::{DEFAULT_BETA_FAST, DEFAULT_BETA_SLOW, ModelConfig, RopeScaling};
use crate::error::{Error, ErrorKind, Result};

/// YaRN's paper goes no further.
const MOST_STRETCH: usize = 32;

/// What a context beyond the trained length is reached by.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LongContext {
    /// YaRN (arXiv:2309.00071) for sequences of every length, as published.
    #[default]
    Yarn,
    /// YaRN for sequences that are longer than the trained length, no change for those that are not. One
    /// that grows past it is read again from its start.
    YarnWhenNeeded,
    /// Dual chunk attention (arXiv:2402.17463), see [`DualChunkAttention`].
    DualChunk,
}

/// Dual chunk attention (arXiv:2402.17463, arXiv:2407.10671): a query meets keys of its own chunk at
/// their distance, of the chunk before at their distance up to `chunk_size`, and of those further back
/// at `chunk_size`, so that no rotation is larger than those that were trained. Sequences of one chunk
/// are as without it. The keys of `dual_chunk_attention_config`, as vLLM reads it; its sparse variant is
/// not followed, attention is whole.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DualChunkAttention {
    /// The longest distance, at most the trained length; default 8192.
    pub chunk_size: usize,
    /// How far the chunk before is met at its true distance: chunks are `chunk_size - local_size` long;
    /// default 1024.
    pub local_size: usize,
    /// Queries behind this position are multiplied by `0.1 ln(position / this) + 1` (YaRN's rule for
    /// attention); `None`: by nothing.
    pub original_max_position_embeddings: Option<usize>,
}

impl DualChunkAttention {
    /// The length of a chunk.
    pub fn chunk_length(&self) -> usize {
        self.chunk_size - self.local_size
    }

    /// That of a model which was trained on `trained` positions: ChunkLlama's sizes, three quarters of
    /// them a chunk's longest distance and a sixteenth local.
    fn of_trained(trained: usize) -> Self {
        let chunk_size = (trained / 4 * 3).max(2);
        Self {
            chunk_size,
            local_size: (trained / 16).clamp(1, chunk_size - 1),
            original_max_position_embeddings: Some(trained),
        }
    }
}

impl LongContext {
    /// `yarn`, `yarn_when_needed` or `dual_chunk`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Yarn => "yarn",
            Self::YarnWhenNeeded => "yarn_when_needed",
            Self::DualChunk => "dual_chunk",
        }
    }
}

impl fmt::Display for LongContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LongContext {
    type Err = Error;

    /// # Errors
    /// `InvalidArgument` for an unknown name.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "yarn" => Ok(Self::Yarn),
            "yarn_when_needed" => Ok(Self::YarnWhenNeeded),
            "dual_chunk" => Ok(Self::DualChunk),
            _ => Err(
                Error::new(ErrorKind::InvalidArgument, "unknown kind of long context")
                    .with_key("long_context")
                    .with_why(name)
                    .with_help("yarn, yarn_when_needed and dual_chunk are known"),
            ),
        }
    }
}

impl ModelConfig {
    /// This model for `context_length` tokens: as it is where it has as many, else with `by`. YaRN's factor is
    /// the ratio of that to the length it was trained on, as the model cards' factor 4 for 131,072
    /// tokens. Dual chunk attention replaces the stretch of YaRN where the config has that.
    ///
    /// # Errors
    /// `InvalidArgument` for more than 32 times the trained length, or where YaRN is set and not enough.
    pub fn stretched_to(&self, context_length: usize, by: LongContext) -> Result<Self> {
        let trained = self.trained_length();
        let most = self.context_length();
        let too_far = |why: String, help: &str| {
            let what = "context is longer than the model's";
            Err(Error::new(ErrorKind::InvalidArgument, what)
                .with_key("context_length")
                .with_why(why)
                .with_help(help))
        };
        let reach = self.longest_context(LongContext::DualChunk);
        if context_length > reach {
            let why = format!(
                "{context_length}, the model has {trained} and is stretched {MOST_STRETCH} times at most"
            );
            return too_far(why, "ask for less: quality falls with every doubling");
        }
        if by == LongContext::DualChunk || self.dual_chunk_attention.is_some() {
            let sizes = self
                .dual_chunk_attention
                .unwrap_or_else(|| DualChunkAttention::of_trained(trained));
            return Ok(Self {
                dual_chunk_attention: Some(sizes),
                max_position_embeddings: self.max_position_embeddings.max(context_length),
                ..self.clone()
            });
        }
        if context_length <= most {
            return Ok(self.clone());
        }
        if self.rope_scaling.is_some() {
            let why = format!("{context_length}, the model has {most}");
            return too_far(why, "raise factor in rope_scaling of config.json");
        }
        Ok(Self {
            rope_scaling: Some(RopeScaling::Yarn {
                factor: context_length as f64 / trained as f64,
                original_max_position_embeddings: trained,
                attention_factor: None,
                beta_fast: DEFAULT_BETA_FAST,
                beta_slow: DEFAULT_BETA_SLOW,
                extrapolation_factor: 1.0,
                truncate: true,
            }),
            ..self.clone()
        })
    }

    /// The longest context that [`Self::stretched_to`] gives this model with `by`, in tokens.
    pub fn longest_context(&self, by: LongContext) -> usize {
        let most = self.context_length();
        let chunks = by == LongContext::DualChunk || self.dual_chunk_attention.is_some();
        if self.rope_scaling.is_some() && !chunks {
            return most;
        }
        self.trained_length().saturating_mul(MOST_STRETCH).max(most)
    }

    /// Positions that the model was trained on, as far as the config tells.
    pub fn trained_length(&self) -> usize {
        match &self.rope_scaling {
            None => self.max_position_embeddings,
            Some(RopeScaling::Yarn {
                original_max_position_embeddings,
                ..
            }) => *original_max_position_embeddings,
        }
    }
}

/// `dual_chunk_attention_config`.
pub(super) fn dual_chunk_attention(fields: &Fields<'_>) -> Result<Option<DualChunkAttention>> {
    let Some(table) = fields.object("dual_chunk_attention_config")? else {
        return Ok(None);
    };
    let chunk_size = table
        .integer("chunk_size", 2..=MAX_CONTEXT)?
        .unwrap_or(8192);
    let local_size = table.integer("local_size", 0..=MAX_CONTEXT)?;
    let local_size = local_size.unwrap_or(1024);
    if local_size >= chunk_size {
        let why = format!("{local_size}, chunk_size is {chunk_size}");
        return Err(table.contradiction("local_size", why));
    }
    Ok(Some(DualChunkAttention {
        chunk_size,
        local_size,
        original_max_position_embeddings: table
            .integer("original_max_position_embeddings", 1..=MAX_CONTEXT)?,
    }))
}
