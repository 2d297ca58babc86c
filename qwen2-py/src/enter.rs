//! The one way out of Python: the GIL is let go, Ctrl-C is seen, failures become exceptions.

use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};
use std::time::Duration;

use pyo3::prelude::*;
use qwen2_core::{CancelToken, Progress};

use crate::error::{Failure, lock, no_thread};

/// How long Ctrl-C may go unseen while the library works.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// Of the thread that works while the main thread watches: what a main thread usually has.
const STACK: usize = 8 << 20;

/// Runs `work` without the GIL; for what is over soon.
pub(crate) fn outside<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    py.detach(work)
}

/// Runs a short step of something longer without the GIL, then looks for Ctrl-C, which cancels.
pub(crate) fn step<T: Send>(
    py: Python<'_>,
    cancel: &CancelToken,
    work: impl FnOnce() -> Result<T, Failure> + Send,
) -> PyResult<T> {
    let outcome = py.detach(work);
    py.check_signals().inspect_err(|_| cancel.cancel())?;
    Ok(outcome?)
}

/// Runs `work` without the GIL and looks for Ctrl-C meanwhile. It cancels, and `KeyboardInterrupt`
/// is raised once `work` has ended.
pub(crate) fn long<T: Send>(
    py: Python<'_>,
    cancel: &CancelToken,
    work: impl FnOnce() -> Result<T, Failure> + Send,
) -> PyResult<T> {
    // Python handles signals in its main thread only; others have nothing to look for.
    if is_main_thread(py)? {
        Ok(watch(py, cancel, work, || Ok(()))??)
    } else {
        Ok(py.detach(work)?)
    }
}

/// As [`long`], for loading: `work` gets a function to report its progress to, and `callback` is
/// called with it on this thread. It sees the latest progress, not every one; what it raises stops
/// the loading.
pub(crate) fn loading<T: Send>(
    py: Python<'_>,
    callback: &Bound<'_, PyAny>,
    work: impl FnOnce(Report) -> Result<T, Failure> + Send,
) -> PyResult<T> {
    let report = Report::default();
    let mut last = None;
    let mut tell = || {
        let progress = *lock(&report.0.latest);
        match progress {
            Some(progress) if last != Some(progress) => {
                last = Some(progress);
                callback.call1(progress).map(drop)
            }
            _ => Ok(()),
        }
    };
    let theirs = report.clone();
    let outcome = watch(py, &report.0.cancel, || work(theirs), &mut tell)??;
    tell()?; // what came after the last look
    Ok(outcome)
}

/// Where a loading model says how far it is, and learns that it should stop.
#[derive(Clone, Default)]
pub(crate) struct Report(std::sync::Arc<Inner>);

#[derive(Default)]
struct Inner {
    latest: Mutex<Option<(u64, u64)>>,
    cancel: CancelToken,
}

impl Report {
    /// Stops with the token instead of a callback.
    pub(crate) fn silent(cancel: CancelToken) -> Self {
        Self(std::sync::Arc::new(Inner {
            latest: Mutex::default(),
            cancel,
        }))
    }

    pub(crate) fn set(&self, progress: Progress) -> ControlFlow<()> {
        *lock(&self.0.latest) = Some((progress.bytes_done, progress.bytes_total));
        if self.0.cancel.is_cancelled() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

/// Runs `work` on a thread of its own; this one looks for signals and calls `tick`. What they raise
/// cancels and is raised once `work` has ended.
fn watch<T: Send>(
    py: Python<'_>,
    cancel: &CancelToken,
    work: impl FnOnce() -> T + Send,
    mut tick: impl FnMut() -> PyResult<()>,
) -> PyResult<T> {
    let done = Done {
        flag: AtomicBool::new(false),
        caller: thread::current(),
    };
    thread::scope(|scope| {
        let body = || {
            let _signal = SignalOnDrop(&done);
            work()
        };
        let builder = thread::Builder::new()
            .name("qwen2-call".to_owned())
            .stack_size(STACK);
        let worker = builder
            .spawn_scoped(scope, body)
            .map_err(|error| no_thread(&error))?;
        let mut raised = Ok(());
        while !done.flag.load(Ordering::Acquire) {
            py.detach(|| thread::park_timeout(TICK));
            if raised.is_ok() {
                raised = py
                    .check_signals()
                    .and_then(|()| tick())
                    .inspect_err(|_| cancel.cancel());
            }
        }
        let outcome = py
            .detach(|| worker.join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        raised.map(|()| outcome)
    })
}

struct Done {
    flag: AtomicBool,
    caller: Thread,
}

/// Wakes the caller however the work ends.
struct SignalOnDrop<'a>(&'a Done);

impl Drop for SignalOnDrop<'_> {
    fn drop(&mut self) {
        self.0.flag.store(true, Ordering::Release);
        self.0.caller.unpark();
    }
}

fn is_main_thread(py: Python<'_>) -> PyResult<bool> {
    // By number: `current_thread()` makes an object for each thread that Python did not start.
    let threading = py.import("threading")?;
    let main = threading.call_method0("main_thread")?.getattr("ident")?;
    threading.call_method0("get_ident")?.eq(main)
}
