//! The threads of one model: handed work within microseconds, parked when there is none.

use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

use super::simd::prefetch;
use crate::fence::silence_thread;
use crate::ops::watch;

/// How often a worker looks for work before it parks; some tens of microseconds, which is longer
/// than the gap between two operations of a token and shorter than anybody would notice.
const SPINS: u32 = 4_000;
/// Most bytes of one stream that a thread asks for ahead of a job: they are to stay in its
/// second-level cache.
const AHEAD: usize = 128 << 10;
/// Bytes that an idle thread asks for between two looks for work.
const STEP: usize = 512;
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
    job: Mutex<Option<CurrentJob>>,
    /// The next task that is no thread's first.
    next: AtomicUsize,
    /// Per thread, the caller's first.
    threads: Vec<PerThread>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

#[derive(Default)]
struct PerThread {
    parked: AtomicBool,
    /// The last job whose task of this thread's number somebody took.
    claimed: AtomicU64,
    /// What this thread will read in the next job, as addresses and lengths.
    ahead: [(AtomicUsize, AtomicUsize); 2],
}

#[derive(Clone, Copy)]
struct CurrentJob {
    task: Job,
    n_tasks: usize,
    number: u64,
}

// SAFETY: the pointee is Sync and outlives the job, because `Pool::run` does not return before
// every worker that joined has left it.
unsafe impl Send for CurrentJob {}

/// Which streams followed which: decode reads the same for every token.
#[derive(Default)]
struct Trail {
    /// By the address of a job's first stream: those of each thread's first task in the job after.
    next: HashMap<usize, Vec<Streams>>,
    last: usize,
}

/// A fixed set of threads that run the tasks of one job at a time.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(Thread, Option<JoinHandle<()>>)>,
    /// One job at a time: sessions of one model take turns rather than oversubscribe the cores.
    door: Mutex<Trail>,
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
            threads: (0..=n_workers).map(|_| PerThread::default()).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self {
            shared,
            workers: Vec::with_capacity(n_workers),
            door: Mutex::default(),
            process: std::process::id(),
            bf16_products: false,
        };
        for index in 0..n_workers {
            let shared = Arc::clone(&pool.shared);
            let handle = thread::Builder::new()
                .name(format!("qwen2-{index}"))
                .spawn(move || work(&shared, index + 1))?;
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
        self.run_streams(n_tasks, None, task);
    }

    /// As [`Self::run`] for tasks that read much memory, which `streams` tells: a thread that waits
    /// for the job after this one asks for what its first task there reads, if the same jobs
    /// followed each other before.
    pub(crate) fn run_streams(
        &self,
        n_tasks: usize,
        streams: Option<&dyn Fn(usize) -> Streams>,
        task: &(dyn Fn(usize) + Sync),
    ) {
        if n_tasks <= 1 || self.workers.is_empty() {
            return (0..n_tasks).for_each(task);
        }
        let mut trail = self.door.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        if let Some(streams) = streams {
            trail.follow(n_tasks, streams, &shared.threads);
        }
        // SAFETY: only the lifetime changes; `finish` below waits until every worker that joined
        // has left, before this frame, and with it `task`, ends.
        let pointer = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(task) };
        let job = CurrentJob {
            task: pointer,
            n_tasks,
            number: shared.epoch.load(Ordering::Relaxed) + 1,
        };
        *shared.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
        shared.next.store(shared.threads.len(), Ordering::Relaxed);
        shared.state.store(OPEN, Ordering::Release);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for ((worker, _), thread) in self.workers.iter().zip(&shared.threads[1..]) {
            if thread.parked.load(Ordering::SeqCst) {
                worker.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| take_tasks(shared, 0, job, task)));
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
        let mut ahead = Ahead::of(&self.shared.threads[0]);
        self.shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        while self.shared.state.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS {
                ahead.step();
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

/// Two stretches of memory by address and length: they are asked for, never read.
pub(crate) type Streams = [(usize, usize); 2];

/// Where two slices lie.
pub(crate) fn streams<T>(first: &[T], second: &[T]) -> Streams {
    [first, second].map(|slice| (slice.as_ptr().addr(), size_of_val(slice)))
}

impl Trail {
    /// Notes what a job reads, and tells the threads what the next one should.
    fn follow(
        &mut self,
        n_tasks: usize,
        streams: &dyn Fn(usize) -> Streams,
        threads: &[PerThread],
    ) {
        let firsts = (0..threads.len().min(n_tasks)).map(streams);
        let known = self.next.entry(self.last).or_default();
        if !firsts.clone().eq(known.iter().copied()) {
            known.clear();
            known.extend(firsts);
        }
        self.last = known[0][0].0;
        let next = self.next.get(&self.last).map_or(&[][..], Vec::as_slice);
        for (index, thread) in threads.iter().enumerate() {
            let streams = next.get(index).copied().unwrap_or_default();
            for (ahead, (start, bytes)) in thread.ahead.iter().zip(streams) {
                ahead.0.store(start, Ordering::Relaxed);
                ahead.1.store(bytes.min(AHEAD), Ordering::Relaxed);
            }
        }
    }
}

/// What a thread asks for while it has nothing to do.
struct Ahead([std::ops::Range<usize>; 2]);

impl Ahead {
    /// What the thread was told, once.
    fn of(thread: &PerThread) -> Self {
        Self(thread.ahead.each_ref().map(|(start, bytes)| {
            let start = start.load(Ordering::Relaxed);
            start..start + bytes.swap(0, Ordering::Relaxed)
        }))
    }

    /// A moment's work or rest.
    fn step(&mut self) {
        let Some(left) = self.0.iter_mut().find(|left| left.start < left.end) else {
            return std::hint::spin_loop();
        };
        let end = left.end.min(left.start + STEP);
        (left.start..end).step_by(64).for_each(prefetch);
        left.start = end;
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

/// Runs `n_tasks` on the pool of this thread, or one after the other where there is none. Tasks that were
/// not begun when the watch over this thread ends are left out.
pub(crate) fn parallel(n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    run_watched(n_tasks, None, task);
}

/// As [`parallel`], for tasks that read much memory; see [`Pool::run_streams`].
pub(crate) fn parallel_streams(
    n_tasks: usize,
    streams: &dyn Fn(usize) -> Streams,
    task: &(dyn Fn(usize) + Sync),
) {
    run_watched(n_tasks, Some(streams), task);
}

fn run_watched(
    n_tasks: usize,
    streams: Option<&dyn Fn(usize) -> Streams>,
    task: &(dyn Fn(usize) + Sync),
) {
    let watch = watch::current();
    let task = |index| {
        if !watch.is_over() {
            task(index);
        }
    };
    match CURRENT.with_borrow(Clone::clone) {
        Some(pool) => pool.run_streams(n_tasks, streams, &task),
        None => (0..n_tasks).for_each(task),
    }
}

/// Threads that `parallel` uses on this thread.
pub(crate) fn current_threads() -> usize {
    CURRENT.with_borrow(|pool| pool.as_ref().map_or(1, |pool| pool.threads()))
}

/// Whether the pool of this thread allows bf16 products, which only x86-64 has kernels for.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) fn takes_bf16_products() -> bool {
    CURRENT.with_borrow(|pool| pool.as_ref().is_some_and(|pool| pool.bf16_products))
}

/// Does tasks on thread `own` until none is left. Each thread begins with the task of its number,
/// whose weights it may have asked for; a thread that does not come loses it to the others.
fn take_tasks(shared: &Shared, own: usize, job: CurrentJob, task: &(dyn Fn(usize) + Sync)) {
    let claim = |index: usize| {
        index < job.n_tasks
            && shared.threads[index]
                .claimed
                .swap(job.number, Ordering::Relaxed)
                != job.number
    };
    if claim(own) {
        task(own);
    }
    loop {
        let index = shared.next.fetch_add(1, Ordering::Relaxed);
        if index >= job.n_tasks {
            break;
        }
        task(index);
    }
    for index in 0..shared.threads.len() {
        if claim(index) {
            task(index);
        }
    }
}

fn work(shared: &Shared, own: usize) {
    silence_thread(); // the caller of `run` reports
    let mut seen = 0;
    loop {
        seen = wait(shared, own, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        if !join(shared) {
            continue;
        }
        let job = *shared.job.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = job {
            // SAFETY: `Pool::run` keeps the closure alive until every worker that joined has left,
            // and this one has not left yet.
            let task = unsafe { &*job.task };
            let tasks = AssertUnwindSafe(|| take_tasks(shared, own, job, task));
            if catch_unwind(tasks).is_err() {
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

/// Returns the first epoch that is not `seen`: asks for the next job's weights, spins a while, then
/// parks.
fn wait(shared: &Shared, own: usize, seen: u64) -> u64 {
    let thread = &shared.threads[own];
    let mut ahead = Ahead::of(thread);
    for _ in 0..SPINS {
        let epoch = shared.epoch.load(Ordering::Acquire);
        if epoch != seen {
            return epoch;
        }
        ahead.step();
    }
    thread.parked.store(true, Ordering::SeqCst);
    loop {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            thread.parked.store(false, Ordering::SeqCst);
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
    fn tasks_that_were_not_begun_are_left_out_when_the_watch_ends() {
        for threads in [1, 3] {
            let pool = Arc::new(Pool::new(threads).expect("threads start"));
            let switch = Arc::new(AtomicBool::new(false));
            let watch = watch::Watch::of(Arc::clone(&switch));
            let count = AtomicUsize::new(0);
            let task = |_| {
                count.fetch_add(1, Ordering::Relaxed);
                switch.store(true, Ordering::Release);
            };
            let run = || with_pool(&pool, || parallel(1000, &task));
            watch::watched(&watch, run);
            // One for each thread at most: the first to end sets the switch.
            assert!((1..=threads).contains(&count.load(Ordering::Relaxed)));
            watch::watched(&watch, run);
            assert!(count.load(Ordering::Relaxed) <= threads);
            run();
            assert!(count.load(Ordering::Relaxed) >= 1000);
        }
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
