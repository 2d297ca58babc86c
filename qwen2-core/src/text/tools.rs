//! Tools that a model may ask for, and the calls that it makes.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::error::{Error, ErrorKind, Result};

/// Longest description of a tool, its schema included.
const MAX_DEFINITION: usize = 256 << 10;
const MAX_NAME: usize = 64;

/// A function that the model may ask its caller to run.
///
/// Serialized as OpenAI's interface has it: `{"type": "function", "function": {"name": …}}`.
///
/// ```
/// use qwen2_core::Tool;
///
/// let schema = r#"{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}"#;
/// let tool = Tool::new("weather", "The weather in a city.", schema)?;
/// assert_eq!(tool.name(), "weather");
/// # Ok::<(), qwen2_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    /// The object under `function`, with its keys in the caller's order: the model reads it.
    function: Map<String, Value>,
    name: String,
}

impl Tool {
    /// A tool by its parts; `parameters` is the text of a JSON schema for an object.
    ///
    /// # Errors
    /// As [`from_json`](Self::from_json).
    pub fn new(name: &str, description: &str, parameters: &str) -> Result<Self> {
        let parameters: Value = serde_json::from_str(parameters)
            .map_err(|error| invalid("parameters", error.to_string()))?;
        let function = json!({"name": name, "description": description, "parameters": parameters});
        Self::from_value(function)
    }

    /// A tool as OpenAI's interface describes it: the object with `type` and `function`, or the
    /// object under `function` alone. Keys that this library does not know reach the model, too;
    /// `strict` does not, it is for [`strict`](Self::strict).
    ///
    /// # Errors
    /// `InvalidArgument` naming the key: a name that is not 1 to 64 letters, digits, `_`, `-` or `.`,
    /// parameters that are no object, a definition of more than 256 KiB.
    pub fn from_json(json: &str) -> Result<Self> {
        let value =
            serde_json::from_str(json).map_err(|error| invalid("tools", error.to_string()))?;
        Self::from_value(value)
    }

    fn from_value(value: Value) -> Result<Self> {
        let mut value = value;
        if let Some(kind) = value
            .get("type")
            .filter(|_| value.get("function").is_some())
        {
            if kind != "function" {
                return Err(invalid(
                    "type",
                    format!("expected \"function\", found {kind}"),
                ));
            }
            value = value["function"].take();
        }
        let Value::Object(mut function) = value else {
            return Err(invalid("tools", "a tool is a JSON object".to_owned()));
        };
        let len = Value::Object(function.clone()).to_string().len();
        if len > MAX_DEFINITION {
            return Err(invalid(
                "tools",
                format!("{len} bytes, the most is {MAX_DEFINITION}"),
            ));
        }
        let name = function
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let is_legal = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_legal) {
            let why = format!("expected 1 to 64 letters, digits, _, - or ., found {name:?}");
            return Err(invalid("name", why));
        }
        let name = name.to_owned();
        let is_text = |value: &Value| value.is_string();
        if !function.get("description").is_none_or(is_text) {
            return Err(invalid("description", "expected a string".to_owned()));
        }
        if !function.get("parameters").is_none_or(Value::is_object) {
            return Err(invalid(
                "parameters",
                "expected a JSON schema: an object".to_owned(),
            ));
        }
        if !function
            .get("strict")
            .is_none_or(|strict| strict.is_boolean() || strict.is_null())
        {
            return Err(invalid("strict", "expected true or false".to_owned()));
        }
        if function.get("strict").is_some_and(Value::is_null) {
            function.shift_remove("strict");
        }
        Ok(Self { function, name })
    }

    /// Whether the arguments of every call are forced to keep to `parameters`. Default: no.
    #[must_use]
    pub fn strict(mut self, strict: bool) -> Self {
        self.function.insert("strict".to_owned(), strict.into());
        self
    }

    /// What the model calls it by.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn is_strict(&self) -> bool {
        self.function.get("strict") == Some(&Value::Bool(true))
    }

    /// What it does; empty when nothing is said.
    pub(crate) fn description(&self) -> &str {
        self.function
            .get("description")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// The schema of its arguments; any object when nothing is said.
    pub(crate) fn parameters(&self) -> Value {
        let any = || json!({"type": "object", "properties": {}});
        self.function.get("parameters").cloned().unwrap_or_else(any)
    }

    /// What the model reads.
    pub(crate) fn definition(&self) -> Value {
        let mut function = self.function.clone();
        function.shift_remove("strict");
        json!({"type": "function", "function": function})
    }
}

impl Serialize for Tool {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        json!({"type": "function", "function": self.function}).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Tool {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Self::from_value(value).map_err(serde::de::Error::custom)
    }
}

/// What the two formats are made of.
pub(crate) mod markers {
    pub(crate) const HERMES: (&str, &str) = ("<tool_call>", "</tool_call>");
    // https://github.com/QwenLM/Qwen-Agent, qwen_agent/llm/fncall_prompts/qwen_fncall_prompt.py
    pub(crate) const FUNCTION: &str = "✿FUNCTION✿";
    pub(crate) const ARGS: &str = "✿ARGS✿";
    pub(crate) const RESULT: &str = "✿RESULT✿";
    pub(crate) const RETURN: &str = "✿RETURN✿";
}

/// A call that the model asks for.
///
/// Serialized as OpenAI's interface has it; read from that form and from `{"name", "arguments"}`, with
/// the arguments as an object or as its text.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ToolCall {
    /// The name that the model wrote, which need not be one of the tools.
    pub name: String,
    /// The text of a JSON object, as the model wrote it. It keeps to the tool's schema only where the
    /// tool is strict.
    pub arguments: String,
}

impl ToolCall {
    /// A call, for a message that repeats what the model asked for.
    pub fn new(name: impl Into<String>, arguments: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            arguments: arguments.into(),
        }
    }

    /// The call whose name and arguments are as JSON has them; `None` unless the arguments are an
    /// object.
    pub(crate) fn checked(name: &str, arguments: &str) -> Option<Self> {
        let is_object = serde_json::from_str::<Map<String, Value>>(arguments).is_ok();
        (!name.is_empty() && is_object).then(|| Self::new(name, arguments))
    }

    /// The arguments for a prompt: an object, or what else the caller put there as text.
    pub(crate) fn arguments_value(&self) -> Value {
        serde_json::from_str(&self.arguments).unwrap_or_else(|_| self.arguments.clone().into())
    }
}

impl Serialize for ToolCall {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let function = json!({"name": self.name, "arguments": self.arguments});
        json!({"type": "function", "function": function}).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ToolCall {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let call = value.get("function").unwrap_or(&value);
        let name = call.get("name").and_then(Value::as_str);
        let arguments = match call.get("arguments") {
            Some(Value::String(text)) => Some(text.clone()),
            Some(object @ Value::Object(_)) => Some(object.to_string()),
            _ => None,
        };
        match (name, arguments) {
            (Some(name), Some(arguments)) => Ok(Self::new(name, arguments)),
            _ => Err(serde::de::Error::custom("a call has a name and arguments")),
        }
    }
}

/// Whether the model calls tools.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoice {
    /// As the model decides.
    #[default]
    Auto,
    /// No: the tools are not shown to it.
    None,
    /// At least one call, by the feature `constraint`.
    Required,
    /// One call of this tool, by the feature `constraint`.
    Named(String),
}

/// How calls are written.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolFormat {
    /// `<tool_call>` with a JSON object: Qwen2.5 and later, and models tuned for Hermes' form.
    Hermes,
    /// `✿FUNCTION✿` and `✿ARGS✿`: Qwen-Agent's for Qwen2.
    QwenAgent,
}

impl ToolFormat {
    /// What a call begins with.
    pub(crate) fn open(self) -> &'static str {
        match self {
            Self::Hermes => markers::HERMES.0,
            Self::QwenAgent => markers::FUNCTION,
        }
    }

    /// What only the caller writes: the model is stopped before it.
    pub(crate) fn stops(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &[],
            Self::QwenAgent => &[markers::RESULT, markers::RETURN],
        }
    }
}

fn invalid(key: &str, why: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, "tool cannot be used")
        .with_key(key)
        .with_why(why)
        .with_help(r#"a tool is {"type": "function", "function": {"name": …, "description": …, "parameters": JSON schema}}"#)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read_and_the_model_sees_all_but_strict() {
        let bare = r#"{"name": "f", "parameters": {"type": "object", "x": 1}, "more": "kept", "strict": true}"#;
        let bare = Tool::from_json(bare).unwrap();
        assert!(bare.is_strict());
        let whole = serde_json::to_string(&bare).unwrap();
        assert_eq!(Tool::from_json(&whole).unwrap(), bare);
        assert_eq!(
            bare.definition().to_string(),
            r#"{"type":"function","function":{"name":"f","parameters":{"type":"object","x":1},"more":"kept"}}"#
        );
        assert_eq!(serde_json::from_str::<Tool>(&whole).unwrap(), bare);
    }

    #[test]
    fn a_bad_tool_names_its_key() {
        let cases = [
            ("{", "tools"),
            ("[]", "tools"),
            ("{}", "name"),
            (r#"{"name": "a b"}"#, "name"),
            (r#"{"name": "✿FUNCTION✿"}"#, "name"),
            (r#"{"name": "f", "description": 1}"#, "description"),
            (r#"{"name": "f", "parameters": []}"#, "parameters"),
            (r#"{"name": "f", "strict": "yes"}"#, "strict"),
            (r#"{"type": "code", "function": {"name": "f"}}"#, "type"),
        ];
        for (json, key) in cases {
            let error = Tool::from_json(json).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{json}");
            assert_eq!(error.key(), Some(key), "{json}");
        }
    }
}
