//! Where answers are computed: the only file that knows the library's engine, and what waits for it.

use std::sync::Arc;
use std::task::{Context, Poll};

use qwen2_core::{
    CancelToken, Engine, EngineStats, Error, GenerateOptions, Generation, Model, Piece, Pooling,
    Prompt, Request, RequestStream, WhenFull,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;

use crate::settings::Settings;

/// A model that answers several prompts at once, and keeps the others waiting.
pub(crate) struct Backend {
    engine: Engine,
    /// Who computes or waits for it.
    places: Arc<Semaphore>,
    /// Whose texts are made vectors: one request at a time, beside the engine's steps.
    embedding: Arc<Semaphore>,
    /// A clone for each request for vectors.
    embeddings: Arc<()>,
}

/// Why a prompt gets no answer.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// As many wait as may.
    Full,
    /// The library's own words.
    Core(Error),
    /// A thread of ours ended too early.
    Lost,
}

/// What becomes of a prompt; dropping it stops the computation.
pub(crate) struct Answer {
    /// Until it has ended.
    stream: Option<RequestStream>,
    _place: OwnedSemaphorePermit,
}

/// A part of an answer.
#[derive(Debug)]
pub(crate) enum Event {
    Piece(Piece),
    /// The last one.
    End(Box<Generation>),
}

impl Backend {
    /// # Errors
    /// As [`qwen2_core::EngineBuilder::build`].
    pub(crate) fn new(model: &Model, settings: &Settings) -> qwen2_core::Result<Self> {
        let max_running = settings.max_running.clamp(1, Semaphore::MAX_PERMITS / 2);
        let max_answers = max_running + settings.max_waiting.min(Semaphore::MAX_PERMITS / 2);
        let mut engine = model
            .engine()
            .max_sequences(max_running)
            // The places are the limit. An answer that was dropped leaves its place at once, and the
            // engine's queue between two steps: the next one waits for that.
            .queue_limit(max_answers)
            .when_full(WhenFull::Wait)
            .reader_patience(settings.patience)
            .prefix_cache(settings.prefix_cache)
            .deterministic(settings.deterministic);
        if let Some(bytes) = settings.cache_memory {
            engine = engine.cache_bytes(bytes);
        }
        Ok(Self {
            engine: engine.build()?,
            places: Arc::new(Semaphore::new(max_answers)),
            embedding: Arc::new(Semaphore::new(1)),
            embeddings: Arc::default(),
        })
    }

    pub(crate) fn model(&self) -> &Model {
        self.engine.model()
    }

    /// What the engine does; requests for vectors are among those that wait and run.
    pub(crate) fn stats(&self) -> EngineStats {
        let mut stats = self.engine.stats();
        let embeddings = Arc::strong_count(&self.embeddings) - 1;
        let running = embeddings.min(1);
        stats.running += running;
        stats.waiting += embeddings - running;
        stats
    }

    /// Checks requests and puts all of them into the queue, or none.
    ///
    /// # Errors
    /// `Full`, and `Core` for what [`Engine::submit`] refuses.
    pub(crate) async fn submit(
        &self,
        requests: Vec<(Prompt, GenerateOptions)>,
    ) -> Result<Vec<Answer>, Refusal> {
        let n = u32::try_from(requests.len()).map_err(|_| Refusal::Full)?;
        let places = self.places.clone().try_acquire_many_owned(n);
        let mut places = places.map_err(|_| Refusal::Full)?;
        let engine = self.engine.clone();
        // Tokens of a long text take their time, and so does a schema.
        let submitted = spawn_blocking(move || {
            let mut answers = Vec::with_capacity(requests.len());
            for (prompt, options) in requests {
                let place = places.split(1).ok_or(Refusal::Full)?;
                let request = Request::new(prompt, &options);
                let stream = engine.submit_request(request).map_err(Refusal::Core)?;
                answers.push(Answer {
                    stream: Some(stream),
                    _place: place,
                });
            }
            Ok(answers)
        });
        submitted.await.map_err(|_| Refusal::Lost)?
    }

    /// The embeddings of texts, one after the other beside the answers; dropping the future stops them.
    ///
    /// # Errors
    /// `Full`, and `Core` for what [`Model::embed_with`] refuses.
    pub(crate) async fn embed(
        &self,
        inputs: Vec<Prompt>,
        pooling: Pooling,
    ) -> Result<Embeddings, Refusal> {
        let place = self.places.clone().try_acquire_owned();
        let place = place.map_err(|_| Refusal::Full)?;
        let counted = self.embeddings.clone();
        let turn = self.embedding.clone().acquire_owned().await;
        let turn = turn.map_err(|_| Refusal::Lost)?;
        let model = self.model().clone();
        let cancel = CancelToken::new();
        let _guard = CancelOnDrop(cancel.clone());
        let work = spawn_blocking(move || {
            let _held = (place, turn, counted);
            let mut done = Embeddings::default();
            for input in inputs {
                let tokens = match input {
                    Prompt::Text(text) => model.tokenizer().encode(&text)?,
                    Prompt::Tokens(tokens) => tokens,
                    _ => Vec::new(),
                };
                done.n_tokens += tokens.len();
                done.vectors
                    .push(model.embed_with(tokens, pooling, &cancel)?);
            }
            Ok(done)
        });
        work.await
            .map_err(|_| Refusal::Lost)?
            .map_err(Refusal::Core)
    }
}

/// Texts as vectors.
#[derive(Default)]
pub(crate) struct Embeddings {
    pub(crate) vectors: Vec<Vec<f32>>,
    pub(crate) n_tokens: usize,
}

/// Cancels when it is dropped.
struct CancelOnDrop(CancelToken);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Answer {
    /// The next part; `None` after the last one or an error.
    pub(crate) fn poll_next(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Event, Refusal>>> {
        let Some(stream) = &mut self.stream else {
            return Poll::Ready(None);
        };
        let event = match std::task::ready!(stream.poll_next(context)) {
            Some(Ok(piece)) => return Poll::Ready(Some(Ok(Event::Piece(piece)))),
            Some(Err(error)) => Err(error),
            // It has ended, so this waits for nothing.
            None => match self.stream.take() {
                Some(stream) => stream.finish().map(|end| Event::End(Box::new(end))),
                None => return Poll::Ready(None),
            },
        };
        self.stream = None;
        Poll::Ready(Some(event.map_err(Refusal::Core)))
    }
}
