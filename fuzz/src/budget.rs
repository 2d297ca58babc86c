//! An allocator that ends the program when an input costs more memory than it may.

use std::alloc::System;

use cap::Cap;

/// The system's, with a limit.
pub type Allocator = Cap<System>;

/// Without one as yet.
pub const fn unlimited() -> Allocator {
    Cap::new(System, usize::MAX)
}

/// Runs `body`, which may hold `bytes` more than are held now: an allocation beyond them is refused,
/// which ends the program at that place.
pub fn within<R>(bytes: usize, body: impl FnOnce() -> R) -> R {
    let allocator = &crate::ALLOCATOR;
    let limit = allocator.allocated() + bytes;
    allocator.set_limit(limit).expect("no less than is held");
    let result = body();
    allocator.set_limit(usize::MAX).expect("the most there is");
    result
}
