//! Files mapped read-only: the only unsafe code of the loader.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::{Error, Result};

/// A mapped file.
#[derive(Clone, Debug)]
pub(super) struct Mapped {
    /// Its contents, shared and never copied; an empty file has none.
    pub(super) bytes: Bytes,
    map: Option<Arc<Mmap>>,
}

struct Owner(Arc<Mmap>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Maps a regular file; `shown` names it in errors.
///
/// # Errors
/// `NotFound`, `PermissionDenied`, `OutOfMemory` or `Io`, as the system says.
pub(super) fn map(path: &Path, shown: &Path) -> Result<Mapped> {
    let failed = |error| Error::io("file cannot be mapped", shown, error);
    let file = File::open(path).map_err(failed)?;
    // An empty range cannot be mapped.
    if file.metadata().map_err(failed)?.len() == 0 {
        return Ok(Mapped {
            bytes: Bytes::new(),
            map: None,
        });
    }
    // SAFETY: the map is private to this library, read-only, and lives as long as its `Bytes`. What
    // Rust cannot rule out is another process that writes to the file or shortens it meanwhile: the
    // numbers would change, or the system would raise SIGBUS. Every program that maps weights
    // (safetensors, llama.cpp) takes that; downloads are renamed into place, never rewritten.
    let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
    advise(&map, shown);
    let map = Arc::new(map);
    Ok(Mapped {
        bytes: Bytes::from_owner(Owner(Arc::clone(&map))),
        map: Some(map),
    })
}

/// Large pages, where the file system caches files in them, and reading ahead. It is only advice, so
/// a refusal changes nothing.
fn advise(map: &Mmap, shown: &Path) {
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        tracing::debug!(%error, path = %shown.display(), "no huge pages");
    }
    #[cfg(unix)]
    if let Err(error) = map.advise(memmap2::Advice::WillNeed) {
        tracing::debug!(%error, path = %shown.display(), "no read-ahead");
    }
    #[cfg(not(unix))]
    let _ = (map, shown);
}

impl Mapped {
    /// The system may take back the memory of a stretch; who reads it again gets it from the file.
    pub(super) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = &self.map {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is of a file and read-only, so pages that are dropped come back with
            // the same contents.
            let done = unsafe { map.unchecked_advise_range(advice, range.start, range.len()) };
            if let Err(error) = done {
                tracing::debug!(%error, "memory of the file is kept");
            }
        }
        #[cfg(not(unix))]
        let _ = (&self.map, range);
    }
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
        let mapped = map(&path, &path).expect("map");
        let slice = mapped.bytes.slice(2..4);
        assert_eq!(slice.as_ptr(), mapped.bytes[2..].as_ptr());
        mapped.release(0..10);
        assert_eq!(&slice[..], b"23");
        std::fs::remove_file(&path).expect("remove");
        drop(mapped);
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
        assert!(map(&path, &path).expect("map").bytes.is_empty());
    }
}
