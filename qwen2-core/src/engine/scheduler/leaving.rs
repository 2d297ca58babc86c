//! What a step does when a request ends in the middle of it: no layer more, the request is told, and the
//! others compute it again.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use super::super::outlet::{RequestStream, outlet};
use super::super::worker::{Job, Wake};
use super::super::{Settings, WhenFull};
use super::*;
use crate::Device;
use crate::api::{Model, Prompt};
use crate::generate::{GenerateOptions, Generation};

const N_LAYERS: usize = 6;

/// A scheduler whose steps the tests take one by one.
struct Bench {
    model: Model,
    scheduler: Scheduler,
    shared: Arc<Shared>,
}

fn tokens(n: usize, seed: usize) -> Vec<u32> {
    (0..n)
        .map(|i| 10 + ((i * 7 + i / 5 + seed * 31) % 200) as u32)
        .collect()
}

fn greedy(n: usize) -> GenerateOptions {
    let mut options = GenerateOptions::greedy().max_new_tokens(n);
    options.ignore_eos = true;
    options
}

impl Bench {
    fn new() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo-model");
        let model = Model::builder(path).device(Device::cpu()).load().unwrap();
        assert_eq!(model.config().num_hidden_layers, N_LAYERS);
        let settings = Settings {
            max_sequences: 8,
            cache_bytes: 1 << 30,
            prefill_chunk: 64,
            queue_limit: 8,
            when_full: WhenFull::Refuse,
            reader_patience: Duration::from_secs(60),
            prefix_cache: true,
            deterministic: false,
        };
        let shared = Arc::<Shared>::default();
        Self {
            model,
            scheduler: Scheduler::new(settings, shared.clone()),
            shared,
        }
    }

    /// Puts a request into the queue.
    fn submit(&self, tokens: Vec<u32>, options: &GenerateOptions) -> RequestStream {
        let inner = &self.model.inner;
        let cache = self.model.new_cache();
        let resolved = options.resolve(&inner.defaults).unwrap();
        let tokenizer = inner.host.tokenizer.clone();
        let length = cache.context_length();
        let job = Job {
            network: inner.host.network.clone(),
            sequence: Sequence::new(tokenizer, length, tokens, resolved, None).unwrap(),
            cache,
            priority: 0,
            when_full: None,
        };
        let wake = Wake::new(self.shared.clone());
        let (outlet, stream) = outlet(job.sequence.cancel_token(), wake);
        let mut inbox = self.shared.lock();
        let place = inbox.queue.place(0);
        inbox.queue.push(place, Waiting { job, outlet });
        stream
    }

    /// The batches of the next step, as [`Scheduler::step`] makes them.
    fn batches(&mut self) -> Vec<Vec<Share>> {
        let scheduler = &mut self.scheduler;
        scheduler.reap();
        scheduler.admit();
        let plan = scheduler.plan();
        let mut batches = scheduler.batches(plan);
        for batch in &mut batches {
            batch.sort_by_key(|share| share.index);
            let single = batch.len() == 1;
            for share in batch {
                share.rows = scheduler.running[share.index].rows(share.n_tokens, single);
            }
        }
        batches
    }

    /// Computes a batch, with `event` behind its third layer; whether it was left, and after how many layers.
    fn compute(
        &mut self,
        batch: &[Share],
        event: impl Fn() + Send + Sync + 'static,
    ) -> (bool, usize) {
        let watch = self.scheduler.watch(batch);
        let count = Arc::<AtomicUsize>::default();
        let (counted, inner) = (count.clone(), watch.on_layer.clone());
        let watch = Watch {
            on_layer: Some(Arc::new(move |done, all| {
                counted.fetch_add(1, Ordering::Relaxed);
                if done == 3 {
                    event();
                }
                if let Some(inner) = &inner {
                    inner(done, all);
                }
            })),
            ..watch
        };
        let left = self.scheduler.forward(batch, &watch).is_none();
        (left, count.load(Ordering::Relaxed))
    }

    fn cached(&self) -> Vec<usize> {
        let running = self.scheduler.running.iter();
        running.map(|running| running.cache.n_tokens()).collect()
    }

    /// Runs to the end what is there.
    fn finish(&mut self) {
        loop {
            self.scheduler.reap();
            self.scheduler.admit();
            let plan = self.scheduler.plan();
            if plan.is_empty() {
                return;
            }
            self.scheduler.step(plan);
        }
    }

    fn alone(&self, tokens: Vec<u32>, options: &GenerateOptions) -> Vec<u32> {
        let prompt = Prompt::Tokens(tokens);
        self.model.generate(prompt, options).unwrap().tokens
    }
}

/// Two prompts are read together, and behind the third layer `event` ends the first.
fn left_in_the_middle(
    options: &GenerateOptions,
    event: impl FnOnce(RequestStream) -> (Box<dyn Fn() + Send + Sync>, Option<RequestStream>),
) -> Option<Generation> {
    let mut bench = Bench::new();
    let ended = bench.submit(tokens(40, 1), options);
    let stays = bench.submit(tokens(20, 2), &greedy(12));
    let batches = bench.batches();
    assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [2]);
    let (event, ended) = event(ended);
    // Of six layers.
    assert_eq!(bench.compute(&batches[0], event), (true, 3));
    assert_eq!(bench.cached(), [0, 0], "the step left nothing behind");
    bench.scheduler.reap();
    assert_eq!(bench.scheduler.running.len(), 1);
    // It is told before another step begins.
    let ended = ended.map(|stream| stream.finish().unwrap());
    bench.finish();
    let alone = bench.alone(tokens(20, 2), &greedy(12));
    assert_eq!(stays.finish().unwrap().tokens, alone);
    assert_eq!(bench.scheduler.stats.finished, 2);
    ended
}

#[test]
fn no_layer_runs_for_others_either_when_one_of_a_batch_is_cancelled() {
    let ended = left_in_the_middle(&greedy(12), |stream| {
        let cancel = stream.cancel_token();
        (Box::new(move || cancel.cancel()), Some(stream))
    });
    let ended = ended.unwrap();
    assert_eq!(ended.finish_reason, FinishReason::Cancelled);
    assert!(ended.tokens.is_empty());
}

#[test]
fn a_batch_is_left_when_a_reader_goes() {
    let ended = left_in_the_middle(&greedy(12), |stream| {
        let stream = std::sync::Mutex::new(Some(stream));
        (Box::new(move || drop(stream.lock().unwrap().take())), None)
    });
    assert!(ended.is_none());
}

#[test]
fn a_batch_is_left_when_a_timeout_passes() {
    let timeout = Duration::from_secs(1);
    let end = Instant::now() + timeout + Duration::from_millis(500);
    let options = greedy(12).timeout(timeout.as_secs_f64());
    let ended = left_in_the_middle(&options, |stream| {
        let wait = move || std::thread::sleep(end.saturating_duration_since(Instant::now()));
        (Box::new(wait), Some(stream))
    });
    assert_eq!(ended.unwrap().finish_reason, FinishReason::Timeout);
}

#[test]
fn a_step_that_decodes_is_left_as_well_and_spoils_nothing() {
    let mut bench = Bench::new();
    let (first, second) = (tokens(10, 1), tokens(12, 2));
    let ended = bench.submit(first.clone(), &greedy(40));
    let stays = bench.submit(second.clone(), &greedy(12));
    for _ in 0..5 {
        bench.scheduler.admit();
        let plan = bench.scheduler.plan();
        bench.scheduler.step(plan);
    }
    let before = bench.cached();
    let batches = bench.batches();
    let cancel = ended.cancel_token();
    let computed = bench.compute(&batches[0], move || cancel.cancel());
    assert_eq!(computed, (true, 3));
    assert_eq!(bench.cached(), before);
    bench.finish();
    let ended = ended.finish().unwrap().tokens;
    assert_eq!(ended.len(), 5);
    assert!(bench.alone(first, &greedy(40)).starts_with(&ended));
    assert_eq!(
        stays.finish().unwrap().tokens,
        bench.alone(second, &greedy(12))
    );
}

/// Who comes and goes cannot keep the others from going on.
#[test]
fn behind_steps_that_were_left_in_a_row_prompts_are_read_apart() {
    let mut bench = Bench::new();
    let mut comes_and_goes = bench.submit(tokens(30, 2), &greedy(12));
    let stays = bench.submit(tokens(50, 3), &greedy(12));
    for n_left in 1..=LEFT {
        let ended = bench.submit(tokens(40, n_left), &greedy(12));
        let batches = bench.batches();
        assert_eq!(batches.len(), 1, "prompts are read together");
        assert_eq!(bench.scheduler.apart, 0);
        ended.cancel_token().cancel();
        bench.scheduler.step(batches.concat());
        assert_eq!(bench.cached(), [0, 0, 0]);
    }
    assert_eq!(bench.scheduler.apart, APART);

    let batches = bench.batches();
    assert_eq!(bench.scheduler.running.len(), 2);
    assert!(batches.len() > 1 && batches.iter().all(|batch| batch.len() == 1));
    let index_of = |bench: &Bench, n: usize| {
        let mut running = bench.scheduler.running.iter();
        let index = running.position(|running| running.sequence.tokens().len() == n);
        index.unwrap()
    };
    let (goes, other) = (index_of(&bench, 30), index_of(&bench, 50));
    let batch_of = |index: usize| {
        let mut batches = batches.iter();
        batches.find(|batch| batch[0].index == index).unwrap()
    };
    // It ends while the other is read, which goes on, and is told in the middle of it.
    let cancel = comes_and_goes.cancel_token();
    let computed = bench.compute(batch_of(other), move || cancel.cancel());
    assert_eq!(computed, (false, N_LAYERS));
    assert!(comes_and_goes.try_next().is_ready());
    assert!(bench.cached()[other] > 0);
    // Nor is it read itself.
    assert_eq!(bench.compute(batch_of(goes), || {}), (true, 1));
    assert_eq!(bench.cached()[goes], 0);

    bench.finish();
    assert_eq!(bench.scheduler.apart, 0, "it does not last");
    let reason = comes_and_goes.finish().unwrap().finish_reason;
    assert_eq!(reason, FinishReason::Cancelled);
    let alone = bench.alone(tokens(50, 3), &greedy(12));
    assert_eq!(stays.finish().unwrap().tokens, alone);
}

#[test]
fn a_request_that_waits_is_told_in_the_middle_of_a_step() {
    let mut bench = Bench::new();
    bench.scheduler.settings.max_sequences = 1;
    let runs = bench.submit(tokens(100, 1), &greedy(4));
    let batches = bench.batches();
    let mut waits = bench.submit(tokens(40, 2), &greedy(4));
    let cancel = waits.cancel_token();
    let computed = bench.compute(&batches[0], move || cancel.cancel());
    assert_eq!(computed, (false, N_LAYERS), "what runs is not disturbed");
    assert!(waits.try_next().is_ready());
    let reason = waits.finish().unwrap().finish_reason;
    assert_eq!(reason, FinishReason::Cancelled);
    assert_eq!(bench.shared.lock().queue.len(), 0);
    assert_eq!(bench.shared.lock().n_withdrawn, 1);
    bench.finish();
    bench.scheduler.report();
    assert_eq!(bench.scheduler.stats.finished, 2);
    assert_eq!(runs.finish().unwrap().tokens.len(), 4);
}
