//! Tools, calls and results in plain messages, for chat templates that know none of them.

use serde_json::{Map, Value};

use super::chat::Message;
use super::template::python_json;
use super::tools::markers::{ARGS, FUNCTION, RESULT, RETURN};
use super::tools::{Tool, ToolCall, ToolFormat};
use crate::error::{Error, ErrorKind, Result};

/// The conversation with the tools in its system message, and calls and results as text.
///
/// The words are those of Qwen-Agent's prompts, which the models were trained on:
/// <https://github.com/QwenLM/Qwen-Agent>, `qwen_agent/llm/fncall_prompts/`, `nous_fncall_prompt.py`
/// for Hermes' form and `qwen_fncall_prompt.py` (English, parallel calls) for its own.
///
/// # Errors
/// `InvalidArgument` for a result without a call before it.
pub(super) fn spell(
    messages: &[Message],
    tools: &[Tool],
    format: ToolFormat,
) -> Result<Vec<Message>> {
    let mut spelled = match format {
        ToolFormat::Hermes => hermes_turns(messages),
        ToolFormat::QwenAgent => qwen_agent_turns(messages)?,
    };
    if tools.is_empty() {
        return Ok(spelled);
    }
    let prompt = match format {
        ToolFormat::Hermes => hermes_system(tools),
        ToolFormat::QwenAgent => qwen_agent_system(tools),
    };
    match spelled.first_mut() {
        Some(first) if first.role == "system" => {
            first.content.push_str("\n\n");
            first.content.push_str(&prompt);
        }
        _ => spelled.insert(0, Message::system(prompt)),
    }
    Ok(spelled)
}

/// Whether the model is to go on with the last message instead of a new one: behind the results of
/// tools in Qwen-Agent's form, which are part of the assistant's turn.
pub(super) fn continues(spelled: &[Message]) -> bool {
    spelled
        .last()
        .is_some_and(|last| last.role == "assistant" && last.content.ends_with(RETURN))
}

fn is_result(message: &Message) -> bool {
    matches!(message.role.as_str(), "tool" | "function")
}

fn hermes_system(tools: &[Tool]) -> String {
    let definitions: Vec<String> = tools
        .iter()
        .map(|tool| python_json(&tool.definition()))
        .collect();
    format!(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n\
         You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{}\n</tools>\n\n\
         For each function call, return a json object with function name and arguments within \
         <tool_call></tool_call> XML tags:\n<tool_call>\n\
         {{\"name\": <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>",
        definitions.join("\n")
    )
}

fn hermes_turns(messages: &[Message]) -> Vec<Message> {
    let mut turns: Vec<Message> = Vec::with_capacity(messages.len());
    let mut after_result = false;
    for message in messages {
        if is_result(message) {
            let result = format!("<tool_response>\n{}\n</tool_response>", message.content);
            match turns.last_mut().filter(|_| after_result) {
                Some(last) => last.content = format!("{}\n{result}", last.content),
                None => turns.push(Message::user(result)),
            }
        } else {
            let calls = message.tool_calls.iter().map(hermes_call);
            let parts = (!message.content.is_empty()).then(|| message.content.clone());
            let parts: Vec<String> = parts.into_iter().chain(calls).collect();
            turns.push(Message::new(&message.role, parts.join("\n")));
        }
        after_result = is_result(message);
    }
    turns
}

fn hermes_call(call: &ToolCall) -> String {
    let arguments: Value = call.arguments_value();
    let mut object = Map::new();
    object.insert("name".to_owned(), call.name.clone().into());
    object.insert("arguments".to_owned(), arguments);
    format!(
        "<tool_call>\n{}\n</tool_call>",
        python_json(&Value::Object(object))
    )
}

fn qwen_agent_system(tools: &[Tool]) -> String {
    let describe = |tool: &Tool| {
        let (name, parameters) = (tool.name(), python_json(&tool.parameters()));
        let description = tool.description();
        format!(
            "### {name}\n\n{name}: {description} Parameters: {parameters} Format the arguments as a JSON object."
        )
    };
    let descriptions: Vec<String> = tools.iter().map(describe).collect();
    let names: Vec<&str> = tools.iter().map(Tool::name).collect();
    format!(
        "# Tools\n\n## You have access to the following tools:\n\n{}\n\n\
         ## Insert the following command in your reply when you need to call N tools in parallel:\n\n\
         {FUNCTION}: The name of tool 1, should be one of [{}]\n{ARGS}: The input of tool 1\n\
         {FUNCTION}: The name of tool 2\n{ARGS}: The input of tool 2\n...\n\
         {FUNCTION}: The name of tool N\n{ARGS}: The input of tool N\n\
         {RESULT}: The result of tool 1\n{RESULT}: The result of tool 2\n...\n\
         {RESULT}: The result of tool N\n\
         {RETURN}: Reply based on tool results. Images need to be rendered as ![](url)",
        descriptions.join("\n\n"),
        names.join(",")
    )
}

/// Calls, results and the answer to them are one turn of the assistant.
fn qwen_agent_turns(messages: &[Message]) -> Result<Vec<Message>> {
    let mut turns: Vec<Message> = Vec::with_capacity(messages.len());
    for (position, message) in messages.iter().enumerate() {
        let open = turns.last_mut().filter(|last| last.role == "assistant");
        match (open, message.role.as_str()) {
            (Some(turn), _) if is_result(message) => {
                let before = turn.content.trim_end();
                let before = before.strip_suffix(RETURN).unwrap_or(before).trim_end();
                turn.content = format!("{before}\n{RESULT}: {}\n{RETURN}", message.content);
            }
            (None, _) if is_result(message) => return Err(no_call(position)),
            (Some(turn), "assistant") => {
                let text = qwen_agent_text(message);
                // What a model writes behind RETURN begins with the colon.
                let text = text.strip_prefix(':').unwrap_or(&text).trim_start();
                let joint = if turn.content.ends_with(RETURN) {
                    ": "
                } else {
                    "\n"
                };
                turn.content = format!("{}{joint}{text}", turn.content);
            }
            _ => turns.push(Message::new(&message.role, qwen_agent_text(message))),
        }
    }
    Ok(turns)
}

fn qwen_agent_text(message: &Message) -> String {
    let call = |call: &ToolCall| format!("{FUNCTION}: {}\n{ARGS}: {}", call.name, call.arguments);
    let parts = (!message.content.is_empty()).then(|| message.content.clone());
    let parts: Vec<String> = parts
        .into_iter()
        .chain(message.tool_calls.iter().map(call))
        .collect();
    parts.join("\n")
}

fn no_call(position: usize) -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        "result of a tool without a call",
    )
    .with_key(format!("messages[{position}]"))
    .with_why("no message of the assistant is before it")
    .with_help("put the answer with the call before its result")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;

    fn tools() -> [Tool; 1] {
        [Tool::new(
            "add",
            "Adds.",
            r#"{"type": "object", "properties": {"x": {"type": "number"}}}"#,
        )
        .unwrap()]
    }

    fn conversation() -> Vec<Message> {
        let calls = [
            ToolCall::new("add", r#"{"x":1}"#),
            ToolCall::new("add", r#"{"x": 2}"#),
        ];
        vec![
            Message::user("Add."),
            Message::assistant("So:").with_tool_calls(calls),
            Message::tool("1"),
            Message::tool("3"),
        ]
    }

    /// Reference: the template of `nous_fncall_prompt.py`, filled in by hand.
    #[test]
    fn hermes_prompts_are_qwen_agents() {
        let spelled = spell(&conversation(), &tools(), ToolFormat::Hermes).unwrap();
        let texts: Vec<(&str, &str)> = spelled.iter().map(|m| (&*m.role, &*m.content)).collect();
        let system = "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"add\", \"description\": \"Adds.\", \"parameters\": {\"type\": \"object\", \"properties\": {\"x\": {\"type\": \"number\"}}}}}\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>";
        let calls = "So:\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"x\": 1}}\n</tool_call>\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"x\": 2}}\n</tool_call>";
        let results = "<tool_response>\n1\n</tool_response>\n<tool_response>\n3\n</tool_response>";
        assert_eq!(
            texts,
            [
                ("system", system),
                ("user", "Add."),
                ("assistant", calls),
                ("user", results)
            ]
        );
        assert!(!continues(&spelled));
    }

    #[test]
    fn qwen_agents_results_are_part_of_the_answer_that_goes_on() {
        let mut messages = conversation();
        messages.insert(0, Message::system("Be brief."));
        let spelled = spell(&messages, &tools(), ToolFormat::QwenAgent).unwrap();
        assert_eq!(spelled.len(), 3);
        assert!(
            spelled[0]
                .content
                .starts_with("Be brief.\n\n# Tools\n\n## You have access")
        );
        assert!(
            spelled[0]
                .content
                .contains("\n\n### add\n\nadd: Adds. Parameters: {\"type\": \"object\"")
        );
        let turn = "So:\n✿FUNCTION✿: add\n✿ARGS✿: {\"x\":1}\n✿FUNCTION✿: add\n✿ARGS✿: {\"x\": 2}\n✿RESULT✿: 1\n✿RESULT✿: 3\n✿RETURN✿";
        assert_eq!(spelled[2].content, turn);
        assert!(continues(&spelled));
        messages.push(Message::assistant("It is 3."));
        messages.push(Message::user("Thanks."));
        let spelled = spell(&messages, &tools(), ToolFormat::QwenAgent).unwrap();
        assert_eq!(spelled[2].content, format!("{turn}: It is 3."));
        assert!(!continues(&spelled));
    }

    #[test]
    fn a_result_without_a_call_is_an_error() {
        let messages = [Message::user("hi"), Message::tool("3")];
        let error = spell(&messages, &tools(), ToolFormat::QwenAgent).unwrap_err();
        assert_eq!(error.key(), Some("messages[1]"));
    }
}
