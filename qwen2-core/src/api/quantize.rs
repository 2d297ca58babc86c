//! Matrices into blocks of few bits: while loading, or once and for all in a directory.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::str::FromStr;

use burn::tensor::{Bytes, DType as BurnDType, TensorData};
use serde_json::json;

use super::builder::start_threads;
use super::convert::{is_gguf, quantize_gguf};
use super::stored::{convert, pack_stored};
use crate::checkpoint::write::{self, Planned};
use crate::checkpoint::{Checkpoint, Encoding, Progress, Source, StoredTensor, cancelled, names};
use crate::config::{DType, PACKED, PACKED_VERSION};
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Kept, SCREEN};
use crate::ops::arena::{Arena, Piece};
use crate::ops::{Threads, fit, packed};

/// Fewer bits for the matrices: blocks of 32 weights with one scale.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// 8.5 bits a weight.
    Q8,
    /// 4.5 bits a weight; embedding and head keep 8.5.
    Q4,
}

impl Quantization {
    /// `q8` or `q4`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }

    /// The format of the matrix `name`; `None`: it stays as it is stored.
    pub(super) fn format(self, name: &str) -> Option<packed::Format> {
        // Routers are small, and a wrong choice of experts costs more than their bytes.
        if ["mlp.gate.weight", "mlp.shared_expert_gate.weight"]
            .iter()
            .any(|router| name.ends_with(router))
        {
            return None;
        }
        // The head decides between tokens by small differences: it keeps eight bits.
        let outer = ["model.embed_tokens.weight", "lm_head.weight"].contains(&name);
        Some(match self {
            Self::Q4 if !outer => packed::Format::Q4,
            _ => packed::Format::Q8,
        })
    }
}

impl FromStr for Quantization {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "q8" => Ok(Self::Q8),
            "q4" => Ok(Self::Q4),
            _ => Err(
                Error::new(ErrorKind::InvalidArgument, "unknown quantization")
                    .with_key("quantize")
                    .with_why(format!("`{}`", text.escape_debug()))
                    .with_help("one of q8, q4"),
            ),
        }
    }
}

/// Packs the checkpoint `source` into the new directory `destination`, which loads at once, since
/// nothing is left to do, and takes less room. Its files are those of `source` but for the weights
/// and a `quantization_config` in `config.json`. One matrix at a time is in memory.
///
/// If the name of `destination` ends in `.gguf` it becomes a GGUF file instead, for llama.cpp and its
/// like, with the same weights in the types `Q8_0` and `Q4_0`.
///
/// # Errors
/// As [`ModelBuilder::load`](crate::ModelBuilder::load) for `source`; `InvalidArgument` if it is
/// packed already or `destination` exists; `Io` for what cannot be written. `destination` is there
/// whole or not at all.
pub fn quantize(
    source: impl Into<Source>,
    destination: impl AsRef<Path>,
    quantization: Quantization,
    mut progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<()> {
    let checkpoint = Checkpoint::open(&source.into(), &mut progress)?;
    refuse_packed(&checkpoint, "quantize")?;
    if is_gguf(destination.as_ref()) {
        let destination = destination.as_ref();
        return quantize_gguf(&checkpoint, destination, quantization, &mut progress);
    }
    let tied = names::audit(&checkpoint)?;
    let threads = start_threads(None, false)?;
    let mut plan: Vec<_> = names::expected(&checkpoint.config, tied)
        .into_iter()
        .map(|(name, shape)| {
            let (encoding, shape) = match (shape.as_slice(), quantization.format(&name)) {
                (&[rows, cols], Some(format)) => {
                    let shape = packed::Shape { format, rows, cols };
                    let shape = vec![shape.panels(), shape.panel_bytes()];
                    (Encoding::Packed, shape)
                }
                ([_, _], None) => match checkpoint.tensor(&name)?.encoding {
                    stored @ Encoding::Numbers(_) => (stored, shape),
                    _ => (Encoding::Numbers(DType::F32), shape),
                },
                _ => (Encoding::Numbers(DType::F32), shape),
            };
            Ok(Planned {
                name,
                encoding,
                shape,
            })
        })
        .collect::<Result<_>>()?;
    // Panels are whole cache lines: before the vectors, they stay in line.
    plan.sort_by_key(|tensor| tensor.encoding != Encoding::Packed);
    let (mut done, total) = (0, checkpoint.total_bytes());
    let bits = match quantization {
        Quantization::Q8 => 8,
        Quantization::Q4 => 4,
    };
    let config = json!({ "quant_method": PACKED, "version": PACKED_VERSION, "bits": bits });
    write::write(
        &checkpoint,
        destination.as_ref(),
        &|file| {
            file.insert("quantization_config".to_owned(), config.clone());
        },
        &plan,
        &mut |tensor| {
            let stored = checkpoint.tensor(&tensor.name)?;
            done += stored.stored_bytes();
            let format = quantization.format(&tensor.name);
            let bytes = match (tensor.encoding, stored.shape.as_slice(), format) {
                (Encoding::Packed, &[rows, cols], Some(format)) => {
                    let shape = packed::Shape { format, rows, cols };
                    let mut bytes = vec![0; shape.bytes()];
                    pack_stored(shape, &stored, &threads, &mut bytes);
                    bytes
                }
                (Encoding::Numbers(dtype), ..) => convert(stored, Some(dtype)).as_bytes().to_vec(),
                _ => unreachable!("planned as packed for its format"),
            };
            checkpoint.release(&tensor.name);
            match progress(Progress::new(done, total)) {
                ControlFlow::Continue(()) => Ok(bytes),
                ControlFlow::Break(()) => Err(cancelled(checkpoint.path())),
            }
        },
    )
}

/// What is packed cannot be kept in another way; `key` is the setting that asks for it.
pub(super) fn refuse_packed(checkpoint: &Checkpoint, key: &str) -> Result<()> {
    if !checkpoint.config.packed {
        return Ok(());
    }
    Err(
        Error::new(ErrorKind::InvalidArgument, "checkpoint is packed already")
            .with_path(checkpoint.path())
            .with_key(key)
            .with_help("leave the setting out, or start from the checkpoint that it was made of"),
    )
}

/// A tensor packed, if it is a matrix and that was asked for, else as it is.
///
/// # Errors
/// `OutOfMemory` where there is no room.
pub(super) fn keep(
    name: &str,
    data: TensorData,
    quantization: Option<Quantization>,
    threads: &Threads,
    arena: &mut Arena,
) -> Result<Kept> {
    let format = quantization.and_then(|quantization| quantization.format(name));
    let (Some(format), &[rows, cols]) = (format, data.shape().as_slice()) else {
        return Ok(Kept::Dense(data)); // not asked for, or a vector
    };
    let shape = packed::Shape { format, rows, cols };
    let mut piece = take(arena, name, shape.bytes())?;
    pack(shape, &data, threads, &mut piece);
    Ok(Kept::Packed(shape, shared(piece.into_bytes())))
}

/// A copy of a packed head in four bits that ranks tokens; nothing for another head.
///
/// # Errors
/// `OutOfMemory` where there is no room.
pub(super) fn screen(head: &Kept, threads: &Threads, arena: &mut Arena) -> Result<Option<Kept>> {
    let Kept::Packed(from, bytes) = head else {
        return Ok(None);
    };
    let shape = packed::Shape {
        format: packed::Format::Q4,
        ..*from
    };
    let mut piece = take(arena, SCREEN, shape.bytes())?;
    let row = |index: usize, out: &mut [f32]| from.unpack_row(bytes, index, out);
    pack_rows(shape, fit::Effort::Rank, &row, threads, &mut piece);
    Ok(Some(Kept::Packed(shape, shared(piece.into_bytes()))))
}

/// A copy outside of the file, made on all threads.
///
/// # Errors
/// `OutOfMemory` where there is no room.
pub(super) fn copy(name: &str, kept: Kept, threads: &Threads, arena: &mut Arena) -> Result<Kept> {
    let mut copied = |bytes: &[u8]| {
        const PART: usize = 1 << 20;
        let mut piece = take(arena, name, bytes.len())?;
        threads.each_chunk(&mut piece, PART, &|part, to| {
            let from = &bytes[part * PART..];
            to.copy_from_slice(&from[..to.len()]);
        });
        Ok(shared(piece.into_bytes()))
    };
    Ok(match kept {
        Kept::Dense(data) => {
            let (shape, dtype) = (data.shape().clone(), data.dtype());
            Kept::Dense(TensorData::from_bytes(
                copied(data.as_bytes())?,
                shape,
                dtype,
            ))
        }
        Kept::Packed(shape, bytes) => Kept::Packed(shape, copied(&bytes)?),
    })
}

pub(super) fn take(arena: &mut Arena, name: &str, len: usize) -> Result<Piece> {
    arena.take(len).map_err(|error| {
        Error::new(ErrorKind::OutOfMemory, "no memory for the weights")
            .with_key(name)
            .with_why(error.to_string())
            .with_help("choose a smaller model, or fewer bits with quantize")
            .with_source(error)
    })
}

pub(super) fn shared(bytes: bytes::Bytes) -> Bytes {
    Bytes::from_shared(bytes, burn::tensor::AllocationProperty::File)
}

/// A stored packed matrix; `shapes` are those of the config.
///
/// # Errors
/// `InvalidFile` if its panels are of no format that fits the config.
pub(super) fn keep_packed(
    name: &str,
    stored: StoredTensor,
    shapes: &HashMap<String, Vec<usize>>,
    path: &Path,
) -> Result<Kept> {
    let fits = |format| match *shapes.get(name)?.as_slice() {
        [rows, cols] => {
            let shape = packed::Shape { format, rows, cols };
            (stored.shape == [shape.panels(), shape.panel_bytes()]).then_some(shape)
        }
        _ => None,
    };
    let shape = fits(packed::Format::Q8).or_else(|| fits(packed::Format::Q4));
    let Some(shape) = shape else {
        return Err(
            Error::new(ErrorKind::InvalidFile, "packed tensor has the wrong shape")
                .with_path(path)
                .with_key(name)
                .with_why(format!(
                    "{:?} is neither q8 nor q4 of the config's shape",
                    stored.shape
                ))
                .with_help("do config.json and the weights belong to one checkpoint?"),
        );
    };
    Ok(Kept::Packed(shape, shared(stored.bytes)))
}

/// Packs a matrix panel by panel, on all threads.
fn pack(shape: packed::Shape, data: &TensorData, threads: &Threads, bytes: &mut [u8]) {
    let stored = data.as_bytes();
    let size = data.dtype().size();
    let row = |index: usize, out: &mut [f32]| {
        let row = &stored[index * shape.cols * size..][..shape.cols * size];
        for (out, x) in out.iter_mut().zip(row.chunks_exact(size)) {
            *out = match data.dtype() {
                BurnDType::BF16 => half::bf16::from_le_bytes([x[0], x[1]]).to_f32(),
                BurnDType::F16 => half::f16::from_le_bytes([x[0], x[1]]).to_f32(),
                _ => f32::from_le_bytes([x[0], x[1], x[2], x[3]]),
            };
        }
    };
    pack_rows(shape, fit::Effort::Search, &row, threads, bytes);
}

/// Packs rows, which `row` writes as f32, panel by panel on all threads.
pub(super) fn pack_rows(
    shape: packed::Shape,
    effort: fit::Effort,
    row: &(dyn Fn(usize, &mut [f32]) + Sync),
    threads: &Threads,
    bytes: &mut [u8],
) {
    threads.each_chunk(bytes, shape.panel_bytes(), &|panel, out| {
        shape.pack_panel(panel, effort, &|index, out| row(index, out), out);
    });
}
