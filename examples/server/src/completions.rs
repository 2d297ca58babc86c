//! `POST /v1/completions`: texts or tokens, continued.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use qwen2_core::{Generation, Model, Piece, Prompt};
use serde_json::{Value, json};

use crate::answers::{Answers, Words};
use crate::backend::Event;
use crate::body::read_json;
use crate::chat::finish_reason;
use crate::error::ApiError;
use crate::fields::{self, Fields};
use crate::head::Head;
use crate::likelihood::Likelihoods;
use crate::options::{Sampling, take_limit};
use crate::response::{self, Chunks, Tally};
use crate::settings::Settings;
use crate::state::App;

/// OpenAI's, where a request does not say.
const USUAL_TOKENS: usize = 16;

/// Answers to all prompts of one request together.
const MAX_ANSWERS: usize = 128;

struct CompletionRequest {
    words: Words,
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
        let logprobs = fields.take("logprobs")?;
        let sampling = Sampling::take(&mut fields, Some(limit.unwrap_or(usual)), settings)?;
        let request = Self {
            words: Words {
                limit: "max_tokens",
                prompt: "prompt",
                constraint: sampling.constraint_key(),
            },
            model: fields.take("model")?,
            prompts: prompts("prompt", fields.require("prompt")?)?,
            echo: fields.take("echo")?.unwrap_or(false),
            sampling: sampling.with_logprobs(logprobs),
        };
        fields.ignore(&["user"]);
        fields.refuse("suffix", &[json!("")])?;
        fields.refuse("best_of", &[json!(request.sampling.n)])?;
        fields.finish()?;
        let sampling = &request.sampling;
        if request.echo && sampling.stream && sampling.logprobs.is_some() {
            let message = "echo with logprobs is not supported in a stream";
            return Err(ApiError::unsupported("echo", message));
        }
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
    let requests = request.prompts.iter().flat_map(|prompt| {
        (0..sampling.n).map(|index| {
            let mut options = sampling.options(index);
            options.prompt_logprobs = sampling.logprobs.filter(|_| request.echo);
            (prompt.clone(), options)
        })
    });
    let answers = Answers::submit(&app, request.words, requests.collect()).await?;
    let model = app.backend.model().clone();
    let echoes = match request.echo {
        true => request
            .prompts
            .iter()
            .map(|prompt| Echo::of(prompt, &model))
            .collect(),
        false => Ok(vec![Echo::default(); request.prompts.len()]),
    };
    let completion = Completion {
        head: Head::new("cmpl", &app.name),
        model,
        echoes: echoes.map_err(|error| ApiError::from_core(&error, request.words))?,
        n: sampling.n,
        include_usage: sampling.include_usage,
        tally: Tally::default(),
        likelihoods: sampling.logprobs.map(|_| {
            let each = || Likelihoods::default();
            std::iter::repeat_with(each)
                .take(request.prompts.len() * sampling.n)
                .collect()
        }),
    };
    match sampling.stream {
        true => Ok(response::events(answers, completion)),
        false => completion.whole(answers).await,
    }
}

/// What of a prompt is in front of its answers.
#[derive(Clone, Default)]
struct Echo {
    text: String,
    /// The token that nothing foretells.
    first: Option<u32>,
}

impl Echo {
    fn of(prompt: &Prompt, model: &Model) -> qwen2_core::Result<Self> {
        let tokenizer = model.tokenizer();
        Ok(match prompt {
            Prompt::Text(text) => Self {
                text: text.clone(),
                first: tokenizer.encode(text)?.first().copied(),
            },
            Prompt::Tokens(tokens) => Self {
                text: tokenizer.decode(tokens, false)?,
                first: tokens.first().copied(),
            },
            _ => Self::default(),
        })
    }
}

/// One request under way.
struct Completion {
    head: Head,
    model: Model,
    /// Of each prompt.
    echoes: Vec<Echo>,
    n: usize,
    include_usage: bool,
    tally: Tally,
    /// Of each answer, if they are asked for.
    likelihoods: Option<Vec<Likelihoods>>,
}

impl Completion {
    async fn whole(mut self, mut answers: Answers) -> Result<Response, ApiError> {
        let mut choices = vec![Value::Null; self.echoes.len() * self.n];
        while let Some((index, event)) = answers.next().await? {
            let Event::End(generation) = event else {
                continue;
            };
            self.tally.add(&generation, index.is_multiple_of(self.n));
            let echo = &self.echoes[index / self.n];
            if let Some(likelihoods) = &mut self.likelihoods {
                let tokenizer = self.model.tokenizer();
                if let Some(first) = echo.first {
                    likelihoods[index].push_first(tokenizer, first);
                }
                let all = generation
                    .prompt_logprobs
                    .iter()
                    .chain(&generation.logprobs);
                all.for_each(|token| likelihoods[index].push(tokenizer, token));
            }
            let text = format!("{}{}", echo.text, generation.text);
            choices[index] = self.choice(index, &text, Some(finish_reason(&generation)));
        }
        let mut body = self.head.to_json("text_completion", choices);
        body["usage"] = self.tally.to_json();
        Ok(response::json(StatusCode::OK, &body))
    }

    fn chunk(&mut self, index: usize, text: &str, finish_reason: Option<&str>) -> Value {
        let choices = vec![self.choice(index, text, finish_reason)];
        let mut chunk = self.head.to_json("text_completion", choices);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn choice(&mut self, index: usize, text: &str, finish_reason: Option<&str>) -> Value {
        let likelihoods = self.likelihoods.as_mut();
        let logprobs = likelihoods.and_then(|likelihoods| likelihoods[index].take());
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason})
    }
}

impl Chunks for Completion {
    fn start(&mut self) -> Vec<Value> {
        let echoes = self.echoes.clone().into_iter().enumerate();
        let echoes = echoes.filter(|(_, echo)| !echo.text.is_empty());
        let n = self.n;
        let each = echoes.flat_map(|(prompt, echo)| {
            (0..n).map(move |index| (prompt * n + index, echo.text.clone()))
        });
        each.map(|(index, text)| self.chunk(index, &text, None))
            .collect()
    }

    fn piece(&mut self, index: usize, piece: &Piece) -> Vec<Value> {
        if let (Some(likelihoods), Some(token)) = (&mut self.likelihoods, &piece.logprobs) {
            likelihoods[index].push(self.model.tokenizer(), token);
        }
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
