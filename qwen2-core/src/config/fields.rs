//! Typed reading of a JSON object: every error names the file, the key and what was expected.

use std::ops::RangeInclusive;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};

const REPAIR: &str = "correct the file, or download it again";

/// The keys of one object; `null` counts as absent, as it does for transformers.
pub(super) struct Fields<'a> {
    object: Map<String, Value>,
    path: &'a Path,
    /// Put before every key in errors: `rope_scaling.`
    prefix: String,
}

impl<'a> Fields<'a> {
    /// Parses `bytes`, the contents of `path`.
    ///
    /// # Errors
    /// `InvalidFile` for text that is not UTF-8, not JSON, or not an object.
    pub(super) fn parse(bytes: &[u8], path: &'a Path) -> Result<Self> {
        let invalid = |what: &str, why: String| {
            Error::new(ErrorKind::InvalidFile, what)
                .with_path(path)
                .with_why(why)
                .with_help(REPAIR)
        };
        let text = std::str::from_utf8(bytes).map_err(|error| {
            invalid("file is not UTF-8", format!("byte {}", error.valid_up_to()))
        })?;
        match serde_json::from_str(text) {
            Ok(Value::Object(object)) => Ok(Self {
                object,
                path,
                prefix: String::new(),
            }),
            Ok(other) => Err(invalid(
                "file is not a JSON object",
                format!("found {}", brief(&other)),
            )),
            Err(error) => {
                Err(invalid("file is not valid JSON", json_why(&error)).with_source(error))
            }
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is written at all, be it as `null`.
    pub(super) fn is_written(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(super) fn array(&self, key: &str) -> Result<Option<&Vec<Value>>> {
        self.typed(key, "a list", Value::as_array)
    }

    /// The object under `key`, with its own place in errors.
    pub(super) fn object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        let object = self.typed(key, "an object", Value::as_object)?;
        Ok(object.map(|object| Fields {
            object: object.clone(),
            path: self.path,
            prefix: format!("{}{key}.", self.prefix),
        }))
    }

    /// A whole number from `range`.
    pub(super) fn integer(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.typed(key, "a whole number", whole)? else {
            return Ok(None);
        };
        match value.as_u64().and_then(|value| usize::try_from(value).ok()) {
            Some(size) if range.contains(&size) => Ok(Some(size)),
            _ => Err(self.out_of_range(key, &format!("{} to {}", range.start(), range.end()))),
        }
    }

    /// Like [`Self::integer`], for a key that must be there.
    pub(super) fn required_integer(
        &self,
        key: &str,
        range: RangeInclusive<usize>,
    ) -> Result<usize> {
        self.integer(key, range)?.ok_or_else(|| self.missing(key))
    }

    /// A finite number above zero.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.number(key, "a finite number above 0", |number| number > 0.0)
    }

    /// A finite number that `accept` accepts; `expected` says which.
    pub(super) fn number(
        &self,
        key: &str,
        expected: &str,
        accept: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>> {
        match self.typed(key, "a number", Value::as_f64)? {
            Some(number) if !number.is_finite() || !accept(number) => {
                Err(self.out_of_range(key, expected))
            }
            number => Ok(number),
        }
    }

    /// A token id.
    pub(super) fn id(&self, key: &str) -> Result<Option<u32>> {
        Ok(self
            .integer(key, 0..=u32::MAX as usize)?
            .map(|id| id as u32))
    }

    /// Token ids written as one number or as a list.
    pub(super) fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let as_id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let read = |value: &Value| match value {
            Value::Array(ids) => ids.iter().map(as_id).collect(),
            one => as_id(one).map(|id| vec![id]),
        };
        Ok(self
            .typed(key, "a token id or a list of them", read)?
            .unwrap_or_default())
    }

    fn typed<'b, T>(
        &'b self,
        key: &str,
        expected: &str,
        read: impl Fn(&'b Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self
                .error(
                    ErrorKind::InvalidFile,
                    "config value has the wrong type",
                    key,
                )
                .with_why(format!("expected {expected}, found {}", brief(value)))),
        }
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        self.error(ErrorKind::InvalidFile, "config key is missing", key)
            .with_help("is this the file of a Qwen2 checkpoint? download it again")
    }

    pub(super) fn out_of_range(&self, key: &str, expected: &str) -> Error {
        let found = self.get(key).map_or_else(|| "nothing".to_owned(), brief);
        self.error(ErrorKind::InvalidFile, "config value is out of range", key)
            .with_why(format!("expected {expected}, found {found}"))
    }

    /// Two keys that cannot both be right.
    pub(super) fn contradiction(&self, key: &str, why: String) -> Error {
        self.error(
            ErrorKind::InvalidFile,
            "config values contradict each other",
            key,
        )
        .with_why(why)
    }

    /// Well-formed, but not done by this library.
    pub(super) fn unsupported(&self, what: &str, key: &str, why: &str, help: &str) -> Error {
        self.error(ErrorKind::Unsupported, what, key)
            .with_why(one_line(why))
            .with_help(help)
    }

    fn error(&self, kind: ErrorKind, what: &str, key: &str) -> Error {
        let key = format!("{}{key}", self.prefix);
        Error::new(kind, what)
            .with_path(self.path)
            .with_key(key)
            .with_help(REPAIR)
    }
}

/// serde_json's text with the place first.
pub(crate) fn json_why(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let message = text
        .rfind(" at line ")
        .map_or(text.as_str(), |end| &text[..end]);
    let message = one_line(message);
    format!(
        "line {}, column {}: {message}",
        error.line(),
        error.column()
    )
}

fn whole(value: &Value) -> Option<&Value> {
    (value.is_u64() || value.is_i64()).then_some(value)
}

/// The value as JSON, short enough for one line.
fn brief(value: &Value) -> String {
    cut(one_line(&value.to_string()), 40)
}

/// A name out of a file as an error shows it: without line breaks or escape sequences, and cut.
pub(crate) fn one_line(text: &str) -> String {
    let printable = |c: char| {
        if c.is_control() {
            c.escape_default().to_string()
        } else {
            c.to_string()
        }
    };
    cut(text.chars().take(200).map(printable).collect(), 120)
}

fn cut(text: String, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
