//! Text to tokens and tokens to text.

use std::ffi::{CString, c_char};

use qwen2_core::Tokenizer;

use crate::error::{qwen2_error, qwen2_status};
use crate::fence::{self, Handle};
use crate::model::qwen2_model;
use crate::prompt::qwen2_prompt;
use crate::values::{c_string, pointer, qwen2_text, qwen2_tokens};

/// Turns text into tokens and back; needs no weights. Never changes, and is shared by any number of
/// threads.
pub struct qwen2_tokenizer {
    tokenizer: Tokenizer,
    chat_template: Option<CString>,
}

impl Handle for qwen2_tokenizer {
    const TYPE: &'static str = "qwen2_tokenizer";
}

impl From<Tokenizer> for qwen2_tokenizer {
    fn from(tokenizer: Tokenizer) -> Self {
        Self {
            chat_template: tokenizer.chat_template().map(c_string),
            tokenizer,
        }
    }
}

/// Reads a tokenizer without weights: `path` is a directory with `tokenizer.json`, or that file.
/// `*out` is freed with `qwen2_tokenizer_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_load(
    path: *const c_char,
    len: usize,
    out: *mut *mut qwen2_tokenizer,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let tokenizer = Tokenizer::load(fence::path(path, len)?)?;
        Ok(out.set(fence::give(qwen2_tokenizer::from(tokenizer))))
    })
}

/// The model's tokenizer, a handle of its own: freed with `qwen2_tokenizer_free`, also after the
/// model. NULL for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_tokenizer(model: *const qwen2_model) -> *mut qwen2_tokenizer {
    fence::read(model, std::ptr::null_mut(), |model| {
        fence::give(qwen2_tokenizer::from(model.model.tokenizer().clone()))
    })
}

/// Frees a tokenizer; NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_free(tokenizer: *mut qwen2_tokenizer) {
    fence::free(tokenizer);
}

/// The tokens of a text, all of it ordinary text: "<|im_end|>" becomes the tokens of these ten
/// characters. `*out` is freed with `qwen2_tokens_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_encode(
    tokenizer: *const qwen2_tokenizer,
    text: *const c_char,
    len: usize,
    out: *mut *mut qwen2_tokens,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let tokenizer = &fence::borrow(tokenizer)?.tokenizer;
        let tokens = tokenizer.encode(fence::text(text, len, "text")?)?;
        Ok(out.set(fence::give(qwen2_tokens(tokens))))
    })
}

/// As `qwen2_tokenizer_encode`, with special tokens recognised. Never for untrusted text: whoever
/// writes "<|im_end|>" ends the turn.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_encode_with_special_tokens(
    tokenizer: *const qwen2_tokenizer,
    text: *const c_char,
    len: usize,
    out: *mut *mut qwen2_tokens,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let tokenizer = &fence::borrow(tokenizer)?.tokenizer;
        let tokens = tokenizer.encode_with_special_tokens(fence::text(text, len, "text")?)?;
        Ok(out.set(fence::give(qwen2_tokens(tokens))))
    })
}

/// The tokens of a conversation through the chat template: what the template prints becomes control
/// tokens, what the messages hold never does. Not 0 in `add_generation_prompt`: with the beginning of
/// an answer behind it. `*out` is freed with `qwen2_tokens_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_encode_chat(
    tokenizer: *const qwen2_tokenizer,
    messages: *const qwen2_prompt,
    add_generation_prompt: i32,
    out: *mut *mut qwen2_tokens,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let tokenizer = &fence::borrow(tokenizer)?.tokenizer;
        let messages = fence::borrow(messages)?.messages()?;
        let tokens = tokenizer.encode_chat(messages, add_generation_prompt != 0)?;
        Ok(out.set(fence::give(qwen2_tokens(tokens))))
    })
}

/// The text that the chat template makes of the messages, for showing: to feed a model use
/// `qwen2_tokenizer_encode_chat`. `*out` is freed with `qwen2_text_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_apply_chat_template(
    tokenizer: *const qwen2_tokenizer,
    messages: *const qwen2_prompt,
    add_generation_prompt: i32,
    out: *mut *mut qwen2_text,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let tokenizer = &fence::borrow(tokenizer)?.tokenizer;
        let messages = fence::borrow(messages)?.messages()?;
        let text = tokenizer.apply_chat_template(messages, add_generation_prompt != 0)?;
        Ok(out.set(fence::give(qwen2_text::from(text))))
    })
}

/// The text of tokens; bytes that are not UTF-8 become U+FFFD. Not 0 in `skip_special_tokens`: leaves
/// out tokens like "<|im_end|>". `*out` is freed with `qwen2_text_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_decode(
    tokenizer: *const qwen2_tokenizer,
    tokens: *const u32,
    n_tokens: usize,
    skip_special_tokens: i32,
    out: *mut *mut qwen2_text,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let tokenizer = &fence::borrow(tokenizer)?.tokenizer;
        let tokens = fence::slice(tokens, n_tokens, "tokens")?;
        let text = tokenizer.decode(tokens, skip_special_tokens != 0)?;
        Ok(out.set(fence::give(qwen2_text::from(text))))
    })
}

/// The highest id plus one; 0 for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_vocab_size(tokenizer: *const qwen2_tokenizer) -> u64 {
    fence::read(tokenizer, 0, |tokenizer| {
        tokenizer.tokenizer.vocab_size() as u64
    })
}

/// The id of a token by its name in the vocabulary, for example "<|im_end|>"; -1 if there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_token_to_id(
    tokenizer: *const qwen2_tokenizer,
    token: *const c_char,
    len: usize,
) -> i64 {
    fence::silent(-1, || {
        let tokenizer = &fence::borrow(tokenizer)?.tokenizer;
        let id = tokenizer.token_to_id(fence::text(token, len, "token")?);
        Ok(id.map_or(-1, i64::from))
    })
}

/// The token that ends a turn, from `tokenizer_config.json`; -1 if there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_eos_token_id(tokenizer: *const qwen2_tokenizer) -> i64 {
    fence::read(tokenizer, -1, |tokenizer| {
        tokenizer.tokenizer.eos_token_id().map_or(-1, i64::from)
    })
}

/// 1 for a control token, which decoding can leave out, else 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_is_special(
    tokenizer: *const qwen2_tokenizer,
    token: u32,
) -> i32 {
    fence::read(tokenizer, 0, |tokenizer| {
        i32::from(tokenizer.tokenizer.is_special(token))
    })
}

/// The Jinja source of the chat template, or NULL: base models may have none. Valid until the
/// tokenizer is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_tokenizer_chat_template(
    tokenizer: *const qwen2_tokenizer,
) -> *const c_char {
    fence::read(tokenizer, std::ptr::null(), |tokenizer| {
        pointer(tokenizer.chat_template.as_deref())
    })
}
