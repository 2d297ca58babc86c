//! Proposals change how fast tokens come, never which: by a draft model or by prompt lookup.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;

use common::{builder, demo, fixture, ids, json, load};
use qwen2_core::{
    Error, ErrorKind, FinishReason, GenerateOptions, LogitsProcessor, Message, Model, Prompt,
};

fn prompt() -> Vec<u32> {
    ids(&json(fixture("tied").join("reference.json"))["greedy_prompt"])
}

fn greedy(n: usize) -> GenerateOptions {
    let mut options = GenerateOptions::greedy().max_new_tokens(n);
    options.ignore_eos = true;
    options
}

fn sampled(n: usize, seed: u64) -> GenerateOptions {
    let mut options = greedy(n).temperature(1.2).top_k(20).top_p(0.95).seed(seed);
    options.repetition_penalty = Some(1.1);
    options
}

fn generate(model: &Model, options: &GenerateOptions) -> qwen2_core::Generation {
    model.generate(Prompt::Tokens(prompt()), options).unwrap()
}

#[test]
fn the_tokens_are_those_of_plain_decoding_whatever_proposes() {
    let target = load(fixture("tied"));
    for draft in ["tied", "untied", "gqa7", "moe"] {
        let with_draft = target.with_draft(&load(fixture(draft))).unwrap();
        let seeds = (0..8).map(|seed| sampled(40, seed));
        for (case, options) in [greedy(40)].into_iter().chain(seeds).enumerate() {
            let want = generate(&target, &options);
            assert_eq!(want.usage.draft_tokens, 0);
            for n in [1, 4, 7] {
                let got = generate(&with_draft, &options.clone().draft_tokens(n));
                assert_eq!(got.tokens, want.tokens, "draft {draft}, {n}, case {case}");
                assert_eq!((&got.text, got.seed), (&want.text, want.seed));
                assert!(got.usage.draft_tokens > 0);
                let looked_up = generate(&with_draft, &options.clone().prompt_lookup(n));
                assert_eq!(looked_up.tokens, want.tokens, "lookup of {n}, case {case}");
            }
        }
    }
}

#[test]
fn a_draft_that_is_the_model_itself_is_always_right_when_sampling_too() {
    let model = load(fixture("tied"));
    let model = model.with_draft(&model).unwrap();
    for options in [greedy(41), sampled(41, 3)] {
        let usage = generate(&model, &options).usage;
        // The first token comes from the prompt alone; then five come with each step.
        assert_eq!(
            (
                usage.completion_tokens,
                usage.draft_tokens,
                usage.accepted_tokens
            ),
            (41, 32, 32)
        );
    }
}

#[test]
fn lookup_foretells_what_repeats() {
    let model = load(demo());
    let ask = [Message::user("Repeat: one two three four five six seven.")];
    let options = GenerateOptions::greedy().max_new_tokens(60);
    let plain = model.chat(&ask, &options).unwrap();
    let fast = model.chat(&ask, &options.clone().prompt_lookup(6)).unwrap();
    assert_eq!(fast.tokens, plain.tokens);
    assert_eq!(fast.finish_reason, plain.finish_reason);
    assert!(fast.usage.accepted_tokens > 0, "{:?}", fast.usage);
}

/// Of three new tokens after a prompt, each of the four likeliest. Reference: the product of the
/// probabilities that `logits` gives. 99.9 % of chi-squared at 63 degrees of freedom is 103.4; seeds are
/// fixed, so the test is not a matter of luck.
#[test]
fn sampling_with_a_draft_has_the_distribution_of_the_model() {
    let target = load(fixture("tied"));
    let model = target.with_draft(&load(fixture("gqa7"))).unwrap();
    let mut expected = HashMap::new();
    walk(&target, &mut prompt(), 1.0, &mut expected);
    let n = 6000;
    let mut counts: HashMap<Vec<u32>, f64> = HashMap::new();
    let (mut drafts, mut accepted) = (0, 0);
    for seed in 0..n {
        let options = greedy(4)
            .temperature(TEMPERATURE)
            .top_k(TOP_K)
            .seed(seed)
            .draft_tokens(3);
        let generation = generate(&model, &options);
        *counts.entry(generation.tokens[..3].to_vec()).or_default() += 1.0;
        drafts += generation.usage.draft_tokens;
        accepted += generation.usage.accepted_tokens;
    }
    // Both happen, so both ways are in the counts.
    assert!(accepted > 0 && accepted < drafts, "{accepted} of {drafts}");
    assert!(counts.keys().all(|tokens| expected.contains_key(tokens)));
    let (mut statistic, mut rest, mut cells) = (0.0, (0.0, 0.0), 0);
    for (tokens, p) in &expected {
        let (want, got) = (p * n as f64, counts.get(tokens).copied().unwrap_or(0.0));
        // Rare ones make one cell together.
        if want < 5.0 {
            rest = (rest.0 + want, rest.1 + got);
            continue;
        }
        statistic += (got - want).powi(2) / want;
        cells += 1;
    }
    if rest.0 > 0.0 {
        statistic += (rest.1 - rest.0).powi(2) / rest.0;
    }
    assert!(cells > 30, "{cells}");
    assert!(statistic < 103.4, "{statistic} over {cells} cells");
}

const TEMPERATURE: f32 = 3.0;
const TOP_K: usize = 4;

/// The probability of every continuation by three tokens.
fn walk(model: &Model, tokens: &mut Vec<u32>, p: f64, out: &mut HashMap<Vec<u32>, f64>) {
    let new = tokens.len() - prompt().len();
    if new == 3 {
        out.insert(tokens[tokens.len() - 3..].to_vec(), p);
        return;
    }
    let logits = model.logits(tokens).unwrap();
    let row = &logits.values[(tokens.len() - 1) * logits.vocab_size..];
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
    order.truncate(TOP_K);
    let weight = |id: &usize| f64::from(row[*id] / TEMPERATURE).exp();
    let total: f64 = order.iter().map(weight).sum();
    for id in order {
        tokens.push(id as u32);
        walk(model, tokens, p * weight(&id) / total, out);
        tokens.pop();
    }
}

/// Forbids the token before, and counts its calls.
struct NoTwice(std::sync::Arc<std::sync::atomic::AtomicUsize>);
impl LogitsProcessor for NoTwice {
    fn process(&mut self, tokens: &[u32], logits: &mut [f32]) -> Result<(), Error> {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        logits[tokens[tokens.len() - 1] as usize] = f32::NEG_INFINITY;
        Ok(())
    }
}

#[test]
fn a_logits_processor_sees_every_token_once_and_decides() {
    let target = load(fixture("tied"));
    let model = target.with_draft(&load(fixture("untied"))).unwrap();
    for options in [greedy(30), sampled(30, 5)] {
        let run = |model: &Model, options: &GenerateOptions| {
            let calls = std::sync::Arc::default();
            let processor = NoTwice(std::sync::Arc::clone(&calls));
            let stream = model
                .stream_with(Prompt::Tokens(prompt()), options, processor)
                .unwrap();
            let tokens = stream.finish().unwrap().tokens;
            assert_eq!(calls.load(std::sync::atomic::Ordering::Relaxed), 30);
            tokens
        };
        let want = run(&target, &options);
        assert_eq!(run(&model, &options), want);
        assert_eq!(run(&model, &options.clone().prompt_lookup(4)), want);
    }
}

#[test]
fn stops_and_limits_hold_in_the_middle_of_proposals() {
    let target = load(fixture("tied"));
    let model = target.with_draft(&target).unwrap();
    let whole = generate(&target, &greedy(30)).tokens;
    for n in 1..12 {
        assert_eq!(generate(&model, &greedy(n)).tokens, whole[..n]);
    }
    let stop = whole[7];
    let first = whole.iter().position(|&token| token == stop).unwrap();
    let generation = generate(&model, &greedy(30).stop_token_ids([stop]));
    assert_eq!(generation.tokens, whole[..=first]);
    assert_eq!(generation.finish_reason, FinishReason::Stop);
    // To the end of the context, and not beyond.
    let short = builder(fixture("tied")).context_length(24).load().unwrap();
    let short = short.with_draft(&target).unwrap();
    let mut options = greedy(1);
    options.max_new_tokens = None;
    let generation = short
        .generate(Prompt::Tokens(vec![20; 10]), &options)
        .unwrap();
    assert_eq!(generation.tokens.len(), 14);
}

#[test]
fn a_draft_with_a_shorter_context_stops_proposing() {
    let target = load(fixture("tied"));
    let draft = builder(fixture("tied")).context_length(20).load().unwrap();
    let model = target.with_draft(&draft).unwrap();
    let generation = generate(&model, &greedy(60));
    assert_eq!(generation.tokens, generate(&target, &greedy(60)).tokens);
    let usage = generation.usage;
    assert!(
        usage.draft_tokens > 0 && usage.draft_tokens < 20,
        "{usage:?}"
    );
}

#[test]
fn a_session_goes_on_after_accepted_and_refused_proposals() {
    let target = load(fixture("tied"));
    for draft in ["tied", "gqa7"] {
        let model = target.with_draft(&load(fixture(draft))).unwrap();
        let (mut plain, mut fast) = (target.session(), model.session());
        for turn in 0..4 {
            let options = match turn {
                3 => greedy(9).prompt_lookup(5),
                _ => greedy(9),
            };
            for session in [&mut plain, &mut fast] {
                session
                    .append(Prompt::Tokens(vec![30 + turn, 31, 32]))
                    .unwrap();
            }
            // Dropped in the middle: the cache may hold more than was said.
            let mut stream = fast.stream(&options).unwrap();
            let said: Vec<u32> = (0..turn + 2)
                .map(|_| stream.next().unwrap().unwrap().token)
                .collect();
            drop(stream);
            let want = plain.generate(&greedy(said.len())).unwrap().tokens;
            assert_eq!(said, want, "draft {draft}, turn {turn}");
            let (a, b) = (plain.generate(&greedy(9)), fast.generate(&options));
            assert_eq!(a.unwrap().tokens, b.unwrap().tokens, "draft {draft}");
            let mut fork = fast.fork().unwrap();
            assert_eq!(
                fork.generate(&options).unwrap().tokens,
                plain.fork().unwrap().generate(&greedy(9)).unwrap().tokens
            );
        }
        assert_eq!(plain.tokens(), fast.tokens());
    }
}

#[test]
fn a_draft_of_another_vocabulary_is_refused() {
    let error = load(fixture("tied")).with_draft(&load(demo())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(error.key(), Some("draft"));
    assert!(error.to_string().contains("token "), "{error}");
}

#[test]
fn draft_tokens_without_a_draft_are_refused() {
    let model = load(fixture("tied"));
    let options = greedy(4).draft_tokens(3);
    for error in [
        model
            .generate(Prompt::Tokens(prompt()), &options)
            .unwrap_err(),
        {
            let mut session = model.session();
            session.append(Prompt::Tokens(prompt())).unwrap();
            session.generate(&options).unwrap_err()
        },
    ] {
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert_eq!(error.key(), Some("draft_tokens"));
    }
}
