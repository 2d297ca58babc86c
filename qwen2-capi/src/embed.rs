//! Text to a vector.

use qwen2_core::Pooling;

use crate::error::{QWEN2_OK, qwen2_error, qwen2_status};
use crate::fence;
use crate::model::{or_off, qwen2_model};
use crate::options::qwen2_cancel;
use crate::prompt::qwen2_prompt;

/// The mean of the tokens' hidden states.
pub const QWEN2_POOLING_MEAN: i32 = 0;
/// The last token's hidden state, which is what embedding models made of Qwen2 are trained for.
pub const QWEN2_POOLING_LAST_TOKEN: i32 = 1;

/// The embedding of a prompt: the hidden states behind the final norm, pooled as `pooling` says, one of
/// `QWEN2_POOLING_*`, with squares that sum to 1. `embedding` is the caller's array of
/// `qwen2_model_hidden_size` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_embed(
    model: *const qwen2_model,
    prompt: *const qwen2_prompt,
    pooling: i32,
    embedding: *mut f32,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    qwen2_model_embed_with(model, prompt, pooling, std::ptr::null(), embedding, error)
}

/// As `qwen2_model_embed`, until `cancel` (may be NULL) ends it with `QWEN2_ERROR_CANCELLED`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_model_embed_with(
    model: *const qwen2_model,
    prompt: *const qwen2_prompt,
    pooling: i32,
    cancel: *const qwen2_cancel,
    embedding: *mut f32,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        fence::out(embedding, "embedding")?;
        let (model, prompt) = (fence::borrow(model)?, fence::borrow(prompt)?);
        let pooling = match pooling {
            QWEN2_POOLING_MEAN => Pooling::Mean,
            QWEN2_POOLING_LAST_TOKEN => Pooling::LastToken,
            other => {
                let help = "give one of QWEN2_POOLING_*";
                let why = Some(other.to_string());
                return Err(qwen2_error::invalid(
                    "pooling",
                    "unknown pooling",
                    why,
                    help,
                ));
            }
        };
        let computed = model
            .model
            .embed_with(prompt.get(), pooling, &or_off(cancel)?)?;
        // SAFETY: not NULL, and the caller promises room for `hidden_size` numbers.
        unsafe { embedding.copy_from_nonoverlapping(computed.as_ptr(), computed.len()) };
        Ok(QWEN2_OK)
    })
}
