//! Logits to tokens to text: settings, sampling, where to end, and the loop around the network.

#[cfg(feature = "constraint")]
mod compile;
mod constraint;
mod guide;
mod options;
mod prefill;
mod results;
mod sampler;
mod sequence;
mod speculative;
mod step;
mod stop;
mod stream;
mod tool_grammar;

pub use constraint::Constraint;
pub(crate) use guide::Guide;
pub use options::{CancelToken, GenerateOptions};
pub(crate) use options::{Resolved, SamplingDefaults};
pub use prefill::{OnPrefill, PrefillProgress};
pub use results::{Generation, Piece, Timings, Usage};
pub(crate) use sampler::Sampler;
pub(crate) use sequence::Sequence;
pub(crate) use speculative::{Draft, DraftModel};
pub(crate) use step::Network;
pub(crate) use stop::StopMatcher;
pub use stop::{FinishReason, StopMatch};
pub use stream::TokenStream;
pub(crate) use stream::{Host, Run};

/// Changes the logits before each choice: behind the model, before penalties and sampling.
pub trait LogitsProcessor: Send {
    /// `tokens`: prompt and new tokens so far; `logits`: one for each id of the vocabulary.
    ///
    /// # Errors
    /// An error ends the generation with it.
    fn process(&mut self, tokens: &[u32], logits: &mut [f32]) -> crate::error::Result<()>;
}
