//! Answers whole and streamed, to chats and to prompts.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use common::{demo, endless, start};
use qwen2_server::Settings;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn question() -> Value {
    json!({"messages": [{"role": "user", "content": "What is 12 plus 30?"}], "temperature": 0})
}

#[test]
fn a_chat_is_answered_whole_and_in_pieces_alike() {
    let server = start(demo(), Settings::default());
    let mut body = question();
    let whole = server.post(CHAT, &body).ok();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "demo-model");
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], "12 + 30 = 42.");
    assert_eq!(choice["finish_reason"], "stop");
    let usage = &whole["usage"];
    let (prompt, completion) = (
        usage["prompt_tokens"].as_u64(),
        usage["completion_tokens"].as_u64(),
    );
    assert!(prompt > Some(10) && completion > Some(5), "{usage}");
    assert_eq!(
        usage["total_tokens"].as_u64(),
        Some(prompt.unwrap() + completion.unwrap())
    );
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);

    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let (chunks, done) = server.post(CHAT, &body).events();
    assert!(done);
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    let (last, rest) = chunks.split_last().unwrap();
    // All of the prompt but the token whose logits are wanted was there already.
    let mut usage = usage.clone();
    usage["prompt_tokens_details"]["cached_tokens"] = (prompt.unwrap() - 1).into();
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &usage));
    assert!(
        rest.iter()
            .all(|chunk| chunk["usage"].is_null() && chunk["id"] == last["id"])
    );
    let deltas = rest
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    assert_eq!(deltas.collect::<String>(), "12 + 30 = 42.");
    assert_eq!(rest.last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[test]
fn a_text_in_parts_and_a_developer_are_read_as_text_and_system() {
    let server = start(demo(), Settings::default());
    let parts =
        json!([{"type": "text", "text": "What is 12 "}, {"type": "text", "text": "plus 30?"}]);
    let mut body = question();
    body["messages"][0]["content"] = parts;
    let answer = server.post(CHAT, &body).ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "12 + 30 = 42.");
    let tokens = |role: &str| {
        let messages = json!([{"role": role, "content": "x"}, {"role": "user", "content": "x"}]);
        let body = json!({"messages": messages, "max_tokens": 1});
        server.post(CHAT, &body).ok()["usage"]["prompt_tokens"].clone()
    };
    assert_eq!(tokens("developer"), tokens("system"));
}

#[test]
fn several_answers_come_side_by_side_each_with_its_seed() {
    let server = start(endless(), Settings::default());
    let body = json!({"prompt": "hello", "n": 3, "seed": 5, "temperature": 1.5, "max_tokens": 12, "ignore_eos": true});
    let texts = |body: &Value| -> Vec<Value> {
        let answer = server.post(COMPLETIONS, body).ok();
        let choices = answer["choices"].as_array().unwrap().clone();
        let indices: Vec<_> = choices
            .iter()
            .map(|choice| choice["index"].clone())
            .collect();
        assert_eq!(
            indices,
            (0..choices.len()).map(Value::from).collect::<Vec<_>>()
        );
        assert_eq!(answer["usage"]["completion_tokens"], 12 * choices.len());
        choices
            .into_iter()
            .map(|choice| choice["text"].clone())
            .collect()
    };
    let three = texts(&body);
    assert_eq!(three, texts(&body), "the same seed, the same answers");
    assert_ne!(three[0], three[1]);
    let mut second = body.clone();
    second["n"] = 1.into();
    second["seed"] = 6.into();
    assert_eq!(texts(&second), three[1..2]);

    let mut streamed = body;
    streamed["stream"] = true.into();
    let (chunks, done) = server.post(COMPLETIONS, &streamed).events();
    assert!(done);
    for (index, text) in three.iter().enumerate() {
        let choices = chunks.iter().map(|chunk| &chunk["choices"][0]);
        let mine = choices.filter(|choice| choice["index"] == index);
        let pieces = mine.map(|choice| choice["text"].as_str().unwrap());
        assert_eq!(pieces.collect::<String>(), text.as_str().unwrap());
    }
}

#[test]
fn answers_are_computed_together_and_a_prompt_that_was_read_is_not_read_again() {
    let server = start(endless(), Settings::default());
    let prompt = "hello ".repeat(200);
    let body =
        json!({"prompt": prompt, "n": 4, "max_tokens": 64, "temperature": 0, "ignore_eos": true});
    let first = server.post(COMPLETIONS, &body).ok();
    assert_eq!(first["usage"]["completion_tokens"], 4 * 64);
    let steps = server.metric("qwen2_steps_total");
    // One for each token of the longest, the chunks of the prompts, and some until all four are in.
    assert!((64.0..192.0).contains(&steps), "{steps}");
    assert!(server.metric("qwen2_cache_bytes") > 0.0);
    assert!(server.metric("qwen2_cache_limit_bytes") > server.metric("qwen2_cache_bytes"));
    let again = server.post(COMPLETIONS, &body).ok();
    let cached = again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert!(cached >= Some(64), "{}", again["usage"]);
    assert_eq!(again["choices"], first["choices"]);

    let mut settings = Settings::default();
    settings.prefix_cache = false;
    settings.deterministic = true;
    let server = start(endless(), settings);
    for _ in 0..2 {
        let answer = server.post(COMPLETIONS, &body).ok();
        assert_eq!(answer["choices"], first["choices"]);
        let details = &answer["usage"]["prompt_tokens_details"];
        assert_eq!(details["cached_tokens"], 0);
    }
}

#[test]
fn prompts_are_texts_or_tokens_one_or_many_and_may_be_echoed() {
    let model = demo();
    let tokens = model.tokenizer().encode("12 + 30 =").unwrap();
    let server = start(model, Settings::default());
    let ask = |prompt: Value, echo: bool| -> Vec<Value> {
        let body = json!({"prompt": prompt, "temperature": 0, "max_tokens": 3, "echo": echo});
        let answer = server.post(COMPLETIONS, &body).ok();
        assert_eq!(answer["object"], "text_completion");
        let choices = answer["choices"].as_array().unwrap();
        choices
            .iter()
            .map(|choice| choice["text"].clone())
            .collect()
    };
    let one = ask("12 + 30 =".into(), false);
    assert_eq!(ask(json!(tokens), false), one);
    assert_eq!(
        ask(json!([tokens, tokens]), false),
        [&one[..], &one].concat()
    );
    let echoed = format!("12 + 30 ={}", one[0].as_str().unwrap());
    assert_eq!(
        ask(json!(["12 + 30 ="]), true),
        [Value::from(echoed.as_str())]
    );
    assert_eq!(ask(json!([tokens]), true), [Value::from(echoed)]);
}

#[test]
fn stop_strings_and_limits_end_an_answer() {
    let server = start(demo(), Settings::default());
    let mut body = question();
    body["stop"] = "=".into();
    let choice = server.post(CHAT, &body).ok()["choices"][0].clone();
    assert_eq!(choice["message"]["content"], "12 + 30 ");
    assert_eq!(choice["finish_reason"], "stop");
    let mut body = question();
    body["max_tokens"] = 3.into();
    let answer = server.post(CHAT, &body).ok();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    // A completion is 16 tokens long where the request does not say, as OpenAI's.
    let server = start(endless(), Settings::default());
    let body = json!({"prompt": "hello", "ignore_eos": true});
    let answer = server.post(COMPLETIONS, &body).ok();
    assert_eq!(answer["usage"]["completion_tokens"], 16);
}

#[test]
fn the_operators_limit_of_tokens_holds_for_all() {
    let mut settings = Settings::default();
    settings.max_new_tokens = Some(4);
    settings.name = Some("org/small".to_owned());
    let server = start(endless(), settings);
    let refused = server.post(COMPLETIONS, &json!({"prompt": "hello", "max_tokens": 5}));
    assert_eq!(
        (refused.status, refused.error()["param"].as_str()),
        (400, Some("max_tokens"))
    );
    let body = json!({"model": "org/small", "prompt": "hello", "ignore_eos": true});
    assert_eq!(
        server.post(COMPLETIONS, &body).ok()["usage"]["completion_tokens"],
        4
    );

    let models = server.get("/v1/models").ok();
    assert_eq!(models["data"][0]["id"], "org/small");
    assert_eq!(models["data"][0]["max_model_len"], 1_000_000);
    assert_eq!(server.get("/v1/models/org/small").ok(), models["data"][0]);
}

#[test]
fn what_happened_is_counted_for_prometheus() {
    let server = start(demo(), Settings::default());
    let usage = server.post(CHAT, &question()).ok()["usage"].clone();
    server.post(CHAT, &json!({}));
    let text = server.get("/metrics").body;
    for line in [
        r#"qwen2_requests_total{path="/v1/chat/completions",status="200"} 1"#,
        r#"qwen2_requests_total{path="/v1/chat/completions",status="400"} 1"#,
        "# TYPE qwen2_first_token_seconds histogram",
        "qwen2_first_token_seconds_count 1",
        r#"qwen2_answer_seconds_bucket{le="+Inf"} 1"#,
        "qwen2_answers_waiting 0",
        &format!("qwen2_prompt_tokens_total {}", usage["prompt_tokens"]),
        &format!(
            "qwen2_generated_tokens_total {}",
            usage["completion_tokens"]
        ),
    ] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
}
