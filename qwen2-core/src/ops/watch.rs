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
    /// Each of them ends it when set.
    pub(crate) switches: Arc<[Arc<AtomicBool>]>,
    /// Ends it from then on.
    pub(crate) deadline: Option<Instant>,
    /// Called with the layers that are done and their number, on the thread that computes.
    pub(crate) on_layer: Option<Arc<OnLayer>>,
}

pub(crate) type OnLayer = dyn Fn(usize, usize) + Send + Sync;

impl Watch {
    /// Over when `switch` is set.
    pub(crate) fn of(switch: Arc<AtomicBool>) -> Self {
        Self {
            switches: Arc::new([switch]),
            ..Self::default()
        }
    }

    /// Over as soon as one of them is; nobody is told of layers.
    pub(crate) fn first_of(watches: impl IntoIterator<Item = Self>) -> Self {
        let (mut switches, mut deadline) = (Vec::new(), None::<Instant>);
        for watch in watches {
            switches.extend_from_slice(&watch.switches);
            deadline = deadline.into_iter().chain(watch.deadline).min();
        }
        Self {
            switches: switches.into(),
            deadline,
            on_layer: None,
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        let mut switches = self.switches.iter();
        switches.any(|switch| switch.load(Ordering::Acquire))
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_first_of_several_watches_ends_them_all() {
        let switches: [Arc<AtomicBool>; 3] = Default::default();
        let all = Watch::first_of(switches.iter().cloned().map(Watch::of));
        assert!(!all.is_over());
        switches[1].store(true, Ordering::Release);
        assert!(all.is_over());
        let until = |deadline| Watch {
            deadline: Some(deadline),
            ..Watch::default()
        };
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(3600));
        assert!(Watch::first_of([until(later), Watch::default(), until(now)]).is_over());
        assert!(!Watch::first_of([until(later), Watch::default()]).is_over());
        assert!(!Watch::first_of([]).is_over());
    }
}
