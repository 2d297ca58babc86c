//! Which path does what, and what is true of all of them.

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use subtle::ConstantTimeEq;

use crate::error::ApiError;
use crate::state::App;
use crate::{chat, completions, embeddings, models, page, response};

/// Everything that the server answers.
pub(crate) fn routes(app: App) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::retrieve))
        .route("/metrics", get(metrics))
        .route_layer(from_fn_with_state(app.clone(), authorize))
        .route("/", get(page::page))
        .route("/health", get(health))
        .method_not_allowed_fallback(no_such_method)
        .fallback(no_such_path)
        .layer(from_fn_with_state(app.clone(), count))
        .with_state(app)
}

async fn health() -> Response {
    response::json(StatusCode::OK, &serde_json::json!({"status": "ok"}))
}

async fn metrics(State(app): State<App>) -> Result<Response, ApiError> {
    let text = app.metrics.text(&app.backend);
    let text = text.map_err(|error| ApiError::internal(error.to_string()))?;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4");
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

async fn no_such_path(request: Request) -> ApiError {
    let message = format!("there is no {} here", request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, message).with_code("unknown_url")
}

async fn no_such_method(request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    let message = format!("{method} does nothing at {path}");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).with_code("method_not_allowed")
}

/// Lets only those in who know the key, if there is one.
async fn authorize(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if let Some(key) = &app.settings.api_key {
        let given = request.headers().get(header::AUTHORIZATION);
        let given = given.map(HeaderValue::as_bytes).unwrap_or_default();
        let given = given.split_at_checked("Bearer ".len());
        let matches = given.is_some_and(|(scheme, given)| {
            scheme.eq_ignore_ascii_case(b"Bearer ") && bool::from(given.ct_eq(key.as_bytes()))
        });
        if !matches {
            let message = "this server wants its key as Authorization: Bearer KEY";
            return Err(
                ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key")
            );
        }
    }
    Ok(next.run(request).await)
}

/// Counts requests by the route's path: by the client's own, anybody could make up metrics.
async fn count(State(app): State<App>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    let path = path.as_ref().map_or("other", MatchedPath::as_str);
    app.metrics.requested(path, response.status().as_u16());
    response
}
