//! The switch that ends a generation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::ops::Watch;

/// A switch that ends generations from any thread; clones share it.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A switch that is off.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends every generation that holds this token, in the middle of a forward too: on the processor
    /// within some milliseconds. One atomic store: safe in a signal handler. There is no way back.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Ends forwards, too.
    pub(crate) fn watch(&self) -> Watch {
        Watch::of(Arc::clone(&self.0))
    }

    /// Whether [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Two tokens are equal when they are the same switch.
impl PartialEq for CancelToken {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for CancelToken {}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_of_a_cancel_token_are_one_switch() {
        let token = CancelToken::new();
        let clone = token.clone();
        assert_ne!(token, CancelToken::new());
        clone.cancel();
        assert!(token.is_cancelled());
        assert_eq!(token, clone);
    }
}
