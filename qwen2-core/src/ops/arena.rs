//! Memory for weights that are not used from the file, and for long caches: a few large mappings, in huge
//! pages where the system has them, which are read some percent faster.
#![allow(unsafe_code)]

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::{MmapMut, MmapRaw};

/// Bytes of a mapping, unless others are asked for; what is not used of the last one is never touched, so it
/// costs nothing.
const CHUNK: usize = 64 << 20;
/// Every piece begins at a multiple of this: a cache line.
pub(crate) const ALIGNMENT: usize = 64;

/// Where pieces are taken from; they live as long as somebody holds them.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    chunk: Option<Arc<MmapRaw>>,
    used: usize,
    /// Bytes of a mapping.
    chunk_len: Option<usize>,
}

impl Arena {
    /// One whose mappings have `chunk_len` bytes.
    pub(crate) fn of_chunks(chunk_len: usize) -> Self {
        Self {
            chunk_len: Some(chunk_len),
            ..Self::default()
        }
    }

    /// What is left of the last mapping.
    #[cfg(test)]
    pub(crate) fn room(&self) -> usize {
        self.chunk
            .as_ref()
            .map_or(0, |chunk| chunk.len() - self.used)
    }

    /// `len` bytes of zeros.
    ///
    /// # Errors
    /// What the system says where it has no such memory.
    pub(crate) fn take(&mut self, len: usize) -> io::Result<Piece> {
        let room = |chunk: &Arc<MmapRaw>| chunk.len() - self.used;
        let chunk = match &self.chunk {
            Some(chunk) if room(chunk) >= len => Arc::clone(chunk),
            _ => {
                let chunk = Arc::new(map(len.max(self.chunk_len.unwrap_or(CHUNK)))?);
                self.used = 0;
                self.chunk = Some(Arc::clone(&chunk));
                chunk
            }
        };
        let start = self.used;
        self.used = (start + len).next_multiple_of(ALIGNMENT).min(chunk.len());
        Ok(Piece { chunk, start, len })
    }
}

fn map(len: usize) -> io::Result<MmapRaw> {
    let map = MmapMut::map_anon(len)?;
    // Only advice: where it is refused, the pages are small ones.
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        tracing::debug!(%error, "no huge pages");
    }
    Ok(MmapRaw::from(map))
}

/// Some bytes of an [`Arena`] that nobody else has.
#[derive(Debug)]
pub(crate) struct Piece {
    chunk: Arc<MmapRaw>,
    start: usize,
    len: usize,
}

impl Piece {
    /// As bytes that can be shared and no longer written.
    pub(crate) fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: inside the mapping, which lives as long as `self`, initialised by the system; only
        // this piece has these bytes, so they change through `&mut self` alone.
        unsafe { std::slice::from_raw_parts(self.chunk.as_ptr().add(self.start), self.len) }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the mapping is writable.
        unsafe { std::slice::from_raw_parts_mut(self.chunk.as_mut_ptr().add(self.start), self.len) }
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zero_aligned_and_apart() {
        let mut arena = Arena::default();
        let sizes = [1, 64, 100, CHUNK - 200, 300, CHUNK + 5, 7];
        let mut pieces: Vec<_> = sizes
            .iter()
            .map(|len| arena.take(*len).expect("memory"))
            .collect();
        for (piece, len) in pieces.iter().zip(sizes) {
            assert_eq!(piece.len(), len);
            assert!(piece.iter().all(|byte| *byte == 0));
            assert_eq!(piece.as_ptr().align_offset(ALIGNMENT), 0);
        }
        for (i, piece) in pieces.iter_mut().enumerate() {
            piece.fill(i as u8 + 1);
        }
        drop(arena);
        for (i, piece) in pieces.into_iter().enumerate() {
            assert!(piece.into_bytes().iter().all(|byte| *byte == i as u8 + 1));
        }
    }

    #[test]
    fn what_the_system_cannot_give_is_an_error() {
        assert!(Arena::default().take(usize::MAX / 2).is_err());
    }
}
