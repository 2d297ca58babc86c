//! The only loop: prefill in chunks, then token by token until something ends it.

use std::sync::Arc;
use std::time::{Duration, Instant};

#[cfg(feature = "gpu")]
use super::on_device::{self, Answer};
use super::speculative::{Ahead, DRAFT_TOKENS, Draft, DraftModel, Proposer};
use super::{
    CancelToken, FinishReason, Generation, LogitsProcessor, Network, Piece, Resolved, Sequence,
    Timings,
};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Rows;
use crate::model::cache::Cache;
use crate::text::Tokenizer;

/// The most tokens of a chunk that gives logits of each, which for the published vocabulary are 39 MB.
const MAX_ROWS: usize = 64;

/// What one generation needs of its model.
#[derive(Clone)]
pub(crate) struct Host {
    pub(crate) network: Arc<Network>,
    pub(crate) tokenizer: Tokenizer,
    /// Tokens that one forward of the prefill takes.
    pub(crate) prefill_chunk: usize,
    pub(crate) draft: Option<DraftModel>,
}

/// One generation under way; the cache is lent to it at every step.
pub(crate) struct Run {
    host: Host,
    sequence: Sequence,
    /// Whether the model ran: the first run pays for the prompt.
    started: bool,
    /// What proposes tokens, and how many at a time.
    proposer: Option<(Proposer, usize)>,
    ahead: Ahead,
    prefill: Duration,
    decode: Duration,
    failed: bool,
}

impl Run {
    /// Checks that the prompt fits; computes nothing yet. The cache holds a prefix of `tokens`; `draft`
    /// is what [`Self::take_draft`] gave before, if there was a run before this one.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty prompt or an id outside the vocabulary, or for options of a draft
    /// model where there is none, `ContextOverflow`, `InvalidConstraint`.
    pub(crate) fn new(
        host: Host,
        tokens: Vec<u32>,
        cache: &Cache,
        options: Resolved,
        processor: Option<Box<dyn LogitsProcessor>>,
        draft: Option<Box<Draft>>,
    ) -> Result<Self> {
        let proposer = proposer(&host, &options, draft)?;
        let cached_tokens = host.network.qwen2.keeps(cache, tokens.len());
        let tokenizer = host.tokenizer.clone();
        let context_length = cache.context_length();
        let mut sequence = Sequence::new(tokenizer, context_length, tokens, options, processor)?;
        if !sequence.reads_prompt() {
            sequence.set_cached(cached_tokens);
        }
        Ok(Self {
            host,
            proposer,
            ahead: Ahead::new(sequence.tokens().len(), Vec::new(), Vec::new()),
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
        #[cfg(feature = "gpu")]
        if let Some(token) = self.on_device(cache)? {
            return self.sequence.push(token).map(Some);
        }
        match self.logits(cache) {
            Ok(()) => {}
            // Whatever came of it: the caller asked for an end, not for an error.
            Err(error) if error.kind() == ErrorKind::Cancelled => {
                let reason = self.sequence.interruption();
                let reason = reason.unwrap_or(FinishReason::Cancelled);
                self.sequence.end(reason, None);
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        let Some(row) = self.ahead.row(self.sequence.tokens()) else {
            return Err(Error::new(ErrorKind::Internal, "a forward gave no logits"));
        };
        let piece = self.sequence.accept(row)?;
        let accepted = self.ahead.follow(self.sequence.tokens());
        self.sequence.count_drafts(0, accepted);
        Ok(Some(piece))
    }

    /// The next token, where the device finds it itself, or the likeliest ones, of which it is.
    ///
    /// # Errors
    /// Those of the forward.
    #[cfg(feature = "gpu")]
    fn on_device(&mut self, cache: &mut Cache) -> Result<Option<u32>> {
        let tokens = self.sequence.tokens();
        let is_due = self.proposer.is_none()
            && self.sequence.interruption().is_none()
            && self.ahead.row(tokens).is_none();
        if !is_due {
            return Ok(None);
        }
        let (network, n_tokens) = (&self.host.network, tokens.len());
        self.ahead.settle(cache);
        network.qwen2.ready(cache, n_tokens);
        let (token, logits) = match on_device::next(network, &mut self.sequence, cache)? {
            Answer::None => return Ok(None),
            Answer::Token(token) => (Some(token), Vec::new()),
            // Chosen from as those of any forward.
            Answer::Logits(logits) => (None, logits),
        };
        self.ahead = Ahead::new(n_tokens, Vec::new(), logits);
        Ok(token)
    }

    /// Sees to the logits behind the sequence: they are here, or what the cache has not seen runs, in
    /// chunks, the last one with what is proposed.
    ///
    /// # Errors
    /// `Cancelled`, and those of the forward.
    fn logits(&mut self, cache: &mut Cache) -> Result<()> {
        if self.sequence.interruption().is_some() {
            return Err(Error::new(ErrorKind::Cancelled, "generation was cancelled"));
        }
        if self.ahead.row(self.sequence.tokens()).is_some() {
            return Ok(());
        }
        let tokens = self.sequence.tokens();
        let (qwen2, most) = (&self.host.network.qwen2, self.host.prefill_chunk);
        self.ahead.settle(cache);
        // The last token must run again to give its logits, if the cache has it already.
        cache.truncate(match self.sequence.reads_prompt() {
            true => 0,
            false => tokens.len() - 1,
        });
        qwen2.ready(cache, tokens.len());
        if self.read_prompt(cache)? {
            return Ok(());
        }
        let tokens = self.sequence.tokens();
        while tokens.len() - cache.n_tokens() > most {
            self.forward(&tokens[cache.n_tokens()..][..most], cache, Rows::None)?;
        }
        let proposals = self.propose(cache)?;
        let tokens = self.sequence.tokens();
        let pending = &tokens[cache.n_tokens()..];
        let logits = match proposals.len() {
            0 if self.sequence.screens() => self.forward(pending, cache, Rows::Screened)?,
            0 => self.forward(pending, cache, Rows::Last)?,
            n => self.forward(&[pending, &proposals].concat(), cache, Rows::Tail(n + 1))?,
        };
        let n_tokens = tokens.len();
        self.sequence.count_drafts(proposals.len(), 0);
        self.ahead = Ahead::new(n_tokens, proposals, logits);
        Ok(())
    }

    /// Reads the prompt where the logits of all its tokens are wanted; whether that gave the last ones.
    fn read_prompt(&mut self, cache: &mut Cache) -> Result<bool> {
        let most = self.host.prefill_chunk.min(MAX_ROWS);
        while self.sequence.reads_prompt() {
            let pending = &self.sequence.tokens()[cache.n_tokens()..];
            let chunk = &pending[..pending.len().min(most)];
            let (n, is_last) = (chunk.len(), chunk.len() == pending.len());
            let mut logits = self.forward(chunk, cache, Rows::All)?;
            let vocab_size = logits.len() / n;
            self.sequence.read_prompt(&logits, vocab_size);
            if is_last {
                logits.drain(..logits.len() - vocab_size);
                let n_tokens = self.sequence.tokens().len();
                self.ahead = Ahead::new(n_tokens, Vec::new(), logits);
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn forward(&self, tokens: &[u32], cache: &mut Cache, rows: Rows) -> Result<Vec<f32>> {
        let watch = self.sequence.prefill_watch(cache.n_tokens(), tokens.len());
        let network = &self.host.network;
        network.forward(tokens, cache, rows, &watch)
    }

    /// What may come next. Nothing before the first token, which is not to wait for a draft model, and
    /// nothing that there is no room for.
    fn propose(&mut self, cache: &Cache) -> Result<Vec<u32>> {
        let Some((proposer, most)) = &mut self.proposer else {
            return Ok(Vec::new());
        };
        let tokens = self.sequence.tokens();
        let left = self.sequence.left().saturating_sub(1); // the model adds one itself
        let room = left.min(cache.context_length() - tokens.len());
        let n = room.min(*most);
        let first = self.sequence.usage().completion_tokens == 0;
        let qwen2 = &self.host.network.qwen2;
        if first || n == 0 || !qwen2.are_alike(tokens.len(), tokens.len() + n) {
            return Ok(Vec::new());
        }
        let watch = self.sequence.watch();
        proposer.propose(self.sequence.choice(), n, &watch)
    }

    /// Leaves the cache with what the sequence holds, and no more.
    pub(crate) fn settle(&self, cache: &mut Cache) {
        self.ahead.settle(cache);
        cache.truncate(self.sequence.tokens().len());
    }

    /// The draft model with its cache, for the next run of a conversation.
    pub(crate) fn take_draft(&mut self) -> Option<Box<Draft>> {
        match self.proposer.take() {
            Some((Proposer::Draft(draft), _)) => Some(draft),
            _ => None,
        }
    }

    /// The result; a generation that was not run to its end counts as cancelled.
    pub(crate) fn into_generation(mut self) -> Generation {
        let usage = self.sequence.usage();
        let n_prefill = usage.prompt_tokens - usage.cached_tokens;
        let n_decode = usage.completion_tokens.saturating_sub(1);
        let timings = Timings::new(self.prefill, n_prefill, self.decode, n_decode);
        self.sequence.take_generation(timings)
    }
}

/// What proposes tokens for a generation with these options, and how many at a time.
fn proposer(
    host: &Host,
    options: &Resolved,
    draft: Option<Box<Draft>>,
) -> Result<Option<(Proposer, usize)>> {
    if options.draft_tokens.is_some() && host.draft.is_none() {
        return Err(
            Error::new(ErrorKind::InvalidArgument, "model has no draft model")
                .with_key("draft_tokens")
                .with_help("give it one with with_draft, or use prompt_lookup, which needs none"),
        );
    }
    Ok(match (options.prompt_lookup, &host.draft) {
        (Some(n), _) => Some((Proposer::Lookup, n)),
        (None, Some(model)) => {
            let draft = draft.unwrap_or_else(|| Box::new(Draft::new(model.clone())));
            let n = options.draft_tokens.unwrap_or(DRAFT_TOKENS);
            Some((Proposer::Draft(draft), n))
        }
        (None, None) => None,
    })
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
