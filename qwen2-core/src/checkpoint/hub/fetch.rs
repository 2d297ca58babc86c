//! Downloading a model with the `hf-hub` crate, on a thread of its own.
//!
//! hf-hub 0.5 and not 1.0, which needs tokio, reqwest and xet and whose blocking client panics
//! inside tokio (huggingface/hf-hub#182). What 0.5 does not do is done here: it neither checks the
//! size of what it received, nor resumes a download that was complete but for its last rename, nor
//! can it be stopped, nor does it ever give up on a silent server.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::super::shards;
use super::super::{Progress, cancelled};
use super::{CachedModel, HubSettings, MAIN, OPTIONAL, REQUIRED, is_hash};
use crate::config::one_line;
use crate::error::{Error, ErrorKind, Result};

/// Tries per file without a new byte.
const ATTEMPTS: u32 = 3;
/// Progress is reported at most this often.
const REPORT_EVERY: Duration = Duration::from_millis(100);

/// Downloads what the cache lacks of the model `id`, at the revision `commit` or else at `main`.
///
/// # Errors
/// As [`super::directory`].
pub(super) fn fetch(
    id: &str,
    commit: Option<&str>,
    settings: &HubSettings,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<PathBuf> {
    let (events, reports) = mpsc::channel();
    let revision = commit.unwrap_or(MAIN).to_owned();
    let job = (id.to_owned(), settings.clone());
    let worker = thread::Builder::new()
        .name("qwen2-hub".to_owned())
        .spawn(move || {
            Download::new(&job.0, &job.1, &events).and_then(|download| download.run(&revision))
        })
        .map_err(|error| Error::io("cannot start a thread", &settings.cache, error))?;
    loop {
        match reports.recv_timeout(settings.stall) {
            // Returning drops `reports`, which stops the worker at its next report.
            Ok(report) if progress(report).is_break() => return Err(cancelled(&settings.cache)),
            Ok(_) => {}
            // The worker cannot be woken from its read; it ends when the system closes the socket.
            Err(RecvTimeoutError::Timeout) => {
                let why = format!("no byte in {} s", settings.stall.as_secs());
                return Err(network("download stalled", id, why));
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    worker.join().unwrap_or_else(|_| {
        Err(network(
            "download failed",
            id,
            "the hub's answer is not what hf-hub expects".to_owned(),
        ))
    })
}

struct Download<'a> {
    id: &'a str,
    settings: &'a HubSettings,
    events: &'a Sender<Progress>,
    api: Api,
}

/// One file to fetch, as the hub describes it.
struct Wanted {
    name: String,
    size: u64,
    blob: PathBuf,
}

impl<'a> Download<'a> {
    fn new(id: &'a str, settings: &'a HubSettings, events: &'a Sender<Progress>) -> Result<Self> {
        let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
            .with_endpoint(settings.endpoint.clone())
            .with_token(settings.token.clone())
            .with_user_agent("qwen2-core", env!("CARGO_PKG_VERSION"))
            .with_progress(false)
            .build()
            .map_err(|error| hub_error(id, &settings.cache, error))?;
        Ok(Self {
            id,
            settings,
            events,
            api,
        })
    }

    fn run(&self, revision: &str) -> Result<PathBuf> {
        let info = match self.repo(revision).0.info() {
            // The cached revision is gone from the hub.
            Err(error) if revision != MAIN && status(&error) == Some(404) => {
                self.repo(MAIN).0.info()
            }
            info => info,
        };
        let info = info.map_err(|error| self.error("", error))?;
        if !is_hash(&info.sha) {
            return Err(self.unusable("", "revision", &info.sha));
        }
        // By its commit: all files are of one revision, whatever is pushed meanwhile, and
        // `refs/main` is written only when all of them are there.
        let (repo, cache) = self.repo(&info.sha);
        let on_hub: BTreeSet<&str> = info
            .siblings
            .iter()
            .map(|file| file.rfilename.as_str())
            .collect();
        let mut names: Vec<String> = REQUIRED.iter().map(|&name| name.to_owned()).collect();
        names.extend(
            OPTIONAL
                .iter()
                .filter(|name| on_hub.contains(*name))
                .map(|&name| name.to_owned()),
        );
        names.extend(self.weight_files(&repo, &cache, &info.sha, &on_hub)?);
        self.get_all(&repo, &cache, &info.sha, &names)?;
        self.finish(&info.sha, &on_hub)
            .map_err(|error| Error::io("cache cannot be written", &self.settings.cache, error))
    }

    fn repo(&self, revision: &str) -> (ApiRepo, CacheRepo) {
        let repo = Repo::with_revision(self.id.to_owned(), RepoType::Model, revision.to_owned());
        (
            self.api.repo(repo.clone()),
            Cache::new(self.settings.cache.clone()).repo(repo),
        )
    }

    /// The weight files of the model; the index is fetched to learn the names of the shards.
    fn weight_files(
        &self,
        repo: &ApiRepo,
        cache: &CacheRepo,
        commit: &str,
        on_hub: &BTreeSet<&str>,
    ) -> Result<Vec<String>> {
        if on_hub.contains(shards::SINGLE) {
            return Ok(vec![shards::SINGLE.to_owned()]);
        }
        if !on_hub.contains(shards::INDEX) {
            return Err(Error::new(ErrorKind::NotFound, "model has no safetensors weights")
                .with_key(self.id)
                .with_help("choose the checkpoint with model.safetensors, not GGUF or pytorch_model.bin"));
        }
        self.get_all(repo, cache, commit, &[shards::INDEX.to_owned()])?;
        let path = cache.pointer_path(commit).join(shards::INDEX);
        let index =
            fs::read(&path).map_err(|error| Error::io("file cannot be read", &path, error))?;
        let shards: BTreeSet<String> = shards::parse_index(&index, &path)?.into_values().collect();
        Ok(shards.into_iter().collect())
    }

    /// Fetches those of `names` that the cache does not have.
    fn get_all(
        &self,
        repo: &ApiRepo,
        cache: &CacheRepo,
        commit: &str,
        names: &[String],
    ) -> Result<()> {
        let snapshot = cache.pointer_path(commit);
        let mut wanted = Vec::new();
        let mut total = 0;
        for name in names.iter().filter(|name| !snapshot.join(name).is_file()) {
            let file = self.describe(repo, cache, commit, name)?;
            total += file.size;
            wanted.push(file);
            self.report(0, total);
        }
        let mut before = 0;
        for file in &wanted {
            let linked = link_blob(file, &snapshot)
                .map_err(|error| Error::io("cache cannot be written", &snapshot, error))?;
            if !linked {
                self.get(repo, file, before, total)?;
            }
            before += file.size;
        }
        Ok(())
    }

    /// What the hub says of a file. Its tag and revision become names in the cache, so they are
    /// checked before hf-hub joins them to a path.
    fn describe(
        &self,
        repo: &ApiRepo,
        cache: &CacheRepo,
        commit: &str,
        name: &str,
    ) -> Result<Wanted> {
        let metadata = self
            .api
            .metadata(&repo.url(name))
            .map_err(|error| self.error(name, error))?;
        if metadata.commit_hash() != commit {
            return Err(self.unusable(name, "revision", metadata.commit_hash()));
        }
        let tag = metadata.etag();
        if !is_hash(
            &tag.strip_prefix("W/")
                .unwrap_or(tag)
                .replace(['-', '_'], ""),
        ) {
            return Err(self.unusable(name, "ETag", tag));
        }
        Ok(Wanted {
            name: name.to_owned(),
            size: metadata.size() as u64,
            blob: cache.blob_path(tag),
        })
    }

    fn get(&self, repo: &ApiRepo, file: &Wanted, before: u64, total: u64) -> Result<()> {
        let part = file.blob.with_extension("part");
        let mut attempt = 0;
        loop {
            let start = length(&part);
            repair_part(file)
                .map_err(|error| Error::io("cache cannot be written", &part, error))?;
            let meter = Meter {
                download: self,
                before,
                file: 0,
                total,
                reported: Instant::now(),
            };
            let error = match repo.download_with_progress(&file.name, meter) {
                Ok(path) if fs::metadata(&path).is_ok_and(|it| it.len() == file.size) => {
                    return Ok(());
                }
                Ok(path) => self.discard(file, &path)?,
                Err(error) => self.error(&file.name, error),
            };
            attempt = if length(&part) > start {
                1
            } else {
                attempt + 1
            };
            if error.kind() != ErrorKind::Network || attempt >= ATTEMPTS {
                return Err(error);
            }
            tracing::debug!(%error, file = file.name, attempt, "download is tried again");
            thread::sleep(Duration::from_millis(300) * attempt);
        }
    }

    /// Removes a file of the wrong size: from a server that answers a resumed download from the
    /// beginning, or from one that closes early without having told a length.
    fn discard(&self, file: &Wanted, path: &Path) -> Result<Error> {
        for written in [path, &file.blob] {
            // Without symbolic links the two are one file.
            match fs::remove_file(written) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("cache cannot be written", written, error));
                }
                _ => {}
            }
        }
        let why = format!("expected {} bytes", file.size);
        Ok(network(
            "download has the wrong size",
            &self.key(&file.name),
            why,
        ))
    }

    /// Marks what the hub does not have, then makes the revision the current one.
    fn finish(&self, commit: &str, on_hub: &BTreeSet<&str>) -> io::Result<PathBuf> {
        let main = Repo::new(self.id.to_owned(), RepoType::Model);
        let mut cached = CachedModel::new(self.id, self.settings);
        cached.commit = Some(commit.to_owned());
        for name in OPTIONAL.iter().filter(|name| !on_hub.contains(*name)) {
            cached.mark_no_exist(name)?;
        }
        Cache::new(self.settings.cache.clone())
            .repo(main)
            .create_ref(commit)?;
        Ok(cached.snapshot())
    }

    /// Ends this thread by unwinding if nobody waits for it any more: hf-hub has no other way to
    /// stop a download. A program that aborts on panic downloads the file to its end instead.
    fn report(&self, done: u64, total: u64) {
        if self.events.send(Progress::new(done, total)).is_err() && cfg!(panic = "unwind") {
            resume_unwind(Box::new("nobody waits for this download"));
        }
    }

    fn key(&self, name: &str) -> String {
        if name.is_empty() {
            self.id.to_owned()
        } else {
            format!("{}/{name}", self.id)
        }
    }

    fn error(&self, name: &str, error: ApiError) -> Error {
        hub_error(&self.key(name), &self.settings.cache, error)
    }

    fn unusable(&self, name: &str, what: &str, value: &str) -> Error {
        network(
            "hub's answer is unusable",
            &self.key(name),
            format!("{what} {}", one_line(value)),
        )
    }
}

/// Counts the bytes of one file.
struct Meter<'a, 'b> {
    download: &'a Download<'b>,
    before: u64,
    file: u64,
    total: u64,
    reported: Instant,
}

impl hf_hub::api::Progress for Meter<'_, '_> {
    fn init(&mut self, _size: usize, _name: &str) {
        self.file = 0;
    }

    fn update(&mut self, size: usize) {
        self.file += size as u64;
        if self.reported.elapsed() >= REPORT_EVERY {
            self.reported = Instant::now();
            self.download.report(self.before + self.file, self.total);
        }
    }

    fn finish(&mut self) {
        self.download.report(self.before + self.file, self.total);
    }
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Makes hf-hub's unfinished file one that it can resume: from a complete one it would ask for
/// the bytes behind the end, which no server has; from a longer one it gives up.
fn repair_part(file: &Wanted) -> io::Result<()> {
    let path = file.blob.with_extension("part");
    let length = length(&path);
    if length < file.size || length == 0 {
        return Ok(());
    }
    let lock = File::create(file.blob.with_extension("lock"))?;
    if lock.try_lock().is_err() {
        // Another process is about to finish it; hf-hub waits for that.
        return Ok(());
    }
    let part = OpenOptions::new().write(true).open(path)?;
    part.set_len(if length == file.size { length - 1 } else { 0 })
}

/// Takes a blob that an earlier revision left in the cache; whether there was one.
#[cfg(unix)]
fn link_blob(file: &Wanted, snapshot: &Path) -> io::Result<bool> {
    if !fs::metadata(&file.blob).is_ok_and(|blob| blob.len() == file.size) {
        return Ok(false);
    }
    fs::create_dir_all(snapshot)?;
    let pointer = snapshot.join(&file.name);
    // A link that leads nowhere is in the way.
    if fs::symlink_metadata(&pointer).is_ok() {
        fs::remove_file(&pointer)?;
    }
    let model = snapshot.ancestors().nth(2).unwrap_or(snapshot);
    let blob = file.blob.strip_prefix(model).unwrap_or(&file.blob);
    std::os::unix::fs::symlink(Path::new("../..").join(blob), pointer)?;
    Ok(true)
}

/// Elsewhere hf-hub moves blobs into the snapshot, so that none is left.
#[cfg(not(unix))]
fn link_blob(_file: &Wanted, _snapshot: &Path) -> io::Result<bool> {
    Ok(false)
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

fn hub_error(key: &str, cache: &Path, error: ApiError) -> Error {
    let why = error.to_string();
    let refused = |kind, what, help| {
        Error::new(kind, what)
            .with_key(key)
            .with_why(&*why)
            .with_help(help)
    };
    match (status(&error), error) {
        (Some(401 | 403), error) => {
            let help = "check the spelling; for a private or gated model accept its terms on its \
                        page and set HF_TOKEN";
            refused(ErrorKind::PermissionDenied, "hub refuses access", help).with_source(error)
        }
        (Some(404), error) => {
            let help = "check the spelling; there is no directory of this name either";
            refused(ErrorKind::NotFound, "hub has no such model", help).with_source(error)
        }
        (_, ApiError::IoError(error)) if is_disk(&error) => {
            Error::io("cache cannot be written", cache, error)
                .with_help("set HF_HOME to a directory with room")
        }
        (_, ApiError::LockAcquisition(lock)) => {
            Error::new(ErrorKind::Io, "another process is downloading this file")
                .with_path(lock)
                .with_key(key)
                .with_help("wait until it is done")
        }
        (_, error) => network("download failed", key, why).with_source(error),
    }
}

/// Errors of reading from the network and of writing the file arrive as one type.
fn is_disk(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::IsADirectory
            | io::ErrorKind::AlreadyExists
            | io::ErrorKind::NotFound
    )
}

fn network(what: &str, key: &str, why: String) -> Error {
    Error::new(ErrorKind::Network, what)
        .with_key(key)
        .with_why(why)
        .with_help("check the connection and HF_ENDPOINT, then load again: it resumes")
}
