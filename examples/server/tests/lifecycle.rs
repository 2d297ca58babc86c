//! Clients that leave, that read nothing and that are too many; a server that ends.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use common::{demo, endless, endless_request, post_request, read_reply, start};
use qwen2_server::Settings;
use serde_json::json;

const COMPLETIONS: &str = "/v1/completions";

fn one_at_a_time() -> Settings {
    let mut settings = Settings::default();
    settings.max_running = 1;
    settings
}

#[test]
fn a_client_that_leaves_makes_room_for_the_next() {
    let server = start(endless(), one_at_a_time());
    for stream in [true, false] {
        let request = post_request(COMPLETIONS, endless_request(stream).to_string().as_bytes());
        let mut running = server.connect();
        running.write_all(&request).unwrap();
        server.wait_for_metric("qwen2_answers_running", 1.0);
        // This one leaves while it waits.
        let mut waiting = server.connect();
        waiting.write_all(&request).unwrap();
        server.wait_for_metric("qwen2_answers_waiting", 1.0);
        drop(waiting);
        server.wait_for_metric("qwen2_answers_waiting", 0.0);
        drop(running);
        let body = json!({"prompt": "hello", "max_tokens": 2});
        assert_eq!(
            server.post(COMPLETIONS, &body).ok()["usage"]["completion_tokens"],
            2
        );
        server.wait_for_metric("qwen2_answers_running", 0.0);
    }
}

#[test]
fn a_client_that_reads_nothing_stops_the_computation_and_is_disconnected() {
    let mut settings = one_at_a_time();
    settings.patience = Duration::from_secs(1);
    let server = start(endless(), settings);
    let mut body = endless_request(true);
    // Long events (8 MB of them) fill the system's buffers soon.
    body["echo"] = true.into();
    body["prompt"] = json!(vec!["hello ".repeat(20_000); 8]);
    body["n"] = 8.into();
    let mut client = server.connect();
    client
        .write_all(&post_request(COMPLETIONS, body.to_string().as_bytes()))
        .unwrap();
    server.wait_for_metric("qwen2_answers_running", 1.0);
    // Only the server can end it: it runs for 900,000 tokens.
    server.wait_for_metric("qwen2_answers_running", 0.0);
    server.wait_for_metric("qwen2_answers_waiting", 0.0);
    server.is_well();
}

#[test]
fn a_client_that_reads_nothing_keeps_no_other_from_its_answer() {
    let server = start(endless(), Settings::default());
    let mut silent = server.connect();
    silent
        .write_all(&post_request(
            COMPLETIONS,
            endless_request(true).to_string().as_bytes(),
        ))
        .unwrap();
    server.wait_for_metric("qwen2_answers_running", 1.0);
    for stream in [false, true] {
        let body = json!({"prompt": "hello", "max_tokens": 300, "ignore_eos": true, "temperature": 0, "stream": stream});
        let reply = server.post(COMPLETIONS, &body);
        assert_eq!(reply.status, 200);
        match stream {
            true => assert!(reply.events().1),
            false => assert_eq!(reply.ok()["usage"]["completion_tokens"], 300),
        }
    }
    assert_eq!(server.metric("qwen2_answers_running"), 1.0);
}

#[test]
fn an_answer_that_the_memory_cannot_hold_is_refused_and_others_are_not() {
    let mut settings = Settings::default();
    settings.cache_memory = Some(1 << 20);
    let server = start(endless(), settings);
    let long = json!({"prompt": "hello ".repeat(20_000), "max_tokens": 2});
    let reply = server.post(COMPLETIONS, &long);
    assert_eq!(
        (reply.status, reply.error()["code"].as_str()),
        (503, Some("out_of_memory"))
    );
    server.post(COMPLETIONS, &json!({"prompt": "hello"})).ok();
}

#[test]
fn more_than_may_wait_are_refused_and_told_to_come_back() {
    let mut settings = one_at_a_time();
    settings.max_waiting = 1;
    let server = start(endless(), settings);
    let request = post_request(COMPLETIONS, endless_request(true).to_string().as_bytes());
    let clients = [server.connect(), server.connect()];
    for mut client in &clients {
        client.write_all(&request).unwrap();
    }
    server.wait_for_metric("qwen2_answers_waiting", 1.0);
    let reply = server.post(COMPLETIONS, &json!({"prompt": "hello"}));
    assert_eq!(
        (reply.status, reply.error()["code"].as_str()),
        (429, Some("overloaded"))
    );
    assert!(reply.head.contains("retry-after: 1"), "{}", reply.head);
    // More answers than there are places in one request: it takes none of them.
    drop(clients);
    server.wait_for_metric("qwen2_answers_running", 0.0);
    let reply = server.post(COMPLETIONS, &json!({"prompt": "hello", "n": 3}));
    assert_eq!(reply.status, 429);
    server.wait_for_metric("qwen2_answers_waiting", 0.0);
    server.post(COMPLETIONS, &json!({"prompt": "hello"})).ok();
}

#[test]
fn an_answer_that_takes_too_long_is_an_error() {
    let mut settings = Settings::default();
    settings.timeout = Duration::from_millis(300);
    let server = start(endless(), settings);
    let reply = server.post(COMPLETIONS, &endless_request(false));
    assert_eq!(
        (reply.status, reply.error()["code"].as_str()),
        (504, Some("timeout"))
    );
    // A stream has begun, so its last event says so.
    let (events, done) = server.post(COMPLETIONS, &endless_request(true)).events();
    assert!(!done);
    assert_eq!(events.last().unwrap()["error"]["code"], "timeout");
    assert!(events.len() > 1);
    server.wait_for_metric("qwen2_answers_running", 0.0);
}

#[test]
fn a_server_that_ends_lets_answers_finish_and_accepts_nothing_more() {
    let mut server = start(demo(), Settings::default());
    let body = json!({"messages": [{"role": "user", "content": "Count from 5 to 15."}], "temperature": 0, "stream": true});
    let mut client = server.connect();
    let idle = server.connect();
    client
        .write_all(&post_request(
            "/v1/chat/completions",
            body.to_string().as_bytes(),
        ))
        .unwrap();
    let mut first = [0; 1];
    client.read_exact(&mut first).unwrap();
    server.stop();
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    let start = Instant::now();
    let address = server.address;
    drop(server);
    // A connection that asks for nothing does not keep it for the thirty seconds of grace.
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(std::net::TcpStream::connect(address).is_err());
    drop(idle);
}

#[test]
fn answers_that_outlast_the_grace_are_told_why_they_end() {
    let mut settings = Settings::default();
    settings.grace = Duration::from_millis(200);
    let mut server = start(endless(), settings);
    let request =
        |stream| post_request(COMPLETIONS, endless_request(stream).to_string().as_bytes());
    let (mut whole, mut streamed) = (server.connect(), server.connect());
    whole.write_all(&request(false)).unwrap();
    streamed.write_all(&request(true)).unwrap();
    server.wait_for_metric("qwen2_answers_running", 2.0);
    server.stop();
    let (events, done) = read_reply(streamed).events();
    assert!(!done);
    assert_eq!(events.last().unwrap()["error"]["code"], "shutting_down");
    let reply = read_reply(whole);
    assert_eq!(
        (reply.status, reply.error()["code"].as_str()),
        (503, Some("shutting_down"))
    );
}
