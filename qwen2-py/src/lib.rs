//! The compiled half of the Python package `qwen2_rs`.

mod arguments;
mod constraint;
mod engine;
mod enter;
mod error;
mod exit;
mod inspect;
mod model;
mod native;
mod options;
mod processor;
mod request;
mod results;
mod session;
mod settings;
mod stream;
mod tokenizer;
mod wake;

use std::ffi::OsString;

use pyo3::prelude::*;

/// The devices that this build can compute on.
#[pyfunction]
fn devices() -> Vec<&'static str> {
    qwen2_core::Device::compiled()
}

/// Runs the command `qwen2` and returns its exit code. For a process that is this command and
/// nothing else: it takes Ctrl-C over.
#[pyfunction]
fn run_cli(py: Python<'_>, argv: Vec<OsString>) -> i32 {
    enter::outside(py, || qwen2_cli::run_program(argv))
}

// Nothing here counts on the GIL: every class is frozen, what changes is behind a lock.
#[pymodule(gil_used = false)]
fn _qwen2(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<engine::Engine>()?;
    module.add_class::<model::Model>()?;
    module.add_class::<request::RequestStream>()?;
    module.add_class::<session::Session>()?;
    module.add_class::<stream::TokenStream>()?;
    module.add_class::<tokenizer::Tokenizer>()?;
    module.add_class::<inspect::AdapterInfo>()?;
    module.add_class::<inspect::CheckpointInfo>()?;
    module.add_class::<results::EngineStats>()?;
    module.add_class::<results::Generation>()?;
    module.add_class::<results::Logprobs>()?;
    module.add_class::<results::Memory>()?;
    module.add_class::<results::Piece>()?;
    module.add_class::<results::StopMatch>()?;
    module.add_class::<results::Timings>()?;
    module.add_class::<results::TokenLogprob>()?;
    module.add_class::<results::ToolCall>()?;
    module.add_class::<results::Usage>()?;
    module.add_function(wrap_pyfunction!(devices, module)?)?;
    module.add_function(wrap_pyfunction!(inspect::inspect, module)?)?;
    module.add_function(wrap_pyfunction!(inspect::inspect_adapter, module)?)?;
    module.add_function(wrap_pyfunction!(model::convert, module)?)?;
    module.add_function(wrap_pyfunction!(model::merge_lora, module)?)?;
    module.add_function(wrap_pyfunction!(model::quantize, module)?)?;
    module.add_function(wrap_pyfunction!(run_cli, module)?)?;
    error::add_classes(module)
}
