//! What whoever runs a server may set.

use std::time::Duration;

use qwen2_core::Pooling;

/// Settings of a server; start from [`Settings::default`].
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct Settings {
    /// The name under which clients ask for the model. Default: the model's own.
    pub name: Option<String>,
    /// What clients must send as `Authorization: Bearer KEY`. Default: nothing.
    pub api_key: Option<String>,
    /// Most bytes of a request's body. Default: 8 MiB.
    pub max_body: usize,
    /// Most new tokens of one answer; a request for more is refused. Default: to the end of the context.
    pub max_new_tokens: Option<usize>,
    /// What becomes of the hidden states of a text's tokens in its embedding. Default: their mean.
    pub pooling: Pooling,
    /// Answers that are computed together; each weight is read once for all of them. Default: 64.
    pub max_running: usize,
    /// Answers that may wait for their turn; more are refused with 429. Default: 128.
    pub max_waiting: usize,
    /// Bytes that the caches of answers and shared beginnings of prompts may take together. Default: those
    /// of four answers that fill the context.
    pub cache_memory: Option<u64>,
    /// Whether the beginning that a prompt shares with earlier ones is computed once. Default: true.
    pub prefix_cache: bool,
    /// Whether an answer is the same alone and among others, to the last bit; slower. Default: false.
    pub deterministic: bool,
    /// Connections that are open at the same time; more wait to be accepted. Default: 1024.
    pub max_connections: usize,
    /// Longest time from a request to the end of its answer. Default: 10 minutes.
    pub timeout: Duration,
    /// How long a client may send nothing of a request that it has begun, or read nothing of an answer.
    /// Default: 30 seconds.
    pub patience: Duration,
    /// How long running answers may go on when the server ends. Default: 30 seconds.
    pub grace: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            name: None,
            api_key: None,
            max_body: 8 << 20,
            max_new_tokens: None,
            pooling: Pooling::Mean,
            max_running: 64,
            max_waiting: 128,
            cache_memory: None,
            prefix_cache: true,
            deterministic: false,
            max_connections: 1024,
            timeout: Duration::from_secs(600),
            patience: Duration::from_secs(30),
            grace: Duration::from_secs(30),
        }
    }
}
