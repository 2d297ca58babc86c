//! The thread that computes, and what other threads share with it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use super::outlet::{Outlet, RequestStream, outlet};
use super::queue::Queue;
use super::scheduler::Scheduler;
use super::{EngineStats, Settings, WhenFull};
use crate::error::{Error, ErrorKind, Result};
use crate::fence::fenced;
use crate::generate::{Network, Sequence};
use crate::model::cache::Cache;

/// How long a thread sleeps before it looks whether a time-out has passed: the engine's while all sequences
/// wait for their readers, a submitting one while the queue is full.
const NAP: Duration = Duration::from_millis(50);

/// A request, checked and in tokens.
pub(crate) struct Job {
    pub(crate) network: Arc<Network>,
    pub(crate) sequence: Sequence,
    /// Empty.
    pub(crate) cache: Cache,
    pub(crate) priority: i8,
    /// Where it differs from the settings.
    pub(crate) when_full: Option<WhenFull>,
}

/// A job with the way to its reader.
pub(super) struct Waiting {
    pub(super) job: Job,
    pub(super) outlet: Outlet,
}

/// What the threads share.
#[derive(Default)]
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    /// There is something to do.
    work: Condvar,
}

#[derive(Default)]
pub(super) struct Inbox {
    pub(super) queue: Queue<Waiting>,
    pub(super) stats: EngineStats,
    /// Requests that ended while they waited, and are not counted yet.
    pub(super) n_withdrawn: u64,
    /// Those that wait for room in the queue.
    room: Vec<Waker>,
    /// Something happened since the thread looked.
    woken: bool,
    /// The thread is to end, or has.
    stop: bool,
    /// Its owner asked for that.
    closed: bool,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Inbox> {
        // A panic inside the few lines that hold it leaves nothing half-done.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell_room(&self) {
        let room = std::mem::take(&mut self.lock().room);
        room.into_iter().for_each(Waker::wake);
    }

    /// Waits until there is something to do, or for a nap; whether to go on.
    pub(super) fn wait(&self, nap: bool) -> bool {
        let mut inbox = self.lock();
        if nap {
            let slept = self
                .work
                .wait_timeout_while(inbox, NAP, |inbox| inbox.rests());
            inbox = slept.unwrap_or_else(PoisonError::into_inner).0;
        } else {
            let slept = self.work.wait_while(inbox, |inbox| inbox.rests());
            inbox = slept.unwrap_or_else(PoisonError::into_inner);
        }
        inbox.woken = false;
        !inbox.stop
    }

    pub(super) fn stops(&self) -> bool {
        self.lock().stops()
    }

    /// Has the thread end, and says why.
    pub(super) fn close(&self) {
        {
            let mut inbox = self.lock();
            (inbox.stop, inbox.closed) = (true, true);
        }
        self.work.notify_one();
        self.tell_room();
    }

    /// Why a request has no end.
    pub(super) fn gone(&self) -> Error {
        if self.lock().closed {
            Error::new(
                ErrorKind::Cancelled,
                "engine was closed before the request ended",
            )
            .with_help("submit it again to another engine")
        } else {
            Error::new(ErrorKind::Internal, "engine stopped before the request")
                .with_help("submit it again to another engine")
        }
    }
}

impl Inbox {
    pub(super) fn stops(&self) -> bool {
        self.stop
    }

    fn rests(&self) -> bool {
        !self.woken && !self.stop
    }

    /// Why it takes no request.
    fn refusal(&self) -> Error {
        let (kind, what) = match self.closed {
            true => (ErrorKind::Cancelled, "engine was closed"),
            false => (ErrorKind::Internal, "engine has stopped"),
        };
        Error::new(kind, what).with_help("build another one")
    }
}

/// Tells the thread that something changed.
#[derive(Clone)]
pub(super) struct Wake(Arc<Shared>);

impl Wake {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    pub(super) fn wake(&self) {
        self.0.lock().woken = true;
        self.0.work.notify_one();
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.0
    }
}

/// The thread of one engine; dropping it ends what still runs.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    settings: Settings,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A thread that sleeps until there is room.
struct Sleeper(Thread);

impl std::task::Wake for Sleeper {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Worker {
    /// # Errors
    /// `OutOfMemory` where the system gives no thread.
    pub(crate) fn start(settings: Settings) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        shared.lock().stats.cache_limit = settings.cache_bytes;
        let own = shared.clone();
        let body = move || {
            let mut scheduler = Scheduler::new(settings, own.clone());
            // A bug ends this engine's requests with an error, as their outlets go, and not the host.
            if let Err(why) = fenced(|| scheduler.run()) {
                tracing::error!(why, "engine stopped");
            }
            own.lock().stop = true;
            drop(scheduler);
            // Those that never began as well: their readers keep the queue alive.
            let left = own.lock().queue.take(|_| true);
            drop(left);
            own.tell_room();
        };
        let builder = std::thread::Builder::new().name("qwen2-engine".to_owned());
        let thread = builder.spawn(body).map_err(|error| {
            Error::new(ErrorKind::OutOfMemory, "cannot start the engine's thread")
                .with_why(error.to_string())
                .with_source(error)
        })?;
        Ok(Self {
            shared,
            settings,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Puts a job into the queue.
    ///
    /// # Errors
    /// `Unsupported` in a fork of the process that started the engine, `OutOfMemory` where the queue is
    /// full, `Cancelled` where the engine was closed, `Internal` where it has stopped by itself.
    pub(crate) fn submit(&self, job: Job) -> Result<RequestStream> {
        let waker = Waker::from(Arc::new(Sleeper(std::thread::current())));
        let mut job = Some(job);
        loop {
            match self.poll_submit(&mut job, &mut Context::from_waker(&waker)) {
                Poll::Ready(submitted) => return submitted,
                Poll::Pending => std::thread::park_timeout(NAP),
            }
        }
    }

    /// As [`Worker::submit`], for futures; takes the job once it is ready. One that is cancelled while it
    /// waits for room no longer does: it ends as cancelled.
    pub(crate) fn poll_submit(
        &self,
        job: &mut Option<Job>,
        context: &mut Context<'_>,
    ) -> Poll<Result<RequestStream>> {
        let Some(waiting) = job.as_ref() else {
            return Poll::Ready(Err(self.shared.lock().refusal()));
        };
        waiting.network.check()?;
        let mut inbox = self.shared.lock();
        if inbox.stop {
            return Poll::Ready(Err(inbox.refusal()));
        }
        let full = inbox.queue.len() >= self.settings.queue_limit;
        if full && waiting.sequence.interruption().is_none() {
            if waiting.when_full.unwrap_or(self.settings.when_full) == WhenFull::Refuse {
                return Poll::Ready(Err(self.full()));
            }
            let waker = context.waker();
            if !inbox.room.iter().any(|other| other.will_wake(waker)) {
                inbox.room.push(waker.clone());
            }
            return Poll::Pending;
        }
        let Some(job) = job.take() else {
            return Poll::Ready(Err(inbox.refusal()));
        };
        let (outlet, stream) = outlet(job.sequence.cancel_token(), Wake::new(self.shared.clone()));
        inbox.stats.submitted += 1;
        inbox.woken = true;
        let place = inbox.queue.place(job.priority);
        inbox.queue.push(place, Waiting { job, outlet });
        drop(inbox);
        self.shared.work.notify_one();
        Poll::Ready(Ok(stream))
    }

    /// Ends what runs and what waits, with an error, and the thread.
    pub(crate) fn stop(&self) {
        self.shared.close();
        let thread = self.thread.lock();
        let thread = thread.unwrap_or_else(PoisonError::into_inner).take();
        // A processor, which runs on it, may let go of the engine: a thread cannot wait for itself.
        let own = |thread: &JoinHandle<()>| thread.thread().id() == std::thread::current().id();
        if let Some(thread) = thread.filter(|thread| !own(thread)) {
            // It cannot have panicked: it is fenced.
            let _ = thread.join();
        }
    }

    pub(crate) fn stats(&self) -> EngineStats {
        let inbox = self.shared.lock();
        EngineStats {
            waiting: inbox.queue.len() + inbox.stats.waiting,
            finished: inbox.stats.finished + inbox.n_withdrawn,
            ..inbox.stats
        }
    }

    fn full(&self) -> Error {
        Error::new(ErrorKind::OutOfMemory, "queue is full")
            .with_key("queue_limit")
            .with_why(format!("{} requests wait", self.settings.queue_limit))
            .with_help("try again later, or build the engine with when_full = wait")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}
