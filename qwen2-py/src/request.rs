//! A request to an engine that is answered as it is read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use pyo3::prelude::*;
use qwen2_core::CancelToken;

use crate::engine::Handle;
use crate::error::{Failure, lock, not_picklable};
use crate::native::Native;
use crate::results::{Generation, Piece};
use crate::wake::{Bells, Fan, Step, block_on};

/// The pieces of an answer that an engine computes, as they come: an iterator and an asynchronous one.
#[pyclass(module = "qwen2_rs", frozen)]
pub(crate) struct RequestStream {
    state: Mutex<State>,
    waiting: Arc<Fan>,
    cancel: CancelToken,
    /// Nobody wants pieces any more.
    closed: AtomicBool,
    /// Runs as long as one of its requests is read.
    engine: Handle,
    bells: Bells,
}

enum State {
    Running(Native<qwen2_core::RequestStream>),
    Ended(Box<Result<qwen2_core::Generation, Failure>>),
}

impl RequestStream {
    pub(crate) fn new(
        stream: qwen2_core::RequestStream,
        cancel: CancelToken,
        engine: Handle,
        bells: Bells,
    ) -> Self {
        Self {
            state: Mutex::new(State::Running(Native::new(stream))),
            waiting: Arc::default(),
            cancel,
            closed: AtomicBool::new(false),
            engine,
            bells,
        }
    }

    /// The next piece; `None` when the request has ended. An error ends it and is given once.
    fn poll_next(&self, waker: &Waker) -> Poll<Result<Option<qwen2_core::Piece>, Failure>> {
        let mut state = lock(&self.state);
        let State::Running(stream) = &mut *state else {
            return Poll::Ready(Ok(None));
        };
        let stream = stream.get_mut()?;
        let polled = self.waiting.poll(waker, |waker| {
            stream.poll_next(&mut Context::from_waker(waker))
        });
        let (outcome, end) = match polled {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(Ok(piece))) => return Poll::Ready(Ok(Some(piece))),
            Poll::Ready(Some(Err(error))) => {
                let failure = Failure::from(error);
                (Err(failure.clone()), Some(Err(failure)))
            }
            Poll::Ready(None) => (Ok(None), None),
        };
        let ended = State::Ended(Box::new(Err(broken())));
        let State::Running(stream) = std::mem::replace(&mut *state, ended) else {
            return Poll::Ready(outcome);
        };
        // At its end it waits for nothing.
        let stream = stream.into_inner()?;
        let end = end.unwrap_or_else(|| stream.finish().map_err(Failure::from));
        *state = State::Ended(Box::new(end));
        Poll::Ready(outcome)
    }

    /// The whole result; pieces that were not read are let go.
    fn poll_end(&self, waker: &Waker) -> Poll<Result<qwen2_core::Generation, Failure>> {
        loop {
            match self.poll_next(waker) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(Some(_))) => {}
                Poll::Ready(Err(failure)) => return Poll::Ready(Err(failure)),
                Poll::Ready(Ok(None)) => break,
            }
        }
        match &*lock(&self.state) {
            State::Ended(end) => Poll::Ready((**end).clone()),
            State::Running(_) => Poll::Ready(Err(broken())),
        }
    }

    fn poll_piece(&self, waker: &Waker) -> Poll<Result<Option<qwen2_core::Piece>, Failure>> {
        if self.closed.load(Ordering::Acquire) {
            return Poll::Ready(Ok(None));
        }
        self.poll_next(waker)
    }

    /// Waits in this thread; Ctrl-C cancels the request.
    fn block_on<T>(
        &self,
        py: Python<'_>,
        poll: impl FnMut(&Waker) -> Poll<Result<T, Failure>>,
    ) -> PyResult<T> {
        let done = block_on(py, self.engine.id(), poll);
        Ok(done.inspect_err(|_| self.cancel.cancel())??)
    }

    fn in_loop<'py>(
        slf: &Bound<'py, Self>,
        verb: &str,
        poll: impl FnMut(Python<'_>, &Waker) -> Poll<PyResult<Py<PyAny>>> + Send + 'static,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        slf.get().engine.runs_python(py)?;
        let step = Step::new(&slf.get().bells, &slf.get().cancel, poll);
        py.import("qwen2_rs._wait")?
            .call_method1(verb, (Bound::new(py, step)?,))
    }
}

fn broken() -> Failure {
    Failure::invalid("stream is broken", "stream", "", "submit the prompt again")
}

#[pymethods]
impl RequestStream {
    /// Stops the request, from any thread: it ends after the token it is working on.
    fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Waits for the end and returns the whole result; as often as wanted.
    fn finish(&self, py: Python<'_>) -> PyResult<Generation> {
        let generation = self.block_on(py, |waker| self.poll_end(waker))?;
        Generation::new(py, generation)
    }

    /// As finish, in an event loop.
    fn finish_async<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let own = slf.clone().unbind();
        Self::in_loop(slf, "wait", move |py, waker| {
            let end = own.get().poll_end(waker);
            end.map(|end| {
                Ok(Bound::new(py, Generation::new(py, end?)?)?
                    .into_any()
                    .unbind())
            })
        })
    }

    /// Cancels the request without waiting; there are no more pieces, and finish() gives what there is.
    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.cancel.cancel();
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (exc_type, exc_value, traceback, /))]
    fn __exit__(
        &self,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) {
        let _ = (exc_type, exc_value, traceback);
        self.close();
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Piece>> {
        let piece = self.block_on(py, |waker| self.poll_piece(waker))?;
        piece.map(|piece| Piece::new(py, piece)).transpose()
    }

    fn __aiter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __anext__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let own = slf.clone().unbind();
        Self::in_loop(slf, "next_piece", move |py, waker| {
            let piece = own.get().poll_piece(waker);
            piece.map(|piece| match piece? {
                None => Ok(py.None()),
                Some(piece) => Ok(Bound::new(py, Piece::new(py, piece)?)?.into_any().unbind()),
            })
        })
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(not_picklable(
            "RequestStream",
            "pass the pieces or the result of finish()",
        ))
    }
}
