//! Perplexity of a text in windows, as Hugging Face's guide computes it for models of fixed length.

use super::model::Model;
use crate::error::{Error, ErrorKind, Result};
use crate::generate::CancelToken;

/// How well a model foretells a text.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Mean negative natural log-likelihood of a token.
    pub nll: f64,
    /// Tokens that were foretold: all but the first.
    pub n_tokens: usize,
}

impl Model {
    /// The perplexity of `tokens`: windows of `window` tokens begin every `stride` tokens; each token
    /// counts once, in the first window that has it, foretold from what that window has before it.
    ///
    /// # Errors
    /// `InvalidArgument` for fewer than two tokens, a window of less than two or longer than the context,
    /// a stride of 0 or one that leaves a token without any before it, and as [`Model::score`].
    pub fn perplexity(&self, tokens: &[u32], window: usize, stride: usize) -> Result<Perplexity> {
        self.perplexity_with(tokens, window, stride, &CancelToken::new())
    }

    /// As [`Model::perplexity`], until `cancel` ends it.
    ///
    /// # Errors
    /// As [`Model::perplexity`], and `Cancelled`.
    pub fn perplexity_with(
        &self,
        tokens: &[u32],
        window: usize,
        stride: usize,
        cancel: &CancelToken,
    ) -> Result<Perplexity> {
        let refuse = |key: &str, why: String, help: &str| {
            Err(
                Error::new(ErrorKind::InvalidArgument, "perplexity cannot be computed")
                    .with_key(key)
                    .with_why(why)
                    .with_help(help),
            )
        };
        let most = self.context_length();
        if tokens.len() < 2 {
            let why = format!("{}, the first has nothing before it", tokens.len());
            return refuse("tokens", why, "give two tokens or more");
        }
        if !(2..=most).contains(&window) {
            return refuse("window", window.to_string(), &format!("2 to {most}"));
        }
        if !(1..window).contains(&stride) {
            return refuse(
                "stride",
                stride.to_string(),
                "at least 1, less than the window",
            );
        }
        let (mut sum, mut done) = (0.0, 1); // the first token is given
        for start in (0..tokens.len()).step_by(stride) {
            let end = tokens.len().min(start + window);
            let scores = self.score_with(&tokens[start..end], cancel)?;
            let new = &scores[done - start - 1..];
            sum -= new.iter().map(|score| f64::from(*score)).sum::<f64>();
            done = end;
            if end == tokens.len() {
                break;
            }
        }
        let n_tokens = tokens.len() - 1;
        let nll = sum / n_tokens as f64;
        Ok(Perplexity {
            perplexity: nll.exp(),
            nll,
            n_tokens,
        })
    }
}
