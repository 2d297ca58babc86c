//! The way from the engine's thread to the reader of a request: pieces, then the result.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use super::worker::Wake;
use crate::error::Result;
use crate::generate::{CancelToken, Generation, Piece};

/// Pieces that wait for a reader before its sequence pauses.
const ROOM: usize = 256;

/// What the two ends share.
#[derive(Default)]
struct Channel {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    pieces: VecDeque<Piece>,
    /// Set once, behind the last piece.
    end: Option<Result<Generation>>,
    ended: bool,
    /// The reader is gone.
    dropped: bool,
    /// Since when the reader has left everything unread that there is room for.
    full_since: Option<Instant>,
    waker: Option<Waker>,
}

impl Channel {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside the few lines that hold it leaves nothing half-done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, mut state: MutexGuard<'_, State>) {
        let waker = state.waker.take();
        drop(state);
        self.arrived.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The engine's end.
pub(super) struct Outlet {
    channel: Arc<Channel>,
    wake: Wake,
}

/// The two ends of a new request. `wake` tells the engine that there is room again.
pub(super) fn outlet(cancel: CancelToken, wake: Wake) -> (Outlet, RequestStream) {
    let channel = Arc::<Channel>::default();
    let stream = RequestStream {
        channel: channel.clone(),
        cancel,
        wake: wake.clone(),
    };
    (Outlet { channel, wake }, stream)
}

impl Outlet {
    /// Behind the end nothing comes.
    pub(super) fn push(&self, piece: Piece) {
        let mut state = self.channel.lock();
        if state.ended {
            return;
        }
        state.pieces.push_back(piece);
        if state.pieces.len() >= ROOM {
            state.full_since.get_or_insert_with(Instant::now);
        }
        self.channel.tell(state);
    }

    /// Whether the reader keeps up.
    pub(super) fn has_room(&self) -> bool {
        self.channel.lock().pieces.len() < ROOM
    }

    /// Since when it does not.
    pub(super) fn full_since(&self) -> Option<Instant> {
        self.channel.lock().full_since
    }

    pub(super) fn is_dropped(&self) -> bool {
        self.channel.lock().dropped
    }

    /// The first one is the end.
    pub(super) fn end(&self, result: Result<Generation>) {
        let mut state = self.channel.lock();
        if !state.ended {
            state.ended = true;
            state.end = Some(result);
        }
        self.channel.tell(state);
    }
}

/// An outlet that goes away without an end would leave its reader waiting for ever.
impl Drop for Outlet {
    fn drop(&mut self) {
        let is_open = !self.channel.lock().ended;
        if is_open {
            self.end(Err(self.wake.shared().gone()));
        }
    }
}

/// The answer to a request as it comes: a blocking iterator of [`Piece`]s, or asynchronous by
/// [`RequestStream::poll_next`] and [`RequestStream::next_piece`], with any executor.
///
/// Dropping it cancels the request. A reader that leaves 256 pieces unread pauses its own request,
/// never the others; after [`EngineBuilder::reader_patience`](crate::EngineBuilder::reader_patience) of that
/// the request ends as cancelled.
pub struct RequestStream {
    channel: Arc<Channel>,
    cancel: CancelToken,
    wake: Wake,
}

impl RequestStream {
    /// Stops the request from any thread; it then ends with `FinishReason::Cancelled`.
    pub fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// The next piece, as futures want it; `Ready(None)` at the end.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Piece>>> {
        let mut state = self.channel.lock();
        let taken = state.take();
        if taken.is_none() {
            state.waker = Some(context.waker().clone());
        }
        self.passed_on(state, taken)
    }

    /// The next piece; `None` at the end.
    pub async fn next_piece(&mut self) -> Option<Result<Piece>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// The next piece if it is there already; `Pending` otherwise, without a wake-up.
    pub fn try_next(&mut self) -> Poll<Option<Result<Piece>>> {
        let mut state = self.channel.lock();
        let taken = state.take();
        self.passed_on(state, taken)
    }

    /// Tells the engine where a sequence that paused may go on.
    fn passed_on(
        &self,
        mut state: MutexGuard<'_, State>,
        taken: Option<Option<Result<Piece>>>,
    ) -> Poll<Option<Result<Piece>>> {
        let Some(next) = taken else {
            return Poll::Pending;
        };
        let paused = state.full_since.take().is_some();
        drop(state);
        if paused {
            self.wake.wake();
        }
        Poll::Ready(next)
    }

    /// Waits for the end and returns the whole result.
    ///
    /// # Errors
    /// The error that ended the request.
    pub fn finish(mut self) -> Result<Generation> {
        for piece in self.by_ref() {
            piece?;
        }
        self.result()
    }

    /// As [`Self::finish`], for futures.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub async fn finish_async(mut self) -> Result<Generation> {
        while let Some(piece) = self.next_piece().await {
            piece?;
        }
        self.result()
    }

    fn result(&mut self) -> Result<Generation> {
        let end = self.channel.lock().end.take();
        end.unwrap_or_else(|| Err(self.wake.shared().gone()))
    }
}

impl State {
    /// What there is to read: `Some(None)` is the end, `None` nothing yet. An error is the last item.
    fn take(&mut self) -> Option<Option<Result<Piece>>> {
        if let Some(piece) = self.pieces.pop_front() {
            return Some(Some(Ok(piece)));
        }
        match self.end.take() {
            _ if !self.ended => None,
            Some(Err(error)) => Some(Some(Err(error))),
            end => {
                self.end = end;
                Some(None)
            }
        }
    }
}

impl Iterator for RequestStream {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut state = self.channel.lock();
        loop {
            let taken = state.take();
            if taken.is_some() {
                return match self.passed_on(state, taken) {
                    Poll::Ready(next) => next,
                    Poll::Pending => None,
                };
            }
            let arrived = &self.channel.arrived;
            state = arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        self.channel.lock().dropped = true;
        self.cancel.cancel();
        self.wake.wake();
    }
}

impl std::fmt::Debug for RequestStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.channel.lock();
        f.debug_struct("RequestStream")
            .field("unread", &state.pieces.len())
            .field("ended", &state.ended)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::worker::Shared;
    use super::*;
    use crate::error::ErrorKind;

    /// What a reader is told when its request goes away with the engine's thread.
    fn told(closed: bool) -> Option<Result<Piece>> {
        let shared = Arc::<Shared>::default();
        let (outlet, mut stream) = outlet(CancelToken::new(), Wake::new(shared.clone()));
        if closed {
            shared.close();
        }
        drop(outlet);
        let told = stream.next();
        assert!(stream.next().is_none());
        told
    }

    #[test]
    fn an_engine_that_was_closed_cancels_and_one_that_stopped_by_itself_has_a_bug() {
        for (closed, kind) in [(true, ErrorKind::Cancelled), (false, ErrorKind::Internal)] {
            let error = told(closed).expect("an event").expect_err("an error");
            assert_eq!(error.kind(), kind);
            assert!(error.help().is_some());
        }
    }
}
