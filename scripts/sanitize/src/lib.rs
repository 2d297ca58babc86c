//! The unsafe code of `qwen2-core/src/ops`, and the loader's memory, with their unit tests.
#![allow(dead_code)]

#[path = "../../../qwen2-core/src/arena.rs"]
mod arena;
#[path = "../../../qwen2-core/src/fence.rs"]
mod fence;
mod ops;
