//! What a checkpoint or an adapter is, as JSON, without reading its weights.

use std::ffi::c_char;
use std::ops::ControlFlow;

use qwen2_core::{DType, inspect, inspect_adapter};
use serde_json::json;

use crate::error::{qwen2_error, qwen2_status};
use crate::fence;
use crate::values::qwen2_text;

/// What the checkpoint `source` is, a directory, a GGUF file or an id, which is downloaded first: a JSON object
/// with the keys of `qwen2 info --json` that depend on its files alone, besides `container`, "safetensors" or
/// "gguf", and `generation_config`. The headers of the weights are read and checked, the weights are not. `*out`
/// is freed with `qwen2_text_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_inspect(
    source: *const c_char,
    len: usize,
    out: *mut *mut qwen2_text,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let source = fence::path(source, len)?;
        let found = inspect(source, |_| ControlFlow::Continue(()))?;
        let config = &found.config;
        let facts = json!({
            "model_type": config.model_type,
            "container": found.container,
            "parameters": config.parameter_count(),
            "stored_bytes": found.stored_bytes,
            "dtype": found.dtype.map(DType::name),
            "formats": found.formats,
            "trained_context_length": config.trained_length(),
            "context_length": config.context_length(),
            "weight_bytes": found.weight_bytes,
            "config": config,
            "generation_config": found.generation_config,
        });
        Ok(out.set(fence::give(qwen2_text::from(facts.to_string()))))
    })
}

/// What the LoRA adapter in `directory` is, as PEFT saves it: a JSON object with `base_model`, `modules`,
/// `matrices`, `ranks`, `scales`, `parameters` and `memory_bytes`, those beside the weights. `*out` is freed
/// with `qwen2_text_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_inspect_adapter(
    directory: *const c_char,
    len: usize,
    out: *mut *mut qwen2_text,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let found = inspect_adapter(fence::path(directory, len)?)?;
        let facts = json!({
            "base_model": found.base_model,
            "modules": found.modules,
            "matrices": found.matrices,
            "ranks": found.ranks,
            "scales": found.scales,
            "parameters": found.parameters,
            "memory_bytes": found.bytes,
        });
        Ok(out.set(fence::give(qwen2_text::from(facts.to_string()))))
    })
}
