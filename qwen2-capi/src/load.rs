//! Settings for loading a model.

use std::ffi::{c_char, c_void};
use std::ops::ControlFlow;
use std::path::PathBuf;

use qwen2_core::{DType, Device, KvCacheType, LongContext, ModelBuilder, Progress, Quantization};

use crate::error::{QWEN2_OK, qwen2_error, qwen2_status};
use crate::fence::{self, Handle, Outcome};

/// Settings for loading a model; what is not set has its default.
#[derive(Default)]
pub struct qwen2_load_options {
    device: Option<Device>,
    dtype: Option<DType>,
    quantize: Option<Quantization>,
    kv_cache: Option<KvCacheType>,
    activations: Option<DType>,
    preload: bool,
    screened_head: bool,
    adapter: Option<PathBuf>,
    context_length: Option<usize>,
    long_context: LongContext,
    threads: Option<usize>,
    progress: Option<Callback>,
}

impl Handle for qwen2_load_options {
    const TYPE: &'static str = "qwen2_load_options";
}

/// Called while a model loads, with the bytes done and in all, on the thread that loads, and never
/// after `qwen2_model_load` has returned. Returns 0 to go on; anything else stops the loading, which
/// then fails with `QWEN2_ERROR_CANCELLED`. A download counts first, then the weights count anew.
/// It must return: no `longjmp`, no C++ exception.
pub type qwen2_progress_fn =
    Option<unsafe extern "C" fn(bytes_done: u64, bytes_total: u64, user_data: *mut c_void) -> i32>;

#[derive(Clone, Copy)]
struct Callback {
    call: unsafe extern "C" fn(u64, u64, *mut c_void) -> i32,
    user_data: *mut c_void,
}

// SAFETY: the builder asks for it, but the core calls it on the thread that called us only.
unsafe impl Send for Callback {}

impl Callback {
    fn run(&self, progress: Progress) -> ControlFlow<()> {
        // SAFETY: the caller gave a function of this signature, and `user_data` for it.
        match unsafe { (self.call)(progress.bytes_done, progress.bytes_total, self.user_data) } {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }
}

impl qwen2_load_options {
    pub(crate) fn apply(&self, mut builder: ModelBuilder) -> ModelBuilder {
        if let Some(device) = &self.device {
            builder = builder.device(device.clone());
        }
        if let Some(dtype) = self.dtype {
            builder = builder.dtype(dtype);
        }
        if let Some(quantize) = self.quantize {
            builder = builder.quantize(quantize);
        }
        if let Some(dtype) = self.kv_cache {
            builder = builder.kv_cache(dtype);
        }
        if let Some(dtype) = self.activations {
            builder = builder.activations(dtype);
        }
        builder = builder
            .preload(self.preload)
            .screened_head(self.screened_head);
        if let Some(adapter) = &self.adapter {
            builder = builder.adapter(adapter);
        }
        builder = builder.long_context(self.long_context);
        if let Some(n_tokens) = self.context_length {
            builder = builder.context_length(n_tokens);
        }
        if let Some(n) = self.threads {
            builder = builder.threads(n);
        }
        if let Some(callback) = self.progress {
            builder = builder.progress(move |progress| callback.run(progress));
        }
        builder
    }
}

/// New settings, nothing set. Freed with `qwen2_load_options_free`.
#[unsafe(no_mangle)]
pub extern "C" fn qwen2_load_options_new() -> *mut qwen2_load_options {
    fence::silent(std::ptr::null_mut(), || {
        Ok(fence::give(qwen2_load_options::default()))
    })
}

/// Frees the settings; NULL is allowed. Models loaded with them are not affected.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_free(options: *mut qwen2_load_options) {
    fence::free(options);
}

/// Where to compute: "auto" (the default), "cpu", "cuda", "vulkan", "metal", "wgpu", "webgpu" or
/// "ndarray"; GPUs take an index, as in "cuda:1". `qwen2_devices` says which of them this build has.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_device(
    options: *mut qwen2_load_options,
    device: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        options.device = Some(parse(device, len, "device")?);
        Ok(QWEN2_OK)
    })
}

/// The precision to keep the weights in: "f32", "f16" or "bf16"; default: as stored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_dtype(
    options: *mut qwen2_load_options,
    dtype: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        options.dtype = Some(parse(dtype, len, "dtype")?);
        Ok(QWEN2_OK)
    })
}

/// A directory with a LoRA adapter of PEFT's, which is added to the weights while they are loaded.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_adapter(
    options: *mut qwen2_load_options,
    directory: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        options.adapter = Some(PathBuf::from(fence::path(directory, len)?));
        Ok(QWEN2_OK)
    })
}

/// Packs the weights into fewer bits while loading: "q8" or "q4"; default: as stored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_quantize(
    options: *mut qwen2_load_options,
    quantize: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        options.quantize = Some(parse(quantize, len, "quantize")?);
        Ok(QWEN2_OK)
    })
}

/// What keys and values are kept in: "f32", "f16", "bf16", "q8" or "q4"; default: f32 for f32
/// weights, else f16.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_kv_cache(
    options: *mut qwen2_load_options,
    kv_cache: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        options.kv_cache = Some(parse(kv_cache, len, "kv_cache")?);
        Ok(QWEN2_OK)
    })
}

/// The precision that prefill multiplies bf16 weights in: "f32", the default, or "bf16", which is
/// faster on processors with bf16 dot products and rounds the activations.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_activations(
    options: *mut qwen2_load_options,
    activations: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        options.activations = Some(parse(activations, len, "activations")?);
        Ok(QWEN2_OK)
    })
}

/// Whether to copy the weights into memory of this process instead of using them from the file, which
/// may then change or lie on a slow disk; 0 or 1, default 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_preload(
    options: *mut qwen2_load_options,
    preload: i32,
) {
    fence::change(options, |options| options.preload = preload != 0);
}

/// Whether a copy of the packed head in four bits ranks the tokens, so that only the best are computed
/// by the head itself, for greedy choice and top_k up to 64; 0 or 1, default 0. Checked when a model is
/// loaded: it is for packed weights on the CPU.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_screened_head(
    options: *mut qwen2_load_options,
    screened_head: i32,
) {
    fence::change(options, |options| {
        options.screened_head = screened_head != 0
    });
}

/// Tokens that prompt and answer may have together; more than the model was made for stretches it, see
/// `qwen2_load_options_set_long_context`; default: all of it. Checked when a model is loaded.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_context_length(
    options: *mut qwen2_load_options,
    n_tokens: usize,
) {
    fence::change(options, |options| options.context_length = Some(n_tokens));
}

/// What a context beyond the trained length is reached by: "yarn", the default; "yarn_when_needed", which
/// leaves sequences up to the trained length as they are; or "dual_chunk", attention in chunks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_long_context(
    options: *mut qwen2_load_options,
    long_context: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        options.long_context = parse(long_context, len, "long_context")?;
        Ok(QWEN2_OK)
    })
}

/// Threads on the processor, 1 to 1024; default: as many as affinity and cgroup allow. Checked when a
/// model is loaded.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_threads(
    options: *mut qwen2_load_options,
    n_threads: usize,
) {
    fence::change(options, |options| options.threads = Some(n_threads));
}

/// Who hears how far loading is; NULL: nobody, the default. `user_data` is borrowed until every
/// `qwen2_model_load` with these settings has returned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_load_options_set_progress(
    options: *mut qwen2_load_options,
    progress: qwen2_progress_fn,
    user_data: *mut c_void,
) {
    fence::change(options, |options| {
        options.progress = progress.map(|call| Callback { call, user_data });
    });
}

/// Packs the checkpoint `source`, a directory or an id, into the new directory `destination`, which
/// loads at once and takes less room, or into a GGUF file if its name ends in .gguf; `quantize` is "q8"
/// or "q4". `destination` must not exist, and is
/// there whole or not at all. `progress` may be NULL; it is called on this thread, and never after
/// the return.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_quantize(
    source: *const c_char,
    source_len: usize,
    destination: *const c_char,
    destination_len: usize,
    quantize: *const c_char,
    quantize_len: usize,
    progress: qwen2_progress_fn,
    user_data: *mut c_void,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let source = fence::path(source, source_len)?;
        let destination = fence::path(destination, destination_len)?;
        let quantize = parse::<Quantization>(quantize, quantize_len, "quantize")?;
        let callback = progress.map(|call| Callback { call, user_data });
        let report = |progress| match &callback {
            Some(callback) => callback.run(progress),
            None => ControlFlow::Continue(()),
        };
        qwen2_core::quantize(source, destination, quantize, report)?;
        Ok(QWEN2_OK)
    })
}

/// Converts the checkpoint `source`, a directory, a GGUF file or an id, into `destination`: a GGUF file
/// if its name ends in .gguf, else a directory of safetensors. `dtype` is "f32", "f16" or "bf16"; NULL:
/// as stored, and blocks of a GGUF file as bf16. `destination` must not exist, and is there whole or not
/// at all. `progress` may be NULL; it is called on this thread, and never after
/// the return.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_convert(
    source: *const c_char,
    source_len: usize,
    destination: *const c_char,
    destination_len: usize,
    dtype: *const c_char,
    dtype_len: usize,
    progress: qwen2_progress_fn,
    user_data: *mut c_void,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let source = fence::path(source, source_len)?;
        let destination = fence::path(destination, destination_len)?;
        let dtype = match dtype.is_null() {
            true => None,
            false => Some(parse::<DType>(dtype, dtype_len, "dtype")?),
        };
        let callback = progress.map(|call| Callback { call, user_data });
        let report = |progress| match &callback {
            Some(callback) => callback.run(progress),
            None => ControlFlow::Continue(()),
        };
        qwen2_core::convert(source, destination, dtype, report)?;
        Ok(QWEN2_OK)
    })
}

/// As `qwen2_convert`, with the LoRA adapter in the directory `adapter`, as PEFT saves it, added to the
/// weights.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_merge_lora(
    source: *const c_char,
    source_len: usize,
    adapter: *const c_char,
    adapter_len: usize,
    destination: *const c_char,
    destination_len: usize,
    dtype: *const c_char,
    dtype_len: usize,
    progress: qwen2_progress_fn,
    user_data: *mut c_void,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let source = fence::path(source, source_len)?;
        let adapter = fence::path(adapter, adapter_len)?;
        let destination = fence::path(destination, destination_len)?;
        let dtype = match dtype.is_null() {
            true => None,
            false => Some(parse::<DType>(dtype, dtype_len, "dtype")?),
        };
        let callback = progress.map(|call| Callback { call, user_data });
        let report = |progress| match &callback {
            Some(callback) => callback.run(progress),
            None => ControlFlow::Continue(()),
        };
        qwen2_core::merge_lora(source, adapter, destination, dtype, report)?;
        Ok(QWEN2_OK)
    })
}

unsafe fn parse<T>(text: *const c_char, len: usize, name: &'static str) -> Outcome<T>
where
    T: std::str::FromStr<Err = qwen2_core::Error>,
{
    Ok(fence::text(text, len, name)?.parse()?)
}
