//! The demo model, carried in the program and unpacked once for each user.
//!
//! The library maps its weights from files, so the program writes them to the user's cache folder,
//! in one whose name changes with their content.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::failure::Failure;

macro_rules! file {
    ($name:literal) => {
        (
            $name,
            include_bytes!(concat!("../demo-model/", $name)).as_slice(),
        )
    };
}

const FILES: [(&str, &[u8]); 5] = [
    file!("config.json"),
    file!("generation_config.json"),
    file!("tokenizer.json"),
    file!("tokenizer_config.json"),
    file!("model.safetensors"),
];

/// The model's name: that of its folder.
const NAME: &str = "demo-model";

/// The folder of the demo model, written now if it is not there yet.
pub(crate) fn directory() -> Result<PathBuf, Failure> {
    let cache = cache_directory().ok_or_else(|| {
        Failure::new(
            "no folder for the demo model: no home directory is set",
            "set XDG_CACHE_HOME (or LOCALAPPDATA on Windows), or name a model",
        )
    })?;
    unpack(&cache).map_err(|error| {
        Failure::new(
            format!(
                "demo model cannot be unpacked: {}: {error}",
                cache.display()
            ),
            "set XDG_CACHE_HOME to a folder that can be written, or name a model",
        )
    })
}

/// Writes the files beside their place and renames the folder: no reader sees half of them.
fn unpack(cache: &Path) -> io::Result<PathBuf> {
    let version = cache.join(format!("{:016x}", hash()));
    let directory = version.join(NAME);
    if is_complete(&directory) {
        return Ok(directory);
    }
    let fresh = cache.join(format!("new-{}", std::process::id()));
    fs::create_dir_all(fresh.join(NAME))?;
    for (name, bytes) in FILES {
        fs::write(fresh.join(NAME).join(name), bytes)?;
    }
    if version.exists() {
        fs::remove_dir_all(&version)?;
    }
    match fs::rename(&fresh, &version) {
        // Another process may have been first.
        Err(_) if is_complete(&directory) => fs::remove_dir_all(&fresh)?,
        outcome => outcome?,
    }
    Ok(directory)
}

/// Whether the folder holds just what this program carries.
fn is_complete(directory: &Path) -> bool {
    FILES
        .iter()
        .all(|(name, bytes)| fs::read(directory.join(name)).is_ok_and(|there| there == *bytes))
}

/// FNV-1a: the same on every platform and compiler, unlike the standard library's.
fn hash() -> u64 {
    let bytes = FILES.iter().flat_map(|(_, bytes)| bytes.iter());
    bytes.fold(0xCBF2_9CE4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

/// Where this system keeps what programs can make again.
fn cache_directory() -> Option<PathBuf> {
    let folder = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let cache = folder("XDG_CACHE_HOME").or_else(|| {
        if cfg!(windows) {
            folder("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            folder("HOME").map(|home| home.join("Library/Caches"))
        } else {
            folder("HOME").map(|home| home.join(".cache"))
        }
    })?;
    Some(cache.join("qwen2"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;

    #[test]
    fn unpacking_twice_writes_once_and_repairs_what_is_broken() {
        let cache = tempfile::tempdir().unwrap();
        let directory = unpack(cache.path()).unwrap();
        let written = fs::metadata(directory.join("config.json"))
            .unwrap()
            .modified()
            .unwrap();
        assert_eq!(unpack(cache.path()).unwrap(), directory);
        assert_eq!(
            fs::metadata(directory.join("config.json"))
                .unwrap()
                .modified()
                .unwrap(),
            written
        );

        fs::write(directory.join("model.safetensors"), b"cut off").unwrap();
        assert_eq!(unpack(cache.path()).unwrap(), directory);
        assert!(is_complete(&directory));
        assert_eq!(
            fs::read_dir(cache.path()).unwrap().count(),
            1,
            "nothing else is left behind"
        );
    }
}
