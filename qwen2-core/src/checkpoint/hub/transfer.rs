//! One file of a hub onto the disk: locked, resumed, checked, and only then under its name.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use ureq::http::header;

use super::client::{Client, Failed};
use crate::error::{Error, ErrorKind, Result};

/// Tries without a new byte.
const ATTEMPTS: u32 = 3;
/// Whole downloads that had the wrong sum.
const DAMAGED: u32 = 2;
const LOCK_POLL: Duration = Duration::from_millis(100);
const CHUNK: usize = 256 << 10;

/// One file to fetch.
pub(super) struct Transfer<'a> {
    pub(super) client: &'a Client<'a>,
    /// What errors call it, its path in the repository.
    pub(super) name: &'a str,
    /// Where the hub has it.
    pub(super) url: String,
    pub(super) size: u64,
    /// In hexadecimal digits, where the hub tells it.
    pub(super) sha256: Option<&'a str>,
    /// The unfinished file, on the disk of the finished one.
    pub(super) part: PathBuf,
    pub(super) lock: PathBuf,
    pub(super) target: PathBuf,
}

/// Is told the bytes of the file that are there; its error stops the transfer.
pub(super) type Report<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

impl Transfer<'_> {
    /// The file is at `target`, whole, when this returns `Ok`.
    ///
    /// # Errors
    /// `Network`, `NotFound` and `PermissionDenied` for what the hub answers, `Io` for the disk and
    /// for another process that holds the file, and what `report` says.
    pub(super) fn run(&self, report: Report) -> Result<()> {
        for path in [&self.lock, &self.part, &self.target] {
            let parent = path.parent().unwrap_or(path);
            fs::create_dir_all(parent).map_err(|error| self.disk(parent, error))?;
        }
        let _lock = self.lock(report)?;
        if length(&self.target) == Some(self.size) {
            // Another process was faster.
            return report(self.size);
        }
        let (mut attempt, mut damaged) = (0, 0);
        let mut most = length(&self.part).unwrap_or(0);
        loop {
            let failed = match self.attempt(report) {
                Ok(sum) if self.sha256.is_none_or(|wanted| wanted == sum) => break,
                Ok(sum) => {
                    self.discard()?;
                    damaged += 1;
                    let why = format!(
                        "sha256 is {sum}, the hub says {}",
                        self.sha256.unwrap_or("")
                    );
                    let client = self.client;
                    Failed {
                        error: client.network("download is damaged", self.name, why),
                        again: damaged < DAMAGED,
                    }
                }
                Err(failed) => failed,
            };
            // Bytes that were there before do not count: a server may begin anew for ever.
            let there = length(&self.part).unwrap_or(0);
            attempt = if there > most { 1 } else { attempt + 1 };
            most = most.max(there);
            if !failed.again || attempt >= ATTEMPTS {
                return Err(failed.error);
            }
            tracing::debug!(error = %failed.error, attempt, "download is tried again");
            thread::sleep(LOCK_POLL * 3 * attempt);
        }
        // `attempt` has written everything to the disk itself, so the name never stands for less.
        fs::rename(&self.part, &self.target).map_err(|error| self.disk(&self.target, error))
    }

    /// Waits for another process that fetches the same file, for as long as it gets on.
    fn lock(&self, report: Report) -> Result<File> {
        let open = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&self.lock);
        let lock = open.map_err(|error| self.disk(&self.lock, error))?;
        let (mut seen, mut since) = (0, Instant::now());
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(self.disk(&self.lock, error)),
            }
            let there = length(&self.part).unwrap_or(0);
            if there != seen {
                (seen, since) = (there, Instant::now());
            } else if since.elapsed() > 2 * self.client.settings.stall {
                return Err(
                    Error::new(ErrorKind::Io, "another process is downloading this file")
                        .with_path(&self.lock)
                        .with_key(self.client.key(self.name))
                        .with_why("and does not get on")
                        .with_help("wait until it is done, or end it"),
                );
            }
            report(there.min(self.size))?;
            thread::sleep(LOCK_POLL);
        }
    }

    /// Completes the unfinished file; its sum, or nothing where none is known.
    fn attempt(&self, report: Report) -> Result<String, Failed> {
        let disk = |error| fatal(self.disk(&self.part, error));
        let mut part = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&self.part)
            .map_err(disk)?;
        let mut start = part.metadata().map_err(disk)?.len();
        if start > self.size {
            part.set_len(0).map_err(disk)?;
            start = 0;
        }
        let mut sum = Sha256::new();
        self.sum(&mut part, start, &mut sum, report)?;
        if start < self.size {
            self.receive(&mut part, start, &mut sum, report)?;
        }
        part.sync_all().map_err(disk)?;
        report(self.size).map_err(fatal)?;
        Ok(digits(sum))
    }

    /// Adds the first `n_bytes` of the file to the sum; leaves the file at its end.
    fn sum(
        &self,
        part: &mut File,
        n_bytes: u64,
        sum: &mut Sha256,
        report: Report,
    ) -> Result<(), Failed> {
        let disk = |error| fatal(self.disk(&self.part, error));
        if self.sha256.is_some() {
            let mut chunk = vec![0; CHUNK];
            let mut left = n_bytes;
            while left > 0 {
                let n = part.read(&mut chunk).map_err(disk)?;
                if n == 0 {
                    break;
                }
                sum.update(&chunk[..n]);
                left = left.saturating_sub(n as u64);
                report(n_bytes - left).map_err(fatal)?;
            }
        }
        part.seek(SeekFrom::Start(n_bytes)).map_err(disk)?;
        Ok(())
    }

    fn receive(
        &self,
        part: &mut File,
        start: u64,
        sum: &mut Sha256,
        report: Report,
    ) -> Result<(), Failed> {
        let disk = |error| fatal(self.disk(&self.part, error));
        let range = (start > 0).then(|| format!("bytes={start}-"));
        let answer = self.client.get(&self.url, self.name, range)?;
        let status = answer.status().as_u16();
        let ranges = answer.headers().get(header::CONTENT_RANGE);
        let sent = ranges.and_then(|range| range.to_str().ok());
        let wanted = format!("bytes {start}-");
        let fits = status == 206 && sent.is_some_and(|range| range.starts_with(&wanted));
        let mut done = start;
        if start > 0 && !fits {
            // The whole file follows, or nothing: what we have is of no use to this server.
            part.set_len(0).map_err(disk)?;
            part.rewind().map_err(disk)?;
            *sum = Sha256::new();
            done = 0;
        }
        if !(fits || status == 200) {
            return Err(again(self.wrong_size(&format!("status {status}"))));
        }
        let mut body = answer.into_body().into_reader();
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = match body.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(again(self.client.cut(self.name, error))),
            };
            done += n as u64;
            if done > self.size {
                part.set_len(0).map_err(disk)?;
                return Err(again(self.wrong_size("more bytes")));
            }
            part.write_all(&chunk[..n]).map_err(disk)?;
            sum.update(&chunk[..n]);
            report(done).map_err(fatal)?;
        }
        if done < self.size {
            return Err(again(self.wrong_size(&format!("{done} bytes"))));
        }
        Ok(())
    }

    /// Removes a file that the hub has otherwise by now: its branch has moved on.
    pub(super) fn remove_what_is_stale(&self, report: Report) -> Result<()> {
        let Some(length) = length(&self.target) else {
            return Ok(());
        };
        let same = length == self.size && self.has_sum(report)?;
        match same {
            true => Ok(()),
            false => fs::remove_file(&self.target).map_err(|error| self.disk(&self.target, error)),
        }
    }

    /// Whether the finished file has the sum that the hub says, or none is known.
    fn has_sum(&self, report: Report) -> Result<bool> {
        if self.sha256.is_none() {
            return Ok(true);
        }
        let mut file = File::open(&self.target).map_err(|error| self.disk(&self.target, error))?;
        let mut sum = Sha256::new();
        self.sum(&mut file, self.size, &mut sum, report)
            .map_err(|failed| failed.error)?;
        Ok(self.sha256 == Some(&digits(sum)))
    }

    fn wrong_size(&self, found: &str) -> Error {
        let why = format!("expected {} bytes, found {found}", self.size);
        self.client
            .network("download has the wrong size", self.name, why)
    }

    fn discard(&self) -> Result<()> {
        fs::remove_file(&self.part).map_err(|error| self.disk(&self.part, error))
    }

    fn disk(&self, path: &Path, error: io::Error) -> Error {
        disk_error(self.client, path, error)
    }
}

/// The cache cannot be read or written.
pub(super) fn disk_error(client: &Client, path: &Path, error: io::Error) -> Error {
    let variable = client.settings.variables().cache;
    Error::io("cache cannot be written", path, error).with_help(format!(
        "make room, or set {variable} to a directory with room, then load again: it resumes"
    ))
}

fn digits(sum: Sha256) -> String {
    let bytes = sum.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn again(error: Error) -> Failed {
    Failed { error, again: true }
}

fn fatal(error: Error) -> Failed {
    Failed {
        error,
        again: false,
    }
}

pub(super) fn length(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.len())
}
