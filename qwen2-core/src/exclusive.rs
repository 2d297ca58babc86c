//! A lock that its own holder is told about instead of waiting for itself: for the bindings, whose callbacks
//! may come back to the object that calls them.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// A value that one thread has at a time.
#[derive(Debug, Default)]
pub struct Exclusive<T> {
    value: Mutex<T>,
    holder: Mutex<Option<ThreadId>>,
}

/// Holds the lock until it is dropped.
#[derive(Debug)]
pub struct ExclusiveGuard<'a, T> {
    value: MutexGuard<'a, T>,
    holder: &'a Mutex<Option<ThreadId>>,
}

impl<T> Exclusive<T> {
    /// Around a value.
    pub fn new(value: T) -> Self {
        Self {
            value: Mutex::new(value),
            holder: Mutex::new(None),
        }
    }

    /// Waits for other threads; `None` where this thread has the value already. A panic while it was held
    /// does not make the value unusable.
    pub fn lock(&self) -> Option<ExclusiveGuard<'_, T>> {
        let this = thread::current().id();
        // Only this thread could have written its own id there, so it does not change meanwhile.
        if *unpoisoned(&self.holder) == Some(this) {
            return None;
        }
        let value = unpoisoned(&self.value);
        *unpoisoned(&self.holder) = Some(this);
        Some(ExclusiveGuard {
            value,
            holder: &self.holder,
        })
    }
}

fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Deref for ExclusiveGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for ExclusiveGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T> Drop for ExclusiveGuard<'_, T> {
    fn drop(&mut self) {
        // Before the value is let go: the next holder writes its own name.
        *unpoisoned(self.holder) = None;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_refused_and_others_wait() {
        let counter = Exclusive::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let mut held = counter.lock().unwrap();
                        assert!(counter.lock().is_none());
                        *held += 1;
                    }
                });
            }
        });
        assert_eq!(*counter.lock().unwrap(), 400);
    }
}
