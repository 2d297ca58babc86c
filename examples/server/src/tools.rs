//! Tools of a chat: what the request names, and the calls of the answer.

use qwen2_core::{Tool, ToolCall, ToolChoice};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::fields::{self, Fields};
use crate::head::random_id;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    #[serde(rename = "type")]
    _kind: Kind,
    function: Function,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Function,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    name: String,
}

/// Takes `tools` and `tool_choice`.
///
/// # Errors
/// 400 naming the tool that is none.
pub(crate) fn take_tools(fields: &mut Fields) -> Result<(Vec<Tool>, ToolChoice), ApiError> {
    let tools: Vec<Value> = fields.take("tools")?.unwrap_or_default();
    let tools = tools.iter().enumerate().map(|(index, tool)| {
        let place = format!("tools[{index}]");
        Tool::from_json(&tool.to_string())
            .map_err(|error| ApiError::invalid(place.as_str(), format!("{place}: {error}")))
    });
    let tools = tools.collect::<Result<Vec<_>, _>>()?;
    let choice = match fields.take::<Value>("tool_choice")? {
        None => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" => ToolChoice::Required,
            word => {
                let message =
                    format!("tool_choice is {word:?}, expected auto, none, required or a function");
                return Err(ApiError::invalid("tool_choice", message));
            }
        },
        Some(named) => {
            let named: Named = fields::read("tool_choice", named)?;
            ToolChoice::Named(named.function.name)
        }
    };
    // One call at most is what no option of the library asks for.
    fields.refuse(
        "parallel_tool_calls",
        match tools.is_empty() {
            true => &[Value::Bool(true), Value::Bool(false)],
            false => &[Value::Bool(true)],
        },
    )?;
    Ok((tools, choice))
}

/// A call as an answer shows it, with an id for the message that brings its result.
pub(crate) fn call(call: &ToolCall) -> Value {
    json!({
        "id": format!("call_{}", random_id()),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    })
}
