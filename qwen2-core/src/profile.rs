//! Where the time of a forward goes, part by part, for `qwen2 bench --profile`.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

static ON: AtomicBool = AtomicBool::new(false);

thread_local! {
    static PARTS: RefCell<Vec<Part>> = const { RefCell::new(Vec::new()) };
}

/// One part of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// What it does.
    pub name: &'static str,
    /// Time in all.
    pub time: Duration,
    /// How often it ran.
    pub calls: u64,
}

/// Times every part of the forwards from now on, in the whole process, or stops.
pub fn set(on: bool) {
    ON.store(on, Ordering::Relaxed);
}

/// The parts that ran on this thread since the last call, in the order of their first run.
pub fn take() -> Vec<Part> {
    PARTS.take()
}

/// Runs `body` and adds its time to `name`'s. A device that computes later is not waited for.
pub(crate) fn part<R>(name: &'static str, body: impl FnOnce() -> R) -> R {
    if !ON.load(Ordering::Relaxed) {
        return body();
    }
    let start = Instant::now();
    let result = body();
    let time = start.elapsed();
    PARTS.with_borrow_mut(
        |parts| match parts.iter_mut().find(|part| part.name == name) {
            Some(part) => {
                part.time += time;
                part.calls += 1;
            }
            None => parts.push(Part {
                name,
                time,
                calls: 1,
            }),
        },
    );
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_while_it_is_on() {
        part("before", || ());
        set(true);
        for _ in 0..3 {
            assert_eq!(part("a", || part("b", || 7)), 7);
        }
        set(false);
        let parts = take();
        let names: Vec<_> = parts.iter().map(|part| (part.name, part.calls)).collect();
        assert_eq!(names, [("b", 3), ("a", 3)]);
        assert!(parts[1].time >= parts[0].time);
        assert_eq!(take(), []);
    }
}
