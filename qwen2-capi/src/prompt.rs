//! What a model answers to.

use std::ffi::c_char;

use qwen2_core::{Message, Prompt};

use crate::error::{QWEN2_OK, qwen2_error, qwen2_status};
use crate::fence::{self, Handle, Outcome};

/// A prompt: text, tokens or chat messages. A new one is empty, and can be used again and again.
#[derive(Default)]
pub struct qwen2_prompt(Option<Prompt>);

impl Handle for qwen2_prompt {
    const TYPE: &'static str = "qwen2_prompt";
}

impl qwen2_prompt {
    /// As the core takes it; the core refuses an empty one in its own words.
    pub(crate) fn get(&self) -> Prompt {
        self.0
            .clone()
            .unwrap_or_else(|| Prompt::Text(String::new()))
    }

    /// The messages of a prompt that has no other content.
    pub(crate) fn messages(&self) -> Outcome<&[Message]> {
        match &self.0 {
            None => Ok(&[]),
            Some(Prompt::Chat(messages)) => Ok(messages),
            Some(_) => Err(not_messages()),
        }
    }
}

impl qwen2_prompt {
    /// The last message of a prompt of messages.
    pub(crate) fn last_message(&mut self) -> Outcome<Option<&mut Message>> {
        match &mut self.0 {
            None => Ok(None),
            Some(Prompt::Chat(messages)) => Ok(messages.last_mut()),
            Some(_) => Err(not_messages()),
        }
    }
}

fn not_messages() -> Box<qwen2_error> {
    let help = "use one prompt for messages and another one for text or tokens, or clear it first";
    qwen2_error::invalid(
        "prompt",
        "prompt holds no messages",
        Some("it was set to text or tokens".to_owned()),
        help,
    )
}

/// An empty prompt. Freed with `qwen2_prompt_free`.
#[unsafe(no_mangle)]
pub extern "C" fn qwen2_prompt_new() -> *mut qwen2_prompt {
    fence::silent(std::ptr::null_mut(), || {
        Ok(fence::give(qwen2_prompt::default()))
    })
}

/// Frees a prompt; NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_prompt_free(prompt: *mut qwen2_prompt) {
    fence::free(prompt);
}

/// Empties the prompt.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_prompt_clear(prompt: *mut qwen2_prompt) {
    fence::change(prompt, |prompt| prompt.0 = None);
}

/// Makes it plain text, replacing what was there; special tokens in it are ordinary text. The text is
/// copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_prompt_set_text(
    prompt: *mut qwen2_prompt,
    text: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let prompt = fence::borrow_mut(prompt)?;
        prompt.0 = Some(Prompt::from(fence::text(text, len, "text")?));
        Ok(QWEN2_OK)
    })
}

/// Makes it token ids, special ones included, replacing what was there. The ids are copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_prompt_set_tokens(
    prompt: *mut qwen2_prompt,
    tokens: *const u32,
    n_tokens: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let prompt = fence::borrow_mut(prompt)?;
        prompt.0 = Some(Prompt::from(fence::slice(tokens, n_tokens, "tokens")?));
        Ok(QWEN2_OK)
    })
}

/// Adds a message to an empty prompt or behind its messages. `role` is "system", "user", "assistant",
/// "tool" or what the chat template knows besides; `content` is plain text, also where it spells
/// control tokens. Both are copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_prompt_add_message(
    prompt: *mut qwen2_prompt,
    role: *const c_char,
    role_len: usize,
    content: *const c_char,
    content_len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let prompt = fence::borrow_mut(prompt)?;
        let role = fence::text(role, role_len, "role")?;
        let message = Message::new(role, fence::text(content, content_len, "content")?);
        match &mut prompt.0 {
            None => prompt.0 = Some(Prompt::Chat(vec![message])),
            Some(Prompt::Chat(messages)) => messages.push(message),
            Some(_) => return Err(not_messages()),
        }
        Ok(QWEN2_OK)
    })
}
