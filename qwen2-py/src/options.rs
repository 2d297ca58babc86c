//! The options of a generation: the one place that knows their names in Python.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use qwen2_core::{BadWord, CancelToken, GenerateOptions, Model, OnPrefill, Prompt, TokenStream};

use crate::arguments::{TokenIds, Whole};
use crate::constraint;
use crate::error::Failure;
use crate::processor::Processor;

/// The signature of a verb that takes the options, for its doc: `head` is what stands before them. The verb
/// itself takes `**options`, which [`read`] reads; what Python's `inspect` shows is this.
macro_rules! signature {
    ($head:literal) => {
        concat!(
            $head,
            "max_new_tokens=None, temperature=None, top_k=None, top_p=None, min_p=None, ",
            "typical_p=None, repetition_penalty=None, presence_penalty=None, frequency_penalty=None, ",
            "logit_bias=None, bad_words=None, seed=None, stop=None, stop_token_ids=None, ",
            "ignore_eos=False, min_new_tokens=None, logprobs=None, prompt_logprobs=None, processor=None, ",
            "json_schema=None, regex=None, grammar=None, choice=None, ",
            "tools=None, tool_choice=None, tool_format=None, ",
            "prompt_lookup=None, draft_tokens=None, timeout=None, on_prefill=None",
            ")\n--\n"
        )
    };
}
pub(crate) use signature;

/// What a verb was called with; an option that was not given, or is None, is the checkpoint's.
#[derive(Clone, Default)]
pub(crate) struct Given {
    pub(crate) options: GenerateOptions,
    pub(crate) processor: Option<Processor>,
}

impl Given {
    /// With a switch that ends the generation.
    pub(crate) fn cancel(mut self, cancel: &CancelToken) -> Self {
        self.options.cancel = Some(cancel.clone());
        self
    }

    /// A generation with these options, under way.
    pub(crate) fn start(self, model: &Model, prompt: Prompt) -> qwen2_core::Result<TokenStream> {
        match self.processor {
            Some(processor) => model.stream_with(prompt, &self.options, processor),
            None => model.stream(prompt, &self.options),
        }
    }
}

/// The options that `verb` was called with.
///
/// # Errors
/// `TypeError` for a name that is no option and for a value of the wrong type.
pub(crate) fn read(verb: &str, given: Option<&Bound<'_, PyDict>>) -> PyResult<Given> {
    let mut read = Given::default();
    for (name, value) in given.into_iter().flatten() {
        let name: String = name.extract()?;
        let known = set_sampling(&mut read.options, &name, &value)?
            || set_bounds(&mut read.options, &name, &value)?
            || set_form(&mut read.options, &name, &value)?
            || set_processor(&mut read.processor, &name, &value)?;
        if !known {
            return Err(PyTypeError::new_err(format!(
                "{verb}() got an unexpected keyword argument '{name}'"
            )));
        }
    }
    Ok(read)
}

/// What decides how a token is chosen; whether `name` is such an option.
fn set_sampling(
    options: &mut GenerateOptions,
    name: &str,
    value: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    match name {
        "temperature" => options.temperature = extract(name, value)?,
        "top_k" => options.top_k = whole(name, value, "1 or more")?,
        "top_p" => options.top_p = extract(name, value)?,
        "min_p" => options.min_p = extract(name, value)?,
        "typical_p" => options.typical_p = extract(name, value)?,
        "repetition_penalty" => options.repetition_penalty = extract(name, value)?,
        "presence_penalty" => options.presence_penalty = extract(name, value)?,
        "frequency_penalty" => options.frequency_penalty = extract(name, value)?,
        "logit_bias" => options.logit_bias = logit_bias(name, value)?,
        "bad_words" => {
            let words: Option<Vec<Word>> = extract(name, value)?;
            options.bad_words = words.into_iter().flatten().map(BadWord::from).collect();
        }
        "seed" => options.seed = whole(name, value, "0 to 18446744073709551615")?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// What decides where a generation ends and what it tells; whether `name` is such an option.
fn set_bounds(
    options: &mut GenerateOptions,
    name: &str,
    value: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    match name {
        "max_new_tokens" => options.max_new_tokens = whole(name, value, "1 or more")?,
        "min_new_tokens" => options.min_new_tokens = whole(name, value, "0 or more")?,
        "stop" => {
            options.stop = extract::<Option<Stop>>(name, value)?.map_or_else(Vec::new, Vec::from);
        }
        "stop_token_ids" => {
            let ids: Option<TokenIds> = extract(name, value)?;
            options.stop_token_ids = ids.map(|ids| ids.0).unwrap_or_default();
        }
        "ignore_eos" => options.ignore_eos = extract(name, value)?,
        "timeout" => options.timeout = extract(name, value)?,
        "logprobs" => options.logprobs = whole(name, value, "0 to 1024")?,
        "prompt_logprobs" => options.prompt_logprobs = whole(name, value, "0 to 1024")?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// What the text is to look like, and how it is computed; whether `name` is such an option.
fn set_form(options: &mut GenerateOptions, name: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    match name {
        "json_schema" | "regex" | "grammar" | "choice" => {
            constraint::set_constraint(options, name, value)?;
        }
        "tools" => options.tools = constraint::tools(name, value)?,
        "tool_choice" => options.tool_choice = constraint::tool_choice(name, value)?,
        "tool_format" => options.tool_format = constraint::tool_format(name, value)?,
        "prompt_lookup" => options.prompt_lookup = whole(name, value, "1 to 64")?,
        "draft_tokens" => options.draft_tokens = whole(name, value, "1 to 64")?,
        "on_prefill" => options.on_prefill = on_prefill(value)?,
        _ => return Ok(false),
    }
    Ok(true)
}

fn set_processor(
    processor: &mut Option<Processor>,
    name: &str,
    value: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    if name != "processor" {
        return Ok(false);
    }
    if !value.is_none() && !value.is_callable() {
        let why = "argument 'processor': a processor is a function of tokens and logits";
        return Err(PyTypeError::new_err(why));
    }
    *processor = (!value.is_none()).then(|| Processor::new(value));
    Ok(true)
}

fn logit_bias(name: &str, value: &Bound<'_, PyAny>) -> PyResult<BTreeMap<u32, f32>> {
    let biases: Option<HashMap<Whole, f32>> = extract(name, value)?;
    let biases = biases.into_iter().flatten();
    Ok(biases
        .map(|(id, bias)| Ok((id.token(name)?, bias)))
        .collect::<Result<_, Failure>>()?)
}

/// A text, or a sequence of tokens.
#[derive(FromPyObject)]
enum Word {
    #[pyo3(transparent, annotation = "str")]
    Text(String),
    #[pyo3(transparent, annotation = "Sequence[int]")]
    Tokens(TokenIds),
}

impl From<Word> for BadWord {
    fn from(word: Word) -> Self {
        match word {
            Word::Text(text) => Self::from(text),
            Word::Tokens(tokens) => Self::from(tokens.0),
        }
    }
}

/// A function that gets the tokens done and in all. What it raises ends the generation, and goes where
/// Python reports what has nobody to catch it: the thread that computes may be none of Python's.
fn on_prefill(value: &Bound<'_, PyAny>) -> PyResult<Option<OnPrefill>> {
    if value.is_none() {
        return Ok(None);
    }
    if !value.is_callable() {
        return Err(PyTypeError::new_err("argument 'on_prefill': not callable"));
    }
    let callback = value.clone().unbind();
    Ok(Some(OnPrefill::new(move |progress| {
        Python::attach(|py| {
            let callback = callback.bind(py);
            match callback.call1((progress.tokens_done, progress.tokens_total)) {
                Ok(_) => ControlFlow::Continue(()),
                Err(error) => {
                    error.write_unraisable(py, Some(callback));
                    ControlFlow::Break(())
                }
            }
        })
    })))
}

/// A value of the type that the option has; a `TypeError` names the option, as for other arguments.
fn extract<'py, T: for<'a> FromPyObject<'a, 'py, Error = PyErr>>(
    name: &str,
    value: &Bound<'py, PyAny>,
) -> PyResult<T> {
    value.extract::<T>().map_err(|error| {
        let py = value.py();
        if !error.get_type(py).is(py.get_type::<PyTypeError>()) {
            return error;
        }
        let named = PyTypeError::new_err(format!("argument '{name}': {}", error.value(py)));
        named.set_cause(py, error.cause(py));
        named
    })
}

fn whole<T: TryFrom<i128>>(
    name: &str,
    value: &Bound<'_, PyAny>,
    range: &str,
) -> PyResult<Option<T>> {
    let whole: Option<Whole> = extract(name, value)?;
    Ok(whole.map(|whole| whole.option(name, range)).transpose()?)
}

/// One stop string or several.
#[derive(FromPyObject)]
enum Stop {
    #[pyo3(transparent, annotation = "str")]
    One(String),
    #[pyo3(transparent, annotation = "Sequence[str]")]
    Many(Vec<String>),
}

impl From<Stop> for Vec<String> {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::One(stop) => vec![stop],
            Stop::Many(stop) => stop,
        }
    }
}
