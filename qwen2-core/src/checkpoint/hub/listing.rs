//! What a hub says of a repository: its files at one revision.

use std::collections::BTreeMap;

use serde::Deserialize;
use ureq::http::header;

use super::super::hub_id::{Hub, is_path};
use super::client::{Client, encoded};
use crate::config::one_line;
use crate::error::{Error, ErrorKind, Result};

/// The files of a repository, by their paths.
pub(super) struct Listing {
    /// A commit; of ModelScope the branch or tag that was asked for.
    pub(super) revision: String,
    pub(super) files: BTreeMap<String, RemoteFile>,
}

#[derive(Clone, Debug)]
pub(super) struct RemoteFile {
    pub(super) size: u64,
    /// In hexadecimal digits.
    pub(super) sha256: Option<String>,
    /// The name of its blob in the cache of Hugging Face.
    pub(super) tag: String,
    /// A mirror may list no more than names.
    described: bool,
}

/// `GET /api/models/{id}/revision/{revision}?blobs=true`
#[derive(Deserialize)]
struct ModelInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// `GET /api/v1/models/{id}/repo/files?Revision={revision}&Recursive=True`
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RepoFiles {
    message: Option<String>,
    success: Option<bool>,
    data: Option<RepoData>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RepoData {
    files: Option<Vec<RepoFile>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RepoFile {
    path: String,
    #[serde(rename = "Type")]
    kind: Option<String>,
    size: Option<u64>,
    sha256: Option<String>,
}

impl Listing {
    /// # Errors
    /// `NotFound` and `PermissionDenied` as the hub says, `Network`.
    pub(super) fn fetch(client: &Client, id: &str, revision: &str) -> Result<Self> {
        match client.settings.hub {
            Hub::HuggingFace => Self::hugging_face(client, id, revision),
            Hub::ModelScope => Self::model_scope(client, id, revision),
        }
    }

    fn hugging_face(client: &Client, id: &str, revision: &str) -> Result<Self> {
        let revision = encoded(revision, None);
        let info: ModelInfo =
            client.json(&format!("/api/models/{id}/revision/{revision}?blobs=true"))?;
        if !is_hash(&info.sha) {
            return Err(client.unusable("", &format!("revision {}", info.sha)));
        }
        let files = info.siblings.into_iter().map(|file| {
            let lfs = file.lfs.as_ref();
            let sha256 = lfs.and_then(|lfs| lfs.sha256.clone());
            let size = lfs.and_then(|lfs| lfs.size).or(file.size);
            let tag = sha256.clone().or(file.blob_id);
            let described = size.is_some() && tag.is_some();
            let remote = RemoteFile {
                size: size.unwrap_or(0),
                sha256,
                tag: tag.unwrap_or_default(),
                described,
            };
            (file.rfilename, remote)
        });
        Ok(Self {
            revision: info.sha,
            files: files.filter(|(name, _)| is_path(name, |_| false)).collect(),
        })
    }

    fn model_scope(client: &Client, id: &str, revision: &str) -> Result<Self> {
        let query = format!("Revision={}&Recursive=True", encoded(revision, None));
        let answer: RepoFiles = client.json(&format!("/api/v1/models/{id}/repo/files?{query}"))?;
        let listed = answer.data.and_then(|data| data.files);
        let (Some(listed), Some(true) | None) = (listed, answer.success) else {
            return Err(Error::new(ErrorKind::NotFound, "hub has no such model")
                .with_key(id)
                .with_why(one_line(&answer.message.unwrap_or_default()))
                .with_help("check the spelling of id and revision"));
        };
        let is_file = |file: &RepoFile| file.kind.as_deref() != Some("tree");
        let files = listed.into_iter().filter(is_file).map(|file| {
            let remote = RemoteFile {
                size: file.size.unwrap_or(0),
                sha256: file.sha256.filter(|sum| !sum.is_empty()),
                tag: String::new(),
                described: file.size.is_some(),
            };
            (file.path, remote)
        });
        Ok(Self {
            revision: revision.to_owned(),
            files: files.filter(|(name, _)| is_path(name, |_| false)).collect(),
        })
    }

    pub(super) fn names(&self) -> Vec<&str> {
        self.files.keys().map(String::as_str).collect()
    }

    /// The file at `name`, its size asked for where the listing does not have it. What becomes a name
    /// in the cache is checked here.
    pub(super) fn file(&self, client: &Client, name: &str, url: &str) -> Result<RemoteFile> {
        let Some(file) = self.files.get(name) else {
            return Err(Error::new(ErrorKind::NotFound, "hub has no such file")
                .with_key(client.key(name))
                .with_help("is this the repository of a model? its page lists its files"));
        };
        let file = match file.described {
            true => file.clone(),
            false => describe(client, name, url)?,
        };
        if client.settings.hub == Hub::HuggingFace && !is_hash(&file.tag) {
            return Err(client.unusable(name, &format!("ETag {}", file.tag)));
        }
        if let Some(sum) = &file.sha256
            && !(sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit()))
        {
            return Err(client.unusable(name, &format!("sha256 {sum}")));
        }
        Ok(RemoteFile {
            sha256: file.sha256.map(|sum| sum.to_ascii_lowercase()),
            ..file
        })
    }
}

#[cfg(test)]
impl RemoteFile {
    pub(super) fn of(tag: &str, size: u64) -> Self {
        Self {
            size,
            sha256: None,
            tag: tag.to_owned(),
            described: true,
        }
    }
}

/// Size and tag from the head of the file itself, as huggingface_hub asks for them.
fn describe(client: &Client, name: &str, url: &str) -> Result<RemoteFile> {
    let answer = client.get_here(url, name).map_err(|failed| failed.error)?;
    let header = |name: &str| {
        let value = answer.headers().get(name)?;
        value.to_str().ok().map(str::to_owned)
    };
    let tag = header("x-linked-etag").or_else(|| header("etag"));
    let tag = tag.unwrap_or_default();
    let tag = tag.strip_prefix("W/").unwrap_or(&tag).trim_matches('"');
    let range = header(header::CONTENT_RANGE.as_str());
    let whole = range.as_ref().and_then(|range| range.rsplit('/').next());
    let whole = whole.map(str::to_owned).filter(|_| answer.status() == 206);
    let size = header("x-linked-size").or(whole);
    let size = match (size, answer.status().as_u16()) {
        (None, 200) => header(header::CONTENT_LENGTH.as_str()),
        (size, _) => size,
    };
    let Some(size) = size.and_then(|size| size.parse().ok()) else {
        return Err(client.unusable(name, "no size"));
    };
    let is_sum = tag.len() == 64 && is_hash(tag);
    Ok(RemoteFile {
        size,
        sha256: is_sum.then(|| tag.to_owned()),
        tag: tag.to_owned(),
        described: true,
    })
}

/// Letters and digits only: such a name from the network cannot lead out of a directory.
pub(super) fn is_hash(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.chars().all(|c| c.is_ascii_alphanumeric())
}
