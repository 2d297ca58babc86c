//! What the fuzz targets run: the library's readers, without the tensor library that they do not need.
#![allow(dead_code, unused_imports)] // the sources have more than readers

#[path = "../../qwen2-core/src"]
mod library {
    pub(crate) mod checkpoint;
    pub(crate) mod config;
    pub(crate) mod error;
    pub(crate) mod fence;
    /// Without tensors.
    pub(crate) mod ops {
        pub(crate) mod codes;
    }
    pub(crate) mod text;
}
use library::{checkpoint, config, error, fence, ops, text};

mod budget;
mod entries;
mod sections;

pub mod targets {
    //! By the names of the targets.
    pub use crate::entries::*;
}

#[global_allocator]
static ALLOCATOR: budget::Allocator = budget::unlimited();
