//! The end of the interpreter: engines whose threads call into Python end before it.
//!
//! Before Python 3.14 a thread that wants the GIL back while the interpreter ends is ended by `pthread_exit`, through
//! the frames of the library, which aborts the process. So nothing of Python may run on an engine's thread by then.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCFunction, PyDict, PyTuple};

use crate::enter;
use crate::error::lock;
use crate::native::Native;

static ENGINES: Mutex<Vec<Weak<Native<qwen2_core::Engine>>>> = Mutex::new(Vec::new());
static EXITING: AtomicBool = AtomicBool::new(false);
static HOOK: PyOnceLock<()> = PyOnceLock::new();

/// Has `engine` closed when the interpreter ends, if it is still there.
pub(crate) fn close_at_exit(
    py: Python<'_>,
    engine: &Arc<Native<qwen2_core::Engine>>,
) -> PyResult<()> {
    HOOK.get_or_try_init(py, || {
        let hook = PyCFunction::new_closure(py, None, None, close_all)?;
        py.import("atexit")?.call_method1("register", (hook,))?;
        Ok::<_, PyErr>(())
    })?;
    let mut engines = lock(&ENGINES);
    engines.retain(|other| other.strong_count() > 0);
    let own = Arc::downgrade(engine);
    if !engines.iter().any(|other| other.ptr_eq(&own)) {
        engines.push(own);
    }
    Ok(())
}

/// Whether engines have ended so: loops of daemon threads, which end with the interpreter, are not told.
pub(crate) fn is_exiting() -> bool {
    EXITING.load(Ordering::Acquire)
}

fn close_all(args: &Bound<'_, PyTuple>, _: Option<&Bound<'_, PyDict>>) {
    EXITING.store(true, Ordering::Release);
    let engines = std::mem::take(&mut *lock(&ENGINES));
    for engine in engines.iter().filter_map(Weak::upgrade) {
        // In a fork its thread is not there.
        if let Ok(engine) = engine.get() {
            enter::outside(args.py(), || engine.close());
        }
    }
}
