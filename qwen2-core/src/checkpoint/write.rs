//! A checkpoint directory written whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::shards::SINGLE;
use super::{CONFIG, Checkpoint, Encoding, GENERATION_CONFIG};
use crate::error::{Error, ErrorKind, Result};

/// The weights start at a multiple of this, so that packed panels begin with a cache line.
const ALIGNMENT: usize = 64;
/// Bytes of one write, each at a multiple of it: file systems that cache files in huge pages do so
/// then, and a model that is loaded from the cache decodes faster.
const WRITE: usize = 2 << 20;
/// What lies beside the weights and is copied where it is there.
const COMPANIONS: [&str; 9] = [
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "LICENSE",
];

/// A tensor that is to be written.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) name: String,
    pub(crate) encoding: Encoding,
    pub(crate) shape: Vec<usize>,
}

impl Planned {
    fn len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.encoding.size_in_bytes()
    }
}

/// Writes a directory like that of `checkpoint` with the tensors of `plan`, in this order; `change` is
/// done to its `config.json`. Everything is written beside
/// `destination` first and renamed at the end.
///
/// # Errors
/// `InvalidArgument` if `destination` exists, what `bytes` returns, and what writing says.
pub(crate) fn write(
    checkpoint: &Checkpoint,
    destination: &Path,
    change: &dyn Fn(&mut Map<String, Value>),
    plan: &[Planned],
    bytes: &mut dyn FnMut(&Planned) -> Result<Vec<u8>>,
) -> Result<()> {
    let partial = Partial::beside(destination)?;
    for name in COMPANIONS {
        if let Some(bytes) = checkpoint.companion(name)? {
            let to = partial.0.join(name);
            fs::write(&to, bytes)
                .map_err(|error| Error::io("file cannot be written", &to, error))?;
        }
    }
    let config = partial.0.join(CONFIG);
    fs::write(&config, changed_config(checkpoint, change)?)
        .map_err(|error| Error::io("file cannot be written", &config, error))?;
    let weights = partial.0.join(SINGLE);
    let failed = |error| Error::io("file cannot be written", &weights, error);
    let mut file = File::create(&weights).map_err(failed)?;
    let mut waiting = Vec::with_capacity(WRITE);
    write_whole(&mut file, &mut waiting, &header(plan)).map_err(failed)?;
    for tensor in plan {
        let bytes = bytes(tensor)?;
        assert_eq!(bytes.len(), tensor.len(), "bytes of {}", tensor.name);
        write_whole(&mut file, &mut waiting, &bytes).map_err(failed)?;
    }
    file.write_all(&waiting).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    drop(file);
    fs::rename(&partial.0, destination)
        .map_err(|error| Error::io("directory cannot be renamed into place", destination, error))
}

/// Writes `bytes` as far as they make whole writes with those that wait; the rest waits.
fn write_whole(file: &mut impl Write, waiting: &mut Vec<u8>, mut bytes: &[u8]) -> io::Result<()> {
    while waiting.len() + bytes.len() >= WRITE {
        let (now, later) = bytes.split_at(WRITE - waiting.len());
        waiting.extend_from_slice(now);
        file.write_all(waiting)?;
        waiting.clear();
        bytes = later;
    }
    waiting.extend_from_slice(bytes);
    Ok(())
}

fn changed_config(
    checkpoint: &Checkpoint,
    change: &dyn Fn(&mut Map<String, Value>),
) -> Result<String> {
    let bytes = checkpoint.companion(CONFIG)?;
    let config: Option<Map<String, Value>> =
        bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let Some(mut config) = config else {
        return Err(
            Error::new(ErrorKind::InvalidFile, "file changed while it was read")
                .with_path(checkpoint.config_path())
                .with_help("try again"),
        );
    };
    change(&mut config);
    Ok(format!("{:#}\n", Value::Object(config)))
}

/// Length and header of the safetensors format; spaces bring the numbers behind it into line.
fn header(plan: &[Planned]) -> Vec<u8> {
    let mut tensors = Map::new();
    let mut at = 0;
    for tensor in plan {
        let end = at + tensor.len();
        let entry = json!({
            "dtype": tensor.encoding.to_string().to_uppercase(),
            "shape": tensor.shape,
            "data_offsets": [at, end],
        });
        tensors.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut json = Value::Object(tensors).to_string();
    let padded = (8 + json.len()).next_multiple_of(ALIGNMENT) - 8;
    json.push_str(&" ".repeat(padded - json.len()));
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.into_bytes());
    bytes
}

/// A directory that is removed again unless it was renamed.
pub(super) struct Partial(PathBuf);

impl Partial {
    /// A directory of our own beside what is to be made.
    ///
    /// # Errors
    /// `InvalidArgument` if `destination` exists or has no name, and what making it says.
    pub(super) fn beside(destination: &Path) -> Result<Self> {
        if fs::symlink_metadata(destination).is_ok() {
            return Err(Error::new(ErrorKind::InvalidArgument, "destination exists")
                .with_path(destination)
                .with_help("choose another one, or remove it first"));
        }
        let Some(name) = destination.file_name() else {
            return Err(
                Error::new(ErrorKind::InvalidArgument, "destination has no name")
                    .with_path(destination)
                    .with_help("give the path of what is to be made"),
            );
        };
        let partial = format!(".{}.partial-{}", name.to_string_lossy(), std::process::id());
        let path = destination.with_file_name(partial);
        fs::create_dir(&path).map_err(|error| {
            Error::io("directory cannot be made", &path, error)
                .with_help("give a path inside a directory that is there and may be written to")
        })?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Renamed: nothing is there. Else what remains is in a directory of our own name.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_whole_and_lose_nothing() {
        struct Sizes(Vec<usize>, Vec<u8>);
        impl Write for Sizes {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.push(bytes.len());
                self.1.extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let bytes: Vec<u8> = (0..5 * WRITE / 2).map(|i| (i % 251) as u8).collect();
        let (mut file, mut waiting) = (Sizes(Vec::new(), Vec::new()), Vec::new());
        for piece in [&bytes[..100], &bytes[100..WRITE], &bytes[WRITE..]] {
            write_whole(&mut file, &mut waiting, piece).expect("written");
        }
        assert_eq!(file.0, [WRITE, WRITE]);
        assert!([file.1, waiting].concat() == bytes);
    }
}
