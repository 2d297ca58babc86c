//! `POST /v1/embeddings`.

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::Value;

use crate::body::read_json;
use crate::completions::prompts;
use crate::error::ApiError;
use crate::state::App;

pub(crate) async fn create(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let mut fields = read_json(request, &app.settings).await?;
    app.check_name(fields.take::<String>("model")?.as_deref())?;
    prompts("input", fields.require::<Value>("input")?)?;
    Err(ApiError::unsupported(
        "input",
        "embeddings are not supported by this server",
    ))
}
