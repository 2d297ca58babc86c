//! The settings for loading a model, collected and checked.

mod load;

use std::ops::ControlFlow;
use std::path::PathBuf;

use super::model::Model;
use super::quantize::Quantization;
use crate::checkpoint::{Progress, Source};
use crate::config::{DType, KvCacheType, LongContext, ModelConfig};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::ops::Threads;
pub(crate) use load::WeightBytes;

type ProgressFn = Box<dyn FnMut(Progress) -> ControlFlow<()> + Send>;

/// Settings for loading a model; [`ModelBuilder::load`] checks them.
#[must_use]
pub struct ModelBuilder {
    origin: Origin,
    device: Device,
    dtype: Option<DType>,
    quantize: Option<Quantization>,
    context_length: Option<usize>,
    long_context: LongContext,
    adapter: Option<PathBuf>,
    threads: Option<usize>,
    prefill_chunk: Option<usize>,
    activations: DType,
    kv_cache: Option<KvCacheType>,
    preload: bool,
    screened_head: bool,
    progress: Option<ProgressFn>,
}

enum Origin {
    Checkpoint(Source),
    Random(Box<ModelConfig>),
}

impl ModelBuilder {
    pub(crate) fn new(source: Source) -> Self {
        Self::with_origin(Origin::Checkpoint(source))
    }

    pub(crate) fn random(config: ModelConfig) -> Self {
        Self::with_origin(Origin::Random(Box::new(config)))
    }

    fn with_origin(origin: Origin) -> Self {
        Self {
            origin,
            device: Device::auto(),
            dtype: None,
            quantize: None,
            context_length: None,
            long_context: LongContext::default(),
            adapter: None,
            threads: None,
            prefill_chunk: None,
            activations: DType::F32,
            kv_cache: None,
            preload: false,
            screened_head: false,
            progress: None,
        }
    }

    /// Where to compute; default `auto`.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// The precision to keep the matrices in; default: as stored.
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Packs the matrices into fewer bits while loading; default: as stored.
    pub fn quantize(mut self, quantization: Quantization) -> Self {
        self.quantize = Some(quantization);
        self
    }

    /// Copies the weights into memory of this process, in huge pages where the system has them,
    /// instead of using them from the file: for files that may change or lie on a slow disk. Loading
    /// reads the whole file first, and processes do not share the memory. Default: false. Weights that
    /// are packed or converted while loading are such copies anyway.
    pub fn preload(mut self, preload: bool) -> Self {
        self.preload = preload;
        self
    }

    /// Whether a copy of the packed head in four bits ranks the tokens, and only the logits of the best
    /// are computed by the head itself, at least the 128 highest: decoding reads up to a fifth less.
    /// Used for greedy choice and `top_k` up to 64, where the tokens are those of the whole head but
    /// for rare ties; others compute the whole head. Default: false. Only for packed weights on the
    /// CPU; the copy takes half the head's memory.
    pub fn screened_head(mut self, screened_head: bool) -> Self {
        self.screened_head = screened_head;
        self
    }

    /// A directory with a LoRA adapter of PEFT's, or where none exists an id of one on a hub, which is added to the weights while they are loaded.
    /// Matrices that are stored in blocks or groups become bf16 then, unless they are packed again.
    pub fn adapter(mut self, directory: impl Into<PathBuf>) -> Self {
        self.adapter = Some(directory.into());
        self
    }

    /// Tokens that prompt and answer may have together, at most what the model was made for;
    /// default: all of it. Memory is taken as a sequence grows.
    pub fn context_length(mut self, n_tokens: usize) -> Self {
        self.context_length = Some(n_tokens);
        self
    }

    /// Threads on the processor; default: as many as affinity and cgroup allow.
    pub fn threads(mut self, n: usize) -> Self {
        self.threads = Some(n);
        self
    }

    /// Tokens that are read at once in prefill; default 512, on a GPU 2048.
    pub fn prefill_chunk(mut self, n_tokens: usize) -> Self {
        self.prefill_chunk = Some(n_tokens);
        self
    }

    /// What a context beyond the trained length is reached by; default [`LongContext::Yarn`].
    pub fn long_context(mut self, by: LongContext) -> Self {
        self.long_context = by;
        self
    }

    /// The precision that prefill multiplies bf16 weights in; default f32. `BF16` is up to twice as
    /// fast on processors with bf16 dot products, and rounds the activations of each product as
    /// transformers does when it computes in bf16; sums, norms and residuals stay f32.
    pub fn activations(mut self, dtype: DType) -> Self {
        self.activations = dtype;
        self
    }

    /// What keys and values are kept in; default: f32 for f32 weights, else f16, as on GPUs f32.
    pub fn kv_cache(mut self, kv_cache: impl Into<KvCacheType>) -> Self {
        self.kv_cache = Some(kv_cache.into());
        self
    }

    /// Called with the bytes done and in all while loading; `Break` stops it with `Cancelled`.
    pub fn progress(
        mut self,
        progress: impl FnMut(Progress) -> ControlFlow<()> + Send + 'static,
    ) -> Self {
        self.progress = Some(Box::new(progress));
        self
    }

    /// Loads the model.
    ///
    /// # Errors
    /// `InvalidArgument` for settings out of range, `NotFound`, `PermissionDenied`, `Io` and
    /// `InvalidFile` for the files, `Unsupported`, `DeviceUnavailable`, `Network`, `Cancelled`.
    pub fn load(mut self) -> Result<Model> {
        self.check()?;
        // An unusable device is reported before anything is read.
        let (device, burn_device) = self.device.open()?;
        let mut progress = self
            .progress
            .take()
            .unwrap_or_else(|| Box::new(|_| ControlFlow::Continue(())));
        match std::mem::replace(&mut self.origin, Origin::Random(Box::default())) {
            Origin::Checkpoint(source) => {
                self.load_checkpoint(&source, device, &burn_device, &mut *progress)
            }
            Origin::Random(config) => self.load_random(*config, device, &burn_device),
        }
    }

    fn check(&self) -> Result<()> {
        if self.activations == DType::F16 {
            return Err(
                Error::new(ErrorKind::Unsupported, "no products with f16 activations")
                    .with_key("activations")
                    .with_why("f16")
                    .with_help("f32 or bf16: f16 overflows in Qwen2's larger layers"),
            );
        }
        let limits = [
            ("threads", self.threads, 1024),
            ("context_length", self.context_length, usize::MAX),
            ("prefill_chunk", self.prefill_chunk, 1 << 20),
        ];
        for (key, value, most) in limits {
            if let Some(value) = value.filter(|value| *value == 0 || *value > most) {
                let why = if value == 0 {
                    "0".to_owned()
                } else {
                    format!("{value}, at most {most}")
                };
                return Err(
                    Error::new(ErrorKind::InvalidArgument, "setting is out of range")
                        .with_key(key)
                        .with_why(why)
                        .with_help("leave it unset for the default"),
                );
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for ModelBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelBuilder")
            .field("device", &self.device)
            .field("dtype", &self.dtype)
            .field("context_length", &self.context_length)
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

/// The threads of a model; `bf16_products` as in [`Threads::start`].
///
/// # Errors
/// `OutOfMemory` where the system gives none.
pub(super) fn start_threads(n: Option<usize>, bf16_products: bool) -> Result<Threads> {
    Threads::start(n, bf16_products).map_err(|error| {
        Error::new(ErrorKind::OutOfMemory, "cannot start threads")
            .with_key("threads")
            .with_why(error.to_string())
            .with_source(error)
    })
}
