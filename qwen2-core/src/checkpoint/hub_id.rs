//! The ids of models on a hub: `[hub:]org/name[@revision][:file]`.

/// Where models are published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hub {
    HuggingFace,
    ModelScope,
}

/// The words that an id may start with, and that `QWEN2_HUB` may hold.
const NAMES: [(&str, Hub); 3] = [
    ("huggingface", Hub::HuggingFace),
    ("hf", Hub::HuggingFace),
    ("modelscope", Hub::ModelScope),
];

impl Hub {
    pub(super) fn from_name(name: &str) -> Option<Self> {
        let named = |(known, _): &&(&str, Self)| known.eq_ignore_ascii_case(name);
        NAMES.iter().find(named).map(|(_, hub)| *hub)
    }
}

/// A model on a hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HubId {
    /// Named in the id; else the environment says which.
    pub(super) hub: Option<Hub>,
    /// `org/name`.
    pub(super) repository: String,
    /// A branch, a tag or a commit.
    pub(super) revision: Option<String>,
    /// Which of a repository's GGUF files: `Q4_0`, a name, or a pattern with `*`.
    pub(super) file: Option<String>,
}

impl HubId {
    /// `None` for text that is no id.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (hub, rest) = match text.split_once(':') {
            Some((name, rest)) if Hub::from_name(name).is_some() => (Hub::from_name(name), rest),
            _ => (None, text),
        };
        let (rest, file) = match rest.split_once(':') {
            Some((rest, file)) => (rest, Some(file)),
            None => (rest, None),
        };
        let (repository, revision) = match rest.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (rest, None),
        };
        let valid = is_repository(repository)
            && revision.is_none_or(is_revision)
            && file.is_none_or(|file| is_path(file, |c| c == '*'));
        valid.then(|| Self {
            hub,
            repository: repository.to_owned(),
            revision: revision.map(str::to_owned),
            file: file.map(str::to_owned),
        })
    }
}

/// The rule of huggingface_hub (`validate_repo_id`), with an organisation required.
fn is_repository(text: &str) -> bool {
    let part = |part: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let edge = |c: char| c.is_ascii_alphanumeric() || c == '_';
        part.len() <= 96
            && part.chars().all(inner)
            && part.starts_with(edge)
            && part.ends_with(edge)
    };
    let Some((org, name)) = text.split_once('/') else {
        return false;
    };
    let odd = text.contains("--") || text.contains("..") || text.ends_with(".git");
    part(org) && part(name) && !odd
}

/// What git allows and a path of the cache may have: `main`, `v1.0`, `refs/pr/3`, a hash.
fn is_revision(text: &str) -> bool {
    text.len() <= 255 && is_path(text, |_| false) && !text.contains(' ')
}

/// Whether `text` leads down from a directory on any system, its parts plain names.
pub(super) fn is_path(text: &str, also: impl Fn(char) -> bool) -> bool {
    let inner = |c: char| {
        c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | ' ' | '(' | ')') || also(c)
    };
    let part = |part: &str| {
        (1..=255).contains(&part.len()) && !part.starts_with('.') && part.chars().all(inner)
    };
    text.len() <= 1024 && text.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["Qwen/Qwen2-0.5B-Instruct", "a/b", "org_1/name.v2", "_a/b_"] {
            let plain = HubId::parse(id).expect(id);
            assert_eq!((plain.hub, plain.revision, plain.file), (None, None, None));
            assert_eq!(plain.repository, id);
        }
        for path in [
            "",
            "name",
            "/abs/path",
            "./org/name",
            "../org/name",
            "~/model",
            "a/b/c",
            "a\\b",
            "org/",
            "/name",
            "org/na me",
            "org/name.git",
            "org/a..b",
            "org/a--b",
            "org/.hidden",
            "-o/n",
            "ö/n",
            "C:/model",
            "other:org/name",
            "modelscope:name",
            "a/b@",
            "a/b:",
            "a/b@../c",
            "a/b:../c",
            "a/b:/c",
            "a/b@.x",
            "a/b:c:d",
            "a/b:\\c",
        ] {
            assert_eq!(HubId::parse(path), None, "{path}");
        }
    }

    #[test]
    fn an_id_may_name_its_hub_a_revision_and_a_file() {
        let id =
            HubId::parse("modelscope:qwen/Qwen2-7B-GGUF@refs/pr/1:q4/*Q4_0*.gguf").expect("id");
        assert_eq!(id.hub, Some(Hub::ModelScope));
        assert_eq!(id.repository, "qwen/Qwen2-7B-GGUF");
        assert_eq!(id.revision.as_deref(), Some("refs/pr/1"));
        assert_eq!(id.file.as_deref(), Some("q4/*Q4_0*.gguf"));
        let id = HubId::parse("HF:a/b:Q4_K_M").expect("id");
        assert_eq!(id.hub, Some(Hub::HuggingFace));
        assert_eq!((id.revision, id.file.as_deref()), (None, Some("Q4_K_M")));
    }
}
