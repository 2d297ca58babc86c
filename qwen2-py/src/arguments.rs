//! What Python passes: prompts, messages and numbers, checked where the library cannot see them.

use std::path::PathBuf;

use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyList, PyMapping, PyString};
use qwen2_core::{Message, Prompt, Source};

use crate::constraint;
use crate::error::Failure;

/// A whole number of any size, so that one out of range gets our message rather than Python's
/// about the width of an integer.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Whole(i128);

impl<'py> FromPyObject<'_, 'py> for Whole {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.extract::<i128>() {
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                Ok(Self(if object.lt(0)? { i128::MIN } else { i128::MAX }))
            }
            number => Ok(Self(number?)),
        }
    }
}

impl Whole {
    /// As an option of a generation.
    pub(crate) fn option<T: TryFrom<i128>>(self, key: &str, range: &str) -> Result<T, Failure> {
        T::try_from(self.0).map_err(|_| {
            let why = format!("expected {range}, found {}", self.0);
            Failure::invalid(
                "option out of range",
                key,
                &why,
                "leave it unset for the default",
            )
        })
    }

    /// As a setting of loading.
    pub(crate) fn setting(self, key: &str) -> Result<usize, Failure> {
        usize::try_from(self.0).map_err(|_| {
            let why = self.0.to_string();
            Failure::invalid(
                "setting is out of range",
                key,
                &why,
                "leave it unset for the default",
            )
        })
    }

    /// As the number of tokens to keep.
    pub(crate) fn count(self, key: &str) -> Result<usize, Failure> {
        usize::try_from(self.0).map_err(|_| {
            Failure::invalid(
                "not a number of tokens",
                key,
                &self.0.to_string(),
                "0 or more",
            )
        })
    }

    /// As the id of a token.
    pub(crate) fn token(self, key: &str) -> Result<u32, Failure> {
        u32::try_from(self.0).map_err(|_| {
            Failure::invalid(
                "no such token",
                key,
                &self.0.to_string(),
                "ids are 0 or more",
            )
        })
    }
}

/// A sequence of token ids: a list, a tuple, an array of numpy.
pub(crate) struct TokenIds(pub(crate) Vec<u32>);

impl<'py> FromPyObject<'_, 'py> for TokenIds {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if object.is_instance_of::<PyBytes>() || object.is_instance_of::<PyByteArray>() {
            return Err(PyTypeError::new_err(
                "expected a sequence of token ids, found bytes",
            ));
        }
        let ids: Vec<Whole> = object.extract()?;
        let ids = ids
            .into_iter()
            .map(|id| id.token("tokens"))
            .collect::<Result<_, _>>()?;
        Ok(Self(ids))
    }
}

/// A conversation: a sequence of `{"role": …, "content": …}`.
pub(crate) struct Messages(pub(crate) Vec<Message>);

impl<'py> FromPyObject<'_, 'py> for Messages {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if object.is_instance_of::<PyString>() || object.cast::<PyMapping>().is_ok() {
            return Err(PyTypeError::new_err(
                "expected a sequence of messages, as in [{\"role\": \"user\", \"content\": \"…\"}]",
            ));
        }
        let messages = object
            .try_iter()?
            .enumerate()
            .map(|(position, item)| message(position, &item?));
        Ok(Self(messages.collect::<PyResult<_>>()?))
    }
}

fn message(position: usize, item: &Bound<'_, PyAny>) -> PyResult<Message> {
    let mapping = item.cast::<PyMapping>().map_err(|_| {
        PyTypeError::new_err(format!(
            "messages[{position}] is not a dict with role and content"
        ))
    })?;
    let mut known = [
        ("role", None),
        ("content", None),
        ("tool_calls", None),
        // Of OpenAI's interface; results are matched with calls by their order.
        ("tool_call_id", None),
        ("name", None),
    ];
    for key in mapping.keys()? {
        let Some(slot) = known
            .iter_mut()
            .find(|(name, _)| key.eq(name).unwrap_or(false))
        else {
            let key = format!("messages[{position}][{}]", key.repr()?);
            let help = "a message has a role and a content, and tool_calls, tool_call_id and name with tools";
            return Err(Failure::invalid("unknown key of a message", &key, "", help).into());
        };
        slot.1 = Some(mapping.get_item(key)?);
    }
    let calls = match known[2].1.take() {
        Some(calls) => constraint::calls(&format!("messages[{position}]['tool_calls']"), &calls)?,
        None => Vec::new(),
    };
    // OpenAI's interface gives a message that is all calls no content.
    let is_none = |value: &Bound<'_, PyAny>| value.is_none();
    if !calls.is_empty() && known[1].1.as_ref().is_none_or(is_none) {
        known[1].1 = Some(PyString::new(item.py(), "").into_any());
    }
    let mut text = |at: usize| {
        let (name, value) = &mut known[at];
        let key = format!("messages[{position}]['{name}']");
        let Some(value) = value.take() else {
            let help = "a message has a role and a content";
            return Err(Failure::invalid("message is incomplete", &key, "", help).into());
        };
        value
            .cast::<PyString>()
            .map_err(|_| PyTypeError::new_err(format!("{key} is not a str")))?
            .extract::<String>()
    };
    let (role, content) = (text(0)?, text(1)?);
    let unknown = known[3..].iter().find(|(_, value)| value.is_some());
    if let (Some((name, _)), false) = (unknown, is_result(&role)) {
        let key = format!("messages[{position}]['{name}']");
        let help = "only the result of a tool has it";
        return Err(Failure::invalid("unknown key of a message", &key, "", help).into());
    }
    Ok(Message::new(role, content).with_tool_calls(calls))
}

fn is_result(role: &str) -> bool {
    matches!(role, "tool" | "function")
}

/// Messages as the dicts they came as.
pub(crate) fn to_dicts<'py>(py: Python<'py>, messages: &[Message]) -> PyResult<Bound<'py, PyList>> {
    let dicts = messages.iter().map(|message| {
        let dict = pyo3::types::PyDict::new(py);
        dict.set_item("role", &message.role)?;
        dict.set_item("content", &message.content)?;
        if !message.tool_calls.is_empty() {
            let calls = message.tool_calls.iter();
            let calls = calls.map(|call| constraint::to_dict(py, call));
            dict.set_item("tool_calls", calls.collect::<PyResult<Vec<_>>>()?)?;
        }
        Ok(dict)
    });
    PyList::new(py, dicts.collect::<PyResult<Vec<_>>>()?)
}

/// Text, token ids or messages.
pub(crate) struct AnyPrompt(pub(crate) Prompt);

impl<'py> FromPyObject<'_, 'py> for AnyPrompt {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(text) = object.cast::<PyString>() {
            return Ok(Self(Prompt::Text(text.extract()?)));
        }
        let first = if object.len().is_ok_and(|len| len > 0) {
            object.get_item(0).ok()
        } else {
            None
        };
        if first.is_some_and(|first| first.cast::<PyMapping>().is_ok()) {
            return Ok(Self(Prompt::Chat(object.extract::<Messages>()?.0)));
        }
        match object.extract::<TokenIds>() {
            Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => {
                Err(PyTypeError::new_err(format!(
                    "a prompt is a str, a sequence of token ids or a sequence of messages: {}",
                    error.value(object.py())
                )))
            }
            tokens => Ok(Self(Prompt::Tokens(tokens?.0))),
        }
    }
}

/// Where a model is: a path, or text that is a path or an id.
pub(crate) struct AnySource(pub(crate) Source);

impl<'py> FromPyObject<'_, 'py> for AnySource {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.extract::<String>() {
            Ok(text) => Ok(Self(text.into())),
            Err(_) => Ok(Self(object.extract::<PathBuf>()?.into())),
        }
    }
}
