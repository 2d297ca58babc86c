//! What an answer must look like: OpenAI's `response_format`, and vLLM's `guided_…` for more.

use qwen2_core::Constraint;
use serde::Deserialize;
use serde_json::Value;

use crate::error::ApiError;
use crate::fields::Fields;

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Format {
    Text,
    JsonObject,
    JsonSchema { json_schema: Schema },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Schema {
    #[serde(rename = "name")]
    _name: String,
    /// Any JSON, where there is none.
    #[serde(default)]
    schema: Option<Value>,
    #[serde(rename = "description")]
    _description: Option<String>,
    /// Here every schema is kept to.
    #[serde(rename = "strict")]
    _strict: Option<bool>,
}

/// Takes the form that a request asks for, and under which field.
///
/// # Errors
/// 400 for a form that is none, and for two of them.
pub(crate) fn take_constraint(
    fields: &mut Fields,
) -> Result<Option<(&'static str, Constraint)>, ApiError> {
    let mut found: Option<(&'static str, Constraint)> = None;
    for (key, constraint) in [
        (
            "response_format",
            response_format(fields.take("response_format")?),
        ),
        (
            "guided_json",
            fields.take::<Value>("guided_json")?.map(schema),
        ),
        (
            "guided_regex",
            fields
                .take::<String>("guided_regex")?
                .map(Constraint::regex),
        ),
        (
            "guided_grammar",
            fields
                .take::<String>("guided_grammar")?
                .map(Constraint::grammar),
        ),
        (
            "guided_choice",
            fields
                .take::<Vec<String>>("guided_choice")?
                .map(Constraint::choice),
        ),
    ] {
        let Some(constraint) = constraint else {
            continue;
        };
        if let Some((other, _)) = found {
            let message = format!("{other} and {key} contradict each other");
            return Err(ApiError::invalid(key, message));
        }
        found = Some((key, constraint));
    }
    Ok(found)
}

fn response_format(format: Option<Format>) -> Option<Constraint> {
    match format? {
        Format::Text => None,
        Format::JsonObject => Some(Constraint::json_schema(r#"{"type": "object"}"#)),
        Format::JsonSchema { json_schema } => Some(match json_schema.schema {
            Some(value) => schema(value),
            None => Constraint::json_schema("{}"),
        }),
    }
}

/// vLLM takes a schema as JSON and as its text.
fn schema(value: Value) -> Constraint {
    match value {
        Value::String(text) => Constraint::json_schema(text),
        value => Constraint::json_schema(value.to_string()),
    }
}
