//! The directories in which the hubs' own tools keep models, and what they hold of one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::super::hub_id::{Hub, HubId};
use super::super::shards;
use super::super::source::Place;
use super::listing::{RemoteFile, is_hash};
use super::select::{OPTIONAL, REQUIRED, gguf_parts, is_gguf};
use super::settings::HubSettings;
use super::{ADAPTER, Want};
use crate::error::Result;

/// A model's folder in the cache.
#[derive(Clone, Debug)]
pub(super) struct CachedModel {
    hub: Hub,
    id: String,
    cache: PathBuf,
    pub(super) path: PathBuf,
    /// As asked for: `main`, `master`, a tag, a commit.
    pub(super) revision: String,
    /// Where the files of the revision are: by its commit, of ModelScope by its name.
    pub(super) commit: Option<String>,
}

/// What the cache has of a model.
pub(super) enum Found {
    Whole {
        place: Place,
        /// Nothing more can be on the hub that would matter.
        certain: bool,
    },
    /// The first files that it lacks.
    Lacks(Vec<String>),
}

/// Where a file goes.
pub(super) struct Paths {
    pub(super) target: PathBuf,
    pub(super) part: PathBuf,
    pub(super) lock: PathBuf,
}

impl CachedModel {
    pub(super) fn new(id: &HubId, settings: &HubSettings) -> Self {
        let folder = id.repository.replace('/', "--");
        let (path, default) = match settings.hub {
            Hub::HuggingFace => (settings.cache.join(format!("models--{folder}")), "main"),
            Hub::ModelScope => (settings.cache.join("models").join(folder), "master"),
        };
        let revision = id.revision.clone().unwrap_or_else(|| default.to_owned());
        let commit = match settings.hub {
            Hub::HuggingFace if is_commit(&revision) => Some(revision.clone()),
            Hub::HuggingFace => fs::read_to_string(path.join("refs").join(&revision)).ok(),
            Hub::ModelScope => Some(revision.clone()),
        };
        Self {
            hub: settings.hub,
            id: id.repository.clone(),
            cache: settings.cache.clone(),
            path,
            revision,
            commit: commit
                .map(|commit| commit.trim().to_owned())
                .filter(|commit| settings.hub == Hub::ModelScope || is_hash(commit)),
        }
    }

    /// Where the files are, by their names in the repository.
    pub(super) fn snapshot(&self) -> PathBuf {
        let commit = self.commit.as_deref().unwrap_or_default();
        self.path.join("snapshots").join(commit)
    }

    /// # Errors
    /// `InvalidArgument` if several GGUF files are meant.
    pub(super) fn find(&self, want: &Want) -> Result<Found> {
        if self.commit.is_none() {
            return Ok(Found::Lacks(lacking(want, &self.snapshot(), true)));
        }
        let snapshot = self.snapshot();
        let found = self.find_in(&snapshot, want)?;
        if let (Found::Lacks(_), Hub::ModelScope) = (&found, self.hub) {
            for old in self.older_snapshots() {
                // Their files came all together.
                if let Found::Whole { place, .. } = self.find_in(&old, want)? {
                    let certain = true;
                    return Ok(Found::Whole { place, certain });
                }
            }
        }
        Ok(found)
    }

    fn find_in(&self, snapshot: &Path, want: &Want) -> Result<Found> {
        let lacks = lacking(want, snapshot, false);
        if lacks.is_empty() && !matches!(want, Want::Model(Some(_))) {
            return Ok(Found::Whole {
                place: Place::Directory(snapshot.to_owned()),
                certain: *want == Want::Adapter || self.knows_optional_files(),
            });
        }
        let Want::Model(file) = want else {
            return Ok(Found::Lacks(lacks));
        };
        let names = names_in(snapshot);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        if file.is_none() && !is_gguf(&names) {
            return Ok(Found::Lacks(lacks));
        }
        let parts = match gguf_parts(&names, file.as_deref(), &self.id) {
            Ok(parts) => parts,
            Err(error) if error.kind() == crate::ErrorKind::NotFound => {
                return Ok(Found::Lacks(file.iter().cloned().collect()));
            }
            Err(error) => return Err(error),
        };
        let absent = |part: &&String| !snapshot.join(part).is_file();
        let lacks: Vec<String> = parts.iter().filter(absent).cloned().collect();
        if !lacks.is_empty() {
            return Ok(Found::Lacks(lacks));
        }
        Ok(Found::Whole {
            place: Place::Gguf(snapshot.join(&parts[0])),
            certain: file.is_some(),
        })
    }

    /// Where earlier versions of the package `modelscope` put the default revision.
    fn older_snapshots(&self) -> Vec<PathBuf> {
        let Some((organisation, name)) = self.id.split_once('/') else {
            return Vec::new();
        };
        if self.revision != "master" {
            return Vec::new();
        }
        let safe = name.replace('.', "___");
        let under = |folder: &str| match folder {
            "" => self.cache.join(organisation),
            folder => self.cache.join(folder).join(organisation),
        };
        ["models", "hub/models", "hub", ""]
            .iter()
            .flat_map(|folder| [under(folder).join(&safe), under(folder).join(name)])
            .collect()
    }

    /// Whether each optional file is there, or known not to exist on the hub.
    fn knows_optional_files(&self) -> bool {
        let snapshot = self.snapshot();
        let known = |name: &&str| snapshot.join(name).is_file() || self.no_exist(name).is_file();
        OPTIONAL.iter().all(known)
    }

    /// huggingface_hub's mark that a revision has no file of this name.
    fn no_exist(&self, name: &str) -> PathBuf {
        let commit = self.commit.as_deref().unwrap_or_default();
        self.path.join(".no_exist").join(commit).join(name)
    }

    pub(super) fn mark_no_exist(&self, name: &str) -> io::Result<()> {
        write_whole(&self.no_exist(name), b"")
    }

    /// Makes `commit` what the revision stands for, for us and for huggingface_hub.
    pub(super) fn write_ref(&self) -> io::Result<()> {
        match (&self.commit, self.hub) {
            (Some(commit), Hub::HuggingFace) if *commit != self.revision => {
                let path = self.path.join("refs").join(&self.revision);
                write_whole(&path, commit.as_bytes())
            }
            _ => Ok(()),
        }
    }

    /// Where the file `name` goes, its lock and its unfinished form, as the hub's own tool has them.
    pub(super) fn paths(&self, name: &str, file: &RemoteFile) -> Paths {
        match self.hub {
            Hub::HuggingFace => {
                let target = match cfg!(unix) {
                    true => self.path.join("blobs").join(&file.tag),
                    false => self.snapshot().join(name),
                };
                let folder = self.path.file_name().unwrap_or_default();
                let locks = self.cache.join(".locks").join(folder);
                Paths {
                    target,
                    part: self
                        .path
                        .join("blobs")
                        .join(format!("{}.incomplete", file.tag)),
                    lock: locks.join(format!("{}.lock", file.tag)),
                }
            }
            Hub::ModelScope => {
                let target = self.snapshot().join(name);
                let mut part = target.clone().into_os_string();
                part.push(".incomplete");
                Paths {
                    target,
                    part: part.into(),
                    lock: self
                        .cache
                        .join(".lock")
                        .join(model_scope_lock(&self.id, name)),
                }
            }
        }
    }

    /// Gives the blob of a file its name in the snapshot.
    pub(super) fn link(&self, name: &str, file: &RemoteFile) -> io::Result<()> {
        if self.hub == Hub::ModelScope {
            return Ok(());
        }
        link_blob(&self.snapshot().join(name), name, &file.tag)
    }
}

/// `revision` names its own directory.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// What `modelscope_hub` derives the name of a lock from.
fn model_scope_lock(id: &str, name: &str) -> String {
    use sha2::{Digest, Sha256};
    let key = ["modelscope-hub-download-lock-v2", "file", "model", id, name].join("\0");
    let sum = Sha256::digest(key.as_bytes());
    let digits: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("file_{digits}.lock")
}

/// The files that cannot be done without and that are not in `snapshot`, or all of them.
fn lacking(want: &Want, snapshot: &Path, all: bool) -> Vec<String> {
    let mut names: Vec<String> = match want {
        Want::Adapter => ADAPTER.map(str::to_owned).to_vec(),
        Want::Model(Some(file)) => return vec![file.clone()],
        Want::Model(None) => REQUIRED.map(str::to_owned).to_vec(),
    };
    if *want != Want::Adapter && !snapshot.join(shards::SINGLE).is_file() {
        let path = snapshot.join(shards::INDEX);
        let index = fs::read(&path).ok();
        let index = index.and_then(|index| shards::parse_index(&index, &path).ok());
        match index {
            Some(weight_map) if !all => names.extend(weight_map.into_values()),
            _ => names.push(shards::SINGLE.to_owned()),
        }
    }
    names.retain(|name| all || !snapshot.join(name).is_file());
    names.sort();
    names.dedup();
    names
}

/// The files below `snapshot`, by their names in the repository.
fn names_in(snapshot: &Path) -> Vec<String> {
    fn add(directory: &Path, prefix: &str, depth: usize, names: &mut Vec<String>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let (path, name) = (entry.path(), format!("{prefix}{name}"));
            if path.is_file() {
                names.push(name);
            } else if depth > 0 && path.is_dir() {
                add(&path, &format!("{name}/"), depth - 1, names);
            }
        }
    }
    let mut names = Vec::new();
    add(snapshot, "", 3, &mut names);
    names
}

/// Writes the file under another name first, so that nobody sees half of it.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent)?;
    let unfinished = unfinished(path);
    fs::write(&unfinished, bytes)?;
    fs::rename(unfinished, path)
}

fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.incomplete", std::process::id()));
    name.into()
}

#[cfg(unix)]
fn link_blob(pointer: &Path, name: &str, tag: &str) -> io::Result<()> {
    fs::create_dir_all(pointer.parent().unwrap_or(pointer))?;
    let mut blob = PathBuf::new();
    for _ in 0..2 + name.matches('/').count() {
        blob.push("..");
    }
    blob.push("blobs");
    blob.push(tag);
    let unfinished = unfinished(pointer);
    let _ = fs::remove_file(&unfinished);
    std::os::unix::fs::symlink(blob, &unfinished)?;
    fs::rename(unfinished, pointer)
}

/// Elsewhere links need rights that few have: the file itself is in the snapshot.
#[cfg(not(unix))]
fn link_blob(_pointer: &Path, _name: &str, _tag: &str) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An empty cache, and `org/name` in it.
    fn model(hub: Hub, cache: &Path) -> CachedModel {
        let settings = HubSettings::from_lookup(Some(hub), &|name| match name {
            "HF_HUB_CACHE" | "MODELSCOPE_CACHE" => Some(cache.into()),
            _ => None,
        });
        let id = HubId::parse("org/name").expect("id");
        CachedModel::new(&id, &settings.expect("settings"))
    }

    fn lacks(model: &CachedModel) -> Vec<String> {
        match model.find(&Want::Model(None)).expect("found") {
            Found::Whole { .. } => Vec::new(),
            Found::Lacks(files) => files,
        }
    }

    #[test]
    fn a_snapshot_counts_as_complete_only_with_all_its_shards() {
        let dir = tempfile::tempdir().expect("tempdir");
        let all = ["config.json", "model.safetensors", "tokenizer.json"];
        assert_eq!(lacks(&model(Hub::HuggingFace, dir.path())), all);
        let path = dir.path().join("models--org--name");
        write_whole(&path.join("refs/main"), b"abc").expect("write");
        let snapshot = path.join("snapshots/abc");
        for name in REQUIRED {
            write_whole(&snapshot.join(name), b"{}").expect("write");
        }
        let index = br#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        write_whole(&snapshot.join(shards::INDEX), index).expect("write");
        write_whole(&snapshot.join("1.safetensors"), b"").expect("write");
        let model = model(Hub::HuggingFace, dir.path());
        assert_eq!(lacks(&model), ["2.safetensors"]);
        write_whole(&snapshot.join("2.safetensors"), b"").expect("write");
        let certain = |model: &CachedModel| match model.find(&Want::Model(None)) {
            Ok(Found::Whole { place, certain }) => {
                assert_eq!(place, Place::Directory(snapshot.clone()));
                certain
            }
            _ => panic!("not found"),
        };
        assert!(!certain(&model), "the hub may have a chat template");
        for name in OPTIONAL {
            model.mark_no_exist(name).expect("mark");
        }
        assert!(certain(&model));
    }

    #[test]
    fn a_revision_that_leads_elsewhere_is_not_followed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let refs = dir.path().join("models--org--name/refs");
        for commit in ["../../elsewhere", "", "/etc"] {
            write_whole(&refs.join("main"), commit.as_bytes()).expect("write");
            assert!(model(Hub::HuggingFace, dir.path()).commit.is_none());
        }
    }

    /// Names that the packages huggingface_hub 1.0 and modelscope_hub 0.5.1 compute.
    #[test]
    fn locks_are_those_of_the_hubs_own_tools() {
        let file = RemoteFile::of("abc", 1);
        let cache = Path::new("/cache");
        let paths = model(Hub::HuggingFace, cache).paths("config.json", &file);
        let lock = cache.join(".locks/models--org--name/abc.lock");
        assert_eq!(paths.lock, lock);
        let paths = model(Hub::ModelScope, cache).paths("config.json", &file);
        assert_eq!(
            paths.lock,
            cache.join(
                ".lock/file_6150f997234390e95b840470522f0f8cf17e39e33aeff246788deda8b5131b81.lock"
            )
        );
    }
}
