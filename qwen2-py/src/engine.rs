//! Many requests on one model, computed together.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use pyo3::prelude::*;
use pyo3::types::PyDict;
use qwen2_core::{CancelToken, LogitsProcessor, Prompt, Request};

use crate::arguments::{AnyPrompt, Messages, Whole};
use crate::enter;
use crate::error::{Failure, lock, not_picklable};
use crate::exit;
use crate::model::Model;
use crate::native::Native;
use crate::options::{self, signature};
use crate::processor::Processor;
use crate::request::RequestStream;
use crate::results::{EngineStats, Generation};
use crate::settings::Settings;
use crate::wake::{Bells, Step, block_on, inside};

/// Many requests on one model: they join and leave at every step, and each weight is read once for all of
/// them. May be used from several threads and event loops at once.
#[pyclass(module = "qwen2_rs", frozen)]
pub(crate) struct Engine {
    /// `None` once it was closed. Locked for the time it takes to clone a handle.
    handle: Mutex<Option<Handle>>,
    bells: Bells,
}

/// The library's engine, for its Python object and for its requests.
#[derive(Clone)]
pub(crate) struct Handle(Arc<Native<qwen2_core::Engine>>);

impl Handle {
    /// Of this engine as long as it lives.
    pub(crate) fn id(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }

    /// To be called before its thread runs anything of Python.
    pub(crate) fn runs_python(&self, py: Python<'_>) -> PyResult<()> {
        exit::close_at_exit(py, &self.0)
    }
}

/// A processor that knows which engine's thread it runs on.
struct Within {
    processor: Processor,
    id: usize,
}

impl LogitsProcessor for Within {
    fn process(&mut self, tokens: &[u32], logits: &mut [f32]) -> qwen2_core::Result<()> {
        inside(self.id, || self.processor.process(tokens, logits))
    }
}

/// What a request has beside its prompt, as Python gives it.
struct Asked<'a, 'py> {
    verb: &'static str,
    priority: Option<Whole>,
    model: Option<Bound<'py, Model>>,
    options: Option<&'a Bound<'py, PyDict>>,
}

/// A request that can be submitted.
struct Ready {
    engine: Handle,
    request: Request,
    cancel: CancelToken,
}

/// Something of an engine that comes later.
type Later<T> = Native<Pin<Box<dyn Future<Output = Result<T, Failure>> + Send>>>;

impl Ready {
    fn submitted(self) -> Later<qwen2_core::RequestStream> {
        Native::new(Box::pin(async move {
            Ok(self.engine.0.get()?.submit_async(self.request).await?)
        }))
    }

    fn generated(self) -> Later<qwen2_core::Generation> {
        Native::new(Box::pin(async move {
            let stream = self.engine.0.get()?.submit_async(self.request).await?;
            Ok(stream.finish_async().await?)
        }))
    }
}

/// Prompts are read into tokens in the first of these.
fn poll<T: Send>(py: Python<'_>, later: &mut Later<T>, waker: &Waker) -> Poll<Result<T, Failure>> {
    let future = later.get_mut()?;
    py.detach(|| future.as_mut().poll(&mut Context::from_waker(waker)))
}

impl Engine {
    pub(crate) fn build(model: &qwen2_core::Model, settings: &Settings<'_>) -> PyResult<Self> {
        let engine = settings.builder(model)?.build().map_err(Failure::from)?;
        Ok(Self {
            handle: Mutex::new(Some(Handle(Arc::new(Native::new(engine))))),
            bells: Bells::default(),
        })
    }

    fn get(&self) -> Result<Handle, Failure> {
        let handle = lock(&self.handle).clone();
        let closed = || Failure::invalid("engine is closed", "engine", "", "build another one");
        handle.ok_or_else(closed)
    }

    fn ready(&self, py: Python<'_>, prompt: Prompt, asked: Asked<'_, '_>) -> PyResult<Ready> {
        let engine = self.get()?;
        let cancel = CancelToken::new();
        let given = options::read(asked.verb, asked.options)?.cancel(&cancel);
        let mut request = Request::new(prompt, &given.options);
        if let Some(priority) = asked.priority {
            request = request.priority(priority.option("priority", "-128 to 127")?);
        }
        if let Some(model) = asked.model {
            request = request.model(&model.get().get()?);
        }
        if let Some(processor) = given.processor {
            engine.runs_python(py)?;
            let id = engine.id();
            request = request.processor(Within { processor, id });
        }
        Ok(Ready {
            engine,
            request,
            cancel,
        })
    }

    fn run_submit(
        &self,
        py: Python<'_>,
        prompt: Prompt,
        asked: Asked<'_, '_>,
    ) -> PyResult<RequestStream> {
        let ready = self.ready(py, prompt, asked)?;
        let (engine, cancel) = (ready.engine.clone(), ready.cancel.clone());
        let mut later = ready.submitted();
        let stream = block_on(py, engine.id(), |waker| poll(py, &mut later, waker))??;
        Ok(RequestStream::new(
            stream,
            cancel,
            engine,
            self.bells.clone(),
        ))
    }

    fn run_generate(
        &self,
        py: Python<'_>,
        prompt: Prompt,
        asked: Asked<'_, '_>,
    ) -> PyResult<Generation> {
        let ready = self.ready(py, prompt, asked)?;
        let id = ready.engine.id();
        let mut later = ready.generated();
        let generation = block_on(py, id, |waker| poll(py, &mut later, waker))??;
        Generation::new(py, generation)
    }

    fn submit_later<'py>(
        &self,
        py: Python<'py>,
        prompt: Prompt,
        asked: Asked<'_, 'py>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let ready = self.ready(py, prompt, asked)?;
        let (engine, cancel) = (ready.engine.clone(), ready.cancel.clone());
        engine.runs_python(py)?;
        let (mut later, bells) = (ready.submitted(), self.bells.clone());
        let own = cancel.clone();
        let step = Step::new(&self.bells, &cancel, move |py, waker| {
            poll(py, &mut later, waker).map(|stream| {
                let (cancel, engine, bells) = (own.clone(), engine.clone(), bells.clone());
                let stream = RequestStream::new(stream?, cancel, engine, bells);
                Ok(Bound::new(py, stream)?.into_any().unbind())
            })
        });
        wait(py, step)
    }

    fn generate_later<'py>(
        &self,
        py: Python<'py>,
        prompt: Prompt,
        asked: Asked<'_, 'py>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let ready = self.ready(py, prompt, asked)?;
        ready.engine.runs_python(py)?;
        let cancel = ready.cancel.clone();
        let mut later = ready.generated();
        let step = Step::new(&self.bells, &cancel, move |py, waker| {
            poll(py, &mut later, waker).map(|generation| {
                let generation = Generation::new(py, generation?)?;
                Ok(Bound::new(py, generation)?.into_any().unbind())
            })
        });
        wait(py, step)
    }
}

/// A coroutine that waits for `step`.
fn wait(py: Python<'_>, step: Step) -> PyResult<Bound<'_, PyAny>> {
    py.import("qwen2_rs._wait")?
        .call_method1("wait", (Bound::new(py, step)?,))
}

#[pymethods]
impl Engine {
    #[doc = signature!("submit($self, prompt, *, priority=0, model=None, ")]
    /// Puts a prompt into the queue; the answer comes as it is read. A full queue raises OutOfMemoryError,
    /// or is waited for, as the engine was built.
    ///
    /// priority: -128 to 127; a step of it goes before the 32 requests that came before. model: the engine's
    /// own with an adapter, by Model.with_adapter. Other options as in Model.generate, but for prompt_lookup,
    /// draft_tokens and on_prefill; a processor runs on the engine's thread.
    #[pyo3(signature = (prompt, *, priority=None, model=None, **options), text_signature = None)]
    fn submit<'py>(
        &self,
        py: Python<'py>,
        prompt: AnyPrompt,
        priority: Option<Whole>,
        model: Option<Bound<'py, Model>>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<RequestStream> {
        let asked = Asked::new("submit", priority, model, options);
        self.run_submit(py, prompt.0, asked)
    }

    #[doc = signature!("submit_async($self, prompt, *, priority=0, model=None, ")]
    /// As submit, in an event loop: a full queue is waited for without blocking it.
    #[pyo3(signature = (prompt, *, priority=None, model=None, **options), text_signature = None)]
    fn submit_async<'py>(
        &self,
        py: Python<'py>,
        prompt: AnyPrompt,
        priority: Option<Whole>,
        model: Option<Bound<'py, Model>>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let asked = Asked::new("submit_async", priority, model, options);
        self.submit_later(py, prompt.0, asked)
    }

    #[doc = signature!("generate($self, prompt, *, priority=0, model=None, ")]
    /// Answers a prompt, among the others. Options as in submit.
    #[pyo3(signature = (prompt, *, priority=None, model=None, **options), text_signature = None)]
    fn generate<'py>(
        &self,
        py: Python<'py>,
        prompt: AnyPrompt,
        priority: Option<Whole>,
        model: Option<Bound<'py, Model>>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Generation> {
        let asked = Asked::new("generate", priority, model, options);
        self.run_generate(py, prompt.0, asked)
    }

    #[doc = signature!("generate_async($self, prompt, *, priority=0, model=None, ")]
    /// As generate, in an event loop. A task that is cancelled while it waits cancels the request.
    #[pyo3(signature = (prompt, *, priority=None, model=None, **options), text_signature = None)]
    fn generate_async<'py>(
        &self,
        py: Python<'py>,
        prompt: AnyPrompt,
        priority: Option<Whole>,
        model: Option<Bound<'py, Model>>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let asked = Asked::new("generate_async", priority, model, options);
        self.generate_later(py, prompt.0, asked)
    }

    #[doc = signature!("chat($self, messages, *, stream=False, priority=0, model=None, ")]
    /// Answers a conversation; with stream=True piece by piece. Options as in submit.
    #[pyo3(signature = (messages, *, stream=false, priority=None, model=None, **options), text_signature = None)]
    fn chat<'py>(
        &self,
        py: Python<'py>,
        messages: Messages,
        stream: bool,
        priority: Option<Whole>,
        model: Option<Bound<'py, Model>>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let asked = Asked::new("chat", priority, model, options);
        let prompt = Prompt::Chat(messages.0);
        if stream {
            Ok(Bound::new(py, self.run_submit(py, prompt, asked)?)?.into_any())
        } else {
            Ok(Bound::new(py, self.run_generate(py, prompt, asked)?)?.into_any())
        }
    }

    #[doc = signature!("chat_async($self, messages, *, stream=False, priority=0, model=None, ")]
    /// As chat, in an event loop.
    #[pyo3(signature = (messages, *, stream=false, priority=None, model=None, **options), text_signature = None)]
    fn chat_async<'py>(
        &self,
        py: Python<'py>,
        messages: Messages,
        stream: bool,
        priority: Option<Whole>,
        model: Option<Bound<'py, Model>>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let asked = Asked::new("chat_async", priority, model, options);
        let prompt = Prompt::Chat(messages.0);
        match stream {
            true => self.submit_later(py, prompt, asked),
            false => self.generate_later(py, prompt, asked),
        }
    }

    /// What it is doing.
    #[getter]
    fn stats(&self) -> PyResult<EngineStats> {
        Ok(self.get()?.0.get()?.stats().into())
    }

    /// Ends what runs, with a CancelledError, and the engine's thread; later use raises ValueError.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let handle = lock(&self.handle).take();
        if let Some(handle) = handle {
            let engine = handle.0.get()?;
            enter::outside(py, || engine.close());
        }
        Ok(())
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
    ) -> PyResult<()> {
        let _ = (exc_type, exc_value, traceback);
        self.close(py)
    }

    fn __repr__(&self) -> String {
        let Ok(handle) = self.get() else {
            return "Engine(closed)".to_owned();
        };
        let Ok(engine) = handle.0.get() else {
            return "Engine(of another process)".to_owned();
        };
        let (name, stats) = (engine.model().name(), engine.stats());
        let (running, waiting) = (stats.running, stats.waiting);
        format!("Engine(\"{name}\", running={running}, waiting={waiting})")
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(not_picklable(
            "Engine",
            "build it in the process that uses it",
        ))
    }
}

impl<'a, 'py> Asked<'a, 'py> {
    fn new(
        verb: &'static str,
        priority: Option<Whole>,
        model: Option<Bound<'py, Model>>,
        options: Option<&'a Bound<'py, PyDict>>,
    ) -> Self {
        Self {
            verb,
            priority,
            model,
            options,
        }
    }
}
