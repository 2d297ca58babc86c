//! Status codes and error objects.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char};
use std::path::Path;
use std::sync::OnceLock;

use qwen2_core::ErrorKind;

use crate::fence;
use crate::values::{c_string, pointer};

/// `QWEN2_OK`, `QWEN2_DONE`, `QWEN2_PENDING` or one of `QWEN2_ERROR_*`. Values only get added.
pub type qwen2_status = i32;

/// Success.
pub const QWEN2_OK: qwen2_status = 0;
/// A stream or a request has ended; not an error.
pub const QWEN2_DONE: qwen2_status = -1;
/// A request has no piece yet; not an error.
pub const QWEN2_PENDING: qwen2_status = -2;
/// An argument is out of its range or contradicts another one; NULL and freed handles; text that is
/// not UTF-8.
pub const QWEN2_ERROR_INVALID_ARGUMENT: qwen2_status = 1;
/// A file, directory or model id does not exist.
pub const QWEN2_ERROR_NOT_FOUND: qwen2_status = 2;
/// The operating system refuses access.
pub const QWEN2_ERROR_PERMISSION_DENIED: qwen2_status = 3;
/// Reading or writing failed.
pub const QWEN2_ERROR_IO: qwen2_status = 4;
/// A file is there but does not hold what it must.
pub const QWEN2_ERROR_INVALID_FILE: qwen2_status = 5;
/// Well-formed, but something this build or this library does not do.
pub const QWEN2_ERROR_UNSUPPORTED: qwen2_status = 6;
/// Prompt and new tokens do not fit the context.
pub const QWEN2_ERROR_CONTEXT_OVERFLOW: qwen2_status = 7;
/// Memory of the host or of the device is exhausted.
pub const QWEN2_ERROR_OUT_OF_MEMORY: qwen2_status = 8;
/// The device was not compiled in or is not there.
pub const QWEN2_ERROR_DEVICE_UNAVAILABLE: qwen2_status = 9;
/// The device failed while it worked.
pub const QWEN2_ERROR_DEVICE_FAILED: qwen2_status = 10;
/// A model could not be fetched.
pub const QWEN2_ERROR_NETWORK: qwen2_status = 11;
/// The chat template cannot be parsed or rendered.
pub const QWEN2_ERROR_INVALID_TEMPLATE: qwen2_status = 12;
/// A schema or grammar cannot be compiled.
pub const QWEN2_ERROR_INVALID_CONSTRAINT: qwen2_status = 13;
/// The caller stopped it: a callback the loading or the generation, the end of an engine its requests.
pub const QWEN2_ERROR_CANCELLED: qwen2_status = 14;
/// A bug of this library.
pub const QWEN2_ERROR_INTERNAL: qwen2_status = 99;

/// What went wrong, where, and the way out. Owned by the caller that received it.
#[derive(Clone, Debug)]
pub struct qwen2_error {
    kind: ErrorKind,
    message: CString,
    help: Option<CString>,
    path: Option<CString>,
    key: Option<CString>,
}

impl qwen2_error {
    /// A bad argument found on this side of the border.
    pub(crate) fn invalid(key: &str, what: &str, why: Option<String>, help: &str) -> Box<Self> {
        Self::new(ErrorKind::InvalidArgument, key, what, why, help)
    }

    /// A failure of this side of the border, worded as the core words its errors.
    pub(crate) fn new(
        kind: ErrorKind,
        key: &str,
        what: &str,
        why: Option<String>,
        help: &str,
    ) -> Box<Self> {
        let why = why.map(|why| format!(": {why}")).unwrap_or_default();
        Box::new(Self {
            kind,
            message: c_string(&format!("{what}: {key}{why}")),
            help: Some(c_string(help)),
            path: None,
            key: Some(c_string(key)),
        })
    }

    pub(crate) fn internal(why: &str) -> Self {
        Self {
            kind: ErrorKind::Internal,
            message: c_string(&format!("library panicked: {why}")),
            help: Some(c_string("this is a bug of qwen2, please report it")),
            path: None,
            key: None,
        }
    }

    pub(crate) fn code(&self) -> qwen2_status {
        self.kind.code()
    }

    #[cfg(test)]
    pub(crate) fn message(&self) -> &str {
        self.message.to_str().unwrap_or_default()
    }
}

impl From<qwen2_core::Error> for Box<qwen2_error> {
    fn from(error: qwen2_core::Error) -> Self {
        let path = error.path().map(Path::to_string_lossy);
        Box::new(qwen2_error {
            kind: error.kind(),
            message: c_string(&error.to_string()),
            help: error.help().map(c_string),
            path: path.as_deref().map(c_string),
            key: error.key().map(c_string),
        })
    }
}

/// The status that the failed function returned; `QWEN2_OK` for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_error_code(error: *const qwen2_error) -> qwen2_status {
    fence::read(error, QWEN2_OK, qwen2_error::code)
}

/// One line, `what: where: why`; never NULL. Valid until the error is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_error_message(error: *const qwen2_error) -> *const c_char {
    fence::read(error, c"".as_ptr(), |error| error.message.as_ptr())
}

/// The way out, a sentence for a person, or NULL. Valid until the error is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_error_help(error: *const qwen2_error) -> *const c_char {
    fence::read(error, std::ptr::null(), |error| {
        pointer(error.help.as_deref())
    })
}

/// The file or directory concerned, or NULL. Valid until the error is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_error_path(error: *const qwen2_error) -> *const c_char {
    fence::read(error, std::ptr::null(), |error| {
        pointer(error.path.as_deref())
    })
}

/// The tensor, config key, option or argument concerned, or NULL. Valid until the error is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_error_key(error: *const qwen2_error) -> *const c_char {
    fence::read(error, std::ptr::null(), |error| {
        pointer(error.key.as_deref())
    })
}

/// Frees an error; NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_error_free(error: *mut qwen2_error) {
    fence::free(error);
}

/// The name of a status, for example "invalid_argument"; "unknown" for a number that is none. Never
/// freed.
#[unsafe(no_mangle)]
pub extern "C" fn qwen2_status_name(status: qwen2_status) -> *const c_char {
    static NAMES: OnceLock<BTreeMap<qwen2_status, CString>> = OnceLock::new();
    match status {
        QWEN2_OK => c"ok".as_ptr(),
        QWEN2_DONE => c"done".as_ptr(),
        QWEN2_PENDING => c"pending".as_ptr(),
        code => {
            let rows = || {
                ErrorKind::ALL
                    .iter()
                    .map(|kind| (kind.code(), c_string(kind.name())))
            };
            let names = NAMES.get_or_init(|| rows().collect());
            names
                .get(&code)
                .map_or(c"unknown".as_ptr(), |name| name.as_ptr())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_the_core_has_its_constant() {
        let constants = [
            QWEN2_ERROR_INVALID_ARGUMENT,
            QWEN2_ERROR_NOT_FOUND,
            QWEN2_ERROR_PERMISSION_DENIED,
            QWEN2_ERROR_IO,
            QWEN2_ERROR_INVALID_FILE,
            QWEN2_ERROR_UNSUPPORTED,
            QWEN2_ERROR_CONTEXT_OVERFLOW,
            QWEN2_ERROR_OUT_OF_MEMORY,
            QWEN2_ERROR_DEVICE_UNAVAILABLE,
            QWEN2_ERROR_DEVICE_FAILED,
            QWEN2_ERROR_NETWORK,
            QWEN2_ERROR_INVALID_TEMPLATE,
            QWEN2_ERROR_INVALID_CONSTRAINT,
            QWEN2_ERROR_CANCELLED,
            QWEN2_ERROR_INTERNAL,
        ];
        assert_eq!(constants, ErrorKind::ALL.map(ErrorKind::code));
    }
}
