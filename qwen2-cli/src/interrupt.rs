//! Ctrl-C: stops the answer that is being written; the program, where there is none.

use std::sync::{Mutex, PoisonError};

use qwen2_core::CancelToken;

/// The answer that is being written.
static ANSWER: Mutex<Option<CancelToken>> = Mutex::new(None);

/// What a shell reports for a program that Ctrl-C ended: 128 + SIGINT.
const EXIT_CODE: i32 = 130;

/// Takes Ctrl-C over for this process.
pub(crate) fn install() {
    // Without the handler Ctrl-C ends the program, which is no reason not to run it.
    let _ = ctrlc::set_handler(|| match answer().take() {
        Some(token) => token.cancel(),
        None => std::process::exit(EXIT_CODE),
    });
}

/// While this lives, Ctrl-C stops the answer that holds the token.
pub(crate) struct Guard(CancelToken);

impl Guard {
    pub(crate) fn new() -> Self {
        let token = CancelToken::new();
        *answer() = Some(token.clone());
        Self(token)
    }

    pub(crate) fn token(&self) -> CancelToken {
        self.0.clone()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        *answer() = None;
    }
}

fn answer() -> std::sync::MutexGuard<'static, Option<CancelToken>> {
    ANSWER.lock().unwrap_or_else(PoisonError::into_inner)
}
