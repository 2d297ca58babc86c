//! How far the reading of a prompt is, for those who wait for it.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use super::CancelToken;
use crate::ops::Watch;

/// How much of a prompt was read.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillProgress {
    /// Tokens that were read, those that were in the cache included. Layers count: half of the layers
    /// of a chunk are half of its tokens.
    pub tokens_done: usize,
    /// Tokens of the prompt.
    pub tokens_total: usize,
}

/// Called while a prompt is read, on the thread that asked for the first piece: after every layer of
/// every chunk, the last time with all tokens done. `Break` ends the generation as a [`CancelToken`]
/// does. On a GPU it runs ahead of the device.
#[derive(Clone)]
pub struct OnPrefill(Arc<Callback>);

type Callback = dyn Fn(PrefillProgress) -> ControlFlow<()> + Send + Sync;

impl OnPrefill {
    /// Calls `callback`, which must not call into the same session.
    pub fn new(
        callback: impl Fn(PrefillProgress) -> ControlFlow<()> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(callback))
    }

    /// `watch` over `n` tokens behind `n_past` of `total`.
    pub(crate) fn over(
        &self,
        watch: &Watch,
        cancel: &CancelToken,
        (n_past, n, total): (usize, usize, usize),
    ) -> Watch {
        let (callback, cancel) = (Arc::clone(&self.0), cancel.clone());
        Watch {
            on_layer: Some(Arc::new(move |done, all| {
                let progress = PrefillProgress {
                    tokens_done: n_past + n * done / all,
                    tokens_total: total,
                };
                if callback(progress).is_break() {
                    cancel.cancel();
                }
            })),
            ..watch.clone()
        }
    }
}

impl fmt::Debug for OnPrefill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnPrefill")
    }
}

/// Two are equal when they are the same callback.
impl PartialEq for OnPrefill {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
