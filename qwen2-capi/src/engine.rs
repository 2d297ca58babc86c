//! Many requests on one model, computed together.

use std::ffi::c_void;
use std::time::Duration;

use qwen2_core::{Engine, EngineBuilder, EngineStats, Request, WhenFull};

use crate::courier::{Callback, Courier, in_callback};
use crate::error::{QWEN2_OK, qwen2_error, qwen2_status};
use crate::fence::{self, Handle, Outcome};
use crate::model::qwen2_model;
use crate::options::{or_default, qwen2_options};
use crate::prompt::qwen2_prompt;
use crate::request::{qwen2_request, qwen2_request_fn};

/// A request fails with `QWEN2_ERROR_OUT_OF_MEMORY` when the queue is full.
pub const QWEN2_WHEN_FULL_REFUSE: i32 = 0;
/// A request waits in `qwen2_engine_submit` until the queue has room.
pub const QWEN2_WHEN_FULL_WAIT: i32 = 1;

/// Places in the array of `qwen2_engine_stats`. Requests that wait to be started, now.
pub const QWEN2_STATS_WAITING: usize = 0;
/// Requests that are computed, now.
pub const QWEN2_STATS_RUNNING: usize = 1;
/// Requests that were submitted since the engine's start, from which all below count.
pub const QWEN2_STATS_SUBMITTED: usize = 2;
/// Requests that ended, cancelled and failed ones included.
pub const QWEN2_STATS_FINISHED: usize = 3;
/// Requests that ended with an error.
pub const QWEN2_STATS_FAILED: usize = 4;
/// Requests whose cache was dropped for lack of memory, to be computed again.
pub const QWEN2_STATS_PREEMPTED: usize = 5;
/// Steps of the network.
pub const QWEN2_STATS_STEPS: usize = 6;
/// Tokens of prompts that were computed.
pub const QWEN2_STATS_PROMPT_TOKENS: usize = 7;
/// Tokens of prompts that were shared with earlier requests.
pub const QWEN2_STATS_CACHED_TOKENS: usize = 8;
/// Tokens that were generated.
pub const QWEN2_STATS_COMPLETION_TOKENS: usize = 9;
/// Bytes of caches and shared prefixes, now.
pub const QWEN2_STATS_CACHE_BYTES: usize = 10;
/// Bytes that they may take.
pub const QWEN2_STATS_CACHE_LIMIT: usize = 11;
/// How many numbers this header knows.
pub const QWEN2_N_STATS: usize = 12;

/// Settings of an engine; what is not set has its default. Checked when an engine is made of them.
#[derive(Clone, Copy, Default)]
pub struct qwen2_engine_options {
    max_sequences: Option<usize>,
    cache_bytes: Option<u64>,
    prefill_chunk: Option<usize>,
    queue_limit: Option<usize>,
    when_full: Option<WhenFull>,
    reader_patience: Option<Duration>,
    prefix_cache: Option<bool>,
    deterministic: Option<bool>,
}

/// An engine: requests join and leave at every step of one model, each weight is read once for all of
/// them, and what prompts have in common is computed once. Any number of threads may submit.
pub struct qwen2_engine {
    // In this order: the courier hears of the ends of all requests before it stops.
    engine: Engine,
    courier: Courier,
}

impl Handle for qwen2_engine_options {
    const TYPE: &'static str = "qwen2_engine_options";
}

impl Handle for qwen2_engine {
    const TYPE: &'static str = "qwen2_engine";
}

impl qwen2_engine_options {
    fn apply(self, mut builder: EngineBuilder) -> EngineBuilder {
        if let Some(n) = self.max_sequences {
            builder = builder.max_sequences(n);
        }
        if let Some(bytes) = self.cache_bytes {
            builder = builder.cache_bytes(bytes);
        }
        if let Some(n_tokens) = self.prefill_chunk {
            builder = builder.prefill_chunk(n_tokens);
        }
        if let Some(n) = self.queue_limit {
            builder = builder.queue_limit(n);
        }
        if let Some(when_full) = self.when_full {
            builder = builder.when_full(when_full);
        }
        if let Some(patience) = self.reader_patience {
            builder = builder.reader_patience(patience);
        }
        if let Some(prefix_cache) = self.prefix_cache {
            builder = builder.prefix_cache(prefix_cache);
        }
        if let Some(deterministic) = self.deterministic {
            builder = builder.deterministic(deterministic);
        }
        builder
    }
}

/// New settings, nothing set. Freed with `qwen2_engine_options_free`.
#[unsafe(no_mangle)]
pub extern "C" fn qwen2_engine_options_new() -> *mut qwen2_engine_options {
    fence::silent(std::ptr::null_mut(), || {
        Ok(fence::give(qwen2_engine_options::default()))
    })
}

/// Frees the settings; NULL is allowed. Engines that were made with them go on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_options_free(options: *mut qwen2_engine_options) {
    fence::free(options);
}

/// Sequences that are computed together, at least 1. Default: 64.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_options_set_max_sequences(
    options: *mut qwen2_engine_options,
    n: usize,
) {
    fence::change(options, |options| options.max_sequences = Some(n));
}

/// Bytes that the caches of all sequences and the shared prefixes may take together, at least 1; where they
/// do not do, shared prefixes are forgotten, then the last requests wait and are computed again. Default:
/// those of four sequences that fill the context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_options_set_cache_bytes(
    options: *mut qwen2_engine_options,
    bytes: u64,
) {
    fence::change(options, |options| options.cache_bytes = Some(bytes));
}

/// Tokens of prompts that one step reads between the tokens of the others, at least 1. Default: 64.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_options_set_prefill_chunk(
    options: *mut qwen2_engine_options,
    n_tokens: usize,
) {
    fence::change(options, |options| options.prefill_chunk = Some(n_tokens));
}

/// Requests that may wait, at least 1. Default: 1024.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_options_set_queue_limit(
    options: *mut qwen2_engine_options,
    n: usize,
) {
    fence::change(options, |options| options.queue_limit = Some(n));
}

/// What becomes of a request when so many wait, one of `QWEN2_WHEN_FULL_*`. Default: REFUSE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_options_set_when_full(
    options: *mut qwen2_engine_options,
    when_full: i32,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        options.when_full = Some(match when_full {
            QWEN2_WHEN_FULL_REFUSE => WhenFull::Refuse,
            QWEN2_WHEN_FULL_WAIT => WhenFull::Wait,
            other => {
                let why = Some(other.to_string());
                let help = "give one of QWEN2_WHEN_FULL_*";
                return Err(qwen2_error::invalid(
                    "when_full",
                    "no such value",
                    why,
                    help,
                ));
            }
        });
        Ok(QWEN2_OK)
    })
}

/// Milliseconds that the reader of an answer may leave 256 pieces unread before the request ends as
/// cancelled. Default: 60000.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_options_set_reader_patience(
    options: *mut qwen2_engine_options,
    milliseconds: u64,
) {
    fence::change(options, |options| {
        options.reader_patience = Some(Duration::from_millis(milliseconds))
    });
}

/// Whether the beginning that a prompt shares with earlier ones is computed once; 0 or 1, default 1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_options_set_prefix_cache(
    options: *mut qwen2_engine_options,
    prefix_cache: i32,
) {
    fence::change(options, |options| {
        options.prefix_cache = Some(prefix_cache != 0)
    });
}

/// Whether a request gets the same tokens alone and among others, to the last bit of its logits; sequences
/// are then computed one by one. 0 or 1, default 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_options_set_deterministic(
    options: *mut qwen2_engine_options,
    deterministic: i32,
) {
    fence::change(options, |options| {
        options.deterministic = Some(deterministic != 0)
    });
}

/// Starts an engine on the model, which may be freed before it. `options` may be NULL for the defaults.
/// `*out` is freed with `qwen2_engine_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_new(
    model: *const qwen2_model,
    options: *const qwen2_engine_options,
    out: *mut *mut qwen2_engine,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let builder = fence::borrow(model)?.model.engine();
        let options = fence::borrow_optional(options)?.copied();
        Ok(out.set(fence::give(qwen2_engine {
            engine: options.unwrap_or_default().apply(builder).build()?,
            courier: Courier::default(),
        })))
    })
}

/// Ends the engine and its thread; NULL is allowed. Requests that run fail with `QWEN2_ERROR_CANCELLED`;
/// their handles stay, with what came before, and are freed on their own. When this returns, every callback
/// has heard the end of its request and none is called any more; inside a callback it does not wait for
/// that: they hear it later, on their thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_free(engine: *mut qwen2_engine) {
    fence::free(engine);
}

/// A prompt into the queue; it is answered whether it is read or not, but a request that leaves 256 pieces
/// unread pauses, and ends as CANCELLED after a minute of that. `options` may be NULL: as the checkpoint
/// says; an engine has no draft model, no prompt lookup and no `on_prefill`, and calls a logits processor on
/// its own thread. A step of `priority`, -128 to 127, goes before the 32 requests that came before. `model`
/// may be NULL, or a handle that was made of the engine's model by `qwen2_model_with_adapter`. `*out` is
/// freed with `qwen2_request_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_submit(
    engine: *const qwen2_engine,
    prompt: *const qwen2_prompt,
    options: *const qwen2_options,
    priority: i32,
    model: *const qwen2_model,
    out: *mut *mut qwen2_request,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let out = fence::out(out, "out")?;
        let engine = fence::borrow(engine)?;
        let request = request(prompt, options, priority, model)?;
        let stream = engine.engine.submit_request(request)?;
        Ok(out.set(fence::give(qwen2_request::read_by_host(stream))))
    })
}

/// As `qwen2_engine_submit`, and `callback` hears the pieces and the end. `user_data` is borrowed until then,
/// or until `qwen2_request_free`. `out` may be NULL: the request then goes on by itself, and its handle is
/// the library's, valid inside the callback. The callback may be called before this returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_submit_callback(
    engine: *const qwen2_engine,
    prompt: *const qwen2_prompt,
    options: *const qwen2_options,
    priority: i32,
    model: *const qwen2_model,
    callback: qwen2_request_fn,
    user_data: *mut c_void,
    out: *mut *mut qwen2_request,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let engine = fence::borrow(engine)?;
        let Some(call) = callback else {
            let help = "give a function, or use qwen2_engine_submit";
            return Err(qwen2_error::invalid(
                "callback",
                "argument is NULL",
                None,
                help,
            ));
        };
        let request = request(prompt, options, priority, model)?;
        engine.courier.start()?;
        let stream = engine.engine.submit_request(request)?;
        let (request, called) = qwen2_request::read_by_callback(&stream);
        let request = fence::give(request);
        // Before the callback can be told of it, or free it.
        fence::set_optional(out, request);
        let callback = Callback::new(call, request, user_data);
        engine.courier.send(stream, called, callback, out.is_null());
        Ok(QWEN2_OK)
    })
}

/// A request with the settings behind handles.
unsafe fn request(
    prompt: *const qwen2_prompt,
    options: *const qwen2_options,
    priority: i32,
    model: *const qwen2_model,
) -> Outcome<Request> {
    let prompt = fence::borrow(prompt)?.get();
    let (options, processor) = or_default(options)?;
    let priority = i8::try_from(priority).map_err(|_| {
        let why = Some(format!("expected -128 to 127, found {priority}"));
        qwen2_error::invalid("priority", "argument is out of range", why, "0 is usual")
    })?;
    let mut request = Request::new(prompt, &options).priority(priority);
    if let Some(model) = fence::borrow_optional(model)? {
        request = request.model(&model.model);
    }
    if let Some(processor) = processor {
        request = request.processor(processor);
    }
    if in_callback() {
        // The queue may have to wait for what this thread is to read.
        request = request.when_full(WhenFull::Refuse);
    }
    Ok(request)
}

/// What the engine is doing: writes as many of its numbers, which `QWEN2_STATS_*` are the places of, as `stats`
/// has room for, and returns how many there are; a newer library may have more. `stats` may be NULL where
/// `n_stats` is 0. Returns 0, and writes nothing, for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_engine_stats(
    engine: *const qwen2_engine,
    stats: *mut u64,
    n_stats: usize,
) -> usize {
    fence::read(engine, 0, |engine| {
        let numbers = numbers(engine.engine.stats());
        if !stats.is_null() {
            let n = n_stats.min(numbers.len());
            // SAFETY: not NULL, and the caller promises room for `n_stats` numbers.
            unsafe { stats.copy_from_nonoverlapping(numbers.as_ptr(), n) };
        }
        numbers.len()
    })
}

/// In the order of `QWEN2_STATS_*`.
fn numbers(stats: EngineStats) -> [u64; QWEN2_N_STATS] {
    let mut numbers = [0; QWEN2_N_STATS];
    numbers[QWEN2_STATS_WAITING] = stats.waiting as u64;
    numbers[QWEN2_STATS_RUNNING] = stats.running as u64;
    numbers[QWEN2_STATS_SUBMITTED] = stats.submitted;
    numbers[QWEN2_STATS_FINISHED] = stats.finished;
    numbers[QWEN2_STATS_FAILED] = stats.failed;
    numbers[QWEN2_STATS_PREEMPTED] = stats.preempted;
    numbers[QWEN2_STATS_STEPS] = stats.steps;
    numbers[QWEN2_STATS_PROMPT_TOKENS] = stats.prompt_tokens;
    numbers[QWEN2_STATS_CACHED_TOKENS] = stats.cached_tokens;
    numbers[QWEN2_STATS_COMPLETION_TOKENS] = stats.completion_tokens;
    numbers[QWEN2_STATS_CACHE_BYTES] = stats.cache_bytes;
    numbers[QWEN2_STATS_CACHE_LIMIT] = stats.cache_limit;
    numbers
}
