//! A small server in the layouts of both hubs, and the environment of a process that loads from it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const ID: &str = "org/tiny-model";
pub const WEIGHTS: &str = "model.safetensors";
/// Files from this size on lie elsewhere, as the hub's large files do.
const LARGE: usize = 20_000;

/// A hub with one model and empty caches.
pub struct Hub {
    pub home: tempfile::TempDir,
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
pub struct State {
    pub files: BTreeMap<String, Vec<u8>>,
    /// Path and range of each request.
    pub requests: Vec<String>,
    /// Path, `Authorization` and `Cookie` of each request that has one of them.
    pub tokens: Vec<(String, String)>,
    /// Answer everything with this status.
    pub refuse: Option<u16>,
    /// Bytes of a large file that are sent, and what happens then.
    pub stop_at: Option<(usize, AtEnd)>,
    /// Answer a resumed download from the beginning.
    pub ignore_resume: bool,
    /// Send a wrong byte.
    pub damage: bool,
    /// Wait so long before a large file.
    pub delay: Duration,
    /// List names and nothing else, as a plain mirror may.
    pub names_only: bool,
    pub etag: Option<String>,
    /// Storage is spoken to as the hub is.
    pub scheme: &'static str,
    /// The branches and tags, beside the commit itself.
    pub revisions: Vec<String>,
}

#[derive(Clone, Copy)]
pub enum AtEnd {
    Close,
    Stall,
}

impl Hub {
    /// With the files of a fixture.
    pub fn start(fixture: &str) -> Self {
        let directory = self::fixture("models").join(fixture);
        Self::with(files_of(&directory, "reference.json"))
    }

    /// Over TLS, with a certificate of an authority that nobody knows.
    pub fn encrypted(fixture: &str) -> Self {
        let directory = self::fixture("models").join(fixture);
        let chain = CertificateDer::pem_file_iter(certificate("server.pem")).expect("file");
        let chain = chain.map(|item| item.expect("certificate")).collect();
        let key = PrivateKeyDer::from_pem_file(certificate("server.key")).expect("key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("certificate of the key");
        let files = files_of(&directory, "reference.json");
        Self::serve(files, Some(Arc::new(config)))
    }

    pub fn with(files: BTreeMap<String, Vec<u8>>) -> Self {
        Self::serve(files, None)
    }

    fn serve(files: BTreeMap<String, Vec<u8>>, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let scheme = if tls.is_some() { "https" } else { "http" };
        let address = listener.local_addr().expect("address");
        let endpoint = format!("{scheme}://{address}");
        let state = Arc::new(Mutex::new(State {
            files,
            scheme,
            revisions: vec!["main".to_owned(), "master".to_owned()],
            ..State::default()
        }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shared, tls) = (shared.clone(), tls.clone());
                std::thread::spawn(move || match tls {
                    None => answer(stream, &shared),
                    Some(config) => {
                        let server = ServerConnection::new(config).expect("config");
                        answer(StreamOwned::new(server, stream), &shared);
                    }
                });
            }
        });
        Self {
            home: tempfile::tempdir().expect("tempdir"),
            endpoint,
            state,
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("lock")
    }

    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        self.state().files.clone()
    }

    pub fn n_requests(&self) -> usize {
        self.state().requests.len()
    }

    /// How often the contents of `name` were sent from their start.
    pub fn n_downloads(&self, name: &str) -> usize {
        let wanted = format!("/cdn/{name} ");
        let requests = self.state().requests.clone();
        requests.iter().filter(|path| **path == wanted).count()
    }

    /// The environment of a load, before it starts.
    pub fn command(&self, environment: &[(&str, &str)], outcome: &Path) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("exe"));
        command.args(["child_loads_what_the_environment_says", "--exact"]);
        for (name, _) in std::env::vars_os() {
            let upper = name.to_string_lossy().to_ascii_uppercase();
            let ours = ["HF_", "MODELSCOPE_", "QWEN2_", "SSL_CERT_", "REQUESTS_CA_"];
            if ours.iter().any(|prefix| upper.starts_with(prefix)) || upper.ends_with("_PROXY") {
                command.env_remove(name);
            }
        }
        command
            .env("HF_HOME", self.home.path())
            .env("HF_ENDPOINT", &self.endpoint)
            .env("MODELSCOPE_CACHE", self.home.path().join("modelscope"))
            .env("MODELSCOPE_ENDPOINT", &self.endpoint)
            .env("QWEN2_TEST_OUTCOME", outcome)
            .envs(environment.iter().copied())
            .stdout(Stdio::null());
        command
    }

    pub fn spawn(&self, environment: &[(&str, &str)], outcome: &str) -> (Child, PathBuf) {
        let outcome = self.home.path().join(outcome);
        let _ = fs::remove_file(&outcome);
        let mut command = self.command(environment, &outcome);
        (command.spawn().expect("spawn"), outcome)
    }

    /// What a fresh process says: the model's size and progress, or the error.
    pub fn load(&self, environment: &[(&str, &str)]) -> Value {
        let (mut child, outcome) = self.spawn(environment, "outcome.json");
        child.wait().expect("wait");
        read_outcome(&outcome)
    }

    /// As [`Self::load`] of another id.
    pub fn load_id(&self, id: &str, environment: &[(&str, &str)]) -> Value {
        let mut environment = environment.to_vec();
        environment.push(("QWEN2_TEST_ID", id));
        self.load(&environment)
    }

    /// The unfinished large file.
    pub fn part(&self) -> Option<PathBuf> {
        let incomplete = |path: &PathBuf| path.to_string_lossy().ends_with(".incomplete");
        all_files(self.home.path()).into_iter().find(incomplete)
    }

    pub fn wait_for_part(&self, length: u64) {
        let start = Instant::now();
        let long = |part: PathBuf| fs::metadata(part).is_ok_and(|part| part.len() >= length);
        while !self.part().is_some_and(long) {
            let waited = start.elapsed();
            assert!(waited < Duration::from_secs(60), "nothing was downloaded");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// With a server that works again, a load succeeds and asks only for the rest of the weights.
    pub fn resumes_from(&self, byte: usize, environment: &[(&str, &str)]) {
        self.state().stop_at = None;
        let before = self.n_requests();
        let outcome = self.load(environment);
        assert_eq!(outcome["hidden_size"], 32, "{outcome}");
        let wanted = format!("/cdn/{WEIGHTS} bytes={byte}-");
        let requests = self.state().requests[before..].to_vec();
        assert!(
            requests.contains(&wanted),
            "{wanted} is not among {requests:?}"
        );
    }

    /// No name but those of unfinished files stands for less than the hub has.
    pub fn assert_that_no_file_is_wrong(&self) {
        let files = self.files();
        for path in all_files(self.home.path()) {
            let Some(right) = path.file_name().and_then(|name| files.get(name.to_str()?)) else {
                continue;
            };
            assert_eq!(&fs::read(&path).expect("read"), right, "{}", path.display());
        }
    }
}

pub fn fixture(path: &str) -> PathBuf {
    let conformance = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance");
    conformance.join(path)
}

/// One of the files that `certificates/make` has made.
pub fn certificate(name: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    tests.join("hub/certificates").join(name)
}

pub fn read_outcome(outcome: &Path) -> Value {
    let text = fs::read(outcome).expect("the child wrote no outcome");
    serde_json::from_slice(&text).expect("json")
}

/// The files of a directory by name, all but `except`.
pub fn files_of(directory: &Path, except: &str) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for file in fs::read_dir(directory).expect("fixture") {
        let path = file.expect("entry").path();
        let name = path.file_name().expect("name").to_str().expect("text");
        if name != except {
            files.insert(name.to_owned(), fs::read(&path).expect("read"));
        }
    }
    files
}

/// Every file below a directory; links count as files.
pub fn all_files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => found.extend(all_files(&path)),
            false => found.push(path),
        }
    }
    found
}

fn answer(mut stream: impl Read + Write, state: &Mutex<State>) {
    let mut reader = BufReader::new(&mut stream);
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
    let delay = {
        let mut state = state.lock().expect("lock");
        state.requests.push(format!("{path} {range}"));
        let tokens = [header("authorization"), header("cookie")];
        let tokens = tokens.into_iter().flatten();
        state
            .tokens
            .extend(tokens.map(|token| (path.clone(), token)));
        state.delay
    };
    if path.starts_with("/cdn/") {
        std::thread::sleep(delay);
    }
    let host = header("host").unwrap_or_default();
    // Another name of this machine, as storage is another machine.
    let storage = host.replace("127.0.0.1", "localhost");
    let (response, stop) = respond(&state.lock().expect("lock"), &path, &range, &storage);
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

fn json_answer(value: &Value) -> Response {
    let body = value.to_string();
    plain(
        "200 OK",
        "Content-Type: application/json\r\n",
        body.as_bytes(),
    )
}

/// The bytes of the answer, and what to do behind them instead of closing properly.
fn respond(state: &State, path: &str, range: &str, storage: &str) -> Response {
    if let Some(status) = state.refuse {
        return plain(&format!("{status} Refused"), "", b"");
    }
    let known =
        |revision: &str| revision == COMMIT || state.revisions.iter().any(|it| it == revision);
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{ID}/revision/")) {
        return match known(revision.trim_end_matches("?blobs=true")) {
            true => json_answer(&hugging_face_listing(state)),
            false => plain("404 Not Found", "", b""),
        };
    }
    if let Some(query) = path.strip_prefix(&format!("/api/v1/models/{ID}/repo/files?Revision=")) {
        return match query.strip_suffix("&Recursive=True").is_some_and(known) {
            true => json_answer(&model_scope_listing(state)),
            false => {
                let message = "revision not found";
                json_answer(&json!({ "Code": 404, "Success": false, "Message": message }))
            }
        };
    }
    let model_scope = path.strip_prefix(&format!("/api/v1/models/{ID}/repo?Revision="));
    let hugging_face = path.strip_prefix(&format!("/{ID}/resolve/"));
    let asked = model_scope
        .and_then(|query| query.split_once("&FilePath="))
        .or_else(|| hugging_face?.split_once('/'))
        .filter(|(revision, _)| known(revision));
    let name = asked.map(|(_, name)| name.replace("%2F", "/"));
    let on_cdn = path.strip_prefix("/cdn/").map(str::to_owned);
    let Some((name, bytes)) = name
        .as_ref()
        .or(on_cdn.as_ref())
        .and_then(|name| state.files.get_key_value(name))
    else {
        return plain("404 Not Found", "", b"");
    };
    let etag = state.etag.clone().unwrap_or_else(|| tag(bytes));
    let identity = format!("ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\n");
    if bytes.len() >= LARGE && on_cdn.is_none() {
        let scheme = state.scheme;
        let location = format!("Location: {scheme}://{storage}/cdn/{name}\r\n");
        let size = format!("X-Linked-Size: {}\r\n", bytes.len());
        let headers = format!("{identity}X-Linked-ETag: \"{etag}\"\r\n{size}{location}");
        return plain("302 Found", &headers, b"");
    }
    send(state, bytes, range, &identity)
}

fn hugging_face_listing(state: &State) -> Value {
    let sibling = |(name, bytes): (&String, &Vec<u8>)| {
        let tag = state.etag.clone().unwrap_or_else(|| tag(bytes));
        match (
            state.names_only,
            bytes.len() >= LARGE && state.etag.is_none(),
        ) {
            (true, _) => json!({ "rfilename": name }),
            (false, true) => json!({
                "rfilename": name, "size": bytes.len(), "blobId": "0123abcd",
                "lfs": { "sha256": tag, "size": bytes.len(), "pointerSize": 135 },
            }),
            (false, false) => json!({ "rfilename": name, "size": bytes.len(), "blobId": tag }),
        }
    };
    let siblings: Vec<Value> = state.files.iter().map(sibling).collect();
    json!({ "sha": COMMIT, "siblings": siblings })
}

fn model_scope_listing(state: &State) -> Value {
    let file = |(name, bytes): (&String, &Vec<u8>)| json!({ "Path": name, "Type": "blob", "Size": bytes.len(), "Sha256": sha256(bytes) });
    let mut files: Vec<Value> = state.files.iter().map(file).collect();
    files.push(json!({ "Path": "folder", "Type": "tree", "Size": 0, "Sha256": "" }));
    json!({ "Code": 200, "Success": true, "Data": { "Files": files } })
}

/// A file or the part of it that was asked for.
fn send(state: &State, bytes: &[u8], range: &str, identity: &str) -> Response {
    let asked = range
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'));
    let number = |text: &str| text.parse::<usize>().ok();
    let (start, end) = asked.map_or((0, None), |(start, end)| {
        (number(start).unwrap_or(0), number(end))
    });
    if start > 0 && start >= bytes.len() {
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
        end.saturating_sub(1),
        bytes.len()
    );
    let large = bytes.len() >= LARGE;
    let stop = state.stop_at.filter(|(limit, _)| large && end > *limit);
    let end = stop.map_or(end, |(limit, _)| limit.max(start));
    let mut body = bytes[start..end].to_vec();
    if let Some(last) = body.last_mut().filter(|_| large && state.damage) {
        *last ^= 1;
    }
    let at_end = stop.map(|(_, at_end)| at_end);
    ([head.as_bytes(), &body].concat(), at_end)
}

/// The hub's own names: sha256 for large files, another hash for the others.
fn tag(bytes: &[u8]) -> String {
    let digits = sha256(bytes);
    match bytes.len() >= LARGE {
        true => digits,
        false => digits[..40].to_owned(),
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    let mut digits = String::new();
    for byte in Sha256::digest(bytes) {
        let _ = write!(digits, "{byte:02x}");
    }
    digits
}
