//! The messages of a chat, as OpenAI's clients send them.

use qwen2_core::Message;
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
    tool_calls: Option<Vec<Value>>,
    #[serde(rename = "tool_call_id")]
    _tool_call_id: Option<String>,
    /// What clients send back of an earlier answer of ours.
    #[serde(rename = "refusal")]
    _refusal: Option<Value>,
    #[serde(rename = "annotations")]
    _annotations: Option<Vec<Value>>,
    audio: Option<Value>,
    function_call: Option<Value>,
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
    raw.into_iter()
        .enumerate()
        .map(|(position, raw)| message(&format!("messages[{position}]"), raw))
        .collect()
}

fn message(place: &str, raw: Raw) -> Result<Message, ApiError> {
    for (key, given) in [
        (
            "tool_calls",
            raw.tool_calls.is_some_and(|calls| !calls.is_empty()),
        ),
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
        role @ ("system" | "user" | "assistant" | "tool") => role,
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
    Ok(Message::new(
        role,
        content(&format!("{place}.content"), raw.content)?,
    ))
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
