//! What went wrong, in the shape of OpenAI's API.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use qwen2_core::ErrorKind;
use serde_json::{Value, json};

use crate::answers::Words;

/// A failed request: a status, and `{"error": {"message", "type", "param", "code"}}`.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code: None,
        }
    }

    /// 400: the request cannot be served, and `param` of it is why.
    pub(crate) fn invalid<'a>(
        param: impl Into<Option<&'a str>>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            param: param.into().map(str::to_owned),
            ..Self::new(StatusCode::BAD_REQUEST, message)
        }
    }

    /// 400: legal in OpenAI's API, but not done here.
    pub(crate) fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self::invalid(param, message).with_code("unsupported")
    }

    pub(crate) fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// 404: there is one model, and this is not its name.
    pub(crate) fn no_such_model(asked: &str, served: &str) -> Self {
        Self {
            param: Some("model".to_owned()),
            ..Self::new(
                StatusCode::NOT_FOUND,
                format!("no model named {asked:?} is served here, only {served:?}"),
            )
        }
        .with_code("model_not_found")
    }

    /// 429: as many requests wait as may.
    pub(crate) fn overloaded() -> Self {
        Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "too many requests wait already; try again in a moment",
        )
        .with_code("overloaded")
    }

    /// 504: not done in the time that the server grants.
    pub(crate) fn timed_out() -> Self {
        Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "the answer took longer than this server grants",
        )
        .with_code("timeout")
    }

    /// 503: the server is about to end.
    pub(crate) fn shutting_down() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the server is shutting down",
        )
        .with_code("shutting_down")
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// An error of the library in the request's own words.
    pub(crate) fn from_core(error: &qwen2_core::Error, words: Words) -> Self {
        let (status, code) = match error.kind() {
            ErrorKind::InvalidArgument => (StatusCode::BAD_REQUEST, None),
            ErrorKind::ContextOverflow => {
                (StatusCode::BAD_REQUEST, Some("context_length_exceeded"))
            }
            ErrorKind::Unsupported => (StatusCode::BAD_REQUEST, Some("unsupported")),
            ErrorKind::InvalidTemplate => (StatusCode::BAD_REQUEST, Some("invalid_template")),
            ErrorKind::InvalidConstraint => (StatusCode::BAD_REQUEST, Some("invalid_constraint")),
            ErrorKind::OutOfMemory => (StatusCode::SERVICE_UNAVAILABLE, Some("out_of_memory")),
            ErrorKind::Cancelled => (StatusCode::SERVICE_UNAVAILABLE, Some("cancelled")),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, None),
        };
        let mut message = error.to_string();
        if let Some(help) = error.help() {
            message.push_str("; ");
            message.push_str(help);
        }
        let param = error.key().map(|key| match key {
            "max_new_tokens" => words.limit.to_owned(),
            "prompt" | "messages" | "tokens" => words.prompt.to_owned(),
            "min_new_tokens" => "min_tokens".to_owned(),
            "constraint" => words.constraint.to_owned(),
            key => key.to_owned(),
        });
        Self {
            status,
            message: message.replace("max_new_tokens", words.limit),
            param,
            code,
        }
    }

    /// The body.
    pub(crate) fn to_json(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = crate::response::json(self.status, &self.to_json());
        let headers = response.headers_mut();
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::TOO_MANY_REQUESTS => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}
