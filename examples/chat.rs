//! Answers a conversation and says what it took.
//!
//!     cargo run --release -p qwen2-core --example chat [MODEL [QUESTION]]
#![allow(clippy::print_stdout, clippy::print_stderr)] // a program prints

use std::ops::ControlFlow;

use qwen2_core::{Error, GenerateOptions, Message, Model, Progress, Result};

fn main() {
    if let Err(error) = run() {
        eprintln!("{error}");
        if let Some(help) = error.help() {
            eprintln!("help: {help}");
        }
        std::process::exit(1);
    }
}

fn run() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments
        .next()
        .unwrap_or_else(|| "examples/demo-model".to_owned());
    let question = arguments
        .next()
        .unwrap_or_else(|| "What comes after Monday?".to_owned());

    let model = Model::builder(directory).progress(show).load()?;
    eprintln!();

    let messages = [
        Message::system("You are a helpful assistant."),
        Message::user(question),
    ];
    let options = GenerateOptions::new().max_new_tokens(32).temperature(0.0);
    let answer = model.chat(&messages, &options)?;
    println!("{}", answer.text);
    eprintln!(
        "{} tokens read, {} written, {:.0} tokens/s",
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
        answer.timings.decode_tokens_per_s
    );
    Ok(())
}

fn show(progress: Progress) -> ControlFlow<()> {
    let share = progress.bytes_done as f64 / progress.bytes_total.max(1) as f64;
    eprint!("\rloading: {:3.0} %", 100.0 * share);
    ControlFlow::Continue(())
}
