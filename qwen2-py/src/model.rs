//! The model handle.

use std::path::PathBuf;
use std::sync::Mutex;

use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyList};
use qwen2_core::{CancelToken, DType, Device, KvCacheType, Pooling, Prompt, Quantization};

use crate::arguments::{AnyPrompt, AnySource, Messages, TokenIds, Whole};
use crate::engine::Engine;
use crate::enter::{self, Report};
use crate::error::{Failure, lock, not_picklable};
use crate::options::{self, Given, signature};
use crate::results::{Generation, Memory};
use crate::session::Session;
use crate::settings::Settings;
use crate::stream::{Run, TokenStream};
use crate::tokenizer::Tokenizer;

/// A loaded model; may be used from several threads at once.
#[pyclass(module = "qwen2_rs", frozen)]
pub(crate) struct Model {
    /// `None` once it was closed. Locked for the time it takes to clone a handle.
    handle: Mutex<Option<qwen2_core::Model>>,
    quantize: Option<Quantization>,
}

impl Model {
    pub(crate) fn get(&self) -> PyResult<qwen2_core::Model> {
        let handle = lock(&self.handle).clone();
        Ok(handle
            .ok_or_else(|| Failure::invalid("model is closed", "model", "", "load it again"))?)
    }

    fn run_generate(&self, py: Python<'_>, prompt: Prompt, given: Given) -> PyResult<Generation> {
        let model = self.get()?;
        let cancel = CancelToken::new();
        let given = given.cancel(&cancel);
        let generation = enter::long(py, &cancel, || Ok(given.start(&model, prompt)?.finish()?))?;
        Generation::new(py, generation)
    }

    fn run_stream(&self, py: Python<'_>, prompt: Prompt, given: Given) -> PyResult<TokenStream> {
        let model = self.get()?;
        let cancel = CancelToken::new();
        let given = given.cancel(&cancel);
        let stream = enter::outside(py, || given.start(&model, prompt).map_err(Failure::from))?;
        Ok(TokenStream::new(Run::Model(Box::new(stream)), cancel))
    }
}

#[pymethods]
impl Model {
    /// Loads a model.
    ///
    /// source: a directory with a checkpoint, or the id of one on a hub (`[modelscope:]org/name[@revision][:file]`).
    /// device: auto, cpu, wgpu, vulkan, metal, cuda, with an index for a GPU, as in cuda:1.
    /// dtype: auto (as stored), f32, f16 or bf16.
    /// quantize: q8 or q4 packs the matrices into fewer bits.
    /// kv_cache: f32, f16, bf16, q8 or q4, what keys and values are kept in; by default f32 for f32 weights,
    ///     else f16.
    /// activations: f32, or bf16 for a faster prefill of bf16 weights that rounds them.
    /// preload: True copies the weights into memory of this process instead of using them from the
    ///     file, which may then change or lie on a slow disk.
    /// screened_head: True ranks the tokens by a copy of the packed head in four bits, and computes only
    ///     the best by the head itself; for greedy choice and top_k up to 64.
    /// adapter: a directory with a LoRA adapter of PEFT's, which is added to the weights.
    /// context_length: tokens that prompt and answer may have together; more than the model has
    ///     stretches it.
    /// long_context: what a context beyond the trained length is reached by: yarn; yarn_when_needed, which
    ///     leaves sequences up to the trained length as they are; or dual_chunk, attention in chunks.
    /// threads: on the processor; by default as many as the system allows.
    /// progress: True for a bar on stderr, or a function that gets the bytes done and in all; what
    ///     it raises stops the loading.
    #[staticmethod]
    #[pyo3(
        signature = (source, *, device="auto", dtype="auto", quantize=None, kv_cache=None, activations="f32", preload=false, screened_head=false, adapter=None, context_length=None, long_context="yarn", threads=None, progress=None),
        text_signature = "(source, *, device='auto', dtype='auto', quantize=None, kv_cache=None, activations='f32', preload=False, screened_head=False, adapter=None, context_length=None, long_context='yarn', threads=None, progress=False)"
    )]
    #[allow(clippy::too_many_arguments)] // the settings, by name
    fn load(
        py: Python<'_>,
        source: AnySource,
        device: &str,
        dtype: &str,
        quantize: Option<&str>,
        kv_cache: Option<&str>,
        activations: &str,
        preload: bool,
        screened_head: bool,
        adapter: Option<PathBuf>,
        context_length: Option<Whole>,
        long_context: &str,
        threads: Option<Whole>,
        progress: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let callback = progress_callback(py, progress)?;
        let mut builder = qwen2_core::Model::builder(source.0)
            .device(device.parse::<Device>().map_err(Failure::from)?);
        if dtype != "auto" {
            builder = builder.dtype(dtype.parse::<DType>().map_err(Failure::from)?);
        }
        let quantize = quantize
            .map(str::parse::<Quantization>)
            .transpose()
            .map_err(Failure::from)?;
        if let Some(quantize) = quantize {
            builder = builder.quantize(quantize);
        }
        if let Some(dtype) = kv_cache {
            builder = builder.kv_cache(dtype.parse::<KvCacheType>().map_err(Failure::from)?);
        }
        builder = builder
            .long_context(long_context.parse().map_err(Failure::from)?)
            .activations(activations.parse::<DType>().map_err(Failure::from)?)
            .preload(preload)
            .screened_head(screened_head);
        if let Some(adapter) = adapter {
            builder = builder.adapter(adapter);
        }
        if let Some(context_length) = context_length {
            builder = builder.context_length(context_length.setting("context_length")?);
        }
        if let Some(threads) = threads {
            builder = builder.threads(threads.setting("threads")?);
        }
        let load = |report: Report| {
            Ok(builder
                .progress(move |progress| report.set(progress))
                .load()?)
        };
        let model = reporting(py, callback, load)?;
        Ok(Self {
            handle: Mutex::new(Some(model)),
            quantize,
        })
    }

    #[doc = signature!("generate($self, prompt, *, ")]
    /// Answers a prompt: text, token ids or messages.
    ///
    /// An option that is not set is the checkpoint's own. They work in this order: logit_bias (added to the
    /// logits of tokens, -100 to 100); repetition_penalty (above 0, 1 is none, of prompt and output);
    /// presence_penalty and frequency_penalty (-2 to 2, of the output); bad_words (texts, or sequences of
    /// tokens, that are never produced); min_new_tokens (so many before an end token); processor (a function
    /// of tokens and logits, both arrays of numpy, that changes the logits or returns others; what it raises
    /// ends the generation); then, unless temperature is 0 or top_k 1: temperature (0 to 100), top_k (at
    /// least 1), top_p (above 0 to 1), min_p (0 to 1), typical_p (above 0 to 1).
    ///
    /// max_new_tokens: at least 1, by default to the end of the context. stop: strings that end the
    /// generation and are not part of its text. stop_token_ids: tokens that end it. ignore_eos: goes on after
    /// the checkpoint's own end tokens. logprobs: says of each new token how likely it was, and of as many of
    /// the likeliest ones, 0 to 1024; prompt_logprobs: the same for the prompt.
    ///
    /// prompt_lookup: proposes 1 to 64
    /// tokens at a time by what followed the last ones where they stood before. draft_tokens: how many
    /// the draft model of with_draft proposes, 1 to 64, by default 4. timeout: most seconds. on_prefill:
    /// a function that gets the tokens of the prompt done and in all while it is read; what it raises
    /// ends the generation and goes to sys.unraisablehook.
    #[pyo3(signature = (prompt, **options), text_signature = None)]
    fn generate(
        &self,
        py: Python<'_>,
        prompt: AnyPrompt,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Generation> {
        self.run_generate(py, prompt.0, options::read("generate", options)?)
    }

    #[doc = signature!("stream($self, prompt, *, ")]
    /// Answers a prompt piece by piece; nothing is computed before the first piece is asked for.
    /// Options as in generate.
    #[pyo3(signature = (prompt, **options), text_signature = None)]
    fn stream(
        &self,
        py: Python<'_>,
        prompt: AnyPrompt,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<TokenStream> {
        self.run_stream(py, prompt.0, options::read("stream", options)?)
    }

    #[doc = signature!("chat($self, messages, *, stream=False, ")]
    /// Answers a conversation; with stream=True piece by piece. Options as in generate.
    #[pyo3(signature = (messages, *, stream=false, **options), text_signature = None)]
    fn chat<'py>(
        &self,
        py: Python<'py>,
        messages: Messages,
        stream: bool,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (prompt, options) = (Prompt::Chat(messages.0), options::read("chat", options)?);
        if stream {
            Ok(Bound::new(py, self.run_stream(py, prompt, options)?)?.into_any())
        } else {
            Ok(Bound::new(py, self.run_generate(py, prompt, options)?)?.into_any())
        }
    }

    #[doc = signature!("generate_batch($self, prompts, *, return_exceptions=False, ")]
    /// Answers several prompts, in order. The first failure is raised once all have run; with
    /// return_exceptions=True failures stand in the list instead. Options as in generate.
    #[pyo3(signature = (prompts, *, return_exceptions=false, **options), text_signature = None)]
    fn generate_batch<'py>(
        &self,
        py: Python<'py>,
        prompts: &Bound<'py, PyAny>,
        return_exceptions: bool,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Bound<'py, PyList>> {
        let prompts: Vec<AnyPrompt> = prompts.extract()?;
        let prompts: Vec<Prompt> = prompts.into_iter().map(|prompt| prompt.0).collect();
        let model = self.get()?;
        let cancel = CancelToken::new();
        let given = options::read("generate_batch", options)?.cancel(&cancel);
        let results = enter::long(py, &cancel, || {
            if given.processor.is_none() {
                return Ok(model.generate_batch(&prompts, &given.options));
            }
            // A processor sees one generation after the other.
            let generate = |prompt| given.clone().start(&model, prompt)?.finish();
            Ok(prompts.into_iter().map(generate).collect())
        })?;
        let answers = results.into_iter().map(|result| match result {
            Ok(generation) => Ok(Bound::new(py, Generation::new(py, generation)?)?.into_any()),
            Err(error) => {
                let error = PyErr::from(Failure::from(error));
                if return_exceptions {
                    Ok(error.into_value(py).into_bound(py).into_any())
                } else {
                    Err(error)
                }
            }
        });
        PyList::new(py, answers.collect::<PyResult<Vec<_>>>()?)
    }

    /// A conversation that keeps its cache between turns.
    fn session(&self) -> PyResult<Session> {
        Ok(Session::new(self.get()?.session()))
    }

    /// A session that Session.save wrote, with its cache: nothing of it is read again. A file that is
    /// damaged, or of another model or of other settings, raises InvalidFileError.
    fn open_session(&self, py: Python<'_>, path: PathBuf) -> PyResult<Session> {
        let model = self.get()?;
        let session = enter::outside(py, || model.open_session(path).map_err(Failure::from))?;
        Ok(Session::new(session))
    }

    /// This model with draft, a smaller one of the same vocabulary, which proposes tokens; several are
    /// checked in one step, and the tokens stay those of this model alone. Both share their weights
    /// with the new one.
    fn with_draft(&self, draft: &Self) -> PyResult<Self> {
        let both = self.get()?.with_draft(&draft.get()?);
        Ok(Self {
            handle: Mutex::new(Some(both.map_err(Failure::from)?)),
            quantize: self.quantize,
        })
    }

    /// This model with a LoRA adapter of PEFT's beside its weights, which both share: what the adapter adds
    /// is computed next to them. On top of an adapter a second one adds up with it.
    ///
    /// path: the adapter's directory.
    fn with_adapter(&self, py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let model = self.get()?;
        let adapted = enter::outside(py, || model.with_adapter(path).map_err(Failure::from))?;
        Ok(Self {
            handle: Mutex::new(Some(adapted)),
            quantize: self.quantize,
        })
    }

    /// An engine for many requests on this model.
    ///
    /// max_sequences: those that are computed together; by default 64.
    /// cache_bytes: what the caches of all sequences and the shared prefixes may take together; by default
    ///     those of four sequences that fill the context.
    /// prefill_chunk: tokens of prompts that one step reads between the tokens of the others; by default 64.
    /// queue_limit: requests that may wait; by default 1024.
    /// when_full: what becomes of a request when so many wait: refuse, which raises OutOfMemoryError, or wait.
    /// reader_patience: seconds that the reader of an answer may leave 256 pieces unread before the request
    ///     ends as cancelled; by default 60.
    /// prefix_cache: whether the beginning that a prompt shares with earlier ones is computed once.
    /// deterministic: whether a request gets the same tokens alone and among others, to the last bit of its
    ///     logits; sequences are then computed one by one.
    #[pyo3(
        signature = (*, max_sequences=None, cache_bytes=None, prefill_chunk=None, queue_limit=None, when_full="refuse", reader_patience=None, prefix_cache=true, deterministic=false),
        text_signature = "($self, *, max_sequences=None, cache_bytes=None, prefill_chunk=None, queue_limit=None, when_full='refuse', reader_patience=None, prefix_cache=True, deterministic=False)"
    )]
    #[allow(clippy::too_many_arguments)] // the settings, by name
    fn engine(
        &self,
        max_sequences: Option<Whole>,
        cache_bytes: Option<Whole>,
        prefill_chunk: Option<Whole>,
        queue_limit: Option<Whole>,
        when_full: &str,
        reader_patience: Option<f64>,
        prefix_cache: bool,
        deterministic: bool,
    ) -> PyResult<Engine> {
        let settings = Settings {
            max_sequences,
            cache_bytes,
            prefill_chunk,
            queue_limit,
            when_full,
            reader_patience,
            prefix_cache,
            deterministic,
        };
        Engine::build(&self.get()?, &settings)
    }

    /// The logits of every token of a sequence: float32, [n_tokens, vocab_size].
    fn logits<'py>(
        &self,
        py: Python<'py>,
        tokens: TokenIds,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let model = self.get()?;
        let cancel = CancelToken::new();
        let logits = enter::long(py, &cancel, || Ok(model.logits_with(&tokens.0, &cancel)?))?;
        PyArray1::from_vec(py, logits.values).reshape([logits.n_tokens, logits.vocab_size])
    }

    /// Natural log-probability of each token given those before it; the first has none, so the
    /// result is one shorter than tokens.
    fn score<'py>(&self, py: Python<'py>, tokens: TokenIds) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let model = self.get()?;
        let cancel = CancelToken::new();
        let scores = enter::long(py, &cancel, || Ok(model.score_with(&tokens.0, &cancel)?))?;
        Ok(PyArray1::from_vec(py, scores))
    }

    /// Readies the device for the first request: reads every weight once, or of a layer's experts those that a
    /// few tokens visit, and has a GPU's driver compile the kernels for prompts of all lengths.
    fn warmup(&self, py: Python<'_>) -> PyResult<()> {
        let model = self.get()?;
        let cancel = CancelToken::new();
        enter::long(py, &cancel, || Ok(model.warmup_with(&cancel)?))
    }

    /// The embedding of a prompt: float32, [hidden_size], with squares that sum to 1. It is made of the hidden
    /// states behind the final norm: their mean, or with pooling="last_token" the last token's.
    #[pyo3(signature = (prompt, *, pooling="mean"))]
    fn embed<'py>(
        &self,
        py: Python<'py>,
        prompt: AnyPrompt,
        pooling: &str,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let model = self.get()?;
        let pooling = pooling.parse::<Pooling>().map_err(Failure::from)?;
        let cancel = CancelToken::new();
        let work = || Ok(model.embed_with(prompt.0, pooling, &cancel)?);
        let embedding = enter::long(py, &cancel, work)?;
        Ok(PyArray1::from_vec(py, embedding))
    }

    /// The perplexity of tokens: windows of `window` tokens begin every `stride` tokens, and each token
    /// counts once, foretold from what its first window has before it.
    #[pyo3(signature = (tokens, *, window=2048, stride=512))]
    fn perplexity(
        &self,
        py: Python<'_>,
        tokens: TokenIds,
        window: usize,
        stride: usize,
    ) -> PyResult<f64> {
        let model = self.get()?;
        let cancel = CancelToken::new();
        let found = enter::long(py, &cancel, || {
            Ok(model.perplexity_with(&tokens.0, window, stride, &cancel)?)
        })?;
        Ok(found.perplexity)
    }

    /// Lets go of the weights; later use raises ValueError. They are freed when what still uses
    /// them ends: running generations, open streams and sessions.
    fn close(&self, py: Python<'_>) {
        let handle = lock(&self.handle).take();
        enter::outside(py, || drop(handle));
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (exc_type, exc_value, traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) {
        let _ = (exc_type, exc_value, traceback);
        self.close(py);
    }

    /// Text to tokens and back.
    #[getter]
    fn tokenizer(&self) -> PyResult<Tokenizer> {
        Ok(Tokenizer(self.get()?.tokenizer().clone()))
    }

    /// The architecture, as config.json gives it; a copy.
    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        to_dict(py, self.get()?.config())
    }

    /// The checkpoint's own settings for generation; a copy.
    #[getter]
    fn generation_config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        to_dict(py, self.get()?.generation_config())
    }

    /// The directory's or repository's name.
    #[getter]
    fn name(&self) -> PyResult<String> {
        Ok(self.get()?.name().to_owned())
    }

    /// The directories of the adapters beside its weights, in the order they were added.
    #[getter]
    fn adapters(&self) -> PyResult<Vec<PathBuf>> {
        Ok(self.get()?.adapters().to_vec())
    }

    /// Where it computes.
    #[getter]
    fn device(&self) -> PyResult<String> {
        Ok(self.get()?.device().to_string())
    }

    /// The precision that most of its matrices have or had before they were packed.
    #[getter]
    fn dtype(&self) -> PyResult<&'static str> {
        Ok(self.get()?.dtype().name())
    }

    /// Tokens that prompt and answer may have together.
    #[getter]
    fn context_length(&self) -> PyResult<usize> {
        Ok(self.get()?.context_length())
    }

    /// Threads that compute on the processor.
    #[getter]
    fn threads(&self) -> PyResult<usize> {
        Ok(self.get()?.threads())
    }

    /// Bytes that it takes.
    #[getter]
    fn memory(&self) -> PyResult<Memory> {
        Ok(self.get()?.memory().into())
    }

    fn __repr__(&self) -> String {
        let Ok(model) = self.get() else {
            return "Model(closed)".to_owned();
        };
        format!(
            "Model(\"{}\", {}, {}, device=\"{}\", context_length={})",
            model.name(),
            short_count(model.config().parameter_count()),
            self.quantize
                .map_or(model.dtype().name(), Quantization::name),
            model.device(),
            model.context_length(),
        )
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(not_picklable(
            "Model",
            "load it in the process that uses it",
        ))
    }
}

/// Packs the checkpoint source into the new directory destination, which loads at once and takes
/// less room; into a GGUF file if the name ends in .gguf.
///
/// source: a directory with a checkpoint, or the id of one on a hub (`[modelscope:]org/name[@revision][:file]`).
/// destination: must not exist; it is there whole or not at all.
/// precision: q8 or q4.
/// progress: as of Model.load.
#[pyfunction]
#[pyo3(
    signature = (source, destination, precision="q8", *, progress=None),
    text_signature = "(source, destination, precision='q8', *, progress=False)"
)]
pub(crate) fn quantize(
    py: Python<'_>,
    source: AnySource,
    destination: PathBuf,
    precision: &str,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<()> {
    let callback = progress_callback(py, progress)?;
    let precision = precision.parse::<Quantization>().map_err(Failure::from)?;
    let work = |report: Report| {
        let tell = move |progress| report.set(progress);
        Ok(qwen2_core::quantize(
            source.0,
            destination,
            precision,
            tell,
        )?)
    };
    reporting(py, callback, work)
}

/// Converts the checkpoint source into destination: a GGUF file if its name ends in .gguf, else a
/// directory of safetensors.
///
/// source: a directory with a checkpoint, a GGUF file, or the id of a checkpoint on a hub.
/// destination: must not exist; it is there whole or not at all.
/// dtype: f32, f16 or bf16; None: as stored, and blocks of a GGUF file as bf16.
/// progress: as of Model.load.
#[pyfunction]
#[pyo3(
    signature = (source, destination, dtype=None, *, progress=None),
    text_signature = "(source, destination, dtype=None, *, progress=False)"
)]
pub(crate) fn convert(
    py: Python<'_>,
    source: AnySource,
    destination: PathBuf,
    dtype: Option<&str>,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<()> {
    let callback = progress_callback(py, progress)?;
    let dtype = dtype
        .map(str::parse::<DType>)
        .transpose()
        .map_err(Failure::from)?;
    let work = |report: Report| {
        let tell = move |progress| report.set(progress);
        Ok(qwen2_core::convert(source.0, destination, dtype, tell)?)
    };
    reporting(py, callback, work)
}

/// As convert, with a LoRA adapter added to the weights.
///
/// source: a directory with a checkpoint, a GGUF file, or the id of a checkpoint on a hub.
/// adapter: a directory with an adapter, as PEFT saves it.
/// destination: must not exist; it is there whole or not at all.
/// dtype: f32, f16 or bf16; None: as stored, and blocks of a GGUF file as bf16.
/// progress: as of Model.load.
#[pyfunction]
#[pyo3(
    signature = (source, adapter, destination, dtype=None, *, progress=None),
    text_signature = "(source, adapter, destination, dtype=None, *, progress=False)"
)]
pub(crate) fn merge_lora(
    py: Python<'_>,
    source: AnySource,
    adapter: PathBuf,
    destination: PathBuf,
    dtype: Option<&str>,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<()> {
    let callback = progress_callback(py, progress)?;
    let dtype = dtype
        .map(str::parse::<DType>)
        .transpose()
        .map_err(Failure::from)?;
    let work = |report: Report| {
        let tell = move |progress| report.set(progress);
        Ok(qwen2_core::merge_lora(
            source.0,
            adapter,
            destination,
            dtype,
            tell,
        )?)
    };
    reporting(py, callback, work)
}

/// What to call with the progress: the function itself, our bar for True, nothing for False.
pub(crate) fn progress_callback<'py>(
    py: Python<'py>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let Some(progress) = progress else {
        return Ok(None);
    };
    if let Ok(flag) = progress.cast::<PyBool>() {
        let bar = || py.import("qwen2_rs._progress")?.call_method0("Bar");
        return flag.is_true().then(bar).transpose();
    }
    if progress.is_callable() {
        return Ok(Some(progress));
    }
    Err(PyTypeError::new_err(
        "progress is a bool or a function of two numbers",
    ))
}

/// Does `work` with its progress told to `callback`, where there is one.
pub(crate) fn reporting<T: Send>(
    py: Python<'_>,
    callback: Option<Bound<'_, PyAny>>,
    work: impl FnOnce(Report) -> Result<T, Failure> + Send,
) -> PyResult<T> {
    match callback {
        Some(callback) => enter::loading(py, &callback, work),
        None => {
            let cancel = CancelToken::new();
            let report = Report::silent(cancel.clone());
            enter::long(py, &cancel, || work(report))
        }
    }
}

/// A serializable value as plain Python objects.
pub(crate) fn to_dict<'py>(
    py: Python<'py>,
    value: &impl serde::Serialize,
) -> PyResult<Bound<'py, PyDict>> {
    let json =
        serde_json::to_string(value).map_err(|error| PyTypeError::new_err(error.to_string()))?;
    Ok(py
        .import("json")?
        .call_method1("loads", (json,))?
        .cast_into()?)
}

/// `1.3M`, `494M`, `7.6B`.
fn short_count(n: u64) -> String {
    let n = n as f64;
    let (value, unit) = match n {
        n if n >= 1e9 => (n / 1e9, "B"),
        n if n >= 1e6 => (n / 1e6, "M"),
        n => (n / 1e3, "K"),
    };
    if value >= 100.0 {
        format!("{value:.0}{unit}")
    } else {
        format!("{value:.1}{unit}")
    }
}
