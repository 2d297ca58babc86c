//! A session equals the same conversation from scratch, and reads only what is new.
#![allow(clippy::unwrap_used)]

mod common;

use common::{fixture, ids, json, load};
use qwen2_core::{ErrorKind, GenerateOptions, Message, Model, Prompt};

fn model() -> Model {
    load(fixture("tied"))
}

fn tokens() -> Vec<u32> {
    ids(&json(fixture("tied").join("reference.json"))["tokens"])
}

fn greedy(n: usize) -> GenerateOptions {
    let mut options = GenerateOptions::greedy().max_new_tokens(n);
    options.ignore_eos = true;
    options
}

#[test]
fn a_session_continues_like_one_long_prompt() {
    let model = model();
    let mut session = model.session();
    session
        .append(Prompt::Tokens(tokens()[..8].to_vec()))
        .unwrap();
    let first = session.generate(&greedy(6)).unwrap();
    session.append(Prompt::Tokens(vec![9, 10, 11])).unwrap();
    let second = session.generate(&greedy(6)).unwrap();
    let mut whole = tokens()[..8].to_vec();
    assert_eq!(
        first.tokens,
        model
            .generate(Prompt::Tokens(whole.clone()), &greedy(6))
            .unwrap()
            .tokens
    );
    whole.extend(&first.tokens);
    whole.extend([9, 10, 11]);
    assert_eq!(
        second.tokens,
        model
            .generate(Prompt::Tokens(whole.clone()), &greedy(6))
            .unwrap()
            .tokens
    );
    assert!(second.usage.cached_tokens >= 13, "{:?}", second.usage);
    whole.extend(&second.tokens);
    assert_eq!(session.tokens(), whole);
}

#[test]
fn truncate_then_decode_equals_fresh_prompt() {
    let model = model();
    let mut session = model.session();
    session.append(Prompt::Tokens(tokens())).unwrap();
    session.generate(&greedy(5)).unwrap();
    session.truncate(10).unwrap();
    let again = session.generate(&greedy(8)).unwrap();
    let fresh = model
        .generate(Prompt::Tokens(tokens()[..10].to_vec()), &greedy(8))
        .unwrap();
    assert_eq!(again.tokens, fresh.tokens);
    assert_eq!(
        session.truncate(1000).unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
}

#[test]
fn a_fork_goes_its_own_way() {
    let model = model();
    let mut session = model.session();
    session
        .append(Prompt::Tokens(tokens()[..8].to_vec()))
        .unwrap();
    session.generate(&greedy(3)).unwrap();
    let mut fork = session.fork().unwrap();
    fork.append(Prompt::Tokens(vec![40, 41])).unwrap();
    fork.generate(&greedy(4)).unwrap();
    let straight = session.generate(&greedy(6)).unwrap();
    let whole = [&tokens()[..8], &session.tokens()[8..11]].concat();
    assert_eq!(
        straight.tokens,
        model
            .generate(Prompt::Tokens(whole), &greedy(6))
            .unwrap()
            .tokens
    );
}

#[test]
fn messages_go_through_the_template_as_one_conversation() {
    let model = model();
    let mut session = model.session();
    session.append([Message::user("a b")]).unwrap();
    let first = session
        .generate(&GenerateOptions::greedy().max_new_tokens(4))
        .unwrap();
    session.append([Message::user("c")]).unwrap();
    let messages = [
        Message::user("a b"),
        Message::assistant(first.text.as_str()),
        Message::user("c"),
    ];
    assert_eq!(
        session.tokens(),
        model.tokenizer().encode_chat(&messages, true).unwrap()
    );
    let second = session
        .generate(&GenerateOptions::greedy().max_new_tokens(4))
        .unwrap();
    assert!(second.usage.cached_tokens > 0);
    assert_eq!(session.messages().len(), 4);
}

#[test]
fn a_dropped_stream_keeps_what_was_said() {
    let model = model();
    let mut session = model.session();
    session
        .append(Prompt::Tokens(tokens()[..8].to_vec()))
        .unwrap();
    let mut stream = session.stream(&greedy(20)).unwrap();
    let said: Vec<u32> = (0..4)
        .map(|_| stream.next().unwrap().unwrap().token)
        .collect();
    drop(stream);
    assert_eq!(session.tokens()[8..], said);
}

#[test]
fn a_session_refuses_what_exceeds_the_context_and_stays_as_it_was() {
    let model = common::builder(fixture("tied"))
        .context_length(16)
        .load()
        .unwrap();
    let mut session = model.session();
    session
        .append(Prompt::Tokens(tokens()[..10].to_vec()))
        .unwrap();
    let error = session.append(Prompt::Tokens(vec![1; 7])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ContextOverflow);
    assert_eq!(session.tokens().len(), 10);
    assert!(session.generate(&greedy(6)).is_ok());
    assert_eq!(
        session.generate(&greedy(1)).unwrap_err().kind(),
        ErrorKind::ContextOverflow
    );
}

fn said(session: &qwen2_core::Session) -> Vec<&str> {
    session.messages().iter().map(|m| m.role.as_str()).collect()
}

#[test]
fn a_rollback_equals_never_having_said_it() {
    let model = model();
    let options = GenerateOptions::greedy().max_new_tokens(4);
    let mut session = model.session();
    session
        .append([Message::system("x"), Message::user("a b")])
        .unwrap();
    let first = session.generate(&options).unwrap();
    session.append([Message::user("c")]).unwrap();
    session.generate(&options).unwrap();
    // The last turn, then only the answer before it, which comes anew.
    session.rollback(2).unwrap();
    assert_eq!(said(&session), ["system", "user", "assistant"]);
    let left = session.messages().to_vec();
    assert_eq!(
        session.tokens(),
        model.tokenizer().encode_chat(&left, true).unwrap()
    );
    session.rollback(1).unwrap();
    let again = session.generate(&options).unwrap();
    assert_eq!(again.tokens, first.tokens);
    assert!(again.usage.cached_tokens + 1 >= again.usage.prompt_tokens);
    session.rollback(3).unwrap();
    assert!(session.tokens().is_empty() && session.messages().is_empty());
    session.append(Prompt::Tokens(vec![9, 10])).unwrap();
    let error = session.rollback(1).unwrap_err();
    assert_eq!(
        (error.kind(), error.key()),
        (ErrorKind::InvalidArgument, Some("n_messages"))
    );
    assert_eq!(session.tokens(), [9, 10]);
}

#[test]
fn a_shift_equals_a_fresh_session_of_what_is_left() {
    let model = model();
    let mut session = model.session();
    session.append(Prompt::Tokens(tokens())).unwrap();
    session.generate(&greedy(5)).unwrap();
    let whole = session.tokens().to_vec();
    session.shift(4, 7).unwrap();
    let left = [&whole[..4], &whole[11..]].concat();
    assert_eq!(session.tokens(), left);
    let got = session.generate(&greedy(8)).unwrap();
    let fresh = model.generate(Prompt::Tokens(left), &greedy(8)).unwrap();
    assert_eq!((got.usage.cached_tokens, got.tokens), (4, fresh.tokens));
    let n = session.tokens().len();
    for (keep, drop) in [(n, 1), (0, n + 1), (usize::MAX, 2)] {
        let error = session.shift(keep, drop).unwrap_err();
        assert_eq!(
            (error.kind(), error.key()),
            (ErrorKind::InvalidArgument, Some("n_tokens"))
        );
    }
    assert_eq!(session.tokens().len(), n);
}

#[test]
fn a_shift_of_messages_keeps_the_first_and_the_last() {
    let model = model();
    let turns = [
        Message::system("s"),
        Message::user("a"),
        Message::assistant("b"),
        Message::user("c"),
    ];
    let mut session = model.session();
    session.append(turns.clone()).unwrap();
    assert_eq!(session.shift(1, 1).unwrap_err().key(), Some("session"));
    session.shift_messages(1, 2).unwrap();
    let left = [turns[0].clone(), turns[3].clone()];
    assert_eq!(session.messages(), left);
    assert_eq!(
        session.tokens(),
        model.tokenizer().encode_chat(&left, true).unwrap()
    );
    assert_eq!(
        session.shift_messages(1, 2).unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    assert_eq!(session.messages(), left);
}
