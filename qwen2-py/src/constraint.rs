//! What Python passes for constraints and tools: dicts and model classes, which the core takes as JSON.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PyString};
use qwen2_core::{Constraint, GenerateOptions, Tool, ToolCall, ToolChoice, ToolFormat};

use crate::error::Failure;

/// Sets a constraint of this name; None leaves it unset.
///
/// # Errors
/// `TypeError` for a value of another type, `InvalidArgument` for a second constraint.
pub(crate) fn set_constraint(
    options: &mut GenerateOptions,
    name: &str,
    value: &Bound<'_, PyAny>,
) -> PyResult<()> {
    if value.is_none() {
        return Ok(());
    }
    if options.constraint.is_some() {
        let why = "json_schema, regex, grammar and choice exclude each other";
        return Err(Failure::invalid("two constraints", name, why, "give one of them").into());
    }
    let text = || {
        let text = value.cast::<PyString>();
        text.map_err(|_| wrong_type(name, "a str", value))?
            .extract::<String>()
    };
    options.constraint = Some(match name {
        "json_schema" => Constraint::json_schema(schema(name, value)?),
        "regex" => Constraint::regex(text()?),
        "grammar" => Constraint::grammar(text()?),
        _ => {
            if value.is_instance_of::<PyString>() {
                return Err(wrong_type(name, "a sequence of str", value));
            }
            let choices = value.extract::<Vec<String>>();
            Constraint::choice(choices.map_err(|_| wrong_type(name, "a sequence of str", value))?)
        }
    });
    Ok(())
}

/// The text of a schema: of a dict, of JSON text, or of a class that pydantic made.
fn schema(name: &str, value: &Bound<'_, PyAny>) -> PyResult<String> {
    if let Ok(text) = value.cast::<PyString>() {
        return text.extract();
    }
    if value.cast::<PyMapping>().is_ok() || value.extract::<bool>().is_ok() {
        return dumps(value);
    }
    match value.getattr_opt("model_json_schema")? {
        Some(model_json_schema) => dumps(&model_json_schema.call0()?),
        None => Err(wrong_type(
            name,
            "a dict, JSON text or a pydantic model class",
            value,
        )),
    }
}

/// The tools, described as OpenAI's interface does.
///
/// # Errors
/// `TypeError` for what is no sequence of dicts, `InvalidArgument` for a bad tool.
pub(crate) fn tools(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<Tool>> {
    if value.is_none() {
        return Ok(Vec::new());
    }
    if value.is_instance_of::<PyString>() || value.cast::<PyMapping>().is_ok() {
        return Err(wrong_type(name, "a sequence of dicts", value));
    }
    let tool = |item: PyResult<Bound<'_, PyAny>>| {
        let item = item?;
        item.cast::<PyMapping>()
            .map_err(|_| wrong_type(name, "a sequence of dicts", value))?;
        Tool::from_json(&dumps(&item)?).map_err(|error| Failure::from(error).into())
    };
    value.try_iter()?.map(tool).collect()
}

/// "auto", "none", "required", or `{"type": "function", "function": {"name": …}}`.
pub(crate) fn tool_choice(name: &str, value: &Bound<'_, PyAny>) -> PyResult<ToolChoice> {
    if value.is_none() {
        return Ok(ToolChoice::Auto);
    }
    if let Ok(function) = value.get_item("function").and_then(|f| f.get_item("name")) {
        return Ok(ToolChoice::Named(function.extract()?));
    }
    match value.extract::<String>().as_deref() {
        Ok("auto") => Ok(ToolChoice::Auto),
        Ok("none") => Ok(ToolChoice::None),
        Ok("required") => Ok(ToolChoice::Required),
        _ => {
            let why = value.repr()?.to_string();
            let help = r#"one of "auto", "none", "required", or {"type": "function", "function": {"name": …}}"#;
            Err(Failure::invalid("no such choice", name, &why, help).into())
        }
    }
}

/// "hermes" or "qwen_agent".
pub(crate) fn tool_format(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<ToolFormat>> {
    match value.extract::<Option<String>>()?.as_deref() {
        None => Ok(None),
        Some("hermes") => Ok(Some(ToolFormat::Hermes)),
        Some("qwen_agent") => Ok(Some(ToolFormat::QwenAgent)),
        Some(other) => {
            let help = r#"one of "hermes", "qwen_agent""#;
            Err(Failure::invalid("no such format", name, other, help).into())
        }
    }
}

/// The calls of a message, as OpenAI's interface has them.
pub(crate) fn calls(key: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<ToolCall>> {
    let json = dumps(value)?;
    serde_json::from_str::<Option<Vec<ToolCall>>>(&json)
        .map(Option::unwrap_or_default)
        .map_err(|error| {
            let help = r#"a call is {"type": "function", "function": {"name": …, "arguments": …}}"#;
            Failure::invalid("message has a bad call", key, &error.to_string(), help).into()
        })
}

/// A call as the dict that [`calls`] reads.
pub(crate) fn to_dict<'py>(py: Python<'py>, call: &ToolCall) -> PyResult<Bound<'py, PyDict>> {
    let function = PyDict::new(py);
    function.set_item("name", &call.name)?;
    function.set_item("arguments", &call.arguments)?;
    let dict = PyDict::new(py);
    dict.set_item("type", "function")?;
    dict.set_item("function", function)?;
    Ok(dict)
}

fn dumps(value: &Bound<'_, PyAny>) -> PyResult<String> {
    let json = value.py().import("json")?;
    json.call_method1("dumps", (value,))?.extract()
}

fn wrong_type(name: &str, expected: &str, value: &Bound<'_, PyAny>) -> PyErr {
    let found = value.get_type();
    let found = found
        .name()
        .map(|name| name.to_string())
        .unwrap_or_default();
    PyTypeError::new_err(format!(
        "argument '{name}': expected {expected}, found {found}"
    ))
}
