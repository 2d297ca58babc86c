//! Settings of one generation, and the switch that ends it.

use std::ffi::{c_char, c_void};
use std::ops::ControlFlow;

use qwen2_core::{BadWord, CancelToken, GenerateOptions, OnPrefill, PrefillProgress};

use crate::error::{QWEN2_OK, qwen2_error, qwen2_status};
use crate::fence::{self, Handle, Outcome};
use crate::processor::Processor;

/// Settings of a generation. What is not set is as the checkpoint's `generation_config.json` says,
/// then as the setter says. Values are checked when a generation starts; the error names the field.
/// They work in this order: logit_bias, repetition_penalty, presence_penalty and frequency_penalty,
/// bad words, min_new_tokens, the logits processor; then, unless greedy, temperature, top_k, top_p, min_p,
/// typical_p.
pub struct qwen2_options {
    pub(crate) options: GenerateOptions,
    pub(crate) processor: Option<Processor>,
}

/// A switch that ends generations from any thread. It has no way back: one for each generation.
pub struct qwen2_cancel(pub(crate) CancelToken);

impl Handle for qwen2_options {
    const TYPE: &'static str = "qwen2_options";
}

impl Handle for qwen2_cancel {
    const TYPE: &'static str = "qwen2_cancel";
}

impl From<GenerateOptions> for qwen2_options {
    fn from(options: GenerateOptions) -> Self {
        Self {
            options,
            processor: None,
        }
    }
}

/// The settings behind a handle, and who changes the logits; NULL stands for none set.
pub(crate) unsafe fn or_default(
    options: *const qwen2_options,
) -> Outcome<(GenerateOptions, Option<Processor>)> {
    Ok(fence::borrow_optional(options)?
        .map(|given| (given.options.clone(), given.processor))
        .unwrap_or_default())
}

unsafe fn set(options: *mut qwen2_options, body: impl FnOnce(&mut GenerateOptions)) {
    fence::change(options, |options| body(&mut options.options));
}

/// New settings, nothing set: everything as the checkpoint says. Freed with `qwen2_options_free`.
#[unsafe(no_mangle)]
pub extern "C" fn qwen2_options_new() -> *mut qwen2_options {
    fence::silent(std::ptr::null_mut(), || {
        Ok(fence::give(qwen2_options::from(GenerateOptions::new())))
    })
}

/// New settings that take the likeliest token every time, without a penalty: the same text on every
/// run. Freed with `qwen2_options_free`.
#[unsafe(no_mangle)]
pub extern "C" fn qwen2_options_new_greedy() -> *mut qwen2_options {
    fence::silent(std::ptr::null_mut(), || {
        Ok(fence::give(qwen2_options::from(GenerateOptions::greedy())))
    })
}

/// A copy of the settings, freed with `qwen2_options_free`; NULL for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_clone(options: *const qwen2_options) -> *mut qwen2_options {
    fence::read(options, std::ptr::null_mut(), |options| {
        fence::give(qwen2_options {
            options: options.options.clone(),
            processor: options.processor,
        })
    })
}

/// Frees the settings; NULL is allowed. Streams that were made with them go on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_free(options: *mut qwen2_options) {
    fence::free(options);
}

/// Most tokens to produce, at least 1. Default: to the end of the context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_max_new_tokens(
    options: *mut qwen2_options,
    max_new_tokens: usize,
) {
    set(options, |options| {
        options.max_new_tokens = Some(max_new_tokens)
    });
}

/// Divides the logits, 0 to 100; 0 takes the likeliest token every time. Default: 1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_temperature(
    options: *mut qwen2_options,
    temperature: f32,
) {
    set(options, |options| options.temperature = Some(temperature));
}

/// Keeps the k likeliest tokens, at least 1. Default: all.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_top_k(options: *mut qwen2_options, top_k: usize) {
    set(options, |options| options.top_k = Some(top_k));
}

/// Keeps the likeliest tokens that together have this probability, above 0 to 1. Default: 1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_top_p(options: *mut qwen2_options, top_p: f32) {
    set(options, |options| options.top_p = Some(top_p));
}

/// Drops tokens less likely than this share of the likeliest one, 0 to 1. Default: 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_min_p(options: *mut qwen2_options, min_p: f32) {
    set(options, |options| options.min_p = Some(min_p));
}

/// Makes tokens of the prompt and of the output less likely (above 1) or likelier (below 1); above 0.
/// Default: 1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_repetition_penalty(
    options: *mut qwen2_options,
    penalty: f32,
) {
    set(options, |options| {
        options.repetition_penalty = Some(penalty)
    });
}

/// Keeps the tokens whose information content is nearest to the expected one, until together they have
/// this probability; above 0 to 1. Default: 1, which keeps all.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_typical_p(options: *mut qwen2_options, typical_p: f32) {
    set(options, |options| options.typical_p = Some(typical_p));
}

/// Taken from the logit of every token that is in the output, -2 to 2. Default: 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_presence_penalty(
    options: *mut qwen2_options,
    penalty: f32,
) {
    set(options, |options| options.presence_penalty = Some(penalty));
}

/// Taken from the logit of a token for each time that it is in the output, -2 to 2. Default: 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_frequency_penalty(
    options: *mut qwen2_options,
    penalty: f32,
) {
    set(options, |options| options.frequency_penalty = Some(penalty));
}

/// Added to the logit of the token, -100 to 100; once for each token, the last call counts.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_logit_bias(
    options: *mut qwen2_options,
    token: u32,
    bias: f32,
) {
    set(options, |options| {
        options.logit_bias.insert(token, bias);
    });
}

/// One more text that is never produced, in whichever tokens and not in a longer word either: at most
/// 1024 of at most 256 bytes. The text is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_add_bad_word(
    options: *mut qwen2_options,
    text: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        let word = BadWord::from(fence::text(text, len, "text")?);
        options.options.bad_words.push(word);
        Ok(QWEN2_OK)
    })
}

/// One more sequence of 1 to 256 tokens that is never completed. The tokens are copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_add_bad_tokens(
    options: *mut qwen2_options,
    tokens: *const u32,
    n_tokens: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        let tokens = fence::slice(tokens, n_tokens, "tokens")?.to_vec();
        options.options.bad_words.push(BadWord::from(tokens));
        Ok(QWEN2_OK)
    })
}

/// As many tokens come at least before an end token or a stop token; a stop string still ends the
/// generation. Default: 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_min_new_tokens(
    options: *mut qwen2_options,
    min_new_tokens: usize,
) {
    set(options, |options| {
        options.min_new_tokens = Some(min_new_tokens)
    });
}

/// Says of each token how likely it was, and of the `top` likeliest ones, 0 to 1024: natural logarithms
/// of the softmax of the model's own logits, before all these settings. Default: does not.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_logprobs(options: *mut qwen2_options, top: usize) {
    set(options, |options| options.logprobs = Some(top));
}

/// The same for the tokens of the prompt; a session then reads all of it anew. Default: does not.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_prompt_logprobs(
    options: *mut qwen2_options,
    top: usize,
) {
    set(options, |options| options.prompt_logprobs = Some(top));
}

/// Same seed, same logits, same tokens. Default: from the operating system.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_seed(options: *mut qwen2_options, seed: u64) {
    set(options, |options| options.seed = Some(seed));
}

/// Not 0: goes on after the checkpoint's end tokens; stop strings and stop tokens still end it.
/// Default: 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_ignore_eos(
    options: *mut qwen2_options,
    ignore_eos: i32,
) {
    set(options, |options| options.ignore_eos = ignore_eos != 0);
}

/// One more string that ends the generation and is not part of its text: at most 64 of at most 4096
/// bytes. The text is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_add_stop(
    options: *mut qwen2_options,
    text: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        options
            .options
            .stop
            .push(fence::text(text, len, "stop")?.to_owned());
        Ok(QWEN2_OK)
    })
}

/// One more token that ends the generation, besides the checkpoint's own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_add_stop_token_id(options: *mut qwen2_options, token: u32) {
    set(options, |options| options.stop_token_ids.push(token));
}

/// Proposes `n_tokens` tokens at a time, 1 to 64, by looking up what followed the last ones where they
/// stood before, in place of a draft model: several are checked in one step. The tokens stay the same;
/// answers that repeat their prompt come faster. Default: off.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_prompt_lookup(
    options: *mut qwen2_options,
    n_tokens: usize,
) {
    set(options, |options| options.prompt_lookup = Some(n_tokens));
}

/// How many tokens the draft model of `qwen2_model_with_draft` proposes at a time, 1 to 64. Default: 4;
/// only for a model that has one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_draft_tokens(
    options: *mut qwen2_options,
    n_tokens: usize,
) {
    set(options, |options| options.draft_tokens = Some(n_tokens));
}

/// Most seconds that a generation takes, from the call that starts it, above 0; it then has the finish
/// reason TIMEOUT and keeps its text. Default: no limit.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_timeout(options: *mut qwen2_options, seconds: f64) {
    set(options, |options| options.timeout = Some(seconds));
}

/// Called while a prompt is read, after every layer of every chunk, with the tokens done, those that were
/// in the cache included, and in all; the last time both are equal. It is called on the thread that is
/// in `qwen2_generate`, `qwen2_stream_next` or the like, and only then. Returns 0 to go on; anything else
/// ends the generation, which then has the finish reason CANCELLED. It must return: no `longjmp`, no C++
/// exception.
pub type qwen2_prefill_fn = Option<
    unsafe extern "C" fn(tokens_done: u64, tokens_total: u64, user_data: *mut c_void) -> i32,
>;

struct Callback {
    call: unsafe extern "C" fn(u64, u64, *mut c_void) -> i32,
    user_data: *mut c_void,
}

// SAFETY: the core calls it on the threads that called us only; the caller gave `user_data` for those.
unsafe impl Send for Callback {}
// SAFETY: as above; a generation is one thread's at a time, and whoever shares the settings among
// threads shares what they point to.
unsafe impl Sync for Callback {}

impl Callback {
    fn run(&self, progress: PrefillProgress) -> ControlFlow<()> {
        let (done, total) = (progress.tokens_done as u64, progress.tokens_total as u64);
        // SAFETY: the caller gave a function of this signature, and `user_data` for it.
        match unsafe { (self.call)(done, total, self.user_data) } {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }
}

/// Who hears how far the reading of a prompt is; NULL: nobody, the default. `user_data` is borrowed until
/// every generation with these settings has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_on_prefill(
    options: *mut qwen2_options,
    on_prefill: qwen2_prefill_fn,
    user_data: *mut c_void,
) {
    set(options, |options| {
        options.on_prefill = on_prefill.map(|call| {
            let callback = Callback { call, user_data };
            OnPrefill::new(move |progress| callback.run(progress))
        });
    });
}

/// The switch of the generations made with these settings; shared, not moved: both handles are freed
/// on their own. NULL takes it away.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_cancel(
    options: *mut qwen2_options,
    cancel: *const qwen2_cancel,
) {
    fence::silent((), || {
        let cancel = fence::borrow_optional(cancel)?.map(|cancel| cancel.0.clone());
        fence::borrow_mut(options)?.options.cancel = cancel;
        Ok(())
    });
}

/// A switch that is off. Freed with `qwen2_cancel_free`.
#[unsafe(no_mangle)]
pub extern "C" fn qwen2_cancel_new() -> *mut qwen2_cancel {
    fence::silent(std::ptr::null_mut(), || {
        Ok(fence::give(qwen2_cancel(CancelToken::new())))
    })
}

/// Ends every generation that has this switch, in the middle of a prompt too; it then has the finish
/// reason CANCELLED and keeps its text. From any thread, and from a signal handler: it is one
/// atomic store, and therefore the one function that does not check its handle beyond NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_cancel_now(cancel: *const qwen2_cancel) {
    if let Some(cancel) = cancel.as_ref() {
        cancel.0.cancel();
    }
}

/// 1 if `qwen2_cancel_now` was called, else 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_cancel_is_cancelled(cancel: *const qwen2_cancel) -> i32 {
    fence::read(cancel, 0, |cancel| i32::from(cancel.0.is_cancelled()))
}

/// Frees the handle; NULL is allowed. Generations that have the switch go on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_cancel_free(cancel: *mut qwen2_cancel) {
    fence::free(cancel);
}
