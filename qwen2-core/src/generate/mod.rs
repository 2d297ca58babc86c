//! Logits to tokens to text: settings, sampling, where to end, and the loop around the network.

mod bad_words;
#[cfg(feature = "constraint")]
mod bounds;
mod cancel;
#[cfg(feature = "constraint")]
mod compile;
mod constraint;
mod guide;
mod logprobs;
#[cfg(feature = "gpu")]
pub(crate) mod on_device;
mod options;
mod penalties;
mod prefill;
mod resolved;
mod results;
mod sampler;
mod sequence;
mod speculative;
mod step;
mod stop;
mod stream;
mod tool_grammar;

pub use bad_words::BadWord;
pub use cancel::CancelToken;
pub use constraint::Constraint;
pub(crate) use guide::Guide;
pub(crate) use logprobs::LogSoftmax;
pub use logprobs::{Logprobs, TokenLogprob};
pub use options::GenerateOptions;
pub use prefill::{OnPrefill, PrefillProgress};
pub(crate) use resolved::{Resolved, SamplingDefaults};
pub use results::{Generation, Piece, Timings, Usage};
pub(crate) use sampler::Sampler;
pub(crate) use sequence::Sequence;
pub(crate) use speculative::{Draft, DraftModel};
pub(crate) use step::Network;
pub(crate) use stop::StopMatcher;
pub use stop::{FinishReason, StopMatch};
pub use stream::TokenStream;
pub(crate) use stream::{Host, Run};

/// Changes the logits before each choice: behind penalties and bans, before temperature and filters, as a
/// processor of transformers.
pub trait LogitsProcessor: Send {
    /// `tokens`: prompt and new tokens so far; `logits`: one for each id of the vocabulary.
    ///
    /// # Errors
    /// An error ends the generation with it; see [`Error::stopped`](crate::Error::stopped).
    fn process(&mut self, tokens: &[u32], logits: &mut [f32]) -> crate::error::Result<()>;
}

impl<P: LogitsProcessor + ?Sized> LogitsProcessor for Box<P> {
    fn process(&mut self, tokens: &[u32], logits: &mut [f32]) -> crate::error::Result<()> {
        (**self).process(tokens, logits)
    }
}
