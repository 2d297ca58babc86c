//! Stands in for `qwen2-core/src/ops/mod.rs`, without tensors.

pub(crate) mod cpu;
#[path = "../../../../qwen2-core/src/ops/packed.rs"]
pub(crate) mod packed;
#[path = "../../../../qwen2-core/src/ops/visible.rs"]
mod visible;
pub(crate) use visible::Visible;
