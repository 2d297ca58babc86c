//! What a session forgets on demand: its last messages, or what is old.

use std::ops::Range;

use super::Session;
use crate::error::{Error, ErrorKind, Result};
use crate::text::Message;

impl Session {
    /// Takes back the last `n_messages` messages, answers of the model included. After one of them the
    /// model may answer anew, and what is left is still in the cache.
    ///
    /// # Errors
    /// `InvalidArgument` if there are fewer messages, as in a session of text, and those of the chat
    /// template; the session is unchanged then.
    pub fn rollback(&mut self, n_messages: usize) -> Result<()> {
        let len = self.messages.len();
        let left = len.checked_sub(n_messages).ok_or_else(|| {
            let why = format!("{n_messages}, the session has {len}");
            refused("n_messages", "session has fewer messages", &why)
                .with_help("in a session of text and tokens truncate forgets the end")
        })?;
        self.keep_messages(self.messages[..left].to_vec())
    }

    /// Makes room in a session of text: forgets `n_tokens` tokens behind the first `keep_first`. What
    /// stands behind them is read again at the next generation, in its new place, so that the session
    /// is as if it had been told only what is left.
    ///
    /// Nothing is ever forgotten unless this, [`Session::shift_messages`], [`Session::rollback`] or
    /// [`Session::truncate`] is called: a full context ends a generation.
    ///
    /// # Errors
    /// `InvalidArgument` if there are fewer tokens, or for a session of messages, whose turns it would
    /// cut; the session is unchanged then.
    pub fn shift(&mut self, keep_first: usize, n_tokens: usize) -> Result<()> {
        if !self.messages.is_empty() {
            return Err(refused(
                "session",
                "session holds messages",
                "their turns would be cut",
            )
            .with_help("shift_messages forgets whole messages"));
        }
        let dropped = inside("n_tokens", keep_first, n_tokens, self.tokens.len())?;
        let mut tokens = self.tokens.clone();
        tokens.drain(dropped);
        self.adopt(tokens);
        Ok(())
    }

    /// Makes room in a conversation: forgets `n_messages` messages behind the first `keep_first`, such as
    /// 1 for a system prompt. The rest is read again at the next generation, as with [`Session::shift`].
    ///
    /// # Errors
    /// `InvalidArgument` if there are fewer messages, and those of the chat template; the session is
    /// unchanged then.
    pub fn shift_messages(&mut self, keep_first: usize, n_messages: usize) -> Result<()> {
        let dropped = inside("n_messages", keep_first, n_messages, self.messages.len())?;
        let mut messages = self.messages.clone();
        messages.drain(dropped);
        self.keep_messages(messages)
    }

    fn keep_messages(&mut self, messages: Vec<Message>) -> Result<()> {
        if messages.len() == self.messages.len() {
            return Ok(()); // a session of text stays one
        }
        let tokens = match messages.is_empty() {
            true => Vec::new(),
            false => self.model.tokenizer().encode_chat(&messages, true)?,
        };
        self.adopt(tokens);
        self.messages = messages;
        Ok(())
    }
}

/// `n` of `len` behind the first `keep_first`.
fn inside(key: &str, keep_first: usize, n: usize, len: usize) -> Result<Range<usize>> {
    match keep_first.checked_add(n) {
        Some(end) if end <= len => Ok(keep_first..end),
        _ => {
            let why = format!("{n} behind {keep_first}, the session has {len}");
            Err(refused(key, "session is shorter", &why))
        }
    }
}

fn refused(key: &str, what: &str, why: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
        .with_key(key)
        .with_why(why)
}
