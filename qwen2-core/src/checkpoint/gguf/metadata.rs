//! The values of a GGUF file by their keys, typed.

use std::path::Path;

use super::reader::{Header, Value, texts};
use crate::config::one_line;
use crate::error::{Error, ErrorKind, Result};

/// What a header says, and the file that its places are in.
#[derive(Clone, Copy)]
pub(super) struct Metadata<'a> {
    pub(super) header: &'a Header,
    pub(super) file: &'a [u8],
    pub(super) path: &'a Path,
}

impl<'a> Metadata<'a> {
    /// An error about the value of a key.
    pub(super) fn invalid(&self, key: &str, why: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidFile, "not a valid GGUF model")
            .with_path(self.path)
            .with_key(one_line(key))
            .with_why(why)
            .with_help("convert the checkpoint again with a current llama.cpp")
    }

    /// An error about a value that changes the arithmetic in a way that is not followed.
    pub(super) fn unsupported(&self, key: &str, why: impl Into<String>) -> Error {
        Error::new(ErrorKind::Unsupported, "GGUF value is not supported")
            .with_path(self.path)
            .with_key(one_line(key))
            .with_why(why)
            .with_help("convert the checkpoint again with a current llama.cpp")
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.header.metadata.get(key)
    }

    /// A number that is not negative; `None` without the key.
    pub(super) fn integer(&self, key: &str) -> Result<Option<u64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integer(number)) => u64::try_from(*number)
                .map(Some)
                .map_err(|_| self.invalid(key, format!("{number} is out of range"))),
            Some(_) => Err(self.invalid(key, "not an integer")),
        }
    }

    pub(super) fn required(&self, key: &str) -> Result<u64> {
        self.integer(key)?
            .ok_or_else(|| self.invalid(key, "missing"))
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(number)) if number.is_finite() => Ok(Some(*number)),
            Some(Value::Integer(number)) => Ok(Some(*number as f64)),
            Some(_) => Err(self.invalid(key, "not a finite number")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => std::str::from_utf8(&self.file[range.clone()])
                .map(Some)
                .map_err(|error| self.invalid(key, "not UTF-8").with_source(error)),
            Some(_) => Err(self.invalid(key, "not a string")),
        }
    }

    /// A list of strings, all of them UTF-8.
    pub(super) fn texts(&self, key: &str) -> Result<Vec<&'a str>> {
        let Some(Value::Texts(n, range)) = self.get(key) else {
            let why = if self.get(key).is_some() {
                "not a list of strings"
            } else {
                "missing"
            };
            return Err(self.invalid(key, why));
        };
        let list = texts(self.file, *n, range.clone()).enumerate();
        list.map(|(i, text)| {
            text.ok_or_else(|| self.invalid(key, format!("entry {i} is not UTF-8")))
        })
        .collect()
    }

    /// A list of 32-bit integers; empty without the key.
    pub(super) fn integers(&self, key: &str) -> Result<Vec<i32>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Integers(range)) => Ok(self.file[range.clone()]
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bytes| i32::from_le_bytes(*bytes))
                .collect()),
            Some(_) => Err(self.invalid(key, "not a list of 32-bit integers")),
        }
    }

    /// The rows of a tensor, the length of its first dimension.
    pub(super) fn rows(&self, tensor: &str) -> Option<usize> {
        self.tensor(tensor)?.shape.first().copied()
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&'a super::reader::Tensor> {
        self.header
            .tensors
            .iter()
            .find(|tensor| tensor.name == name)
    }
}
