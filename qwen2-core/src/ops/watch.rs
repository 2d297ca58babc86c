//! Who looks on while a forward computes, and may end it.

use std::cell::RefCell;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What may end a forward before its time, and who is told how far it is. Once it is over it stays so.
#[derive(Clone, Default)]
pub(crate) struct Watch {
    /// Ends it when set.
    pub(crate) switch: Option<Arc<AtomicBool>>,
    /// Ends it from then on.
    pub(crate) deadline: Option<Instant>,
    /// Called with the layers that are done and their number, on the thread that computes.
    pub(crate) on_layer: Option<Arc<OnLayer>>,
}

pub(crate) type OnLayer = dyn Fn(usize, usize) + Send + Sync;

impl Watch {
    pub(crate) fn is_over(&self) -> bool {
        let is_set = |switch: &Arc<AtomicBool>| switch.load(Ordering::Acquire);
        self.switch.as_ref().is_some_and(is_set)
            || self
                .deadline
                .is_some_and(|deadline| Instant::now() >= deadline)
    }
}

thread_local! {
    static CURRENT: RefCell<Watch> = RefCell::default();
}

/// Runs `body` under `watch`: from when that is over, operations leave out what they have not begun, so
/// that `body` soon returns. Its result is worth nothing then.
pub(crate) fn watched<R>(watch: &Watch, body: impl FnOnce() -> R) -> R {
    struct Restore(Watch);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(std::mem::take(&mut self.0));
        }
    }
    let _restore = Restore(CURRENT.replace(watch.clone()));
    body()
}

/// The watch over this thread.
pub(crate) fn current() -> Watch {
    CURRENT.with_borrow(Clone::clone)
}

/// Says how many layers of how many are done; `Break`: the others are in vain.
pub(crate) fn layer_done(done: usize, all: usize) -> ControlFlow<()> {
    let watch = current();
    if let Some(on_layer) = &watch.on_layer {
        on_layer(done, all);
    }
    match watch.is_over() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("is_over", &self.is_over())
            .finish_non_exhaustive()
    }
}
