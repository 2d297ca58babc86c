//! The unsafe code of `qwen2-core/src/ops` with its unit tests, as a crate of its own.
#![allow(dead_code)]

#[path = "../../../qwen2-core/src/fence.rs"]
mod fence;
mod ops;
