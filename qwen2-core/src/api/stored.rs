//! A stored tensor on its way into the network: converted, packed, or as it is.

use burn::tensor::{Bytes, DType as BurnDType, TensorData};
use half::{bf16, f16};

use super::quantize::{Quantization, keep, pack_rows, shared, take};
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::gguf::blocks::Kind;
use crate::checkpoint::groups::Groups;
use crate::checkpoint::{Encoding, StoredTensor, aligned};
use crate::config::DType;
use crate::error::Result;
use crate::model::Kept;
use crate::ops::arena::Arena;
use crate::ops::packed::Beside;
use crate::ops::{Threads, fit, packed};

/// The tensor in `dtype` or packed, where one of them is asked for; else blocks of another format
/// packed without loss where ours can hold them, in q8 where not, and everything else as it is.
/// `beside`: whether the device takes blocks that have more than a scale.
///
/// # Errors
/// `OutOfMemory` where there is no room.
pub(super) fn keep_stored(
    name: &str,
    stored: StoredTensor,
    dtype: Option<DType>,
    quantization: Option<Quantization>,
    beside: bool,
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
        (None, None) => format_of(name, &stored, beside),
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
pub(super) fn kept_bytes(name: &str, stored: &StoredTensor, beside: bool) -> u64 {
    let bytes = match (stored.encoding, stored.shape.as_slice()) {
        (Encoding::Blocks(_) | Encoding::Grouped, &[rows, cols]) => {
            match format_of(name, stored, beside) {
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
fn format_of(name: &str, stored: &StoredTensor, beside: bool) -> Option<packed::Format> {
    use packed::Format::{Q4, Q4Zero, Q8, Q8Halves, Q8Zero};
    let q8 = Quantization::Q8.format(name)?;
    // The smallest first.
    let formats = [Q4, Q4Zero, Q8, Q8Zero, Q8Halves];
    let found = formats
        .into_iter()
        .filter(|format| beside || format.is_plain())
        .find(|format| is_lossless(stored, *format));
    Some(found.unwrap_or(q8))
}

/// Whether our format holds the matrix weight for weight; with anything beside scales but for what f16
/// rounds away of them.
fn is_lossless(stored: &StoredTensor, format: packed::Format) -> bool {
    use packed::Format::{Q4, Q4Zero, Q8, Q8Halves, Q8Zero};
    let (kind, groups) = match (stored.encoding, &stored.groups) {
        (Encoding::Blocks(kind), _) => (kind, None),
        (Encoding::Grouped, Some(groups)) => (Kind::F32, Some(groups)),
        _ => return false,
    };
    if let Some(groups) = groups {
        let four = groups.bits() == 4;
        return groups.has_blocks(packed::BLOCK)
            && match format {
                Q4 => four && groups.zeros_are(8),
                Q4Zero => four,
                Q8 => true,
                Q8Zero | Q8Halves => false,
            };
    }
    stored.shape[1].is_multiple_of(packed::BLOCK)
        && match format {
            Q4 => kind == Kind::Q4_0,
            Q4Zero => kind.bits_above_minima() == Some(4),
            Q8 => kind.has_scales(),
            Q8Zero => kind.bits_above_minima().is_some(),
            Q8Halves => kind == Kind::Q6K,
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
    let block = |row: usize, block: usize| match (&stored.groups, stored.encoding) {
        (Some(groups), _) => group_block(groups, shape.format, row, block * packed::BLOCK),
        (None, Encoding::Blocks(kind)) => {
            let size = kind.row_bytes(shape.cols);
            ggml_block(
                kind,
                shape.format,
                &stored.bytes[row * size..][..size],
                block,
            )
        }
        _ => unreachable!("as is_lossless said"),
    };
    threads.each_chunk(bytes, shape.panel_bytes(), &|panel, out| {
        shape.place_panel(panel, &block, out);
    });
}

/// A block of GPTQ or AWQ, from column `column` on.
fn group_block(
    groups: &Groups,
    format: packed::Format,
    row: usize,
    column: usize,
) -> packed::Block {
    match format.beside() {
        Beside::Zeros => {
            let (scale, zero, quants) = groups.block_with_zero(row, column);
            packed::Block {
                scale,
                other: zero,
                quants,
            }
        }
        _ => packed::Block::centred(groups.block(row, column)),
    }
}

/// Block `index` of a row of GGUF.
fn ggml_block(kind: Kind, format: packed::Format, row: &[u8], index: usize) -> packed::Block {
    if format.beside() == Beside::Zeros {
        let (scale, minimum, quants) = kind.block_with_minimum(row, index);
        return packed::Block::above(scale, minimum, quants);
    }
    let numbers = kind.numbers(row, index);
    match kind.scale_of(row, index) {
        // A scale of f16 times an integer is exact in f32, and so is the way back.
        Some(scale) if scale.to_f32() == 0.0 => packed::Block::centred((scale, [0; packed::BLOCK])),
        Some(scale) => {
            let quants = numbers.map(|x| (x / scale.to_f32()).round());
            packed::Block::centred(match quants.iter().all(|q| q.abs() <= 127.0) {
                true => (scale, quants.map(|q| q as i8)),
                false => fit::quantize(format, fit::Effort::Search, &numbers),
            })
        }
        None => packed::Block::halves(Kind::half_scales(row, index), &numbers),
    }
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
            let scale = f16::from_f32(0.01 * (i % 17) as f32 - 0.05).to_le_bytes();
            block[..2].copy_from_slice(&scale);
            if kind == Kind::Q3K {
                block[108..].copy_from_slice(&scale);
                // No scale of -32, which makes an eight-bit 128 of a -4.
                block[104..108].iter_mut().for_each(|high| *high |= 0x55);
            }
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
        for (kind, format, cols) in [
            (Kind::Q8_0, packed::Format::Q8, 32),
            (Kind::Q4_0, packed::Format::Q4, 32),
            (Kind::Q5_0, packed::Format::Q8, 32),
            (Kind::Iq4Nl, packed::Format::Q8, 32),
            (Kind::Q3K, packed::Format::Q8, 256),
        ] {
            for (rows, cols) in [(16, 2 * cols), (37, 3 * cols), (5, cols)] {
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
        for (kind, cols, format) in [
            (Kind::Q4_1, 96, packed::Format::Q4Zero),
            (Kind::Q4K, 512, packed::Format::Q4Zero),
            (Kind::Q5_1, 96, packed::Format::Q8Zero),
            (Kind::Q5K, 512, packed::Format::Q8Zero),
            (Kind::Q6K, 512, packed::Format::Q8Halves),
        ] {
            let mut stored = blocks(kind, 37, cols);
            let mut bytes = stored.bytes.to_vec();
            for (i, block) in bytes.chunks_mut(kind.block().1).enumerate() {
                let minimum = f16::from_f32(0.003 * (i % 13) as f32 - 0.01).to_le_bytes();
                match kind {
                    Kind::Q6K => block[208..].copy_from_slice(&minimum), // its scale
                    _ => block[2..4].copy_from_slice(&minimum),
                }
            }
            stored.bytes = bytes.into();
            let want: Vec<f32> = convert(stored.clone(), None).iter::<f32>().collect();
            let Kept::Packed(shape, bytes) = kept("x.weight", stored.clone(), None) else {
                panic!("packed");
            };
            assert_eq!(shape.format, format);
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
            // Where the kernels know nothing but scales.
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
    fn a_block_of_three_bits_that_takes_nine_is_packed_anew() {
        // Scales of -32 times numbers of -4.
        let mut block = vec![0; 110];
        block[108..].copy_from_slice(&f16::ONE.to_le_bytes());
        let stored = StoredTensor {
            encoding: Encoding::Blocks(Kind::Q3K),
            shape: vec![1, 256],
            bytes: block.into(),
            groups: None,
        };
        let Kept::Packed(shape, bytes) = kept("x.weight", stored, None) else {
            panic!("packed");
        };
        let mut row = [0.0; 256];
        shape.unpack_row(&bytes, 0, &mut row);
        assert!(row.iter().all(|x| (x - 128.0).abs() < 0.6), "{row:?}");
    }

    #[test]
    fn other_blocks_become_q8_and_a_router_stays_whole() {
        let Kept::Packed(shape, _) = kept("x.weight", blocks(Kind::Q2K, 4, 256), None) else {
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
