//! Whatever a client sends, it gets an error in OpenAI's shape, and the next one its answer.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::io::Write;
use std::time::Duration;

use common::{demo, post_request, read_reply, start};
use qwen2_server::Settings;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const EMBEDDINGS: &str = "/v1/embeddings";

/// A legal request with one field changed.
fn with(path: &str, key: &str, value: Value) -> Value {
    let mut body = match path {
        CHAT => json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
        EMBEDDINGS => json!({"input": "hi"}),
        _ => json!({"prompt": "hi", "max_tokens": 2}),
    };
    body[key] = value;
    body
}

#[test]
fn a_field_that_cannot_be_is_named() {
    let server = start(demo(), Settings::default());
    let cases = [
        (CHAT, "messages", json!("hi"), "messages"),
        (CHAT, "messages", json!([]), "messages"),
        (CHAT, "messages", json!(null), "messages"),
        (
            CHAT,
            "messages",
            json!([{"role": "user"}]),
            "messages[0].content",
        ),
        (
            CHAT,
            "messages",
            json!([{"role": "user", "content": 7}]),
            "messages[0].content",
        ),
        (
            CHAT,
            "messages",
            json!([{"role": "me", "content": "x"}]),
            "messages[0].role",
        ),
        (
            CHAT,
            "messages",
            json!([{"role": "user", "content": "x", "colour": 1}]),
            "messages[0].colour",
        ),
        (
            CHAT,
            "messages",
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "messages[0].content[0]",
        ),
        (CHAT, "max_completion_tokens", json!(3), "max_tokens"),
        (CHAT, "max_tokens", json!(0), "max_tokens"),
        (CHAT, "colour", json!("red"), "colour"),
        (CHAT, "n", json!(1_000_000_000), "n"),
        (CHAT, "n", json!(0), "n"),
        (CHAT, "n", json!(-1), "n"),
        (CHAT, "n", json!(1.5), "n"),
        (CHAT, "temperature", json!(-0.1), "temperature"),
        (CHAT, "temperature", json!("hot"), "temperature"),
        (CHAT, "temperature", json!(1e300), "temperature"),
        (CHAT, "top_p", json!(0), "top_p"),
        (CHAT, "top_p", json!(1.1), "top_p"),
        (CHAT, "top_k", json!(-1), "top_k"),
        (CHAT, "top_k", json!(0), "top_k"),
        (CHAT, "min_p", json!(2), "min_p"),
        (CHAT, "repetition_penalty", json!(0), "repetition_penalty"),
        (CHAT, "stop", json!([""]), "stop[0]"),
        (CHAT, "stop", json!(vec!["x"; 65]), "stop"),
        (CHAT, "stop", json!({"a": 1}), "stop"),
        (CHAT, "seed", json!(1.5), "seed"),
        (CHAT, "stream", json!("yes"), "stream"),
        (
            CHAT,
            "stream_options",
            json!({"include_usage": true}),
            "stream_options",
        ),
        (CHAT, "audio", json!({"voice": "x"}), "audio"),
        (CHAT, "store", json!(true), "store"),
        (COMPLETIONS, "prompt", json!(null), "prompt"),
        (COMPLETIONS, "prompt", json!(""), "prompt"),
        (COMPLETIONS, "prompt", json!([]), "prompt"),
        (COMPLETIONS, "prompt", json!(7), "prompt"),
        (COMPLETIONS, "prompt", json!([1, "x"]), "prompt[1]"),
        (COMPLETIONS, "prompt", json!([-5]), "prompt[0]"),
        (COMPLETIONS, "prompt", json!([4_000_000_000_u32]), "prompt"),
        (COMPLETIONS, "prompt", json!(vec!["x"; 129]), "prompt"),
        (COMPLETIONS, "max_tokens", json!(-1), "max_tokens"),
        (
            COMPLETIONS,
            "max_tokens",
            json!(1_000_000_000),
            "max_tokens",
        ),
        (COMPLETIONS, "n", json!(1_000_000_000), "n"),
        (COMPLETIONS, "suffix", json!("x"), "suffix"),
        (COMPLETIONS, "best_of", json!(3), "best_of"),
    ];
    for (path, key, value, param) in cases {
        let body = with(path, key, value);
        let reply = server.post(path, &body);
        assert_eq!(reply.status, 400, "{body}: {}", reply.body);
        let error = reply.error();
        assert_eq!(error["param"], param, "{body}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    server.is_well();
}

#[test]
fn a_form_or_a_tool_that_cannot_be_is_named() {
    let server = start(demo(), Settings::default());
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
    let cases = [
        (CHAT, "response_format", json!("json"), "response_format"),
        (
            CHAT,
            "response_format",
            json!({"type": "xml"}),
            "response_format",
        ),
        (
            CHAT,
            "response_format",
            json!({"type": "json_schema"}),
            "response_format",
        ),
        (
            CHAT,
            "response_format",
            json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}}}),
            "response_format",
        ),
        (CHAT, "guided_regex", json!("(a"), "guided_regex"),
        (CHAT, "guided_choice", json!([]), "guided_choice"),
        (CHAT, "guided_choice", json!("x"), "guided_choice"),
        (CHAT, "guided_grammar", json!("start: ("), "guided_grammar"),
        (CHAT, "tools", json!({"a": 1}), "tools"),
        (CHAT, "tools", json!([{"type": "retrieval"}]), "tools[0]"),
        (CHAT, "tools", json!([{"type": "function"}]), "tools[0]"),
        (CHAT, "tools", json!([tool("")]), "tools[0]"),
        (CHAT, "tool_choice", json!("required"), "tool_choice"),
        (CHAT, "logprobs", json!(3), "logprobs"),
        (CHAT, "top_logprobs", json!(1_000), "top_logprobs"),
        (CHAT, "top_logprobs", json!(-1), "top_logprobs"),
        (CHAT, "logit_bias", json!([1]), "logit_bias"),
        (CHAT, "logit_bias", json!({"x": 1}), "logit_bias"),
        (CHAT, "logit_bias", json!({"99999999": 1}), "logit_bias"),
        (CHAT, "logit_bias", json!({"1": 1e300}), "logit_bias"),
        (CHAT, "presence_penalty", json!(3), "presence_penalty"),
        (CHAT, "frequency_penalty", json!("x"), "frequency_penalty"),
        (COMPLETIONS, "logprobs", json!(true), "logprobs"),
        (COMPLETIONS, "logprobs", json!(-1), "logprobs"),
        (COMPLETIONS, "echo", json!("yes"), "echo"),
        (EMBEDDINGS, "input", json!(null), "input"),
        (EMBEDDINGS, "input", json!([]), "input"),
        (EMBEDDINGS, "input", json!(""), "input"),
        (EMBEDDINGS, "input", json!(7), "input"),
        (EMBEDDINGS, "input", json!([[1, -1]]), "input[0][1]"),
        (EMBEDDINGS, "input", json!([4_000_000_000_u32]), "input"),
        (EMBEDDINGS, "input", json!(vec!["x"; 2049]), "input"),
        (EMBEDDINGS, "dimensions", json!(7), "dimensions"),
        (
            EMBEDDINGS,
            "encoding_format",
            json!("hex"),
            "encoding_format",
        ),
        (EMBEDDINGS, "colour", json!("red"), "colour"),
    ];
    for (path, key, value, param) in cases {
        let body = with(path, key, value);
        let reply = server.post(path, &body);
        assert_eq!(reply.status, 400, "{body}: {}", reply.body);
        let found = reply.error()["param"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        assert!(found.starts_with(param), "{body}: {}", reply.body);
    }
    server.is_well();
}

#[test]
fn a_prompt_beyond_the_context_says_so_by_code() {
    let server = start(demo(), Settings::default());
    let text = "one two three ".repeat(2_000);
    for (path, key, value) in [
        (CHAT, "messages", json!([{"role": "user", "content": text}])),
        (COMPLETIONS, "prompt", json!(text)),
    ] {
        let reply = server.post(path, &with(path, key, value));
        assert_eq!(reply.status, 400);
        assert_eq!(reply.error()["code"], "context_length_exceeded");
    }
    server.is_well();
}

#[test]
fn what_is_no_json_is_refused() {
    let server = start(demo(), Settings::default());
    let deep = [b"{\"a\":".repeat(50_000), b"}".repeat(50_000)].concat();
    let bodies: [&[u8]; 7] = [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"{\"prompt\": \"\xff\xfe\"}",
        b"\0\0",
        &deep,
    ];
    for body in bodies {
        let reply = server.post_bytes(COMPLETIONS, body);
        assert_eq!(reply.status, 400);
        assert_eq!(reply.error()["code"], "invalid_json");
    }
    server.is_well();
}

#[test]
fn what_is_no_http_is_refused_in_the_same_shape() {
    let server = start(demo(), Settings::default());
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(70_000));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(200));
    let wide = format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "b".repeat(600_000));
    for (bytes, status) in [
        (b"hello\r\n\r\n".as_slice(), 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400), // the start of a TLS handshake
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (
            b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
            400,
        ),
        (long.as_bytes(), 414),
        (many.as_bytes(), 431),
        (wide.as_bytes(), 431),
    ] {
        let mut stream = server.connect();
        // The server may have refused and closed before all of it is sent.
        let _ = stream.write_all(bytes);
        let reply = read_reply(stream);
        assert_eq!(reply.status, status, "{}", reply.body);
        assert_eq!(reply.error()["type"], "invalid_request_error");
    }
    server.is_well();
}

#[test]
fn wrong_paths_methods_and_types_are_told_apart() {
    let server = start(demo(), Settings::default());
    assert_eq!(server.get("/v2").error()["code"], "unknown_url");
    assert_eq!(server.get("/v2").status, 404);
    assert_eq!(server.get(CHAT).status, 405);
    assert_eq!(server.get(CHAT).error()["code"], "method_not_allowed");
    let form = "POST /v1/completions HTTP/1.1\r\nconnection: close\r\ncontent-length: 2\r\n\
                content-type: text/plain\r\n\r\n{}";
    let reply = server.raw(form.as_bytes());
    assert_eq!(reply.status, 415);
    reply.error();
    let reply = server.post(CHAT, &with(CHAT, "model", json!("gpt-4")));
    assert_eq!(
        (reply.status, reply.error()["code"].as_str()),
        (404, Some("model_not_found"))
    );
    assert_eq!(server.get("/v1/models/gpt-4").status, 404);
}

#[test]
fn a_huge_body_is_refused_whether_announced_or_not() {
    let mut settings = Settings::default();
    settings.max_body = 1000;
    let server = start(demo(), settings);
    let large = json!({"prompt": "x".repeat(3_000_000)}).to_string();
    let reply = server.post_bytes(COMPLETIONS, large.as_bytes());
    assert_eq!(
        (reply.status, reply.error()["code"].as_str()),
        (413, Some("body_too_large"))
    );

    let chunk = format!("{:x}\r\n{large}\r\n0\r\n\r\n", large.len());
    let head = "POST /v1/completions HTTP/1.1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\
                content-type: application/json\r\n\r\n";
    let reply = server.raw(format!("{head}{chunk}").as_bytes());
    assert_eq!(reply.status, 413);
    reply.error();

    let asks = format!(
        "POST /v1/completions HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\
         content-type: application/json\r\n\r\n",
        1_u64 << 40
    );
    let reply = server.raw(asks.as_bytes());
    assert_eq!(reply.status, 413, "and nothing of it is asked for");
    server.is_well();
}

#[test]
fn a_client_that_stops_in_the_middle_of_its_request_is_given_up() {
    let mut settings = Settings::default();
    settings.patience = Duration::from_millis(300);
    let server = start(demo(), settings);
    let request = post_request(COMPLETIONS, b"{\"prompt\": \"hi\"}");
    let reply = server.raw(&request[..request.len() - 1]);
    assert_eq!(
        (reply.status, reply.error()["code"].as_str()),
        (408, Some("timeout"))
    );

    let mut stream = server.connect();
    stream.write_all(b"GET / HTTP/1.1\r\nhos").unwrap();
    let mut rest = Vec::new();
    // The end of the connection, not the reading timeout of a minute.
    std::io::Read::read_to_end(&mut stream, &mut rest).unwrap();
    server.is_well();
}

#[test]
fn with_a_key_only_the_page_and_the_health_are_open() {
    let mut settings = Settings::default();
    settings.api_key = Some("secret".to_owned());
    let server = start(demo(), settings);
    for path in ["/v1/models", "/metrics"] {
        for key in [
            "",
            "authorization: secret\r\n",
            "authorization: Bearer secre\r\n",
            "authorization: Bearer \u{e9}\r\n",
        ] {
            let reply = server
                .raw(format!("GET {path} HTTP/1.1\r\n{key}connection: close\r\n\r\n").as_bytes());
            assert_eq!(
                (reply.status, reply.error()["code"].as_str()),
                (401, Some("invalid_api_key"))
            );
        }
        let key = "authorization: Bearer secret\r\n";
        let reply =
            server.raw(format!("GET {path} HTTP/1.1\r\n{key}connection: close\r\n\r\n").as_bytes());
        assert_eq!(reply.status, 200);
    }
    assert_eq!(server.post(CHAT, &with(CHAT, "n", json!(1))).status, 401);
    assert_eq!(server.get("/").status, 200);
    server.is_well();
}
