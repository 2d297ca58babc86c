//! Requests to a hub, and what its refusals mean.

use std::io;
use std::path::Path;

use serde::de::DeserializeOwned;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::super::hub_id::Hub;
use super::settings::HubSettings;
use crate::config::one_line;
use crate::error::{Error, ErrorKind, Result};

/// Listings of published models have a hundred kilobytes.
const MAX_LISTING: u64 = 64 << 20;
/// Bundles of all public authorities have a quarter of a megabyte.
const MAX_CERTIFICATES: u64 = 16 << 20;

pub(super) struct Client<'a> {
    pub(super) settings: &'a HubSettings,
    /// What errors are about, `org/name`.
    id: &'a str,
    agent: Agent,
}

/// Whether another try may succeed.
pub(super) struct Failed {
    pub(super) error: Error,
    pub(super) again: bool,
}

impl<'a> Client<'a> {
    /// # Errors
    /// Those of reading the certificates that the environment names.
    pub(super) fn new(id: &'a str, settings: &'a HubSettings) -> Result<Self> {
        let limit = Some(settings.stall);
        let trusted = match &settings.certificates {
            None => RootCerts::WebPki,
            Some((variable, path)) => RootCerts::new_with_certs(&certificates(variable, path)?),
        };
        let agent = Agent::config_builder()
            .user_agent(concat!("qwen2-core/", env!("CARGO_PKG_VERSION")))
            .tls_config(TlsConfig::builder().root_certs(trusted).build())
            .http_status_as_error(false)
            // Storage on other hosts takes its leave from the address and must not see the token.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_resolve(limit)
            .timeout_connect(limit)
            .timeout_recv_response(limit)
            .timeout_per_read(limit)
            .build()
            .new_agent();
        Ok(Self {
            settings,
            id,
            agent,
        })
    }

    /// The answer to a `GET` of `path` on the hub, for the bytes from `start` on.
    pub(super) fn get(
        &self,
        path: &str,
        name: &str,
        range: Option<String>,
    ) -> Result<Response<Body>, Failed> {
        let request = self.request(path, range);
        let answer = request.call().map_err(|error| self.broken(name, error))?;
        self.accept(name, answer)
    }

    /// The first answer to a `GET` of `path`, which may send us elsewhere.
    pub(super) fn get_here(&self, path: &str, name: &str) -> Result<Response<Body>, Failed> {
        let request = self.request(path, Some("bytes=0-0".to_owned()));
        let request = request.config().max_redirects(0);
        let request = request.max_redirects_will_error(false).build();
        let answer = request.call().map_err(|error| self.broken(name, error))?;
        self.accept(name, answer)
    }

    /// The JSON at `path`.
    pub(super) fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let answer = self.get(path, "", None).map_err(|failed| failed.error)?;
        let body = answer.into_body().into_with_config().limit(MAX_LISTING);
        let text = body
            .read_to_vec()
            .map_err(|error| self.broken("", error).error)?;
        serde_json::from_slice(&text).map_err(|error| {
            self.unusable("", &format!("{}: {error}", self.settings.endpoint))
                .with_source(error)
        })
    }

    fn request(
        &self,
        path: &str,
        range: Option<String>,
    ) -> ureq::RequestBuilder<ureq::typestate::WithoutBody> {
        let mut request = self.agent.get(format!("{}{path}", self.settings.endpoint));
        if let Some(token) = &self.settings.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            if self.settings.hub == Hub::ModelScope {
                // Its older entries know the token only like this.
                request = request.header(header::COOKIE, format!("m_session_id={token}"));
            }
        }
        match range {
            Some(range) => request.header(header::RANGE, range),
            None => request,
        }
    }

    fn accept(&self, name: &str, answer: Response<Body>) -> Result<Response<Body>, Failed> {
        match answer.status().as_u16() {
            // 416: there is nothing behind what we have.
            200..=399 | 416 => Ok(answer),
            status => Err(Failed {
                error: self.refused(name, status),
                again: status == 429 || status >= 500,
            }),
        }
    }

    fn refused(&self, name: &str, status: u16) -> Error {
        let why = format!("{} answers with status {status}", self.settings.endpoint);
        let token = self.settings.variables().token;
        let (kind, what, help) = match status {
            401 | 403 => (
                ErrorKind::PermissionDenied,
                "hub refuses access",
                format!(
                    "check the spelling; for a private or gated model accept its terms on its \
                     page and set {token}"
                ),
            ),
            404 => (
                ErrorKind::NotFound,
                match name {
                    "" => "hub has no such model",
                    _ => "hub has no such file",
                },
                format!(
                    "check the spelling of id and revision; there is no directory of this name \
                     either; a private model needs {token}"
                ),
            ),
            _ => return self.network("download failed", name, why),
        };
        Error::new(kind, what)
            .with_key(self.key(name))
            .with_why(why)
            .with_help(help)
    }

    /// A request without an answer.
    fn broken(&self, name: &str, error: ureq::Error) -> Failed {
        let text = error.to_string();
        // The types of the layer below are not ours to name.
        if text.contains("certificate") {
            let variable = match &self.settings.certificates {
                Some((variable, _)) => variable,
                None => "SSL_CERT_FILE",
            };
            let error = self
                .network("server is not trusted", name, one_line(&text))
                .with_help(format!(
                    "a server with a certificate of its own needs {variable}, a PEM file of its authority"
                ))
                .with_source(error);
            return Failed {
                error,
                again: false,
            };
        }
        let error = match error {
            ureq::Error::Timeout(_) => self.stalled(name),
            ureq::Error::Io(error) => self.cut(name, error),
            error => self
                .network("download failed", name, one_line(&error.to_string()))
                .with_source(error),
        };
        Failed { error, again: true }
    }

    /// A connection that broke.
    pub(super) fn cut(&self, name: &str, error: io::Error) -> Error {
        if is_timeout(&error) {
            return self.stalled(name);
        }
        self.network("download failed", name, error.to_string())
            .with_source(error)
    }

    fn stalled(&self, name: &str) -> Error {
        let why = format!("no byte in {} s", self.settings.stall.as_secs());
        self.network("download stalled", name, why)
    }

    pub(super) fn network(&self, what: &str, name: &str, why: String) -> Error {
        let endpoint = self.settings.variables().endpoint;
        Error::new(ErrorKind::Network, what)
            .with_key(self.key(name))
            .with_why(why)
            .with_help(format!(
                "check the connection and {endpoint}, then load again: it resumes"
            ))
    }

    /// An answer that is not what the hub's interface promises.
    pub(super) fn unusable(&self, name: &str, why: &str) -> Error {
        self.network("hub's answer is unusable", name, one_line(why))
    }

    pub(super) fn key(&self, name: &str) -> String {
        match name {
            "" => self.id.to_owned(),
            name => format!("{}/{name}", self.id),
        }
    }
}

/// The certificates of a PEM file, which `variable` names; other items in it are passed over.
fn certificates(variable: &str, path: &Path) -> Result<Vec<Certificate<'static>>> {
    let unusable = |kind, why: String| {
        Error::new(kind, "no certificates to trust")
            .with_path(path)
            .with_key(variable)
            .with_why(why)
            .with_help(format!("set {variable} to a PEM file, or unset it"))
    };
    let failed = |error: io::Error| {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            _ => ErrorKind::Io,
        };
        unusable(kind, error.to_string()).with_source(error)
    };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    // Opening a pipe would hang.
    if !metadata.is_file() || metadata.len() > MAX_CERTIFICATES {
        let why = format!("not a regular file of at most {MAX_CERTIFICATES} bytes");
        return Err(unusable(ErrorKind::InvalidFile, why));
    }
    let mut found = Vec::new();
    for item in parse_pem(&std::fs::read(path).map_err(failed)?) {
        match item {
            Ok(PemItem::Certificate(certificate)) => found.push(certificate),
            Ok(_) => {}
            Err(error) => {
                let why = one_line(&error.to_string());
                return Err(unusable(ErrorKind::InvalidFile, why).with_source(error));
            }
        }
    }
    match found.is_empty() {
        true => Err(unusable(ErrorKind::InvalidFile, "it holds none".to_owned())),
        false => Ok(found),
    }
}

/// ureq gives its timeouts to a reader as such a kind, or wrapped.
fn is_timeout(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    error.kind() == io::ErrorKind::TimedOut || matches!(inner, Some(ureq::Error::Timeout(_)))
}

/// Percent-encodes what may not stand in a path or a query; `/` stays where `keep` says so.
pub(super) fn encoded(text: &str, keep: Option<char>) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~');
        if plain || Some(char::from(byte)) == keep {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unreserved_characters_stand_for_themselves() {
        assert_eq!(encoded("refs/pr/1", None), "refs%2Fpr%2F1");
        assert_eq!(
            encoded("a b/c+(1).gguf", Some('/')),
            "a%20b/c%2B%281%29.gguf"
        );
        assert_eq!(encoded("ü", None), "%C3%BC");
    }
}
