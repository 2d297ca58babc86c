//! `POST /v1/completions`: texts or tokens, continued.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use qwen2_core::{Generation, Piece, Prompt, Tokenizer};
use serde_json::{Value, json};

use crate::answers::{Answers, Words};
use crate::backend::Event;
use crate::body::read_json;
use crate::chat::finish_reason;
use crate::error::ApiError;
use crate::fields::{self, Fields};
use crate::head::Head;
use crate::options::{Sampling, take_limit};
use crate::response::{self, Chunks, Tally};
use crate::settings::Settings;
use crate::state::App;

const WORDS: Words = Words {
    limit: "max_tokens",
    prompt: "prompt",
};

/// OpenAI's, where a request does not say.
const USUAL_TOKENS: usize = 16;

/// Answers to all prompts of one request together.
const MAX_ANSWERS: usize = 128;

struct CompletionRequest {
    model: Option<String>,
    prompts: Vec<Prompt>,
    echo: bool,
    sampling: Sampling,
}

impl CompletionRequest {
    fn take(mut fields: Fields, settings: &Settings) -> Result<Self, ApiError> {
        let limit = take_limit(&mut fields, &["max_tokens"], settings)?.map(|(n, _)| n);
        let usual = settings
            .max_new_tokens
            .map_or(USUAL_TOKENS, |most| most.min(USUAL_TOKENS));
        let request = Self {
            model: fields.take("model")?,
            prompts: prompts("prompt", fields.require("prompt")?)?,
            echo: fields.take("echo")?.unwrap_or(false),
            sampling: Sampling::take(&mut fields, Some(limit.unwrap_or(usual)), settings)?,
        };
        fields.ignore(&["user"]);
        fields.refuse("suffix", &[json!("")])?;
        fields.refuse("best_of", &[json!(request.sampling.n)])?;
        fields.finish()?;
        let n_answers = request.prompts.len().saturating_mul(request.sampling.n);
        if n_answers > MAX_ANSWERS {
            let message = format!("prompts times n is {n_answers}, expected at most {MAX_ANSWERS}");
            return Err(ApiError::invalid("prompt", message));
        }
        Ok(request)
    }
}

/// A text, a list of texts, a list of tokens, or a list of such lists.
///
/// # Errors
/// 400 for anything else, an empty list included.
pub(crate) fn prompts(key: &str, value: Value) -> Result<Vec<Prompt>, ApiError> {
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(items) if items.is_empty() => {
            return Err(ApiError::invalid(key, format!("{key} is an empty list")));
        }
        Value::Array(items) => items,
        other => {
            return Err(ApiError::invalid(
                key,
                format!("{key} is {other}, expected a text, tokens, or a list of these"),
            ));
        }
    };
    match items[0] {
        Value::Number(_) => Ok(vec![Prompt::Tokens(fields::read(key, items.into())?)]),
        Value::Array(_) => {
            let lists: Vec<Vec<u32>> = fields::read(key, items.into())?;
            Ok(lists.into_iter().map(Prompt::Tokens).collect())
        }
        _ => {
            let texts: Vec<String> = fields::read(key, items.into())?;
            Ok(texts.into_iter().map(Prompt::Text).collect())
        }
    }
}

pub(crate) async fn create(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let fields = read_json(request, &app.settings).await?;
    let request = CompletionRequest::take(fields, &app.settings)?;
    app.check_name(request.model.as_deref())?;
    let sampling = &request.sampling;
    let requests = request
        .prompts
        .iter()
        .flat_map(|prompt| (0..sampling.n).map(|index| (prompt.clone(), sampling.options(index))));
    let answers = Answers::submit(&app, WORDS, requests.collect()).await?;
    let echoes = match request.echo {
        true => echoes(
            app.backend.model().tokenizer(),
            &request.prompts,
            sampling.n,
        )?,
        false => vec![String::new(); request.prompts.len() * sampling.n],
    };
    let completion = Completion {
        head: Head::new("cmpl", &app.name),
        echoes,
        n: sampling.n,
        include_usage: sampling.include_usage,
        tally: Tally::default(),
    };
    match sampling.stream {
        true => Ok(response::events(answers, completion)),
        false => completion.whole(answers).await,
    }
}

/// The text of each answer's prompt.
fn echoes(tokenizer: &Tokenizer, prompts: &[Prompt], n: usize) -> Result<Vec<String>, ApiError> {
    let mut echoes = Vec::with_capacity(prompts.len() * n);
    for prompt in prompts {
        let text = match prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Tokens(tokens) => tokenizer
                .decode(tokens, false)
                .map_err(|error| ApiError::from_core(&error, WORDS.limit, WORDS.prompt))?,
            _ => String::new(),
        };
        echoes.resize(echoes.len() + n, text);
    }
    Ok(echoes)
}

/// One request under way.
struct Completion {
    head: Head,
    /// What each answer begins with.
    echoes: Vec<String>,
    n: usize,
    include_usage: bool,
    tally: Tally,
}

impl Completion {
    async fn whole(mut self, mut answers: Answers) -> Result<Response, ApiError> {
        let mut choices = vec![Value::Null; self.echoes.len()];
        while let Some((index, event)) = answers.next().await? {
            let Event::End(generation) = event else {
                continue;
            };
            self.tally.add(&generation, index.is_multiple_of(self.n));
            let text = format!("{}{}", self.echoes[index], generation.text);
            choices[index] = choice(index, &text, Some(finish_reason(&generation)));
        }
        let mut body = self.head.to_json("text_completion", choices);
        body["usage"] = self.tally.to_json();
        Ok(response::json(StatusCode::OK, &body))
    }

    fn chunk(&self, index: usize, text: &str, finish_reason: Option<&str>) -> Value {
        let choices = vec![choice(index, text, finish_reason)];
        let mut chunk = self.head.to_json("text_completion", choices);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

fn choice(index: usize, text: &str, finish_reason: Option<&str>) -> Value {
    json!({"index": index, "text": text, "logprobs": null, "finish_reason": finish_reason})
}

impl Chunks for Completion {
    fn start(&mut self) -> Vec<Value> {
        let echoes = self.echoes.iter().enumerate();
        let echoes = echoes.filter(|(_, text)| !text.is_empty());
        echoes
            .map(|(index, text)| self.chunk(index, text, None))
            .collect()
    }

    fn piece(&mut self, index: usize, piece: &Piece) -> Vec<Value> {
        if piece.text.is_empty() {
            return Vec::new();
        }
        vec![self.chunk(index, &piece.text, None)]
    }

    fn end(&mut self, index: usize, generation: &Generation) -> Vec<Value> {
        self.tally.add(generation, index.is_multiple_of(self.n));
        vec![self.chunk(index, "", Some(finish_reason(generation)))]
    }

    fn finish(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut last = self.head.to_json("text_completion", Vec::new());
        last["usage"] = self.tally.to_json();
        vec![last]
    }
}
