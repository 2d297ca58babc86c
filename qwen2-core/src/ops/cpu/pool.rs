//! The threads of one model: handed work within microseconds, parked when there is none.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

use crate::fence::silence_thread;

/// How often a worker looks for work before it parks; some tens of microseconds, which is longer
/// than the gap between two operations of a token and shorter than anybody would notice.
const SPINS: u32 = 4_000;
/// Set in `Shared::state` while workers may join the job; the bits below count those that did.
const OPEN: usize = 1 << (usize::BITS - 1);

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Bumped once per job; a worker that sees a new value tries to join.
    epoch: AtomicU64,
    /// `OPEN` and the number of workers in the job. A worker that comes too late, because the
    /// machine gave its core to somebody else, finds the job closed and is not waited for.
    state: AtomicUsize,
    /// Valid while a worker is in the job; written only by the thread that holds `Pool::door`.
    job: Mutex<Option<JobPointer>>,
    next: AtomicUsize,
    n_tasks: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    parked: Vec<AtomicBool>,
}

#[derive(Clone, Copy)]
struct JobPointer(Job);

// SAFETY: the pointee is Sync and outlives the job, because `Pool::run` does not return before
// every worker that joined has left it.
unsafe impl Send for JobPointer {}

/// A fixed set of threads that run the tasks of one job at a time.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(Thread, Option<JoinHandle<()>>)>,
    /// One job at a time: sessions of one model take turns rather than oversubscribe the cores.
    door: Mutex<()>,
    process: u32,
    /// Whether products of many tokens with bf16 weights may round the activations to bf16.
    pub(crate) bf16_products: bool,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("threads", &self.threads())
            .finish()
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Pool>>> = const { RefCell::new(None) };
}

impl Pool {
    /// A pool of `threads` in all, the caller's own included.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let n_workers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            state: AtomicUsize::new(0),
            job: Mutex::new(None),
            next: AtomicUsize::new(0),
            n_tasks: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            parked: (0..n_workers).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut pool = Self {
            shared,
            workers: Vec::with_capacity(n_workers),
            door: Mutex::new(()),
            process: std::process::id(),
            bf16_products: false,
        };
        for index in 0..n_workers {
            let shared = Arc::clone(&pool.shared);
            let handle = thread::Builder::new()
                .name(format!("qwen2-{index}"))
                .spawn(move || work(&shared, index))?;
            pool.workers.push((handle.thread().clone(), Some(handle)));
        }
        Ok(pool)
    }

    /// Threads in all, the caller's own included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Whether this process is a fork of the one that made the pool: its threads are not here.
    pub(crate) fn is_foreign(&self) -> bool {
        self.process != std::process::id()
    }

    /// Calls `task(i)` for every `i` below `n_tasks`, on all threads, and returns when all are done.
    pub(crate) fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if n_tasks <= 1 || self.workers.is_empty() {
            return (0..n_tasks).for_each(task);
        }
        let _turn = self.door.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `finish` below waits until every worker that joined
        // has left, before this frame, and with it `task`, ends.
        let job = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(task) };
        *shared.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(JobPointer(job));
        shared.next.store(0, Ordering::Relaxed);
        shared.n_tasks.store(n_tasks, Ordering::Relaxed);
        shared.state.store(OPEN, Ordering::Release);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (index, (worker, _)) in self.workers.iter().enumerate() {
            if shared.parked[index].load(Ordering::SeqCst) {
                worker.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| take_tasks(shared, task)));
        self.finish();
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(
            !shared.panicked.swap(false, Ordering::Relaxed),
            "a kernel panicked on a worker thread"
        );
    }

    /// Closes the job and waits until no worker is in it.
    fn finish(&self) {
        let mut spins = 0u32;
        self.shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        while self.shared.state.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                // A worker lost its core to somebody else: give it ours.
                thread::yield_now();
            }
        }
        *self
            .shared
            .job
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.is_foreign() {
            return; // the threads belong to the parent process
        }
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (worker, handle) in &mut self.workers {
            worker.unpark();
            if let Some(handle) = handle.take() {
                // A worker catches its panics, so this cannot fail; a drop must not panic anyway.
                let _ = handle.join();
            }
        }
    }
}

/// Runs `body` with `pool` as the pool of this thread's operations.
pub(crate) fn with_pool<R>(pool: &Arc<Pool>, body: impl FnOnce() -> R) -> R {
    struct Restore(Option<Arc<Pool>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0.take());
        }
    }
    let _restore = Restore(CURRENT.replace(Some(Arc::clone(pool))));
    body()
}

/// Runs `n_tasks` on the pool of this thread, or one after the other where there is none.
pub(crate) fn parallel(n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    let pool = CURRENT.with_borrow(Clone::clone);
    match pool {
        Some(pool) => pool.run(n_tasks, task),
        None => (0..n_tasks).for_each(task),
    }
}

/// Threads that `parallel` uses on this thread.
pub(crate) fn current_threads() -> usize {
    CURRENT.with_borrow(|pool| pool.as_ref().map_or(1, |pool| pool.threads()))
}

/// Into how many tasks a job is cut that streams `bytes` of weights: a few for each thread, so that
/// one that is held up takes fewer, but each long enough that the start of its stream does not count.
pub(crate) fn stream_tasks(bytes: usize) -> usize {
    const LEAST: usize = 128 << 10;
    let threads = current_threads();
    (bytes / LEAST).clamp(threads, 4 * threads)
}

/// Whether the pool of this thread allows bf16 products.
pub(crate) fn takes_bf16_products() -> bool {
    CURRENT.with_borrow(|pool| pool.as_ref().is_some_and(|pool| pool.bf16_products))
}

fn take_tasks(shared: &Shared, task: &(dyn Fn(usize) + Sync)) {
    let n_tasks = shared.n_tasks.load(Ordering::Relaxed);
    loop {
        let index = shared.next.fetch_add(1, Ordering::Relaxed);
        if index >= n_tasks {
            return;
        }
        task(index);
    }
}

fn work(shared: &Shared, index: usize) {
    silence_thread(); // the caller of `run` reports
    let mut seen = 0;
    loop {
        seen = wait(shared, index, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        if !join(shared) {
            continue;
        }
        let job = *shared.job.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(JobPointer(job)) = job {
            // SAFETY: `Pool::run` keeps the closure alive until every worker that joined has left,
            // and this one has not left yet.
            let task = unsafe { &*job };
            if catch_unwind(AssertUnwindSafe(|| take_tasks(shared, task))).is_err() {
                shared.panicked.store(true, Ordering::Relaxed);
            }
        }
        shared.state.fetch_sub(1, Ordering::Release);
    }
}

/// Enters the job, if it still takes workers.
fn join(shared: &Shared) -> bool {
    let enter = |state: usize| (state & OPEN != 0).then_some(state + 1);
    shared
        .state
        .fetch_update(Ordering::AcqRel, Ordering::Acquire, enter)
        .is_ok()
}

/// Returns the first epoch that is not `seen`: spins a while, then parks.
fn wait(shared: &Shared, index: usize, seen: u64) -> u64 {
    for _ in 0..SPINS {
        let epoch = shared.epoch.load(Ordering::Acquire);
        if epoch != seen {
            return epoch;
        }
        std::hint::spin_loop();
    }
    shared.parked[index].store(true, Ordering::SeqCst);
    loop {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            shared.parked[index].store(false, Ordering::SeqCst);
            return epoch;
        }
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads).expect("threads start");
            for n_tasks in [0, 1, 2, 63] {
                let counts: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(n_tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts
                        .iter()
                        .all(|count| count.load(Ordering::Relaxed) == 1)
                );
            }
        }
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2).expect("threads start");
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(16, &|i| assert_ne!(i, 7))));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(16, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 16);
    }

    #[test]
    fn parked_workers_wake_up() {
        let pool = Pool::new(3).expect("threads start");
        for _ in 0..3 {
            thread::sleep(std::time::Duration::from_millis(30));
            let count = AtomicUsize::new(0);
            pool.run(30, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.load(Ordering::Relaxed), 30);
        }
    }
}
