//! A generation that runs as it is read.

use std::ffi::c_char;
use std::sync::Arc;

use qwen2_core::{
    CancelToken, Exclusive, ExclusiveGuard, Generation, Model, Piece, Result, SessionRun,
    TokenStream,
};

use crate::error::{QWEN2_DONE, qwen2_error, qwen2_status};
use crate::fence::{self, Handle, Outcome};
use crate::generation::qwen2_generation;
use crate::last::Last;
use crate::model::qwen2_model;
use crate::options::{or_default, qwen2_cancel, qwen2_options};
use crate::prompt::qwen2_prompt;
use crate::session::{Shared, in_use};
use crate::values::Terminated;

/// A generation that runs as it is read, of a model or in a session. It keeps what it needs: model,
/// session, prompt and options may be freed before it.
pub struct qwen2_stream {
    state: Exclusive<State>,
    cancel: CancelToken,
}

struct State {
    run: Run,
    /// The last piece; the caller may hold a pointer into it.
    text: Terminated,
    last: Last,
}

enum Run {
    Model(Box<TokenStream>),
    Session(Arc<Shared>, Box<SessionRun>),
    Ended(Box<Generation>),
    Finished,
}

impl Handle for qwen2_stream {
    const TYPE: &'static str = "qwen2_stream";
}

impl Run {
    fn next(&mut self) -> Option<Result<Piece>> {
        let piece = match self {
            Self::Model(stream) => stream.next(),
            // Nothing but a stream of its own locks a busy session for long.
            Self::Session(shared, run) => match shared.lock() {
                Ok(mut state) => run.next(&mut state.session),
                Err(_) => None,
            },
            Self::Ended(_) | Self::Finished => return None,
        };
        if !matches!(piece, Some(Ok(_))) {
            self.end();
        }
        piece
    }

    /// Stops what still runs: a session takes over what was generated, and is free again.
    fn end(&mut self) {
        *self = match std::mem::replace(self, Self::Finished) {
            Self::Model(stream) => Self::Ended(Box::new(stream.into_generation())),
            Self::Session(shared, run) => match shared.lock() {
                Ok(mut state) => {
                    state.busy = false;
                    Self::Ended(Box::new(run.finish(&mut state.session)))
                }
                Err(_) => Self::Finished,
            },
            ended => ended,
        };
    }

    /// The result of an ended run, once.
    fn take(&mut self) -> Option<Generation> {
        match std::mem::replace(self, Self::Finished) {
            Self::Ended(generation) => Some(*generation),
            other => {
                *self = other;
                None
            }
        }
    }
}

impl Drop for qwen2_stream {
    fn drop(&mut self) {
        // A session takes over what was generated, and is free again.
        if let Some(mut state) = self.state.lock() {
            state.run.end();
        }
    }
}

impl qwen2_stream {
    fn new(run: Run, cancel: CancelToken) -> Self {
        let state = State {
            run,
            text: Terminated::default(),
            last: Last::default(),
        };
        Self {
            state: Exclusive::new(state),
            cancel,
        }
    }

    pub(crate) fn of_session(shared: Arc<Shared>, run: SessionRun) -> Self {
        let cancel = run.cancel_token();
        Self::new(Run::Session(shared, Box::new(run)), cancel)
    }

    fn lock(&self) -> Outcome<ExclusiveGuard<'_, State>> {
        self.state.lock().ok_or_else(|| in_use("stream"))
    }

    /// The last piece; `None` where the stream itself is asking.
    pub(crate) fn with_last<T>(&self, body: impl FnOnce(&Last) -> T) -> Option<T> {
        Some(body(&self.state.lock()?.last))
    }
}

/// A generation with the settings behind a handle.
pub(crate) unsafe fn start(
    model: &Model,
    prompt: &qwen2_prompt,
    options: *const qwen2_options,
) -> Outcome<TokenStream> {
    let (options, processor) = or_default(options)?;
    Ok(match processor {
        Some(processor) => model.stream_with(prompt.get(), &options, processor)?,
        None => model.stream(prompt.get(), &options)?,
    })
}

/// Starts a generation; nothing is computed before the first piece is asked for. `options` may be
/// NULL: as the checkpoint says. `*out` is freed with `qwen2_stream_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_stream_new(
    model: *const qwen2_model,
    prompt: *const qwen2_prompt,
    options: *const qwen2_options,
    out: *mut *mut qwen2_stream,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let (model, prompt) = (fence::borrow(model)?, fence::borrow(prompt)?);
        let stream = start(&model.model, prompt, options)?;
        let cancel = stream.cancel_token();
        Ok(out.set(fence::give(qwen2_stream::new(
            Run::Model(Box::new(stream)),
            cancel,
        ))))
    })
}

/// `QWEN2_OK`: `*text` is the next piece, whole UTF-8, NUL-terminated, perhaps empty, and `*len` (may
/// be NULL) its length in bytes; valid until the next call on this stream. `QWEN2_DONE`: it has
/// ended, and the outputs are untouched. After an error a stream has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_stream_next(
    stream: *mut qwen2_stream,
    text: *mut *const c_char,
    len: *mut usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let text = fence::out(text, "text")?;
        let mut state = fence::borrow(stream)?.lock()?;
        let next = state.run.next().transpose();
        if !matches!(next, Ok(Some(_))) {
            state.last.end();
        }
        match next? {
            None => Ok(QWEN2_DONE),
            Some(piece) => {
                state.last = Last::from(&piece);
                state.text = piece.text.into();
                Ok(text.set(state.text.show(len)))
            }
        }
    })
}

/// The id of the last piece's token; `UINT32_MAX` before the first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_stream_token(stream: *const qwen2_stream) -> u32 {
    fence::read(stream, u32::MAX, |stream| {
        stream.with_last(|last| last.token).unwrap_or(u32::MAX)
    })
}

/// The stream's switch, freed with `qwen2_cancel_free`: the one of its options if they have one. NULL
/// for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_stream_cancel(stream: *const qwen2_stream) -> *mut qwen2_cancel {
    fence::read(stream, std::ptr::null_mut(), |stream| {
        fence::give(qwen2_cancel(stream.cancel.clone()))
    })
}

/// Runs the stream to its end and gives the whole result, pieces that were read included. The stream
/// is still to be freed; a second call is an error. After an error of the stream this gives what
/// there was before it, with the finish reason CANCELLED. `*out` is freed with
/// `qwen2_generation_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_stream_finish(
    stream: *mut qwen2_stream,
    out: *mut *mut qwen2_generation,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let mut state = fence::borrow(stream)?.lock()?;
        state.last.end();
        let generation = finish(&mut state.run)?;
        Ok(out.set(fence::give(qwen2_generation::from(generation))))
    })
}

fn finish(run: &mut Run) -> Outcome<Generation> {
    while let Some(piece) = run.next() {
        piece?;
    }
    run.take().ok_or_else(|| {
        qwen2_error::invalid(
            "stream",
            "stream was finished already",
            None,
            "keep the first result",
        )
    })
}

/// Frees a stream and stops it if it still runs; NULL is allowed. What was generated in a session is
/// part of the conversation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_stream_free(stream: *mut qwen2_stream) {
    fence::free(stream);
}
