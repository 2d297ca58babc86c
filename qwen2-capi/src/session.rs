//! A conversation that keeps its cache between turns.

use std::ffi::c_char;
use std::sync::Arc;

use qwen2_core::{Exclusive, ExclusiveGuard, LogitsProcessor, Session};

use crate::error::{QWEN2_OK, qwen2_error, qwen2_status};
use crate::fence::{self, Handle, Outcome};
use crate::generation::qwen2_generation;
use crate::model::qwen2_model;
use crate::options::{or_default, qwen2_options};
use crate::prompt::qwen2_prompt;
use crate::stream::qwen2_stream;
use crate::values::qwen2_tokens;

/// One conversation: what was said so far, and the cache of it. While a stream of it runs, it is the
/// stream's: other functions that read or change the conversation fail.
pub struct qwen2_session(Arc<Shared>);

impl Handle for qwen2_session {
    const TYPE: &'static str = "qwen2_session";
}

/// The session, for its handle and the stream that runs in it.
pub(crate) struct Shared(Exclusive<State>);

pub(crate) struct State {
    pub(crate) session: Session,
    /// A stream that has not ended is lent the session.
    pub(crate) busy: bool,
}

impl Shared {
    fn new(session: Session) -> Arc<Self> {
        Arc::new(Self(Exclusive::new(State {
            session,
            busy: false,
        })))
    }

    pub(crate) fn lock(&self) -> Outcome<ExclusiveGuard<'_, State>> {
        self.0.lock().ok_or_else(|| in_use("session"))
    }

    /// The session, unless a stream has it.
    fn idle(&self) -> Outcome<ExclusiveGuard<'_, State>> {
        let state = self.lock()?;
        if state.busy {
            return Err(qwen2_error::invalid(
                "session",
                "session is in use",
                Some("a stream of it has not ended".to_owned()),
                "read the stream to its end, finish it, or free it first",
            ));
        }
        Ok(state)
    }
}

/// Why an object is refused to a callback that it has called.
pub(crate) fn in_use(what: &'static str) -> Box<qwen2_error> {
    qwen2_error::invalid(
        what,
        "object is in use",
        Some("a callback uses what calls it".to_owned()),
        "wait until the callback has returned",
    )
}

/// A conversation in which nothing was said yet. `*out` is freed with `qwen2_session_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_new(
    model: *const qwen2_model,
    out: *mut *mut qwen2_session,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let session = fence::borrow(model)?.model.session();
        Ok(out.set(fence::give(qwen2_session(Shared::new(session)))))
    })
}

/// Frees the handle; NULL is allowed. A stream of the session goes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_free(session: *mut qwen2_session) {
    fence::free(session);
}

/// Adds to the conversation; the model reads it at the next generation. Messages go through the chat
/// template together with those before them; text and tokens go behind what is there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_append(
    session: *mut qwen2_session,
    prompt: *const qwen2_prompt,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let prompt = fence::borrow(prompt)?.get();
        fence::borrow(session)?.0.idle()?.session.append(prompt)?;
        Ok(QWEN2_OK)
    })
}

/// Answers what was appended; the answer becomes part of the conversation. `options` may be NULL: as
/// the checkpoint says. `*out` is freed with `qwen2_generation_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_generate(
    session: *mut qwen2_session,
    options: *const qwen2_options,
    out: *mut *mut qwen2_generation,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let (options, processor) = or_default(options)?;
        let mut state = fence::borrow(session)?.0.idle()?;
        let generation = match processor {
            Some(processor) => state.session.stream_with(&options, processor)?.finish()?,
            None => state.session.generate(&options)?,
        };
        Ok(out.set(fence::give(qwen2_generation::from(generation))))
    })
}

/// As `qwen2_session_generate`, piece by piece. What was generated becomes part of the conversation
/// when the stream ends, is finished or is freed; the session is the stream's until then. `*out` is
/// freed with `qwen2_stream_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_stream(
    session: *mut qwen2_session,
    options: *const qwen2_options,
    out: *mut *mut qwen2_stream,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let (options, processor) = or_default(options)?;
        let processor = processor.map(|given| Box::new(given) as Box<dyn LogitsProcessor>);
        let shared = &fence::borrow(session)?.0;
        let mut state = shared.idle()?;
        let run = state.session.start_with(&options, processor)?;
        state.busy = true;
        drop(state);
        Ok(out.set(fence::give(qwen2_stream::of_session(shared.clone(), run))))
    })
}

/// A second conversation with the same past; both go on independently. `*out` is freed with
/// `qwen2_session_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_fork(
    session: *const qwen2_session,
    out: *mut *mut qwen2_session,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let fork = fence::borrow(session)?.0.idle()?.session.fork()?;
        Ok(out.set(fence::give(qwen2_session(Shared::new(fork)))))
    })
}

/// Forgets all but the first `n_tokens` tokens. Messages can no longer be appended then, unless
/// everything was forgotten.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_truncate(
    session: *mut qwen2_session,
    n_tokens: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        fence::borrow(session)?
            .0
            .idle()?
            .session
            .truncate(n_tokens)?;
        Ok(QWEN2_OK)
    })
}

/// Takes back the last `n_messages` messages, answers of the model included; after one of them the model may
/// answer anew. Fails, and changes nothing, if there are fewer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_rollback(
    session: *mut qwen2_session,
    n_messages: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let shared = &fence::borrow(session)?.0;
        shared.idle()?.session.rollback(n_messages)?;
        Ok(QWEN2_OK)
    })
}

/// Makes room in a session of text: forgets `n_tokens` tokens behind the first `keep_first`. What stands
/// behind them is read again at the next generation. Fails, and changes nothing, if there are fewer, and in
/// a session of messages. Nothing is ever forgotten unless it is asked for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_shift(
    session: *mut qwen2_session,
    keep_first: usize,
    n_tokens: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let shared = &fence::borrow(session)?.0;
        shared.idle()?.session.shift(keep_first, n_tokens)?;
        Ok(QWEN2_OK)
    })
}

/// Makes room in a conversation: forgets `n_messages` messages behind the first `keep_first`, such as 1 for
/// a system prompt. Fails, and changes nothing, if there are fewer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_shift_messages(
    session: *mut qwen2_session,
    keep_first: usize,
    n_messages: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let shared = &fence::borrow(session)?.0;
        shared
            .idle()?
            .session
            .shift_messages(keep_first, n_messages)?;
        Ok(QWEN2_OK)
    })
}

/// Writes the conversation and its cache to a file, which replaces one of this name; the file is complete
/// or not there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_save(
    session: *const qwen2_session,
    path: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let path = fence::path(path, len)?;
        fence::borrow(session)?.0.idle()?.session.save(path)?;
        Ok(QWEN2_OK)
    })
}

/// A session that `qwen2_session_save` wrote, with its cache. A file that is damaged, or of another model or
/// of other settings, is refused. `*out` is freed with `qwen2_session_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_open(
    model: *const qwen2_model,
    path: *const c_char,
    len: usize,
    out: *mut *mut qwen2_session,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let path = fence::path(path, len)?;
        let session = fence::borrow(model)?.model.open_session(path)?;
        Ok(out.set(fence::give(qwen2_session(Shared::new(session)))))
    })
}

/// Everything said so far, as tokens: a copy, freed with `qwen2_tokens_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_tokens(
    session: *const qwen2_session,
    out: *mut *mut qwen2_tokens,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let tokens = fence::borrow(session)?.0.idle()?.session.tokens().to_vec();
        Ok(out.set(fence::give(qwen2_tokens(tokens))))
    })
}

/// Bytes of its cache; 0 for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_session_memory(session: *const qwen2_session) -> u64 {
    fence::read(session, 0, |session| {
        session.0.lock().map_or(0, |state| state.session.memory())
    })
}
