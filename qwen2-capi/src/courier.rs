//! The thread that tells callbacks of their requests, one for each engine that has such.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::{c_char, c_void};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::JoinHandle;

use qwen2_core::{ErrorKind, Generation, Piece, RequestStream, fenced};

use crate::error::{QWEN2_DONE, QWEN2_OK, qwen2_error, qwen2_status};
use crate::fence::{self, Outcome};
use crate::request::{Called, qwen2_request};
use crate::values::Terminated;

thread_local! {
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is inside a callback of a request: waiting for another one might be for ever.
pub(crate) fn in_callback() -> bool {
    IN_CALLBACK.get()
}

/// A function of the caller's, with what it is called with.
#[derive(Clone, Copy)]
pub(crate) struct Callback {
    call: Call,
    request: *mut qwen2_request,
    user_data: *mut c_void,
}

type Call = unsafe extern "C" fn(
    *mut qwen2_request,
    qwen2_status,
    *const c_char,
    usize,
    *mut c_void,
) -> i32;

// SAFETY: the header says on which thread it is called; the pointers are only handed back.
unsafe impl Send for Callback {}

impl Callback {
    pub(crate) fn new(call: Call, request: *mut qwen2_request, user_data: *mut c_void) -> Self {
        Self {
            call,
            request,
            user_data,
        }
    }

    /// Whether it wants to hear more.
    fn run(&self, status: qwen2_status, text: &Terminated) -> bool {
        IN_CALLBACK.set(true);
        let mut len = 0;
        // SAFETY: the caller gave a function of this signature, and `user_data` for it; text and length
        // are ours, and live during the call.
        let answer = unsafe {
            let text = text.show(&raw mut len);
            (self.call)(self.request, status, text, len, self.user_data)
        };
        IN_CALLBACK.set(false);
        answer == 0
    }
}

/// The thread, started with the first callback; dropping it waits for the ends of all requests.
#[derive(Default)]
pub(crate) struct Courier {
    desk: Arc<Desk>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Desk {
    letters: Mutex<Letters>,
    rung: Condvar,
}

/// What the thread does not know yet.
#[derive(Default)]
struct Letters {
    new: Vec<(u64, Delivery)>,
    /// Deliveries with something to tell.
    ready: VecDeque<u64>,
    n_sent: u64,
    stop: bool,
    /// Nobody reads them any more.
    over: bool,
}

/// One request, on its way to one callback.
struct Delivery {
    stream: Option<RequestStream>,
    called: Arc<Called>,
    callback: Callback,
    waker: Waker,
    /// The callback wants no more pieces.
    muted: bool,
    /// The host has no handle, so this is the one to free it.
    owns_handle: bool,
}

struct Bell {
    desk: Arc<Desk>,
    id: u64,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.desk.ring(self.id);
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Letters> {
        // A panic inside the few lines that hold it leaves nothing half-done.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self, id: u64) {
        self.lock().ready.push_back(id);
        self.rung.notify_one();
    }

    /// The next delivery with something to tell; `None` when all have ended and no more come.
    fn next(&self, deliveries: &mut BTreeMap<u64, Delivery>) -> Option<u64> {
        let mut letters = self.lock();
        loop {
            deliveries.extend(letters.new.drain(..));
            if let Some(id) = letters.ready.pop_front() {
                return Some(id);
            }
            if letters.stop && deliveries.is_empty() {
                return None;
            }
            let rung = self.rung.wait(letters);
            letters = rung.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self) {
        let mut deliveries = BTreeMap::new();
        while let Some(id) = self.next(&mut deliveries) {
            // It may have ended since its bell rang.
            let Some(delivery) = deliveries.get_mut(&id) else {
                continue;
            };
            match delivery.step() {
                Step::Told => self.ring(id),
                Step::Nothing => {}
                Step::Ended => drop(deliveries.remove(&id)),
            }
        }
    }
}

impl Courier {
    /// Starts the thread unless it runs.
    ///
    /// # Errors
    /// `OutOfMemory` where the system gives no thread.
    pub(crate) fn start(&self) -> Outcome<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_some() {
            return Ok(());
        }
        let desk = self.desk.clone();
        let body = move || {
            // A bug ends these requests with an error, as their deliveries go, and not the host.
            if let Err(why) = fenced(|| desk.run()) {
                tracing::error!(why, "callbacks stopped");
            }
            let mut letters = desk.lock();
            letters.over = true;
            let unread = std::mem::take(&mut letters.new);
            drop(letters); // before the requests end, which may ring
            drop(unread);
        };
        let builder = std::thread::Builder::new().name("qwen2-callbacks".to_owned());
        *thread = Some(builder.spawn(body).map_err(|error| {
            qwen2_error::new(
                ErrorKind::OutOfMemory,
                "callback",
                "cannot start the thread of the callbacks",
                Some(error.to_string()),
                "use qwen2_engine_submit, which needs none",
            )
        })?);
        Ok(())
    }

    pub(crate) fn send(
        &self,
        stream: RequestStream,
        called: Arc<Called>,
        callback: Callback,
        owns_handle: bool,
    ) {
        let mut letters = self.desk.lock();
        let id = letters.n_sent;
        letters.n_sent += 1;
        let desk = self.desk.clone();
        let delivery = Delivery {
            stream: Some(stream),
            called,
            callback,
            waker: Waker::from(Arc::new(Bell { desk, id })),
            muted: false,
            owns_handle,
        };
        if letters.over {
            drop(letters);
            return drop(delivery); // which ends the request
        }
        letters.new.push((id, delivery));
        letters.ready.push_back(id);
        drop(letters);
        self.desk.rung.notify_one();
    }
}

impl Drop for Courier {
    fn drop(&mut self) {
        self.desk.lock().stop = true;
        self.desk.rung.notify_one();
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take()
            && !in_callback()
        {
            // It cannot have panicked: it is fenced.
            let _ = thread.join();
        }
    }
}

/// What a look at a delivery led to.
enum Step {
    /// One piece was told; there may be more.
    Told,
    /// The bell rings when there is something.
    Nothing,
    Ended,
}

impl Delivery {
    fn step(&mut self) -> Step {
        let Some(stream) = &mut self.stream else {
            return Step::Ended;
        };
        match stream.poll_next(&mut Context::from_waker(&self.waker)) {
            Poll::Pending => Step::Nothing,
            Poll::Ready(Some(Ok(piece))) => self.tell(piece),
            Poll::Ready(Some(Err(error))) => self.end(Some(error)),
            Poll::Ready(None) => self.end(None),
        }
    }

    fn tell(&mut self, piece: Piece) -> Step {
        if self.muted {
            return Step::Told;
        }
        if !self.called.begin(Some(&piece)) {
            return Step::Ended;
        }
        let goes_on = self.callback.run(QWEN2_OK, &Terminated::from(piece.text));
        if !self.called.returned() {
            return Step::Ended;
        }
        if let Some(stream) = &self.stream
            && !goes_on
        {
            stream.cancel_token().cancel();
            self.muted = true;
        }
        Step::Told
    }

    fn end(&mut self, error: Option<qwen2_core::Error>) -> Step {
        let result: Outcome<Generation> = match (error, self.stream.take()) {
            (Some(error), _) => Err(error.into()),
            (None, Some(stream)) => stream.finish().map_err(Into::into),
            (None, None) => return Step::Ended,
        };
        let status = match &result {
            Ok(_) => QWEN2_DONE,
            Err(error) => error.code(),
        };
        self.called.end(result);
        if self.called.begin(None) {
            self.callback.run(status, &Terminated::default());
            if self.called.returned() && self.owns_handle {
                fence::free(self.callback.request);
            }
        }
        Step::Ended
    }
}

/// A delivery that goes away without an end would leave who waits for it waiting for ever.
impl Drop for Delivery {
    fn drop(&mut self) {
        if self.called.is_running() {
            let why = "the thread of the callbacks stopped";
            self.called.end(Err(Box::new(qwen2_error::internal(why))));
        }
    }
}
