//! Speculative decoding: tokens proposed ahead, so that one forward of the model checks several.
//!
//! The model chooses every token itself, by its own logits and with the random number that it would
//! have drawn alone; a proposal only decides whether the logits that follow it are there already. So
//! the tokens are those of plain decoding whatever proposes, for every seed and with every penalty and
//! processor: the drafter-invariant form (arXiv:2408.07978) of Leviathan et al. (arXiv:2211.17192) and
//! Chen et al. (arXiv:2302.01318), whose rule leaves the distribution as it is, but not the tokens. A
//! draft model draws with the same random numbers, and so agrees wherever the two are much alike.

use std::sync::Arc;

use super::penalties::Penalties;
use super::{Network, Sampler};
use crate::error::Result;
use crate::model::Rows;
use crate::model::cache::Cache;
use crate::ops::Watch;

/// Tokens that a draft model proposes at a time, unless the caller says how many.
pub(crate) const DRAFT_TOKENS: usize = 4;

/// The last tokens that prompt lookup looks for in what came before: the longest stretch first.
/// A single token would be found almost always, and foretell little.
const NGRAMS: std::ops::RangeInclusive<usize> = 2..=4;

/// A small model with the vocabulary of the large one.
#[derive(Clone)]
pub(crate) struct DraftModel {
    pub(crate) network: Arc<Network>,
    pub(crate) prefill_chunk: usize,
    pub(crate) context_length: usize,
    /// Ids that both models have a row for.
    pub(crate) vocab_size: usize,
}

/// A draft model in one conversation.
#[derive(Clone)]
pub(crate) struct Draft {
    model: DraftModel,
    cache: Cache,
    /// Tokens of which the cache holds a prefix.
    tokens: Vec<u32>,
}

/// What the next token will be chosen by, but for the logits.
pub(crate) struct Choice<'a> {
    pub(crate) tokens: &'a [u32],
    pub(crate) penalties: &'a mut Penalties,
    pub(crate) sampler: &'a Sampler,
}

/// What proposes tokens.
pub(crate) enum Proposer {
    /// What followed the last tokens where they stood before.
    Lookup,
    Draft(Box<Draft>),
}

impl Proposer {
    /// At most `n` tokens that may come behind those of `choice`.
    ///
    /// # Errors
    /// `DeviceFailed` of the draft model, `Cancelled` by the watch.
    pub(crate) fn propose(
        &mut self,
        choice: Choice<'_>,
        n: usize,
        watch: &Watch,
    ) -> Result<Vec<u32>> {
        match self {
            Self::Lookup => Ok(look_up(choice.tokens, n)),
            Self::Draft(draft) => draft.propose(choice, n, watch),
        }
    }
}

impl Draft {
    pub(crate) fn new(model: DraftModel) -> Self {
        let cache = model.network.qwen2.new_cache(model.context_length);
        Self {
            model,
            cache,
            tokens: Vec::new(),
        }
    }

    /// Its own answer.
    fn propose(&mut self, choice: Choice<'_>, n: usize, watch: &Watch) -> Result<Vec<u32>> {
        let Choice {
            tokens,
            penalties,
            sampler,
        } = choice;
        let mut sampler = sampler.twin();
        let known = common(&self.tokens, tokens);
        self.cache.truncate(known);
        self.tokens.truncate(known);
        self.tokens.extend_from_slice(&tokens[known..]);
        let n = n.min(self.model.context_length.saturating_sub(tokens.len()));
        let vocab_size = self.model.vocab_size;
        let is_known = |token: &u32| (*token as usize) < vocab_size;
        if !tokens[known..].iter().all(is_known) {
            return Ok(Vec::new()); // rows that pad the vocabulary of the large model
        }
        while self.tokens.len() < tokens.len() + n {
            let mut logits = self.forward(watch)?;
            penalties.apply(&mut logits, &self.tokens);
            let token = sampler.pick(&logits)?;
            self.tokens.push(token);
            if !is_known(&token) {
                break;
            }
        }
        let proposed = self.tokens[tokens.len()..].iter().copied();
        Ok(proposed.take_while(is_known).collect())
    }

    /// Logits behind its tokens.
    fn forward(&mut self, watch: &Watch) -> Result<Vec<f32>> {
        let network = &self.model.network;
        self.cache.truncate(self.tokens.len() - 1);
        network.qwen2.ready(&mut self.cache, self.tokens.len());
        loop {
            let pending = &self.tokens[self.cache.n_tokens()..];
            let chunk = &pending[..pending.len().min(self.model.prefill_chunk)];
            let rows = match chunk.len() == pending.len() {
                true => Rows::Last,
                false => Rows::None,
            };
            let logits = network.forward(chunk, &mut self.cache, rows, watch)?;
            if rows == Rows::Last {
                return Ok(logits);
            }
        }
    }
}

/// What followed the last tokens where they stood before: at the latest such place of the longest
/// stretch that is found (prompt lookup decoding). A repetition goes on as it went.
fn look_up(tokens: &[u32], n: usize) -> Vec<u32> {
    let found = NGRAMS.rev().find_map(|length| {
        let start = tokens.len().checked_sub(length)?;
        let last = &tokens[start..];
        let at = (0..start)
            .rev()
            .find(|&at| tokens[at..at + length] == *last)?;
        Some(start - at)
    });
    let Some(distance) = found else {
        return Vec::new();
    };
    let mut all = tokens.to_vec();
    for _ in 0..n {
        all.push(all[all.len() - distance]);
    }
    all.split_off(tokens.len())
}

/// How many tokens two sequences share at the start.
pub(crate) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Logits of one forward: those behind a sequence, and those behind the proposals that go with it.
pub(crate) struct Ahead {
    /// Length of the sequence when the forward ran.
    n_tokens: usize,
    proposals: Vec<u32>,
    /// Proposals that the sequence took.
    taken: usize,
    /// One row more than there are proposals; nothing before the first forward.
    logits: Vec<f32>,
}

impl Ahead {
    pub(crate) fn new(n_tokens: usize, proposals: Vec<u32>, logits: Vec<f32>) -> Self {
        Self {
            n_tokens,
            proposals,
            taken: 0,
            logits,
        }
    }

    /// The logits behind `tokens`, a sequence that has grown since the forward ran, if they are here.
    pub(crate) fn row(&mut self, tokens: &[u32]) -> Option<&mut [f32]> {
        let width = self.logits.len() / (self.proposals.len() + 1);
        let new = tokens.len().checked_sub(self.n_tokens)?;
        (self.taken == new && width > 0).then(|| &mut self.logits[new * width..][..width])
    }

    /// Looks at what the sequence has become, and returns how many proposals it took newly.
    pub(crate) fn follow(&mut self, tokens: &[u32]) -> usize {
        let taken = common(&self.proposals, &tokens[self.n_tokens..]);
        let new = taken - self.taken;
        self.taken = taken;
        new
    }

    /// Forgets what the cache holds of proposals that were not taken.
    pub(crate) fn settle(&self, cache: &mut Cache) {
        cache.truncate(self.n_tokens + self.taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookup_goes_on_as_the_longest_and_latest_repetition_did() {
        assert_eq!(look_up(&[1, 2, 3, 9, 1, 2, 4, 5, 1, 2], 3), [4, 5, 1]);
        // Three tokens beat two that stand nearer.
        assert_eq!(look_up(&[7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1), [3]);
        assert_eq!(look_up(&[5, 6, 5, 6], 5), [5, 6, 5, 6, 5]);
        assert_eq!(look_up(&[3, 3, 3], 2), [3, 3]);
        assert!(look_up(&[1, 2, 3, 4, 3], 2).is_empty());
        assert!(look_up(&[1], 2).is_empty());
        assert!(look_up(&[], 2).is_empty());
    }

    #[test]
    fn rows_are_there_as_long_as_the_sequence_takes_the_proposals() {
        let mut ahead = Ahead::new(2, vec![5, 6], vec![0.0, 0.5, 1.0, 1.5, 2.0, 2.5]);
        assert_eq!(ahead.row(&[1, 2]), Some(&mut [0.0, 0.5][..]));
        assert_eq!(ahead.follow(&[1, 2, 5]), 1);
        assert_eq!(ahead.row(&[1, 2, 5]), Some(&mut [1.0, 1.5][..]));
        assert_eq!(ahead.follow(&[1, 2, 5, 7]), 0);
        assert_eq!(ahead.row(&[1, 2, 5, 7]), None);
        assert!(Ahead::new(2, vec![], vec![]).row(&[1, 2]).is_none());
        // Two tokens at once, both foretold.
        let mut ahead = Ahead::new(2, vec![5, 6], vec![0.0, 1.0, 2.0]);
        assert_eq!(ahead.follow(&[1, 2, 5, 6]), 2);
        assert_eq!(ahead.row(&[1, 2, 5, 6]), Some(&mut [2.0][..]));
        assert_eq!(ahead.follow(&[1, 2, 5, 6, 9]), 0);
        assert_eq!(ahead.row(&[1, 2, 5, 6, 9]), None);
    }
}
