//! What an engine is built with.

use std::time::Duration;

use qwen2_core::{EngineBuilder, Model, WhenFull};

use crate::arguments::Whole;
use crate::error::Failure;

/// What `Model.engine` was called with; what is not given is the library's default.
pub(crate) struct Settings<'a> {
    pub(crate) max_sequences: Option<Whole>,
    pub(crate) cache_bytes: Option<Whole>,
    pub(crate) prefill_chunk: Option<Whole>,
    pub(crate) queue_limit: Option<Whole>,
    pub(crate) when_full: &'a str,
    /// Seconds.
    pub(crate) reader_patience: Option<f64>,
    pub(crate) prefix_cache: bool,
    pub(crate) deterministic: bool,
}

impl Settings<'_> {
    pub(crate) fn builder(&self, model: &Model) -> Result<EngineBuilder, Failure> {
        let mut builder = model
            .engine()
            .when_full(self.when_full()?)
            .prefix_cache(self.prefix_cache)
            .deterministic(self.deterministic);
        if let Some(n) = self.max_sequences {
            builder = builder.max_sequences(n.setting("max_sequences")?);
        }
        if let Some(bytes) = self.cache_bytes {
            builder = builder.cache_bytes(bytes.setting("cache_bytes")? as u64);
        }
        if let Some(n) = self.prefill_chunk {
            builder = builder.prefill_chunk(n.setting("prefill_chunk")?);
        }
        if let Some(n) = self.queue_limit {
            builder = builder.queue_limit(n.setting("queue_limit")?);
        }
        if let Some(seconds) = self.reader_patience {
            let patience = Duration::try_from_secs_f64(seconds).map_err(|_| {
                Failure::invalid(
                    "setting is out of range",
                    "reader_patience",
                    &seconds.to_string(),
                    "give seconds, 0 or more",
                )
            })?;
            builder = builder.reader_patience(patience);
        }
        Ok(builder)
    }

    fn when_full(&self) -> Result<WhenFull, Failure> {
        match self.when_full {
            "refuse" => Ok(WhenFull::Refuse),
            "wait" => Ok(WhenFull::Wait),
            other => Err(Failure::invalid(
                "unknown answer to a full queue",
                "when_full",
                other,
                "refuse or wait",
            )),
        }
    }
}
