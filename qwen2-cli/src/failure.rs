//! Why a command ends without success, and how it says so.

use std::fmt;
use std::io;

use qwen2_core::{Error, ErrorKind};

use crate::output;

/// The end of a command: an exit code, and the lines that explain it.
#[derive(Debug)]
pub(crate) struct Failure {
    code: i32,
    message: Option<String>,
    help: Option<String>,
}

impl Failure {
    /// An error with the way out.
    pub(crate) fn new(message: impl fmt::Display, help: impl Into<String>) -> Self {
        Self {
            code: 1,
            message: Some(message.to_string()),
            help: Some(help.into()),
        }
    }

    /// An argument that makes no sense.
    pub(crate) fn usage(message: impl fmt::Display, help: impl Into<String>) -> Self {
        Self {
            code: 2,
            ..Self::new(message, help)
        }
    }

    /// An error whose lines are printed already.
    pub(crate) fn reported() -> Self {
        Self {
            code: 1,
            message: None,
            help: None,
        }
    }

    /// Ctrl-C: what there was to say has been said.
    pub(crate) fn interrupted() -> Self {
        Self {
            code: 130,
            message: None,
            help: None,
        }
    }

    /// Whether it ends a conversation as well: the reader has gone.
    pub(crate) fn is_silent(&self) -> bool {
        self.message.is_none()
    }

    /// Prints the lines `error:` and `help:` to stderr and returns the exit code.
    pub(crate) fn report(self) -> i32 {
        if let Some(message) = &self.message {
            output::note(&format!("error: {message}"));
        }
        if let Some(help) = &self.help {
            output::note(&format!("help: {help}"));
        }
        self.code
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = if error.kind() == ErrorKind::InvalidArgument {
            2
        } else {
            1
        };
        Self {
            code,
            message: Some(error.to_string()),
            help: error.help().map(str::to_owned),
        }
    }
}

/// Of our own reading and writing: stdin and stdout.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // `qwen2 … | head -1`: the reader has what it wanted.
            io::ErrorKind::BrokenPipe => Self {
                code: 0,
                message: None,
                help: None,
            },
            _ => Self {
                code: 1,
                message: Some(error.to_string()),
                help: None,
            },
        }
    }
}
