//! The files of a checkpoint directory: regular ones, inside of it, of bounded size.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// A directory whose files may be opened.
#[derive(Debug)]
pub(super) struct Directory {
    /// As the caller wrote it, for errors.
    path: PathBuf,
    /// Where its files may really lie, without links.
    roots: Vec<PathBuf>,
}

impl Directory {
    /// # Errors
    /// `NotFound`, `PermissionDenied` or `Io`, as the system says.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let real = fs::canonicalize(path)
            .map_err(|error| Error::io("directory cannot be opened", path, error))?;
        Ok(Self {
            path: path.to_owned(),
            roots: roots(real),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the file `name` really is; `None` if there is none.
    ///
    /// # Errors
    /// `InvalidFile` for a link that leads out of the directory and for anything that is not a
    /// regular file (opening a pipe would hang), `NotFound` for a link that leads nowhere.
    pub(super) fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        let shown = self.path.join(name);
        let failed = |error| Error::io("file cannot be opened", &shown, error);
        match fs::symlink_metadata(&shown) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        }
        let real = fs::canonicalize(&shown).map_err(failed)?;
        if !self.roots.iter().any(|root| real.starts_with(root)) {
            let target = fs::read_link(&shown).unwrap_or(real);
            return Err(
                Error::new(ErrorKind::InvalidFile, "link leads out of the directory")
                    .with_path(shown)
                    .with_why(target.display().to_string())
                    .with_help("put the file itself into the directory"),
            );
        }
        if !fs::metadata(&real).map_err(failed)?.is_file() {
            return Err(Error::new(ErrorKind::InvalidFile, "not a regular file")
                .with_path(shown)
                .with_help("put the file of the checkpoint there"));
        }
        Ok(Some(real))
    }

    /// The contents of the file `name`, at most `most` bytes; `None` if there is none.
    ///
    /// # Errors
    /// As [`Self::file`], `InvalidFile` for a longer file, and what reading it says.
    pub(super) fn read(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>> {
        let Some(real) = self.file(name)? else {
            return Ok(None);
        };
        let shown = self.path.join(name);
        let failed = |error| Error::io("file cannot be read", &shown, error);
        let file = File::open(real).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut bytes = Vec::new();
        if length <= most {
            // One byte more than allowed tells a file that is too long, however it grows meanwhile.
            file.take(most + 1)
                .read_to_end(&mut bytes)
                .map_err(failed)?;
        }
        if length.max(bytes.len() as u64) > most {
            return Err(Error::new(ErrorKind::InvalidFile, "file is too long")
                .with_path(shown)
                .with_why(format!("at most {most} bytes are read"))
                .with_help("is it really a file of this name? download it again"));
        }
        Ok(Some(bytes))
    }
}

/// `real` itself; in the Hugging Face cache (`models--org--name/snapshots/<commit>/`) also the
/// blobs that its files link to: those of the model and those shared between models
/// (huggingface_hub 1.x, `_shared_blobs.py`).
fn roots(real: PathBuf) -> Vec<PathBuf> {
    let model = real
        .parent()
        .filter(|snapshots| snapshots.ends_with("snapshots"))
        .and_then(Path::parent);
    let named = |path: &&Path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("models--"))
    };
    let mut roots = Vec::new();
    if let Some(model) = model.filter(named) {
        roots.push(model.to_owned());
        roots.extend(model.parent().map(|cache| cache.join("blobs")));
    }
    roots.push(real);
    roots
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn write(path: &Path) {
        fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        fs::write(path, b"x").expect("write");
    }

    #[test]
    fn links_inside_are_followed_and_links_out_are_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let model = dir.path().join("model");
        write(&model.join("config.json"));
        write(&dir.path().join("secret"));
        symlink("config.json", model.join("inside")).expect("link");
        symlink("../secret", model.join("outside")).expect("link");
        symlink("nowhere", model.join("dangling")).expect("link");
        let directory = Directory::open(&model).expect("directory");
        assert!(directory.file("inside").expect("inside").is_some());
        let error = directory.file("outside").expect_err("outside");
        assert_eq!(error.kind(), ErrorKind::InvalidFile);
        assert!(error.to_string().ends_with("outside: ../secret"), "{error}");
        assert_eq!(
            directory.file("dangling").expect_err("dangling").kind(),
            ErrorKind::NotFound
        );
        assert!(directory.file("absent").expect("absent").is_none());
    }

    #[test]
    fn the_hub_cache_may_link_to_its_blobs_and_to_no_other_model() {
        let dir = tempfile::tempdir().expect("tempdir");
        let snapshot = dir.path().join("models--org--name/snapshots/abc");
        fs::create_dir_all(&snapshot).expect("mkdir");
        write(&dir.path().join("models--org--name/blobs/1"));
        write(&dir.path().join("blobs/ab/2"));
        write(&dir.path().join("models--org--other/blobs/3"));
        symlink("../../blobs/1", snapshot.join("own")).expect("link");
        symlink("../../../blobs/ab/2", snapshot.join("shared")).expect("link");
        symlink(
            "../../../models--org--other/blobs/3",
            snapshot.join("other"),
        )
        .expect("link");
        let directory = Directory::open(&snapshot).expect("directory");
        assert!(directory.file("own").expect("own").is_some());
        assert!(directory.file("shared").expect("shared").is_some());
        assert_eq!(
            directory.file("other").expect_err("other").kind(),
            ErrorKind::InvalidFile
        );
    }

    #[test]
    fn a_pipe_or_a_directory_is_refused_and_not_waited_for() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::create_dir(dir.path().join("model.safetensors")).expect("mkdir");
        let pipe = dir.path().join("config.json");
        let made = std::process::Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .expect("mkfifo");
        assert!(made.success());
        let directory = Directory::open(dir.path()).expect("directory");
        for name in ["model.safetensors", "config.json"] {
            let error = directory.read(name, 10).expect_err("refused");
            assert!(
                error.to_string().starts_with("not a regular file"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_file_above_the_bound_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::write(dir.path().join("file"), b"12345").expect("write");
        let directory = Directory::open(dir.path()).expect("directory");
        assert_eq!(
            directory.read("file", 5).expect("read").expect("there"),
            b"12345"
        );
        assert!(
            directory
                .read("file", 4)
                .expect_err("long")
                .to_string()
                .starts_with("file is too long")
        );
    }
}
