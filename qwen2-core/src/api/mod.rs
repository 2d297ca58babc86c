//! What a program sees: the model handle, its builder and its sessions.

mod builder;
mod convert;
mod draft;
mod embed;
mod engine;
mod inspect;
mod model;
mod perplexity;
mod quantize;
mod session;
mod stored;
mod tokenizer;

/// The instruction set that the kernels of the processor use: `portable`; on x86-64 `avx2`, `avx512`,
/// `avx512-vnni` or `amx`; on aarch64 `neon`, `neon-dotprod` or `neon-i8mm`. The variable `QWEN2_CPU`
/// picks a lesser one.
pub fn instruction_set() -> &'static str {
    crate::ops::instruction_set()
}

pub use builder::ModelBuilder;
pub use convert::{convert, merge_lora};
pub use embed::Pooling;
pub use engine::{Engine, EngineBuilder, Request};
pub use inspect::{AdapterInfo, CheckpointInfo, inspect, inspect_adapter, weight_bytes};
pub use model::{Logits, Memory, Model, Prompt};
pub use perplexity::Perplexity;
pub use quantize::{Quantization, quantize};
pub use session::{Session, SessionRun, SessionStream};
