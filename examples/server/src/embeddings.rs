//! `POST /v1/embeddings`: texts or tokens as vectors.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use qwen2_core::Prompt;
use serde_json::{Value, json};

use crate::answers::{Words, explain};
use crate::body::read_json;
use crate::completions::prompts;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::response;
use crate::state::App;

/// OpenAI's own limit.
const MAX_INPUTS: usize = 2048;

const WORDS: Words = Words {
    limit: "input",
    prompt: "input",
    constraint: "input",
};

struct EmbeddingRequest {
    model: Option<String>,
    inputs: Vec<Prompt>,
    dimensions: Option<usize>,
    in_base64: bool,
}

impl EmbeddingRequest {
    fn take(mut fields: Fields) -> Result<Self, ApiError> {
        let format: Option<String> = fields.take("encoding_format")?;
        let request = Self {
            model: fields.take("model")?,
            inputs: prompts("input", fields.require("input")?)?,
            dimensions: fields.take("dimensions")?,
            in_base64: match format.as_deref() {
                None | Some("float") => false,
                Some("base64") => true,
                Some(other) => {
                    let message = format!("encoding_format is {other:?}, expected float or base64");
                    return Err(ApiError::invalid("encoding_format", message));
                }
            },
        };
        fields.ignore(&["user"]);
        fields.finish()?;
        if request.inputs.len() > MAX_INPUTS {
            let n = request.inputs.len();
            let message = format!("input has {n} texts, expected at most {MAX_INPUTS}");
            return Err(ApiError::invalid("input", message));
        }
        Ok(request)
    }
}

pub(crate) async fn create(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let request = EmbeddingRequest::take(read_json(request, &app.settings).await?)?;
    app.check_name(request.model.as_deref())?;
    let hidden_size = app.backend.model().config().hidden_size;
    if request
        .dimensions
        .is_some_and(|dimensions| dimensions != hidden_size)
    {
        return Err(ApiError::unsupported(
            "dimensions",
            format!("the vectors of this model have {hidden_size} dimensions, no other number"),
        ));
    }
    let embeddings = app.backend.embed(request.inputs, app.settings.pooling);
    let embeddings = tokio::select! {
        embeddings = tokio::time::timeout(app.settings.timeout, embeddings) => embeddings,
        () = app.ending() => return Err(ApiError::shutting_down()),
    };
    let embeddings = embeddings.map_err(|_| ApiError::timed_out())?;
    let embeddings = embeddings.map_err(|refusal| explain(refusal, WORDS))?;
    let data = embeddings
        .vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| {
            let embedding = match request.in_base64 {
                true => in_base64(vector).into(),
                false => json!(vector),
            };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        });
    let data: Vec<Value> = data.collect();
    let n_tokens = embeddings.n_tokens;
    let body = json!({
        "object": "list",
        "data": data,
        "model": app.name,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    });
    Ok(response::json(StatusCode::OK, &body))
}

/// As OpenAI's client asks for them: f32, the lowest byte first.
fn in_base64(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    BASE64_STANDARD.encode(bytes)
}
