//! `GET /v1/models` and `GET /v1/models/{name}`: the one model.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::response;
use crate::state::App;

pub(crate) async fn list(State(app): State<App>) -> Response {
    let body = json!({"object": "list", "data": [describe(&app)]});
    response::json(StatusCode::OK, &body)
}

pub(crate) async fn retrieve(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    app.check_name(Some(&name))?;
    Ok(response::json(StatusCode::OK, &describe(&app)))
}

/// OpenAI's four fields, and the context as vLLM calls it.
fn describe(app: &App) -> Value {
    json!({
        "id": app.name,
        "object": "model",
        "created": app.created,
        "owned_by": "qwen2",
        "max_model_len": app.backend.model().context_length(),
    })
}
