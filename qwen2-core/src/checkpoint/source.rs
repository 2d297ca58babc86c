//! Where a model comes from: a path, or an id of a hub.

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::hub_id::HubId;
use super::{Progress, gguf};
use crate::error::{Error, ErrorKind, Result};

/// Where a model comes from.
///
/// Text is a path if something exists there, else an id if it has the form
/// `[hub:]org/name[@revision][:file]`: `hub` is `huggingface` (`hf`) or `modelscope`, by default what
/// the variable `QWEN2_HUB` says, else `huggingface`; `revision` a branch, a tag or a commit; `file`
/// picks one of a repository's GGUF files, by its quantization (`Q4_0`), its name, or a pattern with
/// `*`. A [`Path`] is always a path.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory with `config.json` and weights, a `.safetensors` file in one, or a GGUF file.
    Path(PathBuf),
    /// A path or a hub id, decided when it is opened.
    Text(String),
}

/// A model on this machine.
#[derive(Debug, PartialEq)]
pub(super) enum Place {
    /// Of safetensors files.
    Directory(PathBuf),
    /// The file, or the first of several.
    Gguf(PathBuf),
}

impl From<&str> for Source {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Source {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&String> for Source {
    fn from(text: &String) -> Self {
        Self::Text(text.clone())
    }
}

impl From<&Path> for Source {
    fn from(path: &Path) -> Self {
        Self::Path(path.to_owned())
    }
}

impl From<PathBuf> for Source {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl From<&PathBuf> for Source {
    fn from(path: &PathBuf) -> Self {
        Self::Path(path.clone())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl Source {
    /// Where the model is, downloaded first if it is an id of the hub.
    ///
    /// # Errors
    /// `NotFound` for what is neither a path nor an id, `Unsupported` for an id without the cargo
    /// feature `hub`, `InvalidArgument` for another kind of file, and what the download says.
    pub(super) fn place(
        &self,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Place> {
        let path = match self {
            Self::Path(path) => path.as_path(),
            Self::Text(text) => Path::new(text),
        };
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => of_directory(path),
            Ok(_) => of_file(path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => match self {
                Self::Text(text) if let Some(id) = HubId::parse(text) => {
                    from_hub(&id, What::Model, progress)
                }
                _ => Err(Error::new(ErrorKind::NotFound, "no such model")
                    .with_path(path)
                    .with_help(
                        "give a directory with config.json and model.safetensors, or an id of the \
                         hub such as Qwen/Qwen2-0.5B-Instruct",
                    )),
            },
            Err(error) => Err(Error::io("model cannot be opened", path, error)),
        }
    }
}

/// A directory is of safetensors unless it has no config and a GGUF file.
fn of_directory(path: &Path) -> Result<Place> {
    if !path.join(super::CONFIG).exists()
        && let Some(file) = gguf::only_file(path)?
    {
        return Ok(Place::Gguf(file));
    }
    Ok(Place::Directory(path.to_owned()))
}

fn of_file(path: &Path) -> Result<Place> {
    let extension = path
        .extension()
        .and_then(|extension| extension.to_str())
        .unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "safetensors" => Ok(Place::Directory(match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        })),
        "gguf" => Ok(Place::Gguf(path.to_owned())),
        _ => Err(Error::new(ErrorKind::InvalidArgument, "not a model")
            .with_path(path)
            .with_help(
                "give the directory that holds config.json and model.safetensors, or a .gguf file",
            )),
    }
}

/// The directory of a LoRA adapter: `path` itself, or where nothing is there and it reads like an id,
/// that of the adapter on a hub, downloaded first.
///
/// # Errors
/// As [`Source::place`] for an id; a path is not looked at.
pub(super) fn adapter_directory(path: &Path) -> Result<PathBuf> {
    let id = path.to_str().and_then(HubId::parse);
    match id.filter(|id| id.file.is_none() && !path.exists()) {
        None => Ok(path.to_owned()),
        Some(id) => match from_hub(&id, What::Adapter, &mut |_| ControlFlow::Continue(()))? {
            Place::Directory(path) | Place::Gguf(path) => Ok(path),
        },
    }
}

/// What a repository is looked at for.
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
enum What {
    Model,
    Adapter,
}

#[cfg(feature = "hub")]
fn from_hub(
    id: &HubId,
    what: What,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Place> {
    let settings = super::hub::HubSettings::from_env(id.hub)?;
    let want = match what {
        What::Model => super::hub::Want::Model(id.file.clone()),
        What::Adapter => super::hub::Want::Adapter,
    };
    super::hub::place(id, &want, &settings, progress)
}

#[cfg(not(feature = "hub"))]
fn from_hub(
    id: &HubId,
    _what: What,
    _progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Place> {
    Err(
        Error::new(ErrorKind::Unsupported, "hub ids need the cargo feature hub")
            .with_key(&id.repository)
            .with_help("build with the feature, or give a directory; none of this name exists"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(source: impl Into<Source>) -> Result<Place> {
        source.into().place(&mut |_| ControlFlow::Continue(()))
    }

    #[test]
    fn what_exists_is_a_path_and_a_weight_file_stands_for_its_directory() {
        let dir = tempfile::tempdir().expect("tempdir");
        let weights = dir.path().join("model.safetensors");
        std::fs::write(&weights, b"").expect("write");
        let directory = Place::Directory(dir.path().to_owned());
        assert_eq!(open(dir.path()).expect("directory"), directory);
        assert_eq!(open(&weights).expect("file"), directory);
        assert_eq!(
            open(weights.to_str().expect("text")).expect("text"),
            directory
        );
    }

    #[test]
    fn a_directory_with_one_gguf_model_and_no_config_is_that_model() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = |name: &str| dir.path().join(name);
        std::fs::write(file("a-00001-of-00002.gguf"), b"").expect("write");
        std::fs::write(file("a-00002-of-00002.gguf"), b"").expect("write");
        let first = Place::Gguf(file("a-00001-of-00002.gguf"));
        assert_eq!(open(dir.path()).expect("split"), first);
        std::fs::write(file("b.gguf"), b"").expect("write");
        let error = open(dir.path()).expect_err("two models");
        assert!(
            error.to_string().ends_with("a-00001-of-00002.gguf, b.gguf"),
            "{error}"
        );
        std::fs::write(file("config.json"), b"").expect("write");
        let directory = Place::Directory(dir.path().to_owned());
        assert_eq!(open(dir.path()).expect("directory"), directory);
    }

    #[test]
    fn other_files_and_missing_paths_are_refused_with_the_way_out() {
        let dir = tempfile::tempdir().expect("tempdir");
        let other = dir.path().join("model.bin");
        std::fs::write(&other, b"").expect("write");
        let error = open(other).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        let error = open(dir.path().join("absent")).expect_err("absent");
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.help().is_some());
        assert_eq!(open("").expect_err("empty").kind(), ErrorKind::NotFound);
        // A path type never goes to the network, whatever it looks like.
        assert_eq!(
            open(Path::new("org/name")).expect_err("path").kind(),
            ErrorKind::NotFound
        );
    }

    #[cfg(not(feature = "hub"))]
    #[test]
    fn an_id_without_the_feature_says_which_feature() {
        let error = open("org/name").expect_err("no feature");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(
            error.to_string(),
            "hub ids need the cargo feature hub: org/name"
        );
    }
}
