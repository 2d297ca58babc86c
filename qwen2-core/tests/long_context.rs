//! Beyond the trained length: YaRN only when needed, and attention in chunks on demand.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::{fixture, ids, json, max_difference, root, unrounded};
use qwen2_core::{GenerateOptions, KvCacheType, LongContext, Model, Prompt};
use serde_json::Value;

const TRAINED: usize = 128;

fn stretched(by: LongContext) -> Model {
    let builder = unrounded(fixture("tied"))
        .context_length(512)
        .long_context(by);
    builder.load().unwrap()
}

/// 200 tokens that the model was never meant to see at once.
fn tokens() -> Vec<u32> {
    let vectors = json(root().join("conformance/stretched.json"));
    let case = &vectors["cases"][0];
    assert_eq!(case["model"], "tied");
    ids(&case["tokens"])
}

fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    model.logits(tokens).unwrap().values
}

fn last(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let all = model.logits(tokens).unwrap();
    all.values[all.values.len() - all.vocab_size..].to_vec()
}

fn greedy(n: usize) -> GenerateOptions {
    let mut options = GenerateOptions::greedy().max_new_tokens(n);
    options.ignore_eos = true;
    options
}

/// What a model chooses that sees every sequence for the first time.
fn greedy_by_recompute(model: &Model, prompt: &[u32], n: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..n {
        let row = last(model, &tokens);
        let best = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]));
        tokens.push(best.unwrap() as u32);
    }
    tokens.split_off(prompt.len())
}

#[test]
fn yarn_when_needed_leaves_trained_lengths_alone_and_is_yarn_behind_them() {
    let (plain, tokens) = (unrounded(fixture("tied")).load().unwrap(), tokens());
    let when_needed = stretched(LongContext::YarnWhenNeeded);
    let always = stretched(LongContext::Yarn);
    let short = &tokens[..TRAINED];
    assert_eq!(logits(&when_needed, short), logits(&plain, short));
    assert!(max_difference(&logits(&always, short), &logits(&plain, short)) > 0.01);
    for n in [TRAINED + 1, 200] {
        assert_eq!(
            logits(&when_needed, &tokens[..n]),
            logits(&always, &tokens[..n])
        );
    }
}

#[test]
fn a_generation_that_grows_past_the_trained_length_goes_on_as_if_it_had_been_long() {
    let (model, tokens) = (stretched(LongContext::YarnWhenNeeded), tokens());
    let prompt = &tokens[..TRAINED - 4];
    let generation = model
        .generate(Prompt::Tokens(prompt.to_vec()), &greedy(12))
        .unwrap();
    assert_eq!(generation.tokens, greedy_by_recompute(&model, prompt, 12));
}

#[test]
fn a_session_changes_its_rotations_both_ways() {
    let (model, tokens) = (stretched(LongContext::YarnWhenNeeded), tokens());
    let mut session = model.session();
    for (from, to) in [(0, 100), (100, 150), (150, 160)] {
        session.append(&tokens[from..to]).unwrap();
        let generation = session.generate(&greedy(1)).unwrap();
        assert_eq!(
            generation.tokens,
            greedy_by_recompute(&model, &tokens[..to], 1)
        );
        // What was read under other rotations counts as not read.
        let kept = if from == 150 { 150 } else { 0 };
        assert_eq!(generation.usage.cached_tokens, kept, "{from}");
        session.truncate(to).unwrap();
    }
    session.truncate(90).unwrap();
    session.append(&tokens[90..100]).unwrap();
    let generation = session.generate(&greedy(3)).unwrap();
    let want = greedy_by_recompute(&model, &tokens[..100], 3);
    assert_eq!(generation.tokens, want);
}

#[test]
fn chunks_change_nothing_for_sequences_of_one() {
    let (plain, tokens) = (unrounded(fixture("tied")).load().unwrap(), tokens());
    let chunked = stretched(LongContext::DualChunk);
    let sizes = chunked.config().dual_chunk_attention.unwrap();
    assert_eq!(
        (sizes.chunk_size, sizes.local_size, sizes.chunk_length()),
        (96, 8, 88)
    );
    assert_eq!(sizes.original_max_position_embeddings, Some(TRAINED));
    let one = &tokens[..88];
    assert!(max_difference(&logits(&chunked, one), &logits(&plain, one)) < 1e-5);
    let two = &tokens[..120];
    assert!(max_difference(&logits(&chunked, two), &logits(&plain, two)) > 0.01);
    let prompt = &tokens[..150];
    let generation = chunked
        .generate(Prompt::Tokens(prompt.to_vec()), &greedy(60))
        .unwrap();
    assert_eq!(generation.tokens, greedy_by_recompute(&chunked, prompt, 60));
}

/// A copy of a fixture with another config.json.
fn changed(name: &str, change: impl Fn(&mut Value)) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let from = entry.unwrap().path();
        fs::copy(&from, directory.path().join(from.file_name().unwrap())).unwrap();
    }
    let path = directory.path().join("config.json");
    let mut config = json(path.clone());
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
    directory
}

/// tests/parity.rs compares the fixture with the reference.
#[test]
fn chunks_take_of_yarn_what_the_trained_length_is_and_nothing_else() {
    let name = "dual_chunk_yarn";
    let tokens = ids(&json(fixture(name).join("reference.json"))["tokens"]);
    let of = |change: fn(&mut Value)| {
        let directory = changed(name, change);
        logits(
            &unrounded(directory.path().to_owned()).load().unwrap(),
            &tokens,
        )
    };
    let both = logits(&unrounded(fixture(name)).load().unwrap(), &tokens);
    let of_yarn = of(|config| {
        let chunks = config["dual_chunk_attention_config"].as_object_mut();
        chunks
            .unwrap()
            .remove("original_max_position_embeddings")
            .unwrap();
    });
    assert_eq!(of_yarn, both, "the trained length is that of rope_scaling");
    let without_yarn = of(|config| {
        config["rope_scaling"] = Value::Null;
        config["max_position_embeddings"] = 120.into();
    });
    assert_eq!(without_yarn, both);
    let unscaled = of(|config| {
        config["rope_scaling"] = Value::Null;
        config["max_position_embeddings"] = 120.into();
        let chunks = config["dual_chunk_attention_config"].as_object_mut();
        chunks
            .unwrap()
            .remove("original_max_position_embeddings")
            .unwrap();
    });
    assert!(max_difference(&unscaled, &both) > 0.001);
}

#[test]
fn chunks_work_over_a_packed_cache() {
    let tokens = ids(&json(fixture("dual_chunk").join("reference.json"))["tokens"]);
    let exact = logits(&unrounded(fixture("dual_chunk")).load().unwrap(), &tokens);
    let packed = unrounded(fixture("dual_chunk")).kv_cache(KvCacheType::Q8);
    let difference = max_difference(&logits(&packed.load().unwrap(), &tokens), &exact);
    assert!(difference > 0.0 && difference < 0.3, "{difference}");
}
