//! A model's text, in pieces, to the text for the reader and the calls of tools.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Deserializer, Map, Value};

use super::Tokenizer;
use super::tools::markers::{ARGS, FUNCTION, HERMES, RETURN};
use super::tools::{ToolCall, ToolFormat};

/// Splits text that comes in pieces. However it is cut, the joined text and the calls are the same.
///
/// White space between calls, and between them and the text around them, is left out. What looks
/// like a call but is none stays text.
#[derive(Debug)]
pub(crate) struct ToolParser {
    format: ToolFormat,
    /// Text that is not decided: white space before a possible call, a marker that is not whole, a
    /// call under way.
    held: String,
    /// Whether the text begins behind ✿RETURN✿: with a colon, which belongs to the marker.
    goes_on: bool,
    /// Whether a call ended right before `held`.
    after_call: bool,
}

/// What a piece of text made certain.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Parsed {
    pub(crate) text: String,
    pub(crate) calls: Vec<ToolCall>,
}

/// A call at the start of some text.
enum Found {
    /// It needs more text.
    Open,
    /// It takes this many bytes.
    Calls(usize, Vec<ToolCall>),
    /// This many bytes are no call.
    Text(usize),
}

impl ToolParser {
    pub(crate) fn new(format: ToolFormat) -> Self {
        Self {
            format,
            held: String::new(),
            goes_on: false,
            after_call: false,
        }
    }

    /// For the answer to a prompt.
    pub(crate) fn behind(format: ToolFormat, tokenizer: &Tokenizer, prompt: &[u32]) -> Self {
        // The marker has 12 bytes, so 12 tokens at most.
        let tail = &prompt[prompt.len().saturating_sub(16)..];
        let tail = tokenizer.decode(tail, false).unwrap_or_default();
        Self {
            goes_on: format == ToolFormat::QwenAgent && tail.ends_with(RETURN),
            ..Self::new(format)
        }
    }

    /// What is certain now.
    pub(crate) fn push(&mut self, text: &str) -> Parsed {
        self.held.push_str(text);
        self.take(false)
    }

    /// What is left when the text is over.
    pub(crate) fn finish(&mut self) -> Parsed {
        let mut parsed = self.take(true);
        let rest = std::mem::take(&mut self.held);
        parsed.text.push_str(self.visible(&rest));
        parsed
    }

    fn take(&mut self, over: bool) -> Parsed {
        let mut parsed = Parsed::default();
        if self.goes_on {
            if self.held.len() < 2 && !over {
                return parsed;
            }
            self.goes_on = false;
            let colon = [": ", ":"]
                .iter()
                .find(|colon| self.held.starts_with(**colon));
            self.held.drain(..colon.map_or(0, |colon| colon.len()));
        }
        let marker = self.format.open();
        while let Some(start) = self.held.find(marker) {
            let found = match self.format {
                ToolFormat::Hermes => hermes(&self.held[start..]),
                ToolFormat::QwenAgent => qwen_agent(&self.held[start..], over),
            };
            let (end, calls) = match found {
                Found::Open => {
                    let text: String = self.held.drain(..certain(&self.held[..start])).collect();
                    self.emit(&text, &mut parsed);
                    return parsed;
                }
                Found::Calls(len, calls) => (start + len, calls),
                Found::Text(len) => (start + len, Vec::new()),
            };
            let text: String = self.held.drain(..end).collect();
            if calls.is_empty() {
                self.emit(&text, &mut parsed);
            } else {
                self.emit(text[..start].trim_end(), &mut parsed);
                self.after_call = true;
                parsed.calls.extend(calls);
            }
        }
        if !over {
            let partial = (1..marker.len())
                .rev()
                .filter(|&len| marker.is_char_boundary(len))
                .find(|&len| self.held.ends_with(&marker[..len]))
                .unwrap_or(0);
            let whole = self.held.len() - partial;
            let text: String = self.held.drain(..certain(&self.held[..whole])).collect();
            self.emit(&text, &mut parsed);
        }
        parsed
    }

    fn emit(&mut self, text: &str, parsed: &mut Parsed) {
        let text = self.visible(text);
        if !text.is_empty() {
            parsed.text.push_str(text);
            self.after_call = false;
        }
    }

    fn visible<'t>(&self, text: &'t str) -> &'t str {
        match self.after_call {
            true => text.trim_start(),
            false => text,
        }
    }
}

/// Length of the text without the white space at its end, which a call may follow.
fn certain(text: &str) -> usize {
    text.trim_end().len()
}

/// `<tool_call>`, a JSON object, `</tool_call>`.
fn hermes(text: &str) -> Found {
    let (open, close) = HERMES;
    let mut from = open.len();
    while let Some(at) = text[from..].find(close) {
        let end = from + at;
        let body = text[open.len()..end].trim();
        match serde_json::from_str::<Map<String, Value>>(body) {
            Ok(call) => {
                let name = call.get("name").and_then(Value::as_str).unwrap_or_default();
                let arguments = match call.get("arguments") {
                    None | Some(Value::Null) => Some("{}"),
                    Some(_) => member(body, "arguments"),
                };
                let call = arguments.and_then(|arguments| ToolCall::checked(name, arguments));
                return match call {
                    Some(call) => Found::Calls(end + close.len(), vec![call]),
                    None => Found::Text(open.len()),
                };
            }
            // The marker is inside of a string.
            Err(error) if error.is_eof() && !body.is_empty() => from = end + close.len(),
            Err(_) => return Found::Text(open.len()),
        }
    }
    Found::Open
}

/// The text of a member of a JSON object, as it is written there; of several the last one.
fn member<'t>(object: &'t str, name: &str) -> Option<&'t str> {
    let mut rest = object.trim_start().strip_prefix('{')?;
    let mut found = None;
    loop {
        let (key, behind) = first::<String>(rest)?;
        let value = behind.trim_start().strip_prefix(':')?.trim_start();
        let (_, behind) = first::<IgnoredAny>(value)?;
        if key == name {
            found = Some(&value[..value.len() - behind.len()]);
        }
        match behind.trim_start().strip_prefix(',') {
            Some(next) => rest = next,
            None => return found,
        }
    }
}

/// The first JSON value of a text, and what is behind it.
fn first<T: DeserializeOwned>(text: &str) -> Option<(T, &str)> {
    let mut values = Deserializer::from_str(text).into_iter::<T>();
    let value = values.next()?.ok()?;
    Some((value, &text[values.byte_offset()..]))
}

/// `✿FUNCTION✿: name`, `✿ARGS✿: JSON`, up to the next function or the end of the text. A name with
/// several arguments stands for several calls.
fn qwen_agent(text: &str, over: bool) -> Found {
    let body = &text[FUNCTION.len()..];
    let end = match body.find(FUNCTION) {
        Some(end) => end,
        None if over => body.len(),
        None => return Found::Open,
    };
    let mut parts = body[..end].split(ARGS);
    let trimmed = |part: &str| {
        let part = part.trim();
        part.strip_prefix(':').unwrap_or(part).trim().to_owned()
    };
    let name = trimmed(parts.next().unwrap_or_default());
    let calls: Option<Vec<ToolCall>> = parts
        .map(|arguments| {
            // What a model writes behind the object is left out, as Qwen-Agent does.
            let arguments = trimmed(arguments);
            let (_, behind) = first::<IgnoredAny>(&arguments)?;
            ToolCall::checked(&name, &arguments[..arguments.len() - behind.len()])
        })
        .collect();
    match calls {
        Some(calls) if !calls.is_empty() => Found::Calls(FUNCTION.len() + end, calls),
        _ => Found::Text(FUNCTION.len()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(format: ToolFormat, text: &str) -> (String, Vec<(String, String)>) {
        let mut parser = ToolParser::new(format);
        let mut parsed = parser.push(text);
        let rest = parser.finish();
        parsed.text.push_str(&rest.text);
        parsed.calls.extend(rest.calls);
        let calls = parsed
            .calls
            .into_iter()
            .map(|call| (call.name, call.arguments));
        (parsed.text, calls.collect())
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.to_owned(), arguments.to_owned())
    }

    #[test]
    fn calls_in_hermes_form_are_taken_out_of_the_text() {
        let text = "Let me see.\n<tool_call>\n{\"name\": \"a\", \"arguments\": {\"x\": [1, 2]}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\"}\n</tool_call>\n";
        let (text, calls) = whole(ToolFormat::Hermes, text);
        assert_eq!(text, "Let me see.");
        assert_eq!(calls, [call("a", r#"{"x": [1, 2]}"#), call("now", "{}")]);
    }

    #[test]
    fn a_marker_inside_of_an_argument_ends_nothing() {
        let arguments = r#"{"html": "</tool_call> and <tool_call>"}"#;
        let text = format!(
            "<tool_call>{{\"name\": \"show\", \"arguments\": {arguments}}}</tool_call> done "
        );
        assert_eq!(
            whole(ToolFormat::Hermes, &text),
            ("done ".to_owned(), vec![call("show", arguments)])
        );
    }

    #[test]
    fn arguments_are_as_they_were_written() {
        let arguments = r#"{ "n": 1.10, "big": 123456789012345678901, "é": "\u00e9" }"#;
        let text =
            format!(r#"<tool_call>{{"arguments": {arguments} , "name":"a", "id": 2}}</tool_call>"#);
        assert_eq!(
            whole(ToolFormat::Hermes, &text),
            (String::new(), vec![call("a", arguments)])
        );
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in [
            "<tool_call>nonsense</tool_call> x",
            "<tool_call>{\"name\": \"a\", \"arguments\": 3}</tool_call>",
            "<tool_call></tool_call>",
            "<tool_call>{\"name\": \"a\", \"argum",
            "a < b <tool_cal",
            " \n ",
        ] {
            assert_eq!(whole(ToolFormat::Hermes, text), (text.to_owned(), vec![]));
        }
        for text in [
            "✿FUNCTION✿: a\n✿ARGS✿: no",
            "✿FUNCTION✿: a",
            "flowers ✿ and ✿FUN",
            "✿ARGS✿: {}",
        ] {
            assert_eq!(
                whole(ToolFormat::QwenAgent, text),
                (text.to_owned(), vec![])
            );
        }
    }

    #[test]
    fn calls_in_qwen_agents_form_are_taken_out_of_the_text() {
        let text = "好的\n✿FUNCTION✿: a\n✿ARGS✿: {\"x\": 1}\n✿FUNCTION✿: b\n✿ARGS✿: {}\n✿ARGS✿: {\"y\": \"✿\"}\n";
        let (text, calls) = whole(ToolFormat::QwenAgent, text);
        assert_eq!(text, "好的");
        let want = [
            call("a", r#"{"x": 1}"#),
            call("b", "{}"),
            call("b", r#"{"y": "✿"}"#),
        ];
        assert_eq!(calls, want);
    }

    #[test]
    fn the_colon_behind_a_return_is_no_text() {
        for (pieces, text) in [
            (&[":", " 3", "."][..], "3."),
            (&[": 3"], "3"),
            (&[":"], ""),
            (&["3", ": x"], "3: x"),
            (&["", "x"], "x"),
        ] {
            let mut parser = ToolParser {
                goes_on: true,
                ..ToolParser::new(ToolFormat::QwenAgent)
            };
            let mut seen: String = pieces.iter().map(|piece| parser.push(piece).text).collect();
            seen += &parser.finish().text;
            assert_eq!(seen, text);
        }
    }

    /// Whole calls, broken ones, and what surrounds them.
    fn text(format: ToolFormat) -> impl Strategy<Value = String> {
        let pieces: &'static [&'static str] = match format {
            ToolFormat::Hermes => &[
                "<tool_call>",
                "</tool_call>",
                "<tool_call>\n{\"name\": \"a\", \"arguments\": {}}\n</tool_call>",
                "{\"name\": \"b\", \"arguments\": {\"s\": \"",
                "\"}}",
                "<tool",
                "_call>",
                "</",
                "\n",
                " ",
                "x",
                "你",
            ],
            ToolFormat::QwenAgent => &[
                "✿FUNCTION✿",
                "✿ARGS✿",
                "✿FUNCTION✿: a\n✿ARGS✿: {\"x\": 1}\n",
                ": b\n",
                ": {}",
                "✿",
                "ARGS",
                "\n",
                " ",
                "x",
                "你",
            ],
        };
        prop::collection::vec(prop::sample::select(pieces), 0..9).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        #[test]
        fn however_the_text_is_cut_text_and_calls_are_the_same(
            (format, text) in prop_oneof![
                text(ToolFormat::Hermes).prop_map(|text| (ToolFormat::Hermes, text)),
                text(ToolFormat::QwenAgent).prop_map(|text| (ToolFormat::QwenAgent, text)),
            ],
            cuts in prop::collection::vec(0..200_usize, 0..8),
        ) {
            let expected = whole(format, &text);
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&cut| text.is_char_boundary(cut)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let every: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
            for cuts in [cuts, every] {
                let mut parser = ToolParser::new(format);
                let mut seen = (String::new(), Vec::new());
                let mut add = |parsed: Parsed| {
                    seen.0.push_str(&parsed.text);
                    seen.1.extend(parsed.calls.into_iter().map(|call| (call.name, call.arguments)));
                };
                for pair in cuts.windows(2) {
                    add(parser.push(&text[pair[0]..pair[1]]));
                }
                add(parser.finish());
                prop_assert_eq!(&seen, &expected);
            }
        }
    }
}
