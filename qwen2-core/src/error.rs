//! The one error type, and the one table that maps its kinds to C codes and Python classes.

use std::fmt;
use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Source = Box<dyn std::error::Error + Send + Sync + 'static>;

/// What went wrong, where, and the way out.
///
/// One pointer wide. `Display` is one line, `what: where: why`; `Debug` adds the help and the
/// chain of sources.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    what: String,
    path: Option<PathBuf>,
    key: Option<String>,
    why: Option<String>,
    help: Option<String>,
    source: Option<Source>,
}

/// The class of an [`Error`]; the numbers are the status codes of the C interface.
///
/// Values are only ever added.
#[non_exhaustive]
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// An argument is out of its range or contradicts another one.
    InvalidArgument = 1,
    /// A file, directory or model id does not exist.
    NotFound = 2,
    /// The operating system refuses access.
    PermissionDenied = 3,
    /// Reading or writing failed.
    Io = 4,
    /// A file is there but does not hold what it must.
    InvalidFile = 5,
    /// Well-formed, but something this build or this library does not do.
    Unsupported = 6,
    /// Prompt and new tokens do not fit the context.
    ContextOverflow = 7,
    /// Memory of the host or of the device is exhausted.
    OutOfMemory = 8,
    /// The device was not compiled in or is not there.
    DeviceUnavailable = 9,
    /// The device failed while it worked.
    DeviceFailed = 10,
    /// A model could not be fetched.
    Network = 11,
    /// The chat template cannot be parsed or rendered.
    InvalidTemplate = 12,
    /// A schema or grammar cannot be compiled.
    InvalidConstraint = 13,
    /// The caller stopped it: loading or a generation by a callback, logits and scores by a switch, a request
    /// by closing its engine.
    Cancelled = 14,
    /// A bug of this library.
    Internal = 99,
}

impl ErrorKind {
    /// Every kind, in the order of the codes.
    pub const ALL: [ErrorKind; 15] = [
        Self::InvalidArgument,
        Self::NotFound,
        Self::PermissionDenied,
        Self::Io,
        Self::InvalidFile,
        Self::Unsupported,
        Self::ContextOverflow,
        Self::OutOfMemory,
        Self::DeviceUnavailable,
        Self::DeviceFailed,
        Self::Network,
        Self::InvalidTemplate,
        Self::InvalidConstraint,
        Self::Cancelled,
        Self::Internal,
    ];

    /// The status code of the C interface.
    pub fn code(self) -> i32 {
        self as i32
    }

    /// The name as Python's `Qwen2Error.kind` gives it, `snake_case`.
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// The Python class that is raised.
    pub fn python_class(self) -> &'static str {
        self.row().1
    }

    /// The builtin exception that the Python class also derives from.
    pub fn python_base(self) -> &'static str {
        self.row().2
    }

    // No `_` arm: a new kind does not compile until its row exists.
    fn row(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::InvalidArgument => ("invalid_argument", "InvalidArgumentError", "ValueError"),
            Self::NotFound => ("not_found", "NotFoundError", "FileNotFoundError"),
            Self::PermissionDenied => (
                "permission_denied",
                "PermissionDeniedError",
                "PermissionError",
            ),
            Self::Io => ("io", "IoError", "OSError"),
            Self::InvalidFile => ("invalid_file", "InvalidFileError", "ValueError"),
            Self::Unsupported => ("unsupported", "UnsupportedError", "NotImplementedError"),
            Self::ContextOverflow => ("context_overflow", "ContextOverflowError", "ValueError"),
            Self::OutOfMemory => ("out_of_memory", "OutOfMemoryError", "MemoryError"),
            Self::DeviceUnavailable => (
                "device_unavailable",
                "DeviceUnavailableError",
                "RuntimeError",
            ),
            Self::DeviceFailed => ("device_failed", "DeviceFailedError", "RuntimeError"),
            Self::Network => ("network", "NetworkError", "ConnectionError"),
            Self::InvalidTemplate => ("invalid_template", "InvalidTemplateError", "ValueError"),
            Self::InvalidConstraint => {
                ("invalid_constraint", "InvalidConstraintError", "ValueError")
            }
            Self::Cancelled => ("cancelled", "CancelledError", "RuntimeError"),
            Self::Internal => ("internal", "InternalError", "RuntimeError"),
        }
    }
}

impl Error {
    /// `what`: lower case, no full stop, for example `tensor has the wrong shape`.
    pub(crate) fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            what: what.into(),
            path: None,
            key: None,
            why: None,
            help: None,
            source: None,
        }))
    }

    pub(crate) fn with_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.path = Some(path.into());
        self
    }

    pub(crate) fn with_key(mut self, key: impl Into<String>) -> Self {
        self.0.key = Some(key.into());
        self
    }

    pub(crate) fn with_why(mut self, why: impl Into<String>) -> Self {
        self.0.why = Some(why.into());
        self
    }

    pub(crate) fn with_help(mut self, help: impl Into<String>) -> Self {
        self.0.help = Some(help.into());
        self
    }

    pub(crate) fn with_source(mut self, source: impl Into<Source>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What a [`LogitsProcessor`](crate::LogitsProcessor) of the caller's returns to end the generation: an
    /// error of the kind `Cancelled`, with the reason as its source.
    pub fn stopped(reason: impl Into<Box<dyn std::error::Error + Send + Sync + 'static>>) -> Self {
        let reason = reason.into();
        Self::new(
            ErrorKind::Cancelled,
            "logits processor stopped the generation",
        )
        .with_why(reason.to_string())
        .with_source(reason)
    }

    /// An `std::io::Error` met while working on `path`, with its kind translated.
    pub(crate) fn io(what: impl Into<String>, path: &Path, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            std::io::ErrorKind::OutOfMemory => ErrorKind::OutOfMemory,
            _ => ErrorKind::Io,
        };
        Self::new(kind, what)
            .with_path(path)
            .with_why(source.to_string())
            .with_source(source)
    }

    /// The class of the error.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file or directory concerned.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The tensor, config key or option concerned.
    pub fn key(&self) -> Option<&str> {
        self.0.key.as_deref()
    }

    /// The way out, a sentence for a person.
    pub fn help(&self) -> Option<&str> {
        self.0.help.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.what)?;
        if let Some(path) = &self.0.path {
            write!(f, ": {}", path.display())?;
        }
        if let Some(key) = &self.0.key {
            write!(f, ": {key}")?;
        }
        if let Some(why) = &self.0.why {
            write!(f, ": {why}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} [{}]", self.0.kind.name())?;
        if let Some(help) = &self.0.help {
            write!(f, "\nhelp: {help}")?;
        }
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            write!(f, "\ncaused by: {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_one_line_of_what_where_why() {
        let error = Error::new(ErrorKind::InvalidFile, "tensor has the wrong shape")
            .with_path("/m/model.safetensors")
            .with_key("model.norm.weight")
            .with_why("expected [8], found [9]")
            .with_help("is this file from another checkpoint?");
        assert_eq!(
            error.to_string(),
            "tensor has the wrong shape: /m/model.safetensors: model.norm.weight: expected [8], found [9]"
        );
        assert!(format!("{error:?}").contains("help: is this file from another checkpoint?"));
    }

    #[test]
    fn every_kind_has_its_own_code_name_and_class() {
        let mut seen = std::collections::BTreeSet::new();
        for kind in ErrorKind::ALL {
            assert!(seen.insert(kind.code().to_string()));
            assert!(seen.insert(kind.name().to_owned()));
            assert!(seen.insert(kind.python_class().to_owned()));
        }
    }
}
