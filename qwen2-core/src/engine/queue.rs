//! Requests that wait: by priority, but none for ever.

use std::collections::BTreeMap;

/// A step of priority goes before so many earlier arrivals.
const STEP: i64 = 32;

/// The place of a request among others; lower is earlier.
pub(super) type Place = (i64, u64);

/// What waits, by its place.
pub(super) struct Queue<T> {
    arrivals: u64,
    waiting: BTreeMap<Place, T>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            arrivals: 0,
            waiting: BTreeMap::new(),
        }
    }
}

impl<T> Queue<T> {
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// The place of one more request. A high priority goes ahead of others by arrivals, not for good,
    /// so that a stream of urgent requests does not starve the rest.
    pub(super) fn place(&mut self, priority: i8) -> Place {
        self.arrivals += 1;
        let ahead = i64::from(priority) * STEP;
        (self.arrivals.cast_signed() - ahead, self.arrivals)
    }

    pub(super) fn push(&mut self, place: Place, item: T) {
        self.waiting.insert(place, item);
    }

    /// The first, and its place.
    pub(super) fn first(&self) -> Option<(Place, &T)> {
        let (place, item) = self.waiting.first_key_value()?;
        Some((*place, item))
    }

    pub(super) fn pop(&mut self) -> Option<(Place, T)> {
        self.waiting.pop_first()
    }

    /// Takes out what `leaves` says.
    pub(super) fn take(&mut self, leaves: impl Fn(&T) -> bool) -> Vec<T> {
        let taken = self.waiting.extract_if(.., |_, item| leaves(item));
        taken.map(|(_, item)| item).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(priorities: &[i8]) -> Vec<usize> {
        let mut queue = Queue::default();
        for (index, priority) in priorities.iter().enumerate() {
            let place = queue.place(*priority);
            queue.push(place, index);
        }
        std::iter::from_fn(|| queue.pop().map(|(_, index)| index)).collect()
    }

    #[test]
    fn equals_come_in_the_order_of_their_arrival_and_urgent_ones_before() {
        assert_eq!(order(&[0, 0, 0]), [0, 1, 2]);
        assert_eq!(order(&[0, -1, 1, 0]), [2, 0, 3, 1]);
    }

    #[test]
    fn urgent_requests_do_not_starve_one_that_waits() {
        let mut priorities = vec![0];
        priorities.extend([1; 100]);
        let place = order(&priorities).iter().position(|index| *index == 0);
        // The last of those it equals came later.
        assert_eq!(place, Some(STEP as usize - 1));
    }
}
