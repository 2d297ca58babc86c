//! Memory of an arena as bytes of tensors that are written.

use std::io;
use std::mem::MaybeUninit;

use burn::tensor::Bytes;
use burn_std::{AccessError, AccessPolicy, AllocationController, AllocationProperty};

use crate::ops::arena::{ALIGNMENT, Arena, Piece};

/// A piece that belongs to one tensor.
struct Owned(Piece);

impl AllocationController for Owned {
    fn alloc_align(&self) -> usize {
        ALIGNMENT
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(
        &mut self,
        _: AccessPolicy,
    ) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        let (start, len) = (self.0.as_mut_ptr(), self.0.len());
        // SAFETY: bytes that are written are; the caller promises to write nothing else.
        Ok(unsafe { std::slice::from_raw_parts_mut(start.cast(), len) })
    }

    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        // SAFETY: bytes that are written are.
        Ok(unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len()) })
    }
}

/// `len` bytes of zeros.
///
/// # Errors
/// What the system says where it has no such memory.
pub(crate) fn zeros(arena: &mut Arena, len: usize) -> io::Result<Bytes> {
    let piece = arena.take(len)?;
    // SAFETY: all of the piece is zeros.
    Ok(unsafe { Bytes::from_controller(Box::new(Owned(piece)), len) })
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, Tensor, TensorData};

    use super::*;

    #[test]
    fn tensors_are_written_in_the_memory_that_they_were_given() {
        let mut arena = Arena::of_chunks(1 << 16);
        let device = Device::flex();
        let mut tensor = |dims: [usize; 2]| {
            let bytes = zeros(&mut arena, dims[0] * dims[1] * 4).expect("memory");
            let place = bytes.as_ptr();
            let data = TensorData::from_bytes(bytes, dims, DType::F32);
            (Tensor::<2>::from_data(data, &device), place)
        };
        let (a, at) = tensor([3, 5]);
        let (b, _) = tensor([3, 5]);
        let a = a.slice_assign([1..2, 0..5], Tensor::ones([1, 5], &device));
        let data = a.clone().into_data();
        let ours = data.as_slice::<f32>().expect("f32");
        assert_eq!(ours, [[0.0; 5], [1.0; 5], [0.0; 5]].as_flattened());
        assert_eq!(at.align_offset(ALIGNMENT), 0);
        let theirs = b.into_data();
        assert_eq!(theirs.as_slice::<f32>().expect("f32"), [0.0; 15]);
        drop(arena);
        assert_eq!(a.sum().into_scalar::<f32>(), 5.0);
    }
}
