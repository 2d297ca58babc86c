//! Where answers are computed: the only file that knows how many are at once, and on which threads.

use std::sync::Arc;
use std::task::{Context, Poll};

use qwen2_core::{
    CancelToken, GenerateOptions, Generation, Model, Piece, Pooling, Prompt, TokenStream,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::spawn_blocking;

/// Pieces that may wait for a client; then the computation waits for it.
const PIECES_AHEAD: usize = 16;

/// A model that answers several prompts at once, and keeps the others waiting.
pub(crate) struct Backend {
    model: Model,
    max_running: usize,
    max_answers: usize,
    /// Who computes.
    running: Arc<Semaphore>,
    /// Who computes or waits for it.
    places: Arc<Semaphore>,
}

/// Why a prompt gets no answer.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// As many wait as may.
    Full,
    /// The library's own words.
    Core(qwen2_core::Error),
    /// A thread of ours ended too early.
    Lost,
}

/// What becomes of a prompt; dropping it stops the computation.
pub(crate) struct Answer {
    pieces: mpsc::Receiver<qwen2_core::Result<Piece>>,
    end: oneshot::Receiver<Generation>,
    cancel: CancelToken,
    is_over: bool,
}

/// A part of an answer.
#[derive(Debug)]
pub(crate) enum Event {
    Piece(Piece),
    /// The last one.
    End(Box<Generation>),
}

impl Backend {
    pub(crate) fn new(model: Model, max_running: usize, max_waiting: usize) -> Self {
        let max_running = max_running.clamp(1, Semaphore::MAX_PERMITS / 2);
        let max_answers = max_running + max_waiting.min(Semaphore::MAX_PERMITS / 2);
        Self {
            model,
            max_running,
            max_answers,
            running: Arc::new(Semaphore::new(max_running)),
            places: Arc::new(Semaphore::new(max_answers)),
        }
    }

    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// Answers that are computed now.
    pub(crate) fn n_running(&self) -> usize {
        self.max_running - self.running.available_permits()
    }

    /// Answers that wait for their turn.
    pub(crate) fn n_waiting(&self) -> usize {
        let places = self.max_answers - self.places.available_permits();
        places.saturating_sub(self.n_running())
    }

    /// Checks requests and puts all of them into the queue, or none.
    ///
    /// # Errors
    /// `Full`, and `Core` for what [`Model::stream`] refuses.
    pub(crate) async fn submit(
        &self,
        requests: Vec<(Prompt, GenerateOptions)>,
    ) -> Result<Vec<Answer>, Refusal> {
        let n = u32::try_from(requests.len()).map_err(|_| Refusal::Full)?;
        let places = self.places.clone().try_acquire_many_owned(n);
        let mut places = places.map_err(|_| Refusal::Full)?;
        let mut answers = Vec::with_capacity(requests.len());
        for (prompt, options) in requests {
            let place = places.split(1).ok_or(Refusal::Full)?;
            answers.push(self.start(prompt, options, place).await?);
        }
        Ok(answers)
    }

    async fn start(
        &self,
        prompt: Prompt,
        options: GenerateOptions,
        place: OwnedSemaphorePermit,
    ) -> Result<Answer, Refusal> {
        let cancel = CancelToken::new();
        let options = options.cancel(cancel.clone());
        let model = self.model.clone();
        // Tokens of a long text take their time, too.
        let stream = spawn_blocking(move || model.stream(prompt, &options)).await;
        let stream = stream.map_err(|_| Refusal::Lost)?.map_err(Refusal::Core)?;
        let (to_client, pieces) = mpsc::channel(PIECES_AHEAD);
        let (at_end, end) = oneshot::channel();
        let running = self.running.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = to_client.closed() => {} // nobody waits for it any more
                Ok(turn) = running.acquire_owned() => {
                    spawn_blocking(move || compute(stream, &to_client, at_end, [place, turn]));
                }
            }
        });
        Ok(Answer {
            pieces,
            end,
            cancel,
            is_over: false,
        })
    }

    /// The embeddings of texts, one after the other in the queue's next turn; dropping the future stops
    /// before the next text.
    ///
    /// # Errors
    /// `Full`, and `Core` for what [`Model::embed`] refuses.
    pub(crate) async fn embed(
        &self,
        inputs: Vec<Prompt>,
        pooling: Pooling,
    ) -> Result<Embeddings, Refusal> {
        let place = self.places.clone().try_acquire_owned();
        let place = place.map_err(|_| Refusal::Full)?;
        let turn = self.running.clone().acquire_owned().await;
        let turn = turn.map_err(|_| Refusal::Lost)?;
        let model = self.model.clone();
        let cancel = CancelToken::new();
        let _guard = CancelOnDrop(cancel.clone());
        let work = spawn_blocking(move || {
            let _held = [place, turn];
            let mut done = Embeddings::default();
            for input in inputs {
                if cancel.is_cancelled() {
                    break; // nobody waits for it any more
                }
                let tokens = match input {
                    Prompt::Text(text) => model.tokenizer().encode(&text)?,
                    Prompt::Tokens(tokens) => tokens,
                    _ => Vec::new(),
                };
                done.n_tokens += tokens.len();
                done.vectors.push(model.embed(tokens, pooling)?);
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

/// Runs an answer to its end, or as far as somebody reads it.
fn compute(
    mut stream: TokenStream,
    to_client: &mpsc::Sender<qwen2_core::Result<Piece>>,
    at_end: oneshot::Sender<Generation>,
    _held: [OwnedSemaphorePermit; 2],
) {
    for piece in &mut stream {
        let failed = piece.is_err();
        if to_client.blocking_send(piece).is_err() || failed {
            return;
        }
    }
    let _ = at_end.send(stream.into_generation());
}

impl Answer {
    /// The next part; `None` after the last one or an error.
    pub(crate) fn poll_next(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Event, Refusal>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let event = match std::task::ready!(self.pieces.poll_recv(context)) {
            Some(Ok(piece)) => return Poll::Ready(Some(Ok(Event::Piece(piece)))),
            Some(Err(error)) => Err(Refusal::Core(error)),
            // Sent before the pieces' sender was dropped.
            None => match self.end.try_recv() {
                Ok(generation) => Ok(Event::End(Box::new(generation))),
                Err(_) => Err(Refusal::Lost),
            },
        };
        self.is_over = true;
        Poll::Ready(Some(event))
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}
