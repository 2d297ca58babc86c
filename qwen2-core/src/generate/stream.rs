//! The only loop: prefill in chunks, then token by token until something ends it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{
    CancelToken, FinishReason, Generation, LogitsProcessor, Network, Piece, Resolved, Sampler,
    StopMatch, StopMatcher, Timings, Usage,
};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Rows;
use crate::model::cache::Cache;
use crate::ops::SCREENED_TOKENS;
use crate::profile::part;
use crate::text::{TextDecoder, Tokenizer};

/// What one generation needs of its model.
#[derive(Clone)]
pub(crate) struct Host {
    pub(crate) network: Arc<Network>,
    pub(crate) tokenizer: Tokenizer,
    /// Tokens that one forward of the prefill takes.
    pub(crate) prefill_chunk: usize,
}

/// One generation under way; the cache is lent to it at every step.
pub(crate) struct Run {
    host: Host,
    options: Resolved,
    sampler: Sampler,
    stop: StopMatcher,
    decoder: TextDecoder,
    processor: Option<Box<dyn LogitsProcessor>>,
    cancel: CancelToken,
    /// Prompt and new tokens; the cache holds all but those that no forward has seen yet.
    tokens: Vec<u32>,
    usage: Usage,
    text: String,
    prefill: Duration,
    decode: Duration,
    max_new_tokens: usize,
    finished: Option<(FinishReason, Option<StopMatch>)>,
    failed: bool,
}

impl Run {
    /// Checks that the prompt fits; computes nothing yet. The cache holds a prefix of `tokens`.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty prompt or an id outside the vocabulary, `ContextOverflow`.
    pub(crate) fn new(
        host: Host,
        tokens: Vec<u32>,
        cache: &Cache,
        options: Resolved,
        processor: Option<Box<dyn LogitsProcessor>>,
    ) -> Result<Self> {
        let room = check_fit(tokens.len(), cache.context_length(), &options)?;
        let cached_tokens = host.network.qwen2.keeps(cache, tokens.len());
        Ok(Self {
            sampler: Sampler::new(&options),
            stop: StopMatcher::new(&options.stop),
            decoder: TextDecoder::new(),
            cancel: options.cancel.clone().unwrap_or_default(),
            usage: Usage {
                prompt_tokens: tokens.len(),
                // At least one token must run to give logits.
                cached_tokens: cached_tokens.min(tokens.len() - 1),
                completion_tokens: 0,
            },
            host,
            processor,
            tokens,
            text: String::new(),
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
            max_new_tokens: options.max_new_tokens.unwrap_or_else(|| {
                options
                    .usual_new_tokens
                    .map_or(room, |usual| usual.min(room))
            }),
            options,
            finished: None,
            failed: false,
        })
    }

    pub(crate) fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// Prompt and new tokens so far.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.finished.is_some()
    }

    /// The next token, or `None` when the generation has ended; after an error it has ended.
    pub(crate) fn next(&mut self, cache: &mut Cache) -> Option<Result<Piece>> {
        if self.finished.is_some() || self.failed {
            return None;
        }
        let start = Instant::now();
        let first = self.usage.completion_tokens == 0;
        let piece = self.step(cache);
        if first {
            self.prefill += start.elapsed();
        } else {
            self.decode += start.elapsed();
        }
        self.failed = piece.is_err();
        piece.transpose()
    }

    fn step(&mut self, cache: &mut Cache) -> Result<Option<Piece>> {
        let Some(mut logits) = self.forward(cache)? else {
            self.end(FinishReason::Cancelled, None);
            return Ok(None);
        };
        if let Some(processor) = &mut self.processor {
            processor.process(&self.tokens, &mut logits)?;
        }
        let token = part("sample", || self.sampler.pick(&mut logits, &self.tokens))?;
        self.tokens.push(token);
        self.usage.completion_tokens += 1;
        Ok(Some(Piece {
            text: self.emit(token),
            token,
        }))
    }

    /// Runs what the cache has not seen, in chunks; `None` if the generation was cancelled.
    fn forward(&mut self, cache: &mut Cache) -> Result<Option<Vec<f32>>> {
        // The last token must run again to give its logits, if the cache has it already.
        cache.truncate(self.tokens.len() - 1);
        self.host.network.qwen2.ready(cache, self.tokens.len());
        loop {
            if self.cancel.is_cancelled() {
                return Ok(None);
            }
            let pending = &self.tokens[cache.n_tokens()..];
            let chunk = &pending[..pending.len().min(self.host.prefill_chunk)];
            let rows = match chunk.len() == pending.len() {
                false => Rows::None,
                true if self.screens() => Rows::Screened,
                true => Rows::Last,
            };
            let logits = self.host.network.forward(chunk, cache, rows)?;
            if rows != Rows::None {
                return Ok(Some(logits));
            }
        }
    }

    /// Whether the choice of a token depends on few of the highest logits. Twice as many are exact, so
    /// that a repetition penalty finds others to go on with.
    fn screens(&self) -> bool {
        self.processor.is_none() && self.sampler.looks_at() <= SCREENED_TOKENS / 2
    }

    /// Text that became whole with `token`; ends the generation where it must.
    fn emit(&mut self, token: u32) -> String {
        let ends = if self.options.eos_token_ids.contains(&token) {
            Some(StopMatch::Eos(token))
        } else {
            self.options
                .stop_token_ids
                .contains(&token)
                .then_some(StopMatch::Token(token))
        };
        let mut out = String::new();
        if ends.is_none() && !self.host.tokenizer.is_special(token) {
            let bytes = self.host.tokenizer.token_bytes(token).unwrap_or_default();
            let (text, found) = self.stop.push(&self.decoder.push(bytes));
            out = text;
            if found.is_some() {
                self.finished = Some((FinishReason::Stop, found));
            }
        }
        self.text.push_str(&out);
        if ends.is_some() {
            out.push_str(&self.end(FinishReason::Stop, ends));
        } else if self.finished.is_none() && self.usage.completion_tokens == self.max_new_tokens {
            out.push_str(&self.end(FinishReason::Length, None));
        }
        out
    }

    /// Ends the generation and returns the text that was held back.
    fn end(&mut self, reason: FinishReason, stop_match: Option<StopMatch>) -> String {
        let (mut rest, found) = self.stop.push(&self.decoder.finish());
        if found.is_none() {
            rest.push_str(&self.stop.finish());
        }
        self.text.push_str(&rest);
        self.finished = Some(match found {
            Some(_) => (FinishReason::Stop, found),
            None => (reason, stop_match),
        });
        rest
    }

    /// The result; a generation that was not run to its end counts as cancelled.
    pub(crate) fn into_generation(mut self) -> Generation {
        if self.finished.is_none() {
            self.end(FinishReason::Cancelled, None);
        }
        let (finish_reason, stop_match) = self.finished.unwrap_or((FinishReason::Cancelled, None));
        let n_prefill = self.usage.prompt_tokens - self.usage.cached_tokens;
        let n_decode = self.usage.completion_tokens.saturating_sub(1);
        Generation {
            text: self.text,
            tokens: self.tokens.split_off(self.usage.prompt_tokens),
            finish_reason,
            stop_match,
            usage: self.usage,
            timings: Timings::new(self.prefill, n_prefill, self.decode, n_decode),
            seed: (!self.options.is_greedy()).then_some(self.options.seed),
        }
    }
}

/// Room for new tokens behind `n_prompt` tokens.
fn check_fit(n_prompt: usize, context_length: usize, options: &Resolved) -> Result<usize> {
    if n_prompt == 0 {
        return Err(Error::new(ErrorKind::InvalidArgument, "prompt is empty")
            .with_key("prompt")
            .with_help("give at least one token; a chat prompt has some by its template"));
    }
    let room = context_length.saturating_sub(n_prompt);
    let wanted = options.max_new_tokens.unwrap_or(1);
    if n_prompt > context_length || wanted > room {
        return Err(Error::new(
            ErrorKind::ContextOverflow,
            "prompt and new tokens exceed the context",
        )
        .with_key("max_new_tokens")
        .with_why(format!(
            "{n_prompt} prompt tokens and {wanted} new ones, the context holds {context_length}"
        ))
        .with_help(
            "shorten the prompt, lower max_new_tokens, or load with a longer context_length",
        ));
    }
    Ok(room)
}

/// A generation that runs as it is read: an iterator of [`Piece`]s; dropping it stops it.
pub struct TokenStream {
    run: Run,
    cache: Cache,
}

impl TokenStream {
    pub(crate) fn new(run: Run, cache: Cache) -> Self {
        Self { run, cache }
    }

    /// Stops the generation from any thread; it then ends with `FinishReason::Cancelled`.
    pub fn cancel_token(&self) -> CancelToken {
        self.run.cancel_token()
    }

    /// Runs to the end and returns the whole result.
    ///
    /// # Errors
    /// The error that ended the generation.
    pub fn finish(mut self) -> Result<Generation> {
        while let Some(piece) = self.run.next(&mut self.cache) {
            piece?;
        }
        Ok(self.run.into_generation())
    }

    /// The result so far, without running on; a generation under way counts as cancelled.
    pub fn into_generation(self) -> Generation {
        self.run.into_generation()
    }
}

impl Iterator for TokenStream {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        self.run.next(&mut self.cache)
    }
}

impl std::fmt::Debug for TokenStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenStream")
            .field("tokens", &self.run.tokens.len())
            .field("finished", &self.run.is_finished())
            .finish_non_exhaustive()
    }
}
