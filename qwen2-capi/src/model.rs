//! The model handle: loading, answering, logits, and what it is.

use std::ffi::{CString, c_char};
use std::sync::OnceLock;

use qwen2_core::{CancelToken, Model};
use serde_json::Value;

use crate::error::{QWEN2_OK, qwen2_error, qwen2_status};
use crate::fence::{self, Handle, Outcome};
use crate::generation::qwen2_generation;
use crate::load::qwen2_load_options;
use crate::options::{qwen2_cancel, qwen2_options};
use crate::prompt::qwen2_prompt;
use crate::stream::start;
use crate::values::{c_string, show};

/// A loaded model, shared by any number of threads. Streams, sessions and tokenizers made from it
/// keep what they need: it may be freed before them.
pub struct qwen2_model {
    pub(crate) model: Model,
    name: CString,
    device: CString,
    dtype: CString,
    pub(crate) adapters: Vec<CString>,
    config: OnceLock<CString>,
    generation_config: OnceLock<CString>,
}

/// Logits of every token of a sequence. Owned by the caller that received it; never changes.
pub struct qwen2_logits(qwen2_core::Logits);

impl Handle for qwen2_model {
    const TYPE: &'static str = "qwen2_model";
}

impl Handle for qwen2_logits {
    const TYPE: &'static str = "qwen2_logits";
}

impl From<Model> for qwen2_model {
    fn from(model: Model) -> Self {
        Self {
            name: c_string(model.name()),
            device: c_string(&model.device().to_string()),
            dtype: c_string(model.dtype().name()),
            adapters: model
                .adapters()
                .iter()
                .map(|directory| c_string(&directory.to_string_lossy()))
                .collect(),
            config: OnceLock::new(),
            generation_config: OnceLock::new(),
            model,
        }
    }
}

/// A number of the model; 0 for a handle that is none.
unsafe fn number<T: From<u8>>(model: *const qwen2_model, body: impl FnOnce(&Model) -> T) -> T {
    fence::read(model, T::from(0), |model| body(&model.model))
}

/// Loads a checkpoint: a directory with `config.json`, `tokenizer.json` and safetensors, or, where
/// the library was built with `hub`, an id such as "Qwen/Qwen2-0.5B-Instruct". `options` may be NULL
/// for the defaults. `*out` is freed with `qwen2_model_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_load(
    path: *const c_char,
    len: usize,
    options: *const qwen2_load_options,
    out: *mut *mut qwen2_model,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let mut builder = Model::builder(fence::path(path, len)?);
        if let Some(options) = fence::borrow_optional(options)? {
            builder = options.apply(builder);
        }
        Ok(out.set(fence::give(qwen2_model::from(builder.load()?))))
    })
}

/// Frees the handle; NULL is allowed. The weights go with the last handle, stream and session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_free(model: *mut qwen2_model) {
    fence::free(model);
}

/// Another handle to the same weights, freed with `qwen2_model_free`; NULL for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_clone(model: *const qwen2_model) -> *mut qwen2_model {
    fence::read(model, std::ptr::null_mut(), |model| {
        fence::give(qwen2_model::from(model.model.clone()))
    })
}

/// A handle to `model` with `draft`, a smaller model of the same vocabulary, which proposes tokens; several
/// are checked in one step, and the tokens stay those of `model` alone. Both handles stay usable, and are
/// freed on their own. `*out` is freed with `qwen2_model_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_with_draft(
    model: *const qwen2_model,
    draft: *const qwen2_model,
    out: *mut *mut qwen2_model,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let (model, draft) = (fence::borrow(model)?, fence::borrow(draft)?);
        let both = model.model.with_draft(&draft.model)?;
        Ok(out.set(fence::give(qwen2_model::from(both))))
    })
}

/// Answers a prompt. `options` may be NULL: as the checkpoint says. `*out` is freed with
/// `qwen2_generation_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generate(
    model: *const qwen2_model,
    prompt: *const qwen2_prompt,
    options: *const qwen2_options,
    out: *mut *mut qwen2_generation,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let (model, prompt) = (fence::borrow(model)?, fence::borrow(prompt)?);
        let stream = start(&model.model, prompt, options)?;
        let generation = stream.finish()?;
        Ok(out.set(fence::give(qwen2_generation::from(generation))))
    })
}

/// The logits of every token of a sequence, for measurements. `*out` is freed with
/// `qwen2_logits_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_logits(
    model: *const qwen2_model,
    tokens: *const u32,
    n_tokens: usize,
    out: *mut *mut qwen2_logits,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let model = fence::borrow(model)?;
        let logits = model
            .model
            .logits(fence::slice(tokens, n_tokens, "tokens")?)?;
        Ok(out.set(fence::give(qwen2_logits(logits))))
    })
}

/// Natural log-probability of each token given those before it. The first has none: `scores` is the
/// caller's array of `n_tokens - 1` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_score(
    model: *const qwen2_model,
    tokens: *const u32,
    n_tokens: usize,
    scores: *mut f32,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let model = fence::borrow(model)?;
        let computed = model
            .model
            .score(fence::slice(tokens, n_tokens, "tokens")?)?;
        give_scores(&computed, scores)
    })
}

/// As `qwen2_model_logits`, until `cancel` (may be NULL) ends it with `QWEN2_ERROR_CANCELLED`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_logits_with(
    model: *const qwen2_model,
    tokens: *const u32,
    n_tokens: usize,
    cancel: *const qwen2_cancel,
    out: *mut *mut qwen2_logits,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let model = fence::borrow(model)?;
        let tokens = fence::slice(tokens, n_tokens, "tokens")?;
        let logits = model.model.logits_with(tokens, &or_off(cancel)?)?;
        Ok(out.set(fence::give(qwen2_logits(logits))))
    })
}

/// As `qwen2_model_score`, until `cancel` (may be NULL) ends it with `QWEN2_ERROR_CANCELLED`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_score_with(
    model: *const qwen2_model,
    tokens: *const u32,
    n_tokens: usize,
    cancel: *const qwen2_cancel,
    scores: *mut f32,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let model = fence::borrow(model)?;
        let tokens = fence::slice(tokens, n_tokens, "tokens")?;
        give_scores(&model.model.score_with(tokens, &or_off(cancel)?)?, scores)
    })
}

/// Readies the device for the first request: reads every weight once, or of a layer's experts those that a
/// few tokens visit, and has a GPU's driver compile the kernels for prompts of all lengths. Nothing of it
/// stays in a cache, and no answer changes. `cancel` (may be NULL) ends it with `QWEN2_ERROR_CANCELLED`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_warmup(
    model: *const qwen2_model,
    cancel: *const qwen2_cancel,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let model = fence::borrow(model)?;
        model.model.warmup_with(&or_off(cancel)?)?;
        Ok(QWEN2_OK)
    })
}

/// Copies scores to the caller's array.
unsafe fn give_scores(computed: &[f32], scores: *mut f32) -> Outcome<qwen2_status> {
    if !computed.is_empty() {
        fence::out(scores, "scores")?;
        // SAFETY: not NULL, and the caller promises room for one number less than tokens.
        unsafe { scores.copy_from_nonoverlapping(computed.as_ptr(), computed.len()) };
    }
    Ok(QWEN2_OK)
}

/// The switch behind a handle; NULL stands for one that stays off.
pub(crate) unsafe fn or_off(cancel: *const qwen2_cancel) -> Outcome<CancelToken> {
    let cancel = fence::borrow_optional(cancel)?;
    Ok(cancel.map(|cancel| cancel.0.clone()).unwrap_or_default())
}

/// The logits, row-major: one row for each token, one column for each id of the vocabulary; the
/// sizes go to `n_tokens` and `vocab_size` (may be NULL). Valid until the logits are freed. NULL,
/// and 0 in both, for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_logits_data(
    logits: *const qwen2_logits,
    n_tokens: *mut usize,
    vocab_size: *mut usize,
) -> *const f32 {
    fence::set_optional(n_tokens, 0);
    fence::set_optional(vocab_size, 0);
    fence::read(logits, std::ptr::null(), |logits| {
        fence::set_optional(n_tokens, logits.0.n_tokens);
        fence::set_optional(vocab_size, logits.0.vocab_size);
        logits.0.values.as_ptr()
    })
}

/// Frees logits; NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_logits_free(logits: *mut qwen2_logits) {
    fence::free(logits);
}

/// The directory's or repository's name. Valid until the handle is freed; NULL for one that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_name(model: *const qwen2_model) -> *const c_char {
    fence::read(model, std::ptr::null(), |model| model.name.as_ptr())
}

/// Where it computes, for example "cpu". Valid until the handle is freed; NULL for one that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_device(model: *const qwen2_model) -> *const c_char {
    fence::read(model, std::ptr::null(), |model| model.device.as_ptr())
}

/// The precision of its matrices, "f32", "f16" or "bf16". Valid until the handle is freed; NULL for
/// one that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_dtype(model: *const qwen2_model) -> *const c_char {
    fence::read(model, std::ptr::null(), |model| model.dtype.as_ptr())
}

/// Tokens that prompt and answer may have together. This and the numbers below are 0 for a handle
/// that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_context_length(model: *const qwen2_model) -> u64 {
    number(model, |model| model.context_length() as u64)
}

/// Threads that compute on the processor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_threads(model: *const qwen2_model) -> u64 {
    number(model, |model| model.threads() as u64)
}

/// Columns of the logits; the tokenizer may have fewer ids.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_vocab_size(model: *const qwen2_model) -> u64 {
    number(model, |model| model.config().vocab_size as u64)
}

/// Layers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_num_hidden_layers(model: *const qwen2_model) -> u64 {
    number(model, |model| model.config().num_hidden_layers as u64)
}

/// Width of the residual stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_hidden_size(model: *const qwen2_model) -> u64 {
    number(model, |model| model.config().hidden_size as u64)
}

/// Weights, a tied table counted once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_parameter_count(model: *const qwen2_model) -> u64 {
    number(model, |model| model.config().parameter_count())
}

/// Bytes of the weights, once for all sessions.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_weight_bytes(model: *const qwen2_model) -> u64 {
    number(model, |model| model.memory().weights)
}

/// Bytes of keys and values that one token of one session takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_cache_bytes_per_token(model: *const qwen2_model) -> u64 {
    number(model, |model| model.memory().cache_per_token)
}

/// The ids that end a generation, the union over the checkpoint's files; `n_tokens` (may be NULL)
/// gets their number. Valid until the handle is freed. NULL, and 0 in `n_tokens`, for one that is
/// none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_eos_token_ids(
    model: *const qwen2_model,
    n_tokens: *mut usize,
) -> *const u32 {
    fence::set_optional(n_tokens, 0);
    fence::read(model, std::ptr::null(), |model| {
        show(&model.model.generation_config().eos_token_ids, n_tokens)
    })
}

/// The architecture as JSON: every number of `config.json` under its own name, defaults filled in.
/// Valid until the handle is freed; NULL for one that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_config_json(model: *const qwen2_model) -> *const c_char {
    fence::read(model, std::ptr::null(), |model| {
        model
            .config
            .get_or_init(|| json(serde_json::to_value(model.model.config())))
            .as_ptr()
    })
}

/// The checkpoint's own settings for generation as JSON, null where it has none. Valid until the
/// handle is freed; NULL for one that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_generation_config_json(
    model: *const qwen2_model,
) -> *const c_char {
    fence::read(model, std::ptr::null(), |model| {
        let config = || json(serde_json::to_value(model.model.generation_config()));
        model.generation_config.get_or_init(config).as_ptr()
    })
}

fn json(value: serde_json::Result<Value>) -> CString {
    c_string(&value.unwrap_or(Value::Null).to_string())
}
