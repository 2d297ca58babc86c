//! What a builder's settings make of a checkpoint, or of chance: a network with its weights kept, packed and
//! counted.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Device as BurnDevice, TensorData};

use super::super::inspect::weight_bytes;
use super::super::model::{Inner, Model, display_name};
use super::super::quantize::{copy, keep, keep_packed, refuse_packed, screen};
use super::super::stored::{burn_dtype, keep_stored, merged};
use super::{ModelBuilder, start_threads};
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::{Checkpoint, Encoding, Progress, Source, cancelled, names};
use crate::config::{DType, GenerationConfig, KvCacheType, LongContext, ModelConfig};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::generate::{Host, Network, SamplingDefaults};
use crate::model::{self, Kept, SCREEN, Settings};
use crate::ops::arena::Arena;
use crate::ops::codes::Bits;
use crate::ops::{CacheFormat, Threads};
use crate::text::Tokenizer;

/// Tokens that one forward of the prefill takes: enough to read each weight once for many tokens,
/// few enough that a cancellation is seen soon.
const PREFILL_CHUNK: usize = 512;
/// The same on a GPU, which larger products suit.
const GPU_PREFILL_CHUNK: usize = 2048;

/// What comes out of the weights.
struct LoadedNetwork {
    qwen2: model::Qwen2,
    config: ModelConfig,
    context_length: usize,
    /// Of the weights before they were packed.
    dtype: DType,
    kv_cache: KvCacheType,
    weights: WeightBytes,
}

impl ModelBuilder {
    pub(super) fn load_checkpoint(
        &self,
        source: &Source,
        device: Device,
        burn_device: &BurnDevice,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Model> {
        let threads = start_threads(self.threads, self.activations == DType::BF16)?;
        let checkpoint = Checkpoint::open(source, progress)?;
        // What is wrong with the tokenizer is not told after minutes of packing.
        let failed = AtomicBool::new(false);
        let tokenizer = || {
            let tokenizer = Tokenizer::of_checkpoint(&checkpoint)
                .and_then(|tokenizer| check_vocabulary(&checkpoint, tokenizer));
            failed.store(tokenizer.is_err(), Ordering::Relaxed);
            tokenizer
        };
        let mut go_on = |at| match failed.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => progress(at),
        };
        let network = || self.load_network(&checkpoint, &device, burn_device, &threads, &mut go_on);
        let (tokenizer, network) = beside(tokenizer, network)?;
        let (tokenizer, network) = (tokenizer?, network?);
        let mut generation_config = checkpoint.generation_config.clone();
        merge_eos(
            &mut generation_config,
            &checkpoint.config,
            tokenizer.eos_token_id(),
        );
        let name = display_name(checkpoint.path());
        self.finish(name, network, generation_config, tokenizer, threads, device)
    }

    fn load_network(
        &self,
        checkpoint: &Checkpoint,
        device: &Device,
        burn_device: &BurnDevice,
        threads: &Threads,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<LoadedNetwork> {
        for (key, is_set) in [
            ("dtype", self.dtype.is_some()),
            ("quantize", self.quantize.is_some()),
        ] {
            if is_set {
                refuse_packed(checkpoint, key)?;
            }
        }
        let tied = names::audit(checkpoint)?;
        let (config, context_length) = self.with_context(&checkpoint.config)?;
        let expected = names::expected(&checkpoint.config, tied);
        let adapter = self.open_adapter(checkpoint, &expected)?;
        let shapes: HashMap<_, _> = expected.into_iter().collect();
        let kept = self.dtype.filter(|_| !device.is_gpu() || device.is_cuda());
        let stored = match checkpoint.config.packed {
            true => checkpoint.config.dtype, // of what it was packed from
            false => checkpoint.dtype(),
        };
        let dtype = kept.or(stored).unwrap_or(DType::F32);
        let blocks = checkpoint.has_blocks() && self.kept_dtype(device).is_none();
        let packed = checkpoint.config.packed || self.quantize.is_some() || blocks;
        let whole = (checkpoint.config.packed || blocks).then(|| checkpoint.total_bytes());
        self.check_room(device, &config, dtype, whole)?;
        let mut done = 0;
        let mut weights = WeightBytes::new(tied, self.screened_head, &checkpoint.config);
        self.check_screen(device, packed)?;
        let mut ranks = None;
        let total = checkpoint.total_bytes();
        let kv_cache = self.kv_cache_type(device, dtype, packed);
        let mut arena = Arena::default();
        let qwen2 = model::load(
            &config,
            burn_device,
            self.settings(tied, kv_cache),
            &mut |name| {
                if name == SCREEN {
                    return taken(&mut ranks);
                }
                let mut stored = checkpoint.tensor(name)?;
                let in_file = stored.bytes.as_ptr_range();
                done += stored.stored_bytes();
                if let Some(adapter) = adapter.as_ref().filter(|adapter| adapter.changes(name)) {
                    stored = merged(name, &stored, adapter, threads);
                }
                let mut data = match stored.encoding {
                    Encoding::Packed => keep_packed(name, stored, &shapes, checkpoint.path())?,
                    _ => {
                        let (dtype, quantize) = (self.kept_dtype(device), self.quantize);
                        let beside = device.is_cpu(); // the kernels for more than a scale are there alone
                        keep_stored(name, stored, dtype, quantize, beside, threads, &mut arena)?
                    }
                };
                weights.count(name, &data);
                ranks = ranks
                    .take()
                    .or(weights.screen(name, &data, threads, &mut arena)?);
                if self.preload && in_file.contains(&data.bytes().as_ptr()) {
                    data = copy(name, data, threads, &mut arena)?;
                }
                if !in_file.contains(&data.bytes().as_ptr()) {
                    checkpoint.release(name);
                }
                if progress(Progress::new(done, total)).is_break() {
                    return Err(cancelled(checkpoint.path()));
                }
                Ok(data)
            },
        )?;
        Ok(LoadedNetwork {
            qwen2,
            config,
            context_length,
            dtype,
            kv_cache,
            weights,
        })
    }

    /// Refuses what the device has no room for; `stored` is what packed weights take.
    fn check_room(
        &self,
        device: &Device,
        config: &ModelConfig,
        dtype: DType,
        stored: Option<u64>,
    ) -> Result<()> {
        let dtype = self.kept_dtype(device).unwrap_or(dtype);
        device.check_room(stored.unwrap_or_else(|| weight_bytes(config, dtype, self.quantize)))
    }

    /// The precision of matrices on the device: what runs on wgpu does not all take bf16.
    fn kept_dtype(&self, device: &Device) -> Option<DType> {
        if device.is_cpu() || device.is_cuda() {
            self.dtype
        } else {
            self.dtype.or(Some(DType::F32))
        }
    }

    fn settings(&self, tied: bool, kv_cache: KvCacheType) -> Settings {
        Settings {
            tied,
            screened: self.screened_head,
            cache_format: cache_format(kv_cache),
            yarn_when_needed: self.long_context == LongContext::YarnWhenNeeded,
        }
    }

    fn kv_cache_type(&self, device: &Device, weights: DType, packed: bool) -> KvCacheType {
        self.kv_cache.unwrap_or(match packed {
            _ if !device.is_cpu() && !device.is_cuda() => KvCacheType::F32,
            true => KvCacheType::F16,
            false => weights.default_kv_cache(),
        })
    }

    pub(super) fn load_random(
        &self,
        config: ModelConfig,
        device: Device,
        burn_device: &BurnDevice,
    ) -> Result<Model> {
        let (config, context_length) = self.with_context(&config)?;
        let threads = start_threads(self.threads, self.activations == DType::BF16)?;
        let dtype = self.dtype.or(config.dtype).unwrap_or(DType::BF16);
        self.check_room(&device, &config, dtype, None)?;
        let mut seed = 0;
        let tied = config.tie_word_embeddings;
        let mut weights = WeightBytes::new(tied, self.screened_head, &config);
        self.check_screen(&device, self.quantize.is_some())?;
        let mut ranks = None;
        let shapes: HashMap<_, _> = names::expected(&config, tied).into_iter().collect();
        let kv_cache = self.kv_cache_type(&device, dtype, self.quantize.is_some());
        let mut arena = Arena::default();
        let qwen2 = model::load(
            &config,
            burn_device,
            self.settings(tied, kv_cache),
            &mut |name| {
                if name == SCREEN {
                    return taken(&mut ranks);
                }
                let shape = shapes.get(name).ok_or_else(|| {
                    Error::new(
                        ErrorKind::Internal,
                        "network asks for a tensor it does not have",
                    )
                    .with_key(name)
                })?;
                seed += 1;
                let data = random_tensor(name, shape, dtype, seed);
                let data = keep(name, data, self.quantize, &threads, &mut arena)?;
                weights.count(name, &data);
                ranks = ranks
                    .take()
                    .or(weights.screen(name, &data, &threads, &mut arena)?);
                match data {
                    Kept::Dense(_) if device.is_cpu() => copy(name, data, &threads, &mut arena), // as preloaded
                    data => Ok(data),
                }
            },
        )?;
        let network = LoadedNetwork {
            qwen2,
            context_length,
            dtype,
            kv_cache,
            weights,
            config,
        };
        self.finish(
            format!("random {}", network.config.hidden_size),
            network,
            GenerationConfig::default(),
            Tokenizer::byte_level()?,
            threads,
            device,
        )
    }

    fn finish(
        &self,
        name: String,
        network: LoadedNetwork,
        generation_config: GenerationConfig,
        tokenizer: Tokenizer,
        threads: Threads,
        device: Device,
    ) -> Result<Model> {
        let LoadedNetwork {
            qwen2,
            config,
            context_length,
            dtype,
            kv_cache,
            weights,
        } = network;
        let cache_per_token = config.kv_bytes_per_token(kv_cache);
        tracing::info!(name, %device, threads = threads.count(), bytes = weights.all, "loaded");
        Ok(Model {
            inner: Arc::new(Inner {
                name,
                defaults: sampling_defaults(&generation_config, config.vocab_size),
                generation_config,
                host: Host {
                    network: Arc::new(Network::new(qwen2, threads)),
                    tokenizer,
                    prefill_chunk: self.prefill_chunk.unwrap_or(match device.is_gpu() {
                        true => GPU_PREFILL_CHUNK,
                        false => PREFILL_CHUNK,
                    }),
                    draft: None,
                },
                config,
                device,
                dtype,
                weights,
                cache_per_token,
                context_length,
                adapters: Vec::new(),
                origin: Arc::new(()),
            }),
        })
    }

    /// A screen is made of a packed head, and used by the kernels of the CPU.
    fn check_screen(&self, device: &Device, packed: bool) -> Result<()> {
        if !self.screened_head || (device.is_cpu() && packed) {
            return Ok(());
        }
        Err(
            Error::new(ErrorKind::InvalidArgument, "head cannot be screened")
                .with_key("screened_head")
                .with_why("it is for packed weights on the CPU")
                .with_help("leave the setting out, or set quantize and the device cpu"),
        )
    }

    fn open_adapter(
        &self,
        checkpoint: &Checkpoint,
        shapes: &[(String, Vec<usize>)],
    ) -> Result<Option<Adapter>> {
        let Some(path) = &self.adapter else {
            return Ok(None);
        };
        refuse_packed(checkpoint, "adapter")?;
        let adapter = Adapter::open(path)?;
        adapter.check(shapes)?;
        Ok(Some(adapter))
    }

    /// The config for the context that is asked for, and that context.
    fn with_context(&self, config: &ModelConfig) -> Result<(ModelConfig, usize)> {
        let wanted = self.context_length.unwrap_or(config.context_length());
        let stretched = config.stretched_to(wanted, self.long_context)?;
        if stretched != *config {
            let trained = config.trained_length();
            // A config that has chunks stays with them, whatever is asked for.
            let long_context = match stretched.dual_chunk_attention {
                Some(_) => LongContext::DualChunk,
                None => self.long_context,
            };
            tracing::info!(
                context_length = wanted,
                trained,
                factor = wanted as f64 / trained as f64,
                long_context = long_context.name(),
                "stretched"
            );
        }
        Ok((stretched, wanted))
    }
}

/// Ids that the tokenizer may give must have a row in the embedding table.
/// Does two things at once: a tokenizer takes a thread as long as packed weights take the others.
///
/// # Errors
/// `OutOfMemory` where the system gives no thread.
fn beside<A: Send, B>(
    first: impl FnOnce() -> A + Send,
    second: impl FnOnce() -> B,
) -> Result<(A, B)> {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("qwen2-load".to_owned());
        let first = builder.spawn_scoped(scope, first).map_err(|error| {
            Error::new(ErrorKind::OutOfMemory, "cannot start a thread for loading")
                .with_why(error.to_string())
                .with_source(error)
        })?;
        let second = second();
        match first.join() {
            Ok(first) => Ok((first, second)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn check_vocabulary(checkpoint: &Checkpoint, tokenizer: Tokenizer) -> Result<Tokenizer> {
    let (rows, ids) = (checkpoint.config.vocab_size, tokenizer.vocab_size());
    if ids <= rows {
        return Ok(tokenizer);
    }
    Err(Error::new(
        ErrorKind::InvalidFile,
        "vocabulary is smaller than the tokenizer's",
    )
    .with_path(checkpoint.config_path())
    .with_key("vocab_size")
    .with_why(format!("{rows}, the tokenizer has {ids} ids"))
    .with_help("is tokenizer.json from another checkpoint?"))
}

fn sampling_defaults(config: &GenerationConfig, vocab_size: usize) -> SamplingDefaults {
    SamplingDefaults {
        do_sample: config.do_sample,
        temperature: config.temperature,
        top_k: config.top_k,
        top_p: config.top_p,
        min_p: config.min_p,
        repetition_penalty: config.repetition_penalty,
        max_new_tokens: config.max_new_tokens,
        eos_token_ids: config.eos_token_ids.clone(),
        vocab_size: Some(vocab_size),
    }
}

/// The stop set is the union over the checkpoint's files: they differ (QwenLM/Qwen3#927).
fn merge_eos(
    generation_config: &mut GenerationConfig,
    config: &ModelConfig,
    tokenizer: Option<u32>,
) {
    for id in config.eos_token_ids.iter().copied().chain(tokenizer) {
        if !generation_config.eos_token_ids.contains(&id) {
            generation_config.eos_token_ids.push(id);
        }
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";

/// The tensor that the head is.
fn head_name(tied: bool) -> &'static str {
    if tied { EMBEDDING } else { "lm_head.weight" }
}

/// What was made for the network before it asked.
fn taken(kept: &mut Option<Kept>) -> Result<Kept> {
    kept.take().ok_or_else(|| {
        Error::new(ErrorKind::Internal, "the head came after its screen").with_key(SCREEN)
    })
}

/// Bytes of the weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WeightBytes {
    pub(crate) all: u64,
    /// Of those that each token reads.
    pub(crate) per_token: u64,
    pub(crate) tied: bool,
    screened: bool,
    /// Of so many experts a token visits so many.
    visits: (u64, u64),
}

impl WeightBytes {
    fn new(tied: bool, screened: bool, config: &ModelConfig) -> Self {
        let visits = config.moe.as_ref().map_or((1, 1), |moe| {
            (moe.num_experts_per_tok as u64, moe.num_experts as u64)
        });
        Self {
            all: 0,
            per_token: 0,
            tied,
            screened,
            visits,
        }
    }

    /// Adds what every token reads.
    pub(crate) fn add(&mut self, bytes: u64) {
        self.all += bytes;
        self.per_token += bytes;
    }

    fn count(&mut self, name: &str, kept: &Kept) {
        let bytes = kept.bytes().len() as u64;
        self.all += bytes;
        // A token reads one row of a table that is not the head as well, and the screen for the head.
        let row_only = !self.tied && name == EMBEDDING;
        let few_only = self.screened && name == head_name(self.tied);
        if name.contains(".mlp.experts.") {
            // All of one layer are alike, so the sum has no rounding to speak of.
            self.per_token += bytes * self.visits.0 / self.visits.1;
        } else if !row_only && !few_only {
            self.per_token += bytes;
        }
    }

    /// The screen of a head that is to have one, counted; of every other tensor nothing.
    fn screen(
        &mut self,
        name: &str,
        kept: &Kept,
        threads: &Threads,
        arena: &mut Arena,
    ) -> Result<Option<Kept>> {
        if !self.screened || name != head_name(self.tied) {
            return Ok(None);
        }
        let ranks = screen(kept, threads, arena)?;
        ranks.iter().for_each(|ranks| self.count(SCREEN, ranks));
        Ok(ranks)
    }
}

fn cache_format(kv_cache: KvCacheType) -> CacheFormat {
    match kv_cache {
        KvCacheType::F32 => CacheFormat::Floats(burn_dtype(DType::F32)),
        KvCacheType::F16 => CacheFormat::Floats(burn_dtype(DType::F16)),
        KvCacheType::BF16 => CacheFormat::Floats(burn_dtype(DType::BF16)),
        KvCacheType::Q8 => CacheFormat::Codes(Bits::Eight),
        KvCacheType::Q4 => CacheFormat::Codes(Bits::Four),
    }
}

/// Uniform weights of deviation 0.02, Qwen2's initializer_range; norms are 1.
fn random_tensor(name: &str, shape: &[usize], dtype: DType, seed: u64) -> TensorData {
    let n: usize = shape.iter().product();
    if name.ends_with("norm.weight") {
        return TensorData::new(vec![1.0_f32; n], shape.to_vec()).convert_dtype(burn_dtype(dtype));
    }
    // SplitMix64: fast, and its quality does not matter here.
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let unit = (z >> 40) as f32 / (1u64 << 24) as f32;
        (unit - 0.5) * (0.02 * 3.464_101_6)
    };
    match dtype {
        DType::F32 => TensorData::new(repeated(n, next), shape.to_vec()),
        DType::BF16 => {
            let numbers = repeated(n, || half::bf16::from_f32(next()));
            TensorData::new(numbers, shape.to_vec())
        }
        DType::F16 => {
            let numbers = repeated(n, || half::f16::from_f32(next()));
            TensorData::new(numbers, shape.to_vec())
        }
    }
}

/// `n` numbers, of which the first million are drawn: the largest networks have a thousand times more.
fn repeated<T: Copy>(n: usize, mut next: impl FnMut() -> T) -> Vec<T> {
    const DRAWN: usize = (1 << 20) + 7;
    let mut numbers = Vec::with_capacity(n);
    numbers.extend((0..n.min(DRAWN)).map(|_| next()));
    while numbers.len() < n {
        let more = numbers.len().min(n - numbers.len());
        numbers.extend_from_within(..more);
    }
    numbers
}
