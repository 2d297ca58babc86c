//! The settings of a generation as they hold: the caller's, the checkpoint's, the defaults, each in its range.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::TryRng;
use rand::rngs::SysRng;

use super::Constraint;
use super::bad_words::{self, BadWord};
use super::cancel::CancelToken;
use super::options::GenerateOptions;
use super::prefill::OnPrefill;
use crate::error::{Error, ErrorKind, Result};
use crate::text::{Tool, ToolChoice, ToolFormat};

const MAX_TEMPERATURE: f32 = 100.0;
const MAX_TOOLS: usize = 128;
const MAX_STOP_STRINGS: usize = 64;
const MAX_STOP_LEN: usize = 4096;
const MAX_DRAFT_TOKENS: usize = 64;
const MAX_LOGPROBS: usize = 1024;

impl GenerateOptions {
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
}
