//! A stored tensor on its way into the network: converted, packed, or as it is.

use std::sync::{Mutex, PoisonError};

use burn::tensor::{Bytes, DType as BurnDType, TensorData};
use half::f16;

use super::quantize::{Quantization, keep, pack_rows, shared, take};
use crate::checkpoint::gguf::blocks::Kind;
use crate::checkpoint::mmap::arena::Arena;
use crate::checkpoint::{Encoding, StoredTensor};
use crate::config::DType;
use crate::error::Result;
use crate::model::Kept;
use crate::ops::{Threads, packed};

/// The tensor in `dtype` or packed, where one of them is asked for; else blocks of another format
/// packed without loss where ours can hold them, in q8 where not, and everything else as it is.
///
/// # Errors
/// `OutOfMemory` where there is no room.
pub(super) fn keep_stored(
    name: &str,
    stored: StoredTensor,
    dtype: Option<DType>,
    quantization: Option<Quantization>,
    threads: &Threads,
    arena: &mut Arena,
) -> Result<Kept> {
    let (Encoding::Blocks(kind), &[rows, cols]) = (stored.encoding, stored.shape.as_slice()) else {
        let data = convert(stored, dtype);
        return keep(name, data, quantization, threads, arena);
    };
    let format = match (quantization, dtype) {
        (Some(quantization), _) => quantization.format(name),
        (None, Some(_)) => None,
        // A router keeps its precision, which f32 holds.
        (None, None) => Quantization::Q8
            .format(name)
            .map(|q8| lossless(kind).unwrap_or(q8)),
    };
    let Some(format) = format else {
        return Ok(Kept::Dense(convert(stored, dtype)));
    };
    let shape = packed::Shape { format, rows, cols };
    let mut piece = take(arena, name, shape.bytes())?;
    pack_stored(shape, &stored, threads, &mut piece);
    Ok(Kept::Packed(shape, shared(piece.into_bytes())))
}

/// Our format that holds the blocks as they are.
fn lossless(kind: Kind) -> Option<packed::Format> {
    match kind {
        Kind::Q8_0 => Some(packed::Format::Q8),
        Kind::Q4_0 => Some(packed::Format::Q4),
        _ => None,
    }
}

/// Packs a stored matrix panel by panel on all threads.
pub(super) fn pack_stored(
    shape: packed::Shape,
    stored: &StoredTensor,
    threads: &Threads,
    bytes: &mut [u8],
) {
    match stored.encoding {
        Encoding::Blocks(kind) if lossless(kind) == Some(shape.format) => {
            transcribe(shape, kind, &stored.bytes, threads, bytes);
        }
        _ => {
            let row = |index: usize, out: &mut [f32]| row(stored, index, out);
            pack_rows(shape, packed::Effort::Search, &row, threads, bytes);
        }
    }
}

/// Row `index` of a stored matrix as f32.
fn row(stored: &StoredTensor, index: usize, out: &mut [f32]) {
    let kind = match stored.encoding {
        Encoding::Numbers(DType::F32) => Kind::F32,
        Encoding::Numbers(DType::F16) => Kind::F16,
        Encoding::Numbers(DType::BF16) => Kind::Bf16,
        Encoding::Blocks(kind) => kind,
        Encoding::Packed => unreachable!("what is packed already is kept"),
    };
    let size = kind.row_bytes(out.len());
    kind.dequantize(&stored.bytes[index * size..][..size], out);
}

/// Blocks of 32 with an f16 scale into ours, weight for weight.
fn transcribe(
    shape: packed::Shape,
    kind: Kind,
    stored: &[u8],
    threads: &Threads,
    bytes: &mut [u8],
) {
    let row_bytes = kind.row_bytes(shape.cols);
    let block_bytes = kind.block().1;
    let block = |row: usize, block: usize| {
        let bytes = &stored[row * row_bytes + block * block_bytes..][..block_bytes];
        let scale = f16::from_le_bytes([bytes[0], bytes[1]]);
        let quants = std::array::from_fn(|i| match kind {
            Kind::Q8_0 => bytes[2 + i] as i8,
            _ => (bytes[2 + i % 16] >> (i / 16 * 4) & 15) as i8 - 8,
        });
        (scale, quants)
    };
    let panels: Vec<_> = bytes
        .chunks_mut(shape.panel_bytes())
        .map(Mutex::new)
        .collect();
    threads.each(panels.len(), &|panel| {
        // Each lock is taken once, by its own task.
        let mut out = panels[panel].lock().unwrap_or_else(PoisonError::into_inner);
        shape.place_panel(panel, &block, &mut out);
    });
}

/// The tensor's bytes as they are in the map, or converted to `dtype`; blocks become f32 without one.
pub(super) fn convert(stored: StoredTensor, dtype: Option<DType>) -> TensorData {
    let stored_dtype = match stored.encoding {
        Encoding::Numbers(dtype) => burn_dtype(dtype),
        Encoding::Packed => BurnDType::U8,
        Encoding::Blocks(kind) => {
            let mut numbers = vec![0.0; stored.shape.iter().product()];
            kind.dequantize(&stored.bytes, &mut numbers);
            let data = TensorData::new(numbers, stored.shape);
            return match dtype {
                Some(dtype) => data.convert_dtype(burn_dtype(dtype)),
                None => data,
            };
        }
    };
    let bytes = Bytes::from_shared(stored.bytes, burn::tensor::AllocationProperty::File);
    let data = TensorData::from_bytes(bytes, stored.shape, stored_dtype);
    match dtype.map(burn_dtype) {
        Some(dtype) if dtype != data.dtype() => data.convert_dtype(dtype),
        _ => data,
    }
}

pub(super) fn burn_dtype(dtype: DType) -> BurnDType {
    match dtype {
        DType::F32 => BurnDType::F32,
        DType::F16 => BurnDType::F16,
        DType::BF16 => BurnDType::BF16,
    }
}
