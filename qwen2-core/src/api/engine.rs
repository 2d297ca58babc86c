//! The engine's handle: many requests on one model, computed together.

use std::sync::Arc;
use std::time::Duration;

use super::model::{Model, Prompt};
use crate::engine::{EngineStats, Job, RequestStream, Settings, WhenFull, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::generate::{GenerateOptions, Generation, LogitsProcessor, Sequence};

/// Many requests on one model: they join and leave at every step, each weight is read once for all
/// of them, and what prompts have in common is computed once.
///
/// Clones share it. When the last one goes, running requests end with the error `Cancelled` and the engine's
/// thread ends.
///
/// ```no_run
/// use qwen2_core::{GenerateOptions, Model};
///
/// let engine = Model::load("examples/demo-model")?.engine().build()?;
/// let options = GenerateOptions::greedy().max_new_tokens(32);
/// let answers = ["1 plus 2?", "3 plus 4?"].map(|prompt| engine.submit(prompt, &options));
/// for answer in answers {
///     println!("{}", answer?.finish()?.text);
/// }
/// # Ok::<(), qwen2_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Engine {
    model: Model,
    worker: Arc<Worker>,
}

/// Settings of an [`Engine`]; [`EngineBuilder::build`] checks them.
#[must_use]
#[derive(Clone, Debug)]
pub struct EngineBuilder {
    model: Model,
    max_sequences: usize,
    cache_bytes: Option<u64>,
    prefill_chunk: usize,
    queue_limit: usize,
    when_full: WhenFull,
    reader_patience: Duration,
    prefix_cache: bool,
    deterministic: bool,
}

/// A prompt with its options, and what only an engine has.
#[must_use]
pub struct Request {
    prompt: Prompt,
    options: GenerateOptions,
    priority: i8,
    model: Option<Model>,
    processor: Option<Box<dyn LogitsProcessor>>,
    when_full: Option<WhenFull>,
}

impl Model {
    /// An engine for many requests on this model.
    pub fn engine(&self) -> EngineBuilder {
        EngineBuilder {
            model: self.clone(),
            max_sequences: 64,
            cache_bytes: None,
            prefill_chunk: 64,
            queue_limit: 1024,
            when_full: WhenFull::default(),
            reader_patience: Duration::from_secs(60),
            prefix_cache: true,
            deterministic: false,
        }
    }
}

impl EngineBuilder {
    /// Sequences that are computed together, at least 1; default 64.
    pub fn max_sequences(mut self, n: usize) -> Self {
        self.max_sequences = n;
        self
    }

    /// Bytes that the caches of all sequences and the shared prefixes may take together; default: those
    /// of four sequences that fill the context. Where they do not do, shared prefixes are forgotten,
    /// then the last requests wait and are computed again.
    pub fn cache_bytes(mut self, bytes: u64) -> Self {
        self.cache_bytes = Some(bytes);
        self
    }

    /// Tokens of prompts that one step reads between the tokens of the others, at least 1; default 64. More
    /// reads long prompts faster, and lets the others wait longer for their next token.
    pub fn prefill_chunk(mut self, n_tokens: usize) -> Self {
        self.prefill_chunk = n_tokens;
        self
    }

    /// Requests that may wait, at least 1; default 1024.
    pub fn queue_limit(mut self, n: usize) -> Self {
        self.queue_limit = n;
        self
    }

    /// What becomes of a request when so many wait; default [`WhenFull::Refuse`].
    pub fn when_full(mut self, when_full: WhenFull) -> Self {
        self.when_full = when_full;
        self
    }

    /// How long the reader of an answer may leave 256 pieces unread, for which its request pauses, before
    /// it ends as cancelled; default: a minute.
    pub fn reader_patience(mut self, patience: Duration) -> Self {
        self.reader_patience = patience;
        self
    }

    /// Whether the beginning that a prompt shares with earlier ones is computed once; default: true.
    pub fn prefix_cache(mut self, prefix_cache: bool) -> Self {
        self.prefix_cache = prefix_cache;
        self
    }

    /// Whether a request gets the same tokens alone and among others, to the last bit of its logits;
    /// default: false. Sequences are then computed one by one, and each keeps room for its longest
    /// answer from the start.
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.deterministic = deterministic;
        self
    }

    /// Starts the engine's thread.
    ///
    /// # Errors
    /// `InvalidArgument` naming a setting that is 0; `OutOfMemory` where the system gives no thread.
    pub fn build(self) -> Result<Engine> {
        let cache_bytes = self
            .cache_bytes
            .unwrap_or_else(|| self.model.memory().cache_full.saturating_mul(4));
        for (key, value) in [
            ("max_sequences", self.max_sequences as u64),
            ("cache_bytes", cache_bytes),
            ("prefill_chunk", self.prefill_chunk as u64),
            ("queue_limit", self.queue_limit as u64),
        ] {
            if value == 0 {
                return Err(
                    Error::new(ErrorKind::InvalidArgument, "setting is out of range")
                        .with_key(key)
                        .with_why("0")
                        .with_help("leave it unset for the default"),
                );
            }
        }
        Ok(Engine {
            worker: Arc::new(Worker::start(Settings {
                max_sequences: self.max_sequences,
                cache_bytes,
                prefill_chunk: self.prefill_chunk,
                queue_limit: self.queue_limit,
                when_full: self.when_full,
                reader_patience: self.reader_patience,
                prefix_cache: self.prefix_cache,
                deterministic: self.deterministic,
            })?),
            model: self.model,
        })
    }
}

impl Request {
    /// A request of priority 0 to the engine's own model.
    pub fn new(prompt: impl Into<Prompt>, options: &GenerateOptions) -> Self {
        Self {
            prompt: prompt.into(),
            options: options.clone(),
            priority: 0,
            model: None,
            processor: None,
            when_full: None,
        }
    }

    /// A step of priority goes before the 32 requests that came before; default 0.
    pub fn priority(mut self, priority: i8) -> Self {
        self.priority = priority;
        self
    }

    /// Answers by another handle of the engine's model, one [with an adapter](Model::with_adapter).
    /// Requests of one handle are computed together.
    pub fn model(mut self, model: &Model) -> Self {
        self.model = Some(model.clone());
        self
    }

    /// Changes the logits before each choice.
    pub fn processor(mut self, processor: impl LogitsProcessor + 'static) -> Self {
        self.processor = Some(Box::new(processor));
        self
    }

    /// What becomes of it when the queue is full; default: as the engine was built.
    pub fn when_full(mut self, when_full: WhenFull) -> Self {
        self.when_full = Some(when_full);
        self
    }
}

impl Engine {
    /// Puts a prompt into the queue; the answer comes as it is read.
    ///
    /// # Errors
    /// As [`Model::generate`]; `OutOfMemory` where the queue is full, `Cancelled` where the engine was closed.
    pub fn submit(
        &self,
        prompt: impl Into<Prompt>,
        options: &GenerateOptions,
    ) -> Result<RequestStream> {
        self.submit_request(Request::new(prompt, options))
    }

    /// As [`Engine::submit`], with all that a request can have.
    ///
    /// # Errors
    /// As [`Engine::submit`]; `InvalidArgument` for a handle of another model.
    pub fn submit_request(&self, request: Request) -> Result<RequestStream> {
        self.worker.submit(self.job(request)?)
    }

    /// As [`Engine::submit_request`], for futures: it waits for room in the queue without a thread.
    /// Dropping it withdraws the request.
    ///
    /// # Errors
    /// As [`Engine::submit_request`].
    pub async fn submit_async(&self, request: Request) -> Result<RequestStream> {
        let mut job = Some(self.job(request)?);
        std::future::poll_fn(|context| self.worker.poll_submit(&mut job, context)).await
    }

    /// A request, checked and in tokens.
    fn job(&self, request: Request) -> Result<Job> {
        let model = request.model.as_ref().unwrap_or(&self.model);
        if !model.shares_weights(&self.model) {
            return Err(
                Error::new(ErrorKind::InvalidArgument, "request is for another model")
                    .with_key("model")
                    .with_why(format!(
                        "{}, the engine has {}",
                        model.name(),
                        self.model.name()
                    ))
                    .with_help("give a handle that was made of the engine's model by with_adapter"),
            );
        }
        let inner = &*model.inner;
        refuse_solitary(&request.options)?;
        let resolved = request.options.resolve(&inner.defaults)?;
        let tokens = model.encode_for(&request.prompt, &resolved)?;
        let cache = model.new_cache();
        Ok(Job {
            network: inner.host.network.clone(),
            sequence: Sequence::new(
                inner.host.tokenizer.clone(),
                cache.context_length(),
                tokens,
                resolved,
                request.processor,
            )?,
            cache,
            priority: request.priority,
            when_full: request.when_full,
        })
    }

    /// Answers a prompt, among the others.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub fn generate(
        &self,
        prompt: impl Into<Prompt>,
        options: &GenerateOptions,
    ) -> Result<Generation> {
        self.submit(prompt, options)?.finish()
    }

    /// Ends it for all its clones, as dropping the last one does: running requests end with the error
    /// `Cancelled`, others are refused with it. Returns when its thread has ended.
    pub fn close(&self) {
        self.worker.stop();
    }

    /// What it is doing.
    pub fn stats(&self) -> EngineStats {
        self.worker.stats()
    }

    /// The model it computes.
    pub fn model(&self) -> &Model {
        &self.model
    }
}

/// Options that an engine has no use for: it has other sequences to compute with, and reads a prompt between
/// their steps.
fn refuse_solitary(options: &GenerateOptions) -> Result<()> {
    let solitary = [
        ("prompt_lookup", options.prompt_lookup.is_some()),
        ("draft_tokens", options.draft_tokens.is_some()),
        ("on_prefill", options.on_prefill.is_some()),
    ];
    match solitary.iter().find(|(_, is_set)| *is_set) {
        None => Ok(()),
        Some((key, _)) => Err(
            Error::new(ErrorKind::Unsupported, "engine has no such option")
                .with_key(*key)
                .with_help("leave it unset, or generate with the model or a session"),
        ),
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("model", &self.model)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request")
            .field("options", &self.options)
            .field("priority", &self.priority)
            .finish_non_exhaustive()
    }
}
