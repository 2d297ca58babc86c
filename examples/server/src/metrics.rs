//! What Prometheus reads.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
    exponential_buckets,
};
use qwen2_core::Generation;

use crate::backend::Backend;

/// Counters of one server, in a registry of its own.
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    prompt_tokens: IntCounter,
    cached_tokens: IntCounter,
    generated_tokens: IntCounter,
    steps: IntCounter,
    preempted: IntCounter,
    /// Two readers at once must not both bring the engine's own counters up to date.
    catch_up: Mutex<()>,
    running: IntGauge,
    waiting: IntGauge,
    cache_bytes: IntGauge,
    cache_limit: IntGauge,
    queue: Histogram,
    first_token: Histogram,
    per_token: Histogram,
    answer: Histogram,
}

impl Metrics {
    /// # Errors
    /// If two of them had the same name.
    pub(crate) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| register(&registry, IntCounter::new(name, help)?);
        let gauge = |name: &str, help: &str| register(&registry, IntGauge::new(name, help)?);
        // 1 ms to 9 min.
        let seconds = |name: &str, help: &str| {
            let buckets = exponential_buckets(0.001, 3.0, 13)?;
            let options = HistogramOpts::new(name, help).buckets(buckets);
            register(&registry, Histogram::with_opts(options)?)
        };
        Ok(Self {
            requests: register(
                &registry,
                IntCounterVec::new(
                    Opts::new("qwen2_requests_total", "Requests by path and status."),
                    &["path", "status"],
                )?,
            )?,
            prompt_tokens: counter(
                "qwen2_prompt_tokens_total",
                "Tokens of prompts, cached ones included.",
            )?,
            cached_tokens: counter(
                "qwen2_cached_tokens_total",
                "Tokens of prompts that were in a cache.",
            )?,
            generated_tokens: counter(
                "qwen2_generated_tokens_total",
                "New tokens, those of stopped answers included.",
            )?,
            steps: counter(
                "qwen2_steps_total",
                "Steps of the network, each for all answers that run.",
            )?,
            preempted: counter(
                "qwen2_preempted_total",
                "Answers whose cache was dropped for lack of memory, to be computed again.",
            )?,
            running: gauge("qwen2_answers_running", "Answers that are computed now.")?,
            waiting: gauge("qwen2_answers_waiting", "Answers that wait for their turn.")?,
            cache_bytes: gauge(
                "qwen2_cache_bytes",
                "Bytes of caches and shared beginnings of prompts now.",
            )?,
            cache_limit: gauge("qwen2_cache_limit_bytes", "Bytes that they may take.")?,
            queue: seconds(
                "qwen2_queue_seconds",
                "From the request to the start of its computation.",
            )?,
            first_token: seconds(
                "qwen2_first_token_seconds",
                "From the request to the first new token.",
            )?,
            per_token: seconds(
                "qwen2_per_token_seconds",
                "Each new token after the first, the mean of an answer.",
            )?,
            answer: seconds(
                "qwen2_answer_seconds",
                "From the request to the end of its answer.",
            )?,
            catch_up: Mutex::default(),
            registry,
        })
    }

    /// One request more.
    pub(crate) fn requested(&self, path: &str, status: u16) {
        let status = status.to_string();
        self.requests.with_label_values(&[path, &status]).inc();
    }

    /// One new token more.
    pub(crate) fn generated(&self) {
        self.generated_tokens.inc();
    }

    /// An answer came to its end, `elapsed` after the request; its first token `first` after it.
    pub(crate) fn finished(
        &self,
        generation: &Generation,
        elapsed: Duration,
        first: Option<Duration>,
    ) {
        let usage = &generation.usage;
        self.prompt_tokens.inc_by(usage.prompt_tokens as u64);
        self.cached_tokens.inc_by(usage.cached_tokens as u64);
        self.answer.observe(elapsed.as_secs_f64());
        let Some(first) = first else { return };
        self.first_token.observe(first.as_secs_f64());
        let queue = first.saturating_sub(generation.timings.prefill);
        self.queue.observe(queue.as_secs_f64());
        if usage.completion_tokens > 1 {
            let decode = elapsed.saturating_sub(first).as_secs_f64();
            self.per_token
                .observe(decode / (usage.completion_tokens - 1) as f64);
        }
    }

    /// All of it in Prometheus' text format.
    ///
    /// # Errors
    /// If a metric could not be written.
    pub(crate) fn text(&self, backend: &Backend) -> prometheus::Result<String> {
        let stats = backend.stats();
        self.running.set(stats.running as i64);
        self.waiting.set(stats.waiting as i64);
        self.cache_bytes.set(stats.cache_bytes.cast_signed());
        self.cache_limit.set(stats.cache_limit.cast_signed());
        {
            let _alone = self.catch_up.lock().unwrap_or_else(PoisonError::into_inner);
            for (counter, value) in [
                (&self.steps, stats.steps),
                (&self.preempted, stats.preempted),
            ] {
                counter.inc_by(value.saturating_sub(counter.get()));
            }
        }
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    metric: C,
) -> prometheus::Result<C> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}
