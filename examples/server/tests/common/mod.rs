//! A server on a free port, and a client that can send what no real one would.
#![allow(clippy::unwrap_used, dead_code)] // a panic is how a test fails; no test uses all of it

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use qwen2_core::Model;
use qwen2_server::{Server, Settings};
use serde_json::{Value, json};
use tokio::sync::oneshot;

/// Longest that anything here may take, on a busy machine.
pub const LONG: Duration = Duration::from_secs(60);

/// A server that ends with its scope.
pub struct Running {
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub fn demo() -> Model {
    load(&root().join("examples/demo-model"))
}

fn load(directory: &Path) -> Model {
    Model::builder(directory).threads(1).load().unwrap()
}

/// A tiny model with room for a million tokens: greedy, it goes on until it is stopped.
pub fn endless() -> Model {
    let directory = tempfile::tempdir().unwrap();
    for name in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        let from = root().join("conformance/models/tied").join(name);
        std::fs::copy(from, directory.path().join(name)).unwrap();
    }
    let path = directory.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["max_position_embeddings"] = 1_000_000.into();
    std::fs::write(path, config.to_string()).unwrap();
    load(directory.path())
}

/// A request that the endless model never finishes.
pub fn endless_request(stream: bool) -> Value {
    json!({"prompt": "hello", "max_tokens": 900_000, "temperature": 0, "ignore_eos": true, "stream": stream})
}

pub fn start(model: Model, settings: Settings) -> Running {
    let server = Server::bind(model, "127.0.0.1:0", settings).unwrap();
    let address = server.address();
    let (stop, stopped) = oneshot::channel();
    let thread = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let shutdown = async {
            let _ = stopped.await;
        };
        runtime.block_on(server.serve(shutdown)).unwrap();
        runtime.shutdown_timeout(LONG);
    });
    Running {
        address,
        stop: Some(stop),
        thread: Some(thread),
    }
}

impl Running {
    /// Asks the server to end.
    pub fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    /// Sends bytes as they are and reads to the end of the connection.
    pub fn raw(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        read_reply(stream)
    }

    pub fn get(&self, path: &str) -> Reply {
        self.raw(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    pub fn post_bytes(&self, path: &str, body: &[u8]) -> Reply {
        self.raw(&post_request(path, body))
    }

    /// The value of a metric without labels.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .parse()
            .unwrap()
    }

    pub fn wait_for_metric(&self, name: &str, value: f64) {
        let start = Instant::now();
        while self.metric(name) != value {
            assert!(start.elapsed() < LONG, "{name} does not become {value}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The server answers as if nothing had been.
    pub fn is_well(&self) {
        let health = self.get("/health");
        assert_eq!(
            (health.status, health.body.as_str()),
            (200, r#"{"status":"ok"}"#)
        );
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.stop.is_some() {
            self.stop();
        }
        let outcome = self.thread.take().unwrap().join();
        if !thread::panicking() {
            outcome.unwrap();
        }
    }
}

pub fn post_request(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// What comes until the server closes the connection.
pub fn read_reply(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no head: {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let head = head.to_ascii_lowercase();
    let body = match head.contains("transfer-encoding: chunked") {
        true => unchunked(body),
        false => body.to_owned(),
    };
    Reply { status, head, body }
}

fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        whole.push_str(&rest[..length]);
        body = &rest[length + 2..];
    }
    whole
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// The error, in the shape that OpenAI's clients read.
    pub fn error(&self) -> Value {
        let body = self.json();
        let error = body["error"]
            .as_object()
            .unwrap_or_else(|| panic!("no error: {}", self.body));
        let keys: Vec<_> = error.keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(!error["message"].as_str().unwrap().is_empty());
        assert!(
            self.head.contains("content-type: application/json"),
            "{}",
            self.head
        );
        body["error"].clone()
    }

    /// The chunks of a stream, and whether it was closed by `[DONE]`.
    pub fn events(&self) -> (Vec<Value>, bool) {
        assert!(
            self.head.contains("content-type: text/event-stream"),
            "{}",
            self.head
        );
        let mut events: Vec<&str> = self.body.split("\n\n").collect();
        assert_eq!(events.pop(), Some(""));
        events.retain(|event| !event.starts_with(':'));
        let done = events.pop_if(|event| *event == "data: [DONE]").is_some();
        let parse =
            |event: &&str| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
        (events.iter().map(parse).collect(), done)
    }
}
