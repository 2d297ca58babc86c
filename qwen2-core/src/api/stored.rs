//! A stored tensor on its way into the network: converted, packed, or as it is.

use burn::tensor::{Bytes, DType as BurnDType, TensorData};
use half::{bf16, f16};

use super::quantize::{Quantization, keep, pack_rows, shared, take};
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::gguf::blocks::Kind;
use crate::checkpoint::mmap::arena::Arena;
use crate::checkpoint::{Encoding, StoredTensor, aligned};
use crate::config::DType;
use crate::error::Result;
use crate::model::Kept;
use crate::ops::{Threads, fit, packed};

/// The tensor in `dtype` or packed, where one of them is asked for; else blocks of another format
/// packed without loss where ours can hold them, in q8 where not, and everything else as it is.
/// `zeros`: whether the device takes blocks with zero points.
///
/// # Errors
/// `OutOfMemory` where there is no room.
pub(super) fn keep_stored(
    name: &str,
    stored: StoredTensor,
    dtype: Option<DType>,
    quantization: Option<Quantization>,
    zeros: bool,
    threads: &Threads,
    arena: &mut Arena,
) -> Result<Kept> {
    let &[rows, cols] = stored.shape.as_slice() else {
        return Ok(Kept::Dense(convert(stored, dtype)));
    };
    if let Encoding::Numbers(_) = stored.encoding {
        let data = convert(stored, dtype);
        return keep(name, data, quantization, threads, arena);
    }
    let format = match (quantization, dtype) {
        (Some(quantization), _) => quantization.format(name),
        (None, Some(_)) => None,
        (None, None) => format_of(name, &stored, zeros),
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
pub(super) fn kept_bytes(name: &str, stored: &StoredTensor, zeros: bool) -> u64 {
    let bytes = match (stored.encoding, stored.shape.as_slice()) {
        (Encoding::Blocks(_) | Encoding::Grouped, &[rows, cols]) => {
            match format_of(name, stored, zeros) {
                Some(format) => packed::Shape { format, rows, cols }.bytes(),
                None => rows * cols * size_of::<f32>(),
            }
        }
        // Vectors are kept in f32.
        (Encoding::Numbers(_), &[n]) => n * size_of::<f32>(),
        _ => stored.bytes.len(),
    };
    bytes as u64
}

/// What blocks and groups are packed into with no wish; a router keeps its precision, which f32 holds.
fn format_of(name: &str, stored: &StoredTensor, zeros: bool) -> Option<packed::Format> {
    let q8 = Quantization::Q8.format(name)?;
    let four = [packed::Format::Q4, packed::Format::Q4Zero];
    let four = four
        .into_iter()
        .filter(|format| zeros || !format.has_zeros());
    let found = four.into_iter().find(|format| is_lossless(stored, *format));
    Some(found.unwrap_or(q8))
}

/// Whether our format holds the matrix weight for weight; blocks with a minimum but for what f16 rounds away
/// of their scales.
fn is_lossless(stored: &StoredTensor, format: packed::Format) -> bool {
    match (stored.encoding, &stored.groups, format) {
        (Encoding::Blocks(Kind::Q8_0), _, packed::Format::Q8)
        | (Encoding::Blocks(Kind::Q4_0), _, packed::Format::Q4) => true,
        (Encoding::Blocks(kind), _, packed::Format::Q4Zero) => {
            kind.has_minima() && stored.shape[1].is_multiple_of(packed::BLOCK)
        }
        (Encoding::Grouped, Some(groups), packed::Format::Q4Zero) => {
            groups.bits() == 4 && groups.has_blocks(packed::BLOCK)
        }
        (Encoding::Grouped, Some(groups), packed::Format::Q8) => groups.has_blocks(packed::BLOCK),
        (Encoding::Grouped, Some(groups), packed::Format::Q4) => {
            groups.bits() == 4 && groups.zeros_are(8) && groups.has_blocks(packed::BLOCK)
        }
        _ => false,
    }
}

/// Packs a stored matrix panel by panel on all threads.
pub(super) fn pack_stored(
    shape: packed::Shape,
    stored: &StoredTensor,
    threads: &Threads,
    bytes: &mut [u8],
) {
    if is_lossless(stored, shape.format) {
        return transcribe(shape, stored, threads, bytes);
    }
    let row = |index: usize, out: &mut [f32]| rows(stored, index, out);
    pack_rows(shape, fit::Effort::Search, &row, threads, bytes);
}

/// Row `index` of a stored matrix as f32.
pub(super) fn rows(stored: &StoredTensor, index: usize, out: &mut [f32]) {
    if let Some(groups) = &stored.groups {
        return groups.row(index, out);
    }
    let kind = match stored.encoding {
        Encoding::Numbers(DType::F32) => Kind::F32,
        Encoding::Numbers(DType::F16) => Kind::F16,
        Encoding::Numbers(DType::BF16) => Kind::Bf16,
        Encoding::Blocks(kind) => kind,
        Encoding::Packed | Encoding::Words | Encoding::Grouped => {
            unreachable!("what is packed already is kept, groups are there")
        }
    };
    let size = kind.row_bytes(out.len());
    kind.dequantize(&stored.bytes[index * size..][..size], out);
}

/// Blocks of 32 into ours, weight for weight.
fn transcribe(shape: packed::Shape, stored: &StoredTensor, threads: &Threads, bytes: &mut [u8]) {
    let zeros = shape.format.has_zeros();
    let block = |row: usize, block: usize| match (&stored.groups, stored.encoding) {
        (Some(groups), _) if zeros => {
            let (scale, zero, quants) = groups.block_with_zero(row, block * packed::BLOCK);
            packed::Block {
                scale,
                zero,
                quants,
            }
        }
        (Some(groups), _) => packed::Block::centred(groups.block(row, block * packed::BLOCK)),
        (None, Encoding::Blocks(kind)) => {
            let size = kind.row_bytes(shape.cols);
            let row = &stored.bytes[row * size..][..size];
            match zeros {
                true => {
                    let (scale, minimum, quants) = kind.block_with_minimum(row, block);
                    packed::Block::above(scale, minimum, quants)
                }
                false => {
                    let size = kind.block().1;
                    packed::Block::centred(ggml_block(kind, &row[block * size..][..size]))
                }
            }
        }
        _ => unreachable!("as is_lossless said"),
    };
    threads.each_chunk(bytes, shape.panel_bytes(), &|panel, out| {
        shape.place_panel(panel, &block, out);
    });
}

/// Scale and numbers of a block of Q8_0 or Q4_0.
fn ggml_block(kind: Kind, bytes: &[u8]) -> (f16, [i8; packed::BLOCK]) {
    let scale = f16::from_le_bytes([bytes[0], bytes[1]]);
    let quants = std::array::from_fn(|i| match kind {
        Kind::Q8_0 => bytes[2 + i] as i8,
        _ => (bytes[2 + i % 16] >> (i / 16 * 4) & 15) as i8 - 8,
    });
    (scale, quants)
}

/// The tensor's bytes as they are in the map, or converted to `dtype`; blocks and groups become f32
/// without one.
pub(super) fn convert(stored: StoredTensor, dtype: Option<DType>) -> TensorData {
    let stored_dtype = match stored.encoding {
        Encoding::Numbers(dtype) => burn_dtype(dtype),
        Encoding::Packed => BurnDType::U8,
        Encoding::Words => BurnDType::I32,
        Encoding::Blocks(_) | Encoding::Grouped => {
            let mut numbers = vec![0.0; stored.shape.iter().product()];
            let cols = stored.shape.last().copied().unwrap_or(1);
            for (index, out) in numbers.chunks_mut(cols).enumerate() {
                rows(&stored, index, out);
            }
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

/// A matrix with an adapter added, in the precision that it is stored in; blocks and groups become bf16.
pub(super) fn merged(
    name: &str,
    stored: &StoredTensor,
    adapter: &Adapter,
    threads: &Threads,
) -> StoredTensor {
    let dtype = match stored.encoding {
        Encoding::Numbers(dtype) => dtype,
        _ => DType::BF16,
    };
    let cols = stored.shape.last().copied().unwrap_or(1);
    let n: usize = stored.shape.iter().product();
    let mut bytes = vec![0; n * dtype.size_in_bytes()];
    threads.each_chunk(
        &mut bytes,
        cols * dtype.size_in_bytes(),
        &|index, out: &mut [u8]| {
            let mut row = vec![0.0; cols];
            rows(stored, index, &mut row);
            adapter.add(name, index, &mut row);
            for (x, out) in row.iter().zip(out.chunks_exact_mut(dtype.size_in_bytes())) {
                match dtype {
                    DType::F32 => out.copy_from_slice(&x.to_le_bytes()),
                    DType::F16 => out.copy_from_slice(&f16::from_f32(*x).to_le_bytes()),
                    DType::BF16 => out.copy_from_slice(&bf16::from_f32(*x).to_le_bytes()),
                }
            }
        },
    );
    StoredTensor {
        encoding: Encoding::Numbers(dtype),
        shape: stored.shape.clone(),
        bytes: aligned(bytes.into(), dtype.size_in_bytes()),
        groups: None,
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
            groups: None,
        }
    }

    fn kept(name: &str, stored: StoredTensor, quantization: Option<Quantization>) -> Kept {
        let threads = Threads::start(Some(2), false).expect("threads");
        let mut arena = Arena::default();
        keep_stored(name, stored, None, quantization, true, &threads, &mut arena).expect("kept")
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
    fn blocks_with_a_minimum_are_kept_but_for_what_f16_rounds_away() {
        for (kind, cols) in [(Kind::Q4_1, 96), (Kind::Q4K, 512)] {
            let mut stored = blocks(kind, 37, cols);
            let mut bytes = stored.bytes.to_vec();
            for (i, block) in bytes.chunks_mut(kind.block().1).enumerate() {
                let minimum = f16::from_f32(0.003 * (i % 13) as f32 - 0.01);
                block[2..4].copy_from_slice(&minimum.to_le_bytes());
            }
            stored.bytes = bytes.into();
            let want: Vec<f32> = convert(stored.clone(), None).iter::<f32>().collect();
            let Kept::Packed(shape, bytes) = kept("x.weight", stored.clone(), None) else {
                panic!("packed");
            };
            assert_eq!(shape.format, packed::Format::Q4Zero);
            assert_eq!(kept_bytes("x.weight", &stored, true), bytes.len() as u64);
            let mut row = vec![f32::NAN; cols];
            for (i, want) in want.chunks(cols).enumerate() {
                shape.unpack_row(&bytes, i, &mut row);
                for (got, want) in row.chunks(32).zip(want.chunks(32)) {
                    let most = want.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                    for (got, want) in got.iter().zip(want) {
                        assert!((got - want).abs() <= most * 1e-3, "{kind:?} {got} {want}");
                    }
                }
            }
            // Where the kernels know no zero points.
            let (threads, mut arena) = (
                Threads::start(Some(2), false).expect("threads"),
                Arena::default(),
            );
            let plain = keep_stored("x.weight", stored, None, None, false, &threads, &mut arena);
            let Kept::Packed(shape, _) = plain.expect("kept") else {
                panic!("packed");
            };
            assert_eq!(shape.format, packed::Format::Q8);
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
            groups: None,
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

    #[test]
    fn groups_are_kept_weight_for_weight_where_a_block_has_one_scale() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance/grouped");
        let (q4, q8) = (packed::Format::Q4, packed::Format::Q8);
        let zero = packed::Format::Q4Zero;
        // How far off, of a row's largest number; gptq8 has an eight-bit -128, which is packed anew.
        for (name, format, bound) in [
            ("gptq4", q4, 0.0),
            ("gptq8", q8, 0.005),
            ("awq", zero, 0.0),
            ("gptq4_order", q8, 0.005),
            ("gptq4_v2", q8, 0.005),
        ] {
            let source = crate::checkpoint::Source::from(root.join(name));
            let go_on = &mut |_| std::ops::ControlFlow::Continue(());
            let checkpoint = crate::checkpoint::Checkpoint::open(&source, go_on).expect(name);
            for part in [
                "self_attn.q_proj",
                "self_attn.k_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            ] {
                let matrix = format!("model.layers.0.{part}.weight");
                let stored = checkpoint.tensor(&matrix).expect("there");
                assert_eq!(kept_bytes(&matrix, &stored, true), {
                    let &[rows, cols] = stored.shape.as_slice() else {
                        panic!("a matrix");
                    };
                    packed::Shape { format, rows, cols }.bytes() as u64
                });
                let Kept::Packed(shape, bytes) = kept(&matrix, stored.clone(), None) else {
                    panic!("packed");
                };
                assert_eq!(shape.format, format, "{name}");
                let (mut got, mut want) = (vec![0.0; shape.cols], vec![0.0; shape.cols]);
                for index in 0..shape.rows {
                    shape.unpack_row(&bytes, index, &mut got);
                    rows(&stored, index, &mut want);
                    let most = want.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                    for (got, want) in got.iter().zip(&want) {
                        let near = (got - want).abs() <= bound * most;
                        assert!(near, "{name} {part}: {got} {want}");
                    }
                }
            }
        }
    }
}
