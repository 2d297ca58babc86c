//! Perplexity equals what transformers' logits give.
#![allow(clippy::unwrap_used)]

mod common;

use common::{fixture, ids, json, root, unrounded};
use qwen2_core::ErrorKind;

#[test]
fn perplexity_equals_the_reference() {
    let vectors = json(root().join("conformance/perplexity.json"));
    let cases = vectors["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let tokens = ids(&case["tokens"]);
        let [window, stride] = ["window", "stride"].map(|key| case[key].as_u64().unwrap() as usize);
        let want = case["perplexity"].as_f64().unwrap();
        let model = unrounded(fixture(case["model"].as_str().unwrap()))
            .load()
            .unwrap();
        let window = window.min(model.context_length());
        let got = model.perplexity(&tokens, window, stride).unwrap();
        assert_eq!(got.n_tokens, tokens.len() - 1);
        let difference = (got.perplexity - want).abs() / want;
        assert!(difference < 1e-4, "{}: {got:?} {want}", case["name"]);
        assert!((got.nll.exp() - got.perplexity).abs() < 1e-9 * got.perplexity);
    }
}

#[test]
fn impossible_windows_are_refused_by_name() {
    let model = unrounded(fixture("tied")).load().unwrap();
    let tokens: Vec<u32> = (0..40).collect();
    for (tokens, window, stride, key) in [
        (&tokens[..1], 16, 8, "tokens"),
        (&tokens[..], 1, 1, "window"),
        (&tokens[..], 129, 8, "window"),
        (&tokens[..], 16, 0, "stride"),
        (&tokens[..], 16, 16, "stride"),
    ] {
        let error = model.perplexity(tokens, window, stride).unwrap_err();
        assert_eq!(
            (error.kind(), error.key()),
            (ErrorKind::InvalidArgument, Some(key))
        );
    }
}
