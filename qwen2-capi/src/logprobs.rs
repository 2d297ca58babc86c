//! How likely tokens were, as arrays.

use qwen2_core::Logprobs;

use crate::fence;
use crate::generation::qwen2_generation;
use crate::request::qwen2_request;
use crate::stream::qwen2_stream;
use crate::values::show;

/// Log-probabilities of a stretch of tokens, each part an array of its own.
#[derive(Default)]
pub(crate) struct Recorded {
    chosen: Vec<f32>,
    /// Where the likeliest tokens of each position end in the two below.
    ends: Vec<usize>,
    top_tokens: Vec<u32>,
    top_logprobs: Vec<f32>,
}

impl<'a> FromIterator<&'a Logprobs> for Recorded {
    fn from_iter<I: IntoIterator<Item = &'a Logprobs>>(all: I) -> Self {
        let mut recorded = Self::default();
        for logprobs in all {
            recorded.chosen.push(logprobs.logprob);
            for top in &logprobs.top {
                recorded.top_tokens.push(top.token);
                recorded.top_logprobs.push(top.logprob);
            }
            recorded.ends.push(recorded.top_tokens.len());
        }
        recorded
    }
}

impl Recorded {
    unsafe fn show_top(
        &self,
        position: usize,
        tokens: *mut *const u32,
        logprobs: *mut *const f32,
    ) -> usize {
        let Some(&end) = self.ends.get(position) else {
            return 0;
        };
        let start = position
            .checked_sub(1)
            .map_or(0, |before| self.ends[before]);
        fence::set_optional(tokens, self.top_tokens[start..end].as_ptr());
        fence::set_optional(logprobs, self.top_logprobs[start..end].as_ptr());
        end - start
    }
}

/// Natural log-probability of each new token, if `qwen2_options_set_logprobs` asked for it;
/// `n_logprobs` (may be NULL) gets their number, 0 if not. Valid until the generation is freed. NULL, and 0
/// in `n_logprobs`, for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_logprobs(
    generation: *const qwen2_generation,
    n_logprobs: *mut usize,
) -> *const f32 {
    fence::set_optional(n_logprobs, 0);
    fence::read(generation, std::ptr::null(), |generation| {
        show(&generation.logprobs.chosen, n_logprobs)
    })
}

/// The likeliest tokens where new token `position` stands, the likeliest first: returns their number;
/// `*tokens` and `*logprobs` (both may be NULL) get arrays as long, valid until the generation is freed.
/// 0, and both untouched, where there are none and for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_top_logprobs(
    generation: *const qwen2_generation,
    position: usize,
    tokens: *mut *const u32,
    logprobs: *mut *const f32,
) -> usize {
    fence::read(generation, 0, |generation| {
        generation.logprobs.show_top(position, tokens, logprobs)
    })
}

/// As `qwen2_generation_logprobs`, of the prompt's tokens but the first, which has none, if
/// `qwen2_options_set_prompt_logprobs` asked for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_prompt_logprobs(
    generation: *const qwen2_generation,
    n_logprobs: *mut usize,
) -> *const f32 {
    fence::set_optional(n_logprobs, 0);
    fence::read(generation, std::ptr::null(), |generation| {
        show(&generation.prompt_logprobs.chosen, n_logprobs)
    })
}

/// As `qwen2_generation_top_logprobs`, of the prompt; position 0 is its second token.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_prompt_top_logprobs(
    generation: *const qwen2_generation,
    position: usize,
    tokens: *mut *const u32,
    logprobs: *mut *const f32,
) -> usize {
    fence::read(generation, 0, |generation| {
        generation
            .prompt_logprobs
            .show_top(position, tokens, logprobs)
    })
}

/// Natural log-probability of the last piece's token; NaN before the first, and where
/// `qwen2_options_set_logprobs` did not ask for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_stream_logprob(stream: *const qwen2_stream) -> f32 {
    fence::read(stream, f32::NAN, |stream| {
        let found = stream.with_last(|last| last.logprobs.chosen.first().copied());
        found.flatten().unwrap_or(f32::NAN)
    })
}

/// As `qwen2_generation_top_logprobs`, where the last piece's token stands; valid until the next call on
/// this stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_stream_top_logprobs(
    stream: *const qwen2_stream,
    tokens: *mut *const u32,
    logprobs: *mut *const f32,
) -> usize {
    fence::read(stream, 0, |stream| {
        let shown = stream.with_last(|last| last.logprobs.show_top(0, tokens, logprobs));
        shown.unwrap_or(0)
    })
}

/// As `qwen2_stream_logprob`, of a request to an engine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_request_logprob(request: *const qwen2_request) -> f32 {
    fence::read(request, f32::NAN, |request| {
        let found = request.with_last(|last| last.logprobs.chosen.first().copied());
        found.flatten().unwrap_or(f32::NAN)
    })
}

/// As `qwen2_stream_top_logprobs`, of a request to an engine; inside its callback valid during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_request_top_logprobs(
    request: *const qwen2_request,
    tokens: *mut *const u32,
    logprobs: *mut *const f32,
) -> usize {
    fence::read(request, 0, |request| {
        let shown = request.with_last(|last| last.logprobs.show_top(0, tokens, logprobs));
        shown.unwrap_or(0)
    })
}
