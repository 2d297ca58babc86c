//! `POST /v1/chat/completions`.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use qwen2_core::{FinishReason, Generation, Message, Piece, Prompt};
use serde_json::{Value, json};

use crate::answers::{Answers, Words};
use crate::backend::Event;
use crate::body::read_json;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::head::Head;
use crate::messages::take_messages;
use crate::options::{Sampling, take_limit};
use crate::response::{self, Chunks, Tally};
use crate::settings::Settings;
use crate::state::App;

struct ChatRequest {
    words: Words,
    model: Option<String>,
    messages: Vec<Message>,
    sampling: Sampling,
}

impl ChatRequest {
    fn take(mut fields: Fields, settings: &Settings) -> Result<Self, ApiError> {
        let limit = take_limit(
            &mut fields,
            &["max_completion_tokens", "max_tokens"],
            settings,
        )?;
        let request = Self {
            words: Words {
                limit: limit.map_or("max_completion_tokens", |(_, key)| key),
                prompt: "messages",
            },
            model: fields.take("model")?,
            messages: take_messages(&mut fields)?,
            sampling: Sampling::take(&mut fields, limit.map(|(n, _)| n), settings)?,
        };
        refuse_the_rest(&mut fields)?;
        fields.finish()?;
        Ok(request)
    }
}

/// OpenAI's other fields: those that change no answer, and those that we do not serve.
fn refuse_the_rest(fields: &mut Fields) -> Result<(), ApiError> {
    fields.ignore(&[
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    ]);
    fields.refuse("store", &[json!(false)])?;
    fields.refuse("modalities", &[json!(["text"])])?;
    fields.refuse("tools", &[json!([])])?;
    fields.refuse("tool_choice", &[json!("none"), json!("auto")])?;
    fields.refuse("functions", &[json!([])])?;
    fields.refuse("function_call", &[json!("none"), json!("auto")])?;
    fields.refuse("parallel_tool_calls", &[json!(true), json!(false)])?;
    for key in [
        "audio",
        "prediction",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
    ] {
        fields.refuse(key, &[])?;
    }
    Ok(())
}

pub(crate) async fn create(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let fields = read_json(request, &app.settings).await?;
    let request = ChatRequest::take(fields, &app.settings)?;
    app.check_name(request.model.as_deref())?;
    let sampling = request.sampling;
    let prompt = Prompt::Chat(request.messages);
    let requests = (0..sampling.n)
        .map(|index| (prompt.clone(), sampling.options(index)))
        .collect();
    let answers = Answers::submit(&app, request.words, requests).await?;
    let head = Head::new("chatcmpl", &app.name);
    if sampling.stream {
        let chunks = ChatChunks {
            head,
            n: sampling.n,
            include_usage: sampling.include_usage,
            tally: Tally::default(),
        };
        return Ok(response::events(answers, chunks));
    }
    whole(answers, &head, sampling.n).await
}

/// All answers in one piece.
async fn whole(mut answers: Answers, head: &Head, n: usize) -> Result<Response, ApiError> {
    let mut choices = vec![Value::Null; n];
    let mut tally = Tally::default();
    while let Some((index, event)) = answers.next().await? {
        let Event::End(generation) = event else {
            continue;
        };
        tally.add(&generation, index == 0);
        choices[index] = json!({
            "index": index,
            "message": {"role": "assistant", "content": generation.text, "refusal": null},
            "logprobs": null,
            "finish_reason": finish_reason(&generation),
        });
    }
    let mut body = head.to_json("chat.completion", choices);
    body["usage"] = tally.to_json();
    Ok(response::json(StatusCode::OK, &body))
}

/// OpenAI's word for how an answer ended.
pub(crate) fn finish_reason(generation: &Generation) -> &'static str {
    match generation.finish_reason {
        FinishReason::Length => "length",
        _ => "stop",
    }
}

struct ChatChunks {
    head: Head,
    n: usize,
    include_usage: bool,
    tally: Tally,
}

impl ChatChunks {
    fn chunk(&self, index: usize, delta: &Value, finish_reason: Option<&str>) -> Value {
        let choice = json!({
            "index": index,
            "delta": delta,
            "logprobs": null,
            "finish_reason": finish_reason,
        });
        let mut chunk = self.head.to_json("chat.completion.chunk", vec![choice]);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

impl Chunks for ChatChunks {
    fn start(&mut self) -> Vec<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        (0..self.n)
            .map(|index| self.chunk(index, &delta, None))
            .collect()
    }

    fn piece(&mut self, index: usize, piece: &Piece) -> Vec<Value> {
        if piece.text.is_empty() {
            return Vec::new();
        }
        vec![self.chunk(index, &json!({"content": piece.text}), None)]
    }

    fn end(&mut self, index: usize, generation: &Generation) -> Vec<Value> {
        self.tally.add(generation, index == 0);
        vec![self.chunk(index, &json!({}), Some(finish_reason(generation)))]
    }

    fn finish(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut last = self.head.to_json("chat.completion.chunk", Vec::new());
        last["usage"] = self.tally.to_json();
        vec![last]
    }
}
