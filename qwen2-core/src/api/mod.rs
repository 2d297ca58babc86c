//! What a program sees: the model handle, its builder and its sessions.

mod builder;
mod model;
mod session;

pub use builder::{ModelBuilder, Quantization};
pub use model::{Logits, Memory, Model, Prompt};
pub use session::{Session, SessionRun, SessionStream};
