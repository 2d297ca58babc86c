//! What an engine is doing.

use serde::Serialize;

/// Counters of an engine, since its start where nothing else is said.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EngineStats {
    /// Requests that wait to be started, now.
    pub waiting: usize,
    /// Requests that are computed, now.
    pub running: usize,
    /// Requests that were submitted.
    pub submitted: u64,
    /// Requests that ended, cancelled and failed ones included.
    pub finished: u64,
    /// Requests that ended with an error.
    pub failed: u64,
    /// Requests whose cache was dropped for lack of memory, to be computed again.
    pub preempted: u64,
    /// Steps of the network.
    pub steps: u64,
    /// Tokens of prompts that were computed.
    pub prompt_tokens: u64,
    /// Tokens of prompts that were shared with earlier requests.
    pub cached_tokens: u64,
    /// Tokens that were generated.
    pub completion_tokens: u64,
    /// Bytes of caches and shared prefixes, now.
    pub cache_bytes: u64,
    /// Bytes that they may take.
    pub cache_limit: u64,
}
