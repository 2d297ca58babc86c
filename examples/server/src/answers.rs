//! The answers to one request, side by side, under its time limit and the server's end.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use qwen2_core::{GenerateOptions, Prompt};
use tokio::time::{Sleep, sleep};

use crate::backend::{Answer, Event, Refusal};
use crate::error::ApiError;
use crate::state::{App, Ending};

/// How a request calls what the library calls `max_new_tokens`, `prompt` and `constraint`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words {
    pub(crate) limit: &'static str,
    pub(crate) prompt: &'static str,
    pub(crate) constraint: &'static str,
}

/// Several answers as one sequence of events; dropping it stops them.
pub(crate) struct Answers {
    app: App,
    words: Words,
    answers: Vec<Answer>,
    /// Whom to ask first, so that none of them starves.
    turn: usize,
    deadline: Pin<Box<Sleep>>,
    ending: Ending,
    start: Instant,
    first: Vec<Option<Duration>>,
}

impl Answers {
    /// Puts all of them into the queue, or none.
    ///
    /// # Errors
    /// 400 for what the library refuses, 429 where the queue is full.
    pub(crate) async fn submit(
        app: &App,
        words: Words,
        requests: Vec<(Prompt, GenerateOptions)>,
    ) -> Result<Self, ApiError> {
        let start = Instant::now();
        let deadline = Box::pin(sleep(app.settings.timeout));
        let answers = app.backend.submit(requests).await;
        let answers = answers.map_err(|refusal| explain(refusal, words))?;
        Ok(Self {
            app: app.clone(),
            words,
            first: vec![None; answers.len()],
            answers,
            turn: 0,
            deadline,
            ending: app.ending(),
            start,
        })
    }

    /// The next event and which answer it is of; `None` when all have ended.
    ///
    /// # Errors
    /// The failure of any of them, 504 after the time limit, 503 when the server ends.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, Event)>, ApiError> {
        let event = poll_fn(|context| self.poll(context)).await?;
        if let Some((index, event)) = &event {
            self.observe(*index, event);
        }
        Ok(event)
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<(usize, Event)>, ApiError>> {
        if self.ending.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(ApiError::shutting_down()));
        }
        if self.deadline.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(ApiError::timed_out()));
        }
        let n = self.answers.len();
        let mut all_over = true;
        for index in (0..n).map(|offset| (self.turn + offset) % n) {
            match self.answers[index].poll_next(context) {
                Poll::Ready(None) => {}
                Poll::Ready(Some(event)) => {
                    self.turn = index + 1;
                    let event = event.map_err(|refusal| explain(refusal, self.words))?;
                    return Poll::Ready(Ok(Some((index, event))));
                }
                Poll::Pending => all_over = false,
            }
        }
        if all_over {
            Poll::Ready(Ok(None))
        } else {
            Poll::Pending
        }
    }

    fn observe(&mut self, index: usize, event: &Event) {
        let metrics = &self.app.metrics;
        match event {
            Event::Piece(_) => {
                let elapsed = self.start.elapsed();
                self.first[index].get_or_insert(elapsed);
                metrics.generated();
            }
            Event::End(generation) => {
                metrics.finished(generation, self.start.elapsed(), self.first[index]);
            }
        }
    }
}

/// A refusal in the request's words.
pub(crate) fn explain(refusal: Refusal, words: Words) -> ApiError {
    match refusal {
        Refusal::Full => ApiError::overloaded(),
        Refusal::Core(error) => ApiError::from_core(&error, words),
        Refusal::Lost => ApiError::internal("the computation ended without a result"),
    }
}
