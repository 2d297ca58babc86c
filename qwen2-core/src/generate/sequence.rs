//! One request's tokens and text: what becomes of the logits of each step, and where it ends.

use std::time::Instant;

use super::bad_words::BadWords;
use super::logprobs::Recorder;
use super::penalties::Penalties;
use super::speculative::Choice;
use super::tool_grammar::tool_grammar;
use super::{
    CancelToken, FinishReason, Generation, Guide, LogitsProcessor, Logprobs, Piece, Resolved,
    Sampler, StopMatch, StopMatcher, Timings, Usage,
};
use crate::error::{Error, ErrorKind, Result};
use crate::ops::{SCREENED_TOKENS, Watch};
use crate::profile::part;
use crate::text::{TextDecoder, Tokenizer, ToolCall, ToolParser};

/// Everything of a generation but the network and its cache: those give logits, [`Self::accept`] takes
/// them.
pub(crate) struct Sequence {
    tokenizer: Tokenizer,
    options: Resolved,
    penalties: Penalties,
    sampler: Sampler,
    /// Logits of the likeliest while penalties change them, -infinity otherwise and elsewhere.
    #[cfg(feature = "gpu")]
    row: Vec<f32>,
    recorder: Option<Recorder>,
    prompt_recorder: Option<Recorder>,
    stop: StopMatcher,
    decoder: TextDecoder,
    processor: Option<Box<dyn LogitsProcessor>>,
    guide: Option<Guide>,
    cancel: CancelToken,
    deadline: Option<Instant>,
    /// Prompt and new tokens; a cache holds all but those that no forward has seen yet.
    tokens: Vec<u32>,
    usage: Usage,
    /// All that was written, calls of tools included.
    text: String,
    tools: Option<Tools>,
    logprobs: Vec<Logprobs>,
    prompt_logprobs: Vec<Logprobs>,
    max_new_tokens: usize,
    finished: Option<(FinishReason, Option<StopMatch>)>,
}

impl Sequence {
    /// Checks that the prompt fits.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty prompt, `ContextOverflow`, `InvalidConstraint`.
    pub(crate) fn new(
        tokenizer: Tokenizer,
        context_length: usize,
        tokens: Vec<u32>,
        options: Resolved,
        processor: Option<Box<dyn LogitsProcessor>>,
    ) -> Result<Self> {
        let room = check_fit(tokens.len(), context_length, &options)?;
        let usual = options
            .usual_new_tokens
            .map_or(room, |usual| usual.max(options.min_new_tokens).min(room));
        let bad_words = BadWords::new(&options.bad_words, &tokenizer);
        let format = tokenizer.tool_format(options.tool_format);
        let tools = (!options.tools.is_empty())
            .then(|| Tools::new(ToolParser::behind(format, &tokenizer, &tokens)));
        let stops = tools.as_ref().map_or(&[][..], |_| format.stops());
        let stop: Vec<String> = options
            .stop
            .iter()
            .cloned()
            .chain(stops.iter().map(|&s| s.to_owned()))
            .collect();
        let grammar = tool_grammar(&options.tools, &options.tool_choice, format);
        let guide = options.constraint.as_ref().or(grammar.as_ref());
        let guide = guide.map(|constraint| Guide::new(&tokenizer, constraint));
        Ok(Self {
            guide: guide.transpose()?,
            tools,
            stop: StopMatcher::new(&stop),
            tokenizer,
            penalties: Penalties::new(&options, tokens.len(), bad_words),
            recorder: options.logprobs.map(Recorder::new),
            prompt_recorder: options.prompt_logprobs.map(Recorder::new),
            sampler: Sampler::new(&options),
            #[cfg(feature = "gpu")]
            row: Vec::new(),
            decoder: TextDecoder::new(),
            processor,
            cancel: options.cancel.clone().unwrap_or_default(),
            // One that lies beyond what the clock can tell is none.
            deadline: options
                .timeout
                .and_then(|timeout| Instant::now().checked_add(timeout)),
            usage: Usage {
                prompt_tokens: tokens.len(),
                ..Usage::default()
            },
            tokens,
            text: String::new(),
            logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            max_new_tokens: options.max_new_tokens.unwrap_or(usual),
            options,
            finished: None,
        })
    }

    /// Says how many tokens of the prompt a cache held already.
    pub(crate) fn set_cached(&mut self, n_tokens: usize) {
        // At least one token must run to give logits.
        self.usage.cached_tokens = n_tokens.min(self.usage.prompt_tokens - 1);
    }

    pub(crate) fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// What ends it from outside, if anything did.
    pub(crate) fn interruption(&self) -> Option<FinishReason> {
        match self.deadline {
            _ if self.is_cancelled() => Some(FinishReason::Cancelled),
            Some(deadline) if Instant::now() >= deadline => Some(FinishReason::Timeout),
            _ => None,
        }
    }

    /// What ends a forward for it.
    pub(crate) fn watch(&self) -> Watch {
        Watch {
            deadline: self.deadline,
            ..self.cancel.watch()
        }
    }

    /// As [`Self::watch`], for the forward that reads `n` tokens of the prompt behind `n_past`.
    pub(crate) fn prefill_watch(&self, n_past: usize, n: usize) -> Watch {
        let watch = self.watch();
        match &self.options.on_prefill {
            Some(on_prefill) if self.usage.completion_tokens == 0 => {
                on_prefill.over(&watch, &self.cancel, (n_past, n, self.tokens.len()))
            }
            _ => watch,
        }
    }

    /// What will choose the next token.
    pub(crate) fn choice(&mut self) -> Choice<'_> {
        Choice {
            tokens: &self.tokens,
            penalties: &mut self.penalties,
            sampler: &self.sampler,
        }
    }

    /// New tokens that there may still be.
    pub(crate) fn left(&self) -> usize {
        self.max_new_tokens - self.usage.completion_tokens
    }

    /// Counts tokens that were proposed, and those that were chosen.
    pub(crate) fn count_drafts(&mut self, proposed: usize, accepted: usize) {
        self.usage.draft_tokens += proposed;
        self.usage.accepted_tokens += accepted;
    }

    /// Prompt and new tokens so far.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.finished.is_some()
    }

    /// Prompt and new tokens together, at most.
    pub(crate) fn most_tokens(&self) -> usize {
        self.usage.prompt_tokens + self.max_new_tokens
    }

    /// Whether the choice of a token depends on few of the highest logits, of which penalties and bans may
    /// lower some. Twice as many are exact, so that a repetition penalty finds others to go on with.
    pub(crate) fn screens(&self) -> bool {
        let lowers = self.penalties.lowers().unwrap_or(usize::MAX);
        self.processor.is_none()
            && self.guide.is_none()
            && self.recorder.is_none()
            && self.sampler.looks_at().saturating_add(lowers) <= SCREENED_TOKENS / 2
    }

    /// Whether the next token is most likely one of few with the highest logits, and nobody looks at the others.
    #[cfg(feature = "gpu")]
    pub(crate) fn takes_likeliest(&self) -> bool {
        self.processor.is_none()
            && self.guide.is_none()
            && self.recorder.is_none()
            && !self.reads_prompt()
            && self.sampler.looks_at() <= SCREENED_TOKENS
            && self.penalties.only_lowers()
    }

    /// Whether, of those that take the likeliest, the very one with the highest logit is the next.
    #[cfg(feature = "gpu")]
    pub(crate) fn takes_best(&self) -> bool {
        self.options.is_greedy() && self.penalties.is_idle(self.usage.completion_tokens)
    }

    /// The next token by the likeliest, which are in the order of their ids, with every other logit lower: the one
    /// that [`Self::accept`] would choose by all. Nothing, and nothing has happened, where these do not tell.
    #[cfg(feature = "gpu")]
    pub(crate) fn choose_among(&mut self, mut likeliest: Vec<(u32, f32)>) -> Option<u32> {
        let floor = likeliest
            .iter()
            .fold(f32::INFINITY, |least, (_, x)| least.min(*x));
        let width = likeliest.last()?.0 as usize + 1;
        if self.row.len() < width {
            self.row.resize(width, f32::NEG_INFINITY);
        }
        for (token, logit) in &likeliest {
            self.row[*token as usize] = *logit;
        }
        // What is impossible stays so.
        self.penalties.apply(&mut self.row, &self.tokens);
        for (token, logit) in &mut likeliest {
            *logit = std::mem::replace(&mut self.row[*token as usize], f32::NEG_INFINITY);
        }
        self.sampler.pick_among(&likeliest, floor)
    }

    /// Whether it wants the logits of the prompt's tokens as well, from the first on: none of them may be
    /// taken from a cache then, and they go to [`Self::read_prompt`].
    pub(crate) fn reads_prompt(&self) -> bool {
        self.prompt_recorder.is_some() && self.prompt_logprobs.len() + 1 < self.usage.prompt_tokens
    }

    /// Takes the rows of logits of the next tokens of the prompt.
    pub(crate) fn read_prompt(&mut self, logits: &[f32], vocab_size: usize) {
        let Some(recorder) = &mut self.prompt_recorder else {
            return;
        };
        let next = self.prompt_logprobs.len() + 1;
        let foretold = self.tokens[..self.usage.prompt_tokens]
            .get(next..)
            .unwrap_or_default();
        let rows = logits.chunks_exact(vocab_size).zip(foretold);
        self.prompt_logprobs
            .extend(rows.map(|(row, &token)| recorder.of(row, token)));
    }

    /// The next token and its text where the constraint leaves no choice: the model need not run, and
    /// sees it with those behind it at its next run. Whoever asks for none gets it from
    /// [`accept`](Self::accept), as it comes where log-probabilities are wanted.
    ///
    /// # Errors
    /// `InvalidConstraint` when following it exceeds the bounds.
    pub(crate) fn forced(&mut self) -> Option<Result<Piece>> {
        if self.is_finished() || self.is_cancelled() || self.recorder.is_some() {
            return None;
        }
        let token = self.guide.as_ref()?.forced()?;
        Some(self.push(token))
    }

    /// Chooses a token by the logits of the last one, which are changed in place.
    ///
    /// # Errors
    /// Those of the logits processor, `InvalidArgument` where the options leave no token, `DeviceFailed`
    /// for logits that are no numbers, `InvalidConstraint` when other settings leave nothing that the
    /// constraint allows.
    pub(crate) fn accept(&mut self, logits: &mut [f32]) -> Result<Piece> {
        if let Some(recorder) = &mut self.recorder {
            recorder.keep(logits);
        }
        let token = self.choose(logits)?;
        self.push(token)
    }

    /// Takes a token that was chosen elsewhere.
    ///
    /// # Errors
    /// `InvalidConstraint` as [`Self::accept`].
    pub(crate) fn push(&mut self, token: u32) -> Result<Piece> {
        self.tokens.push(token);
        self.usage.completion_tokens += 1;
        let end = self.end_token(token);
        if end.is_none()
            && let Some(guide) = &mut self.guide
        {
            guide.accept(token)?;
        }
        let recorder = self.recorder.as_mut();
        let logprobs = recorder.map(|recorder| recorder.chosen(token));
        self.logprobs.extend(logprobs.clone());
        let n_calls = self.tool_calls().len();
        Ok(Piece {
            text: self.emit(token, end),
            token,
            logprobs,
            tool_calls: self.tool_calls()[n_calls..].to_vec(),
        })
    }

    /// What `token` ends the generation as, if it does.
    fn end_token(&self, token: u32) -> Option<StopMatch> {
        if self.options.eos_token_ids.contains(&token) {
            return Some(StopMatch::Eos(token));
        }
        let stops = self.options.stop_token_ids.contains(&token);
        stops.then_some(StopMatch::Token(token))
    }

    fn choose(&mut self, logits: &mut [f32]) -> Result<u32> {
        part("penalties", || self.penalties.apply(logits, &self.tokens));
        if let Some(processor) = &mut self.processor {
            processor.process(&self.tokens, logits)?;
        }
        if let Some(guide) = &self.guide {
            let options = &self.options;
            let ends = [&options.eos_token_ids[..], &options.stop_token_ids].concat();
            guide.mask(logits, &ends)?;
        }
        let picked = part("sample", || self.sampler.pick(logits));
        let forbids = self.processor.is_some() || self.penalties.bans();
        match picked {
            Err(_) if forbids && logits.iter().all(|logit| *logit == f32::NEG_INFINITY) => {
                Err(Error::new(ErrorKind::InvalidArgument, "no token is left")
                    .with_key("bad_words")
                    .with_why("the options and the logits processor forbid every token")
                    .with_help("forbid less"))
            }
            picked => picked,
        }
    }

    /// Text that became whole with `token`; ends the generation where it must.
    fn emit(&mut self, token: u32, end: Option<StopMatch>) -> String {
        let mut out = String::new();
        if end.is_none() && !self.tokenizer.is_special(token) {
            let bytes = self.tokenizer.token_bytes(token).unwrap_or_default();
            let (text, found) = self.stop.push(&self.decoder.push(bytes));
            out = text;
            if found.is_some() {
                self.finished = Some((FinishReason::Stop, found));
            }
        }
        if self.finished.is_some() {
            return self.reveal(&out, true);
        }
        out = self.reveal(&out, false);
        let complete = self.guide.as_ref().is_some_and(Guide::is_complete);
        let end = end.or(complete.then_some(StopMatch::Constraint));
        if end.is_some() {
            out.push_str(&self.end(FinishReason::Stop, end));
        } else if self.usage.completion_tokens == self.max_new_tokens {
            out.push_str(&self.end(FinishReason::Length, None));
        }
        out
    }

    /// Ends the generation and returns the text that was held back.
    pub(crate) fn end(&mut self, reason: FinishReason, stop_match: Option<StopMatch>) -> String {
        let (mut rest, found) = self.stop.push(&self.decoder.finish());
        if found.is_none() {
            rest.push_str(&self.stop.finish());
        }
        let rest = self.reveal(&rest, true);
        self.finished = Some(match found {
            Some(_) => (FinishReason::Stop, found),
            None => (reason, stop_match),
        });
        rest
    }

    /// Takes text that is certain and returns what of it is for the reader.
    fn reveal(&mut self, text: &str, over: bool) -> String {
        self.text.push_str(text);
        match &mut self.tools {
            Some(tools) => tools.take(text, over),
            None => text.to_owned(),
        }
    }

    fn tool_calls(&self) -> &[ToolCall] {
        self.tools.as_ref().map_or(&[], |tools| &tools.calls)
    }

    /// The result, which is no longer here then; a generation that was not run to its end counts as cancelled.
    pub(crate) fn take_generation(&mut self, timings: Timings) -> Generation {
        if self.finished.is_none() {
            self.end(FinishReason::Cancelled, None);
        }
        let finished = self.finished.clone();
        let (finish_reason, stop_match) = finished.unwrap_or((FinishReason::Cancelled, None));
        let (text, tool_calls) = match self.tools.take() {
            Some(tools) => (tools.text, tools.calls),
            None => (std::mem::take(&mut self.text), Vec::new()),
        };
        let asks = finish_reason == FinishReason::Stop && !tool_calls.is_empty();
        let (finish_reason, stop_match) = match asks {
            true => (FinishReason::ToolCalls, None),
            false => (finish_reason, stop_match),
        };
        Generation {
            text,
            tool_calls,
            tokens: self.tokens[self.usage.prompt_tokens..].to_vec(),
            finish_reason,
            stop_match,
            usage: self.usage,
            timings,
            seed: (!self.options.is_greedy()).then_some(self.options.seed),
            logprobs: std::mem::take(&mut self.logprobs),
            prompt_logprobs: std::mem::take(&mut self.prompt_logprobs),
        }
    }
}

/// The text of an answer that may call tools, taken apart.
struct Tools {
    parser: ToolParser,
    text: String,
    calls: Vec<ToolCall>,
}

impl Tools {
    fn new(parser: ToolParser) -> Self {
        Self {
            parser,
            text: String::new(),
            calls: Vec::new(),
        }
    }

    fn take(&mut self, text: &str, over: bool) -> String {
        let mut parsed = self.parser.push(text);
        if over {
            let rest = self.parser.finish();
            parsed.text.push_str(&rest.text);
            parsed.calls.extend(rest.calls);
        }
        self.text.push_str(&parsed.text);
        self.calls.extend(parsed.calls);
        parsed.text
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
    let least = options.min_new_tokens.max(1);
    let wanted = options.max_new_tokens.unwrap_or(least);
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
