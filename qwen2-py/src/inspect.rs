//! What a checkpoint or an adapter is, without its weights.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arguments::AnySource;
use crate::enter::{self, Report};
use crate::error::Failure;
use crate::model::{progress_callback, reporting, to_dict};

/// What inspect finds.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
pub(crate) struct CheckpointInfo {
    /// The architecture, as config.json or the metadata of a GGUF file give it.
    config: Py<PyDict>,
    /// The checkpoint's own settings for generation.
    generation_config: Py<PyDict>,
    /// safetensors or gguf.
    container: &'static str,
    /// Bytes of all tensors as they are stored.
    stored_bytes: u64,
    /// Bytes of the weights in memory if they are loaded with no other wish.
    weight_bytes: u64,
    /// Bytes by how they are stored: bf16, Q4_K, ….
    formats: BTreeMap<String, u64>,
    /// The precision that most bytes are in which are numbers.
    dtype: Option<&'static str>,
    /// Numbers in all weights.
    parameters: u64,
    /// Tokens that prompt and answer may have together.
    context_length: usize,
}

#[pymethods]
impl CheckpointInfo {
    fn __repr__(&self) -> String {
        format!(
            "CheckpointInfo(container='{}', parameters={}, context_length={}, weight_bytes={})",
            self.container, self.parameters, self.context_length, self.weight_bytes
        )
    }
}

/// What inspect_adapter finds.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
pub(crate) struct AdapterInfo {
    /// The model that it was made for, as PEFT names it.
    base_model: Option<String>,
    /// The projections that it changes: q_proj, v_proj, ….
    modules: Vec<String>,
    /// Matrices that it changes.
    matrices: usize,
    /// The ranks of its matrices.
    ranks: Vec<usize>,
    /// The smallest and the largest factor of its products.
    scales: (f32, f32),
    /// Numbers in all its matrices.
    parameters: u64,
    /// Bytes in memory beside the weights.
    memory: u64,
}

#[pymethods]
impl AdapterInfo {
    fn __repr__(&self) -> String {
        format!(
            "AdapterInfo(matrices={}, ranks={:?}, parameters={}, memory={})",
            self.matrices, self.ranks, self.parameters, self.memory
        )
    }
}

/// Tells what a checkpoint is, and checks that its tensors are those that its config calls for; the weights
/// are not read. An id of a hub is downloaded first.
///
/// source: a directory with a checkpoint, a GGUF file, or the id of a checkpoint on a hub.
/// progress: as of Model.load.
#[pyfunction]
#[pyo3(
    signature = (source, *, progress=None),
    text_signature = "(source, *, progress=False)"
)]
pub(crate) fn inspect(
    py: Python<'_>,
    source: AnySource,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<CheckpointInfo> {
    let callback = progress_callback(py, progress)?;
    let work = |report: Report| {
        let tell = move |progress| report.set(progress);
        Ok(qwen2_core::inspect(source.0, tell)?)
    };
    let found = reporting(py, callback, work)?;
    Ok(CheckpointInfo {
        config: to_dict(py, &found.config)?.unbind(),
        generation_config: to_dict(py, &found.generation_config)?.unbind(),
        container: found.container,
        stored_bytes: found.stored_bytes,
        weight_bytes: found.weight_bytes,
        formats: found.formats,
        dtype: found.dtype.map(|dtype| dtype.name()),
        parameters: found.config.parameter_count(),
        context_length: found.config.context_length(),
    })
}

/// Tells what a LoRA adapter is.
///
/// path: its directory, as PEFT saves it.
#[pyfunction]
pub(crate) fn inspect_adapter(py: Python<'_>, path: PathBuf) -> PyResult<AdapterInfo> {
    let found = enter::outside(py, || {
        qwen2_core::inspect_adapter(path).map_err(Failure::from)
    })?;
    Ok(AdapterInfo {
        base_model: found.base_model,
        modules: found.modules.into_iter().collect(),
        matrices: found.matrices,
        ranks: found.ranks.into_iter().collect(),
        scales: found.scales.into(),
        parameters: found.parameters,
        memory: found.bytes,
    })
}
