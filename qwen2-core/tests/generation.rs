//! What a generation promises: equal to recomputing, reproducible, bounded, stoppable.
#![allow(clippy::unwrap_used)]

mod common;

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use common::{builder, fixture, ids, json, load, max_difference};
use qwen2_core::{
    Error, ErrorKind, FinishReason, GenerateOptions, LogitsProcessor, Model, Prompt, StopMatch,
};

fn model() -> Model {
    load(fixture("tied"))
}

fn prompt() -> Vec<u32> {
    ids(&json(fixture("tied").join("reference.json"))["greedy_prompt"])
}

fn greedy(n: usize) -> GenerateOptions {
    let mut options = GenerateOptions::greedy().max_new_tokens(n);
    options.ignore_eos = true;
    options
}

#[test]
fn cached_decode_equals_recompute() {
    for name in ["tied", "gqa7", "sliding", "yarn"] {
        let model = load(fixture(name));
        let start = ids(&json(fixture(name).join("reference.json"))["greedy_prompt"]);
        let generation = model
            .generate(Prompt::Tokens(start.clone()), &greedy(40))
            .unwrap();
        let mut tokens = start;
        for token in generation.tokens {
            let logits = model.logits(&tokens).unwrap();
            let last = &logits.values[(tokens.len() - 1) * logits.vocab_size..];
            let best = last
                .iter()
                .enumerate()
                .max_by(|a, b| a.1.total_cmp(b.1))
                .unwrap()
                .0;
            assert_eq!(token as usize, best, "{name} after {} tokens", tokens.len());
            tokens.push(token);
        }
    }
}

#[test]
fn the_cache_grows_past_its_first_capacity() {
    let model = model();
    let tokens: Vec<u32> = (0..300).map(|i| 10 + i % 200).collect();
    let context = model.context_length();
    let tokens = &tokens[..tokens.len().min(context)];
    let whole = model.logits(tokens).unwrap().values;
    let chunked = builder(fixture("tied"))
        .prefill_chunk(50)
        .load()
        .unwrap()
        .logits(tokens)
        .unwrap()
        .values;
    assert!(max_difference(&whole, &chunked) <= 1e-4);
}

#[test]
fn the_same_seed_gives_the_same_tokens() {
    let model = model();
    let options = |seed| {
        let mut options = GenerateOptions::new()
            .temperature(1.5)
            .top_k(50)
            .top_p(0.95)
            .seed(seed)
            .max_new_tokens(30);
        options.ignore_eos = true;
        options
    };
    let run = |seed| {
        model
            .generate(Prompt::Tokens(prompt()), &options(seed))
            .unwrap()
    };
    let (a, b, c) = (run(7), run(7), run(8));
    assert_eq!(a.tokens, b.tokens);
    assert_ne!(a.tokens, c.tokens);
    assert_eq!(a.seed, Some(7));
    let mut unseeded = options(0);
    unseeded.seed = None;
    let first = model.generate(Prompt::Tokens(prompt()), &unseeded).unwrap();
    let again = run(first.seed.unwrap());
    assert_eq!(
        first.tokens, again.tokens,
        "the reported seed repeats the run"
    );
}

#[test]
fn streamed_pieces_add_up_to_the_generation() {
    let model = model();
    let mut stream = model.stream(Prompt::Tokens(prompt()), &greedy(30)).unwrap();
    let mut text = String::new();
    let mut tokens = Vec::new();
    for piece in &mut stream {
        let piece = piece.unwrap();
        text.push_str(&piece.text);
        tokens.push(piece.token);
    }
    let generation = stream.finish().unwrap();
    assert_eq!(generation.text, text);
    assert_eq!(generation.tokens, tokens);
    assert_eq!(generation.finish_reason, FinishReason::Length);
    assert_eq!(generation.usage.completion_tokens, 30);
    assert_eq!(generation.usage.prompt_tokens, prompt().len());
    assert!(generation.timings.decode_tokens_per_s > 0.0);
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let model = model();
    let whole = model
        .generate(Prompt::Tokens(prompt()), &greedy(40))
        .unwrap()
        .text;
    let chars: Vec<char> = whole.chars().collect();
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 3].iter().collect();
    let mut options = greedy(40);
    options.stop = vec![stop.clone()];
    let generation = model.generate(Prompt::Tokens(prompt()), &options).unwrap();
    assert_eq!(generation.text, whole[..whole.find(&stop).unwrap()]);
    assert_eq!(generation.finish_reason, FinishReason::Stop);
    assert_eq!(generation.stop_match, Some(StopMatch::Text(stop)));
}

#[test]
fn a_stop_token_ends_the_generation() {
    let model = model();
    let whole = model
        .generate(Prompt::Tokens(prompt()), &greedy(40))
        .unwrap()
        .tokens;
    let stop = whole[10];
    let first = whole.iter().position(|&token| token == stop).unwrap();
    let mut options = greedy(40);
    options.stop_token_ids = vec![stop];
    let generation = model.generate(Prompt::Tokens(prompt()), &options).unwrap();
    assert_eq!(generation.tokens, whole[..=first]);
    assert_eq!(generation.stop_match, Some(StopMatch::Token(stop)));
}

#[test]
fn cancelling_ends_with_what_there_is() {
    let model = model();
    let mut stream = model.stream(Prompt::Tokens(prompt()), &greedy(40)).unwrap();
    for _ in 0..5 {
        stream.next().unwrap().unwrap();
    }
    let token = stream.cancel_token();
    std::thread::spawn(move || token.cancel()).join().unwrap();
    assert!(stream.next().is_none());
    let generation = stream.finish().unwrap();
    assert_eq!(generation.finish_reason, FinishReason::Cancelled);
    assert_eq!(generation.tokens.len(), 5);
}

#[test]
fn dropping_a_stream_leaves_the_model_usable() {
    let model = model();
    drop(model.stream(Prompt::Tokens(prompt()), &greedy(40)).unwrap());
    let mut stream = model.stream(Prompt::Tokens(prompt()), &greedy(40)).unwrap();
    stream.next().unwrap().unwrap();
    drop(stream);
    assert_eq!(
        model
            .generate(Prompt::Tokens(prompt()), &greedy(5))
            .unwrap()
            .tokens
            .len(),
        5
    );
}

#[test]
fn one_model_serves_many_threads() {
    let model = model();
    let want = model
        .generate(Prompt::Tokens(prompt()), &greedy(30))
        .unwrap()
        .tokens;
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    model
                        .generate(Prompt::Tokens(prompt()), &greedy(30))
                        .unwrap()
                        .tokens
                })
            })
            .collect();
        for run in runs {
            assert_eq!(run.join().unwrap(), want);
        }
    });
}

#[test]
fn a_prompt_at_the_context_fits_and_one_over_does_not() {
    let model = builder(fixture("tied")).context_length(24).load().unwrap();
    let tokens = vec![20_u32; 24];
    assert!(model.logits(&tokens).is_ok());
    let full = model
        .generate(Prompt::Tokens(tokens[..23].to_vec()), &greedy(1))
        .unwrap();
    assert_eq!(full.finish_reason, FinishReason::Length);
    for (n_prompt, n_new) in [(24, 1), (23, 2), (25, 1), (1, 24)] {
        let prompt = Prompt::Tokens(vec![20; n_prompt]);
        let error = model.generate(prompt, &greedy(n_new)).unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::ContextOverflow,
            "{n_prompt} + {n_new}"
        );
        assert!(error.help().is_some());
    }
    let mut unset = greedy(1);
    unset.max_new_tokens = None;
    let generation = model
        .generate(Prompt::Tokens(vec![20; 20]), &unset)
        .unwrap();
    assert_eq!(
        generation.usage.completion_tokens, 4,
        "unset: to the end of the context"
    );
}

#[test]
fn empty_prompts_and_unknown_tokens_are_refused() {
    let model = model();
    for prompt in [
        Prompt::Tokens(vec![]),
        Prompt::Text(String::new()),
        Prompt::Chat(vec![]),
    ] {
        let error = model.generate(prompt, &greedy(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    }
    let error = model
        .generate(Prompt::Tokens(vec![1, 4_000_000]), &greedy(1))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(error.key(), Some("tokens"));
    assert!(model.logits(&[]).is_err());
}

#[test]
fn a_progress_callback_sees_all_bytes_and_can_stop_the_loading() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    builder(fixture("bf16_shards"))
        .progress(move |progress| {
            sink.lock()
                .unwrap()
                .push((progress.bytes_done, progress.bytes_total));
            ControlFlow::Continue(())
        })
        .load()
        .unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    let (done, total) = *seen.last().unwrap();
    assert_eq!(done, total);
    let error = builder(fixture("tied"))
        .progress(|_| ControlFlow::Break(()))
        .load()
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}

#[test]
fn a_batch_keeps_its_order_and_one_failure_does_not_sink_the_rest() {
    let model = model();
    let prompts = [
        Prompt::Tokens(prompt()),
        Prompt::Tokens(vec![]),
        Prompt::Tokens(vec![5, 6]),
    ];
    let results = model.generate_batch(&prompts, &greedy(4));
    assert!(results[0].is_ok() && results[1].is_err() && results[2].is_ok());
    let single = model.generate(prompts[2].clone(), &greedy(4)).unwrap();
    assert_eq!(results[2].as_ref().unwrap().tokens, single.tokens);
}

struct Only(u32);
impl LogitsProcessor for Only {
    fn process(&mut self, tokens: &[u32], logits: &mut [f32]) -> Result<(), Error> {
        assert!(!tokens.is_empty());
        for (token, logit) in logits.iter_mut().enumerate() {
            if token as u32 != self.0 {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }
}

#[test]
fn a_logits_processor_decides_the_token() {
    let stream = model()
        .stream_with(Prompt::Tokens(prompt()), &greedy(6), Only(77))
        .unwrap();
    assert_eq!(stream.finish().unwrap().tokens, [77; 6]);
}

#[test]
fn scores_are_log_probabilities_of_the_tokens() {
    let model = model();
    let tokens = prompt();
    let scores = model.score(&tokens).unwrap();
    assert_eq!(scores.len(), tokens.len() - 1);
    let logits = model.logits(&tokens).unwrap();
    for (i, score) in scores.iter().enumerate() {
        let row = &logits.values[i * logits.vocab_size..][..logits.vocab_size];
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        let want = f64::from(row[tokens[i + 1] as usize]) - sum.ln();
        assert!((f64::from(*score) - want).abs() < 1e-4);
    }
    let chunked = builder(fixture("tied"))
        .prefill_chunk(3)
        .load()
        .unwrap()
        .score(&tokens)
        .unwrap();
    assert!(max_difference(&scores, &chunked) < 1e-4);
}

#[test]
fn options_out_of_range_name_their_field() {
    let model = model();
    let cases = [
        (GenerateOptions::new().temperature(-0.1), "temperature"),
        (GenerateOptions::new().temperature(f32::NAN), "temperature"),
        (GenerateOptions::new().top_p(0.0), "top_p"),
        (GenerateOptions::new().top_p(1.5), "top_p"),
        (GenerateOptions::new().top_k(0), "top_k"),
        (GenerateOptions::new().min_p(-1.0), "min_p"),
        (
            GenerateOptions::new().repetition_penalty(0.0),
            "repetition_penalty",
        ),
        (GenerateOptions::new().max_new_tokens(0), "max_new_tokens"),
    ];
    for (options, key) in cases {
        let error = model
            .generate(Prompt::Tokens(prompt()), &options)
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.key()),
            (ErrorKind::InvalidArgument, Some(key))
        );
    }
}

#[test]
fn loading_and_dropping_ten_times_leaves_no_thread_behind() {
    let count = || std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    let first = model();
    drop(first);
    let before = count();
    for _ in 0..10 {
        let model = builder(fixture("tied")).threads(4).load().unwrap();
        model
            .generate(Prompt::Tokens(prompt()), &greedy(3))
            .unwrap();
    }
    // Other tests of this binary run beside this one and have threads of their own.
    assert!(count() < before + 30, "threads are left behind");
}

#[test]
fn a_prompt_read_in_chunks_gives_the_same_answer() {
    let tokens: Vec<u32> = (0..60).map(|i| 10 + i % 200).collect();
    let whole = model()
        .generate(Prompt::Tokens(tokens.clone()), &greedy(10))
        .unwrap();
    for chunk in [1, 7, 59] {
        let model = builder(fixture("tied"))
            .prefill_chunk(chunk)
            .load()
            .unwrap();
        let generation = model
            .generate(Prompt::Tokens(tokens.clone()), &greedy(10))
            .unwrap();
        assert_eq!(generation.tokens, whole.tokens, "chunks of {chunk}");
    }
}
