//! How likely tokens were: natural logarithms of the softmax of the model's own logits.

use serde::Serialize;

use super::sampler::kth_largest;

/// How likely the token at one position was, and which ones were the likeliest there.
///
/// Natural logarithms of the softmax of the logits as the model gives them: before biases, penalties,
/// bans, a logits processor, temperature and filters.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Logprobs {
    /// The token that is there.
    pub token: u32,
    /// Its log-probability, at most 0.
    pub logprob: f32,
    /// The likeliest tokens, as many as asked for, the likeliest first and of equal ones the lower id.
    pub top: Vec<TokenLogprob>,
}

/// A token and its log-probability.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TokenLogprob {
    /// The token's id.
    pub token: u32,
    /// Natural logarithm of its probability, at most 0.
    pub logprob: f32,
}

/// The logarithm of the softmax of a row of logits.
pub(crate) struct LogSoftmax {
    max: f32,
    /// f64: 151,936 terms added in f32 would be off in the fourth digit.
    log_sum: f64,
}

impl LogSoftmax {
    pub(crate) fn of(row: &[f32]) -> Self {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&logit| f64::from(logit - max).exp()).sum();
        Self {
            max,
            log_sum: sum.ln(),
        }
    }

    /// Log-probability of a token by its logit.
    pub(crate) fn get(&self, logit: f32) -> f32 {
        (f64::from(logit - self.max) - self.log_sum) as f32
    }
}

/// Says how likely tokens were, with the `top_k` likeliest.
pub(super) struct Recorder {
    top_k: usize,
    // The model's logits, while the step changes its own; and room to look for the highest.
    raw: Vec<f32>,
    scratch: Vec<f32>,
}

impl Recorder {
    pub(super) fn new(top_k: usize) -> Self {
        Self {
            top_k,
            raw: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// Keeps the logits of a step.
    pub(super) fn keep(&mut self, logits: &[f32]) {
        self.raw.clear();
        self.raw.extend_from_slice(logits);
    }

    /// About the token that was chosen by the logits that were kept.
    pub(super) fn chosen(&mut self, token: u32) -> Logprobs {
        let row = std::mem::take(&mut self.raw);
        let logprobs = self.of(&row, token);
        self.raw = row;
        logprobs
    }

    /// About `token`, which is in the row.
    pub(super) fn of(&mut self, row: &[f32], token: u32) -> Logprobs {
        let softmax = LogSoftmax::of(row);
        Logprobs {
            token,
            logprob: softmax.get(row[token as usize]),
            top: self.top(row, &softmax),
        }
    }

    fn top(&mut self, row: &[f32], softmax: &LogSoftmax) -> Vec<TokenLogprob> {
        let n = self.top_k.min(row.len());
        if n == 0 {
            return Vec::new();
        }
        let floor = kth_largest(row.iter().copied(), n, &mut self.scratch);
        let mut top: Vec<(u32, f32)> = Vec::with_capacity(n + 1);
        // All above the last of them, then as many of those equal to it as there is room for.
        let of = |take: fn(f32, f32) -> bool| {
            let ids = (0..).zip(row.iter().copied());
            ids.filter(move |(_, logit)| take(*logit, floor))
        };
        top.extend(of(|logit, floor| logit > floor));
        let room = n.saturating_sub(top.len());
        top.extend(of(|logit, floor| logit == floor).take(room));
        top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let found = top.into_iter().map(|(token, logit)| TokenLogprob {
            token,
            logprob: softmax.get(logit),
        });
        found.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Coarse logits, so that ties are common; the reference sorts all of them.
        #[test]
        fn the_likeliest_are_those_of_a_full_sort(
            coarse in prop::collection::vec(-8..8_i8, 1..600),
            top_k in 0..40_usize,
            token in 0..1000_usize,
        ) {
            let row: Vec<f32> = coarse.iter().map(|&logit| f32::from(logit)).collect();
            let token = (token % row.len()) as u32;
            let found = Recorder::new(top_k).of(&row, token);
            let mut order: Vec<u32> = (0..row.len() as u32).collect();
            order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
            order.truncate(top_k);
            let ids: Vec<u32> = found.top.iter().map(|top| top.token).collect();
            prop_assert_eq!(ids, order);
            let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
            let expected = f64::from(row[token as usize]) - sum.ln();
            prop_assert!((f64::from(found.logprob) - expected).abs() < 1e-5);
        }
    }
}
