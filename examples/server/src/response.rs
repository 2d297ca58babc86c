//! Answers over HTTP: JSON, and events as they come.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use futures_util::stream;
use qwen2_core::{Generation, Piece};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::answers::Answers;
use crate::backend::Event;

/// How often a stream without news says that it lives, for proxies that would close it.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How an endpoint words the events of its stream.
pub(crate) trait Chunks: Send + 'static {
    /// Before anything else.
    fn start(&mut self) -> Vec<Value>;
    /// For each new token of answer `index`.
    fn piece(&mut self, index: usize, piece: &Piece) -> Vec<Value>;
    /// When answer `index` is complete.
    fn end(&mut self, index: usize, generation: &Generation) -> Vec<Value>;
    /// When all are.
    fn finish(&mut self) -> Vec<Value>;
}

/// A response of JSON.
pub(crate) fn json(status: StatusCode, value: &Value) -> Response {
    let mut response = Response::new(Body::from(value.to_string()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

/// A response of server-sent events, which end with `[DONE]` or an error.
pub(crate) fn events(answers: Answers, chunks: impl Chunks) -> Response {
    let source = Source {
        answers,
        chunks,
        stage: Stage::Start,
    };
    let body = stream::unfold(source, |mut source| async {
        let text = source.next().await?;
        Some((Ok::<_, std::convert::Infallible>(text), source))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct Source<C> {
    answers: Answers,
    chunks: C,
    stage: Stage,
}

enum Stage {
    Start,
    Running,
    Over,
}

impl<C: Chunks> Source<C> {
    /// The next bytes of the stream.
    async fn next(&mut self) -> Option<String> {
        match self.stage {
            Stage::Start => {
                self.stage = Stage::Running;
                let first = self.chunks.start();
                if !first.is_empty() {
                    return Some(worded(&first));
                }
            }
            Stage::Running => {}
            Stage::Over => return None,
        }
        loop {
            let Ok(event) = timeout(KEEP_ALIVE, self.answers.next()).await else {
                return Some(": still here\n\n".to_owned());
            };
            let chunks = match event {
                Ok(Some((index, Event::Piece(piece)))) => self.chunks.piece(index, &piece),
                Ok(Some((index, Event::End(generation)))) => self.chunks.end(index, &generation),
                Ok(None) => {
                    self.stage = Stage::Over;
                    let last = worded(&self.chunks.finish());
                    return Some(last + "data: [DONE]\n\n");
                }
                Err(error) => {
                    self.stage = Stage::Over;
                    return Some(worded(&[error.to_json()]));
                }
            };
            if !chunks.is_empty() {
                return Some(worded(&chunks));
            }
        }
    }
}

fn worded(chunks: &[Value]) -> String {
    chunks
        .iter()
        .map(|chunk| format!("data: {chunk}\n\n"))
        .collect()
}

/// Token counts of one request, over all its answers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    prompt: usize,
    cached: usize,
    completion: usize,
}

impl Tally {
    /// Adds an answer; prompts count once, with the first of the answers to them.
    pub(crate) fn add(&mut self, generation: &Generation, is_first: bool) {
        if is_first {
            self.prompt += generation.usage.prompt_tokens;
            self.cached += generation.usage.cached_tokens;
        }
        self.completion += generation.usage.completion_tokens;
    }

    /// OpenAI's `usage`.
    pub(crate) fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}
