//! A conversation that keeps its cache between turns.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use qwen2_core::{CancelToken, Exclusive, ExclusiveGuard, LogitsProcessor};

use crate::arguments::{AnyPrompt, Whole, to_dicts};
use crate::enter;
use crate::error::{Failure, in_use, not_picklable};
use crate::options::{self, Given, signature};
use crate::results::Generation;
use crate::stream::{Run, TokenStream};

/// One conversation: what was said so far, and the cache of it. While a stream of it runs, it is
/// the stream's.
#[pyclass(module = "qwen2_rs", frozen)]
pub(crate) struct Session(Arc<Shared>);

/// The session, for its Python object and the stream that runs in it.
struct Shared(Exclusive<State>);

struct State {
    session: qwen2_core::Session,
    /// A stream that has not ended is lent the session.
    busy: bool,
}

impl Shared {
    fn lock(&self) -> Result<ExclusiveGuard<'_, State>, Failure> {
        self.0.lock().ok_or_else(|| in_use("session"))
    }

    /// The session, unless a stream has it.
    fn idle(&self) -> Result<ExclusiveGuard<'_, State>, Failure> {
        let state = self.lock()?;
        if state.busy {
            let help = "read the stream to its end, finish it, or close it first";
            return Err(Failure::invalid(
                "session is in use",
                "session",
                "a stream of it has not ended",
                help,
            ));
        }
        Ok(state)
    }
}

/// A generation in a session; what it made belongs to the conversation, however it ends.
pub(crate) struct SessionRun {
    run: Option<qwen2_core::SessionRun>,
    shared: Arc<Shared>,
}

impl SessionRun {
    fn start(shared: Arc<Shared>, given: Given) -> Result<Self, Failure> {
        let mut state = shared.idle()?;
        let processor = given
            .processor
            .map(|given| Box::new(given) as Box<dyn LogitsProcessor>);
        let run = state.session.start_with(&given.options, processor)?;
        state.busy = true;
        drop(state);
        Ok(Self {
            run: Some(run),
            shared,
        })
    }

    pub(crate) fn next(&mut self) -> Option<qwen2_core::Result<qwen2_core::Piece>> {
        // Only a stream of its own locks a busy session, and that is this one.
        let mut state = self.shared.0.lock()?;
        self.run.as_mut()?.next(&mut state.session)
    }

    pub(crate) fn into_generation(mut self) -> qwen2_core::Generation {
        // Taken by this and by drop only, and this consumes it; as above for the lock.
        self.settle().expect("a run is settled once")
    }

    fn settle(&mut self) -> Option<qwen2_core::Generation> {
        let mut state = self.shared.0.lock()?;
        let run = self.run.take()?;
        state.busy = false;
        Some(run.finish(&mut state.session))
    }
}

impl Drop for SessionRun {
    fn drop(&mut self) {
        self.settle();
    }
}

impl Session {
    pub(crate) fn new(session: qwen2_core::Session) -> Self {
        Self(Arc::new(Shared(Exclusive::new(State {
            session,
            busy: false,
        }))))
    }

    /// Runs `work` on the idle session without the GIL.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut qwen2_core::Session) -> qwen2_core::Result<T> + Send,
    ) -> PyResult<T> {
        Ok(enter::outside(py, || {
            Ok::<_, Failure>(work(&mut self.0.idle()?.session)?)
        })?)
    }
}

#[pymethods]
impl Session {
    /// Adds to the conversation; the model reads it at the next generation. Messages go through the
    /// chat template together with those before them; text and tokens go behind what is there.
    fn append(&self, py: Python<'_>, prompt: AnyPrompt) -> PyResult<()> {
        self.with(py, |session| session.append(prompt.0))
    }

    #[doc = signature!("generate($self, *, ")]
    /// Answers what was appended; the answer becomes part of the conversation.
    #[pyo3(signature = (**options), text_signature = None)]
    fn generate(
        &self,
        py: Python<'_>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Generation> {
        let cancel = CancelToken::new();
        let given = options::read("generate", options)?.cancel(&cancel);
        let generation = enter::long(py, &cancel, || {
            let mut state = self.0.idle()?;
            Ok(match given.processor {
                Some(processor) => state
                    .session
                    .stream_with(&given.options, processor)?
                    .finish()?,
                None => state.session.generate(&given.options)?,
            })
        })?;
        Generation::new(py, generation)
    }

    #[doc = signature!("stream($self, *, ")]
    /// As generate, piece by piece. What was generated when the stream ends or is closed becomes
    /// part of the conversation.
    #[pyo3(signature = (**options), text_signature = None)]
    fn stream(&self, py: Python<'_>, options: Option<&Bound<'_, PyDict>>) -> PyResult<TokenStream> {
        let cancel = CancelToken::new();
        let given = options::read("stream", options)?.cancel(&cancel);
        let run = enter::outside(py, || SessionRun::start(Arc::clone(&self.0), given))?;
        Ok(TokenStream::new(Run::Session(Box::new(run)), cancel))
    }

    /// A second conversation with the same past; both go on independently.
    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        self.with(py, |session| session.fork()).map(Self::new)
    }

    /// Forgets all but the first n_tokens tokens; messages can no longer be appended then, unless
    /// everything was forgotten.
    fn truncate(&self, py: Python<'_>, n_tokens: Whole) -> PyResult<()> {
        let n_tokens = n_tokens.count("n_tokens")?;
        self.with(py, |session| session.truncate(n_tokens))
    }

    /// Takes back the last n_messages messages, answers of the model included; after one of them the
    /// model may answer anew.
    fn rollback(&self, py: Python<'_>, n_messages: Whole) -> PyResult<()> {
        let n_messages = n_messages.count("n_messages")?;
        self.with(py, |session| session.rollback(n_messages))
    }

    /// Makes room in a session of text: forgets n_tokens tokens behind the first keep_first. What
    /// stands behind them is read again at the next generation. Nothing is ever forgotten unless it is
    /// asked for.
    fn shift(&self, py: Python<'_>, keep_first: Whole, n_tokens: Whole) -> PyResult<()> {
        let (keep, n) = (keep_first.count("keep_first")?, n_tokens.count("n_tokens")?);
        self.with(py, |session| session.shift(keep, n))
    }

    /// Makes room in a conversation: forgets n_messages messages behind the first keep_first, such as
    /// 1 for a system prompt.
    fn shift_messages(&self, py: Python<'_>, keep_first: Whole, n_messages: Whole) -> PyResult<()> {
        let keep = keep_first.count("keep_first")?;
        let n = n_messages.count("n_messages")?;
        self.with(py, |session| session.shift_messages(keep, n))
    }

    /// Writes the conversation and its cache to a file, which replaces one of this name; the file is
    /// complete or not there. Model.open_session reads it.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        self.with(py, |session| session.save(path))
    }

    /// Everything said so far, as tokens.
    #[getter]
    fn tokens(&self, py: Python<'_>) -> PyResult<Vec<u32>> {
        self.with(py, |session| Ok(session.tokens().to_vec()))
    }

    /// Everything said so far, as messages; empty in a session of text.
    #[getter]
    fn messages<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let messages = self.with(py, |session| Ok(session.messages().to_vec()))?;
        to_dicts(py, &messages)
    }

    /// Bytes of its cache.
    #[getter]
    fn memory(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |session| Ok(session.memory()))
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(not_picklable("Session", "pass its tokens or messages"))
    }
}
