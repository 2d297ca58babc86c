//! The options of a generation: the one place that knows their names in Python.

use std::ops::ControlFlow;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use qwen2_core::{GenerateOptions, OnPrefill};

use crate::arguments::{TokenIds, Whole};
use crate::constraint;

/// The signature of a verb that takes the options, for its doc: `head` is what stands before them. The verb
/// itself takes `**options`, which [`read`] reads; what Python's `inspect` shows is this.
macro_rules! signature {
    ($head:literal) => {
        concat!(
            $head,
            "max_new_tokens=None, temperature=None, top_k=None, top_p=None, min_p=None, ",
            "repetition_penalty=None, seed=None, stop=None, stop_token_ids=None, ignore_eos=False, ",
            "json_schema=None, regex=None, grammar=None, choice=None, ",
            "tools=None, tool_choice=None, tool_format=None, ",
            "prompt_lookup=None, draft_tokens=None, timeout=None, on_prefill=None",
            ")\n--\n"
        )
    };
}
pub(crate) use signature;

/// The options that `verb` was called with; one that was not given, or is None, is the checkpoint's.
///
/// # Errors
/// `TypeError` for a name that is no option and for a value of the wrong type.
pub(crate) fn read(verb: &str, given: Option<&Bound<'_, PyDict>>) -> PyResult<GenerateOptions> {
    let mut options = GenerateOptions::new();
    for (name, value) in given.into_iter().flatten() {
        let name: String = name.extract()?;
        set(&mut options, verb, &name, &value)?;
    }
    Ok(options)
}

fn set(
    options: &mut GenerateOptions,
    verb: &str,
    name: &str,
    value: &Bound<'_, PyAny>,
) -> PyResult<()> {
    match name {
        "max_new_tokens" => options.max_new_tokens = whole(name, value, "1 or more")?,
        "temperature" => options.temperature = extract(name, value)?,
        "top_k" => options.top_k = whole(name, value, "1 or more")?,
        "top_p" => options.top_p = extract(name, value)?,
        "min_p" => options.min_p = extract(name, value)?,
        "repetition_penalty" => options.repetition_penalty = extract(name, value)?,
        "seed" => options.seed = whole(name, value, "0 to 18446744073709551615")?,
        "stop" => {
            options.stop = extract::<Option<Stop>>(name, value)?.map_or_else(Vec::new, Vec::from)
        }
        "stop_token_ids" => {
            let ids: Option<TokenIds> = extract(name, value)?;
            options.stop_token_ids = ids.map(|ids| ids.0).unwrap_or_default();
        }
        "ignore_eos" => options.ignore_eos = extract(name, value)?,
        "json_schema" | "regex" | "grammar" | "choice" => {
            constraint::set_constraint(options, name, value)?;
        }
        "tools" => options.tools = constraint::tools(name, value)?,
        "tool_choice" => options.tool_choice = constraint::tool_choice(name, value)?,
        "tool_format" => options.tool_format = constraint::tool_format(name, value)?,
        "prompt_lookup" => options.prompt_lookup = whole(name, value, "1 to 64")?,
        "draft_tokens" => options.draft_tokens = whole(name, value, "1 to 64")?,
        "timeout" => options.timeout = extract(name, value)?,
        "on_prefill" => options.on_prefill = on_prefill(value)?,
        _ => {
            return Err(PyTypeError::new_err(format!(
                "{verb}() got an unexpected keyword argument '{name}'"
            )));
        }
    }
    Ok(())
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
