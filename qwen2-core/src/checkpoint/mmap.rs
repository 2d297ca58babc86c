//! Files mapped read-only: the only unsafe code of the loader.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::{Error, Result};

/// The contents of a regular file, shared and never copied; an empty file gives no bytes.
///
/// `shown` names the file in errors.
///
/// # Errors
/// `NotFound`, `PermissionDenied`, `OutOfMemory` or `Io`, as the system says.
pub(super) fn map(path: &Path, shown: &Path) -> Result<Bytes> {
    let failed = |error| Error::io("file cannot be mapped", shown, error);
    let file = File::open(path).map_err(failed)?;
    // An empty range cannot be mapped.
    if file.metadata().map_err(failed)?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the map is private to this library, read-only, and lives as long as its `Bytes`. What
    // Rust cannot rule out is another process that writes to the file or shortens it meanwhile: the
    // numbers would change, or the system would raise SIGBUS. Every program that maps weights
    // (safetensors, llama.cpp) takes that; downloads are renamed into place, never rewritten.
    let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
    // Starts reading ahead; only advice, so a refusal changes nothing.
    #[cfg(unix)]
    if let Err(error) = map.advise(memmap2::Advice::WillNeed) {
        tracing::debug!(%error, path = %shown.display(), "no read-ahead");
    }
    Ok(Bytes::from_owner(map))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_map_outlives_the_file_name_and_is_shared_without_a_copy() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("file");
        std::fs::write(&path, b"0123456789").expect("write");
        let bytes = map(&path, &path).expect("map");
        let slice = bytes.slice(2..4);
        assert_eq!(slice.as_ptr(), bytes[2..].as_ptr());
        std::fs::remove_file(&path).expect("remove");
        drop(bytes);
        assert_eq!(&slice[..], b"23");
    }

    #[test]
    fn an_empty_file_has_no_bytes_and_a_missing_one_is_not_found() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("file");
        assert_eq!(
            map(&path, &path).expect_err("missing").kind(),
            ErrorKind::NotFound
        );
        std::fs::write(&path, b"").expect("write");
        assert!(map(&path, &path).expect("map").is_empty());
    }
}
