//! The built program does what its help says, for people and for machines.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod bench;
mod chat;
mod errors;
mod generate;
mod info;
mod quantize;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Outcome {
    fn success(&self) {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
    }

    fn json(&self) -> Value {
        self.success();
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen2"));
    command
        .args(args)
        // The demo model is unpacked here, not in the home of whoever runs the tests.
        .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn finish(mut child: Child, stdin: &[u8]) -> Outcome {
    child.stdin.take().unwrap().write_all(stdin).unwrap();
    let output = child.wait_with_output().unwrap();
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn qwen2_with(args: &[&str], stdin: &[u8]) -> Outcome {
    finish(command(args).spawn().unwrap(), stdin)
}

fn qwen2(args: &[&str]) -> Outcome {
    qwen2_with(args, b"")
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn tied() -> String {
    root().join("conformance/models/tied").display().to_string()
}

fn demo() -> String {
    root().join("examples/demo-model").display().to_string()
}

/// The tied fixture with room for a million tokens: greedy, it goes on until it is stopped.
fn endless(directory: &Path) -> String {
    for name in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        std::fs::copy(Path::new(&tied()).join(name), directory.join(name)).unwrap();
    }
    let path = directory.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["max_position_embeddings"] = 1_000_000.into();
    std::fs::write(path, config.to_string()).unwrap();
    directory.display().to_string()
}

fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}
