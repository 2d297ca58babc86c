//! Logits to a token.

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};

use crate::error::{Error, ErrorKind, Result};
use crate::generate::resolved::Resolved;

/// Picks tokens. Filters in the order of transformers: temperature, top_k, top_p, min_p, typical_p; then
/// a draw by probability.
///
/// The random numbers are ChaCha8 with the seed as the first 8 bytes of the key, little-endian,
/// and zeros behind it: the same on every build, one draw of 64 bits a token.
pub(crate) struct Sampler {
    filters: Filters,
    rng: ChaCha8Rng,
    // Buffers that live as long as the generation: nothing is allocated per token.
    kept: Vec<Candidate>,
    scratch: Vec<f32>,
}

#[derive(Clone, Copy)]
struct Filters {
    greedy: bool,
    temperature: f32,
    top_k: Option<usize>,
    top_p: f32,
    min_p: f32,
    typical_p: f32,
}

#[derive(Clone, Copy)]
struct Candidate {
    id: u32,
    score: f32,
}

impl Sampler {
    pub(crate) fn new(resolved: &Resolved) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&resolved.seed.to_le_bytes());
        Self {
            filters: Filters {
                greedy: resolved.is_greedy(),
                temperature: resolved.temperature,
                top_k: resolved.top_k,
                top_p: resolved.top_p,
                min_p: resolved.min_p,
                typical_p: resolved.typical_p,
            },
            rng: ChaCha8Rng::from_seed(key),
            kept: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// A second one that will draw what this one draws.
    pub(crate) fn twin(&self) -> Self {
        let mut rng = ChaCha8Rng::from_seed(self.rng.get_seed());
        rng.set_word_pos(self.rng.get_word_pos());
        Self {
            filters: self.filters,
            rng,
            kept: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// Of how many of the highest logits the choice depends.
    pub(crate) fn looks_at(&self) -> usize {
        match self.filters.top_k {
            _ if self.filters.greedy => 1,
            Some(top_k) => top_k,
            None => usize::MAX,
        }
    }

    /// The next token. Greedy takes the lowest of the ids that share the highest logit.
    ///
    /// # Errors
    /// `DeviceFailed` when the logits hold NaN or +infinity, or are all -infinity.
    pub(crate) fn pick(&mut self, logits: &[f32]) -> Result<u32> {
        let best = best(logits)?;
        if self.filters.greedy {
            return Ok(best.id);
        }
        self.filter(logits.iter().copied().zip(0..), best);
        Ok(self.draw(best.id))
    }

    /// As [`Self::pick`] of all logits, from the likeliest tokens in the order of their ids, where every other logit is
    /// below `floor`; nothing, and without a draw, where these do not tell.
    #[cfg(feature = "gpu")]
    pub(crate) fn pick_among(&mut self, likeliest: &[(u32, f32)], floor: f32) -> Option<u32> {
        // Ties that the temperature makes may be with any other.
        let temperature = match self.filters.greedy {
            true => 1.0,
            false => self.filters.temperature,
        };
        let is_above = |(_, logit): &&(u32, f32)| logit / temperature > floor / temperature;
        if likeliest.iter().filter(is_above).count() < self.looks_at() {
            return None;
        }
        let candidates = likeliest.iter().map(|&(id, score)| Candidate { id, score });
        let higher = |a: Candidate, b: Candidate| if b.score > a.score { b } else { a };
        let best = candidates.reduce(higher)?;
        if self.filters.greedy {
            return Some(best.id);
        }
        self.filter(likeliest.iter().map(|&(id, logit)| (logit, id)), best);
        Some(self.draw(best.id))
    }

    /// Leaves in `kept` what temperature and filters leave of the logits, which have their ids beside them and are in
    /// the order of these.
    fn filter(&mut self, logits: impl Iterator<Item = (f32, u32)> + Clone, best: Candidate) {
        let temperature = self.filters.temperature;
        // The scores of transformers are divided before they are compared, so ties that the
        // division makes are ties here, too.
        let floor = match self.filters.top_k {
            Some(top_k) => {
                let scores = logits.clone().map(|(logit, _)| logit / temperature);
                kth_largest(scores, top_k, &mut self.scratch)
            }
            None => f32::NEG_INFINITY,
        };
        self.kept.clear();
        let candidates = logits.filter_map(|(logit, id)| {
            let score = logit / temperature;
            (score >= floor && score > f32::NEG_INFINITY).then_some(Candidate { id, score })
        });
        self.kept.extend(candidates);
        let highest = best.score / temperature;
        if self.filters.top_p < 1.0 {
            self.keep_top_p(highest);
        }
        if self.filters.min_p > 0.0 {
            let min_p = self.filters.min_p;
            self.kept
                .retain(|candidate| (candidate.score - highest).exp() >= min_p);
        }
        if self.filters.typical_p < 1.0 {
            self.keep_typical(highest);
        }
    }

    /// Keeps the tokens whose information, `-ln p`, is nearest to its mean, until their probabilities add
    /// up to `typical_p`; those as near as the last of them stay, too.
    fn keep_typical(&mut self, highest: f32) {
        let total = total(&self.kept, highest);
        let log_total = total.ln() as f32;
        let information = |candidate: &Candidate| log_total - (candidate.score - highest);
        let terms = self.kept.iter().map(|candidate| {
            weight(candidate.score, highest) / total * f64::from(information(candidate))
        });
        let entropy = terms.sum::<f64>() as f32;
        let distance = |candidate: &Candidate| (information(candidate) - entropy).abs();
        self.kept
            .sort_unstable_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.id.cmp(&b.id)));
        let mass = f64::from(self.filters.typical_p) * total;
        let mut sum = 0.0;
        let last = self.kept.iter().find(|candidate| {
            sum += weight(candidate.score, highest);
            sum >= mass
        });
        // Only where the sums round apart there is none.
        let most = last.map_or(f32::INFINITY, &distance);
        self.kept.retain(|candidate| distance(candidate) <= most);
        self.kept.sort_unstable_by_key(|candidate| candidate.id);
    }

    /// Drops the least likely tokens whose probabilities add up to `1 - top_p` or less, but never
    /// the likeliest; of equal ones the lower id goes first, as a stable ascending sort has it.
    fn keep_top_p(&mut self, highest: f32) {
        let total = total(&self.kept, highest);
        let tail = (1.0 - f64::from(self.filters.top_p)) * total;
        // Tokens this small are all in the tail whatever their order: sorting the rest is enough.
        let small = tail / self.kept.len() as f64;
        let mut sum = 0.0;
        let mut rest = std::mem::take(&mut self.kept);
        rest.retain(|candidate| {
            let weight = weight(candidate.score, highest);
            if weight < small {
                sum += weight;
            }
            weight >= small
        });
        rest.sort_unstable_by(|a, b| a.score.total_cmp(&b.score).then(a.id.cmp(&b.id)));
        let mut dropped = 0;
        for candidate in &rest[..rest.len().saturating_sub(1)] {
            sum += weight(candidate.score, highest);
            if sum > tail {
                break;
            }
            dropped += 1;
        }
        rest.drain(..dropped);
        rest.sort_unstable_by_key(|candidate| candidate.id);
        self.kept = rest;
    }

    /// One of the kept tokens by its probability.
    fn draw(&mut self, best: u32) -> u32 {
        let highest = self
            .kept
            .iter()
            .map(|c| c.score)
            .fold(f32::NEG_INFINITY, f32::max);
        // 53 bits: every double in [0, 1) that is a multiple of 2^-53 is equally likely.
        let uniform = (self.rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let target = uniform * total(&self.kept, highest);
        let mut sum = 0.0;
        for candidate in &self.kept {
            sum += weight(candidate.score, highest);
            if sum > target {
                return candidate.id;
            }
        }
        best // only if the sums round apart
    }
}

/// Probability up to the common factor: 1 for the highest score. f32 as in transformers.
fn weight(score: f32, highest: f32) -> f64 {
    f64::from((score - highest).exp())
}

/// f64: 151,936 terms added in f32 would be off in the fourth digit.
fn total(kept: &[Candidate], highest: f32) -> f64 {
    kept.iter()
        .map(|candidate| weight(candidate.score, highest))
        .sum()
}

/// The highest logit, with the lowest id that has it.
fn best(logits: &[f32]) -> Result<Candidate> {
    // Lanes of their own let the compiler use vectors: 151,936 logits are read for every token. Of the stretches
    // the first that has the highest is kept, so that its id is not looked for among all.
    const LANES: usize = 16;
    const STRETCH: usize = 1024;
    let (mut score, mut first, mut has_nan) = (f32::NEG_INFINITY, 0, false);
    for (index, stretch) in logits.chunks(STRETCH).enumerate() {
        let (blocks, rest) = stretch.as_chunks::<LANES>();
        let (mut highest, mut nan) = ([f32::NEG_INFINITY; LANES], [0_u32; LANES]);
        for block in blocks {
            for i in 0..LANES {
                highest[i] = if block[i] > highest[i] {
                    block[i]
                } else {
                    highest[i]
                };
                nan[i] |= u32::from(block[i].is_nan());
            }
        }
        has_nan |= nan.contains(&1) || rest.iter().any(|logit| logit.is_nan());
        let highest = highest.iter().chain(rest).copied();
        let highest = highest.fold(f32::NEG_INFINITY, f32::max);
        if highest > score {
            (score, first) = (highest, index * STRETCH);
        }
    }
    let why = match score {
        _ if has_nan => "logits hold NaN",
        f32::INFINITY => "logits hold infinity",
        f32::NEG_INFINITY => "no token is possible: every logit is -infinity",
        _ => {
            let at = logits[first..].iter().position(|logit| *logit == score);
            return Ok(Candidate {
                id: (first + at.unwrap_or(0)) as u32,
                score,
            });
        }
    };
    Err(Error::new(ErrorKind::DeviceFailed, "sampling failed")
        .with_why(why)
        .with_help("are the weights damaged? if not, load with dtype f32 or on another device"))
}

/// The k-th largest score, or -infinity if there are fewer; k >= 1.
pub(super) fn kth_largest(
    scores: impl Iterator<Item = f32>,
    k: usize,
    scratch: &mut Vec<f32>,
) -> f32 {
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let limit = k.saturating_mul(2).max(256);
    let mut floor = f32::NEG_INFINITY;
    scratch.clear();
    for score in scores {
        // Only what may still be among the k largest is collected; a tie with the k-th cannot
        // move it.
        if score > floor {
            scratch.push(score);
            if scratch.len() >= limit {
                scratch.select_nth_unstable_by(k - 1, descending);
                scratch.truncate(k);
                floor = scratch[k - 1];
            }
        }
    }
    if scratch.len() < k {
        return floor;
    }
    *scratch.select_nth_unstable_by(k - 1, descending).1
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use crate::generate::bad_words::BadWords;
    use crate::generate::options::GenerateOptions;
    use crate::generate::penalties::Penalties;
    use crate::generate::resolved::SamplingDefaults;
    use crate::text::Tokenizer;
    use proptest::prelude::*;
    use serde::Deserialize;

    /// The scores after all filters, -infinity where a token was dropped.
    fn process(logits: &[f32], resolved: &Resolved) -> Vec<f32> {
        let mut sampler = Sampler::new(resolved);
        sampler.filter(logits.iter().copied().zip(0..), best(logits).unwrap());
        let mut scores = vec![f32::NEG_INFINITY; logits.len()];
        for candidate in sampler.kept {
            scores[candidate.id as usize] = candidate.score;
        }
        scores
    }

    fn resolve(options: &GenerateOptions) -> Resolved {
        let sample = SamplingDefaults {
            do_sample: Some(true),
            ..SamplingDefaults::default()
        };
        options.resolve(&sample).unwrap()
    }

    #[derive(Deserialize)]
    struct Vectors {
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        name: String,
        logits: Vec<Option<f32>>,
        tokens: Vec<u32>,
        /// How many of the tokens are the prompt's; unset: all.
        n_prompt: Option<usize>,
        #[serde(default)]
        eos_token_ids: Vec<u32>,
        options: GenerateOptions,
        expected: Vec<Option<f32>>,
    }

    /// Reference: transformers' logits processors. Tolerance 1e-5 relative: both are f32, and the
    /// vectors are written with nine digits.
    #[test]
    fn the_filters_equal_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../conformance/sampler.json");
        let vectors: Vectors = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(!vectors.cases.is_empty());
        let tied = concat!(env!("CARGO_MANIFEST_DIR"), "/../conformance/models/tied");
        let tokenizer = Tokenizer::from_files(tied.as_ref()).unwrap();
        let number = |value: Option<f32>| value.unwrap_or(f32::NEG_INFINITY);
        for mut case in vectors.cases {
            // transformers' 0 is "off"; for us that is unset.
            case.options.top_k = case.options.top_k.filter(|&top_k| top_k > 0);
            let mut logits: Vec<f32> = case.logits.into_iter().map(number).collect();
            let mut resolved = resolve(&case.options);
            resolved.eos_token_ids = case.eos_token_ids;
            let n_prompt = case.n_prompt.unwrap_or(case.tokens.len());
            let bad_words = BadWords::new(&resolved.bad_words, &tokenizer);
            Penalties::new(&resolved, n_prompt, bad_words).apply(&mut logits, &case.tokens);
            let scores = process(&logits, &resolved);
            assert_eq!(scores.len(), case.expected.len());
            for (id, (score, expected)) in scores.iter().zip(case.expected).enumerate() {
                let expected = number(expected);
                let near = (score - expected).abs() <= 1e-5 * expected.abs().max(1.0);
                assert!(
                    *score == expected || near,
                    "{}: id {id}: {score}, not {expected}",
                    case.name
                );
            }
        }
    }

    /// The straight way: full sorts, in f64.
    fn reference(logits: &[f32], options: &GenerateOptions) -> Vec<u32> {
        let temperature = options.temperature.unwrap_or(1.0);
        let mut order: Vec<(f32, u32)> = logits
            .iter()
            .map(|logit| logit / temperature)
            .zip(0..)
            .collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        if let Some(top_k) = options.top_k {
            let kth = order[order.len() - top_k.min(order.len())].0;
            order.retain(|(score, _)| *score >= kth);
        }
        let highest = order[order.len() - 1].0;
        if let Some(top_p) = options.top_p {
            let total: f64 = order.iter().map(|(score, _)| weight(*score, highest)).sum();
            let mut sum = 0.0;
            let mut kept = Vec::new();
            for (position, &(score, id)) in order.iter().enumerate() {
                sum += weight(score, highest);
                if sum > (1.0 - f64::from(top_p)) * total || position + 1 == order.len() {
                    kept.push((score, id));
                }
            }
            order = kept;
        }
        let min_p = options.min_p.unwrap_or(0.0);
        let mut ids: Vec<u32> = order
            .iter()
            .filter(|(score, _)| (score - highest).exp() >= min_p)
            .map(|(_, id)| *id)
            .collect();
        ids.sort_unstable();
        ids
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Coarse logits, so that ties are common.
        #[test]
        fn the_fast_filters_keep_what_full_sorts_keep(
            coarse in prop::collection::vec(-12..12_i8, 1..700),
            temperature in prop::option::of(0.3..2.0_f32),
            top_k in prop::option::of(1..800_usize),
            top_p in prop::option::of(0.01..1.0_f32),
            min_p in prop::option::of(0.0..1.0_f32),
        ) {
            let logits: Vec<f32> = coarse.iter().map(|&logit| f32::from(logit) / 2.0).collect();
            let options = GenerateOptions { temperature, top_k, top_p, min_p, ..GenerateOptions::new() };
            let scores = process(&logits, &resolve(&options));
            let kept: Vec<u32> = scores.iter().zip(0..).filter(|(s, _)| s.is_finite()).map(|(_, id)| id).collect();
            let expected = reference(&logits, &options);
            // Where a sum meets the threshold to the last bit, the order of adding decides; then
            // the two may differ by one token.
            prop_assert!(kept == expected || kept.len().abs_diff(expected.len()) <= 1 && top_p.is_some(),
                "{kept:?} {expected:?}");
        }
    }

    #[cfg(feature = "gpu")]
    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Coarse logits, of which penalties lower some behind the choice of the likeliest.
        #[test]
        fn the_likeliest_give_what_all_give_or_nothing(
            coarse in prop::collection::vec(-90..90_i8, 64..700),
            wanted in 1..60_usize,
            lowered in prop::collection::vec((any::<prop::sample::Index>(), 0.0..30.0_f32), 0..20),
            (greedy, temperature, seed) in (any::<bool>(), 0.3..2.0_f32, any::<u64>()),
            top_k in 1..50_usize,
            top_p in prop::option::of(0.01..1.0_f32),
        ) {
            let mut logits: Vec<f32> = coarse.iter().map(|&logit| f32::from(logit) / 4.0).collect();
            let floor = kth_largest(logits.iter().copied(), wanted, &mut Vec::new());
            let is_likely: Vec<bool> = logits.iter().map(|logit| *logit >= floor).collect();
            for (index, by) in lowered {
                logits[index.index(coarse.len())] -= by;
            }
            let likeliest: Vec<(u32, f32)> = (0..).zip(&logits).zip(&is_likely)
                .filter_map(|((id, logit), is_likely)| is_likely.then_some((id, *logit)))
                .collect();
            let options = match greedy {
                true => GenerateOptions::greedy(),
                false => GenerateOptions { top_p, ..GenerateOptions::new().temperature(temperature).top_k(top_k) },
            };
            let options = resolve(&options.seed(seed));
            let [mut of_all, mut of_some] = [0, 1].map(|_| Sampler::new(&options));
            for draw in 0..4 {
                let want = of_all.pick(&logits).unwrap();
                match of_some.pick_among(&likeliest, floor) {
                    Some(token) => prop_assert_eq!(token, want, "draw {}", draw),
                    None => prop_assert_eq!(of_some.pick(&logits).unwrap(), want, "behind nothing"),
                }
            }
            // Where nothing ties with the floor or was lowered, as many as are looked at are enough.
            let above = likeliest.iter().filter(|(_, logit)| *logit > floor + 0.1).count();
            prop_assert_eq!(above >= of_some.looks_at(), of_some.pick_among(&likeliest, floor).is_some());
        }
    }

    proptest! {
        #[test]
        fn the_best_is_the_first_of_the_highest_in_any_stretch(
            logits in prop::collection::vec(-3i8..3, 1..5000), nan in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut logits: Vec<_> = logits.into_iter().map(f32::from).collect();
            if let Some(nan) = nan {
                let at = nan.index(logits.len());
                logits[at] = f32::NAN;
                prop_assert!(best(&logits).is_err());
                return Ok(());
            }
            let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let best = best(&logits).unwrap();
            prop_assert_eq!(Some(best.id as usize), logits.iter().position(|logit| *logit == highest));
            prop_assert_eq!(best.score, highest);
        }
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_a_tie() {
        for options in [
            GenerateOptions::greedy(),
            GenerateOptions::new().temperature(1.0).top_k(1),
        ] {
            let mut sampler = Sampler::new(&resolve(&options));
            assert_eq!(sampler.pick(&[1.0, 3.0, 3.0, -1.0]).unwrap(), 1);
            assert_eq!(sampler.pick(&[1.0, 1.5, 3.0, -1.0]).unwrap(), 2);
        }
    }

    #[test]
    fn a_token_that_a_mask_forbids_is_never_drawn() {
        let mut sampler =
            Sampler::new(&resolve(&GenerateOptions::new().temperature(100.0).seed(1)));
        for _ in 0..200 {
            let logits = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, -1.0];
            assert!([1, 3].contains(&sampler.pick(&logits).unwrap()));
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_a_failed_device() {
        let mut sampler = Sampler::new(&resolve(&GenerateOptions::new().seed(1)));
        let mut in_a_block = vec![0.0; 40];
        in_a_block[3] = f32::NAN;
        let bad = [
            vec![0.0, f32::NAN],
            in_a_block,
            vec![f32::NEG_INFINITY; 3],
            vec![f32::INFINITY, 0.0],
            vec![],
        ];
        for logits in bad {
            let error = sampler.pick(&logits).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DeviceFailed, "{error}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens_on_every_build() {
        let draw = |seed| {
            let mut sampler = Sampler::new(&resolve(&GenerateOptions::new().seed(seed)));
            (0..12)
                .map(|_| sampler.pick(&[0.0; 100]).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        // From a ChaCha8 written independently in Python; a change of the generator would break
        // everybody's recorded seeds.
        assert_eq!(draw(42), [34, 28, 49, 36, 82, 6, 48, 26, 46, 79, 59, 82]);
    }

    /// 20,000 draws: the standard error of a share of 0.5 is 0.0035; 0.02 is over five of them.
    #[test]
    fn draws_follow_the_probabilities() {
        let mut sampler = Sampler::new(&resolve(&GenerateOptions::new().seed(3)));
        let mut counts = [0_u32; 3];
        for _ in 0..20_000 {
            let logits = [0.5_f32.ln(), 0.3_f32.ln(), 0.2_f32.ln()];
            counts[sampler.pick(&logits).unwrap() as usize] += 1;
        }
        for (count, share) in counts.into_iter().zip([0.5, 0.3, 0.2]) {
            assert!(
                (f64::from(count) / 20_000.0 - share).abs() < 0.02,
                "{counts:?}"
            );
        }
    }
}
