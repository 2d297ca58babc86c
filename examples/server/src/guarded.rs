//! A connection that gives up on a peer that reads nothing, and words hyper's own refusals.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::error::ApiError;

/// A stream with a limit on how long a write may wait.
///
/// hyper answers what is no HTTP with a status and an empty body, and has no way to say more; such a
/// head is replaced on its way out by one with the usual JSON.
pub(crate) struct Guarded<S> {
    stream: S,
    patience: Duration,
    waiting: Pin<Box<Sleep>>,
    is_waiting: bool,
    has_read: Arc<AtomicBool>,
    refusal: Option<(Vec<u8>, usize)>,
}

impl<S> Guarded<S> {
    /// `patience`: how long a peer may take none of what is written.
    pub(crate) fn new(stream: S, patience: Duration) -> Self {
        Self {
            stream,
            patience,
            waiting: Box::pin(sleep(patience)),
            is_waiting: false,
            has_read: Arc::default(),
            refusal: None,
        }
    }

    /// Whether the peer has sent a byte yet.
    pub(crate) fn has_read(&self) -> Arc<AtomicBool> {
        self.has_read.clone()
    }

    /// Starts the clock at the first wait, stops it at progress, and fails when it runs out.
    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        poll: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.is_waiting = false;
            return poll;
        }
        if !self.is_waiting {
            self.is_waiting = true;
            let end = Instant::now() + self.patience;
            self.waiting.as_mut().reset(end);
        }
        ready!(self.waiting.as_mut().poll(context));
        tracing::info!("a client reads nothing and is disconnected");
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            self.has_read.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.refusal.is_none() {
            this.refusal = worded(bytes).map(|refusal| (refusal, 0));
        }
        let Some((refusal, written)) = &mut this.refusal else {
            let poll = Pin::new(&mut this.stream).poll_write(context, bytes);
            return this.watch(context, poll);
        };
        while *written < refusal.len() {
            let poll = Pin::new(&mut this.stream).poll_write(context, &refusal[*written..]);
            match poll {
                Poll::Ready(Ok(n)) => *written += n,
                other => return this.watch(context, other),
            }
        }
        this.refusal = None;
        this.is_waiting = false;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_flush(context);
        self.watch(context, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_shutdown(context);
        self.watch(context, poll)
    }
}

/// hyper's refusal with words, if `bytes` are one: a 4xx without a body, which no route of ours sends.
fn worded(bytes: &[u8]) -> Option<Vec<u8>> {
    let head = bytes.strip_prefix(b"HTTP/1.1 4")?;
    let is_empty = head.ends_with(b"\r\n\r\n")
        && head
            .windows(19)
            .any(|line| line == b"content-length: 0\r\n");
    if !is_empty {
        return None;
    }
    let (status, message) = match head.get(..2)? {
        b"00" => ("400 Bad Request", "this is not HTTP/1.1"),
        b"14" => ("414 URI Too Long", "the path is too long"),
        b"31" => (
            "431 Request Header Fields Too Large",
            "the headers are too long",
        ),
        _ => return None,
    };
    let body = ApiError::invalid(None, message).to_json().to_string();
    let length = body.len();
    Some(
        format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
             connection: close\r\n\r\n{body}"
        )
        .into_bytes(),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_reads_nothing_is_given_up_and_a_slow_one_is_not() {
        let (ours, mut theirs) = tokio::io::duplex(4);
        let mut guarded = Guarded::new(ours, Duration::from_secs(5));
        let slow = tokio::spawn(async move {
            let mut four = [0; 4];
            for _ in 0..3 {
                sleep(Duration::from_secs(4)).await;
                theirs.read_exact(&mut four).await.unwrap();
            }
            theirs
        });
        guarded.write_all(&[7; 16]).await.unwrap();
        let _still_there = slow.await.unwrap();
        let error = guarded.write_all(&[7; 16]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_refusal_without_a_body_gets_one_and_all_else_passes_as_it_is() {
        for (sent, expected) in [
            (
                "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n",
                "\"type\":\"invalid_request_error\"",
            ),
            (
                "HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}",
                "length: 2\r\n\r\n{}",
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
                "200 OK\r\ncontent-length: 0\r\n\r\n",
            ),
        ] {
            let (ours, mut theirs) = tokio::io::duplex(7);
            let mut guarded = Guarded::new(ours, Duration::from_secs(5));
            let writing = tokio::spawn(async move {
                guarded.write_all(sent.as_bytes()).await.unwrap();
            });
            let mut got = String::new();
            theirs.read_to_string(&mut got).await.unwrap();
            writing.await.unwrap();
            assert!(got.contains(expected), "{got}");
        }
    }
}
