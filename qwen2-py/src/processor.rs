//! A Python function that changes the logits before each choice.

use std::sync::Arc;

use numpy::{PyArray1, PyArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use qwen2_core::{Error, LogitsProcessor};

/// A function of tokens and logits; clones call the same one.
#[derive(Clone)]
pub(crate) struct Processor(Arc<Py<PyAny>>);

impl Processor {
    pub(crate) fn new(function: &Bound<'_, PyAny>) -> Self {
        Self(Arc::new(function.clone().unbind()))
    }

    /// The function gets arrays of its own, which it may keep: nothing of ours is reachable later.
    fn call(&self, py: Python<'_>, tokens: &[u32], logits: &mut [f32]) -> PyResult<()> {
        let scores = PyArray1::from_slice(py, logits);
        let tokens = PyArray1::from_slice(py, tokens);
        let returned = self.0.bind(py).call1((tokens, &scores))?;
        let scores = match returned.is_none() {
            true => scores,
            false => as_array(&returned)?,
        };
        let scores = scores.try_readonly().map_err(PyErr::from)?;
        let scores = scores.as_array();
        if scores.len() != logits.len() {
            let (found, expected) = (scores.len(), logits.len());
            let why = format!("processor returned {found} logits instead of {expected}");
            return Err(PyValueError::new_err(why));
        }
        logits
            .iter_mut()
            .zip(scores)
            .for_each(|(logit, score)| *logit = *score);
        Ok(())
    }
}

/// What was returned as float32, without a copy if it is that already.
fn as_array<'py>(returned: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let numpy = returned.py().import("numpy")?;
    let array = numpy.call_method1("asarray", (returned, "float32"))?;
    array.cast_into::<PyArray1<f32>>().map_err(|_| {
        PyTypeError::new_err("processor returned something else than None or a row of logits")
    })
}

impl LogitsProcessor for Processor {
    fn process(&mut self, tokens: &[u32], logits: &mut [f32]) -> qwen2_core::Result<()> {
        let outcome = Python::try_attach(|py| self.call(py, tokens, logits));
        match outcome {
            Some(outcome) => outcome.map_err(Error::stopped),
            None => Err(Error::stopped("the interpreter is going away")),
        }
    }
}
