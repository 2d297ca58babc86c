//! The part of `qwen2 bench` with many requests at once: an engine's speed, and how long a short prompt
//! waits behind a long one.

use std::time::Instant;

use qwen2_core::{Engine, GenerateOptions, Model, RequestStream};
use serde_json::{Value, json};

use crate::bandwidth::median;
use crate::failure::Failure;

/// Tokens of a short prompt, and of the long one before it.
const SHORT: usize = 16;
const LONG: usize = 4096;
const REPEAT: usize = 3;

/// `n` streams of `new` tokens each beside one alone; the wait of a short prompt.
pub(crate) fn measure(model: &Model, n: usize, new: usize) -> Result<Value, Failure> {
    let engine = model
        .engine()
        .max_sequences(n + 1)
        .prefix_cache(false)
        .build()?;
    let (mut one, mut many) = (Vec::new(), Vec::new());
    for _ in 0..REPEAT {
        one.push(tokens_per_s(&engine, 1, new)?);
        many.push(tokens_per_s(&engine, n, new)?);
    }
    let (one, many) = (median(one), median(many));
    let long = LONG.min(model.context_length() - new);
    let (mut alone, mut behind) = (Vec::new(), Vec::new());
    for _ in 0..REPEAT {
        while engine.stats().running > 0 {
            std::thread::yield_now(); // the long prompt of the last round leaves
        }
        alone.push(first_token_s(&engine)?);
        let first = submit(&engine, long, 0, 1)?;
        let steps = engine.stats().steps;
        while engine.stats().steps < steps + 2 {
            std::thread::yield_now();
        }
        behind.push(first_token_s(&engine)?);
        drop(first);
    }
    let (alone, behind) = (median(alone), median(behind));
    Ok(json!({
        "streams": n,
        "tokens_per_s": many,
        "alone_tokens_per_s": one,
        "speedup": many / one,
        "short_first_token_s": behind,
        "short_alone_first_token_s": alone,
        "short_wait": behind / alone,
    }))
}

/// Tokens of all streams in a second, from when all have begun.
fn tokens_per_s(engine: &Engine, n: usize, new: usize) -> Result<f64, Failure> {
    let mut streams = (0..n)
        .map(|seed| submit(engine, SHORT, seed, new))
        .collect::<Result<Vec<_>, _>>()?;
    for stream in &mut streams {
        stream.next().transpose()?;
    }
    let (start, before) = (Instant::now(), engine.stats().completion_tokens);
    for stream in streams {
        stream.finish()?;
    }
    let tokens = engine.stats().completion_tokens - before;
    Ok(tokens as f64 / start.elapsed().as_secs_f64())
}

fn first_token_s(engine: &Engine) -> Result<f64, Failure> {
    let start = Instant::now();
    let mut stream = submit(engine, SHORT, 1, 2)?;
    stream.next().transpose()?;
    Ok(start.elapsed().as_secs_f64())
}

fn submit(
    engine: &Engine,
    n_prompt: usize,
    seed: usize,
    new: usize,
) -> Result<RequestStream, Failure> {
    let vocab_size = engine.model().config().vocab_size;
    let prompt: Vec<u32> = (0..n_prompt)
        .map(|i| ((i * 7919 + 13 + seed * 104_729) % vocab_size) as u32)
        .collect();
    let options = GenerateOptions::greedy()
        .max_new_tokens(new)
        .ignore_eos(true);
    Ok(engine.submit(prompt, &options)?)
}
