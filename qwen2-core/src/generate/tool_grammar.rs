//! The grammar of an answer that must call tools, or must call them right.

use serde_json::{Value, json};

use super::Constraint;
use super::constraint::WHITE_SPACE;
use crate::text::{Tool, ToolChoice, ToolFormat, markers};

/// What the choice and the strict tools ask for; `None` where the model is free.
///
/// A call has the exact form that the model was shown; the arguments are any JSON object, of a strict
/// tool one that its schema allows.
pub(crate) fn tool_grammar(
    tools: &[Tool],
    choice: &ToolChoice,
    format: ToolFormat,
) -> Option<Constraint> {
    let tools: Vec<&Tool> = match choice {
        ToolChoice::None => return None,
        ToolChoice::Auto if !tools.iter().any(Tool::is_strict) => return None,
        ToolChoice::Named(name) => tools.iter().filter(|tool| tool.name() == name).collect(),
        _ => tools.iter().collect(),
    };
    let open = text(format.open());
    let end = end(format);
    let start = match choice {
        // Free text up to a marker; from there on a call. Lazy: the first marker counts.
        ToolChoice::Auto => {
            format!("start: (lead call)* TEXT\nlead[lazy]: TEXT {open}\nTEXT: /(?s:.*)/\n")
        }
        ToolChoice::Named(_) => format!("start: {open} call {end}\n"),
        _ => format!("start: {open} call (\"\\n\" {open} call)* {end}\n"),
    };
    let call = match format {
        ToolFormat::Hermes => "call: \"\\n\" (BODY) \"\\n</tool_call>\"\n",
        ToolFormat::QwenAgent => "call: \": \" (BODY)\n",
    };
    let names: Vec<String> = (0..tools.len()).map(|i| format!("call_{i}")).collect();
    let mut lark = start + &call.replace("BODY", &names.join(" | "));
    for (i, tool) in tools.iter().enumerate() {
        let (before, behind) = around_arguments(tool.name(), format);
        lark += &format!("call_{i}: {} arguments_{i} {behind}\n", text(&before));
        lark += &format!("arguments_{i}: %json {}\n", schema(tool));
    }
    Some(Constraint::grammar(lark))
}

/// What may follow the calls: in Qwen-Agent's form the model goes on with a result, where it is stopped.
fn end(format: ToolFormat) -> String {
    let stops = format.stops().iter().map(|stop| text(&format!("\n{stop}")));
    match stops.collect::<Vec<_>>().join(" | ") {
        none if none.is_empty() => none,
        stops => format!("({stops})?"),
    }
}

/// What is written around the arguments of a call: plain text, and a string of the grammar.
fn around_arguments(name: &str, format: ToolFormat) -> (String, &'static str) {
    match format {
        ToolFormat::Hermes => (format!("{{\"name\": \"{name}\", \"arguments\": "), "\"}\""),
        ToolFormat::QwenAgent => (format!("{name}\n{}: ", markers::ARGS), ""),
    }
}

fn schema(tool: &Tool) -> Value {
    let mut schema = match tool.is_strict() {
        true => tool.parameters(),
        false => json!({"type": "object"}),
    };
    if let Value::Object(keys) = &mut schema {
        // A schema that says nothing of its type would allow arguments that are no object.
        keys.entry("type").or_insert_with(|| "object".into());
        keys.entry("x-guidance")
            .or_insert_with(|| json!({"whitespace_pattern": WHITE_SPACE}));
    }
    schema
}

/// A string of the grammar: its escapes are JSON's.
fn text(text: &str) -> String {
    Value::from(text).to_string()
}
