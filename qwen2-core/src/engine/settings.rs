//! What an engine is set up with.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What becomes of a request when the queue is full.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// Submitting it fails at once.
    #[default]
    Refuse,
    /// Submitting it waits until there is room.
    Wait,
}

/// Settings with every value legal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Sequences that are computed together.
    pub(crate) max_sequences: usize,
    /// Bytes that caches and shared prefixes may take together.
    pub(crate) cache_bytes: u64,
    /// Tokens of prompts that one step reads.
    pub(crate) prefill_chunk: usize,
    /// Requests that may wait.
    pub(crate) queue_limit: usize,
    pub(crate) when_full: WhenFull,
    /// How long a reader may leave unread all that there is room for.
    pub(crate) reader_patience: Duration,
    /// Whether what prompts have in common is computed once.
    pub(crate) prefix_cache: bool,
    /// Whether a request gets the same tokens alone and among others.
    pub(crate) deterministic: bool,
}
