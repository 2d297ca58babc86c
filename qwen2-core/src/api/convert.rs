//! A checkpoint in another form: safetensors or GGUF, in full precision or quantized as GGUF.

use std::ops::ControlFlow;
use std::path::Path;

use serde_json::json;

use super::builder::start_threads;
use super::quantize::{Quantization, refuse_packed};
use super::stored::{convert as convert_tensor, merged, rows};
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::gguf::blocks::Kind;
use crate::checkpoint::gguf::write as gguf;
use crate::checkpoint::write::{self, Planned};
use crate::checkpoint::{Checkpoint, Encoding, Progress, Source, cancelled, names};
use crate::config::DType;
use crate::error::Result;
use crate::ops::{Threads, fit, packed};

/// Converts the checkpoint `source` into `destination`: a GGUF file if its name ends in `.gguf`, else a
/// directory of safetensors with `config.json` and the tokenizer. Weights are written as `dtype`, or as
/// they are stored; blocks of a GGUF file become what they stand for, in bf16 unless `dtype` says
/// otherwise. Vectors of a GGUF file are f32, as ggml wants them.
///
/// # Errors
/// As [`ModelBuilder::load`](crate::ModelBuilder::load) for `source`; `InvalidArgument` if it is packed
/// or `destination` exists; `Unsupported` for what GGUF cannot say; `Io` for what cannot be written.
/// `destination` is there whole or not at all.
pub fn convert(
    source: impl Into<Source>,
    destination: impl AsRef<Path>,
    dtype: Option<DType>,
    mut progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<()> {
    convert_merged(
        &source.into(),
        destination.as_ref(),
        dtype,
        None,
        &mut progress,
    )
}

/// As [`convert`], with the LoRA adapter in the directory `adapter` added to the weights.
///
/// # Errors
/// As [`convert`]; `NotFound`, `InvalidFile` and `Unsupported` for the adapter, which must be PEFT's in
/// safetensors form and for this model.
pub fn merge_lora(
    source: impl Into<Source>,
    adapter: impl AsRef<Path>,
    destination: impl AsRef<Path>,
    dtype: Option<DType>,
    mut progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<()> {
    let adapter = Some(Adapter::open(adapter.as_ref())?);
    convert_merged(
        &source.into(),
        destination.as_ref(),
        dtype,
        adapter,
        &mut progress,
    )
}

fn convert_merged(
    source: &Source,
    destination: &Path,
    dtype: Option<DType>,
    adapter: Option<Adapter>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<()> {
    let checkpoint = Checkpoint::open(source, progress)?;
    refuse_packed(&checkpoint, "convert")?;
    let tied = names::audit(&checkpoint)?;
    if let Some(adapter) = &adapter {
        adapter.check(&names::expected(&checkpoint.config, tied))?;
    }
    let written = |name: &str| -> Result<DType> {
        Ok(match (dtype, checkpoint.tensor(name)?.encoding) {
            (Some(dtype), _) | (None, Encoding::Numbers(dtype)) => dtype,
            (None, _) => DType::BF16,
        })
    };
    if is_gguf(destination) {
        let kind = |name: &str, _| written(name).map(plain);
        let tensors = Seen::new(&checkpoint, adapter, progress)?;
        return write_gguf(tensors, tied, destination, &kind);
    }
    let mut plan = Vec::new();
    for (name, shape) in names::expected(&checkpoint.config, tied) {
        let encoding = Encoding::Numbers(written(&name)?);
        plan.push(Planned {
            name,
            encoding,
            shape,
        });
    }
    let matrices = plan.iter().find(|tensor| tensor.shape.len() == 2);
    let most = matrices.map(|tensor| written(&tensor.name)).transpose()?;
    let mut seen = Seen::new(&checkpoint, adapter, progress)?;
    write::write(
        &checkpoint,
        destination,
        &|config| {
            if let Some(dtype) = most {
                config.insert("torch_dtype".to_owned(), json!(dtype.torch_name()));
                config.remove("dtype");
            }
            config.remove("quantization_config"); // of groups, which are numbers now
        },
        &plan,
        &mut |tensor| {
            let stored = seen.take(&tensor.name)?;
            let Encoding::Numbers(dtype) = tensor.encoding else {
                unreachable!("planned as numbers");
            };
            Ok(convert_tensor(stored, Some(dtype)).as_bytes().to_vec())
        },
    )
}

/// As [`super::quantize::quantize`] for a GGUF file.
pub(super) fn quantize_gguf(
    checkpoint: &Checkpoint,
    destination: &Path,
    quantization: Quantization,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<()> {
    let tied = names::audit(checkpoint)?;
    let kind = |name: &str, cols: usize| -> Result<Kind> {
        Ok(match quantization.format(name) {
            Some(packed::Format::Q8) if cols.is_multiple_of(packed::BLOCK) => Kind::Q8_0,
            Some(packed::Format::Q4) if cols.is_multiple_of(packed::BLOCK) => Kind::Q4_0,
            // ggml has no part of a block.
            _ => match checkpoint.tensor(name)?.encoding {
                Encoding::Numbers(dtype) => plain(dtype),
                _ => Kind::F32,
            },
        })
    };
    write_gguf(
        Seen::new(checkpoint, None, progress)?,
        tied,
        destination,
        &kind,
    )
}

/// Whether the name of a file says that it is GGUF.
pub(super) fn is_gguf(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

fn plain(dtype: DType) -> Kind {
    match dtype {
        DType::F32 => Kind::F32,
        DType::F16 => Kind::F16,
        DType::BF16 => Kind::Bf16,
    }
}

fn write_gguf(
    mut seen: Seen<'_>,
    tied: bool,
    destination: &Path,
    kind: &dyn Fn(&str, usize) -> Result<Kind>,
) -> Result<()> {
    let checkpoint = seen.checkpoint;
    let plan = gguf::plan(&checkpoint.config, tied, kind)?;
    gguf::write(checkpoint, destination, &plan, &mut |name, kind| {
        let stored = seen.take(name)?;
        let as_dtype = |dtype| {
            convert_tensor(stored.clone(), Some(dtype))
                .as_bytes()
                .to_vec()
        };
        Ok(match kind {
            Kind::F32 => as_dtype(DType::F32),
            Kind::F16 => as_dtype(DType::F16),
            Kind::Bf16 => as_dtype(DType::BF16),
            kind => {
                let cols = stored.shape.last().copied().unwrap_or_default();
                let row = |index: usize, out: &mut [f32]| rows(&stored, index, out);
                blocks(kind, stored.shape[0], cols, &row, &seen.threads)
            }
        })
    })
}

/// Rows in ggml's blocks, with the scales that our own packing finds.
fn blocks(
    kind: Kind,
    n_rows: usize,
    cols: usize,
    row: &(dyn Fn(usize, &mut [f32]) + Sync),
    threads: &Threads,
) -> Vec<u8> {
    let row_bytes = kind.row_bytes(cols);
    let mut bytes = vec![0; n_rows * row_bytes];
    threads.each_chunk(&mut bytes, row_bytes, &|index, out| {
        let mut numbers = vec![0.0; cols];
        row(index, &mut numbers);
        let (_, size) = kind.block();
        let numbers = numbers.as_chunks::<{ packed::BLOCK }>().0;
        for (block, out) in numbers.iter().zip(out.chunks_exact_mut(size)) {
            let format = match kind {
                Kind::Q8_0 => packed::Format::Q8,
                _ => packed::Format::Q4,
            };
            let (scale, quants) = fit::quantize(format, fit::Effort::Search, block);
            out[..2].copy_from_slice(&scale.to_le_bytes());
            for (i, out) in out[2..].iter_mut().enumerate() {
                *out = match kind {
                    Kind::Q8_0 => quants[i] as u8,
                    _ => (quants[i] + 8) as u8 | ((quants[i + 16] + 8) as u8) << 4,
                };
            }
        }
    });
    bytes
}

/// The checkpoint's tensors one after the other, with the progress.
struct Seen<'a> {
    checkpoint: &'a Checkpoint,
    adapter: Option<Adapter>,
    threads: Threads,
    progress: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    done: u64,
    last: Option<String>,
}

impl<'a> Seen<'a> {
    fn new(
        checkpoint: &'a Checkpoint,
        adapter: Option<Adapter>,
        progress: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Self> {
        Ok(Self {
            checkpoint,
            adapter,
            threads: start_threads(None, false)?,
            progress,
            done: 0,
            last: None,
        })
    }

    /// The next tensor; the memory of the one before may go.
    fn take(&mut self, name: &str) -> Result<crate::checkpoint::StoredTensor> {
        if let Some(last) = self.last.replace(name.to_owned()) {
            self.checkpoint.release(&last);
        }
        let stored = self.checkpoint.tensor(name)?;
        self.done += stored.stored_bytes();
        let total = self.checkpoint.total_bytes();
        match (self.progress)(Progress::new(self.done, total)) {
            ControlFlow::Continue(()) => Ok(match &self.adapter {
                Some(adapter) if adapter.changes(name) => {
                    merged(name, &stored, adapter, &self.threads)
                }
                _ => stored,
            }),
            ControlFlow::Break(()) => Err(cancelled(self.checkpoint.path())),
        }
    }
}
