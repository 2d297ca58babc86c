//! Sessions in files: one conversation with its cache, whole or refused.
//!
//! `QWEN2SES`, version and length of the header as u32; the header, JSON; its hash; tokens as u32, then
//! the cache layer by layer; the hash of those. Hashes are the 128 bits of XXH3, all numbers
//! little-endian.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::Session;
use crate::api::model::Model;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::fenced;
use crate::text::Message;

const MAGIC: &[u8; 8] = b"QWEN2SES";
const VERSION: u32 = 1;
/// Bytes of a hash.
const HASH: usize = 16;
/// Bytes before the header.
const START: usize = MAGIC.len() + 8;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    /// The name of the model, for messages.
    model: String,
    fingerprint: String,
    n_tokens: usize,
    /// Tokens that the cache holds.
    n_cached: usize,
    /// Whether its keys have the rotations of long sequences.
    long: bool,
    messages: Vec<Message>,
}

impl Session {
    /// Writes the conversation and its cache to a file, which replaces one of this name; the file is
    /// complete or not there. It is for this version of the library, and for no other model.
    ///
    /// # Errors
    /// `NotFound`, `PermissionDenied` and `Io` where it cannot be written; `DeviceFailed`.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let failed = |error| Error::io("session cannot be written", path, error);
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        // Where it cannot be seen half-written, and is deleted if this fails.
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        let mut out = BufWriter::new(&mut file);
        out.write_all(&self.header()?).map_err(failed)?;
        let mut hash = Xxh3::new();
        let mut put = |bytes: &[u8]| {
            hash.update(bytes);
            out.write_all(bytes).map_err(failed)
        };
        for token in &self.tokens {
            put(&token.to_le_bytes())?;
        }
        fenced(|| self.cache.export(&mut put)).map_err(|why| device_failed(&why))??;
        out.write_all(&hash.digest128().to_le_bytes())
            .and_then(|()| out.flush())
            .map_err(failed)?;
        drop(out);
        file.as_file().sync_all().map_err(failed)?;
        file.persist(path).map_err(|error| failed(error.error))?;
        Ok(())
    }

    /// Everything before the tokens.
    fn header(&self) -> Result<Vec<u8>> {
        let header = Header {
            model: self.model.name().to_owned(),
            fingerprint: self.model.fingerprint()?,
            n_tokens: self.tokens.len(),
            n_cached: self.cache.n_tokens(),
            long: self.cache.is_long(),
            messages: self.messages.clone(),
        };
        let json = serde_json::to_vec(&header).map_err(|error| {
            Error::new(ErrorKind::Internal, "header cannot be written").with_source(error)
        })?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((json.len() as u32).to_le_bytes()); // messages fit the context
        bytes.extend(json);
        let hash = xxh3_128(&bytes);
        bytes.extend(hash.to_le_bytes());
        Ok(bytes)
    }
}

impl Model {
    /// A session that [`Session::save`] wrote, with its cache: nothing of it is read again.
    ///
    /// # Errors
    /// `InvalidFile` for a file that is damaged, cut off, no session, or one of another model or of other
    /// settings (precision, packing, adapters, `kv_cache`, the kind of device); `Unsupported` for
    /// another version; `ContextOverflow` if it is longer than this model's context; `NotFound`,
    /// `PermissionDenied`, `Io`.
    pub fn open_session(&self, path: impl AsRef<Path>) -> Result<Session> {
        let path = path.as_ref();
        let failed = |error| Error::io("session cannot be read", path, error);
        let file = File::open(path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        let mut stored = Stored {
            path,
            file: BufReader::new(file),
            left: len,
        };
        let header = stored.header()?;
        self.check_header(&header, path)?;
        stored.session(self, header)
    }

    fn check_header(&self, header: &Header, path: &Path) -> Result<()> {
        if header.fingerprint != self.fingerprint()? {
            let why = format!("saved with {}, or with other settings", header.model);
            let help = "open it with the model, precision, packing, adapters and kv_cache it was saved with";
            return Err(damaged(path, "session is of another model", &why).with_help(help));
        }
        if header.n_tokens > self.context_length() || header.n_cached > header.n_tokens {
            let why = format!(
                "{} tokens, the context holds {}",
                header.n_tokens,
                self.context_length()
            );
            return Err(
                Error::new(ErrorKind::ContextOverflow, "session exceeds the context")
                    .with_path(path)
                    .with_why(why)
                    .with_help("load the model with a longer context_length"),
            );
        }
        Ok(())
    }

    /// Tells this model and its settings from all others that caches may come from.
    fn fingerprint(&self) -> Result<String> {
        let mut hash = Xxh3::new();
        let config = serde_json::to_vec(self.config()).map_err(|error| {
            Error::new(ErrorKind::Internal, "config cannot be written").with_source(error)
        })?;
        hash.update(&config);
        let tokenizer = self.tokenizer();
        for id in 0..tokenizer.vocab_size() as u32 {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            hash.update(&[tokenizer.is_special(id).into(), bytes.len() as u8]);
            hash.update(bytes);
        }
        hash.update(tokenizer.chat_template().unwrap_or_default().as_bytes());
        let qwen2 = &self.inner.host.network.qwen2;
        fenced(|| qwen2.sample(&mut |bytes| hash.update(bytes)))
            .map_err(|why| device_failed(&why))?;
        Ok(format!("{:032x}", hash.digest128()))
    }
}

/// A session file that is being read.
struct Stored<'a> {
    path: &'a Path,
    file: BufReader<File>,
    /// Bytes that are to come.
    left: u64,
}

impl Stored<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        let left = self.left.checked_sub(bytes.len() as u64);
        self.left = left.ok_or_else(|| self.cut_off())?;
        let read = self.file.read_exact(bytes);
        read.map_err(|error| Error::io("session cannot be read", self.path, error))
    }

    fn cut_off(&self) -> Error {
        damaged(self.path, "session file is damaged", "it ends too early")
    }

    fn changed(&self) -> Error {
        let why = "its contents do not match their checksum";
        damaged(self.path, "session file is damaged", why)
    }

    fn header(&mut self) -> Result<Header> {
        let mut start = [0; START];
        let is_long_enough = self.left >= (START + HASH) as u64;
        if is_long_enough {
            self.read(&mut start)?;
        }
        if !start.starts_with(MAGIC) {
            let why = "it does not begin like one";
            return Err(damaged(self.path, "file is no session", why));
        }
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| start[at + i]));
        if number(8) != VERSION {
            let why = format!("version {}, this library writes {VERSION}", number(8));
            return Err(
                Error::new(ErrorKind::Unsupported, "session file is of another version")
                    .with_path(self.path)
                    .with_why(why)
                    .with_help("open it with the version of the library that wrote it"),
            );
        }
        let len = number(12) as usize;
        if len as u64 > self.left {
            return Err(self.cut_off());
        }
        let mut bytes = start.to_vec();
        bytes.resize(START + len, 0);
        self.read(&mut bytes[START..])?;
        self.check(xxh3_128(&bytes))?;
        serde_json::from_slice(&bytes[START..])
            .map_err(|error| damaged(self.path, "session file is damaged", &error.to_string()))
    }

    /// Compares with the hash that comes now.
    fn check(&mut self, hash: u128) -> Result<()> {
        let mut stored = [0; HASH];
        self.read(&mut stored)?;
        match u128::from_le_bytes(stored) == hash {
            true => Ok(()),
            false => Err(self.changed()),
        }
    }

    /// What follows the header.
    fn session(&mut self, model: &Model, header: Header) -> Result<Session> {
        // Before any memory is taken; the cache asks for what it reads, and must end where the file does.
        let least =
            header.n_tokens as u64 * 4 + header.n_cached as u64 * model.inner.cache_per_token;
        if self.left < least + HASH as u64 {
            return Err(self.cut_off());
        }
        let mut hash = Xxh3::new();
        let mut tokens = vec![0; header.n_tokens];
        let mut cache = model.new_cache();
        {
            let mut read = |bytes: &mut [u8]| {
                self.read(bytes)?;
                hash.update(bytes);
                Ok(())
            };
            for token in &mut tokens {
                let mut bytes = [0; 4];
                read(&mut bytes)?;
                *token = u32::from_le_bytes(bytes);
            }
            fenced(|| cache.import(header.n_cached, header.long, &mut read))
                .map_err(|why| device_failed(&why))??;
        }
        self.check(hash.digest128())?;
        if self.left > 0 || model.check_ids(&tokens).is_err() {
            return Err(self.changed());
        }
        Ok(Session {
            cache,
            tokens,
            messages: header.messages,
            ..Session::new(model.clone())
        })
    }
}

fn damaged(path: &Path, what: &str, why: &str) -> Error {
    Error::new(ErrorKind::InvalidFile, what)
        .with_path(path)
        .with_why(why)
        .with_help("start a new session")
}

fn device_failed(why: &str) -> Error {
    Error::new(
        ErrorKind::DeviceFailed,
        "device failed to give or take the cache",
    )
    .with_why(why)
}
