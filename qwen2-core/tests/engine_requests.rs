//! What a request to an engine has of its own: each of them works among others as it does alone.
#![allow(clippy::unwrap_used)]

mod common;

use common::{demo, load};
use qwen2_core::{
    Constraint, Engine, Error, ErrorKind, FinishReason, GenerateOptions, Generation,
    LogitsProcessor, Message, Model, Prompt, Request, Tool, ToolChoice, ToolFormat,
};

fn ask(question: &str) -> Prompt {
    Prompt::Chat(vec![Message::user(question)])
}

fn greedy() -> GenerateOptions {
    GenerateOptions::greedy().max_new_tokens(60)
}

fn add() -> Tool {
    let json = r#"{"name": "add", "strict": true, "parameters": {"type": "object", "properties": {"left": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["left"], "additionalProperties": false}}"#;
    Tool::from_json(json).unwrap()
}

/// Forbids all tokens but one.
struct Only(usize);

impl LogitsProcessor for Only {
    fn process(&mut self, _: &[u32], logits: &mut [f32]) -> Result<(), Error> {
        for (token, logit) in logits.iter_mut().enumerate() {
            if token != self.0 {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }
}

/// One request for each thing that a request can have, and plain ones between them.
fn requests() -> Vec<Request> {
    let sampled = |seed| {
        let mut options = GenerateOptions::new().temperature(2.0).max_new_tokens(30);
        options.ignore_eos = true;
        options.top_k(20).repetition_penalty(1.1).seed(seed)
    };
    let schema = r#"{"type": "object", "properties": {"size": {"enum": ["small", "large"]}}, "required": ["size"], "additionalProperties": false}"#;
    let tools = greedy().max_new_tokens(250).tools([add()]);
    let tools = tools.tool_format(ToolFormat::Hermes);
    let plain = || Request::new(ask("Count from 3 to 9."), &greedy());
    vec![
        Request::new(
            ask("Hi"),
            &greedy().constraint(Constraint::json_schema(schema)),
        ),
        plain(),
        Request::new(
            ask("Hi"),
            &greedy().constraint(Constraint::regex("[0-9]{5}")),
        ),
        Request::new(
            ask("Hi"),
            &greedy().constraint(Constraint::choice(["small", "large"])),
        ),
        Request::new(
            ask("What is 2 plus 3?"),
            &tools.tool_choice(ToolChoice::Required),
        ),
        plain(),
        Request::new(Prompt::Tokens(vec![11, 12, 13]), &sampled(1)),
        Request::new(Prompt::Tokens(vec![11, 12, 13]), &sampled(2)),
        Request::new(
            ask("What is 2 plus 3?"),
            &greedy().logprobs(3).prompt_logprobs(2),
        ),
        Request::new(ask("Hi"), &greedy().max_new_tokens(4)).processor(Only(77)),
        Request::new(ask("Count from 3 to 9."), &greedy().stop(["6"])),
        plain().priority(3),
    ]
}

/// What must be the same, time and what was shared left out.
fn told(mut generation: Generation) -> Generation {
    generation.timings = Default::default();
    generation
}

fn engine(model: &Model) -> Engine {
    // What is shared shows in the usage.
    let engine = model.engine().deterministic(true).prefix_cache(false);
    engine.build().unwrap()
}

#[test]
fn each_request_keeps_its_own_options_among_the_others() {
    let model = load(demo());
    let engine = engine(&model);
    let alone: Vec<_> = requests()
        .into_iter()
        .map(|request| {
            let stream = engine.submit_request(request).unwrap();
            told(stream.finish().unwrap())
        })
        .collect();
    let streams: Vec<_> = requests()
        .into_iter()
        .map(|request| engine.submit_request(request).unwrap())
        .collect();
    let mut calls = Vec::new();
    for (index, (mut stream, alone)) in streams.into_iter().zip(&alone).enumerate() {
        for piece in stream.by_ref() {
            let piece = piece.unwrap();
            assert_eq!(piece.logprobs.is_some(), index == 8);
            calls.extend(piece.tool_calls);
        }
        assert_eq!(&told(stream.finish().unwrap()), alone, "{index}");
    }
    let [
        json,
        plain,
        digits,
        choice,
        called,
        _,
        first,
        second,
        likely,
        only,
        stopped,
        urgent,
    ] = &alone[..]
    else {
        panic!("{} requests", alone.len());
    };
    let value: serde_json::Value = serde_json::from_str(&json.text).unwrap();
    assert!(["small", "large"].contains(&value["size"].as_str().unwrap()));
    assert!(digits.text.len() == 5 && digits.text.bytes().all(|byte| byte.is_ascii_digit()));
    assert!(["small", "large"].contains(&&choice.text[..]));
    assert_eq!(called.finish_reason, FinishReason::ToolCalls);
    assert_eq!(called.tool_calls[0].name, "add");
    assert_eq!(calls, called.tool_calls, "they come with the pieces, too");
    assert_eq!((first.seed, second.seed), (Some(1), Some(2)));
    assert_ne!(first.tokens, second.tokens);
    assert_eq!(likely.logprobs.len(), likely.tokens.len());
    assert_eq!(likely.prompt_logprobs.len() + 1, likely.usage.prompt_tokens);
    assert!(
        likely
            .logprobs
            .iter()
            .all(|logprobs| logprobs.top.len() == 3)
    );
    assert_eq!(only.tokens, [77; 4]);
    assert!(plain.text.contains('6') && !stopped.text.contains('6'));
    assert_eq!(urgent.tokens, plain.tokens);
}

#[test]
fn tokens_of_a_request_are_those_of_the_model_alone() {
    let model = load(demo());
    let engine = engine(&model);
    let options = GenerateOptions::new().temperature(2.0).max_new_tokens(30);
    for options in [
        greedy().constraint(Constraint::regex("[a-z]{1,20}")),
        greedy().logprobs(2),
        greedy().tools([add()]).tool_choice(ToolChoice::Required),
        options.clone().seed(5),
        options.seed(6).min_p(0.05),
    ] {
        let question = || ask("What is 2 plus 3?");
        let alone = model.generate(question(), &options).unwrap();
        let among = engine.generate(question(), &options).unwrap();
        assert_eq!(among.tokens, alone.tokens);
        assert_eq!(among.tool_calls, alone.tool_calls);
    }
}

/// A request that cannot be compiled is refused where it is submitted; one whose constraint and options
/// contradict each other fails while it runs. Neither takes others with it.
#[test]
fn a_bad_constraint_fails_its_own_request() {
    let model = load(demo());
    let engine = engine(&model);
    let good: Vec<_> = (0..4)
        .map(|_| engine.submit(ask("Count from 3 to 9."), &greedy()).unwrap())
        .collect();
    let refused = |constraint| {
        let options = greedy().constraint(constraint);
        engine.submit(ask("Hi"), &options).unwrap_err()
    };
    for constraint in [
        Constraint::json_schema(r#"{"type": "animal"}"#),
        Constraint::regex("(a"),
        Constraint::grammar("start: nothing"),
        Constraint::choice(Vec::<String>::new()),
    ] {
        assert_eq!(refused(constraint).kind(), ErrorKind::InvalidConstraint);
    }
    let options = greedy().constraint(Constraint::regex("[0-9]{5}"));
    let request = Request::new(ask("Hi"), &options).processor(Only(77));
    let failed = engine.submit_request(request).unwrap().finish();
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::InvalidConstraint);
    let alone = model
        .generate(ask("Count from 3 to 9."), &greedy())
        .unwrap();
    for stream in good {
        assert_eq!(stream.finish().unwrap().tokens, alone.tokens);
    }
    assert_eq!(engine.stats().failed, 1);
}
