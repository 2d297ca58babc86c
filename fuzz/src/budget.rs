//! An allocator that ends the program when an input costs more memory than it may.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that are held.
static HELD: AtomicUsize = AtomicUsize::new(0);
/// Bytes that may be.
static MOST: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The system's, with a limit.
pub struct Allocator;

// SAFETY: all of it is the system's allocator; a refusal is null, as the trait says.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed);
        // The message of a panic needs memory, too.
        let is_over = held.saturating_add(layout.size()) > MOST.load(Ordering::Relaxed);
        if is_over && !std::thread::panicking() {
            MOST.store(usize::MAX, Ordering::Relaxed);
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Runs `body`, which may hold `bytes` more than are held now: an allocation beyond them is refused,
/// which ends the program at that place.
pub fn within<R>(bytes: usize, body: impl FnOnce() -> R) -> R {
    MOST.store(HELD.load(Ordering::Relaxed) + bytes, Ordering::Relaxed);
    let result = body();
    MOST.store(usize::MAX, Ordering::Relaxed);
    result
}
