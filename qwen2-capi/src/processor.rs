//! A function of the caller's that changes the logits before each choice.

use std::ffi::c_void;

use qwen2_core::{Error, LogitsProcessor};

use crate::fence;
use crate::options::qwen2_options;

/// Called before each choice, behind penalties and bans and before temperature and filters, on the thread
/// that generates: `tokens` are those of the prompt and of the output so far, `logits` one number for each
/// id of the vocabulary, to be changed in place; `-INFINITY` forbids a token. Both are valid during the
/// call only. Returns 0 to go on; anything else ends the generation, which then fails with
/// `QWEN2_ERROR_CANCELLED`. It must not use the stream or the session that calls it, which fails; on an
/// engine's thread it must neither wait for a request of the engine nor free the engine. It must return: no
/// `longjmp`, no C++ exception.
pub type qwen2_logits_processor_fn = Option<
    unsafe extern "C" fn(
        tokens: *const u32,
        n_tokens: usize,
        logits: *mut f32,
        n_logits: usize,
        user_data: *mut c_void,
    ) -> i32,
>;

#[derive(Clone, Copy)]
pub(crate) struct Processor {
    call: unsafe extern "C" fn(*const u32, usize, *mut f32, usize, *mut c_void) -> i32,
    user_data: *mut c_void,
}

// SAFETY: the core calls it on the thread that asks for a piece or a generation, or on an engine's, and the
// header says so.
unsafe impl Send for Processor {}

impl LogitsProcessor for Processor {
    fn process(&mut self, tokens: &[u32], logits: &mut [f32]) -> qwen2_core::Result<()> {
        let (n_tokens, n_logits) = (tokens.len(), logits.len());
        // SAFETY: the caller gave a function of this signature, and `user_data` for it; the arrays are as
        // long as it is told.
        let status = unsafe {
            (self.call)(
                tokens.as_ptr(),
                n_tokens,
                logits.as_mut_ptr(),
                n_logits,
                self.user_data,
            )
        };
        match status {
            0 => Ok(()),
            status => Err(Error::stopped(format!("it returned {status}"))),
        }
    }
}

/// Who changes the logits before each choice; NULL: nobody, the default. `user_data` is borrowed until
/// every generation with these settings has ended and every stream and request with them was freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_logits_processor(
    options: *mut qwen2_options,
    processor: qwen2_logits_processor_fn,
    user_data: *mut c_void,
) {
    fence::change(options, |options| {
        options.processor = processor.map(|call| Processor { call, user_data });
    });
}
