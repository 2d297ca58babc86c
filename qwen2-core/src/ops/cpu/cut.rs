//! How a product is cut into tasks: parts of equal length, or ever shorter ones of a stream of weights.

use std::ops::Range;

/// Least bytes of a part: below, the start of its stream counts.
const LEAST: usize = 24 << 10;

/// Lines of a matrix (panels or rows) in tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// So many lines in each task.
    Even { len: usize, per_task: usize },
    /// Each thread is to read half of its share first, then a quarter, and so on, the last two parts of equal length:
    /// few streams begin, and at the end nobody waits long for a thread that was held up.
    Halving {
        len: usize,
        /// Lines that are read side by side in long parts, a power of two.
        unit: usize,
        threads: usize,
        halvings: u32,
    },
}

impl Cut {
    /// `len` lines of `bytes` each, `unit` of them, a power of two, read side by side; in the last parts
    /// fewer, but no fewer than `least`.
    pub(super) fn halving(
        len: usize,
        bytes: usize,
        (least, unit): (usize, usize),
        threads: usize,
    ) -> Self {
        let threads = threads.clamp(1, (len / least).max(1));
        let share = len / threads;
        // Of the shortest part.
        let parts = (share * bytes / LEAST).min(share / least);
        Self::Halving {
            len,
            unit,
            threads,
            halvings: parts.max(1).ilog2(),
        }
    }

    pub(super) fn tasks(self) -> usize {
        match self {
            Self::Even { len, per_task } => len.div_ceil(per_task),
            Self::Halving {
                threads, halvings, ..
            } => threads * (halvings as usize + 1),
        }
    }

    /// The lines of a task.
    pub(super) fn lines(self, task: usize) -> Range<usize> {
        self.start(task)..self.start(task + 1)
    }

    fn start(self, task: usize) -> usize {
        match self {
            Self::Even { len, per_task } => len.min(task * per_task),
            Self::Halving {
                len,
                unit,
                threads,
                halvings,
            } => {
                let (round, before) = (task / threads, task % threads);
                // In shortest parts: what a thread has to read, and its parts of this round and the ones before.
                let all = 1 << halvings;
                let left = all >> round.min(halvings as usize);
                let part = match round {
                    _ if task >= self.tasks() => return len,
                    _ if round == halvings as usize => left,
                    _ => left / 2,
                };
                let parts = threads * (all - left) + before * part;
                // A part of fewer lines than are read side by side begins at any power of two that it has.
                let lines = (len * part / (threads * all)).clamp(1, unit);
                let unit = 1 << lines.ilog2();
                len * parts / (threads * all) / unit * unit
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn shares_are_halved_down_to_the_least() {
        let cut = Cut::halving(96, 8 << 10, (1, 4), 2);
        let starts: Vec<_> = (0..=cut.tasks()).map(|task| cut.start(task)).collect();
        assert_eq!(starts, [0, 24, 48, 60, 72, 76, 84, 86, 90, 92, 96]);
        let cut = Cut::halving(96, 8 << 10, (8, 8), 2);
        let starts: Vec<_> = (0..=cut.tasks()).map(|task| cut.start(task)).collect();
        assert_eq!(starts, [0, 24, 48, 56, 72, 80, 96]);
    }

    proptest! {
        #[test]
        fn every_line_is_in_one_task(
            len in 1usize..3000, bytes in 1usize..50_000, threads in 1usize..20,
            (least, unit) in prop_oneof![Just((1, 4)), Just((8, 8)), Just((1, 1))],
        ) {
            let halving = Cut::halving(len, bytes, (least, unit), threads);
            for cut in [halving, Cut::Even { len, per_task: unit }] {
                let mut end = 0;
                for task in 0..cut.tasks() {
                    let lines = cut.lines(task);
                    prop_assert!(lines.start == end && lines.end > end, "{cut:?} {task}: {lines:?}");
                    prop_assert_eq!(lines.start % least, 0);
                    // What is read side by side begins where a panel of such does.
                    prop_assert!(lines.len() < 2 * unit || lines.start % unit == 0, "{cut:?} {lines:?}");
                    end = lines.end;
                }
                prop_assert_eq!(end, len);
            }
        }
    }
}
