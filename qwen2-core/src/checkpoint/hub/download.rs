//! What the cache lacks of a model, fetched on a thread of its own: a blocking read cannot be stopped.

use std::collections::BTreeSet;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::super::hub_id::Hub;
use super::super::source::Place;
use super::super::{Progress, cancelled, shards};
use super::cache::CachedModel;
use super::client::{Client, encoded};
use super::listing::{Listing, RemoteFile};
use super::select::{OPTIONAL, REQUIRED, gguf_parts, is_gguf};
use super::settings::HubSettings;
use super::transfer::{Transfer, disk_error, length};
use super::{ADAPTER, Want};
use crate::error::{Error, ErrorKind, Result};

/// Progress is reported at most this often, and not less often while nothing happens.
const REPORT_EVERY: Duration = Duration::from_millis(100);

/// Downloads what `cached` lacks of the model `id`.
///
/// # Errors
/// As [`super::place`].
pub(super) fn fetch(
    id: &str,
    want: &Want,
    cached: CachedModel,
    settings: &HubSettings,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Place> {
    let (events, reports) = mpsc::channel();
    let job = (id.to_owned(), want.clone(), settings.clone());
    let worker = thread::Builder::new()
        .name("qwen2-hub".to_owned())
        .spawn(move || {
            let (id, want, settings) = job;
            let client = Client::new(&id, &settings)?;
            Download::new(&client, &id, want, cached, events).run()
        })
        .map_err(|error| Error::io("cannot start a thread", &settings.cache, error))?;
    let mut last = Progress::new(0, 0);
    loop {
        match reports.recv_timeout(REPORT_EVERY) {
            Ok(report) => last = report,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        // Returning drops `reports`, which ends the worker at its next report.
        if last.bytes_total > 0 && progress(last).is_break() {
            return Err(cancelled(&settings.cache));
        }
    }
    worker.join().unwrap_or_else(|_| {
        let what = "the download ended by a panic";
        Err(Error::new(ErrorKind::Internal, what).with_key(id))
    })
}

struct Download<'a> {
    client: &'a Client<'a>,
    id: &'a str,
    want: Want,
    cached: CachedModel,
    events: Sender<Progress>,
    /// Bytes of the files that are done, and of all.
    done: u64,
    total: u64,
    reported: Option<Instant>,
}

impl<'a> Download<'a> {
    fn new(
        client: &'a Client<'a>,
        id: &'a str,
        want: Want,
        cached: CachedModel,
        events: Sender<Progress>,
    ) -> Self {
        Self {
            client,
            id,
            want,
            cached,
            events,
            done: 0,
            total: 0,
            reported: None,
        }
    }

    fn run(mut self) -> Result<Place> {
        let listing = self.listing()?;
        // By its commit: all files are of one revision, whatever is pushed meanwhile, and the
        // revision's name is written only when all of them are there.
        self.cached.commit = Some(listing.revision.clone());
        let gguf = match &self.want {
            Want::Model(file) if file.is_some() || is_gguf(&listing.names()) => {
                Some(gguf_parts(&listing.names(), file.as_deref(), self.id)?)
            }
            _ => None,
        };
        let place = match gguf {
            Some(parts) => {
                self.get_all(&listing, &parts)?;
                Place::Gguf(self.cached.snapshot().join(&parts[0]))
            }
            None => {
                let names = self.files_of_directory(&listing)?;
                self.get_all(&listing, &names)?;
                Place::Directory(self.cached.snapshot())
            }
        };
        self.finish(&listing)
            .map_err(|error| disk_error(self.client, &self.cached.path, error))?;
        Ok(place)
    }

    /// The files at the revision that the cache has already, or else at what its name stands for now.
    fn listing(&self) -> Result<Listing> {
        let asked = &self.cached.revision;
        let first = self.cached.commit.as_ref().unwrap_or(asked);
        match Listing::fetch(self.client, self.id, first) {
            Err(error) if error.kind() == ErrorKind::NotFound && first != asked => {
                Listing::fetch(self.client, self.id, asked)
            }
            listing => listing,
        }
    }

    fn files_of_directory(&mut self, listing: &Listing) -> Result<Vec<String>> {
        if self.want == Want::Adapter {
            return Ok(ADAPTER.map(str::to_owned).to_vec());
        }
        let listed = |name: &&&str| listing.files.contains_key(**name);
        let mut names: Vec<String> = REQUIRED.iter().map(|&name| name.to_owned()).collect();
        let optional = OPTIONAL.iter().filter(listed);
        names.extend(optional.map(|&name| name.to_owned()));
        names.extend(self.weight_files(listing)?);
        Ok(names)
    }

    /// The weight files of the model; the index is fetched to learn the names of the shards.
    fn weight_files(&mut self, listing: &Listing) -> Result<Vec<String>> {
        if listing.files.contains_key(shards::SINGLE) {
            return Ok(vec![shards::SINGLE.to_owned()]);
        }
        if !listing.files.contains_key(shards::INDEX) {
            return Err(
                Error::new(ErrorKind::NotFound, "model has no safetensors weights")
                    .with_key(self.id)
                    .with_help(
                        "choose the checkpoint with model.safetensors, or one of GGUF files",
                    ),
            );
        }
        self.get_all(listing, &[shards::INDEX.to_owned()])?;
        let path = self.cached.snapshot().join(shards::INDEX);
        let index =
            fs::read(&path).map_err(|error| Error::io("file cannot be read", &path, error))?;
        let shards: BTreeSet<String> = shards::parse_index(&index, &path)?.into_values().collect();
        Ok(shards.into_iter().collect())
    }

    /// Fetches those of `names` that the cache does not have.
    fn get_all(&mut self, listing: &Listing, names: &[String]) -> Result<()> {
        let snapshot = self.cached.snapshot();
        let mut wanted = Vec::new();
        for name in names {
            // Of a commit, what is there is right; a branch may have moved on.
            if self.client.settings.hub == Hub::HuggingFace && snapshot.join(name).is_file() {
                continue;
            }
            let url = self.url(&listing.revision, name);
            let file = listing.file(self.client, name, &url)?;
            self.total += file.size;
            wanted.push((name, url, file));
            self.report(0)?;
        }
        for (name, url, file) in wanted {
            self.get(name, url, &file)?;
            self.done += file.size;
            self.reported = None;
            self.report(0)?;
        }
        Ok(())
    }

    fn get(&mut self, name: &str, url: String, file: &RemoteFile) -> Result<()> {
        let paths = self.cached.paths(name, file);
        let transfer = Transfer {
            client: self.client,
            name,
            url,
            size: file.size,
            sha256: file.sha256.as_deref(),
            part: paths.part,
            lock: paths.lock,
            target: paths.target,
        };
        if self.client.settings.hub == Hub::ModelScope {
            transfer.remove_what_is_stale(&mut |bytes| self.report(bytes))?;
        }
        if length(&transfer.target) != Some(file.size) {
            transfer.run(&mut |bytes| self.report(bytes))?;
        }
        self.cached
            .link(name, file)
            .map_err(|error| disk_error(self.client, &self.cached.path, error))
    }

    fn url(&self, revision: &str, name: &str) -> String {
        let id = self.id;
        match self.client.settings.hub {
            Hub::HuggingFace => format!("/{id}/resolve/{revision}/{}", encoded(name, Some('/'))),
            Hub::ModelScope => format!(
                "/api/v1/models/{id}/repo?Revision={}&FilePath={}",
                encoded(revision, None),
                encoded(name, None)
            ),
        }
    }

    /// Marks what the hub does not have, then makes the revision the current one.
    fn finish(&self, listing: &Listing) -> std::io::Result<()> {
        if matches!(self.want, Want::Model(None)) {
            for name in OPTIONAL {
                if !listing.files.contains_key(name) {
                    self.cached.mark_no_exist(name)?;
                }
            }
        }
        self.cached.write_ref()
    }

    /// # Errors
    /// `Cancelled` if nobody waits for the download any more.
    fn report(&mut self, bytes: u64) -> Result<()> {
        if self.reported.is_some_and(|at| at.elapsed() < REPORT_EVERY) {
            return Ok(());
        }
        self.reported = Some(Instant::now());
        let report = Progress::new(self.done + bytes, self.total);
        let path: PathBuf = self.cached.path.clone();
        self.events.send(report).map_err(|_| cancelled(&path))
    }
}
