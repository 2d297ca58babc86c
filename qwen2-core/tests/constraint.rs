//! What constrained generation promises: text that keeps to the form, nothing else changed.
#![cfg(feature = "constraint")]
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::{demo, load};
use proptest::prelude::*;
use qwen2_core::{
    CancelToken, Constraint, ErrorKind, FinishReason, GenerateOptions, Generation, LogitsProcessor,
    Message, Model, RequestStream, StopMatch,
};
use serde_json::{Value, json};

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| load(demo()))
}

fn question() -> [Message; 1] {
    [Message::user("What is 2 plus 3?")]
}

fn greedy(constraint: Constraint) -> GenerateOptions {
    GenerateOptions::greedy()
        .max_new_tokens(300)
        .constraint(constraint)
}

fn answer(options: &GenerateOptions) -> Generation {
    model().chat(&question(), options).unwrap()
}

fn refuse(constraint: Constraint) -> String {
    let error = model().chat(&question(), &greedy(constraint)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConstraint, "{error}");
    assert_eq!(error.key(), Some("constraint"));
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn json_keeps_to_its_schema() {
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "size": {"enum": ["small", "large"]},
            "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "size", "parts"],
        "additionalProperties": false,
        "$defs": {"part": {
            "type": "object",
            "properties": {"count": {"type": "integer", "minimum": 1, "maximum": 20}},
            "required": ["count"],
            "additionalProperties": false,
        }},
    });
    let constraint = Constraint::json_schema(schema.to_string());
    for seed in 0..6 {
        let generation = answer(&greedy(constraint.clone()).temperature(1.5).seed(seed));
        assert_eq!(
            generation.finish_reason,
            FinishReason::Stop,
            "{generation:?}"
        );
        let value: Value = serde_json::from_str(&generation.text).unwrap();
        assert!(jsonschema::is_valid(&schema, &value), "{value}");
    }
}

#[test]
fn a_text_keeps_to_a_regular_expression_a_list_and_a_grammar() {
    let answer = |constraint| answer(&greedy(constraint)).text;
    let day = regex::Regex::new(r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$").unwrap();
    let text = answer(Constraint::regex("[0-9]{4}-[0-9]{2}-[0-9]{2}"));
    assert!(day.is_match(&text), "{text}");
    let choices = ["a \"quoted\" one", "日本\n", "a", "ab\\"];
    for choice in choices {
        assert_eq!(answer(Constraint::choice([choice])), choice);
    }
    assert!(choices.contains(&&*answer(Constraint::choice(choices))));
    let lark = "start: \"(\" start \")\" | DIGIT\nDIGIT: /[0-9]/";
    let text = answer(Constraint::grammar(format!("{lark}\n")));
    let inner = text.trim_start_matches('(');
    assert_eq!(text, "(".repeat(text.len() - inner.len()) + inner);
    assert_eq!(inner.matches(')').count() + 1, inner.len(), "{text}");
}

#[test]
fn a_constraint_that_allows_everything_changes_nothing() {
    let free = GenerateOptions::greedy().max_new_tokens(60);
    let all = greedy(Constraint::regex("(?s:.*)")).max_new_tokens(60);
    for text in ["What is 2 plus 3?", "数到五", "Repeat: green apples"] {
        let messages = [Message::user(text)];
        let free = model().chat(&messages, &free).unwrap();
        let all = model().chat(&messages, &all).unwrap();
        assert_eq!(all.tokens, free.tokens);
        assert_eq!(all.text, free.text);
        assert_eq!(all.stop_match, free.stop_match);
    }
}

/// Counts the runs of the model.
struct Count(std::sync::Arc<std::sync::atomic::AtomicUsize>);

impl LogitsProcessor for Count {
    fn process(&mut self, _: &[u32], _: &mut [f32]) -> qwen2_core::Result<()> {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn forced_text_takes_no_run_of_the_model_and_the_rest_follows_as_if_it_had() {
    let fixed = "The answer is the number ";
    let constraint = Constraint::regex(format!("{fixed}[0-9]{{1,2}}\\."));
    let runs = std::sync::Arc::default();
    let stream = model().stream_with(
        &question()[..],
        &greedy(constraint),
        Count(std::sync::Arc::clone(&runs)),
    );
    let mut pieces = Vec::new();
    let mut stream = stream.unwrap();
    for piece in &mut stream {
        pieces.push(piece.unwrap());
    }
    let generation = stream.finish().unwrap();
    let runs = runs.load(std::sync::atomic::Ordering::Relaxed);
    assert!(generation.text.starts_with(fixed), "{}", generation.text);
    assert_eq!(generation.stop_match, Some(StopMatch::Constraint));
    assert_eq!(generation.usage.completion_tokens, generation.tokens.len());
    assert!(
        runs >= 1 && runs + 5 < generation.tokens.len(),
        "{runs} runs: {generation:?}"
    );
    // Every token has its piece, and the text is that of the tokens.
    let tokens: Vec<u32> = pieces.iter().map(|piece| piece.token).collect();
    assert_eq!(tokens, generation.tokens);
    assert_eq!(
        pieces.iter().map(|piece| &*piece.text).collect::<String>(),
        generation.text
    );
    assert_eq!(
        model().tokenizer().decode(&tokens, false).unwrap(),
        generation.text
    );
    // The chosen digits are those that the model finds likeliest behind the forced text: reference is
    // its logits over the whole sequence, computed at once.
    let prompt = model().tokenizer().encode_chat(&question(), true).unwrap();
    let whole = [&prompt[..], &tokens].concat();
    let logits = model().logits(&whole).unwrap();
    let first = tokens.iter().position(|&token| {
        let text = model().tokenizer().decode(&[token], false).unwrap();
        text.trim().starts_with(|c: char| c.is_ascii_digit())
    });
    let at = prompt.len() + first.unwrap();
    let row = &logits.values[(at - 1) * logits.vocab_size..at * logits.vocab_size];
    let digits = |id: &u32| {
        let text = model().tokenizer().decode(&[*id], false).unwrap();
        !text.is_empty() && text.len() <= 2 && text.bytes().all(|byte| byte.is_ascii_digit())
    };
    let best = (0..model().tokenizer().vocab_size() as u32)
        .filter(digits)
        .max_by(|&a, &b| row[a as usize].total_cmp(&row[b as usize]));
    assert_eq!(Some(whole[at]), best);
}

#[test]
fn the_end_comes_where_the_form_allows_it_and_not_before() {
    // The model would end after a short answer; the form wants more.
    let generation = answer(&greedy(Constraint::regex("(?s:.{80,120})")));
    assert!(generation.text.chars().count() >= 80, "{generation:?}");
    // Where everything may follow, the end is a token of the model's choice.
    let generation = answer(&greedy(Constraint::regex("(?s:.*)")));
    assert!(matches!(generation.stop_match, Some(StopMatch::Eos(_))));
    // With no end token to take, the form alone ends the text.
    let mut options = greedy(Constraint::regex("[a-z]{1,40}"));
    options.ignore_eos = true;
    let generation = answer(&options);
    assert_eq!(generation.stop_match, Some(StopMatch::Constraint));
    assert_eq!(generation.text.len(), 40);
}

#[test]
fn ids_behind_the_vocabulary_are_never_taken() {
    let tokenizer = model().tokenizer();
    let mut options = greedy(Constraint::regex("(?s:.*)"))
        .temperature(100.0)
        .max_new_tokens(200);
    options.ignore_eos = true;
    assert!(tokenizer.vocab_size() < model().config().vocab_size);
    let generation = answer(&options.seed(5));
    for &token in &generation.tokens {
        assert!((token as usize) < tokenizer.vocab_size() && !tokenizer.is_special(token));
    }
}

#[test]
fn limits_and_stops_cut_a_constrained_text_short() {
    let form = || Constraint::choice(["one two three four five"]);
    let whole = answer(&greedy(form())).tokens;
    for n in 1..=whole.len() {
        let generation = answer(&greedy(form()).max_new_tokens(n));
        assert_eq!(generation.tokens, whole[..n]);
        let reason = match n == whole.len() {
            true => FinishReason::Stop,
            false => FinishReason::Length,
        };
        assert_eq!(generation.finish_reason, reason);
    }
    let generation = answer(&greedy(form()).stop(["three"]));
    assert_eq!(generation.text, "one two ");
    assert_eq!(
        generation.stop_match,
        Some(StopMatch::Text("three".to_owned()))
    );
    let cancel = CancelToken::new();
    cancel.cancel();
    let generation = answer(&greedy(form()).cancel(cancel));
    assert_eq!(generation.finish_reason, FinishReason::Cancelled);
}

#[test]
fn a_session_goes_on_behind_a_constrained_answer() {
    let mut session = model().session();
    session.append(&question()[..]).unwrap();
    let first = session
        .generate(&greedy(Constraint::choice(["It is 5."])))
        .unwrap();
    assert_eq!(first.text, "It is 5.");
    session
        .append(vec![Message::user("What is 7 plus 1?")])
        .unwrap();
    let second = session.generate(&GenerateOptions::greedy()).unwrap();
    // The reference is a conversation that was never constrained.
    let messages = [
        question()[0].clone(),
        Message::assistant("It is 5."),
        Message::user("What is 7 plus 1?"),
    ];
    assert_eq!(
        second.text,
        model()
            .chat(&messages, &GenerateOptions::greedy())
            .unwrap()
            .text
    );
}

#[test]
fn in_an_engine_constrained_requests_get_what_each_gets_alone() {
    let engine = model().engine().max_sequences(4).build().unwrap();
    let forms = [
        Some(Constraint::choice(["It is the number five."])),
        None,
        Some(Constraint::regex("The answer is [0-9]{1,3}, (yes|no)\\.")),
        Some(Constraint::json_schema(
            r#"{"enum": [{"a": 1}, {"b": [2]}]}"#,
        )),
        None,
    ];
    let options: Vec<GenerateOptions> = forms
        .into_iter()
        .map(|form| {
            let mut options = GenerateOptions::greedy().max_new_tokens(60);
            options.constraint = form;
            options
        })
        .collect();
    let streams: Vec<_> = options
        .iter()
        .map(|options| engine.submit(&question()[..], options).unwrap())
        .collect();
    let bad = GenerateOptions::greedy().constraint(Constraint::regex("("));
    let error = engine.submit(&question()[..], &bad).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidConstraint);
    for (stream, options) in streams.into_iter().zip(&options) {
        let together = stream.finish().unwrap();
        let alone = answer(options);
        assert_eq!((together.tokens, together.text), (alone.tokens, alone.text));
        assert_eq!(together.stop_match, alone.stop_match);
    }
}

#[test]
fn what_cannot_be_kept_to_is_refused_and_harms_no_one_else() {
    assert!(refuse(Constraint::json_schema("{")).contains("line 1"));
    assert!(refuse(Constraint::json_schema("[]")).contains("JSON schema"));
    refuse(Constraint::json_schema(r#"{"type": "animal"}"#));
    refuse(Constraint::json_schema(
        r#"{"if": {"type": "object"}, "then": {}}"#,
    ));
    refuse(Constraint::json_schema(r##"{"$ref": "#/$defs/nowhere"}"##));
    refuse(Constraint::json_schema(
        r#"{"$ref": "https://example.com/schema"}"#,
    ));
    refuse(Constraint::json_schema(
        r#"{"type": "integer", "minimum": 3, "maximum": 2}"#,
    ));
    refuse(Constraint::regex("(a"));
    refuse(Constraint::regex("(?=a)b"));
    assert!(refuse(Constraint::regex("a\\")).contains("half an escape"));
    refuse(Constraint::grammar("start: nowhere"));
    refuse(Constraint::grammar(""));
    assert!(refuse(Constraint::choice([""; 0])).contains("empty"));
    assert!(refuse(Constraint::choice(["a", ""])).contains("text 1"));
    answer(&greedy(Constraint::choice(["still here"])));
}

#[test]
fn hostile_sources_are_refused_or_work_within_the_bounds() {
    let long = "x".repeat(300 << 10);
    assert!(refuse(Constraint::regex(long)).contains("262144"));
    let nested = 100_000;
    refuse(Constraint::regex("(".repeat(nested) + &")".repeat(nested)));
    refuse(Constraint::grammar(format!(
        "start: {}\"a\"{}",
        "(".repeat(nested),
        ")".repeat(nested)
    )));
    refuse(Constraint::json_schema(r#"{"items":"#.repeat(nested / 4)));
    let sources = [
        Constraint::regex("((a{1,1000}){1,1000}){1,1000}b"),
        Constraint::regex("(a|aa|aaa|aaaa)*b{500}(?s:.*)c{500}"),
        Constraint::grammar("start: a{1000000}\na: b{1000000}\nb: \"x\""),
        Constraint::json_schema(r#"{"type": "array", "minItems": 1000000000, "items": {}}"#),
        Constraint::json_schema(r#"{"type": "string", "minLength": 1000000000}"#),
        Constraint::json_schema(
            json!({"allOf": (0..12).map(|i| json!({"anyOf": [{"required": [format!("a{i}")]}, {"required": [format!("b{i}")]}]})).collect::<Vec<_>>()}).to_string(),
        ),
    ];
    for source in sources {
        let outcome = model().chat(&question(), &greedy(source).max_new_tokens(5));
        if let Err(error) = outcome {
            assert_eq!(error.kind(), ErrorKind::InvalidConstraint, "{error}");
        }
    }
}

/// Sources that would take the library very long, or for ever: each is refused or works soon, and the request
/// that runs beside them in an engine does not notice.
#[test]
fn hostile_sources_end_soon_and_fail_only_their_own_request() {
    let patterns = |n: usize| -> Vec<Value> {
        let pattern = |i| json!({"pattern": format!("[a-z]{{{i},200}}x[a-z]{{{i}}}")});
        (0..n).map(pattern).collect()
    };
    let property = |pattern| json!({"properties": {"a": pattern}});
    let joined = |n: usize| {
        let each = (0..n).map(|i| format!("/[a-z]{{{i},200}}x[a-z]{{{i}}}/"));
        each.collect::<Vec<_>>().join(" & ")
    };
    let words: Vec<String> = (0..20_000).map(|i| format!("{i:08}")).collect();
    let doubling = (0..60).map(|i| format!("r{i}: r{} r{}\n", i + 1, i + 1));
    let doubling = format!("start: r0\n{}r60: \"x\"\n", doubling.collect::<String>());
    let refused = [
        Constraint::json_schema(json!({"type": "string", "allOf": patterns(40)}).to_string()),
        Constraint::json_schema(
            json!({"allOf": patterns(40).into_iter().map(property).collect::<Vec<_>>()})
                .to_string(),
        ),
        Constraint::json_schema(r##"{"$ref": "#"}"##),
        Constraint::json_schema(
            r##"{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}"##,
        ),
        Constraint::json_schema(r##"{"allOf": [{"$ref": "#"}, {"$ref": "#"}]}"##),
        Constraint::grammar(format!("start: A\nA: {}", joined(40))),
        Constraint::regex("(".repeat(5000) + "a" + &"*)".repeat(5000)),
    ];
    let bounded = [
        Constraint::regex("((((a{0,200}){0,200}){0,200}){0,200}){0,200}"),
        Constraint::regex("(((((((a|b)*c)*d)*e)*f)*g)*h)*[0-9]{1,1000}"),
        Constraint::regex("(?s:.*)a(?s:.{1000})"),
        Constraint::regex(words.join("|")),
        Constraint::json_schema(json!({"enum": words}).to_string()),
        Constraint::json_schema(
            r##"{"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]}"##,
        ),
        Constraint::grammar("start: s\ns: s s | s s s | \"a\" |"),
        Constraint::grammar(doubling),
    ];
    let engine = model().engine().build().unwrap();
    let plain = GenerateOptions::greedy().max_new_tokens(40);
    let good = engine.submit(&question()[..], &plain).unwrap();
    let start = Instant::now();
    for source in refused {
        let refused = engine.submit(&question()[..], &greedy(source));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidConstraint);
    }
    for source in bounded {
        let options = greedy(source).max_new_tokens(8);
        let done = engine.submit(&question()[..], &options);
        if let Err(error) = done.and_then(RequestStream::finish) {
            assert_eq!(error.kind(), ErrorKind::InvalidConstraint, "{error}");
        }
    }
    // A second or two; one pattern too many would take minutes.
    assert!(start.elapsed() < Duration::from_secs(60));
    let alone = model().chat(&question(), &plain).unwrap();
    assert_eq!(good.finish().unwrap().tokens, alone.tokens);
}

#[test]
fn a_processor_that_forbids_what_the_form_wants_is_an_error() {
    struct Nothing;
    impl LogitsProcessor for Nothing {
        fn process(&mut self, _: &[u32], logits: &mut [f32]) -> qwen2_core::Result<()> {
            logits.fill(f32::NEG_INFINITY);
            Ok(())
        }
    }
    let options = greedy(Constraint::regex("[ab]{3}"));
    let stream = model().stream_with(&question()[..], &options, Nothing);
    let error = stream.unwrap().finish().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConstraint, "{error}");
}

#[test]
fn a_constraint_survives_serde() {
    let options = greedy(Constraint::choice(["a", "b"]));
    let text = serde_json::to_string(&options).unwrap();
    assert!(text.contains(r#"{"choice":["a","b"]}"#), "{text}");
    assert_eq!(
        serde_json::from_str::<GenerateOptions>(&text).unwrap(),
        options
    );
}

#[cfg(feature = "schemars")]
#[test]
fn the_schema_of_a_rust_type_gives_values_of_it() {
    #[derive(serde::Deserialize, schemars::JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Sum {
        left: u8,
        kind: Kind,
        note: Option<bool>,
    }
    #[derive(serde::Deserialize, schemars::JsonSchema)]
    enum Kind {
        Plus,
        Minus,
    }
    for seed in 0..4 {
        let options = greedy(Constraint::json_schema_of::<Sum>())
            .temperature(1.0)
            .seed(seed);
        let text = answer(&options).text;
        serde_json::from_str::<Sum>(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
    }
}

/// Small schemas of the supported keywords.
fn schema() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!({"type": "boolean"})),
        Just(json!({"type": "null"})),
        (-50..50_i32, 0..60_i32).prop_map(
            |(low, span)| json!({"type": "integer", "minimum": low, "maximum": low + span})
        ),
        (0..3_usize, 0..6_usize).prop_map(
            |(low, span)| json!({"type": "string", "minLength": low, "maxLength": low + span})
        ),
        prop::collection::vec("[a-z\"\\\\é ]{0,6}", 1..4)
            .prop_map(|values| json!({"enum": values})),
        Just(json!({"type": "string", "pattern": "^[a-f]{2,4}$"})),
        (-9..9_i32).prop_map(|value| json!({"const": value})),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            (inner.clone(), 0..2_usize, 0..3_usize).prop_map(|(items, low, span)| {
                json!({"type": "array", "items": items, "minItems": low, "maxItems": low + span})
            }),
            prop::collection::btree_map("[a-z]{1,4}", (inner.clone(), any::<bool>()), 0..3).prop_map(|fields| {
                let required: Vec<_> = fields.iter().filter(|(_, (_, must))| *must).map(|(name, _)| name).collect();
                let properties: serde_json::Map<_, _> =
                    fields.iter().map(|(name, (schema, _))| (name.clone(), schema.clone())).collect();
                json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
            }),
            prop::collection::vec(inner, 1..3).prop_map(|options| json!({"anyOf": options})),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// The oracle is the jsonschema crate. The schemas bound every text, so each one ends.
    #[test]
    fn json_of_any_small_schema_is_valid(schema in schema(), seed in any::<u64>()) {
        let constraint = Constraint::json_schema(schema.to_string());
        let options = greedy(constraint).max_new_tokens(600).temperature(2.0).seed(seed);
        let generation = answer(&options);
        prop_assert_eq!(generation.finish_reason, FinishReason::Stop, "{}", generation.text);
        let value: Value = serde_json::from_str(&generation.text).unwrap();
        prop_assert!(jsonschema::is_valid(&schema, &value), "{} for {}", value, schema);
    }

    /// Built from parts that the regex crate reads alike; it is the oracle.
    #[test]
    fn text_of_any_small_regular_expression_matches(
        parts in prop::collection::vec(
            (prop::sample::select(vec!["[a-c]", "x", "(?:ab|b)", "\\d", "\\.", "[^a-z\\s]", "é", "/", "\\\\", "\n"]),
             prop::sample::select(vec!["", "?", "{2}", "{1,3}"])),
            1..6,
        ),
        seed in any::<u64>(),
    ) {
        let regex: String = parts.iter().map(|(part, times)| format!("{part}{times}")).collect();
        let options = greedy(Constraint::regex(regex.clone())).temperature(2.0).seed(seed);
        let generation = answer(&options);
        prop_assert_eq!(generation.finish_reason, FinishReason::Stop);
        let oracle = regex::Regex::new(&format!("^(?:{regex})$")).unwrap();
        prop_assert!(oracle.is_match(&generation.text), "{:?} for {}", generation.text, regex);
    }
}
