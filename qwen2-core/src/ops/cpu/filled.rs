//! A kernel: buffers that tasks fill, without a pass of zeros before, for which all threads but one would wait.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use crate::ops::watch;

/// `len` elements that `fill` writes.
///
/// # Safety
/// `fill` writes every element, but for what is left out because the watch over this thread ended.
pub(crate) unsafe fn filled<T: Copy + Default>(
    len: usize,
    fill: impl FnOnce(&mut [MaybeUninit<T>]),
) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    let unset = &mut out.spare_capacity_mut()[..len];
    fill(unset);
    // A watch that is over stays so: where it is not, nothing was left out.
    if watch::current().is_over() {
        unset.fill(MaybeUninit::new(T::default()));
    }
    // SAFETY: `fill` wrote all of them, or the line above did.
    unsafe { out.set_len(len) };
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::super::pool;
    use super::*;
    use crate::ops::watch::{Watch, watched};

    fn count(len: usize) -> Vec<u32> {
        // SAFETY: each task writes its element.
        unsafe {
            filled(len, |out| {
                let out: Vec<_> = out.iter_mut().map(std::sync::Mutex::new).collect();
                pool::parallel(len, &|i| {
                    if let Ok(mut out) = out[i].lock() {
                        out.write(i as u32 + 1);
                    }
                });
            })
        }
    }

    #[test]
    fn what_no_task_wrote_is_zero() {
        assert!(count(0).is_empty());
        assert_eq!(count(5), [1, 2, 3, 4, 5]);
        let over = Watch::of(Arc::new(AtomicBool::new(true)));
        assert_eq!(watched(&over, || count(5)), [0; 5]);
    }
}
