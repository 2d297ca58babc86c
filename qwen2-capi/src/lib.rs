//! The C interface: the verbs of `qwen2-core` behind opaque handles; its manual is
//! `include/qwen2.h`.
#![allow(
    unsafe_code,
    reason = "the border to C; what turns pointers into references is in fence.rs"
)]
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "every entry is an unsafe function as a whole: its contract is the header"
)]
#![allow(
    clippy::missing_safety_doc,
    reason = "the contract of every entry is stated once, at the head of the header"
)]
#![allow(non_camel_case_types, reason = "these are C's names")]

mod adapter;
mod calls;
mod courier;
mod embed;
mod engine;
mod error;
mod fence;
mod generation;
mod inspect;
mod last;
mod load;
mod log;
mod logprobs;
mod model;
mod options;
mod processor;
mod prompt;
mod request;
mod session;
mod stream;
mod tokenizer;
mod tools;
mod values;
mod version;

pub use adapter::*;
pub use calls::*;
pub use embed::*;
pub use engine::*;
pub use error::*;
pub use generation::*;
pub use inspect::*;
pub use load::*;
pub use log::*;
pub use logprobs::*;
pub use model::*;
pub use options::*;
pub use processor::*;
pub use prompt::*;
pub use request::*;
pub use session::*;
pub use stream::*;
pub use tokenizer::*;
pub use tools::*;
pub use values::*;
pub use version::*;
