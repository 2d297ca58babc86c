//! Text to a vector: the network's last hidden states, pooled and of length 1.

use super::model::{Model, Prompt};
use crate::error::{Error, ErrorKind, Result};
use crate::generate::CancelToken;
use crate::model::Rows;

/// What becomes of the hidden states of a text's tokens.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Pooling {
    /// Their mean.
    #[default]
    Mean,
    /// The last token's, which is the only one that has seen all the others; what the embedding models
    /// made of Qwen2 are trained for.
    LastToken,
}

impl Pooling {
    /// The name as Python and the command line spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::LastToken => "last_token",
        }
    }
}

impl std::str::FromStr for Pooling {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "mean" => Ok(Self::Mean),
            "last_token" => Ok(Self::LastToken),
            _ => Err(Error::new(ErrorKind::InvalidArgument, "unknown pooling")
                .with_key("pooling")
                .with_why(name)
                .with_help("mean or last_token")),
        }
    }
}

impl Model {
    /// The embedding of a prompt, `hidden_size` numbers whose squares sum to 1: the hidden states behind
    /// the final norm, pooled over the tokens. Nothing is put in front of a text or behind it; give tokens
    /// for a model that wants an end token.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty prompt or an unknown id, `ContextOverflow`, `InvalidTemplate`,
    /// `DeviceFailed`.
    pub fn embed(&self, prompt: impl Into<Prompt>, pooling: Pooling) -> Result<Vec<f32>> {
        self.embed_with(prompt, pooling, &CancelToken::new())
    }

    /// As [`Model::embed`], until `cancel` ends it.
    ///
    /// # Errors
    /// As [`Model::embed`], and `Cancelled`.
    pub fn embed_with(
        &self,
        prompt: impl Into<Prompt>,
        pooling: Pooling,
        cancel: &CancelToken,
    ) -> Result<Vec<f32>> {
        let tokens = self.encode(&prompt.into())?;
        self.check_tokens(&tokens)?;
        let host = &self.inner.host;
        let mut cache = self.new_cache();
        host.network.qwen2.ready(&mut cache, tokens.len());
        let hidden_size = self.inner.config.hidden_size;
        let mut sum = vec![0.0_f64; hidden_size];
        let watch = cancel.watch();
        for chunk in tokens.chunks(host.prefill_chunk) {
            let states = host
                .network
                .forward(chunk, &mut cache, Rows::Hidden, &watch)?;
            for state in states.chunks_exact(hidden_size) {
                if pooling == Pooling::LastToken {
                    sum.fill(0.0); // the last one stays
                }
                sum.iter_mut()
                    .zip(state)
                    .for_each(|(sum, x)| *sum += f64::from(*x));
            }
        }
        unit_length(&sum)
    }
}

/// The length of a mean and of a sum are alike once both are 1.
fn unit_length(vector: &[f64]) -> Result<Vec<f32>> {
    let length = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
    if !(length > 0.0 && length.is_finite()) {
        return Err(Error::new(ErrorKind::DeviceFailed, "embedding failed")
            .with_why(format!("the pooled hidden state has the length {length}"))
            .with_help(
                "are the weights damaged? if not, load with dtype f32 or on another device",
            ));
    }
    Ok(vector.iter().map(|x| (x / length) as f32).collect())
}
