//! A request to an engine: its pieces, read by the host or told to a callback, and its result.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use qwen2_core::{CancelToken, Exclusive, ExclusiveGuard, Generation, Piece, RequestStream};

use crate::courier::in_callback;
use crate::error::{QWEN2_DONE, QWEN2_PENDING, qwen2_error, qwen2_status};
use crate::fence::{self, Handle, Outcome};
use crate::generation::qwen2_generation;
use crate::last::Last;
use crate::options::qwen2_cancel;
use crate::session::in_use;
use crate::values::Terminated;

/// A request to an engine. It keeps what it needs: engine, prompt and options may be freed before it.
pub struct qwen2_request {
    reader: Reader,
    cancel: CancelToken,
}

/// Hears a request. `status` is `QWEN2_OK` with the next piece in `text`, whole UTF-8, NUL-terminated,
/// perhaps empty, `len` bytes, valid during the call; then, once, with an empty text, `QWEN2_DONE`, or the
/// status that the request failed with. `qwen2_request_finish` gives the result from then on, and
/// `qwen2_request_free` may be called, in the callback too.
///
/// Returns 0 to go on; anything else ends the request, which then has the finish reason CANCELLED, gets no
/// more pieces, and hears its end still. It is called on a thread of the engine's, the same for all callbacks
/// of that engine and never on two at once, so it holds up the others. It may call every function of the
/// library: it may submit, where a full queue refuses it whatever the engine's settings; only what would
/// wait for another request that has a callback fails. It must return: no `longjmp`, no C++ exception.
pub type qwen2_request_fn = Option<
    unsafe extern "C" fn(
        request: *mut qwen2_request,
        status: qwen2_status,
        text: *const c_char,
        len: usize,
        user_data: *mut c_void,
    ) -> i32,
>;

enum Reader {
    Host(Box<Exclusive<Own>>),
    Callback(Arc<Called>),
}

impl Handle for qwen2_request {
    const TYPE: &'static str = "qwen2_request";
}

/// How a request ended; the result is there once, an error as often as it is asked for.
#[derive(Default)]
enum End {
    #[default]
    Running,
    Reached(Box<Generation>),
    Failed(Box<qwen2_error>),
    Taken,
}

impl End {
    fn of(result: Outcome<Generation>) -> Self {
        match result {
            Ok(generation) => Self::Reached(Box::new(generation)),
            Err(error) => Self::Failed(error),
        }
    }

    fn is_running(&self) -> bool {
        matches!(self, Self::Running)
    }

    fn take(&mut self) -> Outcome<Generation> {
        match std::mem::replace(self, Self::Taken) {
            Self::Reached(generation) => Ok(*generation),
            Self::Failed(error) => {
                *self = Self::Failed(error.clone());
                Err(error)
            }
            Self::Running | Self::Taken => Err(qwen2_error::invalid(
                "request",
                "request was finished already",
                None,
                "keep the first result",
            )),
        }
    }
}

/// A request that the host reads.
struct Own {
    /// Until its end.
    stream: Option<RequestStream>,
    /// The last piece; the caller may hold a pointer into it.
    text: Terminated,
    last: Last,
    end: End,
}

impl Own {
    /// The next piece, or the status to return without one; waits for it where `wait` says so.
    fn next(&mut self, wait: bool) -> Outcome<Result<Piece, qwen2_status>> {
        let Some(stream) = &mut self.stream else {
            return Ok(Err(QWEN2_DONE));
        };
        let next = match wait {
            true => stream.next(),
            false => match stream.try_next() {
                Poll::Ready(next) => next,
                Poll::Pending => return Ok(Err(QWEN2_PENDING)),
            },
        };
        if let Some(Ok(piece)) = next {
            return Ok(Ok(piece));
        }
        self.last.end();
        let result = match (next, self.stream.take()) {
            (Some(Err(error)), _) => Err(error.into()),
            (_, Some(stream)) => stream.finish().map_err(Into::into),
            (_, None) => return Ok(Err(QWEN2_DONE)),
        };
        let failure = result.as_ref().err().cloned();
        self.end = End::of(result);
        match failure {
            Some(error) => Err(error),
            None => Ok(Err(QWEN2_DONE)),
        }
    }

    fn finish(&mut self) -> Outcome<Generation> {
        while self.next(true)?.is_ok() {}
        self.end.take()
    }
}

/// A request that a callback hears: what its handle and the courier share.
#[derive(Default)]
pub(crate) struct Called {
    state: Mutex<CalledState>,
    changed: Condvar,
}

#[derive(Default)]
struct CalledState {
    last: Last,
    end: End,
    /// The callback is running.
    calling: bool,
    /// The handle was freed.
    freed: bool,
}

impl Called {
    fn lock(&self) -> MutexGuard<'_, CalledState> {
        // A panic inside the few lines that hold it leaves nothing half-done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before a piece is told; `false` where nobody wants to hear it any more.
    pub(crate) fn begin(&self, piece: Option<&Piece>) -> bool {
        let mut state = self.lock();
        match piece {
            Some(piece) => state.last = Last::from(piece),
            None => state.last.end(),
        }
        state.calling = !state.freed;
        state.calling
    }

    /// The callback has returned; whether the handle is still there.
    pub(crate) fn returned(&self) -> bool {
        let mut state = self.lock();
        state.calling = false;
        self.changed.notify_all();
        !state.freed
    }

    /// Before the end is told; the first end counts.
    pub(crate) fn end(&self, result: Outcome<Generation>) {
        let mut state = self.lock();
        if state.end.is_running() {
            state.end = End::of(result);
        }
        self.changed.notify_all();
    }

    /// Whether its end was not told.
    pub(crate) fn is_running(&self) -> bool {
        self.lock().end.is_running()
    }

    fn finish(&self) -> Outcome<Generation> {
        let state = self.lock();
        if state.end.is_running() && in_callback() {
            return Err(in_use("request"));
        }
        let ended = self
            .changed
            .wait_while(state, |state| state.end.is_running());
        ended.unwrap_or_else(PoisonError::into_inner).end.take()
    }

    /// The callback is not called any more when this returns; a callback does not wait for itself.
    fn free(&self) {
        let mut state = self.lock();
        state.freed = true;
        if !in_callback() {
            drop(self.changed.wait_while(state, |state| state.calling));
        }
    }
}

impl qwen2_request {
    pub(crate) fn read_by_host(stream: RequestStream) -> Self {
        Self {
            cancel: stream.cancel_token(),
            reader: Reader::Host(Box::new(Exclusive::new(Own {
                stream: Some(stream),
                text: Terminated::default(),
                last: Last::default(),
                end: End::default(),
            }))),
        }
    }

    pub(crate) fn read_by_callback(stream: &RequestStream) -> (Self, Arc<Called>) {
        let called = Arc::<Called>::default();
        let request = Self {
            cancel: stream.cancel_token(),
            reader: Reader::Callback(called.clone()),
        };
        (request, called)
    }

    fn own(&self) -> Outcome<ExclusiveGuard<'_, Own>> {
        match &self.reader {
            Reader::Host(own) => own.lock().ok_or_else(|| in_use("request")),
            Reader::Callback(_) => Err(qwen2_error::invalid(
                "request",
                "request has a callback",
                Some("which hears its pieces".to_owned()),
                "call qwen2_request_finish for the result",
            )),
        }
    }

    /// The last piece; `None` while another thread waits for the next one.
    pub(crate) fn with_last<T>(&self, body: impl FnOnce(&Last) -> T) -> Option<T> {
        match &self.reader {
            Reader::Host(own) => Some(body(&own.lock()?.last)),
            Reader::Callback(called) => Some(body(&called.lock().last)),
        }
    }
}

/// Never waits. `QWEN2_OK`: `*text` is the next piece, whole UTF-8, NUL-terminated, perhaps empty, and `*len`
/// (may be NULL) its length in bytes; valid until the next call on this request. `QWEN2_PENDING`: there is
/// none yet. `QWEN2_DONE`: it has ended. The outputs are untouched by both. After an error a request has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_request_poll(
    request: *mut qwen2_request,
    text: *mut *const c_char,
    len: *mut usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || next(request, false, text, len))
}

/// As `qwen2_request_poll`, but waits for the next piece and is never pending.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_request_next(
    request: *mut qwen2_request,
    text: *mut *const c_char,
    len: *mut usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || next(request, true, text, len))
}

unsafe fn next(
    request: *mut qwen2_request,
    wait: bool,
    text: *mut *const c_char,
    len: *mut usize,
) -> Outcome<qwen2_status> {
    let text = fence::out(text, "text")?;
    let mut own = fence::borrow(request)?.own()?;
    match own.next(wait)? {
        Err(status) => Ok(status),
        Ok(piece) => {
            own.last = Last::from(&piece);
            own.text = piece.text.into();
            Ok(text.set(own.text.show(len)))
        }
    }
}

/// The id of the last piece's token; `UINT32_MAX` before the first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_request_token(request: *const qwen2_request) -> u32 {
    fence::read(request, u32::MAX, |request| {
        request.with_last(|last| last.token).unwrap_or(u32::MAX)
    })
}

/// The request's switch, freed with `qwen2_cancel_free`: the one of its options if they have one. It works
/// from any thread, also while another one waits for the request. NULL for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_request_cancel(request: *const qwen2_request) -> *mut qwen2_cancel {
    fence::read(request, std::ptr::null_mut(), |request| {
        fence::give(qwen2_cancel(request.cancel.clone()))
    })
}

/// Waits for the end and gives the whole result, pieces that were read included. The request is still to be
/// freed. A second call is an error; after an error of the request every call fails with that. `*out` is freed
/// with `qwen2_generation_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_request_finish(
    request: *mut qwen2_request,
    out: *mut *mut qwen2_generation,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let request = fence::borrow(request)?;
        let generation = match &request.reader {
            Reader::Host(_) => request.own()?.finish()?,
            Reader::Callback(called) => called.finish()?,
        };
        Ok(out.set(fence::give(qwen2_generation::from(generation))))
    })
}

/// Frees a request and stops it if it still runs; NULL is allowed. When this returns, its callback is not
/// called any more, not with the end either; inside a callback it does not wait for one that runs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_request_free(request: *mut qwen2_request) {
    fence::silent((), || {
        // Before the handle goes: its callback may be using it.
        let request = fence::borrow(request)?;
        if let Reader::Callback(called) = &request.reader {
            request.cancel.cancel();
            called.free();
        }
        Ok(())
    });
    fence::free(request);
}
