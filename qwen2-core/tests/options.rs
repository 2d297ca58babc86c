//! What the options of a generation do to it: biases, bans, log-probabilities, processors.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};

use common::{builder, demo, fixture, floats, ids, json, load, max_difference, unrounded};
use qwen2_core::{
    Error, ErrorKind, FinishReason, GenerateOptions, Generation, LogitsProcessor, Message, Model,
    Pooling, Prompt,
};

fn counting() -> Prompt {
    Prompt::Chat(vec![Message::user("Count from 5 to 15.")])
}

fn greedy() -> GenerateOptions {
    GenerateOptions::greedy().max_new_tokens(40)
}

fn answer(model: &Model, options: &GenerateOptions) -> Generation {
    model.generate(counting(), options).unwrap()
}

#[test]
fn a_bad_word_is_not_in_the_text_and_bad_tokens_are_not_in_the_tokens() {
    let model = load(demo());
    let plain = answer(&model, &greedy());
    assert!(plain.text.contains("9, 10"), "{}", plain.text);
    let without = answer(&model, &greedy().bad_words(["9, 1", "12"]));
    assert!(!without.text.contains("9, 1") && !without.text.contains("12"));
    let [first, second] = [plain.tokens[1], plain.tokens[2]];
    let without = answer(&model, &greedy().bad_words([vec![first, second]]));
    assert!(
        without
            .tokens
            .windows(2)
            .all(|pair| pair != [first, second])
    );
    assert_eq!(without.tokens[..2], plain.tokens[..2]);
}

#[test]
fn no_token_left_is_an_error_of_the_caller() {
    let model = load(demo());
    let forbid = |logits: &mut [f32]| {
        logits.fill(f32::NEG_INFINITY);
        Ok(())
    };
    let stream = model.stream_with(counting(), &greedy(), forbid.into_processor());
    let error = stream.unwrap().finish().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    assert!(error.to_string().starts_with("no token is left"), "{error}");
}

#[test]
fn a_bias_decides_and_min_new_tokens_puts_the_end_off() {
    let model = load(demo());
    let plain = answer(&model, &greedy());
    assert_eq!(plain.finish_reason, FinishReason::Stop);
    let forced = answer(
        &model,
        &greedy().max_new_tokens(3).logit_bias([(77, 100.0)]),
    );
    assert_eq!(forced.tokens, [77; 3]);
    let n = plain.tokens.len() + 4;
    let longer = answer(&model, &greedy().max_new_tokens(n + 20).min_new_tokens(n));
    assert!(longer.tokens.len() >= n, "{}", longer.tokens.len());
    assert_eq!(longer.tokens[..n - 5], plain.tokens[..n - 5]);
    let ends = &model.generation_config().eos_token_ids;
    assert!(longer.tokens[..n].iter().all(|token| !ends.contains(token)));
    let endless = GenerateOptions::greedy().min_new_tokens(100_000);
    let error = model.generate(counting(), &endless).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ContextOverflow);
}

#[test]
fn penalties_of_the_output_leave_the_prompt_alone() {
    let model = load(fixture("tied"));
    let prompt = Prompt::Tokens(ids(
        &json(fixture("tied").join("reference.json"))["greedy_prompt"],
    ));
    let mut options = GenerateOptions::greedy().max_new_tokens(20);
    options.ignore_eos = true;
    let first = options.clone().frequency_penalty(2.0).presence_penalty(2.0);
    let plain = model.generate(prompt.clone(), &options).unwrap();
    let penalized = model.generate(prompt, &first).unwrap();
    assert_eq!(
        plain.tokens[0], penalized.tokens[0],
        "nothing was said before it"
    );
    let kinds = |tokens: &[u32]| {
        tokens
            .iter()
            .collect::<std::collections::HashSet<_>>()
            .len()
    };
    assert!(kinds(&penalized.tokens) > kinds(&plain.tokens));
}

/// Tolerance: the same logits, computed in other chunks.
#[test]
fn log_probabilities_are_those_of_score_for_prompt_and_output() {
    for (name, chunk) in [("tied", 512), ("tied", 3), ("moe", 512)] {
        let model = builder(fixture(name)).prefill_chunk(chunk).load().unwrap();
        let prompt: Vec<u32> = (0..90).map(|i| 10 + i % 200).collect();
        let options = GenerateOptions::new()
            .seed(1)
            .temperature(1.5)
            .max_new_tokens(8);
        let options = options.logprobs(3).prompt_logprobs(2).bad_words([[5]]);
        let mut stream = model.stream(prompt.clone(), &options).unwrap();
        let pieces: Vec<_> = stream.by_ref().map(Result::unwrap).collect();
        let generation = stream.finish().unwrap();
        let mut all = prompt.clone();
        all.extend(&generation.tokens);
        let (foretold, said) = (&generation.prompt_logprobs, &generation.logprobs);
        assert_eq!(foretold.len(), prompt.len() - 1);
        assert_eq!(said.len(), generation.tokens.len());
        let both = || foretold.iter().chain(said);
        let found: Vec<f32> = both().map(|logprobs| logprobs.logprob).collect();
        assert!(
            max_difference(&found, &model.score(&all).unwrap()) < 1e-3,
            "{name} {chunk}"
        );
        assert!(
            both()
                .zip(&all[1..])
                .all(|(logprobs, token)| logprobs.token == *token)
        );
        for (logprobs, top) in foretold
            .iter()
            .map(|l| (l, 2))
            .chain(said.iter().map(|l| (l, 3)))
        {
            assert_eq!(logprobs.top.len(), top);
            assert!(
                logprobs
                    .top
                    .windows(2)
                    .all(|pair| pair[0].logprob >= pair[1].logprob)
            );
            let chosen = logprobs.top.iter().find(|top| top.token == logprobs.token);
            assert!(chosen.is_none_or(|top| top.logprob == logprobs.logprob));
        }
        let from_pieces: Vec<_> = pieces
            .into_iter()
            .map(|piece| piece.logprobs.unwrap())
            .collect();
        assert_eq!(from_pieces, generation.logprobs);
    }
}

#[test]
fn a_session_reads_its_prompt_anew_for_log_probabilities() {
    let model = load(demo());
    let mut session = model.session();
    session
        .append(vec![Message::user("Count from 5 to 8.")])
        .unwrap();
    session.generate(&greedy()).unwrap();
    session
        .append(vec![Message::user("Count from 1 to 3.")])
        .unwrap();
    let prompt = session.tokens().to_vec();
    let generation = session.generate(&greedy().prompt_logprobs(0)).unwrap();
    assert_eq!(generation.prompt_logprobs.len(), prompt.len() - 1);
    assert_eq!(generation.usage.cached_tokens, 0);
    let found: Vec<f32> = generation
        .prompt_logprobs
        .iter()
        .map(|l| l.logprob)
        .collect();
    // bf16 weights and a cache in f16, read in other chunks.
    assert!(max_difference(&found, &model.score(&prompt).unwrap()) < 0.05);
}

/// Reference: transformers' hidden states in f32. Both are of length 1; 1e-5 is the logits' own bar
/// relative to their size.
#[test]
fn embeddings_equal_transformers() {
    let vectors = json(common::root().join("conformance/embed.json"));
    for case in vectors["cases"].as_array().unwrap() {
        let model = unrounded(fixture(case["model"].as_str().unwrap()))
            .load()
            .unwrap();
        let tokens = ids(&case["tokens"]);
        for pooling in [Pooling::Mean, Pooling::LastToken] {
            let found = model.embed(tokens.clone(), pooling).unwrap();
            let expected = floats(&case[pooling.name()]);
            let difference = max_difference(&found, &expected);
            assert!(
                difference < 1e-5,
                "{} {pooling:?}: {difference}",
                case["name"]
            );
        }
    }
}

#[test]
fn an_embedding_of_nothing_is_refused_and_names_of_pooling_are_known() {
    let model = load(fixture("tied"));
    let error = model.embed(Vec::<u32>::new(), Pooling::Mean).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!("last_token".parse::<Pooling>().unwrap(), Pooling::LastToken);
    assert!("max".parse::<Pooling>().is_err());
}

/// A closure as a processor.
struct Closure<F>(F);

impl<F: FnMut(&mut [f32]) -> Result<(), Error> + Send> LogitsProcessor for Closure<F> {
    fn process(&mut self, _: &[u32], logits: &mut [f32]) -> Result<(), Error> {
        (self.0)(logits)
    }
}

trait IntoProcessor: Sized {
    fn into_processor(self) -> Closure<Self> {
        Closure(self)
    }
}

impl<F: FnMut(&mut [f32]) -> Result<(), Error> + Send> IntoProcessor for F {}

#[test]
fn a_processor_sees_the_logits_behind_penalties_and_bans() {
    let model = load(demo());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let look = move |logits: &mut [f32]| {
        sink.lock().unwrap().push((logits[5], logits[6]));
        Ok(())
    };
    let options = greedy()
        .max_new_tokens(2)
        .bad_words([[5]])
        .logit_bias([(6, 90.0)]);
    let mut session = model.session();
    session.append(counting()).unwrap();
    let generation = session
        .stream_with(&options, look.into_processor())
        .unwrap()
        .finish()
        .unwrap();
    assert_eq!(generation.tokens, [6, 6]);
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 2);
    assert!(
        seen.iter()
            .all(|(five, six)| *five == f32::NEG_INFINITY && *six > 30.0)
    );
}

#[test]
fn a_processor_that_fails_ends_the_generation_with_its_reason() {
    let stop = |_: &mut [f32]| Err(Error::stopped("enough"));
    let stream = load(demo()).stream_with(counting(), &greedy(), stop.into_processor());
    let error = stream.unwrap().finish().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(
        error.to_string(),
        "logits processor stopped the generation: enough"
    );
}
