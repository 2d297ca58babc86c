//! Stands in for `qwen2-core/src/ops/mod.rs`, without tensors.

#[path = "../../../../qwen2-core/src/ops/arena.rs"]
pub(crate) mod arena;
#[path = "../../../../qwen2-core/src/ops/codes.rs"]
pub(crate) mod codes;
pub(crate) mod cpu;
#[path = "../../../../qwen2-core/src/ops/fit.rs"]
pub(crate) mod fit;
#[path = "../../../../qwen2-core/src/ops/packed.rs"]
pub(crate) mod packed;
#[path = "../../../../qwen2-core/src/ops/visible.rs"]
mod visible;
#[path = "../../../../qwen2-core/src/ops/watch.rs"]
pub(crate) mod watch;

/// As `ops/key_values.rs` has it.
pub(crate) const PAGE: usize = 512;
