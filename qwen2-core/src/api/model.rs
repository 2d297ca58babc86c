//! The model handle: every public verb, each a few lines of delegation.

use std::iter::successors;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::builder::{ModelBuilder, WeightBytes};
use super::session::Session;
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::{Source, names};
use crate::config::{DType, GenerationConfig, ModelConfig};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::fenced;
use crate::generate::{
    CancelToken, GenerateOptions, Generation, Host, LogSoftmax, LogitsProcessor, Network, Resolved,
    Run, SamplingDefaults, TokenStream,
};
use crate::model::{Delta, Rows, WARM_STEPS};
use crate::text::{Message, Tokenizer};

/// Tokens that ready a processor.
const WARM_TOKENS: usize = 16;

/// A loaded model: a handle that is cheap to clone and shared between threads.
#[derive(Clone)]
pub struct Model {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Clone)]
pub(crate) struct Inner {
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    pub(crate) generation_config: GenerationConfig,
    pub(crate) defaults: SamplingDefaults,
    pub(crate) host: Host,
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    pub(crate) weights: WeightBytes,
    pub(crate) cache_per_token: u64,
    pub(crate) context_length: usize,
    pub(crate) adapters: Vec<PathBuf>,
    /// Of all handles with these weights the same.
    pub(crate) origin: Arc<()>,
}

/// What the model answers to: text, tokens or a conversation.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Plain text; special tokens in it are ordinary text.
    Text(String),
    /// Token ids, special ones included.
    Tokens(Vec<u32>),
    /// Messages, rendered with the checkpoint's own chat template.
    Chat(Vec<Message>),
}

/// Logits of every token of a sequence, row-major f32.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    /// `[n_tokens, vocab_size]`.
    pub values: Vec<f32>,
    /// Rows.
    pub n_tokens: usize,
    /// Columns.
    pub vocab_size: usize,
}

/// Bytes that a model takes.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Weights, once for all sessions.
    pub weights: u64,
    /// What a decode step reads of them: all but the embedding table, where that is not the head too.
    pub weights_per_token: u64,
    /// Keys and values of one token of one session.
    pub cache_per_token: u64,
    /// Keys and values of one session that fills the context.
    pub cache_full: u64,
}

impl Model {
    /// Loads a checkpoint with the defaults of [`ModelBuilder`].
    ///
    /// # Errors
    /// See [`ModelBuilder::load`].
    pub fn load(source: impl Into<Source>) -> Result<Self> {
        Self::builder(source).load()
    }

    /// Settings for loading: device, precision, context, threads, progress.
    pub fn builder(source: impl Into<Source>) -> ModelBuilder {
        ModelBuilder::new(source.into())
    }

    /// A model of the given shape with random weights and a byte-level vocabulary: for
    /// measurements, where only the shape counts.
    pub fn random(config: &ModelConfig) -> ModelBuilder {
        ModelBuilder::random(config.clone())
    }

    /// Answers a prompt.
    ///
    /// # Errors
    /// `InvalidArgument` for options out of range or an empty prompt, `ContextOverflow`,
    /// `InvalidTemplate`, `InvalidConstraint`, `DeviceFailed`.
    pub fn generate(
        &self,
        prompt: impl Into<Prompt>,
        options: &GenerateOptions,
    ) -> Result<Generation> {
        self.stream(prompt, options)?.finish()
    }

    /// Answers a prompt piece by piece; nothing is computed before the first piece is asked for.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn stream(
        &self,
        prompt: impl Into<Prompt>,
        options: &GenerateOptions,
    ) -> Result<TokenStream> {
        self.start(prompt.into(), options, None)
    }

    /// As [`Model::stream`], with a processor that changes the logits before each choice.
    ///
    /// # Errors
    /// As [`Model::generate`], and what the processor returns.
    pub fn stream_with(
        &self,
        prompt: impl Into<Prompt>,
        options: &GenerateOptions,
        processor: impl LogitsProcessor + 'static,
    ) -> Result<TokenStream> {
        self.start(prompt.into(), options, Some(Box::new(processor)))
    }

    /// Answers a conversation: `generate` with the messages as the prompt.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn chat(&self, messages: &[Message], options: &GenerateOptions) -> Result<Generation> {
        self.generate(messages, options)
    }

    /// Answers several prompts in order; a failure does not sink the rest.
    pub fn generate_batch(
        &self,
        prompts: &[Prompt],
        options: &GenerateOptions,
    ) -> Vec<Result<Generation>> {
        prompts
            .iter()
            .map(|prompt| self.generate(prompt.clone(), options))
            .collect()
    }

    /// A conversation that keeps its cache.
    pub fn session(&self) -> Session {
        Session::new(self.clone())
    }

    /// This model with a LoRA adapter of PEFT's beside its weights, which both share: what the adapter
    /// adds is computed next to them. Each handle keeps its own adapters, so that requests with
    /// different ones go on side by side; on top of an adapter a second one adds up with it.
    ///
    /// To have an adapter's cost once instead, see [`ModelBuilder::adapter`] and
    /// [`merge_lora`](crate::merge_lora).
    ///
    /// # Errors
    /// `NotFound`, `InvalidFile` and `Unsupported` for files of the adapter, and where it is for another
    /// model.
    pub fn with_adapter(&self, directory: impl AsRef<Path>) -> Result<Self> {
        let inner = &*self.inner;
        let adapter = Adapter::open(directory.as_ref())?;
        adapter.check(&names::expected(&inner.config, inner.weights.tied))?;
        adapter.refuse(TABLE)?;
        let mut weights = inner.weights;
        weights.add(adapter.bytes());
        let mut adapters = inner.adapters.clone();
        adapters.push(directory.as_ref().to_owned());
        let network = &inner.host.network;
        let delta = |name: &str| {
            let delta = adapter.delta(name)?;
            Some(Delta {
                down: &delta.down,
                up: &delta.up,
                rank: delta.rank,
                scale: delta.scale,
            })
        };
        let qwen2 = fenced(|| network.qwen2.with_adapter(&delta)).map_err(|why| {
            Error::new(
                ErrorKind::DeviceFailed,
                "adapter cannot be put on the device",
            )
            .with_path(directory.as_ref())
            .with_why(why)
        })?;
        Ok(Self {
            inner: Arc::new(Inner {
                name: inner.name.clone(),
                config: inner.config.clone(),
                generation_config: inner.generation_config.clone(),
                defaults: inner.defaults.clone(),
                host: Host {
                    network: Arc::new(Network::new(qwen2, network.threads.clone())),
                    ..inner.host.clone()
                },
                device: inner.device.clone(),
                weights,
                adapters,
                origin: inner.origin.clone(),
                ..*inner
            }),
        })
    }

    /// The directories of the adapters beside its weights, in the order they were added.
    pub fn adapters(&self) -> &[PathBuf] {
        &self.inner.adapters
    }

    /// The logits of every token of `tokens`, `[n_tokens, vocab_size]`.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty sequence or an unknown id, `ContextOverflow`, `DeviceFailed`.
    pub fn logits(&self, tokens: &[u32]) -> Result<Logits> {
        self.logits_with(tokens, &CancelToken::new())
    }

    /// As [`Model::logits`], until `cancel` ends it.
    ///
    /// # Errors
    /// As [`Model::logits`], and `Cancelled`.
    pub fn logits_with(&self, tokens: &[u32], cancel: &CancelToken) -> Result<Logits> {
        let mut values = Vec::new();
        self.each_chunk(tokens, cancel, &mut |logits| values.extend(logits))?;
        Ok(Logits {
            values,
            n_tokens: tokens.len(),
            vocab_size: self.inner.config.vocab_size,
        })
    }

    /// Natural log-probability of each token given those before it; the first has none, so the
    /// result is one shorter than `tokens`.
    ///
    /// # Errors
    /// As [`Model::logits`].
    pub fn score(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.score_with(tokens, &CancelToken::new())
    }

    /// As [`Model::score`], until `cancel` ends it.
    ///
    /// # Errors
    /// As [`Model::logits`], and `Cancelled`.
    pub fn score_with(&self, tokens: &[u32], cancel: &CancelToken) -> Result<Vec<f32>> {
        let mut scores = Vec::with_capacity(tokens.len());
        let vocab_size = self.inner.config.vocab_size;
        self.each_chunk(tokens, cancel, &mut |logits| {
            let next = &tokens[(scores.len() + 1).min(tokens.len())..];
            let rows = logits.chunks_exact(vocab_size).zip(next);
            scores.extend(rows.map(|(row, &token)| LogSoftmax::of(row).get(row[token as usize])));
        })?;
        Ok(scores)
    }

    /// Calls `body` with the logits of every chunk of `tokens`.
    fn each_chunk(
        &self,
        tokens: &[u32],
        cancel: &CancelToken,
        body: &mut dyn FnMut(Vec<f32>),
    ) -> Result<()> {
        self.check_tokens(tokens)?;
        let host = &self.inner.host;
        let mut cache = self.new_cache();
        host.network.qwen2.ready(&mut cache, tokens.len());
        let watch = cancel.watch();
        for chunk in tokens.chunks(host.prefill_chunk) {
            let network = &host.network;
            body(network.forward(chunk, &mut cache, Rows::All, &watch)?);
        }
        Ok(())
    }

    /// Readies the device for the first request: reads every weight once, or of a layer's experts those that a
    /// few tokens visit, and has a GPU's driver compile the kernels for prompts of all lengths. Nothing of it
    /// stays in a cache, and no answer changes.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn warmup(&self) -> Result<()> {
        self.warmup_with(&CancelToken::new())
    }

    /// As [`Model::warmup`], until `cancel` ends it.
    ///
    /// # Errors
    /// As [`Model::warmup`], and `Cancelled`.
    pub fn warmup_with(&self, cancel: &CancelToken) -> Result<()> {
        let Host {
            network,
            prefill_chunk,
            ..
        } = &self.inner.host;
        let is_gpu = self.inner.device.is_gpu();
        // A processor's kernels are there: one prompt and one step read every weight.
        let longest = if is_gpu { *prefill_chunk } else { WARM_TOKENS };
        let longest = longest.min(self.context_length() - 1).max(1);
        // A GPU's are chosen by the size of the batch.
        let lengths = successors(Some(longest), |n| (is_gpu && *n > 1).then(|| n.div_ceil(4)));
        let vocab_size = self.inner.config.vocab_size;
        let (mut cache, watch) = (self.new_cache(), cancel.watch());
        for n in lengths {
            cache.clear();
            network.qwen2.ready(&mut cache, n);
            // Far from each other, so that they visit different experts.
            let tokens: Vec<u32> = (0..n).map(|i| (i * 997 % vocab_size) as u32).collect();
            network.forward(&tokens, &mut cache, Rows::Last, &watch)?;
            // One more is recorded, and one replayed.
            let steps = if is_gpu { WARM_STEPS + 2 } else { 1 };
            for _ in 0..steps.min(self.context_length() - n) {
                network.forward(&tokens[..1], &mut cache, Rows::Screened, &watch)?;
            }
            #[cfg(feature = "gpu")]
            if cache.n_tokens() < self.context_length() {
                network.likeliest(tokens[0], &mut cache)?;
            }
        }
        Ok(())
    }

    /// The architecture, as `config.json` gives it.
    pub fn config(&self) -> &ModelConfig {
        &self.inner.config
    }

    /// The checkpoint's own settings for generation; `eos_token_ids` is the union over its files.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.inner.generation_config
    }

    /// Text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.host.tokenizer
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// The precision of its matrices.
    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }

    /// Tokens that prompt and answer may have together.
    pub fn context_length(&self) -> usize {
        self.inner.context_length
    }

    /// Threads that compute on the processor.
    pub fn threads(&self) -> usize {
        self.inner.host.network.threads.count()
    }

    /// Bytes that it takes.
    pub fn memory(&self) -> Memory {
        let per_token = self.inner.cache_per_token;
        Memory {
            weights: self.inner.weights.all,
            weights_per_token: self.inner.weights.per_token,
            cache_per_token: per_token,
            cache_full: per_token * self.inner.context_length as u64,
        }
    }

    /// The directory's or repository's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Whether one of both was made of the other, or both of a third, by [`Model::with_adapter`].
    pub(crate) fn shares_weights(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner.origin, &other.inner.origin)
    }

    fn start(
        &self,
        prompt: Prompt,
        options: &GenerateOptions,
        processor: Option<Box<dyn LogitsProcessor>>,
    ) -> Result<TokenStream> {
        let resolved = options.resolve(&self.inner.defaults)?;
        let tokens = self.encode_for(&prompt, &resolved)?;
        let cache = self.new_cache();
        let host = self.inner.host.clone();
        let run = Run::new(host, tokens, &cache, resolved, processor, None)?;
        Ok(TokenStream::new(run, cache))
    }

    /// The tokens of a prompt to a generation with these options.
    pub(crate) fn encode_for(&self, prompt: &Prompt, options: &Resolved) -> Result<Vec<u32>> {
        let format = options.tool_format;
        match prompt {
            Prompt::Chat(messages) => {
                let tokenizer = self.tokenizer();
                tokenizer.encode_chat_with_tools(messages, &options.tools, format)
            }
            _ if options.tools.is_empty() => self.encode(prompt),
            _ => Err(
                Error::new(ErrorKind::InvalidArgument, "tools need messages")
                    .with_key("prompt")
                    .with_why("the prompt is text or tokens, where tools cannot be put into")
                    .with_help("give the prompt as messages"),
            ),
        }
    }

    /// The tokens of a prompt, all known to the model.
    pub(crate) fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer();
        match prompt {
            Prompt::Text(text) => tokenizer.encode(text),
            Prompt::Chat(messages) => tokenizer.encode_chat(messages, true),
            Prompt::Tokens(tokens) => {
                self.check_ids(tokens)?;
                Ok(tokens.clone())
            }
        }
    }

    pub(crate) fn new_cache(&self) -> crate::model::cache::Cache {
        self.inner
            .host
            .network
            .qwen2
            .new_cache(self.inner.context_length)
    }

    pub(super) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(
                Error::new(ErrorKind::InvalidArgument, "no tokens given").with_key("tokens")
            );
        }
        self.check_ids(tokens)
    }

    pub(crate) fn check_ids(&self, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.inner.config.vocab_size;
        match tokens.iter().find(|&&token| token as usize >= vocab_size) {
            Some(token) => Err(Error::new(ErrorKind::InvalidArgument, "no such token")
                .with_key("tokens")
                .with_why(format!("{token}, the vocabulary has {vocab_size}"))),
            None => Ok(()),
        }
    }
}

/// Not multiplied with, so nothing can be computed next to it.
const TABLE: &str = "model.embed_tokens.weight";

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("name", &self.inner.name)
            .field("parameters", &self.inner.config.parameter_count())
            .field("dtype", &self.inner.dtype)
            .field("device", &self.inner.device)
            .field("context_length", &self.inner.context_length)
            .finish()
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&[u32]> for Prompt {
    fn from(tokens: &[u32]) -> Self {
        Self::Tokens(tokens.to_vec())
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

impl From<&[Message]> for Prompt {
    fn from(messages: &[Message]) -> Self {
        Self::Chat(messages.to_vec())
    }
}

impl From<Vec<Message>> for Prompt {
    fn from(messages: Vec<Message>) -> Self {
        Self::Chat(messages)
    }
}

impl<const N: usize> From<[Message; N]> for Prompt {
    fn from(messages: [Message; N]) -> Self {
        Self::Chat(messages.into())
    }
}

/// The last part of a source, for people.
pub(crate) fn display_name(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}
