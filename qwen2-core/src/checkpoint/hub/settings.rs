//! Where and how to download, as the environment says it to the hubs' own tools.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::hub_id::Hub;
use crate::error::{Error, ErrorKind, Result};

/// Variables that keep us from the network, whichever hub it is.
const OFFLINE: [&str; 3] = ["QWEN2_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"];
/// Variables that name a file of certificates, as httpx and requests read them.
const CERTIFICATES: [&str; 2] = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"];
/// Seconds without a byte.
const STALL: u64 = 30;

/// The settings of one hub.
#[derive(Clone, Debug)]
pub(crate) struct HubSettings {
    pub(super) hub: Hub,
    /// `HF_HUB_CACHE`, or `hub` in `HF_HOME` (`~/.cache/huggingface`); `MODELSCOPE_CACHE`
    /// (`~/.cache/modelscope`).
    pub(super) cache: PathBuf,
    /// `HF_ENDPOINT`; `MODELSCOPE_ENDPOINT` or `MODELSCOPE_DOMAIN`.
    pub(super) endpoint: String,
    /// `HF_TOKEN`, or the file `token` in `HF_HOME`; `MODELSCOPE_API_TOKEN`.
    pub(super) token: Option<String>,
    /// The variable that forbids the network: only the cache is looked at.
    pub(super) offline: Option<&'static str>,
    /// `HF_HUB_DOWNLOAD_TIMEOUT`; `MODELSCOPE_DOWNLOAD_TIMEOUT`.
    pub(super) stall: Duration,
    /// The file of certificates that servers are trusted by, and the variable that names it; `None`: those
    /// of Mozilla's list.
    pub(super) certificates: Option<(&'static str, PathBuf)>,
}

/// What the help of an error names.
pub(super) struct Variables {
    pub(super) cache: &'static str,
    pub(super) endpoint: &'static str,
    pub(super) token: &'static str,
}

type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl HubSettings {
    /// The settings of `hub`, or of the one that `QWEN2_HUB` names, or of Hugging Face.
    ///
    /// # Errors
    /// `NotFound` if the environment does not say where the cache is, `InvalidArgument` for another
    /// value of `QWEN2_HUB`.
    pub(crate) fn from_env(hub: Option<Hub>) -> Result<Self> {
        Self::from_lookup(hub, &|name| std::env::var_os(name))
    }

    pub(super) fn from_lookup(hub: Option<Hub>, lookup: Lookup) -> Result<Self> {
        let environment = Environment::new(lookup);
        let hub = match (hub, environment.text("QWEN2_HUB")) {
            (Some(hub), _) => hub,
            (None, None) => Hub::HuggingFace,
            (None, Some(name)) => Hub::from_name(&name).ok_or_else(|| {
                Error::new(ErrorKind::InvalidArgument, "no such hub")
                    .with_key("QWEN2_HUB")
                    .with_why(crate::config::one_line(&name))
                    .with_help("set it to huggingface or modelscope, or unset it")
            })?,
        };
        match hub {
            Hub::HuggingFace => environment.hugging_face(),
            Hub::ModelScope => environment.model_scope(),
        }
    }

    pub(super) fn variables(&self) -> Variables {
        match self.hub {
            Hub::HuggingFace => Variables {
                cache: "HF_HOME",
                endpoint: "HF_ENDPOINT",
                token: "HF_TOKEN",
            },
            Hub::ModelScope => Variables {
                cache: "MODELSCOPE_CACHE",
                endpoint: "MODELSCOPE_ENDPOINT",
                token: "MODELSCOPE_API_TOKEN",
            },
        }
    }
}

/// The environment variables, empty ones left out.
struct Environment<'a> {
    lookup: Lookup<'a>,
    user: Option<PathBuf>,
}

impl<'a> Environment<'a> {
    fn new(lookup: Lookup<'a>) -> Self {
        let mut environment = Self { lookup, user: None };
        let user = environment.value("HOME");
        environment.user = user
            .or_else(|| environment.value("USERPROFILE"))
            .map(PathBuf::from);
        environment
    }

    fn value(&self, name: &str) -> Option<OsString> {
        (self.lookup)(name).filter(|value| !value.is_empty())
    }

    fn text(&self, name: &str) -> Option<String> {
        self.value(name).and_then(|value| value.into_string().ok())
    }

    /// `~` stands for the user's home, as huggingface_hub has it.
    fn path(&self, name: &str) -> Option<PathBuf> {
        let path = PathBuf::from(self.value(name)?);
        Some(match (path.strip_prefix("~"), &self.user) {
            (Ok(rest), Some(user)) => user.join(rest),
            _ => path,
        })
    }

    fn hugging_face(&self) -> Result<HubSettings> {
        let in_cache = |user: &PathBuf| user.join(".cache").join("huggingface");
        let home = self
            .path("HF_HOME")
            .or_else(|| Some(self.path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| self.user.as_ref().map(in_cache));
        let cache = self
            .path("HF_HUB_CACHE")
            .or_else(|| self.path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| home.as_ref().map(|home| home.join("hub")));
        let token_file = self
            .path("HF_TOKEN_PATH")
            .or_else(|| home.map(|home| home.join("token")));
        let token = self
            .text("HF_TOKEN")
            .or_else(|| self.text("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| fs::read_to_string(token_file?).ok());
        let endpoint = self.text("HF_ENDPOINT");
        let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".to_owned());
        let stall = self.text("HF_HUB_DOWNLOAD_TIMEOUT");
        self.settings(Hub::HuggingFace, cache, endpoint, token, stall)
    }

    /// As the package `modelscope_hub`; the cookies that it saves are a pickle, which is not read.
    fn model_scope(&self) -> Result<HubSettings> {
        let in_cache = |user: &PathBuf| user.join(".cache").join("modelscope");
        let cache = self
            .path("MODELSCOPE_CACHE")
            .or_else(|| self.user.as_ref().map(in_cache));
        let endpoint = self
            .text("MODELSCOPE_ENDPOINT")
            .or_else(|| self.text("MODELSCOPE_DOMAIN"))
            .unwrap_or_else(|| "modelscope.cn".to_owned());
        let token = self.text("MODELSCOPE_API_TOKEN");
        let stall = self.text("MODELSCOPE_DOWNLOAD_TIMEOUT");
        self.settings(Hub::ModelScope, cache, endpoint, token, stall)
    }

    fn settings(
        &self,
        hub: Hub,
        cache: Option<PathBuf>,
        endpoint: String,
        token: Option<String>,
        stall: Option<String>,
    ) -> Result<HubSettings> {
        let endpoint = endpoint.trim().trim_end_matches('/');
        let endpoint = match endpoint.split_once("://") {
            Some(_) => endpoint.to_owned(),
            None => format!("https://{endpoint}"),
        };
        let on = |name: &&str| self.text(name).is_some_and(|value| is_true(&value));
        let seconds = stall.and_then(|seconds| seconds.parse().ok());
        let mut settings = HubSettings {
            hub,
            cache: PathBuf::new(),
            endpoint,
            token: token
                .map(|token| token.trim().to_owned())
                .filter(|token| !token.is_empty()),
            offline: OFFLINE.into_iter().find(|name| on(name)),
            stall: Duration::from_secs(seconds.unwrap_or(STALL).max(1)),
            certificates: CERTIFICATES
                .into_iter()
                .find_map(|name| Some((name, self.path(name)?))),
        };
        let cache = cache.ok_or_else(|| no_cache(settings.variables().cache))?;
        settings.cache = absolute(&cache)?;
        Ok(settings)
    }
}

fn absolute(cache: &Path) -> Result<PathBuf> {
    std::path::absolute(cache).map_err(|error| Error::io("cache cannot be found", cache, error))
}

/// The spellings of huggingface_hub.
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str())
}

fn no_cache(variable: &str) -> Error {
    Error::new(ErrorKind::NotFound, "no place for downloads")
        .with_why(format!("neither {variable} nor HOME is set"))
        .with_help(format!(
            "set {variable}, or give the directory of the model"
        ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(hub: Option<Hub>, values: &[(&str, &str)]) -> Result<HubSettings> {
        HubSettings::from_lookup(hub, &|name| {
            let mut values = values.iter();
            let found = values.find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn the_cache_is_where_the_hubs_own_tools_put_it() {
        type Variables = &'static [(&'static str, &'static str)];
        let cases: [(Option<Hub>, Variables, &str); 9] = [
            (None, &[("HOME", "/u")], "/u/.cache/huggingface/hub"),
            (
                None,
                &[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")],
                "/x/huggingface/hub",
            ),
            (None, &[("HOME", "/u"), ("HF_HOME", "/h")], "/h/hub"),
            (None, &[("HOME", "/u"), ("HF_HOME", "~/h")], "/u/h/hub"),
            (None, &[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")], "/c"),
            (
                None,
                &[("HF_HOME", ""), ("HOME", "/u")],
                "/u/.cache/huggingface/hub",
            ),
            (
                Some(Hub::ModelScope),
                &[("HOME", "/u")],
                "/u/.cache/modelscope",
            ),
            (
                Some(Hub::ModelScope),
                &[("HOME", "/u"), ("MODELSCOPE_CACHE", "~/m")],
                "/u/m",
            ),
            (
                None,
                &[("HOME", "/u"), ("QWEN2_HUB", "modelscope")],
                "/u/.cache/modelscope",
            ),
        ];
        for (hub, values, cache) in cases {
            let found = settings(hub, values).expect("settings").cache;
            assert_eq!(found, Path::new(cache));
        }
        for hub in [Hub::HuggingFace, Hub::ModelScope] {
            let error = settings(Some(hub), &[]).expect_err("nowhere");
            assert_eq!(error.kind(), ErrorKind::NotFound);
        }
    }

    #[test]
    fn the_hub_of_an_id_goes_before_the_variable_and_an_unknown_one_is_refused() {
        let values = [("HOME", "/u"), ("QWEN2_HUB", "ModelScope")];
        let found = settings(None, &values).expect("variable");
        assert_eq!(found.hub, Hub::ModelScope);
        let found = settings(Some(Hub::HuggingFace), &values).expect("id");
        assert_eq!(found.hub, Hub::HuggingFace);
        let error = settings(None, &[("HOME", "/u"), ("QWEN2_HUB", "elsewhere")]);
        let error = error.expect_err("unknown");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert_eq!(error.to_string(), "no such hub: QWEN2_HUB: elsewhere");
    }

    #[test]
    fn endpoint_token_and_switches_are_read() {
        let plain = settings(None, &[("HOME", "/none")]).expect("settings");
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert!(plain.token.is_none() && plain.offline.is_none() && plain.certificates.is_none());
        let values = [
            ("HOME", "/none"),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_TOKEN", " secret\n"),
            ("HF_HUB_OFFLINE", "true"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "7"),
            ("REQUESTS_CA_BUNDLE", "/bundle.pem"),
            ("SSL_CERT_FILE", "~/own.pem"),
        ];
        let set = settings(None, &values).expect("settings");
        assert_eq!(set.endpoint, "http://mirror");
        assert_eq!(set.token.as_deref(), Some("secret"));
        assert_eq!(set.offline, Some("HF_HUB_OFFLINE"));
        let own = PathBuf::from("/none/own.pem");
        assert_eq!(set.certificates, Some(("SSL_CERT_FILE", own)));
        assert_eq!(set.stall, Duration::from_secs(7));
        let values = [
            ("HOME", "/none"),
            ("MODELSCOPE_DOMAIN", "www.modelscope.ai"),
            ("MODELSCOPE_API_TOKEN", "ms"),
            ("HF_TOKEN", "secret"),
            ("MODELSCOPE_DOWNLOAD_TIMEOUT", "9"),
        ];
        let set = settings(Some(Hub::ModelScope), &values).expect("settings");
        assert_eq!(set.endpoint, "https://www.modelscope.ai");
        assert_eq!(set.token.as_deref(), Some("ms"));
        assert_eq!(set.stall, Duration::from_secs(9));
    }

    #[test]
    fn a_token_that_was_logged_in_is_found_in_its_file() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::write(dir.path().join("token"), "stored\n").expect("write");
        let home = dir.path().to_str().expect("text");
        let found = settings(None, &[("HF_HOME", home)]).expect("settings");
        assert_eq!(found.token.as_deref(), Some("stored"));
    }
}
