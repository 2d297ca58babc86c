//! Models by their hub id, against a small server in the hub's layout; the settings come from the
//! environment, so each load is a process of its own.
#![cfg(feature = "hub")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use qwen2_core::{Device, Model};
use serde_json::{Value, json};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const ID: &str = "org/tiny-model";
const WEIGHTS: &str = "model.safetensors";

#[test]
fn the_second_load_and_an_offline_load_make_no_request() {
    let hub = Hub::start("tied");
    let first = hub.load(&[]);
    assert_eq!(first["hidden_size"], 32, "{first}");
    let progress = first["progress"].as_array().expect("progress");
    let (done, total): (Vec<u64>, Vec<u64>) = progress
        .iter()
        .map(|pair| {
            (
                pair[0].as_u64().expect("done"),
                pair[1].as_u64().expect("total"),
            )
        })
        .unzip();
    assert_eq!(done.last(), total.last());
    // The download ends at its total, which is the size of the files, before the weights are read.
    let size: u64 = hub.files().values().map(|bytes| bytes.len() as u64).sum();
    assert!(progress.contains(&json!([size, size])), "{size}: {first}");

    let requests = hub.state().requests.len();
    assert!(requests > 0);
    assert_eq!(hub.load(&[])["hidden_size"], 32);
    assert_eq!(hub.load(&[("HF_HUB_OFFLINE", "1")])["hidden_size"], 32);
    assert_eq!(hub.state().requests.len(), requests);
}

#[test]
fn a_model_in_shards_is_found_through_its_index() {
    let hub = Hub::start("bf16_shards");
    assert_eq!(hub.load(&[])["hidden_size"], 32);
    assert_eq!(hub.load(&[("HF_HUB_OFFLINE", "1")])["hidden_size"], 32);
}

#[test]
fn an_empty_cache_in_offline_mode_says_so() {
    let hub = Hub::start("tied");
    let outcome = hub.load(&[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(outcome["kind"], "not_found");
    let message = outcome["message"].as_str().expect("message");
    assert!(
        message.contains(ID) && message.contains("HF_HUB_OFFLINE is set"),
        "{message}"
    );
    assert_eq!(hub.state().requests, [""; 0]);
}

#[test]
fn refusals_of_the_hub_are_typed() {
    let hub = Hub::start("tied");
    for (status, kind) in [
        (404, "not_found"),
        (401, "permission_denied"),
        (403, "permission_denied"),
        (500, "network"),
    ] {
        hub.state().refuse = Some(status);
        let outcome = hub.load(&[]);
        assert_eq!(outcome["kind"], kind, "{status}: {outcome}");
        assert!(outcome["help"].is_string());
    }
    hub.state().refuse = None;
    assert_eq!(
        hub.load(&[("HF_ENDPOINT", "http://127.0.0.1:9")])["kind"],
        "network"
    );
    assert_eq!(hub.load(&[])["hidden_size"], 32);
}

#[test]
fn a_cut_connection_is_a_network_error_and_the_next_load_resumes() {
    let hub = Hub::start("tied");
    hub.state().stop_at = Some((50_000, AtEnd::Close));
    let outcome = hub.load(&[]);
    assert_eq!(outcome["kind"], "network", "{outcome}");
    hub.resumes_from(50_000);
}

#[test]
fn a_process_killed_while_it_downloads_leaves_a_cache_that_works() {
    let hub = Hub::start("tied");
    hub.state().stop_at = Some((50_000, AtEnd::Stall));
    let (mut child, _) = hub.spawn(&[]);
    hub.wait_for_part(50_000);
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert_eq!(hub.load(&[("HF_HUB_OFFLINE", "1")])["kind"], "not_found");
    hub.resumes_from(50_000);
}

#[test]
fn a_download_that_lacked_only_its_last_rename_is_completed() {
    let hub = Hub::start("tied");
    hub.state().stop_at = Some((50_000, AtEnd::Close));
    assert_eq!(hub.load(&[])["kind"], "network");
    fs::write(hub.part().expect("part"), &hub.files()[WEIGHTS]).expect("write");
    hub.resumes_from(hub.files()[WEIGHTS].len() - 1);
}

#[test]
fn a_silent_server_is_given_up_on() {
    let hub = Hub::start("tied");
    hub.state().stop_at = Some((50_000, AtEnd::Stall));
    let outcome = hub.load(&[("HF_HUB_DOWNLOAD_TIMEOUT", "1")]);
    assert_eq!(outcome["kind"], "network");
    assert!(
        outcome["message"]
            .as_str()
            .expect("message")
            .starts_with("download stalled: "),
        "{outcome}"
    );
}

#[test]
fn the_progress_callback_stops_a_download() {
    let hub = Hub::start("tied");
    let outcome = hub.load(&[("QWEN2_TEST_CANCEL", "1")]);
    assert_eq!(outcome["kind"], "cancelled", "{outcome}");
    assert_eq!(hub.load(&[])["hidden_size"], 32);
}

#[test]
fn a_server_that_ignores_ranges_leaves_no_wrong_file() {
    let hub = Hub::start("tied");
    hub.state().stop_at = Some((50_000, AtEnd::Close));
    assert_eq!(hub.load(&[])["kind"], "network");
    {
        let mut state = hub.state();
        state.stop_at = None;
        state.ignore_resume = true;
    }
    // The resumed file is too long, is thrown away, and is fetched again from its start.
    assert_eq!(hub.load(&[])["hidden_size"], 32);
}

#[test]
fn names_from_the_server_do_not_become_paths() {
    let hub = Hub::start("tied");
    hub.state().etag = Some("../../../../escaped".to_owned());
    let outcome = hub.load(&[]);
    assert_eq!(outcome["kind"], "network", "{outcome}");
    assert!(
        outcome["message"]
            .as_str()
            .expect("message")
            .contains("ETag ../"),
        "{outcome}"
    );
}

#[test]
fn the_token_is_sent() {
    let hub = Hub::start("tied");
    assert_eq!(hub.load(&[("HF_TOKEN", "hf_secret")])["hidden_size"], 32);
    assert!(
        hub.state()
            .tokens
            .iter()
            .any(|token| token == "Bearer hf_secret")
    );
}

/// The process that loads; does nothing where the tests run as usual.
#[test]
fn child_loads_what_the_environment_says() {
    let Ok(outcome) = std::env::var("QWEN2_TEST_OUTCOME") else {
        return;
    };
    let cancel = std::env::var_os("QWEN2_TEST_CANCEL").is_some();
    let progress = Arc::new(Mutex::new(Vec::new()));
    let seen = progress.clone();
    let loaded = Model::builder(ID)
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

/// A hub with one model and an empty cache.
struct Hub {
    home: tempfile::TempDir,
    endpoint: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Method, path and range of each request.
    requests: Vec<String>,
    tokens: Vec<String>,
    /// Answer everything with this status.
    refuse: Option<u16>,
    /// Bytes of the weights that are sent, and what happens then.
    stop_at: Option<(usize, AtEnd)>,
    /// Answer a resumed download from the beginning.
    ignore_resume: bool,
    etag: Option<String>,
}

#[derive(Clone, Copy)]
enum AtEnd {
    Close,
    Stall,
}

impl Hub {
    fn start(fixture: &str) -> Self {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance/models");
        let mut files = BTreeMap::new();
        for file in fs::read_dir(models.join(fixture)).expect("fixture") {
            let path = file.expect("entry").path();
            let name = path
                .file_name()
                .expect("name")
                .to_str()
                .expect("text")
                .to_owned();
            if name != "reference.json" {
                files.insert(name, fs::read(path).expect("read"));
            }
        }
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let endpoint = format!("http://{}", listener.local_addr().expect("address"));
        let state = Arc::new(Mutex::new(State {
            files,
            ..State::default()
        }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || answer(stream, &shared));
            }
        });
        Self {
            home: tempfile::tempdir().expect("tempdir"),
            endpoint,
            state,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("lock")
    }

    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        self.state().files.clone()
    }

    fn spawn(&self, environment: &[(&str, &str)]) -> (Child, PathBuf) {
        let outcome = self.home.path().join("outcome.json");
        let _ = fs::remove_file(&outcome);
        let mut command = Command::new(std::env::current_exe().expect("exe"));
        command.args(["child_loads_what_the_environment_says", "--exact"]);
        for (name, _) in std::env::vars_os() {
            let upper = name.to_string_lossy().to_ascii_uppercase();
            if upper.starts_with("HF_") || upper.ends_with("_PROXY") {
                command.env_remove(name);
            }
        }
        command
            .env("HF_HOME", self.home.path())
            .env("HF_ENDPOINT", &self.endpoint);
        command
            .env("QWEN2_TEST_OUTCOME", &outcome)
            .envs(environment.iter().copied());
        (
            command
                .stdout(std::process::Stdio::null())
                .spawn()
                .expect("spawn"),
            outcome,
        )
    }

    /// What a fresh process says: the model's size and progress, or the error.
    fn load(&self, environment: &[(&str, &str)]) -> Value {
        let (mut child, outcome) = self.spawn(environment);
        child.wait().expect("wait");
        serde_json::from_slice(&fs::read(outcome).expect("the child wrote no outcome"))
            .expect("json")
    }

    /// The unfinished file of the weights.
    fn part(&self) -> Option<PathBuf> {
        let blobs = self.home.path().join("hub/models--org--tiny-model/blobs");
        let files = fs::read_dir(blobs).ok()?.flatten().map(|file| file.path());
        files.into_iter().find(|path| {
            path.extension()
                .is_some_and(|extension| extension == "part")
        })
    }

    fn wait_for_part(&self, length: u64) {
        let start = Instant::now();
        while self
            .part()
            .and_then(|part| fs::metadata(part).ok())
            .is_none_or(|part| part.len() < length)
        {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "nothing was downloaded"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// With a server that works again, a load succeeds and asks only for the rest.
    fn resumes_from(&self, byte: usize) {
        self.state().stop_at = None;
        let before = self.state().requests.len();
        let outcome = self.load(&[]);
        assert_eq!(outcome["hidden_size"], 32, "{outcome}");
        let wanted = format!("GET /cdn/{WEIGHTS} bytes={byte}-");
        let requests = self.state().requests[before..].to_vec();
        assert!(
            requests.contains(&wanted),
            "{wanted} is not among {requests:?}"
        );
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().expect("clone"));
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
            break;
        }
        head.push(line.trim().to_owned());
    }
    let Some(request) = head.first() else { return };
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let header = |name: &str| {
        let found = head.iter().filter_map(|line| line.split_once(": "));
        found
            .into_iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.to_owned())
    };
    let range = header("range").unwrap_or_default();
    let mut state = state.lock().expect("lock");
    state.requests.push(format!("GET {path} {range}"));
    state.tokens.extend(header("authorization"));
    let host = header("host").unwrap_or_default();
    let (response, stop) = respond(&state, &path, &range, &host);
    drop(state);
    let _ = stream.write_all(&response);
    if let Some(AtEnd::Stall) = stop {
        // Ends when the client goes.
        let _ = stream.read(&mut [0]);
    }
}

type Response = (Vec<u8>, Option<AtEnd>);

fn plain(status: &str, headers: &str, body: &[u8]) -> Response {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    ([head.as_bytes(), body].concat(), None)
}

/// The bytes of the answer, and what to do behind them instead of closing properly.
fn respond(state: &State, path: &str, range: &str, host: &str) -> Response {
    if let Some(status) = state.refuse {
        return plain(&format!("{status} Refused"), "", b"");
    }
    let api = format!("/api/models/{ID}/revision/");
    if path
        .strip_prefix(&api)
        .is_some_and(|revision| ["main", COMMIT].contains(&revision))
    {
        let names = state.files.keys();
        let siblings: Vec<Value> = names.map(|name| json!({ "rfilename": name })).collect();
        let info = json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        return plain(
            "200 OK",
            "Content-Type: application/json\r\n",
            info.as_bytes(),
        );
    }
    let resolve = [
        format!("/{ID}/resolve/main/"),
        format!("/{ID}/resolve/{COMMIT}/"),
    ];
    let resolved = resolve
        .iter()
        .find_map(|prefix| path.strip_prefix(prefix.as_str()));
    let name = resolved
        .or_else(|| path.strip_prefix("/cdn/"))
        .unwrap_or_default();
    let Some(bytes) = state.files.get(name) else {
        return plain("404 Not Found", "", b"");
    };
    let etag = state.etag.clone().unwrap_or_else(|| tag(bytes));
    let identity = format!("ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\n");
    if resolved == Some(WEIGHTS) {
        // As the hub does with large files.
        let location = format!("Location: http://{host}/cdn/{name}\r\n");
        let headers = format!("{identity}X-Linked-ETag: \"{etag}\"\r\n{location}");
        return plain("302 Found", &headers, b"");
    }
    send(state, name, bytes, range, &identity)
}

/// A file or the part of it that was asked for.
fn send(state: &State, name: &str, bytes: &[u8], range: &str, identity: &str) -> Response {
    let asked = range
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'));
    let number = |text: &str| text.parse::<usize>().ok();
    let (start, end) = asked.map_or((0, None), |(start, end)| {
        (number(start).unwrap_or(0), number(end))
    });
    if start >= bytes.len() {
        return plain("416 Range Not Satisfiable", "", b"");
    }
    let start = if state.ignore_resume && end.is_none() {
        0
    } else {
        start
    };
    let end = end.map_or(bytes.len(), |end| (end + 1).min(bytes.len()));
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nConnection: close\r\nAccept-Ranges: bytes\r\n\
         Content-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\n{identity}\r\n",
        end - start,
        end - 1,
        bytes.len()
    );
    let stop = state
        .stop_at
        .filter(|(limit, _)| name == WEIGHTS && end > *limit);
    let end = stop.map_or(end, |(limit, _)| limit.max(start));
    (
        [head.as_bytes(), &bytes[start..end]].concat(),
        stop.map(|(_, at_end)| at_end),
    )
}

/// FNV-1a, as a stand-in for the hub's hashes.
fn tag(bytes: &[u8]) -> String {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", bytes.iter().fold(0xcbf2_9ce4_8422_2325, mix))
}
