//! What the options change in the logits before a token is drawn: biases, penalties, bans.

use super::Resolved;
use super::bad_words::BadWords;

/// Changes logits in the order of transformers: `logit_bias`, `repetition_penalty`, `presence_penalty` and
/// `frequency_penalty` (which transformers lacks), `bad_words`, `min_new_tokens`.
///
/// It keeps no state of the text: what it does follows from the tokens it is given.
pub(crate) struct Penalties {
    logit_bias: Vec<(u32, f32)>,
    repetition: f32,
    presence: f32,
    frequency: f32,
    bad_words: BadWords,
    end_tokens: Vec<u32>,
    min_new_tokens: usize,
    n_prompt: usize,
    // One bit for each token, for as long as the generation: nothing is allocated per token.
    seen: Vec<u64>,
}

impl Penalties {
    /// For a generation behind `n_prompt` tokens.
    pub(crate) fn new(resolved: &Resolved, n_prompt: usize, bad_words: BadWords) -> Self {
        let ends = resolved
            .eos_token_ids
            .iter()
            .chain(&resolved.stop_token_ids);
        Self {
            logit_bias: resolved
                .logit_bias
                .iter()
                .map(|(&id, &bias)| (id, bias))
                .collect(),
            repetition: resolved.repetition_penalty,
            presence: resolved.presence_penalty,
            frequency: resolved.frequency_penalty,
            bad_words,
            end_tokens: ends.copied().collect(),
            min_new_tokens: resolved.min_new_tokens,
            n_prompt,
            seen: Vec::new(),
        }
    }

    /// How many logits it may lower, if it raises none and that number has a bound beforehand. The
    /// repetition penalty does not count: the callers leave room for it.
    pub(crate) fn lowers(&self) -> Option<usize> {
        let raises = self.repetition < 1.0 || self.logit_bias.iter().any(|(_, bias)| *bias > 0.0);
        let unbounded = self.presence != 0.0 || self.frequency != 0.0 || !self.bad_words.is_empty();
        let ends = match self.min_new_tokens {
            0 => 0,
            _ => self.end_tokens.len(),
        };
        (!raises && !unbounded).then_some(self.logit_bias.len() + ends)
    }

    /// Whether it raises no logit.
    #[cfg(feature = "gpu")]
    pub(crate) fn only_lowers(&self) -> bool {
        self.repetition >= 1.0
            && self.presence >= 0.0
            && self.frequency >= 0.0
            && self.logit_bias.iter().all(|(_, bias)| *bias <= 0.0)
    }

    /// Whether it changes no logit behind so many tokens of output.
    #[cfg(feature = "gpu")]
    pub(crate) fn is_idle(&self, n_output: usize) -> bool {
        self.repetition == 1.0
            && self.presence == 0.0
            && self.frequency == 0.0
            && self.logit_bias.is_empty()
            && self.bad_words.is_empty()
            && n_output >= self.min_new_tokens
    }

    /// Whether it can leave no token at all.
    pub(crate) fn bans(&self) -> bool {
        !self.bad_words.is_empty() || self.min_new_tokens > 0
    }

    /// `tokens` are those of the prompt and of the output so far.
    pub(crate) fn apply(&mut self, logits: &mut [f32], tokens: &[u32]) {
        for &(id, bias) in &self.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        self.repetition(logits, tokens);
        let output = tokens.get(self.n_prompt..).unwrap_or_default();
        self.presence_and_frequency(logits, output);
        self.bad_words.ban(logits, tokens, self.n_prompt);
        if output.len() < self.min_new_tokens {
            self.end_tokens.iter().for_each(|&id| forbid(logits, id));
        }
    }

    /// `logit / penalty` above zero, `logit * penalty` below, once for each token that occurs.
    fn repetition(&mut self, logits: &mut [f32], tokens: &[u32]) {
        let penalty = self.repetition;
        if penalty == 1.0 {
            return;
        }
        clear(&mut self.seen, logits.len());
        for &token in tokens {
            // A prompt may name ids that the model has no row for only when it was rejected
            // before; ignoring them here keeps this loop free of a second error path.
            if let Some(logit) = logits.get_mut(token as usize)
                && is_new(&mut self.seen, token)
            {
                *logit = if *logit < 0.0 {
                    *logit * penalty
                } else {
                    *logit / penalty
                };
            }
        }
    }

    /// `logit - presence - frequency · count` for each token of the output.
    fn presence_and_frequency(&mut self, logits: &mut [f32], output: &[u32]) {
        if self.presence == 0.0 && self.frequency == 0.0 {
            return;
        }
        clear(&mut self.seen, logits.len());
        for &token in output {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= self.frequency;
                if is_new(&mut self.seen, token) {
                    *logit -= self.presence;
                }
            }
        }
    }
}

/// Makes a token impossible.
pub(super) fn forbid(logits: &mut [f32], id: u32) {
    if let Some(logit) = logits.get_mut(id as usize) {
        *logit = f32::NEG_INFINITY;
    }
}

fn clear(seen: &mut Vec<u64>, n: usize) {
    seen.clear();
    seen.resize(n.div_ceil(64), 0);
}

/// Whether `id` has not been seen yet; it has been then.
fn is_new(seen: &mut [u64], id: u32) -> bool {
    let bit = 1_u64 << (id % 64);
    let word = &mut seen[id as usize / 64];
    let is_new = *word & bit == 0;
    *word |= bit;
    is_new
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use crate::generate::{GenerateOptions, SamplingDefaults};
    use proptest::prelude::*;

    fn penalties(options: &GenerateOptions, n_prompt: usize) -> Penalties {
        let defaults = SamplingDefaults {
            eos_token_ids: vec![7],
            ..SamplingDefaults::default()
        };
        let resolved = options.resolve(&defaults).unwrap();
        Penalties::new(&resolved, n_prompt, BadWords::default())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// The reference counts with a map. 1e-5: sums of up to 40 terms below 2, in another order.
        #[test]
        fn presence_and_frequency_count_in_the_output_only(
            tokens in prop::collection::vec(0..12_u32, 0..40),
            n_prompt in 0..40_usize,
            presence in -2.0..2.0_f32,
            frequency in -2.0..2.0_f32,
        ) {
            let n_prompt = n_prompt.min(tokens.len());
            let options = GenerateOptions::new().presence_penalty(presence).frequency_penalty(frequency);
            let mut logits: Vec<f32> = (0..10).map(|id| id as f32 / 3.0 - 1.0).collect();
            let before = logits.clone();
            penalties(&options, n_prompt).apply(&mut logits, &tokens);
            let mut counts = std::collections::HashMap::new();
            for token in &tokens[n_prompt..] {
                *counts.entry(*token as usize).or_insert(0.0) += 1.0_f32;
            }
            for (id, (after, before)) in logits.iter().zip(before).enumerate() {
                let count = counts.get(&id).copied().unwrap_or(0.0);
                let expected = before - frequency * count - if count > 0.0 { presence } else { 0.0 };
                prop_assert!((after - expected).abs() < 1e-4, "{id}: {after}, not {expected}");
            }
        }
    }

    #[test]
    fn end_tokens_come_back_when_the_output_is_long_enough() {
        let options = GenerateOptions::new().min_new_tokens(2).stop_token_ids([3]);
        let mut penalties = penalties(&options, 1);
        for (tokens, banned) in [(&[1][..], true), (&[1, 2], true), (&[1, 2, 2], false)] {
            let mut logits = [0.0; 8];
            penalties.apply(&mut logits, tokens);
            for (id, logit) in logits.iter().enumerate() {
                assert_eq!(*logit == f32::NEG_INFINITY, banned && (id == 3 || id == 7));
            }
        }
    }

    #[test]
    fn only_a_bounded_number_of_lowered_logits_lets_a_head_be_screened() {
        let new = GenerateOptions::new;
        let cases = [
            (new(), Some(0)),
            (new().repetition_penalty(1.1), Some(0)),
            (new().repetition_penalty(0.9), None),
            (new().logit_bias([(1, -5.0), (2, -1.0)]), Some(2)),
            (new().logit_bias([(1, -5.0), (2, 1.0)]), None),
            (new().min_new_tokens(4), Some(1)),
            (new().presence_penalty(0.5), None),
            (new().frequency_penalty(-0.5), None),
        ];
        for (options, lowers) in cases {
            assert_eq!(penalties(&options, 0).lowers(), lowers, "{options:?}");
        }
    }
}
