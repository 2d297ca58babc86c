//! The kernels of `qwen2-core/src/ops` and the memory that they work on, with their unit tests.
#![allow(dead_code)]

#[path = "../../../qwen2-core/src/fence.rs"]
mod fence;
mod ops;
