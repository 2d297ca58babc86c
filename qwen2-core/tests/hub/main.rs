//! Models by their hub id, against a small server in the hubs' layouts; the settings come from the
//! environment, so each load is a process of its own.
#![cfg(feature = "hub")]

mod faults;
mod gguf;
mod huggingface;
mod modelscope;
mod server;
mod tls;

use std::fs;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use qwen2_core::{Device, Model};
use serde_json::json;

/// The process that loads; does nothing where the tests run as usual.
#[test]
fn child_loads_what_the_environment_says() {
    let Ok(outcome) = std::env::var("QWEN2_TEST_OUTCOME") else {
        return;
    };
    let id = std::env::var("QWEN2_TEST_ID").unwrap_or_else(|_| server::ID.to_owned());
    let cancel = std::env::var_os("QWEN2_TEST_CANCEL").is_some();
    let progress = Arc::new(Mutex::new(Vec::new()));
    let seen = progress.clone();
    let builder = match std::env::var("QWEN2_TEST_ADAPTER") {
        Ok(adapter) => Model::builder(server::fixture("models/tied")).adapter(adapter),
        Err(_) => Model::builder(id),
    };
    let loaded = builder
        .device(Device::cpu())
        .progress(move |progress| {
            seen.lock()
                .expect("lock")
                .push([progress.bytes_done, progress.bytes_total]);
            if cancel {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .load();
    let text = match loaded {
        Ok(model) => json!({
            "hidden_size": model.config().hidden_size,
            "progress": *progress.lock().expect("lock"),
        }),
        Err(error) => json!({
            "kind": error.kind().name(), "message": error.to_string(), "help": error.help(),
        }),
    };
    fs::write(outcome, text.to_string()).expect("outcome");
}
