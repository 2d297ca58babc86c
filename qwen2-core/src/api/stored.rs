//! A stored tensor on its way into the network: converted, packed, or as it is.

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
        (None, None) => format_of(kind, name),
    };
    let Some(format) = format else {
        return Ok(Kept::Dense(convert(stored, dtype)));
    };
    let shape = packed::Shape { format, rows, cols };
    let mut piece = take(arena, name, shape.bytes())?;
    pack_stored(shape, &stored, threads, &mut piece);
    Ok(Kept::Packed(shape, shared(piece.into_bytes())))
}

/// Bytes that [`keep_stored`] keeps of a tensor with no wish.
pub(super) fn kept_bytes(name: &str, stored: &StoredTensor) -> u64 {
    let bytes = match (stored.encoding, stored.shape.as_slice()) {
        (Encoding::Blocks(kind), &[rows, cols]) => match format_of(kind, name) {
            Some(format) => packed::Shape { format, rows, cols }.bytes(),
            None => rows * cols * size_of::<f32>(),
        },
        // Vectors are kept in f32.
        (Encoding::Numbers(_), &[n]) => n * size_of::<f32>(),
        _ => stored.bytes.len(),
    };
    bytes as u64
}

/// What blocks are packed into with no wish; a router keeps its precision, which f32 holds.
fn format_of(kind: Kind, name: &str) -> Option<packed::Format> {
    let q8 = Quantization::Q8.format(name)?;
    Some(lossless(kind).unwrap_or(q8))
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
            let row = |index: usize, out: &mut [f32]| rows(stored, index, out);
            pack_rows(shape, packed::Effort::Search, &row, threads, bytes);
        }
    }
}

/// Row `index` of a stored matrix as f32.
pub(super) fn rows(stored: &StoredTensor, index: usize, out: &mut [f32]) {
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
    threads.each_chunk(bytes, shape.panel_bytes(), &|panel, out| {
        shape.place_panel(panel, &block, out);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix of blocks whose bytes may be anything but for their scales and, as quantizers write
    /// them, an eight-bit -128.
    fn blocks(kind: Kind, rows: usize, cols: usize) -> StoredTensor {
        let mut bytes: Vec<u8> = (0..rows * kind.row_bytes(cols))
            .map(|i| (i * 7919 % 251) as u8)
            .map(|byte| if byte == 128 { 127 } else { byte })
            .collect();
        for (i, block) in bytes.chunks_mut(kind.block().1).enumerate() {
            let scale = f16::from_f32(0.01 * (i % 17) as f32 - 0.05);
            block[..2].copy_from_slice(&scale.to_le_bytes());
        }
        StoredTensor {
            encoding: Encoding::Blocks(kind),
            shape: vec![rows, cols],
            bytes: bytes.into(),
        }
    }

    fn kept(name: &str, stored: StoredTensor, quantization: Option<Quantization>) -> Kept {
        let threads = Threads::start(Some(2), false).expect("threads");
        let mut arena = Arena::default();
        keep_stored(name, stored, None, quantization, &threads, &mut arena).expect("kept")
    }

    #[test]
    fn blocks_of_our_shape_are_kept_weight_for_weight() {
        for (kind, format) in [
            (Kind::Q8_0, packed::Format::Q8),
            (Kind::Q4_0, packed::Format::Q4),
        ] {
            for (rows, cols) in [(16, 64), (37, 96), (5, 32)] {
                let stored = blocks(kind, rows, cols);
                let want = convert(stored.clone(), None);
                let Kept::Packed(shape, bytes) = kept("x.weight", stored, None) else {
                    panic!("packed");
                };
                assert_eq!(shape.format, format);
                let mut row = vec![f32::NAN; cols];
                let want: Vec<f32> = want.iter::<f32>().collect();
                for (i, want) in want.chunks(cols).enumerate() {
                    shape.unpack_row(&bytes, i, &mut row);
                    for (got, want) in row.iter().zip(want) {
                        assert_eq!(got, want, "{kind:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_block_with_an_eight_bit_minimum_is_packed_anew() {
        let mut block = vec![0x80; 34];
        block[..2].copy_from_slice(&f16::ONE.to_le_bytes());
        block[2..18].fill(100);
        let stored = StoredTensor {
            encoding: Encoding::Blocks(Kind::Q8_0),
            shape: vec![1, 32],
            bytes: block.into(),
        };
        let Kept::Packed(shape, bytes) = kept("x.weight", stored, None) else {
            panic!("packed");
        };
        let mut row = [0.0; 32];
        shape.unpack_row(&bytes, 0, &mut row);
        assert!(row[..16].iter().all(|x| (x - 100.0).abs() < 0.6), "{row:?}");
        assert!(row[16..].iter().all(|x| (x + 128.0).abs() < 0.6), "{row:?}");
    }

    #[test]
    fn other_blocks_become_q8_and_a_router_stays_whole() {
        let Kept::Packed(shape, _) = kept("x.weight", blocks(Kind::Q5_1, 4, 64), None) else {
            panic!("packed");
        };
        assert_eq!(shape.format, packed::Format::Q8);
        let q4 = kept(
            "x.weight",
            blocks(Kind::Q8_0, 4, 64),
            Some(Quantization::Q4),
        );
        assert!(matches!(q4, Kept::Packed(shape, _) if shape.format == packed::Format::Q4));
        let router = kept(
            "model.layers.0.mlp.gate.weight",
            blocks(Kind::Q8_0, 4, 64),
            None,
        );
        assert!(matches!(router, Kept::Dense(_)));
    }
}
