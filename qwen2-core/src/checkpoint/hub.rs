//! Ids of the Hugging Face hub → a directory of the standard cache.

mod fetch;

use std::ffi::OsString;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::shards::{self, listed};
use super::{CONFIG, GENERATION_CONFIG, Progress};
use crate::error::{Error, ErrorKind, Result};

const TOKENIZER: &str = "tokenizer.json";
const REQUIRED: [&str; 2] = [CONFIG, TOKENIZER];
/// Files that a model may do without; what they say changes its behaviour, so that their absence
/// must be known and not assumed.
const OPTIONAL: [&str; 3] = [
    GENERATION_CONFIG,
    "tokenizer_config.json",
    "chat_template.jinja",
];
const MAIN: &str = "main";

/// Where and how to download; read from the environment in one place, as huggingface_hub does.
#[derive(Clone)]
pub(super) struct HubSettings {
    /// `HF_HUB_CACHE`, or `hub` in `HF_HOME` (`~/.cache/huggingface`).
    cache: PathBuf,
    /// `HF_ENDPOINT`.
    endpoint: String,
    /// `HF_TOKEN`, or the file `token` in `HF_HOME`.
    token: Option<String>,
    /// `HF_HUB_OFFLINE`: only the cache is looked at.
    offline: bool,
    /// `HF_HUB_DOWNLOAD_TIMEOUT`, seconds without a byte.
    stall: Duration,
}

impl HubSettings {
    /// # Errors
    /// `NotFound` if the environment does not say where the cache is.
    pub(super) fn from_env() -> Result<Self> {
        Self::from_lookup(&|name| std::env::var_os(name))
    }

    fn from_lookup(lookup: &dyn Fn(&str) -> Option<OsString>) -> Result<Self> {
        let value = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let text = |name: &str| value(name).and_then(|value| value.into_string().ok());
        let user = value("HOME")
            .or_else(|| value("USERPROFILE"))
            .map(PathBuf::from);
        let path =
            |name: &str| value(name).map(|value| expand(PathBuf::from(value), user.as_deref()));
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| {
                user.as_ref()
                    .map(|user| user.join(".cache").join("huggingface"))
            });
        let token_file =
            path("HF_TOKEN_PATH").or_else(|| home.as_ref().map(|home| home.join("token")));
        let stored = || fs::read_to_string(token_file?).ok();
        let token = text("HF_TOKEN")
            .or_else(|| text("HUGGING_FACE_HUB_TOKEN"))
            .or_else(stored);
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let cache = cache
            .or_else(|| home.map(|home| home.join("hub")))
            .ok_or_else(no_cache)?;
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let seconds = text("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|seconds| seconds.parse().ok());
        let on = |name: &str| text(name).is_some_and(|value| is_true(&value));
        Ok(Self {
            cache: std::path::absolute(&cache)
                .map_err(|error| Error::io("cache cannot be found", &cache, error))?,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token
                .map(|token| token.trim().to_owned())
                .filter(|token| !token.is_empty()),
            offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
            stall: Duration::from_secs(seconds.unwrap_or(30).max(1)),
        })
    }
}

/// The spellings of huggingface_hub.
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str())
}

fn no_cache() -> Error {
    Error::new(ErrorKind::NotFound, "no place for downloads")
        .with_why("neither HF_HOME nor HOME is set")
        .with_help("set HF_HOME, or give the directory of the model")
}

/// `~` stands for the user's home, as huggingface_hub has it.
fn expand(path: PathBuf, user: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), user) {
        (Ok(rest), Some(user)) => user.join(rest),
        _ => path,
    }
}

/// The directory of the model `id`, downloaded if the cache does not have all of it.
///
/// What the cache has is used without asking the hub: to get a newer revision, delete it there.
///
/// # Errors
/// `NotFound` for an id the hub does not know, or the cache in offline mode; `PermissionDenied`
/// for a private or gated model; `Network`; `Cancelled` if `progress` breaks; `Io` for the cache.
pub(super) fn directory(
    id: &str,
    settings: &HubSettings,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<PathBuf> {
    let cached = CachedModel::new(id, settings);
    let missing = cached.missing();
    if missing.is_empty() && (settings.offline || cached.knows_optional_files()) {
        return Ok(cached.snapshot());
    }
    if settings.offline {
        let missing: Vec<&str> = missing.iter().map(String::as_str).collect();
        return Err(Error::new(ErrorKind::NotFound, "model is not in the cache")
            .with_path(cached.path)
            .with_key(id)
            .with_why(format!(
                "HF_HUB_OFFLINE is set and the cache lacks {}",
                listed(&missing)
            ))
            .with_help("unset HF_HUB_OFFLINE to download it"));
    }
    match fetch::fetch(id, cached.commit.as_deref(), settings, progress) {
        Err(error) if error.kind() == ErrorKind::Network && missing.is_empty() => {
            tracing::info!(%error, id, "hub not reached, the cached model is used");
            Ok(cached.snapshot())
        }
        outcome => outcome,
    }
}

/// A model's folder in the cache, at the revision that `refs/main` names.
struct CachedModel {
    path: PathBuf,
    commit: Option<String>,
}

impl CachedModel {
    fn new(id: &str, settings: &HubSettings) -> Self {
        let path = settings
            .cache
            .join(format!("models--{}", id.replace('/', "--")));
        let commit = fs::read_to_string(path.join("refs").join(MAIN)).ok();
        let commit = commit
            .map(|commit| commit.trim().to_owned())
            .filter(|commit| is_hash(commit));
        Self { path, commit }
    }

    fn snapshot(&self) -> PathBuf {
        self.path
            .join("snapshots")
            .join(self.commit.as_deref().unwrap_or_default())
    }

    /// The files that no model can do without and that are not there.
    fn missing(&self) -> Vec<String> {
        let mut missing: Vec<String> = REQUIRED.iter().map(|&name| name.to_owned()).collect();
        if self.commit.is_none() {
            missing.push(shards::SINGLE.to_owned());
            return missing;
        }
        let snapshot = self.snapshot();
        let absent = |name: &String| !snapshot.join(name).is_file();
        if !snapshot.join(shards::SINGLE).is_file() {
            let path = snapshot.join(shards::INDEX);
            let index = fs::read(&path)
                .ok()
                .and_then(|index| shards::parse_index(&index, &path).ok());
            match index {
                Some(weight_map) => missing.extend(weight_map.into_values()),
                None => missing.push(shards::SINGLE.to_owned()),
            }
        }
        missing.retain(absent);
        missing.sort();
        missing.dedup();
        missing
    }

    /// Whether each optional file is there, or known not to exist on the hub.
    fn knows_optional_files(&self) -> bool {
        let snapshot = self.snapshot();
        let known = |name: &&str| snapshot.join(name).is_file() || self.no_exist(name).is_file();
        OPTIONAL.iter().all(known)
    }

    /// huggingface_hub's mark that a revision has no file of this name.
    fn no_exist(&self, name: &str) -> PathBuf {
        self.path
            .join(".no_exist")
            .join(self.commit.as_deref().unwrap_or_default())
            .join(name)
    }

    fn mark_no_exist(&self, name: &str) -> std::io::Result<()> {
        let mark = self.no_exist(name);
        fs::create_dir_all(mark.parent().unwrap_or(&self.path))?;
        fs::write(mark, b"")
    }
}

/// Letters and digits only: such a name from the network cannot lead out of a directory.
fn is_hash(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.chars().all(|c| c.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(values: &[(&str, &str)]) -> Result<HubSettings> {
        HubSettings::from_lookup(&|name| {
            values
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_puts_it() {
        let cases: [(&[(&str, &str)], &str); 6] = [
            (&[("HOME", "/u")], "/u/.cache/huggingface/hub"),
            (
                &[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")],
                "/x/huggingface/hub",
            ),
            (&[("HOME", "/u"), ("HF_HOME", "/h")], "/h/hub"),
            (&[("HOME", "/u"), ("HF_HOME", "~/h")], "/u/h/hub"),
            (&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")], "/c"),
            (
                &[("HF_HOME", ""), ("HOME", "/u")],
                "/u/.cache/huggingface/hub",
            ),
        ];
        for (values, cache) in cases {
            assert_eq!(settings(values).expect("settings").cache, Path::new(cache));
        }
        assert_eq!(
            settings(&[]).err().expect("nowhere").kind(),
            ErrorKind::NotFound
        );
    }

    #[test]
    fn endpoint_token_and_switches_are_read() {
        let plain = settings(&[("HOME", "/none")]).expect("settings");
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert!(plain.token.is_none() && !plain.offline);
        let values = [
            ("HOME", "/none"),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_TOKEN", " secret\n"),
            ("HF_HUB_OFFLINE", "true"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "7"),
        ];
        let set = settings(&values).expect("settings");
        assert_eq!(set.endpoint, "http://mirror");
        assert_eq!(set.token.as_deref(), Some("secret"));
        assert!(set.offline);
        assert_eq!(set.stall, Duration::from_secs(7));
    }

    #[test]
    fn a_token_that_was_logged_in_is_found_in_its_file() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::write(dir.path().join("token"), "stored\n").expect("write");
        let home = dir.path().to_str().expect("text");
        assert_eq!(
            settings(&[("HF_HOME", home)])
                .expect("settings")
                .token
                .as_deref(),
            Some("stored")
        );
    }

    #[test]
    fn a_snapshot_counts_as_complete_only_with_all_its_shards() {
        let dir = tempfile::tempdir().expect("tempdir");
        let home = dir.path().to_str().expect("text");
        let settings =
            settings(&[("HF_HUB_CACHE", home), ("HF_HUB_OFFLINE", "1")]).expect("settings");
        let open = || directory("org/name", &settings, &mut |_| ControlFlow::Continue(()));
        let error = open().expect_err("nothing there");
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().ends_with(
            "models--org--name: org/name: HF_HUB_OFFLINE is set and the cache lacks config.json, \
             tokenizer.json, model.safetensors"
        ));

        let model = dir.path().join("models--org--name");
        let snapshot = model.join("snapshots/abc");
        fs::create_dir_all(&snapshot).expect("mkdir");
        fs::create_dir_all(model.join("refs")).expect("mkdir");
        fs::write(model.join("refs/main"), "abc").expect("write");
        for name in REQUIRED {
            fs::write(snapshot.join(name), "{}").expect("write");
        }
        let index = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        fs::write(snapshot.join(shards::INDEX), index).expect("write");
        fs::write(snapshot.join("1.safetensors"), "").expect("write");
        assert!(
            open()
                .expect_err("half")
                .to_string()
                .ends_with("lacks 2.safetensors")
        );
        fs::write(snapshot.join("2.safetensors"), "").expect("write");
        assert_eq!(open().expect("complete"), snapshot);
    }

    #[test]
    fn a_revision_that_leads_elsewhere_is_not_followed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let home = dir.path().to_str().expect("text");
        let settings = settings(&[("HF_HUB_CACHE", home)]).expect("settings");
        let refs = dir.path().join("models--org--name/refs");
        fs::create_dir_all(&refs).expect("mkdir");
        for commit in ["../../elsewhere", "", "/etc"] {
            fs::write(refs.join(MAIN), commit).expect("write");
            assert!(CachedModel::new("org/name", &settings).commit.is_none());
        }
    }
}
