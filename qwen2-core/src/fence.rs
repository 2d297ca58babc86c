//! Where panics of the libraries below end: caught, with their text, and nothing printed.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Fences that this thread is inside of.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

struct Inside;

impl Inside {
    fn enter() -> Self {
        DEPTH.set(DEPTH.get() + 1);
        Self
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// Runs `body`; a panic in it becomes its message and place, and does not reach the panic hook of
/// the program. What a panic leaves half-done is the caller's to drop.
///
/// # Errors
/// The text of the panic.
#[doc(hidden)]
pub fn fenced<R>(body: impl FnOnce() -> R) -> Result<R, String> {
    silence_hook();
    let inside = Inside::enter();
    let outcome = catch_unwind(AssertUnwindSafe(body));
    drop(inside);
    outcome.map_err(|panic| text(&*panic))
}

/// Fences the rest of this thread's life: for threads whose panics are caught elsewhere.
pub(crate) fn silence_thread() {
    silence_hook();
    DEPTH.set(DEPTH.get() + 1);
}

/// Puts a hook before the program's own that swallows what a fence catches. burn reports failures
/// by panic, so without it a full GPU would print a backtrace into the host's terminal.
fn silence_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = take_hook();
        set_hook(Box::new(move |info| {
            if DEPTH.try_with(Cell::get).unwrap_or(0) > 0 {
                remember(info);
            } else {
                previous(info);
            }
        }));
    });
}

fn remember(info: &PanicHookInfo<'_>) {
    let what = payload(info.payload());
    let text = match info.location() {
        Some(place) => format!("{what} ({}:{})", place.file(), place.line()),
        None => what.to_owned(),
    };
    // A thread at its end has no place to keep it; the payload still says what happened.
    let _ = LAST_PANIC.try_with(|last| last.replace(Some(text)));
}

fn text(panic: &(dyn Any + Send)) -> String {
    LAST_PANIC
        .take()
        .unwrap_or_else(|| payload(panic).to_owned())
}

fn payload(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("unknown panic")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_text_and_place() {
        let text = fenced(|| panic!("on purpose")).expect_err("it panics");
        assert!(text.starts_with("on purpose ("), "{text}");
        assert!(text.contains("fence.rs:"), "{text}");
        assert_eq!(fenced(|| 7), Ok(7));
    }

    #[test]
    fn an_inner_fence_leaves_the_outer_one_shut() {
        let outer = fenced(|| {
            let _ = fenced(|| panic!("inner"));
            panic!("outer")
        });
        assert!(outer.expect_err("it panics").starts_with("outer ("));
        assert_eq!(DEPTH.get(), 0);
    }
}
