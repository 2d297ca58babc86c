//! A generation ends when it is told to, in the middle of a prompt as well, and leaves all usable.
#![allow(clippy::unwrap_used)]

mod common;

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use common::{fixture, json};
use qwen2_core::{
    CancelToken, ErrorKind, FinishReason, GenerateOptions, Model, ModelConfig, Pooling, Prompt,
};

/// Deep and narrow: 16 layers, chunks of 32 tokens.
fn deep() -> Model {
    let path = fixture("tied").join("config.json");
    let mut config = json(path.clone());
    config["num_hidden_layers"] = LAYERS.into();
    let config = ModelConfig::from_json(config.to_string().as_bytes(), &path).unwrap();
    let model = Model::random(&config).device(common::device());
    model.prefill_chunk(32).load().unwrap()
}

const LAYERS: usize = 16;

fn long() -> Vec<u32> {
    (0..100).map(|i| 10 + i % 200).collect()
}

fn greedy(n: usize) -> GenerateOptions {
    let mut options = GenerateOptions::greedy().max_new_tokens(n);
    options.ignore_eos = true;
    options
}

/// Every report, and at the `n`-th the word to stop.
fn stop_at(
    n: usize,
    how: impl Fn() -> ControlFlow<()> + Send + Sync + 'static,
) -> (Reports, GenerateOptions) {
    let reports = Reports::default();
    let sink = Arc::clone(&reports);
    let options = greedy(5).on_prefill(move |progress| {
        let mut reports = sink.lock().unwrap();
        reports.push((progress.tokens_done, progress.tokens_total));
        if reports.len() == n {
            how()
        } else {
            ControlFlow::Continue(())
        }
    });
    (reports, options)
}

type Reports = Arc<Mutex<Vec<(usize, usize)>>>;

#[test]
fn no_layer_runs_after_the_one_in_which_a_prefill_is_cancelled() {
    let model = deep();
    let switch = CancelToken::new();
    let theirs = switch.clone();
    let by_switch = move || {
        theirs.cancel();
        ControlFlow::Continue(())
    };
    // In the second of four chunks.
    let n = LAYERS + 5;
    for (reports, options) in [stop_at(n, || ControlFlow::Break(())), {
        let (reports, options) = stop_at(n, by_switch);
        (reports, options.cancel(switch))
    }] {
        let mut session = model.session();
        session.append(Prompt::Tokens(long())).unwrap();
        let generation = session.generate(&options).unwrap();
        assert_eq!(generation.finish_reason, FinishReason::Cancelled);
        assert!(generation.tokens.is_empty());
        // Of 4 · 16 layers.
        assert_eq!(reports.lock().unwrap().len(), n);
        // What was read before stays, and what was not is read again.
        let again = session.generate(&greedy(5)).unwrap();
        assert_eq!(again.usage.cached_tokens, 32);
        let fresh = model.generate(Prompt::Tokens(long()), &greedy(5)).unwrap();
        assert_eq!(again.tokens, fresh.tokens);
    }
}

#[test]
fn a_prefill_tells_how_far_it_is() {
    let model = deep();
    let mut session = model.session();
    session.append(Prompt::Tokens(long())).unwrap();
    let (reports, options) = stop_at(0, || ControlFlow::Break(()));
    session.generate(&options).unwrap();
    let first = std::mem::take(&mut *reports.lock().unwrap());
    assert_eq!(first.len(), 4 * LAYERS, "the decode steps do not report");
    assert_eq!(first[LAYERS / 2 - 1], (16, 100));
    assert!(first.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    assert_eq!(first.last(), Some(&(100, 100)));
    // What is in the cache counts as done.
    session.append(Prompt::Tokens(vec![7, 8])).unwrap();
    session.generate(&options).unwrap();
    let second = reports.lock().unwrap();
    assert!(second[0].0 >= 104, "{second:?}");
    assert_eq!(second.last(), Some(&(107, 107)));
}

#[test]
fn a_switch_that_is_set_ends_everything_before_it_begins() {
    let model = deep();
    let cancel = CancelToken::new();
    let tokens = long();
    let free = model.logits_with(&tokens, &cancel).unwrap();
    assert_eq!(free, model.logits(&tokens).unwrap());
    let scores = model.score_with(&tokens, &cancel).unwrap();
    assert_eq!(scores, model.score(&tokens).unwrap());
    for pooling in [Pooling::Mean, Pooling::LastToken] {
        let embedding = model.embed_with(tokens.clone(), pooling, &cancel).unwrap();
        assert_eq!(embedding, model.embed(tokens.clone(), pooling).unwrap());
    }
    let perplexity = model.perplexity_with(&tokens, 50, 20, &cancel).unwrap();
    assert_eq!(perplexity, model.perplexity(&tokens, 50, 20).unwrap());
    cancel.cancel();
    let embedding = model.embed_with(tokens.clone(), Pooling::Mean, &cancel);
    assert_eq!(embedding.unwrap_err().kind(), ErrorKind::Cancelled);
    let perplexity = model.perplexity_with(&tokens, 50, 20, &cancel);
    assert_eq!(perplexity.unwrap_err().kind(), ErrorKind::Cancelled);
    let logits = model.logits_with(&tokens, &cancel).unwrap_err();
    let scores = model.score_with(&tokens, &cancel).unwrap_err();
    assert_eq!(logits.kind(), ErrorKind::Cancelled);
    assert_eq!(scores.kind(), ErrorKind::Cancelled);
    let options = greedy(5).cancel(cancel);
    let generation = model.generate(Prompt::Tokens(tokens), &options).unwrap();
    assert_eq!(generation.finish_reason, FinishReason::Cancelled);
}

#[test]
fn a_timeout_ends_with_what_there_is() {
    let model = deep();
    let run = |timeout: f64| {
        let options = greedy(100).timeout(timeout);
        let mut stream = model
            .stream(Prompt::Tokens(vec![5, 6, 7]), &options)
            .unwrap();
        for piece in stream.by_ref() {
            piece.unwrap();
            if timeout < 10.0 {
                std::thread::sleep(std::time::Duration::from_millis(10)); // a second in all
            }
        }
        stream.finish().unwrap()
    };
    let whole = run(1e9);
    assert_eq!(whole.finish_reason, FinishReason::Length);
    let cut = run(0.2);
    assert_eq!(cut.finish_reason, FinishReason::Timeout);
    assert!(cut.tokens.len() < 100);
    assert!(whole.tokens.starts_with(&cut.tokens));
    assert!(whole.text.starts_with(&cut.text));
    let none = run(1e-9);
    assert_eq!(
        (none.finish_reason, none.tokens.len()),
        (FinishReason::Timeout, 0)
    );
}

#[test]
fn a_warmup_changes_no_answer_and_can_be_cancelled() {
    let model = deep();
    let prompt = Prompt::Tokens(long());
    let before = model.generate(prompt.clone(), &greedy(5)).unwrap();
    model.warmup().unwrap();
    let after = model.generate(prompt, &greedy(5)).unwrap();
    assert_eq!(before.tokens, after.tokens);
    assert_eq!(after.usage.cached_tokens, 0);

    let cancel = CancelToken::new();
    cancel.cancel();
    let error = model.warmup_with(&cancel).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}

#[test]
fn a_context_of_one_token_is_warmed_up_as_well() {
    let path = fixture("tied").join("config.json");
    let config = ModelConfig::from_json(json(path.clone()).to_string().as_bytes(), &path).unwrap();
    for length in [1, 2, 17] {
        let model = Model::random(&config).device(common::device());
        model
            .context_length(length)
            .load()
            .unwrap()
            .warmup()
            .unwrap();
    }
}
