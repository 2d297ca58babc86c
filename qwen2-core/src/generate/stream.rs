//! The only loop: prefill in chunks, then token by token until something ends it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{
    CancelToken, FinishReason, Generation, LogitsProcessor, Network, Piece, Resolved, Sequence,
    Timings,
};
use crate::error::Result;
use crate::model::Rows;
use crate::model::cache::Cache;
use crate::text::Tokenizer;

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
    sequence: Sequence,
    /// Whether the model ran: the first run pays for the prompt.
    started: bool,
    prefill: Duration,
    decode: Duration,
    failed: bool,
}

impl Run {
    /// Checks that the prompt fits; computes nothing yet. The cache holds a prefix of `tokens`.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty prompt or an id outside the vocabulary, `ContextOverflow`,
    /// `InvalidConstraint`.
    pub(crate) fn new(
        host: Host,
        tokens: Vec<u32>,
        cache: &Cache,
        options: Resolved,
        processor: Option<Box<dyn LogitsProcessor>>,
    ) -> Result<Self> {
        let cached_tokens = host.network.qwen2.keeps(cache, tokens.len());
        let tokenizer = host.tokenizer.clone();
        let context_length = cache.context_length();
        let mut sequence = Sequence::new(tokenizer, context_length, tokens, options, processor)?;
        sequence.set_cached(cached_tokens);
        Ok(Self {
            host,
            sequence,
            started: false,
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
            failed: false,
        })
    }

    pub(crate) fn cancel_token(&self) -> CancelToken {
        self.sequence.cancel_token()
    }

    /// Prompt and new tokens so far.
    pub(crate) fn tokens(&self) -> &[u32] {
        self.sequence.tokens()
    }

    pub(crate) fn text(&self) -> &str {
        self.sequence.text()
    }

    /// The next token, or `None` when the generation has ended; after an error it has ended.
    pub(crate) fn next(&mut self, cache: &mut Cache) -> Option<Result<Piece>> {
        if self.sequence.is_finished() || self.failed {
            return None;
        }
        let start = Instant::now();
        let first = !self.started;
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
        if let Some(piece) = self.sequence.forced() {
            return piece.map(Some);
        }
        self.started = true;
        let Some(mut logits) = self.forward(cache)? else {
            self.sequence.end(FinishReason::Cancelled, None);
            return Ok(None);
        };
        self.sequence.accept(&mut logits).map(Some)
    }

    /// Runs what the cache has not seen, in chunks; `None` if the generation was cancelled.
    fn forward(&mut self, cache: &mut Cache) -> Result<Option<Vec<f32>>> {
        let tokens = self.sequence.tokens();
        // The last token must run again to give its logits, if the cache has it already.
        cache.truncate(tokens.len() - 1);
        self.host.network.qwen2.ready(cache, tokens.len());
        loop {
            if self.sequence.is_cancelled() {
                return Ok(None);
            }
            let pending = &tokens[cache.n_tokens()..];
            let chunk = &pending[..pending.len().min(self.host.prefill_chunk)];
            let rows = match chunk.len() == pending.len() {
                false => Rows::None,
                true if self.sequence.screens() => Rows::Screened,
                true => Rows::Last,
            };
            let logits = self.host.network.forward(chunk, cache, rows)?;
            if rows != Rows::None {
                return Ok(Some(logits));
            }
        }
    }

    /// The result; a generation that was not run to its end counts as cancelled.
    pub(crate) fn into_generation(self) -> Generation {
        let usage = self.sequence.usage();
        let n_prefill = usage.prompt_tokens - usage.cached_tokens;
        let n_decode = usage.completion_tokens.saturating_sub(1);
        let timings = Timings::new(self.prefill, n_prefill, self.decode, n_decode);
        self.sequence.into_generation(timings)
    }
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
            .field("tokens", &self.run.tokens().len())
            .field("finished", &self.run.sequence.is_finished())
            .finish_non_exhaustive()
    }
}
