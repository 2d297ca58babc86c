//! What tool calling promises: calls are told apart from text, fed back, and forced where asked.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::OnceLock;

use common::{demo, load};
use qwen2_core::{
    ErrorKind, FinishReason, GenerateOptions, Generation, LogitsProcessor, Message, Model, Tool,
    ToolCall, ToolChoice, ToolFormat,
};

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| load(demo()))
}

fn tools() -> [Tool; 2] {
    let schema = r##"{"type": "object", "properties": {"left": {"type": "integer", "minimum": 0, "maximum": 99}, "right": {"$ref": "#/$defs/n"}}, "required": ["left", "right"], "additionalProperties": false, "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}}"##;
    [
        Tool::new("add", "Adds two numbers.", schema).unwrap(),
        Tool::from_json(r#"{"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": false}}"#).unwrap(),
    ]
}

fn options(format: ToolFormat) -> GenerateOptions {
    GenerateOptions::greedy()
        .max_new_tokens(250)
        .tools(tools())
        .tool_format(format)
}

/// Makes the model say a text and end, token by token.
struct Says {
    tokens: Vec<u32>,
    at: usize,
}

impl Says {
    fn new(text: &str) -> Self {
        let tokenizer = model().tokenizer();
        let mut tokens = tokenizer.encode(text).unwrap();
        tokens.push(tokenizer.eos_token_id().unwrap());
        Self { tokens, at: 0 }
    }
}

impl LogitsProcessor for Says {
    fn process(&mut self, _: &[u32], logits: &mut [f32]) -> qwen2_core::Result<()> {
        logits.fill(f32::NEG_INFINITY);
        logits[self.tokens[self.at] as usize] = 0.0;
        self.at += 1;
        Ok(())
    }
}

/// The generation of a model that says `text`, and its pieces' text and calls.
fn say(text: &str, options: &GenerateOptions) -> (Generation, String, Vec<ToolCall>) {
    let messages = vec![Message::user("What is 2 plus 3?")];
    let mut stream = model()
        .stream_with(messages, options, Says::new(text))
        .unwrap();
    let (mut seen, mut calls) = (String::new(), Vec::new());
    for piece in &mut stream {
        let piece = piece.unwrap();
        seen += &piece.text;
        calls.extend(piece.tool_calls);
    }
    (stream.finish().unwrap(), seen, calls)
}

#[test]
fn calls_come_apart_from_the_text_whole_and_streamed() {
    let cases = [
        (
            ToolFormat::Hermes,
            "I add.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"left\": 2, \"right\": 3}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
        ),
        (
            ToolFormat::QwenAgent,
            "I add.\n✿FUNCTION✿: add\n✿ARGS✿: {\"left\": 2, \"right\": 3}\n✿FUNCTION✿: now\n✿ARGS✿: {}\n✿RESULT✿: 5",
        ),
    ];
    let calls = [
        ToolCall::new("add", r#"{"left": 2, "right": 3}"#),
        ToolCall::new("now", "{}"),
    ];
    for (format, text) in cases {
        let (generation, seen, streamed) = say(text, &options(format));
        assert_eq!(generation.text, "I add.", "{format:?}");
        assert_eq!(generation.tool_calls, calls);
        assert_eq!(generation.finish_reason, FinishReason::ToolCalls);
        assert_eq!(generation.stop_match, None);
        assert_eq!((seen, streamed), (generation.text, generation.tool_calls));
    }
}

#[test]
fn text_without_calls_and_calls_without_tools_stay_text() {
    let text = "2 < 3 <tool_call> nothing";
    let (generation, seen, _) = say(text, &options(ToolFormat::Hermes));
    assert_eq!((generation.text, &*seen), (text.to_owned(), text));
    assert_eq!(generation.finish_reason, FinishReason::Stop);
    let call = "<tool_call>{\"name\": \"now\"}</tool_call>";
    let none = options(ToolFormat::Hermes).tool_choice(ToolChoice::None);
    for options in [none, GenerateOptions::greedy()] {
        let (generation, ..) = say(call, &options);
        assert_eq!(generation.text, call);
        assert!(generation.tool_calls.is_empty());
    }
}

#[test]
fn a_call_that_is_cut_off_stays_text() {
    let text = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"left\": 2";
    let n = model().tokenizer().count(text).unwrap();
    let (generation, seen, _) = say(text, &options(ToolFormat::Hermes).max_new_tokens(n));
    assert_eq!((generation.text, &*seen), (text.to_owned(), text));
    assert_eq!(generation.finish_reason, FinishReason::Length);
}

#[test]
fn a_session_shows_the_tools_and_feeds_results_back() {
    for format in [ToolFormat::Hermes, ToolFormat::QwenAgent] {
        let mut session = model().session();
        session
            .append(vec![Message::user("What is 2 plus 3?")])
            .unwrap();
        let mut options = options(format);
        options.max_new_tokens = Some(4);
        session.generate(&options).unwrap();
        let read = |tokens: &[u32]| model().tokenizer().decode(tokens, false).unwrap();
        let shown = read(session.tokens());
        assert!(
            shown.starts_with("<|im_start|>system\n# Tools\n\n"),
            "{shown}"
        );
        assert!(shown.contains("Adds two numbers."), "{shown}");
        // The same conversation with a call in it, and its result.
        let call = ToolCall::new("add", r#"{"left": 2, "right": 3}"#);
        let mut session = model().session();
        let messages = vec![
            Message::user("What is 2 plus 3?"),
            Message::assistant("").with_tool_calls([call]),
            Message::tool("5"),
        ];
        session.append(messages).unwrap();
        let generation = session.generate(&options).unwrap();
        assert!(generation.usage.completion_tokens > 0);
        let shown = read(session.tokens());
        let turn = match format {
            ToolFormat::Hermes => {
                "assistant\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"left\": 2, \"right\": 3}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
            }
            _ => {
                "assistant\n✿FUNCTION✿: add\n✿ARGS✿: {\"left\": 2, \"right\": 3}\n✿RESULT✿: 5\n✿RETURN✿"
            }
        };
        assert!(shown.contains(turn), "{shown}");
        // What follows a result in Qwen-Agent's form is the same turn.
        let turns = shown.matches("<|im_start|>").count();
        assert_eq!(
            turns,
            if format == ToolFormat::Hermes { 5 } else { 3 },
            "{shown}"
        );
    }
}

#[test]
fn tools_that_cannot_be_used_are_refused() {
    let refuse = |options: &GenerateOptions, key: &str| {
        let messages = [Message::user("hi")];
        let error = model().chat(&messages, options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert_eq!(error.key(), Some(key), "{error}");
    };
    let named = ToolChoice::Named("nothing".to_owned());
    refuse(
        &options(ToolFormat::Hermes).tool_choice(named),
        "tool_choice",
    );
    refuse(
        &GenerateOptions::greedy().tool_choice(ToolChoice::Required),
        "tool_choice",
    );
    refuse(
        &options(ToolFormat::Hermes).tools([tools()[0].clone(), tools()[0].clone()]),
        "tools",
    );
    let many = (0..129).map(|i| Tool::from_json(&format!(r#"{{"name": "t{i}"}}"#)).unwrap());
    refuse(&options(ToolFormat::Hermes).tools(many), "tools");
    let error = model()
        .generate("hi", &options(ToolFormat::Hermes))
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.key()),
        (ErrorKind::InvalidArgument, Some("prompt"))
    );
}

#[cfg(not(feature = "constraint"))]
#[test]
fn a_forced_call_names_the_feature_it_needs() {
    let options = options(ToolFormat::Hermes).tool_choice(ToolChoice::Required);
    let error = model().chat(&[Message::user("hi")], &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.help().unwrap().contains("feature constraint"));
}

#[cfg(feature = "constraint")]
mod forced {
    use super::*;
    use qwen2_core::Constraint;
    use serde_json::Value;

    fn strict(format: ToolFormat) -> GenerateOptions {
        let [add, now] = tools();
        options(format).tools([add.strict(true), now.strict(true)])
    }

    fn check(call: &ToolCall) {
        let value: Value = serde_json::from_str(&call.arguments).unwrap();
        assert!(["add", "now"].contains(&&*call.name), "{call:?}");
        if call.name == "add" {
            let schema: Value = serde_json::to_value(&tools()[0]).unwrap();
            let schema = &schema["function"]["parameters"];
            assert!(jsonschema::is_valid(schema, &value), "{call:?}");
        }
    }

    #[test]
    fn a_named_tool_is_called_with_arguments_that_its_schema_allows() {
        for format in [ToolFormat::Hermes, ToolFormat::QwenAgent] {
            for seed in 0..4 {
                let options = strict(format)
                    .tool_choice(ToolChoice::Named("add".to_owned()))
                    .temperature(1.5)
                    .seed(seed);
                let generation = model().chat(&[Message::user("Hello!")], &options).unwrap();
                assert_eq!(
                    generation.finish_reason,
                    FinishReason::ToolCalls,
                    "{generation:?}"
                );
                assert_eq!(generation.text, "");
                assert_eq!(generation.tool_calls.len(), 1);
                assert_eq!(generation.tool_calls[0].name, "add");
                check(&generation.tool_calls[0]);
            }
        }
    }

    #[test]
    fn required_tools_are_called_once_or_more() {
        for format in [ToolFormat::Hermes, ToolFormat::QwenAgent] {
            let [add, _] = tools();
            let options = options(format)
                .tools([add.strict(true)])
                .tool_choice(ToolChoice::Required)
                .temperature(1.0)
                .seed(3);
            let generation = model().chat(&[Message::user("Hello!")], &options).unwrap();
            assert!(!generation.tool_calls.is_empty(), "{generation:?}");
            generation.tool_calls.iter().for_each(check);
        }
    }

    /// The model never begins a call by itself, so it is made to; from there the grammar decides.
    #[test]
    fn a_call_of_the_models_own_is_forced_into_its_schema() {
        struct Begins(Vec<u32>);
        impl LogitsProcessor for Begins {
            fn process(&mut self, _: &[u32], logits: &mut [f32]) -> qwen2_core::Result<()> {
                if let Some(token) = self.0.pop() {
                    logits[token as usize] = f32::MAX;
                }
                Ok(())
            }
        }
        for (format, begin) in [
            (ToolFormat::Hermes, "Well. <tool_call>"),
            (ToolFormat::QwenAgent, "Well. ✿FUNCTION✿"),
        ] {
            let mut begin = model().tokenizer().encode(begin).unwrap();
            begin.reverse();
            let messages = vec![Message::user("Hello!")];
            let options = strict(format).temperature(1.0).seed(1);
            let stream = model()
                .stream_with(messages, &options, Begins(begin))
                .unwrap();
            let generation = stream.finish().unwrap();
            assert!(generation.text.starts_with("Well."), "{generation:?}");
            assert!(!generation.tool_calls.is_empty(), "{generation:?}");
            generation.tool_calls.iter().for_each(check);
        }
    }

    #[test]
    fn without_a_call_strict_tools_change_nothing() {
        let messages = [Message::user("What is 2 plus 3?")];
        let free = model()
            .chat(&messages, &options(ToolFormat::Hermes))
            .unwrap();
        let bound = model()
            .chat(&messages, &strict(ToolFormat::Hermes))
            .unwrap();
        assert_eq!(bound.tokens, free.tokens);
    }

    #[test]
    fn a_constraint_beside_a_forced_call_is_refused() {
        let options = strict(ToolFormat::Hermes).constraint(Constraint::regex("a"));
        let error = model().chat(&[Message::user("hi")], &options).unwrap_err();
        assert_eq!(
            (error.kind(), error.key()),
            (ErrorKind::InvalidArgument, Some("constraint"))
        );
    }
}
