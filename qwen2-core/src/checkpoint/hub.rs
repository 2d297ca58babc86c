//! Ids of the hubs → a place in their caches, downloaded if it is not there.

mod cache;
mod client;
mod download;
mod listing;
mod select;
mod settings;
mod transfer;

use std::ops::ControlFlow;

pub(super) use settings::HubSettings;

use super::Progress;
use super::hub_id::HubId;
use super::shards::listed;
use super::source::Place;
use crate::error::{Error, ErrorKind, Result};
use cache::{CachedModel, Found};

/// The files of a LoRA adapter, as PEFT saves it.
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// What is wanted of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// A checkpoint, or the GGUF file that this names.
    Model(Option<String>),
    /// A LoRA adapter.
    Adapter,
}

/// Where the model `id` is, downloaded if the cache does not have all of it.
///
/// What the cache has is used without asking the hub: to get a newer revision, delete it there.
///
/// # Errors
/// `NotFound` for an id the hub does not know, or the cache in offline mode; `InvalidArgument` if
/// several files are meant; `PermissionDenied` for a private or gated model; `Network`; `Cancelled`
/// if `progress` breaks; `Io` for the cache.
pub(super) fn place(
    id: &HubId,
    want: &Want,
    settings: &HubSettings,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Place> {
    let cached = CachedModel::new(id, settings);
    let found = match cached.find(want) {
        // The hub may have other names than the cache.
        Err(_) if settings.offline.is_none() => Found::Lacks(Vec::new()),
        found => found?,
    };
    let offline = match (found, settings.offline) {
        (Found::Whole { place, certain }, offline) if certain || offline.is_some() => {
            return Ok(place);
        }
        (Found::Lacks(files), Some(variable)) => {
            return Err(not_cached(&id.repository, &cached, &files, variable));
        }
        (Found::Whole { place, .. }, _) => Some(place),
        (Found::Lacks(_), None) => None,
    };
    match (
        download::fetch(&id.repository, want, cached, settings, progress),
        offline,
    ) {
        (Err(error), Some(place)) if error.kind() == ErrorKind::Network => {
            tracing::info!(%error, id = id.repository, "hub not reached, the cached model is used");
            Ok(place)
        }
        (outcome, _) => outcome,
    }
}

fn not_cached(id: &str, cached: &CachedModel, files: &[String], variable: &str) -> Error {
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let files = listed(&files);
    Error::new(ErrorKind::NotFound, "model is not in the cache")
        .with_path(&cached.path)
        .with_key(id)
        .with_why(format!("{variable} is set and the cache lacks {files}"))
        .with_help(format!("unset {variable} to download it"))
}
