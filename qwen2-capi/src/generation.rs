//! What a generation gives back.

use std::ffi::c_char;

use qwen2_core::{FinishReason, Generation, StopMatch};

use crate::calls::Calls;
use crate::fence::{self, Handle};
use crate::logprobs::Recorded;
use crate::values::{Terminated, show};

/// An end token, a stop token or a stop string came; which one, says `qwen2_generation_stop_match`.
pub const QWEN2_FINISH_STOP: i32 = 1;
/// `max_new_tokens` or the end of the context was reached.
pub const QWEN2_FINISH_LENGTH: i32 = 2;
/// The model asks for tools to be called.
pub const QWEN2_FINISH_TOOL_CALLS: i32 = 3;
/// The caller cancelled; the text so far is kept.
pub const QWEN2_FINISH_CANCELLED: i32 = 4;
/// The timeout passed; the text so far is kept.
pub const QWEN2_FINISH_TIMEOUT: i32 = 5;

/// No stop: the generation ended for another reason.
pub const QWEN2_STOP_MATCH_NONE: i32 = 0;
/// An end token of the checkpoint.
pub const QWEN2_STOP_MATCH_EOS: i32 = 1;
/// One of the caller's stop tokens.
pub const QWEN2_STOP_MATCH_TOKEN: i32 = 2;
/// One of the caller's stop strings.
pub const QWEN2_STOP_MATCH_TEXT: i32 = 3;
/// The constraint, which allows nothing more.
pub const QWEN2_STOP_MATCH_CONSTRAINT: i32 = 4;

/// A finished generation. Owned by the caller that received it; never changes.
pub struct qwen2_generation {
    result: Generation,
    text: Terminated,
    stop_text: Terminated,
    pub(crate) calls: Calls,
    pub(crate) logprobs: Recorded,
    pub(crate) prompt_logprobs: Recorded,
}

impl Handle for qwen2_generation {
    const TYPE: &'static str = "qwen2_generation";
}

impl From<Generation> for qwen2_generation {
    fn from(result: Generation) -> Self {
        let stop_text = match &result.stop_match {
            Some(StopMatch::Text(text)) => Terminated::from(text.as_str()),
            _ => Terminated::default(),
        };
        Self {
            calls: Calls::from(&result.tool_calls[..]),
            text: Terminated::from(result.text.as_str()),
            stop_text,
            logprobs: result.logprobs.iter().collect(),
            prompt_logprobs: result.prompt_logprobs.iter().collect(),
            result,
        }
    }
}

/// The text, without the stop string, special tokens and calls of tools, NUL-terminated; `len` (may be NULL)
/// gets its length in bytes. Valid until the generation is freed. NULL, and 0 in `len`, for a handle
/// that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_text(
    generation: *const qwen2_generation,
    len: *mut usize,
) -> *const c_char {
    fence::set_optional(len, 0);
    fence::read(generation, std::ptr::null(), |generation| {
        generation.text.show(len)
    })
}

/// The new tokens, an end token included; `n_tokens` (may be NULL) gets their number. Valid until the
/// generation is freed. NULL, and 0 in `n_tokens`, for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_tokens(
    generation: *const qwen2_generation,
    n_tokens: *mut usize,
) -> *const u32 {
    fence::set_optional(n_tokens, 0);
    fence::read(generation, std::ptr::null(), |generation| {
        show(&generation.result.tokens, n_tokens)
    })
}

/// Why it ended, one of `QWEN2_FINISH_*`; 0 for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_finish_reason(
    generation: *const qwen2_generation,
) -> i32 {
    fence::read(generation, 0, |generation| {
        match generation.result.finish_reason {
            FinishReason::Stop => QWEN2_FINISH_STOP,
            FinishReason::Length => QWEN2_FINISH_LENGTH,
            FinishReason::ToolCalls => QWEN2_FINISH_TOOL_CALLS,
            FinishReason::Cancelled => QWEN2_FINISH_CANCELLED,
            FinishReason::Timeout => QWEN2_FINISH_TIMEOUT,
            _ => 0,
        }
    })
}

/// What it ended at, one of `QWEN2_STOP_MATCH_*`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_stop_match(generation: *const qwen2_generation) -> i32 {
    fence::read(
        generation,
        QWEN2_STOP_MATCH_NONE,
        |generation| match generation.result.stop_match {
            Some(StopMatch::Eos(_)) => QWEN2_STOP_MATCH_EOS,
            Some(StopMatch::Token(_)) => QWEN2_STOP_MATCH_TOKEN,
            Some(StopMatch::Text(_)) => QWEN2_STOP_MATCH_TEXT,
            Some(StopMatch::Constraint) => QWEN2_STOP_MATCH_CONSTRAINT,
            _ => QWEN2_STOP_MATCH_NONE,
        },
    )
}

/// The token that it ended at, or -1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_stop_token(generation: *const qwen2_generation) -> i64 {
    fence::read(generation, -1, |generation| {
        match generation.result.stop_match {
            Some(StopMatch::Eos(token) | StopMatch::Token(token)) => i64::from(token),
            _ => -1,
        }
    })
}

/// The stop string that it ended at, NUL-terminated, or NULL; `len` (may be NULL) gets its length in
/// bytes. Valid until the generation is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_stop_text(
    generation: *const qwen2_generation,
    len: *mut usize,
) -> *const c_char {
    fence::set_optional(len, 0);
    fence::read(
        generation,
        std::ptr::null(),
        |generation| match generation.result.stop_match {
            Some(StopMatch::Text(_)) => generation.stop_text.show(len),
            _ => std::ptr::null(),
        },
    )
}

/// Tokens of the prompt, cached ones included. This and the numbers below are 0 for a handle that is
/// none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_prompt_tokens(
    generation: *const qwen2_generation,
) -> u64 {
    fence::read(generation, 0, |generation| {
        generation.result.usage.prompt_tokens as u64
    })
}

/// Prompt tokens that were in a session's cache already.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_cached_tokens(
    generation: *const qwen2_generation,
) -> u64 {
    fence::read(generation, 0, |generation| {
        generation.result.usage.cached_tokens as u64
    })
}

/// New tokens.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_completion_tokens(
    generation: *const qwen2_generation,
) -> u64 {
    fence::read(generation, 0, |generation| {
        generation.result.usage.completion_tokens as u64
    })
}

/// Tokens that were proposed by the draft model or by prompt lookup.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_draft_tokens(generation: *const qwen2_generation) -> u64 {
    fence::read(generation, 0, |generation| {
        generation.result.usage.draft_tokens as u64
    })
}

/// Those of them that the model chose, too; over the number of all this is the acceptance rate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_accepted_tokens(
    generation: *const qwen2_generation,
) -> u64 {
    fence::read(generation, 0, |generation| {
        generation.result.usage.accepted_tokens as u64
    })
}

/// Seconds that reading the prompt took, the first new token included.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_prefill_s(generation: *const qwen2_generation) -> f64 {
    fence::read(generation, 0.0, |generation| {
        generation.result.timings.prefill.as_secs_f64()
    })
}

/// Seconds that all new tokens but the first took.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_decode_s(generation: *const qwen2_generation) -> f64 {
    fence::read(generation, 0.0, |generation| {
        generation.result.timings.decode.as_secs_f64()
    })
}

/// Prompt tokens, without cached ones, per second.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_prefill_tokens_per_s(
    generation: *const qwen2_generation,
) -> f64 {
    fence::read(generation, 0.0, |generation| {
        generation.result.timings.prefill_tokens_per_s
    })
}

/// New tokens per second after the first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_decode_tokens_per_s(
    generation: *const qwen2_generation,
) -> f64 {
    fence::read(generation, 0.0, |generation| {
        generation.result.timings.decode_tokens_per_s
    })
}

/// 1, and the seed of the sampler in `*seed` (may be NULL); 0, and `*seed` untouched, for a greedy
/// generation, which has none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_seed(
    generation: *const qwen2_generation,
    seed: *mut u64,
) -> i32 {
    fence::read(generation, 0, |generation| match generation.result.seed {
        Some(used) => {
            fence::set_optional(seed, used);
            1
        }
        None => 0,
    })
}

/// Frees a generation; NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_free(generation: *mut qwen2_generation) {
    fence::free(generation);
}
