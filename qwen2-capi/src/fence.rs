//! The border: panics stop here, pointers are checked here, errors leave through a parameter.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::ptr::NonNull;
use std::sync::{PoisonError, RwLock};

use crate::error::{QWEN2_OK, qwen2_error, qwen2_status};
use crate::log;

/// What an entry's body gives back.
pub(crate) type Outcome<T> = Result<T, Box<qwen2_error>>;

/// Length that asks for `strlen`; the header defines it as `SIZE_MAX`.
/// cbindgen:ignore
pub(crate) const QWEN2_NUL_TERMINATED: usize = usize::MAX;

/// Runs the body of a fallible entry. Bodies set their outputs last, so that they are untouched on
/// failure.
pub(crate) unsafe fn entry(
    error: *mut *mut qwen2_error,
    body: impl FnOnce() -> Outcome<qwen2_status>,
) -> qwen2_status {
    match caught(body) {
        Ok(Ok(status)) => status,
        Ok(Err(failure)) | Err(failure) => {
            let status = failure.code();
            if !error.is_null() {
                // SAFETY: the caller gives NULL or the address of a pointer.
                unsafe { error.write(give(*failure)) };
            }
            status
        }
    }
}

/// Runs the body of an entry that has no way to report: `otherwise` stands for a failure.
pub(crate) fn silent<T>(otherwise: T, body: impl FnOnce() -> Outcome<T>) -> T {
    match caught(body) {
        Ok(Ok(value)) => value,
        Ok(Err(_)) | Err(_) => otherwise,
    }
}

/// A getter: `otherwise` stands for a handle that is none.
pub(crate) unsafe fn read<T: Handle, R>(
    handle: *const T,
    otherwise: R,
    body: impl FnOnce(&T) -> R,
) -> R {
    silent(otherwise, || Ok(body(borrow(handle)?)))
}

/// A setter: nothing happens for a handle that is none.
pub(crate) unsafe fn change<T: Handle>(handle: *mut T, body: impl FnOnce(&mut T)) {
    silent((), || {
        body(borrow_mut(handle)?);
        Ok(())
    });
}

/// Frees a handle: NULL and one that was freed already are left alone.
pub(crate) fn free<T: Handle>(handle: *mut T) {
    silent((), || {
        drop(take(handle));
        Ok(())
    });
}

fn caught<T>(body: impl FnOnce() -> Outcome<T>) -> Result<Outcome<T>, Box<qwen2_error>> {
    // What a panic leaves half-done is behind the locks and the fence of the core, or is dropped.
    qwen2_core::fenced(|| log::scope(body)).map_err(|panic| Box::new(qwen2_error::internal(&panic)))
}

/// A type that C holds a pointer to.
pub(crate) trait Handle: Sized {
    /// The C name, for errors.
    const TYPE: &'static str;
}

/// Every handle that is out, with its type. Asking a table, and not a tag inside the object, finds
/// freed and foreign pointers without reading memory that may be gone.
static LIVE: RwLock<BTreeMap<usize, &'static str>> = RwLock::new(BTreeMap::new());

/// The entry of a handle. Turned over, so that this table does not hide from LeakSanitizer a handle
/// that the host has lost.
fn key<T>(handle: *const T) -> usize {
    !(handle as usize)
}

/// Hands an object to the caller, who frees it.
pub(crate) fn give<T: Handle>(value: T) -> *mut T {
    let handle = Box::into_raw(Box::new(value));
    LIVE.write()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(key(handle), T::TYPE);
    handle
}

/// Takes an object back; `None` for NULL and for what is no live handle of the type.
pub(crate) fn take<T: Handle>(handle: *mut T) -> Option<Box<T>> {
    let mut live = LIVE.write().unwrap_or_else(PoisonError::into_inner);
    if live.get(&key(handle)) != Some(&T::TYPE) {
        return None;
    }
    live.remove(&key(handle));
    // SAFETY: `give` made it from a box of this type, and nobody took it before.
    Some(unsafe { Box::from_raw(handle) })
}

fn check<T: Handle>(handle: *const T) -> Outcome<()> {
    if handle.is_null() {
        return Err(qwen2_error::invalid(
            T::TYPE,
            "handle is NULL",
            None,
            "load or create one first",
        ));
    }
    let live = LIVE.read().unwrap_or_else(PoisonError::into_inner);
    match live.get(&key(handle)) {
        Some(found) if *found == T::TYPE => Ok(()),
        Some(found) => {
            let why = format!("it is a {found}");
            Err(qwen2_error::invalid(
                T::TYPE,
                "handle has another type",
                Some(why),
                "pass the right handle",
            ))
        }
        None => Err(qwen2_error::invalid(
            T::TYPE,
            "handle is not live",
            Some("it was freed, or this library never made it".to_owned()),
            "use a handle between its creation and its qwen2_*_free",
        )),
    }
}

/// The object behind a handle. The caller of the entry must not free it meanwhile.
pub(crate) unsafe fn borrow<'a, T: Handle>(handle: *const T) -> Outcome<&'a T> {
    check(handle)?;
    // SAFETY: it is live and of this type; the header's thread rule forbids changing or freeing it
    // during the entry.
    Ok(unsafe { &*handle })
}

/// As [`borrow`], for NULL as well.
pub(crate) unsafe fn borrow_optional<'a, T: Handle>(handle: *const T) -> Outcome<Option<&'a T>> {
    if handle.is_null() {
        Ok(None)
    } else {
        borrow(handle).map(Some)
    }
}

/// As [`borrow`], alone.
pub(crate) unsafe fn borrow_mut<'a, T: Handle>(handle: *mut T) -> Outcome<&'a mut T> {
    check(handle)?;
    // SAFETY: it is live and of this type; by the header's thread rule the entry has it alone.
    Ok(unsafe { &mut *handle })
}

/// A place for an output, known not to be NULL.
pub(crate) struct Out<T>(NonNull<T>);

pub(crate) fn out<T>(place: *mut T, name: &'static str) -> Outcome<Out<T>> {
    NonNull::new(place).map(Out).ok_or_else(|| {
        qwen2_error::invalid(
            name,
            "argument is NULL",
            None,
            "give the address of a variable",
        )
    })
}

impl<T> Out<T> {
    pub(crate) unsafe fn set(self, value: T) -> qwen2_status {
        // SAFETY: the caller gave the address of a variable of this type.
        unsafe { self.0.write(value) };
        QWEN2_OK
    }
}

/// An output that may be left out with NULL.
pub(crate) unsafe fn set_optional<T>(place: *mut T, value: T) {
    if !place.is_null() {
        // SAFETY: not NULL, so the address of a variable of this type.
        unsafe { place.write(value) };
    }
}

/// Text of the caller: UTF-8, NUL-terminated or of `len` bytes.
pub(crate) unsafe fn text<'a>(
    text: *const c_char,
    len: usize,
    name: &'static str,
) -> Outcome<&'a str> {
    let bytes = if len == QWEN2_NUL_TERMINATED && !text.is_null() {
        // SAFETY: with this length the caller promises a NUL at the end.
        unsafe { CStr::from_ptr(text) }.to_bytes()
    } else {
        slice(text.cast::<u8>(), len, name)?
    };
    std::str::from_utf8(bytes).map_err(|error| {
        let why = format!("byte {}", error.valid_up_to());
        qwen2_error::invalid(name, "text is not UTF-8", Some(why), "convert it to UTF-8")
    })
}

/// A path of the caller: text without NUL.
pub(crate) unsafe fn path<'a>(path: *const c_char, len: usize) -> Outcome<&'a str> {
    let path = text(path, len, "path")?;
    match path.find('\0') {
        None => Ok(path),
        Some(at) => {
            let why = format!("byte {at}");
            Err(qwen2_error::invalid(
                "path",
                "path holds NUL",
                Some(why),
                "no file has such a name",
            ))
        }
    }
}

/// An array of the caller; NULL is an empty one.
pub(crate) unsafe fn slice<'a, T>(
    items: *const T,
    n: usize,
    name: &'static str,
) -> Outcome<&'a [T]> {
    if n == 0 {
        return Ok(&[]);
    }
    if items.is_null() {
        return Err(qwen2_error::invalid(
            name,
            "argument is NULL",
            None,
            "NULL goes with length 0 only",
        ));
    }
    if n > isize::MAX as usize / size_of::<T>() || !items.is_aligned() {
        let why = format!("{n} items at {items:p}");
        return Err(qwen2_error::invalid(
            name,
            "argument is no array",
            Some(why),
            "check pointer and length",
        ));
    }
    // SAFETY: not NULL, aligned, of a possible size; the caller promises `n` items behind it.
    Ok(unsafe { std::slice::from_raw_parts(items, n) })
}

impl Handle for qwen2_error {
    const TYPE: &'static str = "qwen2_error";
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
#[allow(clippy::undocumented_unsafe_blocks)] // what the tests hand over is their own
mod tests {
    use super::*;
    use crate::error::*;

    struct One(#[allow(dead_code)] u8);
    impl Handle for One {
        const TYPE: &'static str = "qwen2_one";
    }
    struct Two(#[allow(dead_code)] u8);
    impl Handle for Two {
        const TYPE: &'static str = "qwen2_two";
    }

    fn message(outcome: Outcome<&One>) -> String {
        outcome.map(|_| ()).unwrap_err().message().to_owned()
    }

    #[test]
    fn a_panic_becomes_an_internal_error_that_says_where() {
        let mut error = std::ptr::null_mut();
        let status = unsafe { entry(&raw mut error, || panic!("on purpose")) };
        assert_eq!(status, QWEN2_ERROR_INTERNAL);
        let error = take(error).unwrap();
        assert!(
            error.message().contains("on purpose"),
            "{}",
            error.message()
        );
        assert!(error.message().contains("fence.rs"), "{}", error.message());
        assert_eq!(silent(7, || panic!("on purpose")), 7);
    }

    #[test]
    fn freed_foreign_null_and_mistaken_handles_are_told_apart() {
        let one = give(One(1));
        assert!(unsafe { borrow(one) }.is_ok());
        let message_of = |handle: *const One| message(unsafe { borrow(handle) });
        assert_eq!(message_of(std::ptr::null()), "handle is NULL: qwen2_one");
        let two = give(Two(2));
        assert_eq!(
            message_of(two.cast()),
            "handle has another type: qwen2_one: it is a qwen2_two"
        );
        let foreign = 0_u64;
        let gone = "handle is not live: qwen2_one: it was freed, or this library never made it";
        assert_eq!(message_of((&raw const foreign).cast()), gone);
        free(one);
        assert_eq!(message_of(one), gone);
        free(one);
        free(two.cast::<One>());
        assert!(take(two).is_some());
    }

    #[test]
    fn text_is_checked_and_may_hold_nul() {
        let get = |bytes: &[u8], len| unsafe { text(bytes.as_ptr().cast(), len, "prompt") };
        assert_eq!(get(b"a\0b", 3).ok(), Some("a\0b"));
        assert_eq!(get(b"a\0b", QWEN2_NUL_TERMINATED).ok(), Some("a"));
        let error = get(b"ab\xFFc", 4).unwrap_err();
        assert_eq!(error.message(), "text is not UTF-8: prompt: byte 2");
        let null = |len| unsafe { text(std::ptr::null(), len, "prompt") };
        assert_eq!(null(0).ok(), Some(""));
        for len in [1, QWEN2_NUL_TERMINATED] {
            assert_eq!(null(len).unwrap_err().message(), "argument is NULL: prompt");
        }
        let absurd = unsafe { slice([0_u32].as_ptr(), usize::MAX / 2, "tokens") };
        assert_eq!(absurd.unwrap_err().code(), QWEN2_ERROR_INVALID_ARGUMENT);
    }
}
