//! A token's step on a device that finds the next token itself, or the likeliest ones, of which it is.

use super::sequence::Sequence;
use super::step::Network;
use crate::error::Result;
use crate::model::cache::Cache;
use crate::model::replay::Found;

/// What came of it.
pub(crate) enum Answer {
    /// The device is not asked in this way, and nothing has happened.
    None,
    /// The token behind the sequence, whose last one the cache has now.
    Token(u32),
    /// These did not tell: all logits behind that last one.
    Logits(Vec<f32>),
}

/// The step of the last token of `sequence`, which alone the cache has not seen.
///
/// # Errors
/// Those of the forward.
pub(crate) fn next(
    network: &Network,
    sequence: &mut Sequence,
    cache: &mut Cache,
) -> Result<Answer> {
    let Some((last, before)) = sequence.tokens().split_last() else {
        return Ok(Answer::None);
    };
    if cache.n_tokens() != before.len() || !sequence.takes_likeliest() {
        return Ok(Answer::None);
    }
    let last = *last;
    if sequence.takes_best() {
        return Ok(match network.best(last, cache)? {
            None => Answer::None,
            Some(token) => Answer::Token(token),
        });
    }
    Ok(match network.likeliest(last, cache)? {
        None => Answer::None,
        Some(Found::All(logits)) => Answer::Logits(logits),
        Some(Found::Likeliest(likeliest)) => match sequence.choose_among(likeliest) {
            Some(token) => Answer::Token(token),
            None => Answer::Logits(network.all_of_likeliest(cache)?),
        },
    })
}
