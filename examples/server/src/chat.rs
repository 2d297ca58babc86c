//! `POST /v1/chat/completions`.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use qwen2_core::{
    FinishReason, Generation, Logprobs, Message, Model, Piece, Prompt, Tool, ToolChoice,
};
use serde_json::{Value, json};

use crate::answers::{Answers, Words};
use crate::backend::Event;
use crate::body::read_json;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::head::Head;
use crate::likelihood;
use crate::messages::take_messages;
use crate::options::{Sampling, take_limit};
use crate::response::{self, Chunks, Tally};
use crate::settings::Settings;
use crate::state::App;
use crate::tools;

struct ChatRequest {
    words: Words,
    model: Option<String>,
    messages: Vec<Message>,
    tools: Vec<Tool>,
    tool_choice: ToolChoice,
    sampling: Sampling,
}

impl ChatRequest {
    fn take(mut fields: Fields, settings: &Settings) -> Result<Self, ApiError> {
        let limit = take_limit(
            &mut fields,
            &["max_completion_tokens", "max_tokens"],
            settings,
        )?;
        let (tools, tool_choice) = tools::take_tools(&mut fields)?;
        let logprobs = take_logprobs(&mut fields)?;
        let sampling = Sampling::take(&mut fields, limit.map(|(n, _)| n), settings)?;
        let request = Self {
            words: Words {
                limit: limit.map_or("max_completion_tokens", |(_, key)| key),
                prompt: "messages",
                constraint: sampling.constraint_key(),
            },
            model: fields.take("model")?,
            messages: take_messages(&mut fields)?,
            tools,
            tool_choice,
            sampling: sampling.with_logprobs(logprobs),
        };
        refuse_the_rest(&mut fields)?;
        fields.finish()?;
        Ok(request)
    }
}

/// In a chat whether and how many are two fields.
fn take_logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.take("logprobs")?.unwrap_or(false);
    let top: Option<usize> = fields.take("top_logprobs")?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid(
            "top_logprobs",
            "top_logprobs is for requests with logprobs: true",
        )),
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
    fields.refuse("functions", &[json!([])])?;
    fields.refuse("function_call", &[json!("none"), json!("auto")])?;
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
        .map(|index| {
            let options = sampling.options(index).tools(request.tools.clone());
            (
                prompt.clone(),
                options.tool_choice(request.tool_choice.clone()),
            )
        })
        .collect();
    let answers = Answers::submit(&app, request.words, requests).await?;
    let head = Head::new("chatcmpl", &app.name);
    if sampling.stream {
        let chunks = ChatChunks {
            head,
            model: app.backend.model().clone(),
            n: sampling.n,
            include_usage: sampling.include_usage,
            tally: Tally::default(),
            n_calls: vec![0; sampling.n],
            untold: vec![Vec::new(); sampling.n],
            tells: sampling.logprobs.is_some(),
        };
        return Ok(response::events(answers, chunks));
    }
    whole(answers, &head, app.backend.model(), &sampling).await
}

/// All answers in one piece.
async fn whole(
    mut answers: Answers,
    head: &Head,
    model: &Model,
    sampling: &Sampling,
) -> Result<Response, ApiError> {
    let mut choices = vec![Value::Null; sampling.n];
    let mut tally = Tally::default();
    while let Some((index, event)) = answers.next().await? {
        let Event::End(generation) = event else {
            continue;
        };
        tally.add(&generation, index == 0);
        let logprobs = sampling.logprobs.is_some().then(|| &*generation.logprobs);
        choices[index] = json!({
            "index": index,
            "message": message(&generation),
            "logprobs": logprobs.map(|tokens| likelihood::chat(model.tokenizer(), tokens)),
            "finish_reason": finish_reason(&generation),
        });
    }
    let mut body = head.to_json("chat.completion", choices);
    body["usage"] = tally.to_json();
    Ok(response::json(StatusCode::OK, &body))
}

/// The turn of the assistant; one that is all calls says nothing.
fn message(generation: &Generation) -> Value {
    let calls: Vec<Value> = generation.tool_calls.iter().map(tools::call).collect();
    let content = (calls.is_empty() || !generation.text.is_empty()).then_some(&generation.text);
    let mut message = json!({"role": "assistant", "content": content, "refusal": null});
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    message
}

/// OpenAI's word for how an answer ended.
pub(crate) fn finish_reason(generation: &Generation) -> &'static str {
    match generation.finish_reason {
        FinishReason::Length => "length",
        FinishReason::ToolCalls => "tool_calls",
        _ => "stop",
    }
}

struct ChatChunks {
    head: Head,
    model: Model,
    n: usize,
    include_usage: bool,
    tally: Tally,
    /// Calls so far, of each answer.
    n_calls: Vec<usize>,
    /// Tokens of each answer whose text is still to come.
    untold: Vec<Vec<Logprobs>>,
    /// Whether it tells how likely they were.
    tells: bool,
}

impl ChatChunks {
    fn chunk(&mut self, index: usize, delta: &Value, finish_reason: Option<&str>) -> Value {
        let untold = std::mem::take(&mut self.untold[index]);
        let logprobs = (self.tells && !untold.is_empty())
            .then(|| likelihood::chat(self.model.tokenizer(), &untold));
        let choice = json!({
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
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
        self.untold[index].extend(piece.logprobs.clone());
        let mut chunks = Vec::new();
        if !piece.text.is_empty() {
            chunks.push(self.chunk(index, &json!({"content": piece.text}), None));
        }
        for call in &piece.tool_calls {
            let mut call = tools::call(call);
            call["index"] = self.n_calls[index].into();
            self.n_calls[index] += 1;
            chunks.push(self.chunk(index, &json!({"tool_calls": [call]}), None));
        }
        chunks
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
