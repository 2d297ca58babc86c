#![doc = include_str!("../README.md")]

mod api;
mod checkpoint;
mod config;
mod device;
mod engine;
mod error;
mod exclusive;
mod fence;
mod generate;
mod model;
mod ops;
#[doc(hidden)]
pub mod profile;
mod text;

#[doc(hidden)]
pub use api::SessionRun;
pub use api::{
    AdapterInfo, CheckpointInfo, Engine, EngineBuilder, Logits, Memory, Model, ModelBuilder,
    Perplexity, Pooling, Prompt, Quantization, Request, Session, SessionStream, convert, inspect,
    inspect_adapter, instruction_set, merge_lora, quantize, weight_bytes,
};
pub use checkpoint::{Progress, Source};
pub use config::{
    DType, DualChunkAttention, GenerationConfig, GroupMethod, GroupQuantization, KvCacheType,
    LongContext, ModelConfig, MoeConfig, RopeScaling,
};
pub use device::{Device, DeviceReport};
pub use engine::{EngineStats, RequestStream, WhenFull};
pub use error::{Error, ErrorKind, Result};
#[doc(hidden)]
pub use exclusive::{Exclusive, ExclusiveGuard};
#[doc(hidden)]
pub use fence::fenced;
pub use generate::{
    BadWord, CancelToken, Constraint, FinishReason, GenerateOptions, Generation, LogitsProcessor,
    Logprobs, OnPrefill, Piece, PrefillProgress, StopMatch, Timings, TokenLogprob, TokenStream,
    Usage,
};
pub use text::{Message, Tokenizer, Tool, ToolCall, ToolChoice, ToolFormat};
