//! Decode steps on a GPU, recorded once for a cache and launched as a whole from then on.
//!
//! A step alone is some hundred launches, which for a small model take the processor longer than the device. What
//! a step needs to know, the token and its position, lies on the device, where the step leaves the likeliest token
//! and the next position as well: a greedy answer needs nothing from the host but to be told to go on.

use burn::tensor::{DType, Int, Tensor};

use super::cache::Cache;
use super::{At, DecoderLayer, FeedForward, Lane, Qwen2, WARM_STEPS};
use crate::error::Result;
use crate::ops::replay::{self, Best, Recording};
use crate::ops::{self, Place};

/// How far a cache is from steps that are replayed.
#[derive(Debug)]
pub(crate) enum Replay {
    /// After so many steps of one token in a row.
    Waiting(usize),
    Recorded(Box<Step>),
    /// The device does not record, or not this.
    Never,
}

/// A recorded step of one cache, whose buffers are those that it writes.
#[derive(Debug)]
pub(crate) struct Step {
    recording: Recording,
    place: Place,
    /// `[1, vocab_size]`
    logits: Tensor<2>,
    best: Best,
    /// The token and the position that the device holds, if the host knows both.
    next: Option<(u32, usize)>,
}

/// What of a step's logits comes to the host.
pub(crate) enum Found {
    /// Tokens in their order with their logits, of which every other token has a lower one.
    Likeliest(Vec<(u32, f32)>),
    All(Vec<f32>),
}

impl Replay {
    /// Whether what this thread launches goes in order with what is replayed.
    pub(super) fn is_in_order(&self) -> bool {
        match self {
            Self::Recorded(step) => step.recording.is_in_order(),
            _ => true,
        }
    }

    /// Counts a forward of `n` tokens, launched kernel by kernel.
    pub(super) fn count(&mut self, n: usize) {
        if let Self::Waiting(steps) = self {
            *steps = if n == 1 { *steps + 1 } else { 0 };
        }
    }
}

impl Default for Replay {
    fn default() -> Self {
        Self::Waiting(0)
    }
}

/// A recording belongs to one cache.
impl Clone for Replay {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Cache {
    /// The step that this cache replays, if it does.
    pub(crate) fn replayed(&self) -> Option<&Step> {
        match &self.replay {
            Replay::Recorded(step) => Some(step),
            _ => None,
        }
    }
}

impl Qwen2 {
    /// Computes `token` behind the cache by a recorded step, if there is one, or if it is time to record one;
    /// otherwise nothing has happened, and [`Self::forward_batch`] is to do it.
    ///
    /// # Errors
    /// `ContextOverflow`.
    ///
    /// # Panics
    /// As [`Self::forward_batch`].
    pub(crate) fn replay<'a>(
        &self,
        token: u32,
        cache: &'a mut Cache,
    ) -> Result<Option<&'a mut Step>> {
        if !self.is_replayed {
            return Ok(None);
        }
        cache.reserve(1)?;
        let shared = cache.is_shared();
        let n_past = cache.n_tokens();
        let mut has_run = false;
        match &mut cache.replay {
            Replay::Never => return Ok(None),
            replay if shared => {
                *replay = Replay::default();
                return Ok(None);
            }
            Replay::Recorded(_) => {} // in order, or `reserve` would have dropped it
            Replay::Waiting(n) if *n < WARM_STEPS => return Ok(None),
            Replay::Waiting(_) => {
                let step = self.record(token, cache);
                let is_recorded = step.is_some();
                cache.replay = step.map_or(Replay::Never, |step| Replay::Recorded(Box::new(step)));
                if !is_recorded {
                    return Ok(None);
                }
                has_run = true; // to see that it gives what the launches gave
            }
        }
        cache.advance(1);
        let Replay::Recorded(step) = &mut cache.replay else {
            unreachable!("matched above");
        };
        if !has_run {
            step.run(token, n_past);
        }
        Ok(Some(step))
    }

    fn record(&self, token: u32, cache: &mut Cache) -> Option<Step> {
        let device = &self.cache_shape.device;
        if !self.takes_places(cache) {
            return None;
        }
        let [token_buffer, at] = replay::place(device);
        let place = Place {
            token: token_buffer,
            n_past: at,
            angles: self.rope.whole(cache.capacity(), cache.is_long(), device),
        };
        let n_past = cache.n_tokens();
        replay::set(&place, token, n_past);
        let body = || {
            let logits = self.forward_at(cache, &place);
            let best = replay::best(&logits, &place);
            (logits, best)
        };
        let look = |(logits, _): (Tensor<2>, _)| numbers(logits);
        let (recording, launched, (logits, best)) = Recording::of(device, look, body)?;
        let mut step = Step {
            recording,
            place,
            logits,
            best,
            next: None,
        };
        // The same step once more: a device that replays something else is not trusted with the next.
        step.run(token, n_past);
        let is_same = near(&numbers(step.logits()), &launched);
        if !is_same {
            tracing::error!(
                "a recorded step is not what was recorded, so steps are launched kernel by kernel"
            );
        }
        is_same.then_some(step)
    }

    /// Logits behind the token at `place`, `[1, vocab_size]`; the cache counts nothing.
    fn forward_at(&self, cache: &mut Cache, place: &Place) -> Tensor<2> {
        let h = ops::embed_at(&self.embed_tokens, &place.token);
        let (layers, _) = cache.parts();
        let mut lanes = [Lane {
            rows: 0..1,
            n_out: 1,
            at: At::Place(place.clone()),
            layers: layers.iter_mut(),
        }];
        let through = |h, layer: &DecoderLayer| layer.forward(h, &mut lanes);
        let h = self.layers.iter().try_fold(h, through);
        let h = h.unwrap_or_else(|| unreachable!("one row goes on"));
        self.head(h)
    }

    /// Whether every operation of a step can be told its place on the device.
    fn takes_places(&self, cache: &mut Cache) -> bool {
        let (layers, _) = cache.parts();
        let mut both = self.layers.iter().zip(layers.iter());
        ops::embeds_places(&self.embed_tokens)
            && both.all(|(layer, cache)| {
                let heads = layer.self_attn.heads(self.cache_shape.head_dim);
                matches!(cache.pages(), [page] if ops::takes_places(heads, page))
            })
    }

    /// Whether steps of this network can be recorded: chunks turn a query in several ways, and experts in pieces are
    /// chosen on the host.
    pub(super) fn is_replayable(&self) -> bool {
        let is_on_device = |layer: &DecoderLayer| match &layer.mlp {
            FeedForward::Dense(_) => true,
            FeedForward::Sparse(moe) => moe.stack.is_some(),
        };
        ops::on_gpu(&self.embed_tokens)
            && !self.rope.is_chunked()
            && self.layers.iter().all(is_on_device)
    }
}

/// On the host.
///
/// # Panics
/// As burn reports failures.
fn numbers(x: Tensor<2>) -> Vec<f32> {
    let data = x.into_data().convert_dtype(DType::F32);
    data.iter::<f32>().collect()
}

/// Whether both are the same but for an order of sums; what is no number counts as the same where both have it.
fn near(replayed: &[f32], launched: &[f32]) -> bool {
    let finite = launched.iter().filter(|x| x.is_finite());
    let most = finite.fold(1.0_f32, |most, x| most.max(x.abs()));
    let same = |(a, b): (&f32, &f32)| {
        a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan() || (a - b).abs() <= 1e-3 * most
    };
    replayed.iter().zip(launched).all(same)
}

impl Step {
    fn run(&mut self, token: u32, n_past: usize) {
        if self.next.take() != Some((token, n_past)) {
            replay::set(&self.place, token, n_past);
        }
        // Place and results are held here, the weights by the network, and the cache's buffers by the cache, which
        // drops this before it changes them, and asks for nothing while it shares them.
        self.recording.replay();
    }

    /// What the step gave, `[1, vocab_size]`, until the next one.
    pub(crate) fn logits(&self) -> Tensor<2> {
        self.logits.clone()
    }

    /// The token with the highest logit, the lowest of those that share it, `[1]`; -1 where the logits are no
    /// numbers or there is no highest.
    pub(crate) fn best(&self) -> Tensor<1, Int> {
        self.best.found.clone()
    }

    /// The likeliest tokens of the step that ran last, for [`replay::read_likeliest`]; to be asked once.
    pub(crate) fn likeliest(&self) -> Tensor<1, Int> {
        replay::likeliest(&self.logits, &self.best)
    }

    /// Says what [`Self::best`] was, behind which the device goes on by itself from `n_past` positions.
    pub(crate) fn follow(&mut self, best: u32, n_past: usize) {
        self.next = Some((best, n_past));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use crate::model::Rows;
    use crate::ops::Watch;
    use crate::{Device, GenerateOptions, Model, Prompt};

    const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../conformance/models/");

    /// On the device that `QWEN2_TEST_DEVICE` names, a GPU, and on the processor.
    #[allow(clippy::print_stderr)]
    fn models(test: &str, name: &str) -> Option<[Model; 2]> {
        let device = std::env::var("QWEN2_TEST_DEVICE").unwrap_or_default();
        if matches!(&device[..], "" | "cpu" | "ndarray") {
            eprintln!("{test}: skipped, QWEN2_TEST_DEVICE names no GPU");
            return None;
        }
        Some([device.parse().unwrap(), Device::cpu()].map(|device| {
            let builder = Model::builder(format!("{ROOT}{name}")).device(device);
            builder.kv_cache(crate::DType::F32).load().unwrap()
        }))
    }

    /// Runs the tokens in both, and compares the logits behind the last.
    fn run(models: &[Model; 2], caches: &mut [Cache; 2], tokens: &[u32], what: &str) {
        let pairs = models.iter().zip(caches);
        let logits: Vec<_> = pairs
            .map(|(model, cache)| {
                let (network, watch) = (&model.inner.host.network, Watch::default());
                network.forward(tokens, cache, Rows::Last, &watch).unwrap()
            })
            .collect();
        assert_eq!(logits[0].len(), logits[1].len(), "{what}");
        for (a, b) in logits[0].iter().zip(&logits[1]) {
            assert!((a - b).abs() <= 2e-4, "{what}: {a} {b}");
        }
    }

    #[test]
    fn a_recorded_step_gives_what_a_launched_one_gives() {
        let test = "a_recorded_step_gives_what_a_launched_one_gives";
        for name in ["tied", "untied", "mqa", "sliding", "yarn", "bf16_shards"] {
            let Some(models) = models(test, name) else {
                return;
            };
            let mut caches = [0, 1].map(|i: usize| models[i].new_cache());
            let is_recorded = |caches: &[Cache; 2]| matches!(caches[0].replay, Replay::Recorded(_));
            run(&models, &mut caches, &[3, 1, 4, 1, 5, 9, 2], name);
            for i in 0..8 {
                run(
                    &models,
                    &mut caches,
                    &[i as u32 * 7],
                    &format!("{name}, {i}"),
                );
                assert_eq!(is_recorded(&caches), i >= WARM_STEPS, "{name}, {i}");
            }
            // Prompts between the steps, and positions that are written anew.
            run(&models, &mut caches, &[1, 2, 3], name);
            run(&models, &mut caches, &[4], name);
            caches.iter_mut().for_each(|cache| cache.truncate(5));
            run(&models, &mut caches, &[6], name);
            assert!(is_recorded(&caches), "{name}");
            // A second cache with the same past goes its own way.
            let mut forks = caches.clone();
            run(&models, &mut caches, &[8], &format!("{name}, shared"));
            assert!(!is_recorded(&caches), "{name}");
            for i in 0..6 {
                run(&models, &mut caches, &[i], &format!("{name}, its own"));
            }
            assert!(is_recorded(&caches), "{name}");
            run(&models, &mut forks, &[9], &format!("{name}, the fork"));
            // Another sequence goes on in the buffers, behind a copy of what they held at first.
            let mut next = [0, 1].map(|i: usize| {
                let page = caches[i].page(0);
                let mut next = models[i].new_cache();
                next.go_on_in(caches[i].leave());
                next.adopt(vec![page], 9);
                next
            });
            assert!(is_recorded(&next), "{name}");
            for i in 0..3 {
                run(&models, &mut next, &[i], &format!("{name}, the next"));
            }
            assert!(is_recorded(&next), "{name}");
        }
    }

    #[test]
    fn a_step_finds_the_likeliest_tokens() {
        let Some(models) = models("a_step_finds_the_likeliest_tokens", "mqa") else {
            return;
        };
        let mut caches = [0, 1].map(|i: usize| models[i].new_cache());
        for i in 0..WARM_STEPS {
            run(&models, &mut caches, &[i as u32 * 7], "before");
        }
        let [ours, theirs] = models.map(|model| model.inner.host.network.clone());
        let [our_cache, their_cache] = &mut caches;
        let watch = Watch::default();
        let exact = theirs.forward(&[5], their_cache, Rows::Last, &watch);
        let exact = exact.unwrap();
        let Some(Found::Likeliest(likeliest)) = ours.likeliest(5, our_cache).unwrap() else {
            panic!("no likeliest tokens");
        };
        assert!((2..exact.len()).contains(&likeliest.len()));
        for (token, logit) in &likeliest {
            assert!((logit - exact[*token as usize]).abs() <= 2e-4, "{token}");
        }
        let floor = likeliest
            .iter()
            .fold(f32::INFINITY, |least, (_, x)| least.min(*x));
        let above = |x: &&f32| **x > floor + 4e-4;
        assert!(exact.iter().filter(above).count() <= likeliest.len());
        let all = ours.all_of_likeliest(our_cache).unwrap();
        assert!(all.iter().zip(&exact).all(|(a, b)| (a - b).abs() <= 2e-4));
    }

    #[test]
    fn what_is_replayed_must_be_what_was_launched() {
        let launched = [1.0, -40.0, f32::NAN, f32::INFINITY];
        assert!(near(&launched, &launched));
        for (i, wrong) in [(0, 1.1), (0, f32::NAN), (2, 0.0), (3, 1.0), (3, f32::NAN)] {
            let mut replayed = launched;
            replayed[i] = wrong;
            assert!(!near(&replayed, &launched), "{wrong} at {i}");
        }
    }

    #[test]
    fn what_a_model_took_of_the_device_goes_back_with_it() {
        let test = "what_a_model_took_of_the_device_goes_back_with_it";
        let mut reserved = Vec::new();
        for _ in 0..2 {
            let Some([model, _]) = models(test, "tied") else {
                return;
            };
            let device = model.inner.host.network.qwen2.cache_shape.device.clone();
            let mut session = model.session();
            session.append(Prompt::Tokens(vec![5, 6, 7])).unwrap();
            let mut options = GenerateOptions::greedy().max_new_tokens(20);
            options.ignore_eos = true;
            session.generate(&options).unwrap();
            drop(model);
            let during = replay::reserved(&device);
            drop(session);
            let after = replay::reserved(&device);
            assert!(after < during, "{after} of {during}");
            reserved.push(after);
        }
        assert!(reserved[1] <= reserved[0], "{reserved:?}");
    }

    /// Copies of prompts and the buffers of the last request, too.
    #[test]
    fn what_an_engine_took_of_the_device_goes_back_with_it() {
        let test = "what_an_engine_took_of_the_device_goes_back_with_it";
        let (mut reserved, mut kept) = (Vec::new(), 0);
        for _ in 0..2 {
            let Some([model, _]) = models(test, "../../examples/demo-model") else {
                return;
            };
            let device = model.inner.host.network.qwen2.cache_shape.device.clone();
            let mut options = GenerateOptions::greedy().max_new_tokens(20);
            options.ignore_eos = true;
            let engine = model.engine().build().unwrap();
            for cached in [0, 54] {
                let prompt = Prompt::Tokens((5..60).collect());
                let generation = engine.generate(prompt, &options).unwrap();
                assert_eq!(generation.usage.cached_tokens, cached);
            }
            kept = engine.stats().cache_bytes;
            drop((engine, model));
            reserved.push(replay::reserved(&device));
        }
        // An engine's thread has a stream of its own, of which cubecl keeps some kilobytes.
        let more = reserved[1].saturating_sub(reserved[0]);
        assert!(more < kept / 16, "{reserved:?}, {kept} kept");
    }

    #[test]
    fn a_greedy_answer_goes_on_by_itself() {
        let Some([ours, theirs]) = models("a_greedy_answer_goes_on_by_itself", "gqa7") else {
            return;
        };
        for (max_new_tokens, seed) in [(120, None), (60, Some(7))] {
            let mut options = GenerateOptions::greedy().max_new_tokens(max_new_tokens);
            if let Some(seed) = seed {
                options = GenerateOptions::default().max_new_tokens(max_new_tokens);
                (options.seed, options.top_k) = (Some(seed), Some(5));
            }
            options.ignore_eos = true;
            let ask = |model: &Model| {
                let prompt = Prompt::Tokens(vec![5, 6, 7]);
                model.generate(prompt, &options).unwrap().tokens
            };
            let theirs = ask(&theirs);
            assert_eq!(ask(&ours), theirs, "{seed:?}");
            // An engine's request alone in its steps goes on likewise.
            let engine = ours.engine().build().unwrap();
            let prompt = Prompt::Tokens(vec![5, 6, 7]);
            let answer = engine.generate(prompt, &options).unwrap();
            assert_eq!(answer.tokens, theirs, "{seed:?}, by an engine");
        }
    }
}
