//! What a generation gives back.

use std::time::Duration;

use serde::Serialize;

use super::{FinishReason, Logprobs, StopMatch};
use crate::text::ToolCall;

/// One token and the text that became whole with it.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Piece {
    /// Whole UTF-8; empty while a character is incomplete or a stop string may be under way.
    pub text: String,
    /// The token's id.
    pub token: u32,
    /// How likely it was, if `logprobs` asked for it.
    pub logprobs: Option<Logprobs>,
    /// Calls of tools that became whole with it; their text is not in `text`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

impl std::fmt::Display for Piece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// A finished generation.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Generation {
    /// The text, without the stop string, special tokens and calls of tools.
    pub text: String,
    /// The new tokens, an end-of-text token included.
    pub tokens: Vec<u32>,
    /// Calls of tools that the model asks for, in its order; empty unless the options name tools.
    pub tool_calls: Vec<ToolCall>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What it ended at, when `finish_reason` is `Stop`.
    pub stop_match: Option<StopMatch>,
    /// Token counts.
    pub usage: Usage,
    /// How long it took.
    pub timings: Timings,
    /// The seed that the sampler used; `None` for greedy decoding.
    pub seed: Option<u64>,
    /// How likely each of the new tokens was, if `logprobs` asked for it; else empty.
    pub logprobs: Vec<Logprobs>,
    /// How likely each token of the prompt but the first was, if `prompt_logprobs` asked for it; else
    /// empty.
    pub prompt_logprobs: Vec<Logprobs>,
}

/// Token counts of one generation.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Tokens of the prompt, cached ones included.
    pub prompt_tokens: usize,
    /// Prompt tokens that were in the cache already.
    pub cached_tokens: usize,
    /// New tokens.
    pub completion_tokens: usize,
    /// Tokens that were proposed by the draft model or by prompt lookup.
    pub draft_tokens: usize,
    /// Those of them that the model chose, too: over `draft_tokens` this is the acceptance rate. Each
    /// saved one step of the model.
    pub accepted_tokens: usize,
}

/// Wall-clock times of one generation.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Timings {
    /// Reading the prompt.
    pub prefill: Duration,
    /// All new tokens but the first, which prefill pays for.
    pub decode: Duration,
    /// Prompt tokens (without cached ones) per second; 0 if nothing was read.
    pub prefill_tokens_per_s: f64,
    /// New tokens per second after the first; 0 if there were none.
    pub decode_tokens_per_s: f64,
}

impl Timings {
    pub(crate) fn new(
        prefill: Duration,
        n_prefill: usize,
        decode: Duration,
        n_decode: usize,
    ) -> Self {
        let rate = |n: usize, time: Duration| {
            if n == 0 || time.is_zero() {
                0.0
            } else {
                n as f64 / time.as_secs_f64()
            }
        };
        Self {
            prefill,
            decode,
            prefill_tokens_per_s: rate(n_prefill, prefill),
            decode_tokens_per_s: rate(n_decode, decode),
        }
    }
}
