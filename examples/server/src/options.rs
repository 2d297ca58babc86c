//! How to generate: the request's fields become the library's options. The one file to change when
//! the library learns more.

use std::collections::BTreeMap;

use qwen2_core::{Constraint, GenerateOptions};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::formats::take_constraint;
use crate::settings::Settings;

/// OpenAI's own limit of `n`.
const MAX_CHOICES: usize = 128;

/// The fields that chat and completions share.
#[derive(Debug, Default)]
pub(crate) struct Sampling {
    /// Answers to each prompt.
    pub(crate) n: usize,
    pub(crate) stream: bool,
    /// Whether a stream ends with the token counts.
    pub(crate) include_usage: bool,
    max_new_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: BTreeMap<u32, f32>,
    min_tokens: Option<usize>,
    /// How many of the likeliest tokens are told for each, or not even how likely the chosen one was.
    pub(crate) logprobs: Option<usize>,
    /// And the field that has it.
    constraint: Option<(&'static str, Constraint)>,
    seed: Option<u64>,
    stop: Vec<String>,
    stop_token_ids: Vec<u32>,
    ignore_eos: bool,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
    /// Padding against an attack on encrypted streams, which there are none of here.
    #[serde(default, rename = "include_obfuscation")]
    _include_obfuscation: bool,
}

impl Sampling {
    /// Takes the shared fields out of a request. `limit` names its most tokens, `usual` is that of a
    /// request that does not say.
    ///
    /// # Errors
    /// 400 for another type, a number of answers out of range, and what is not supported.
    pub(crate) fn take(
        fields: &mut Fields,
        max_new_tokens: Option<usize>,
        settings: &Settings,
    ) -> Result<Self, ApiError> {
        let stream = fields.take("stream")?.unwrap_or(false);
        let stream_options: Option<StreamOptions> = fields.take("stream_options")?;
        if stream_options.is_some() && !stream {
            return Err(ApiError::invalid(
                "stream_options",
                "stream_options is for requests with stream: true",
            ));
        }
        Ok(Self {
            n: take_n(fields)?,
            stream,
            include_usage: stream_options.is_some_and(|options| options.include_usage),
            max_new_tokens: max_new_tokens.or(settings.max_new_tokens),
            temperature: fields.take("temperature")?,
            top_p: fields.take("top_p")?,
            top_k: fields.take("top_k")?,
            min_p: fields.take("min_p")?,
            repetition_penalty: fields.take("repetition_penalty")?,
            presence_penalty: fields.take("presence_penalty")?,
            frequency_penalty: fields.take("frequency_penalty")?,
            logit_bias: fields.take("logit_bias")?.unwrap_or_default(),
            min_tokens: fields.take("min_tokens")?,
            logprobs: None,
            constraint: take_constraint(fields)?,
            seed: take_seed(fields)?,
            stop: fields.take_strings("stop")?,
            stop_token_ids: fields.take("stop_token_ids")?.unwrap_or_default(),
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
        })
    }

    /// The same with how likely its tokens were.
    pub(crate) fn with_logprobs(self, logprobs: Option<usize>) -> Self {
        Self { logprobs, ..self }
    }

    /// What the request calls the form of its answers.
    pub(crate) fn constraint_key(&self) -> &'static str {
        self.constraint
            .as_ref()
            .map_or("response_format", |(key, _)| key)
    }

    /// The options of the answer `index` of the `n`: each has a seed of its own.
    pub(crate) fn options(&self, index: usize) -> GenerateOptions {
        let mut options = GenerateOptions::new()
            .stop(self.stop.clone())
            .stop_token_ids(self.stop_token_ids.clone())
            .ignore_eos(self.ignore_eos)
            .logit_bias(self.logit_bias.clone());
        options.max_new_tokens = self.max_new_tokens;
        options.temperature = self.temperature;
        options.top_p = self.top_p;
        options.top_k = self.top_k;
        options.min_p = self.min_p;
        options.repetition_penalty = self.repetition_penalty;
        options.presence_penalty = self.presence_penalty;
        options.frequency_penalty = self.frequency_penalty;
        options.min_new_tokens = self.min_tokens;
        options.logprobs = self.logprobs;
        options.constraint = self.constraint.as_ref().map(|(_, form)| form.clone());
        options.seed = self.seed.map(|seed| seed.wrapping_add(index as u64));
        options
    }
}

/// The most tokens that a request asks for, and under which of `keys`.
///
/// # Errors
/// 400 for more than one of them that differ, or more than the server grants.
pub(crate) fn take_limit(
    fields: &mut Fields,
    keys: &[&'static str],
    settings: &Settings,
) -> Result<Option<(usize, &'static str)>, ApiError> {
    let mut limit = None;
    for &key in keys {
        let Some(asked) = fields.take::<usize>(key)? else {
            continue;
        };
        if limit.is_some_and(|(limit, _)| limit != asked) {
            let message = format!("{} contradict each other", keys.join(" and "));
            return Err(ApiError::invalid(key, message));
        }
        if settings.max_new_tokens.is_some_and(|most| asked > most) {
            let most = settings.max_new_tokens.unwrap_or_default();
            let message = format!("{key} is {asked}, this server grants at most {most}");
            return Err(ApiError::invalid(key, message));
        }
        limit = Some((asked, key));
    }
    Ok(limit)
}

fn take_n(fields: &mut Fields) -> Result<usize, ApiError> {
    let n = fields.take("n")?.unwrap_or(1);
    match n {
        1..=MAX_CHOICES => Ok(n),
        _ => Err(ApiError::invalid(
            "n",
            format!("n is {n}, expected 1 to {MAX_CHOICES}"),
        )),
    }
}

/// OpenAI's seeds are signed.
fn take_seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(seed) = fields.take::<i128>("seed")? else {
        return Ok(None);
    };
    match (i64::try_from(seed), u64::try_from(seed)) {
        (_, Ok(seed)) => Ok(Some(seed)),
        (Ok(seed), _) => Ok(Some(seed.cast_unsigned())),
        _ => Err(ApiError::invalid("seed", "seed has more than 64 bits")),
    }
}
