//! LoRA adapters beside a model's weights.

use std::ffi::c_char;

use crate::error::{qwen2_error, qwen2_status};
use crate::fence;
use crate::model::qwen2_model;

/// A handle to `model` with the LoRA adapter in `directory`, as PEFT saves it, beside its weights, which both
/// share: what the adapter adds is computed next to them. On top of an adapter a second one adds up with it.
/// Requests of an engine may each name a handle of their own. Both handles stay usable, and are freed on
/// their own. `*out` is freed with `qwen2_model_free`. To have an adapter's cost once instead, see
/// `qwen2_load_options_set_adapter` and `qwen2_merge_lora`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_with_adapter(
    model: *const qwen2_model,
    directory: *const c_char,
    len: usize,
    out: *mut *mut qwen2_model,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let directory = fence::path(directory, len)?;
        let adapted = fence::borrow(model)?.model.with_adapter(directory)?;
        Ok(out.set(fence::give(qwen2_model::from(adapted))))
    })
}

/// How many adapters are beside its weights; 0 for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_n_adapters(model: *const qwen2_model) -> usize {
    fence::read(model, 0, |model| model.adapters.len())
}

/// The directory of an adapter beside its weights; 0 is the one that was added first. Valid until the handle
/// is freed; NULL where there is none and for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_adapter(
    model: *const qwen2_model,
    index: usize,
) -> *const c_char {
    fence::read(model, std::ptr::null(), |model| {
        let adapter = model.adapters.get(index);
        adapter.map_or(std::ptr::null(), |directory| directory.as_ptr())
    })
}
