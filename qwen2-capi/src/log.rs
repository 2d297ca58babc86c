//! What the library does, for hosts that want to know.
//!
//! The subscriber is set around each entry, on its thread, and never globally: a host that is
//! itself a Rust program keeps its own.

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::fmt::{Debug, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Dispatch, Event, Level, Metadata, Subscriber, dispatcher};

use crate::fence;

/// Something failed that was not reported as an error.
pub const QWEN2_LOG_ERROR: i32 = 1;
/// Something is not as it was asked for.
pub const QWEN2_LOG_WARN: i32 = 2;
/// Milestones, such as a model that is loaded.
pub const QWEN2_LOG_INFO: i32 = 3;
/// Details for finding mistakes.
pub const QWEN2_LOG_DEBUG: i32 = 4;

/// Called with one event: `level` is one of `QWEN2_LOG_*`, `message` one line of UTF-8,
/// NUL-terminated, valid during the call. It is called on threads that are inside a function of this
/// library, on several at once perhaps, and must return without calling the library.
pub type qwen2_log_fn = Option<
    unsafe extern "C" fn(level: i32, message: *const c_char, len: usize, user_data: *mut c_void),
>;

/// Who hears what the library does; NULL: nobody, the default. When this returns, the function that
/// was set before is not called any more. Has no effect inside a log function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_set_log(log: qwen2_log_fn, user_data: *mut c_void) {
    if IN_SINK.get() {
        return;
    }
    fence::silent((), || {
        let mut sink = SINK.write().unwrap_or_else(PoisonError::into_inner);
        *sink = log.map(|call| Sink { call, user_data });
        ENABLED.store(sink.is_some(), Ordering::Release);
        Ok(())
    });
}

#[derive(Clone, Copy)]
struct Sink {
    call: unsafe extern "C" fn(i32, *const c_char, usize, *mut c_void),
    user_data: *mut c_void,
}

// SAFETY: the header says that it is called from several threads; the pointer is only handed back.
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

static SINK: RwLock<Option<Sink>> = RwLock::new(None);
static ENABLED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static IN_SINK: Cell<bool> = const { Cell::new(false) };
}

/// Runs an entry with the log function listening.
pub(crate) fn scope<T>(body: impl FnOnce() -> T) -> T {
    static DISPATCH: OnceLock<Dispatch> = OnceLock::new();
    if !ENABLED.load(Ordering::Acquire) {
        return body();
    }
    dispatcher::with_default(DISPATCH.get_or_init(|| Dispatch::new(Listener)), body)
}

struct Listener;

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::DEBUG && metadata.is_event()
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let text = format!("{}{}\0", line.message, line.fields);
        let level = match *event.metadata().level() {
            Level::ERROR => QWEN2_LOG_ERROR,
            Level::WARN => QWEN2_LOG_WARN,
            Level::INFO => QWEN2_LOG_INFO,
            _ => QWEN2_LOG_DEBUG,
        };
        // Held during the call: qwen2_set_log waits for it before the old function may go away.
        let sink = SINK.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(sink) = *sink {
            IN_SINK.set(true);
            // SAFETY: the caller gave a function of this signature, and `user_data` for it.
            unsafe { (sink.call)(level, text.as_ptr().cast(), text.len() - 1, sink.user_data) };
            IN_SINK.set(false);
        }
    }

    // Spans are off, see `enabled`.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// `message key=value …`.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
