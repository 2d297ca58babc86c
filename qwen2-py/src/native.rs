//! What has threads of the library behind it: used in its own process only, let go of without the GIL.

use std::mem;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use qwen2_core::ErrorKind;

use crate::error::Failure;

/// A value that may wait for a thread when it is dropped.
///
/// In a fork that thread is not there, and its locks may be held for ever; when the interpreter ends it may hang on
/// the GIL. The value is left alone then: the process ends it.
pub(crate) struct Native<T: Send> {
    /// Taken by whoever ends it, and then nobody has a reference.
    value: Option<T>,
    process: u32,
}

impl<T: Send> Native<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            value: Some(value),
            process: std::process::id(),
        }
    }

    /// # Errors
    /// `Unsupported` in a fork.
    pub(crate) fn get(&self) -> Result<&T, Failure> {
        let value = self.value.as_ref().filter(|_| self.is_home());
        value.ok_or_else(forked)
    }

    /// # Errors
    /// As [`Native::get`].
    pub(crate) fn get_mut(&mut self) -> Result<&mut T, Failure> {
        let is_home = self.is_home();
        self.value.as_mut().filter(|_| is_home).ok_or_else(forked)
    }

    /// # Errors
    /// As [`Native::get`].
    pub(crate) fn into_inner(mut self) -> Result<T, Failure> {
        self.get()?;
        self.value.take().ok_or_else(forked)
    }

    fn is_home(&self) -> bool {
        self.process == std::process::id()
    }
}

impl<T: Send> Drop for Native<T> {
    fn drop(&mut self) {
        let Some(value) = self.value.take() else {
            return;
        };
        if !self.is_home() {
            mem::forget(value);
            return;
        }
        let mut value = Some(value);
        Python::try_attach(|py| {
            // An exception on its way may be what lets go of the object.
            let raised = PyErr::take(py);
            match is_finalizing(py) {
                true => mem::forget(value.take()),
                false => py.detach(|| drop(value.take())),
            }
            if let Some(raised) = raised {
                raised.restore(py);
            }
        });
        // Where nothing was attached the interpreter is gone.
        mem::forget(value);
    }
}

fn forked() -> Failure {
    Failure::new(
        ErrorKind::Unsupported,
        "engine does not survive a fork: this process is a fork of the one that built the engine",
        "load the model and build the engine in the process that uses them",
    )
}

/// Whether the interpreter ends; its modules may be gone already.
fn is_finalizing(py: Python<'_>) -> bool {
    static ASK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let ask = ASK.get_or_try_init(py, || {
        Ok::<_, PyErr>(py.import("sys")?.getattr("is_finalizing")?.unbind())
    });
    let answer = ask.and_then(|ask| ask.bind(py).call0()?.is_truthy());
    answer.unwrap_or(true)
}
