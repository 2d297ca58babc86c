//! The messages of a chat, as OpenAI's clients send them.

use qwen2_core::{Message, ToolCall};
use serde::Deserialize;
use serde_json::Value;

use crate::error::ApiError;
use crate::fields::{self, Fields};

/// A message; which of its fields must be there depends on the role.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    role: String,
    content: Option<Value>,
    /// Who of several people speaks; the templates of Qwen2 do not show it.
    #[serde(rename = "name")]
    _name: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<RawCall>>,
    tool_call_id: Option<String>,
    /// What clients send back of an earlier answer of ours.
    #[serde(rename = "refusal")]
    _refusal: Option<Value>,
    #[serde(rename = "annotations")]
    _annotations: Option<Value>,
    audio: Option<Value>,
    function_call: Option<Value>,
}

#[derive(Deserialize)]
struct RawCall {
    id: Option<String>,
    function: ToolCall,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    r#type: String,
    text: Option<String>,
    #[serde(rename = "image_url")]
    _image_url: Option<Value>,
    #[serde(rename = "input_audio")]
    _input_audio: Option<Value>,
    #[serde(rename = "file")]
    _file: Option<Value>,
}

/// Takes `messages`.
///
/// # Errors
/// 400 naming the message that is none.
pub(crate) fn take_messages(fields: &mut Fields) -> Result<Vec<Message>, ApiError> {
    let raw: Vec<Raw> = fields.require("messages")?;
    if raw.is_empty() {
        return Err(ApiError::invalid("messages", "messages is empty"));
    }
    let mut messages = Vec::with_capacity(raw.len());
    let mut results = Results::default();
    for (position, raw) in raw.into_iter().enumerate() {
        let place = format!("messages[{position}]");
        if raw.role == "tool" {
            results.add(&place, raw)?;
            continue;
        }
        messages.append(&mut results.in_order());
        results.expect(raw.tool_calls.as_deref().unwrap_or_default());
        messages.push(message(&place, raw)?);
    }
    messages.append(&mut results.in_order());
    Ok(messages)
}

/// The results of the calls of one message. A template knows them by their order alone, and clients
/// send them in any.
#[derive(Default)]
struct Results {
    ids: Vec<Option<String>>,
    results: Vec<(usize, Message)>,
}

impl Results {
    fn expect(&mut self, calls: &[RawCall]) {
        self.ids = calls.iter().map(|call| call.id.clone()).collect();
    }

    fn add(&mut self, place: &str, raw: Raw) -> Result<(), ApiError> {
        let position = match raw.tool_call_id {
            None => self.results.len(),
            Some(id) => {
                let same = |call: &Option<String>| call.as_ref() == Some(&id);
                self.ids.iter().position(same).ok_or_else(|| {
                    let place = format!("{place}.tool_call_id");
                    let message = format!("{place}: no call before this message has the id {id:?}");
                    ApiError::invalid(place.as_str(), message)
                })?
            }
        };
        let text = content(&format!("{place}.content"), raw.content)?;
        self.results.push((position, Message::tool(text)));
        Ok(())
    }

    fn in_order(&mut self) -> Vec<Message> {
        self.results.sort_by_key(|(position, _)| *position);
        self.results.drain(..).map(|(_, message)| message).collect()
    }
}

fn message(place: &str, raw: Raw) -> Result<Message, ApiError> {
    for (key, given) in [
        ("function_call", raw.function_call.is_some()),
        ("audio", raw.audio.is_some()),
    ] {
        if given {
            let place = format!("{place}.{key}");
            return Err(ApiError::unsupported(
                &place,
                format!("{place} is not supported by this server"),
            ));
        }
    }
    let role = match raw.role.as_str() {
        role @ ("system" | "user" | "assistant") => role,
        // OpenAI's newer name for the same thing.
        "developer" => "system",
        role => {
            let place = format!("{place}.role");
            let message = format!(
                "{place}: no such role {role:?}, expected system, developer, user, assistant or tool"
            );
            return Err(ApiError::invalid(place.as_str(), message));
        }
    };
    let calls = raw.tool_calls.unwrap_or_default();
    let text = match raw.content {
        None if !calls.is_empty() => String::new(),
        text => content(&format!("{place}.content"), text)?,
    };
    let calls = calls.into_iter().map(|call| call.function);
    Ok(Message::new(role, text).with_tool_calls(calls))
}
/// A string, or the texts of a list of parts.
fn content(place: &str, content: Option<Value>) -> Result<String, ApiError> {
    let parts: Vec<Part> = match content {
        None => return Err(ApiError::invalid(place, format!("{place} is missing"))),
        Some(Value::String(text)) => return Ok(text),
        Some(parts) => fields::read(place, parts)?,
    };
    let mut whole = String::new();
    for (position, part) in parts.into_iter().enumerate() {
        let place = format!("{place}[{position}]");
        match (part.r#type.as_str(), part.text) {
            ("text", Some(text)) => whole.push_str(&text),
            ("text", None) => {
                return Err(ApiError::invalid(
                    place.as_str(),
                    format!("{place}.text is missing"),
                ));
            }
            (kind, _) => {
                let message =
                    format!("{place}: parts of type {kind:?} are not supported, only text");
                return Err(ApiError::unsupported(&place, message));
            }
        }
    }
    Ok(whole)
}
