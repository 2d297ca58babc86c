//! The demo model answers what it was not trained on, with the tokens that transformers give.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{demo, ids, json, load};
use qwen2_core::{GenerateOptions, Message, Prompt};

fn messages(value: &serde_json::Value) -> Vec<Message> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn held_out_questions_are_answered_right_and_as_by_the_reference() {
    let evaluation = json(demo().join("evaluation.json"));
    let model = load(demo());
    let options = GenerateOptions::greedy().max_new_tokens(200);
    let mut right: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for case in evaluation["questions"].as_array().unwrap() {
        let messages = messages(&case["messages"]);
        let prompt = model.tokenizer().encode_chat(&messages, true).unwrap();
        assert_eq!(prompt, ids(&case["prompt_tokens"]));
        let generation = model.chat(&messages, &options).unwrap();
        assert_eq!(generation.tokens, ids(&case["tokens"]), "{messages:?}");
        let row = right
            .entry(case["category"].as_str().unwrap().to_owned())
            .or_default();
        row.0 += usize::from(generation.text == case["answer"].as_str().unwrap());
        row.1 += 1;
    }
    let (hits, all) = right
        .values()
        .fold((0, 0), |sum, row| (sum.0 + row.0, sum.1 + row.1));
    assert!(all >= 200, "{all} questions");
    assert!(
        hits as f64 >= 0.95 * all as f64,
        "{hits} of {all} right: {right:?}"
    );
}

#[test]
fn long_greedy_runs_equal_the_reference_token_by_token() {
    let evaluation = json(demo().join("evaluation.json"));
    let model = load(demo());
    let cases = evaluation["long"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let want = ids(&case["tokens"]);
        assert!(want.len() >= 64);
        let mut options = GenerateOptions::greedy().max_new_tokens(want.len());
        options.ignore_eos = true;
        let generation = model
            .generate(Prompt::Tokens(ids(&case["prompt_tokens"])), &options)
            .unwrap();
        assert_eq!(generation.tokens, want);
    }
}
