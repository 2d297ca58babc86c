//! An OpenAI-compatible HTTP server over one loaded model; `docs/server.md` tells what it answers.
//!
//! ```no_run
//! use qwen2_core::Model;
//! use qwen2_server::{Server, Settings};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = Model::load("examples/demo-model")?;
//! let server = Server::bind(model, "127.0.0.1:8000", Settings::default())?;
//! println!("http://{}", server.address());
//! server.run()?;
//! # Ok(())
//! # }
//! ```

mod answers;
mod backend;
mod body;
mod chat;
mod completions;
mod connections;
mod embeddings;
mod error;
mod fields;
mod formats;
mod guarded;
mod head;
mod likelihood;
mod messages;
mod metrics;
mod models;
mod options;
mod page;
mod response;
mod routes;
mod server;
mod settings;
mod signals;
mod state;
mod tools;

pub use server::Server;
pub use settings::Settings;
