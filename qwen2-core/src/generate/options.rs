//! What a caller may set for a generation, and what then holds.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::TryRng;
use rand::rngs::SysRng;
use serde::{Deserialize, Serialize};

use super::Constraint;
use super::bad_words::{self, BadWord};
use super::prefill::{OnPrefill, PrefillProgress};
use crate::error::{Error, ErrorKind, Result};
use crate::ops::Watch;
use crate::text::{Tool, ToolChoice, ToolFormat};

const MAX_TEMPERATURE: f32 = 100.0;
const MAX_TOOLS: usize = 128;
const MAX_STOP_STRINGS: usize = 64;
const MAX_STOP_LEN: usize = 4096;
const MAX_DRAFT_TOKENS: usize = 64;
const MAX_LOGPROBS: usize = 1024;

/// Settings of one generation.
///
/// An unset field takes the value of the checkpoint's `generation_config.json`, then the default
/// named at the field. All work in the order of transformers: `logit_bias`, `repetition_penalty`,
/// `presence_penalty` and `frequency_penalty`, `bad_words`, `min_new_tokens`, then a
/// [`LogitsProcessor`](crate::LogitsProcessor), then, unless greedy, `temperature`, `top_k`, `top_p`,
/// `min_p`, `typical_p`.
///
/// A checkpoint whose `generation_config.json` does not say `do_sample: true` is greedy unless
/// `temperature` is set here.
///
/// ```
/// use qwen2_core::GenerateOptions;
///
/// let options = GenerateOptions::new().max_new_tokens(64).temperature(0.7).seed(1);
/// assert_eq!(options.max_new_tokens, Some(64));
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateOptions {
    /// Most tokens to produce, at least 1. Default: to the end of the context.
    pub max_new_tokens: Option<usize>,
    /// Divides the logits, 0 to 100; 0 takes the likeliest token every time. Default: 1.
    pub temperature: Option<f32>,
    /// Keeps the k likeliest tokens and those tied with the last of them, at least 1. A value of
    /// the vocabulary's size or above keeps all. Default: all.
    pub top_k: Option<usize>,
    /// Keeps the likeliest tokens that together have this probability, above 0 to 1. Default: 1,
    /// which keeps all.
    pub top_p: Option<f32>,
    /// Drops tokens less likely than this share of the likeliest one, 0 to 1. Default: 0.
    pub min_p: Option<f32>,
    /// Keeps the tokens whose information content is nearest to the expected one, until together they
    /// have this probability (arXiv:2202.00666); above 0 to 1. Default: 1, which keeps all.
    pub typical_p: Option<f32>,
    /// Makes tokens of the prompt and of the output less likely (above 1) or likelier (below 1);
    /// finite and above 0. Default: 1.
    pub repetition_penalty: Option<f32>,
    /// Taken from the logit of every token that is in the output, -2 to 2. Default: 0.
    pub presence_penalty: Option<f32>,
    /// Taken from the logit of a token for each time that it is in the output, -2 to 2. Default: 0.
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of these tokens, -100 to 100.
    pub logit_bias: BTreeMap<u32, f32>,
    /// What is never produced: at most 1024 texts or sequences of tokens, of at most 256 bytes or tokens.
    pub bad_words: Vec<BadWord>,
    /// As many tokens come at least before an end token or one of `stop_token_ids`, which are
    /// impossible until then; a string of `stop` still ends the generation. Default: 0.
    pub min_new_tokens: Option<usize>,
    /// Says of each token how likely it was, and of as many of the likeliest ones, 0 to 1024: see
    /// [`Logprobs`](crate::Logprobs). Default: does not.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt; a session then reads all of it anew. Default: does not.
    pub prompt_logprobs: Option<usize>,
    /// Same seed, same logits, same tokens. Default: from the operating system.
    pub seed: Option<u64>,
    /// Strings that end the generation and are not part of its text: at most 64 of at most 4096
    /// bytes. The one that completes first wins.
    pub stop: Vec<String>,
    /// Tokens that end the generation, besides the checkpoint's own.
    pub stop_token_ids: Vec<u32>,
    /// Goes on after the checkpoint's end tokens; `stop` and `stop_token_ids` still end it.
    pub ignore_eos: bool,
    /// What the text must look like. Default: anything.
    pub constraint: Option<Constraint>,
    /// What the model may ask its caller to run, at most 128, for a prompt of messages. The calls are
    /// in [`Generation::tool_calls`](crate::Generation::tool_calls), not in the text.
    pub tools: Vec<Tool>,
    /// Whether the model calls them. Default: as it decides.
    pub tool_choice: ToolChoice,
    /// How calls are written. Default: Hermes' form where the checkpoint's chat template knows tools,
    /// else Qwen-Agent's.
    pub tool_format: Option<ToolFormat>,
    /// Proposes this many tokens at a time, 1 to 64, by looking up what followed the last ones where
    /// they stood before, in place of a draft model: several are checked in one step of the model.
    /// The tokens stay the same; answers that repeat their prompt (code, summaries) come faster,
    /// others a little slower. Default: off.
    pub prompt_lookup: Option<usize>,
    /// How many tokens the draft model of [`Model::with_draft`](crate::Model::with_draft) proposes
    /// at a time, 1 to 64. Default: 4; only for a model that has one.
    pub draft_tokens: Option<usize>,
    /// Most seconds that the generation takes, from the call that starts it, above 0; it then ends
    /// with [`FinishReason::Timeout`](crate::FinishReason::Timeout) and keeps its text. Default: no
    /// limit.
    pub timeout: Option<f64>,
    /// Called while the prompt is read.
    #[serde(skip)]
    pub on_prefill: Option<OnPrefill>,
    /// Ends the generation from another thread.
    #[serde(skip)]
    pub cancel: Option<CancelToken>,
}

impl GenerateOptions {
    /// Everything as the checkpoint says.
    pub fn new() -> Self {
        Self::default()
    }

    /// The likeliest token every time, without a penalty: the same text on every run.
    pub fn greedy() -> Self {
        Self::new().temperature(0.0).repetition_penalty(1.0)
    }

    /// Sets [`max_new_tokens`](Self#structfield.max_new_tokens).
    #[must_use]
    pub fn max_new_tokens(mut self, max_new_tokens: usize) -> Self {
        self.max_new_tokens = Some(max_new_tokens);
        self
    }

    /// Sets [`temperature`](Self#structfield.temperature).
    #[must_use]
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.temperature = Some(temperature);
        self
    }

    /// Sets [`top_k`](Self#structfield.top_k).
    #[must_use]
    pub fn top_k(mut self, top_k: usize) -> Self {
        self.top_k = Some(top_k);
        self
    }

    /// Sets [`top_p`](Self#structfield.top_p).
    #[must_use]
    pub fn top_p(mut self, top_p: f32) -> Self {
        self.top_p = Some(top_p);
        self
    }

    /// Sets [`min_p`](Self#structfield.min_p).
    #[must_use]
    pub fn min_p(mut self, min_p: f32) -> Self {
        self.min_p = Some(min_p);
        self
    }

    /// Sets [`repetition_penalty`](Self#structfield.repetition_penalty).
    #[must_use]
    pub fn repetition_penalty(mut self, repetition_penalty: f32) -> Self {
        self.repetition_penalty = Some(repetition_penalty);
        self
    }

    /// Sets [`typical_p`](Self#structfield.typical_p).
    #[must_use]
    pub fn typical_p(mut self, typical_p: f32) -> Self {
        self.typical_p = Some(typical_p);
        self
    }

    /// Sets [`presence_penalty`](Self#structfield.presence_penalty).
    #[must_use]
    pub fn presence_penalty(mut self, presence_penalty: f32) -> Self {
        self.presence_penalty = Some(presence_penalty);
        self
    }

    /// Sets [`frequency_penalty`](Self#structfield.frequency_penalty).
    #[must_use]
    pub fn frequency_penalty(mut self, frequency_penalty: f32) -> Self {
        self.frequency_penalty = Some(frequency_penalty);
        self
    }

    /// Sets [`min_new_tokens`](Self#structfield.min_new_tokens).
    #[must_use]
    pub fn min_new_tokens(mut self, min_new_tokens: usize) -> Self {
        self.min_new_tokens = Some(min_new_tokens);
        self
    }

    /// Sets [`logprobs`](Self#structfield.logprobs).
    #[must_use]
    pub fn logprobs(mut self, logprobs: usize) -> Self {
        self.logprobs = Some(logprobs);
        self
    }

    /// Sets [`prompt_logprobs`](Self#structfield.prompt_logprobs).
    #[must_use]
    pub fn prompt_logprobs(mut self, prompt_logprobs: usize) -> Self {
        self.prompt_logprobs = Some(prompt_logprobs);
        self
    }

    /// Sets [`logit_bias`](Self#structfield.logit_bias), replacing what was there.
    #[must_use]
    pub fn logit_bias(mut self, logit_bias: impl IntoIterator<Item = (u32, f32)>) -> Self {
        self.logit_bias = logit_bias.into_iter().collect();
        self
    }

    /// Sets [`bad_words`](Self#structfield.bad_words), replacing what was there.
    #[must_use]
    pub fn bad_words(mut self, bad_words: impl IntoIterator<Item = impl Into<BadWord>>) -> Self {
        self.bad_words = bad_words.into_iter().map(Into::into).collect();
        self
    }

    /// Sets [`seed`](Self#structfield.seed).
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Sets [`stop`](Self#structfield.stop), replacing what was there.
    #[must_use]
    pub fn stop(mut self, stop: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.stop = stop.into_iter().map(Into::into).collect();
        self
    }

    /// Sets [`stop_token_ids`](Self#structfield.stop_token_ids), replacing what was there.
    #[must_use]
    pub fn stop_token_ids(mut self, stop_token_ids: impl IntoIterator<Item = u32>) -> Self {
        self.stop_token_ids = stop_token_ids.into_iter().collect();
        self
    }

    /// Sets [`ignore_eos`](Self#structfield.ignore_eos).
    #[must_use]
    pub fn ignore_eos(mut self, ignore_eos: bool) -> Self {
        self.ignore_eos = ignore_eos;
        self
    }

    /// Sets [`constraint`](Self#structfield.constraint).
    #[must_use]
    pub fn constraint(mut self, constraint: Constraint) -> Self {
        self.constraint = Some(constraint);
        self
    }

    /// Sets [`tools`](Self#structfield.tools), replacing what was there.
    #[must_use]
    pub fn tools(mut self, tools: impl IntoIterator<Item = Tool>) -> Self {
        self.tools = tools.into_iter().collect();
        self
    }

    /// Sets [`tool_choice`](Self#structfield.tool_choice).
    #[must_use]
    pub fn tool_choice(mut self, tool_choice: ToolChoice) -> Self {
        self.tool_choice = tool_choice;
        self
    }

    /// Sets [`tool_format`](Self#structfield.tool_format).
    #[must_use]
    pub fn tool_format(mut self, tool_format: ToolFormat) -> Self {
        self.tool_format = Some(tool_format);
        self
    }

    /// Sets [`prompt_lookup`](Self#structfield.prompt_lookup).
    #[must_use]
    pub fn prompt_lookup(mut self, n_tokens: usize) -> Self {
        self.prompt_lookup = Some(n_tokens);
        self
    }

    /// Sets [`draft_tokens`](Self#structfield.draft_tokens).
    #[must_use]
    pub fn draft_tokens(mut self, n_tokens: usize) -> Self {
        self.draft_tokens = Some(n_tokens);
        self
    }

    /// Sets [`timeout`](Self#structfield.timeout).
    #[must_use]
    pub fn timeout(mut self, seconds: f64) -> Self {
        self.timeout = Some(seconds);
        self
    }

    /// Sets [`on_prefill`](Self#structfield.on_prefill).
    #[must_use]
    pub fn on_prefill(
        mut self,
        callback: impl Fn(PrefillProgress) -> ControlFlow<()> + Send + Sync + 'static,
    ) -> Self {
        self.on_prefill = Some(OnPrefill::new(callback));
        self
    }

    /// Sets [`cancel`](Self#structfield.cancel).
    #[must_use]
    pub fn cancel(mut self, cancel: CancelToken) -> Self {
        self.cancel = Some(cancel);
        self
    }

    /// What holds for one generation: these settings, then the checkpoint's, then the defaults.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field that is out of its range, the checkpoint's included.
    pub(crate) fn resolve(&self, defaults: &SamplingDefaults) -> Result<Resolved> {
        let greedy = self.temperature.is_none() && defaults.do_sample != Some(true);
        let temperature = self.temperature.or(defaults.temperature).unwrap_or(1.0);
        let temperature = if greedy { 0.0 } else { temperature };
        // transformers writes 0 for "off" into generation_config.json.
        let checkpoint_top_k = defaults.top_k.filter(|&top_k| top_k > 0);
        let resolved = Resolved {
            max_new_tokens: self.max_new_tokens,
            usual_new_tokens: defaults.max_new_tokens,
            temperature,
            top_k: self.top_k.or(checkpoint_top_k),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(1.0),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(0.0),
            repetition_penalty: self
                .repetition_penalty
                .or(defaults.repetition_penalty)
                .unwrap_or(1.0),
            typical_p: self.typical_p.unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias: self.logit_bias.clone(),
            bad_words: self.bad_words.clone(),
            min_new_tokens: self.min_new_tokens.unwrap_or(0),
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            // Greedy leaves nothing to chance, so there is no need to ask the system.
            seed: match (self.seed, greedy || temperature == 0.0) {
                (Some(seed), _) => seed,
                (None, true) => 0,
                (None, false) => entropy()?,
            },
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            eos_token_ids: match self.ignore_eos {
                true => Vec::new(),
                false => defaults.eos_token_ids.clone(),
            },
            constraint: self.constraint.clone(),
            tools: match self.tool_choice {
                ToolChoice::None => Vec::new(),
                _ => self.tools.clone(),
            },
            tool_choice: self.tool_choice.clone(),
            tool_format: self.tool_format,
            prompt_lookup: self.prompt_lookup,
            draft_tokens: self.draft_tokens,
            timeout: self.timeout.map(seconds).transpose()?,
            on_prefill: self.on_prefill.clone(),
            cancel: self.cancel.clone(),
        };
        resolved.check()?;
        resolved.check_tokens(defaults.vocab_size)?;
        Ok(resolved)
    }
}

/// What a checkpoint's `generation_config.json` says about sampling.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SamplingDefaults {
    pub(crate) do_sample: Option<bool>,
    pub(crate) temperature: Option<f32>,
    pub(crate) top_k: Option<usize>,
    pub(crate) top_p: Option<f32>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) max_new_tokens: Option<usize>,
    pub(crate) eos_token_ids: Vec<u32>,
    /// Ids beyond are refused, if it is known.
    pub(crate) vocab_size: Option<usize>,
}

/// Settings with every value legal and filled in; only [`GenerateOptions::resolve`] makes one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Resolved {
    /// What the caller asked for: an error where the context has no room for it.
    pub(crate) max_new_tokens: Option<usize>,
    /// What the checkpoint usually does, or as many as there is room for; `None`: all the room.
    pub(crate) usual_new_tokens: Option<usize>,
    /// 0: greedy.
    pub(crate) temperature: f32,
    pub(crate) top_k: Option<usize>,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    pub(crate) typical_p: f32,
    pub(crate) repetition_penalty: f32,
    pub(crate) presence_penalty: f32,
    pub(crate) frequency_penalty: f32,
    pub(crate) logit_bias: BTreeMap<u32, f32>,
    pub(crate) bad_words: Vec<BadWord>,
    pub(crate) min_new_tokens: usize,
    pub(crate) logprobs: Option<usize>,
    pub(crate) prompt_logprobs: Option<usize>,
    /// Has no meaning when greedy.
    pub(crate) seed: u64,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    /// Empty with `ignore_eos`.
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) constraint: Option<Constraint>,
    /// Empty with the choice of none.
    pub(crate) tools: Vec<Tool>,
    pub(crate) tool_choice: ToolChoice,
    pub(crate) tool_format: Option<ToolFormat>,
    pub(crate) prompt_lookup: Option<usize>,
    pub(crate) draft_tokens: Option<usize>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) on_prefill: Option<OnPrefill>,
    pub(crate) cancel: Option<CancelToken>,
}

impl Resolved {
    fn check(&self) -> Result<()> {
        // Written so that NaN fails every one of them.
        if !(0.0..=MAX_TEMPERATURE).contains(&self.temperature) {
            let help = "0 takes the likeliest token, 0.7 is usual";
            return Err(out_of_range(
                "temperature",
                self.temperature,
                "0 to 100",
                help,
            ));
        }
        if self.top_k == Some(0) {
            let help = "leave it unset, or give the vocabulary's size to keep every token";
            return Err(out_of_range("top_k", 0, "1 or more", help));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let help = "1 keeps every token, 0.8 is usual";
            return Err(out_of_range("top_p", self.top_p, "above 0 to 1", help));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            let help = "0 keeps every token, 0.05 is usual";
            return Err(out_of_range("min_p", self.min_p, "0 to 1", help));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            let help = "1 is no penalty, 1.05 is usual";
            let penalty = self.repetition_penalty;
            return Err(out_of_range(
                "repetition_penalty",
                penalty,
                "above 0 and finite",
                help,
            ));
        }
        if self.max_new_tokens == Some(0) {
            let help = "to only read the prompt, use logits or score";
            return Err(out_of_range("max_new_tokens", 0, "1 or more", help));
        }
        self.check_penalties()?;
        self.check_counts()?;
        self.check_stop()?;
        self.check_tools()
    }

    fn check_penalties(&self) -> Result<()> {
        if !(self.typical_p > 0.0 && self.typical_p <= 1.0) {
            let help = "1 keeps every token, 0.95 is usual";
            return Err(out_of_range(
                "typical_p",
                self.typical_p,
                "above 0 to 1",
                help,
            ));
        }
        for (key, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            if !(-2.0..=2.0).contains(&penalty) {
                return Err(out_of_range(key, penalty, "-2 to 2", "0 is no penalty"));
            }
        }
        for (id, bias) in &self.logit_bias {
            if !(-100.0..=100.0).contains(bias) {
                let help = "to forbid a token, put it into bad_words";
                return Err(out_of_range(
                    &format!("logit_bias[{id}]"),
                    bias,
                    "-100 to 100",
                    help,
                ));
            }
        }
        Ok(())
    }

    fn check_counts(&self) -> Result<()> {
        let min = self.min_new_tokens;
        if let Some(max) = self.max_new_tokens.filter(|max| *max < min) {
            let range = format!("at most max_new_tokens, {max}");
            return Err(out_of_range(
                "min_new_tokens",
                min,
                &range,
                "lower it, or raise the other",
            ));
        }
        for (key, n_tokens) in [
            ("prompt_lookup", self.prompt_lookup),
            ("draft_tokens", self.draft_tokens),
        ] {
            if let Some(n) = n_tokens.filter(|n| !(1..=MAX_DRAFT_TOKENS).contains(n)) {
                let help = "4 is usual; leave it unset to go token by token";
                return Err(out_of_range(key, n, "1 to 64", help));
            }
        }
        for (key, count) in [
            ("logprobs", self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ] {
            if let Some(count) = count.filter(|count| *count > MAX_LOGPROBS) {
                let help = "for all of them use Model::logits";
                return Err(out_of_range(key, count, "0 to 1024", help));
            }
        }
        Ok(())
    }

    /// Whether the tokens that options name are in the vocabulary.
    fn check_tokens(&self, vocab_size: Option<usize>) -> Result<()> {
        if let Some(vocab_size) = vocab_size {
            check_ids("logit_bias", self.logit_bias.keys().copied(), vocab_size)?;
        }
        bad_words::check(&self.bad_words, vocab_size)
    }

    fn check_stop(&self) -> Result<()> {
        let count = self.stop.len();
        if count > MAX_STOP_STRINGS {
            let help = "give fewer strings";
            return Err(out_of_range(
                "stop",
                format!("{count} strings"),
                "at most 64",
                help,
            ));
        }
        for (position, stop) in self.stop.iter().enumerate() {
            if stop.is_empty() || stop.len() > MAX_STOP_LEN {
                let key = format!("stop[{position}]");
                let found = format!("{} bytes", stop.len());
                let help = "an empty string would stop everything, a long one never comes";
                return Err(out_of_range(&key, found, "1 to 4096 bytes", help));
            }
        }
        Ok(())
    }

    fn check_tools(&self) -> Result<()> {
        let count = self.tools.len();
        if count > MAX_TOOLS {
            let found = format!("{count} tools");
            return Err(out_of_range(
                "tools",
                found,
                "at most 128",
                "give fewer tools",
            ));
        }
        let names = || self.tools.iter().map(Tool::name);
        let why = match &self.tool_choice {
            ToolChoice::Required if count == 0 => Some("there are no tools".to_owned()),
            ToolChoice::Named(name) if !names().any(|tool| tool == name) => {
                Some(format!("no tool is named {name}"))
            }
            _ => None,
        };
        let contradiction = |key: &str, why: String| {
            Error::new(ErrorKind::InvalidArgument, "options contradict each other")
                .with_key(key)
                .with_why(why)
        };
        if let Some(why) = why {
            return Err(contradiction("tool_choice", why));
        }
        let twice = names()
            .enumerate()
            .find(|(i, name)| names().skip(i + 1).any(|n| n == *name));
        if let Some((_, name)) = twice {
            return Err(contradiction(
                "tools",
                format!("two tools are named {name}"),
            ));
        }
        let is_bound =
            self.tool_choice != ToolChoice::Auto || self.tools.iter().any(Tool::is_strict);
        if self.constraint.is_some() && count > 0 && is_bound {
            let why = "a tool that must be called, or called right, is a constraint of its own";
            return Err(contradiction("constraint", why.to_owned()));
        }
        Ok(())
    }

    /// Whether no choice is left to chance.
    pub(crate) fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == Some(1)
    }
}

/// Refuses ids that the vocabulary lacks.
pub(super) fn check_ids(
    key: &str,
    mut ids: impl Iterator<Item = u32>,
    vocab_size: usize,
) -> Result<()> {
    match ids.find(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(id) => Err(Error::new(ErrorKind::InvalidArgument, "no such token")
            .with_key(key)
            .with_why(format!("{id}, the vocabulary has {vocab_size}"))),
    }
}

fn out_of_range(key: &str, found: impl std::fmt::Display, range: &str, help: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, "option out of range")
        .with_key(key)
        .with_why(format!("expected {range}, found {found}"))
        .with_help(help)
}

fn seconds(timeout: f64) -> Result<Duration> {
    // As far as the clock can tell, and no zero: nothing would ever begin.
    match Duration::try_from_secs_f64(timeout) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => {
            let help = "seconds; leave it unset for no limit";
            Err(out_of_range("timeout", timeout, "above 0 and finite", help))
        }
    }
}

fn entropy() -> Result<u64> {
    SysRng.try_next_u64().map_err(|error| {
        Error::new(ErrorKind::Io, "no seed from the operating system")
            .with_key("seed")
            .with_why(error.to_string())
            .with_help("set seed")
            .with_source(error)
    })
}

/// A switch that ends generations from any thread; clones share it.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A switch that is off.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends every generation that holds this token, in the middle of a forward too: on the processor
    /// within some milliseconds. One atomic store: safe in a signal handler. There is no way back.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Ends forwards, too.
    pub(crate) fn watch(&self) -> Watch {
        Watch {
            switch: Some(Arc::clone(&self.0)),
            ..Watch::default()
        }
    }

    /// Whether [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Two tokens are equal when they are the same switch.
impl PartialEq for CancelToken {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for CancelToken {}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;

    /// Qwen2-0.5B-Instruct's.
    fn checkpoint() -> SamplingDefaults {
        SamplingDefaults {
            do_sample: Some(true),
            temperature: Some(0.7),
            top_k: Some(20),
            top_p: Some(0.8),
            repetition_penalty: Some(1.1),
            eos_token_ids: vec![151_645, 151_643],
            ..SamplingDefaults::default()
        }
    }

    #[test]
    fn unset_fields_come_from_the_checkpoint_then_from_the_defaults() {
        let resolved = GenerateOptions::new()
            .top_p(0.5)
            .resolve(&checkpoint())
            .unwrap();
        assert_eq!(
            (resolved.temperature, resolved.top_k, resolved.top_p),
            (0.7, Some(20), 0.5)
        );
        assert_eq!((resolved.min_p, resolved.repetition_penalty), (0.0, 1.1));
        assert_eq!(resolved.eos_token_ids, [151_645, 151_643]);
        let all = SamplingDefaults {
            top_k: Some(0),
            ..checkpoint()
        };
        assert_eq!(GenerateOptions::new().resolve(&all).unwrap().top_k, None);
    }

    #[test]
    fn a_checkpoint_that_does_not_sample_is_greedy_until_a_temperature_is_set() {
        for do_sample in [None, Some(false)] {
            let base = SamplingDefaults {
                do_sample,
                ..checkpoint()
            };
            assert!(GenerateOptions::new().resolve(&base).unwrap().is_greedy());
            let warm = GenerateOptions::new()
                .temperature(0.5)
                .resolve(&base)
                .unwrap();
            assert_eq!(warm.temperature, 0.5);
        }
    }

    #[test]
    fn greedy_has_no_penalty() {
        let resolved = GenerateOptions::greedy().resolve(&checkpoint()).unwrap();
        assert!(resolved.is_greedy());
        assert_eq!(resolved.repetition_penalty, 1.0);
    }

    #[test]
    fn ignore_eos_leaves_the_tokens_of_the_caller() {
        let options = GenerateOptions::new().stop_token_ids([9]).ignore_eos(true);
        let resolved = options.resolve(&checkpoint()).unwrap();
        assert_eq!(
            (resolved.eos_token_ids, resolved.stop_token_ids),
            (vec![], vec![9])
        );
    }

    #[test]
    fn a_seed_is_drawn_when_none_is_given() {
        let draw = || GenerateOptions::new().resolve(&checkpoint()).unwrap().seed;
        assert_ne!(draw(), draw());
        assert_eq!(
            GenerateOptions::new()
                .seed(7)
                .resolve(&checkpoint())
                .unwrap()
                .seed,
            7
        );
    }

    #[test]
    fn values_out_of_range_name_the_field_the_value_and_the_range() {
        let new = GenerateOptions::new;
        let cases = [
            (new().temperature(-0.1), "temperature", "-0.1"),
            (new().temperature(100.5), "temperature", "100.5"),
            (new().temperature(f32::NAN), "temperature", "NaN"),
            (new().temperature(f32::INFINITY), "temperature", "inf"),
            (new().top_k(0), "top_k", "0"),
            (new().top_p(0.0), "top_p", "0"),
            (new().top_p(1.01), "top_p", "1.01"),
            (new().top_p(f32::NAN), "top_p", "NaN"),
            (new().min_p(-0.5), "min_p", "-0.5"),
            (new().min_p(1.5), "min_p", "1.5"),
            (new().min_p(f32::NAN), "min_p", "NaN"),
            (new().repetition_penalty(0.0), "repetition_penalty", "0"),
            (
                new().repetition_penalty(f32::INFINITY),
                "repetition_penalty",
                "inf",
            ),
            (
                new().repetition_penalty(f32::NAN),
                "repetition_penalty",
                "NaN",
            ),
            (new().max_new_tokens(0), "max_new_tokens", "0"),
            (new().prompt_lookup(0), "prompt_lookup", "0"),
            (new().draft_tokens(65), "draft_tokens", "65"),
            (new().timeout(0.0), "timeout", "0"),
            (new().timeout(-1.5), "timeout", "-1.5"),
            (new().timeout(f64::NAN), "timeout", "NaN"),
            (new().timeout(f64::INFINITY), "timeout", "inf"),
            (new().typical_p(0.0), "typical_p", "0"),
            (new().typical_p(f32::NAN), "typical_p", "NaN"),
            (new().presence_penalty(2.5), "presence_penalty", "2.5"),
            (new().presence_penalty(f32::NAN), "presence_penalty", "NaN"),
            (new().frequency_penalty(-3.0), "frequency_penalty", "-3"),
            (new().logit_bias([(7, 101.0)]), "logit_bias[7]", "101"),
            (new().logit_bias([(7, f32::NAN)]), "logit_bias[7]", "NaN"),
            (
                new().min_new_tokens(5).max_new_tokens(4),
                "min_new_tokens",
                "5",
            ),
            (new().logprobs(1025), "logprobs", "1025"),
            (
                new().prompt_logprobs(1 << 40),
                "prompt_logprobs",
                "1099511627776",
            ),
            (new().bad_words(["ok", ""]), "bad_words[1]", "0 bytes"),
            (new().bad_words([vec![]]), "bad_words[0]", "0 tokens"),
            (
                new().bad_words(["x".repeat(257)]),
                "bad_words[0]",
                "257 bytes",
            ),
            (new().bad_words(vec!["x"; 1025]), "bad_words", "1025 words"),
            (new().stop(["ok", ""]), "stop[1]", "0 bytes"),
            (new().stop(["x".repeat(4097)]), "stop[0]", "4097 bytes"),
            (new().stop(vec!["x"; 65]), "stop", "65 strings"),
        ];
        for (options, key, found) in cases {
            let error = options.resolve(&checkpoint()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
            assert_eq!(error.key(), Some(key));
            assert!(
                error.to_string().ends_with(&format!("found {found}")),
                "{error}"
            );
            assert!(error.help().is_some());
        }
    }

    #[test]
    fn tokens_that_the_vocabulary_lacks_are_refused() {
        let defaults = SamplingDefaults {
            vocab_size: Some(100),
            ..checkpoint()
        };
        let new = GenerateOptions::new;
        for (options, key) in [
            (new().logit_bias([(100, 1.0)]), "logit_bias"),
            (new().bad_words([[3, 100]]), "bad_words[0]"),
        ] {
            let error = options.resolve(&defaults).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("no such token: {key}: 100, the vocabulary has 100")
            );
        }
        new()
            .logit_bias([(99, 1.0)])
            .bad_words([[99]])
            .resolve(&defaults)
            .unwrap();
    }

    #[test]
    fn the_ends_of_every_range_are_legal() {
        let options = GenerateOptions::new()
            .temperature(100.0)
            .top_k(1)
            .top_p(1.0)
            .min_p(1.0)
            .max_new_tokens(1);
        options
            .stop(["x".repeat(4096)])
            .resolve(&checkpoint())
            .unwrap();
        GenerateOptions::new()
            .temperature(0.0)
            .top_k(usize::MAX)
            .min_p(0.0)
            .resolve(&checkpoint())
            .unwrap();
    }

    #[test]
    fn options_travel_as_json_without_the_switch() {
        let options = GenerateOptions::new()
            .seed(3)
            .stop(["a"])
            .logit_bias([(5, -1.5)])
            .bad_words(["b"])
            .cancel(CancelToken::new());
        let json = serde_json::to_string(&options).unwrap();
        let back: GenerateOptions = serde_json::from_str(&json).unwrap();
        assert_eq!(
            back,
            GenerateOptions {
                cancel: None,
                ..options
            }
        );
        assert!(serde_json::from_str::<GenerateOptions>(r#"{"temprature": 1}"#).is_err());
    }

    #[test]
    fn clones_of_a_cancel_token_are_one_switch() {
        let token = CancelToken::new();
        let clone = token.clone();
        assert_ne!(token, CancelToken::new());
        clone.cancel();
        assert!(token.is_cancelled());
        assert_eq!(token, clone);
    }
}
