//! Many requests on one model: continuous batching, shared pages of the cache, a fair queue.

mod outlet;
mod prefix;
mod queue;
mod scheduler;
mod settings;
mod spare;
mod stats;
mod worker;

pub use outlet::RequestStream;
pub(crate) use settings::Settings;
pub use settings::WhenFull;
pub use stats::EngineStats;
pub(crate) use worker::{Job, Worker};
