//! A generation that runs as it is read.

use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use qwen2_core::{CancelToken, Exclusive, ExclusiveGuard};

use crate::enter;
use crate::error::{Failure, in_use, not_picklable};
use crate::results::{Generation, Piece};
use crate::session::SessionRun;

/// The pieces of a generation, as they come: an iterator and an asynchronous one.
#[pyclass(module = "qwen2_rs", frozen)]
pub(crate) struct TokenStream {
    state: Exclusive<State>,
    cancel: CancelToken,
    /// The first step reads the prompt and is the long one.
    started: AtomicBool,
    /// The thread that works for `async for`.
    executor: PyOnceLock<Py<PyAny>>,
}

enum State {
    Running(Run),
    Done(qwen2_core::Generation),
    Failed(Failure),
    /// Only while it changes from one to another.
    Changing,
}

/// What produces the pieces.
pub(crate) enum Run {
    Model(Box<qwen2_core::TokenStream>),
    Session(Box<SessionRun>),
}

impl Run {
    fn next(&mut self) -> Option<qwen2_core::Result<qwen2_core::Piece>> {
        match self {
            Self::Model(stream) => stream.next(),
            Self::Session(run) => run.next(),
        }
    }

    fn into_generation(self) -> qwen2_core::Generation {
        match self {
            Self::Model(stream) => stream.into_generation(),
            Self::Session(run) => run.into_generation(),
        }
    }
}

impl State {
    /// One step; `None` when the generation has ended. An error ends it and is given once.
    fn next(&mut self) -> Result<Option<qwen2_core::Piece>, Failure> {
        let Self::Running(run) = self else {
            return Ok(None);
        };
        match run.next() {
            Some(Ok(piece)) => Ok(Some(piece)),
            Some(Err(error)) => {
                let failure = Failure::from(error);
                *self = Self::Failed(failure.clone());
                Err(failure)
            }
            None => {
                self.end();
                Ok(None)
            }
        }
    }

    /// Ends a generation where it is.
    fn end(&mut self) {
        *self = match std::mem::replace(self, Self::Changing) {
            Self::Running(run) => Self::Done(run.into_generation()),
            ended => ended,
        };
    }

    fn result(&self) -> Result<qwen2_core::Generation, Failure> {
        match self {
            Self::Done(generation) => Ok(generation.clone()),
            Self::Failed(failure) => Err(failure.clone()),
            Self::Running(_) | Self::Changing => Err(Failure::invalid(
                "stream is broken",
                "stream",
                "a panic ended it",
                "start another one",
            )),
        }
    }
}

impl TokenStream {
    pub(crate) fn new(run: Run, cancel: CancelToken) -> Self {
        Self {
            state: Exclusive::new(State::Running(run)),
            cancel,
            started: AtomicBool::new(false),
            executor: PyOnceLock::new(),
        }
    }

    fn lock(&self) -> Result<ExclusiveGuard<'_, State>, Failure> {
        self.state.lock().ok_or_else(|| in_use("stream"))
    }

    fn step(&self, py: Python<'_>) -> PyResult<Option<Piece>> {
        let next = || self.lock()?.next();
        let piece = if self.started.swap(true, Ordering::Relaxed) {
            enter::step(py, &self.cancel, next)
        } else {
            enter::long(py, &self.cancel, next)
        };
        piece?.map(|piece| Piece::new(py, piece)).transpose()
    }
}

#[pymethods]
impl TokenStream {
    /// Stops the generation, from any thread: it ends after the token it is working on.
    fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Runs to the end and returns the whole result; as often as wanted.
    fn finish(&self, py: Python<'_>) -> PyResult<Generation> {
        let generation = enter::long(py, &self.cancel, || {
            let mut state = self.lock()?;
            while state.next()?.is_some() {}
            state.result()
        })?;
        Generation::new(py, generation)
    }

    /// Ends the generation where it is; finish() then gives what there is.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.cancel.cancel();
        Ok(enter::outside(py, || {
            self.lock().map(|mut state| state.end())
        })?)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (exc_type, exc_value, traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let _ = (exc_type, exc_value, traceback);
        self.close(py)
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Piece>> {
        self.step(py)
    }

    fn __aiter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __anext__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let aio = py.import("qwen2_rs.aio")?;
        let executor = slf
            .get()
            .executor
            .get_or_try_init(py, || aio.call_method0("executor").map(Bound::unbind))?;
        aio.call_method1("next_piece", (slf, executor))
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(not_picklable(
            "TokenStream",
            "pass the pieces or the result of finish()",
        ))
    }
}
