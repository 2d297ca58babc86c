//! What a caller may set for a generation.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use super::Constraint;
use super::bad_words::BadWord;
use super::cancel::CancelToken;
use super::prefill::{OnPrefill, PrefillProgress};
use crate::text::{Tool, ToolChoice, ToolFormat};

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
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;

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
}
