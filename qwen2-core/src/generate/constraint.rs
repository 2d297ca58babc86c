//! What a generation must look like: a JSON schema, a regular expression, a grammar or a list.

use serde::{Deserialize, Serialize};

/// Between the parts of JSON: one space, or a new line and its indentation. Without a bound, a model
/// that has nothing to say writes white space until the context ends.
pub(super) const WHITE_SPACE: &str = r" |\n[ \t]{0,32}";

/// The form of a text, kept to at every token: of the tokens that would break it, none is possible.
///
/// Text that has no choice left is appended without running the model, and the generation ends
/// where the form allows nothing more. A text that `max_new_tokens`, a stop string or a stop token
/// cuts short keeps to the form as far as it goes.
///
/// Sources are checked when a generation starts. They may have 256 KiB; of what they expand to,
/// the `llguidance` library bounds the size (500,000 grammar symbols), the states and the work for
/// each token, and what exceeds that is an error of that generation alone.
///
/// ```
/// use qwen2_core::{Constraint, GenerateOptions};
///
/// let schema = r#"{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}"#;
/// let options = GenerateOptions::new().constraint(Constraint::json_schema(schema));
/// assert!(options.constraint.is_some());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Constraint(pub(crate) Form);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Form {
    JsonSchema(String),
    Regex(String),
    Grammar(String),
    Choice(Vec<String>),
}

impl Constraint {
    /// JSON that a JSON schema allows; `schema` is its text. `{}` allows any JSON.
    ///
    /// Properties come in the order of the schema. Between the parts there may be one space, or a
    /// line break and up to 32 spaces or tabs; the schema's own `x-guidance` replaces that. Keywords
    /// and formats that cannot be kept to are refused, as are references out of the schema.
    pub fn json_schema(schema: impl Into<String>) -> Self {
        Self(Form::JsonSchema(schema.into()))
    }

    /// As [`json_schema`](Self::json_schema), with the schema of a Rust type.
    #[cfg(feature = "schemars")]
    pub fn json_schema_of<T: schemars::JsonSchema>() -> Self {
        Self::json_schema(schemars::schema_for!(T).as_value().to_string())
    }

    /// Text that the whole of a regular expression matches, in the syntax of the `regex` crate
    /// without anchors, word boundaries and look-around.
    pub fn regex(regex: impl Into<String>) -> Self {
        Self(Form::Regex(regex.into()))
    }

    /// Text that a context-free grammar allows, in llguidance's variant of Lark; `start` is its
    /// first rule.
    pub fn grammar(lark: impl Into<String>) -> Self {
        Self(Form::Grammar(lark.into()))
    }

    /// One of the given texts; none of them empty.
    pub fn choice(choices: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self(Form::Choice(choices.into_iter().map(Into::into).collect()))
    }
}
