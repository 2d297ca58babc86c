//! Results that are plain values: texts and arrays of tokens.

use std::ffi::{CStr, CString, c_char};

use crate::fence::{self, Handle};

/// A text that a function returned. Owned by the caller that received it; never changes.
pub struct qwen2_text(Terminated);

/// Token ids that a function returned. Owned by the caller that received it; never changes.
pub struct qwen2_tokens(pub(crate) Vec<u32>);

impl Handle for qwen2_text {
    const TYPE: &'static str = "qwen2_text";
}

impl Handle for qwen2_tokens {
    const TYPE: &'static str = "qwen2_tokens";
}

/// Text with a NUL behind it, for callers that do not look at its length; it may hold others.
#[derive(Default)]
pub(crate) struct Terminated(Vec<u8>);

impl Terminated {
    /// The start of the text; its length goes to `len` unless that is NULL.
    pub(crate) unsafe fn show(&self, len: *mut usize) -> *const c_char {
        fence::set_optional(len, self.0.len().saturating_sub(1));
        if self.0.is_empty() {
            c"".as_ptr()
        } else {
            self.0.as_ptr().cast()
        }
    }
}

impl From<String> for Terminated {
    fn from(text: String) -> Self {
        let mut bytes = text.into_bytes();
        bytes.push(0);
        Self(bytes)
    }
}

impl From<&str> for Terminated {
    fn from(text: &str) -> Self {
        Self::from(text.to_owned())
    }
}

impl From<String> for qwen2_text {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

/// Text that ends at its NUL; one inside it, which only foreign names can have, is shown as `\0`.
pub(crate) fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "\\0")).unwrap_or_default()
}

/// The start of a text, NULL for none.
pub(crate) fn pointer(text: Option<&CStr>) -> *const c_char {
    text.map_or(std::ptr::null(), CStr::as_ptr)
}

/// An array's start; its length goes to `len` unless that is NULL.
pub(crate) unsafe fn show<T>(items: &[T], len: *mut usize) -> *const T {
    fence::set_optional(len, items.len());
    items.as_ptr()
}

/// The text, NUL-terminated; `len` (may be NULL) gets its length in bytes. Valid until the text is
/// freed. NULL, and 0 in `len`, for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_text_data(
    text: *const qwen2_text,
    len: *mut usize,
) -> *const c_char {
    fence::set_optional(len, 0);
    fence::read(text, std::ptr::null(), |text| text.0.show(len))
}

/// Frees a text; NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_text_free(text: *mut qwen2_text) {
    fence::free(text);
}

/// The ids; `n_tokens` (may be NULL) gets their number. Valid until the tokens are freed. NULL, and
/// 0 in `n_tokens`, for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokens_data(
    tokens: *const qwen2_tokens,
    n_tokens: *mut usize,
) -> *const u32 {
    fence::set_optional(n_tokens, 0);
    fence::read(tokens, std::ptr::null(), |tokens| show(&tokens.0, n_tokens))
}

/// Frees tokens; NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokens_free(tokens: *mut qwen2_tokens) {
    fence::free(tokens);
}
