//! Waiting for what comes from an engine's thread: in a thread that sees Ctrl-C, or in an event loop.

use std::cell::Cell;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Wake, Waker};
use std::thread::{self, Thread};

use pyo3::prelude::*;
use qwen2_core::CancelToken;

use crate::enter::TICK;
use crate::error::{Failure, in_use, lock};
use crate::exit::is_exiting;

thread_local! {
    /// The engine whose processor this thread runs; 0: none.
    static INSIDE: Cell<usize> = const { Cell::new(0) };
}

/// Runs `body`, a processor of the engine `id`, in which that engine cannot be waited for.
pub(crate) fn inside<T>(id: usize, body: impl FnOnce() -> T) -> T {
    let before = INSIDE.replace(id);
    let result = body();
    INSIDE.set(before);
    result
}

/// Polls until there is a value. The GIL is let go meanwhile, and Ctrl-C ends it.
///
/// # Errors
/// What a signal's handler raises; `InvalidArgument` in a processor of the engine `id` itself.
pub(crate) fn block_on<T>(
    py: Python<'_>,
    id: usize,
    mut poll: impl FnMut(&Waker) -> Poll<T>,
) -> PyResult<T> {
    let waker = Waker::from(Arc::new(Sleeper(thread::current())));
    loop {
        if let Poll::Ready(value) = poll(&waker) {
            return Ok(value);
        }
        if INSIDE.get() == id {
            return Err(in_use("engine").into());
        }
        py.detach(|| thread::park_timeout(TICK));
        py.check_signals()?;
    }
}

struct Sleeper(Thread);

impl Wake for Sleeper {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Wakes all who wait for the same request: the library keeps one waker for each.
#[derive(Default)]
pub(crate) struct Fan(Mutex<Vec<Waker>>);

impl Fan {
    /// Polls with a waker that wakes this waiter and the others.
    pub(crate) fn poll<T>(
        self: &Arc<Self>,
        waker: &Waker,
        poll: impl FnOnce(&Waker) -> Poll<T>,
    ) -> Poll<T> {
        // Before it is polled: a wake-up may come at once.
        let leave = |waiting: &mut Vec<Waker>| waiting.retain(|other| !other.will_wake(waker));
        {
            let mut waiting = lock(&self.0);
            leave(&mut waiting);
            waiting.push(waker.clone());
        }
        let polled = poll(&Waker::from(Arc::clone(self)));
        if polled.is_ready() {
            leave(&mut lock(&self.0));
        }
        polled
    }
}

impl Wake for Fan {
    fn wake(self: Arc<Self>) {
        let waiting = std::mem::take(&mut *lock(&self.0));
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// The way into one event loop. Futures that are woken before the loop has come to it are woken together, so that the
/// engine's thread does not wait for the GIL for each of them.
#[pyclass(frozen)]
pub(crate) struct Bell {
    /// Weak: a loop may refer to what waits in it.
    event_loop: Py<PyAny>,
    /// What the loop calls with this bell.
    ring: Py<PyAny>,
    woken: Mutex<Vec<Py<PyAny>>>,
}

#[pymethods]
impl Bell {
    /// In the loop: the futures to wake.
    fn take(&self) -> Vec<Py<PyAny>> {
        std::mem::take(&mut *lock(&self.woken))
    }
}

/// The bell of an engine, for the loop that asked last.
#[derive(Clone, Default)]
pub(crate) struct Bells(Arc<Mutex<Option<Py<Bell>>>>);

impl Bells {
    fn of(&self, event_loop: &Bound<'_, PyAny>) -> PyResult<Py<Bell>> {
        let py = event_loop.py();
        let last = lock(&self.0).as_ref().map(|bell| bell.clone_ref(py));
        if let Some(last) = last
            && last.get().event_loop.bind(py).call0()?.is(event_loop)
        {
            return Ok(last);
        }
        let event_loop = py.import("weakref")?.call_method1("ref", (event_loop,))?;
        let bell = Py::new(
            py,
            Bell {
                event_loop: event_loop.unbind(),
                ring: py.import("qwen2_rs._wait")?.getattr("ring")?.unbind(),
                woken: Mutex::default(),
            },
        )?;
        let before = lock(&self.0).replace(bell.clone_ref(py));
        drop(before);
        Ok(bell)
    }
}

/// Wakes one future, once.
struct Ticket {
    bell: Py<Bell>,
    future: Mutex<Option<Py<PyAny>>>,
}

impl Wake for Ticket {
    fn wake(self: Arc<Self>) {
        let Some(future) = lock(&self.future).take() else {
            return;
        };
        let bell = self.bell.get();
        let is_first = {
            let mut woken = lock(&bell.woken);
            woken.push(future);
            woken.len() == 1
        };
        if !is_first || is_exiting() {
            return; // the loop has not come to the first, or never will
        }
        let rung = Python::try_attach(|py| {
            let event_loop = bell.event_loop.bind(py).call0()?;
            let call = (&bell.ring, &self.bell);
            event_loop
                .call_method1("call_soon_threadsafe", call)
                .map(drop)
        });
        if let Some(Err(_)) = rung {
            // The loop is gone or closed: nobody waits in it.
            let unheard = std::mem::take(&mut *lock(&bell.woken));
            drop(unheard);
        }
    }
}

/// What an event loop waits for; `qwen2_rs._wait` calls it.
#[pyclass(frozen)]
pub(crate) struct Step {
    /// `None` once it was cancelled.
    poll: Mutex<Option<Poller>>,
    cancel: CancelToken,
    bells: Bells,
}

type Poller = Box<dyn FnMut(Python<'_>, &Waker) -> Poll<PyResult<Py<PyAny>>> + Send>;

impl Step {
    pub(crate) fn new(
        bells: &Bells,
        cancel: &CancelToken,
        poll: impl FnMut(Python<'_>, &Waker) -> Poll<PyResult<Py<PyAny>>> + Send + 'static,
    ) -> Self {
        Self {
            poll: Mutex::new(Some(Box::new(poll))),
            cancel: cancel.clone(),
            bells: bells.clone(),
        }
    }
}

#[pymethods]
impl Step {
    /// What is there, in a tuple, or None: then the future of the loop is woken when it may be there.
    fn __call__(
        &self,
        py: Python<'_>,
        event_loop: &Bound<'_, PyAny>,
        future: Py<PyAny>,
    ) -> PyResult<Option<(Py<PyAny>,)>> {
        let ticket = Ticket {
            bell: self.bells.of(event_loop)?,
            future: Mutex::new(Some(future)),
        };
        let mut poll = self.poll.try_lock().map_err(|_| not_here())?;
        match poll.as_mut().ok_or_else(not_here)?(py, &Waker::from(Arc::new(ticket))) {
            Poll::Pending => Ok(None),
            Poll::Ready(value) => Ok(Some((value?,))),
        }
    }

    /// Nobody waits any more. A frame that an exception refers to may keep this object for long.
    fn cancel(&self) {
        self.cancel.cancel();
        let poll = self.poll.try_lock().ok().and_then(|mut poll| poll.take());
        drop(poll);
    }
}

fn not_here() -> Failure {
    Failure::invalid(
        "object is in use",
        "coroutine",
        "another thread runs it, or it was cancelled",
        "await it once",
    )
}
