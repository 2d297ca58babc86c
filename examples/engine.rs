//! Answers several questions at once; one thread reads each answer as it comes.
//!
//!     cargo run --release -p qwen2-core --example engine [MODEL [QUESTION ...]]
#![allow(clippy::print_stdout, clippy::print_stderr)] // a program prints

use std::error::Error;

use qwen2_core::{Engine, GenerateOptions, Message, Model, Request};

const QUESTIONS: [&str; 3] = [
    "Count from 3 to 9.",
    "What is 2 plus 3?",
    "What day comes after Monday?",
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments
        .next()
        .unwrap_or_else(|| "examples/demo-model".to_owned());
    let mut questions: Vec<String> = arguments.collect();
    if questions.is_empty() {
        questions.extend(QUESTIONS.map(String::from));
    }

    let engine = Model::load(directory)?.engine().build()?;
    std::thread::scope(|scope| {
        let answers: Vec<_> = questions
            .iter()
            .map(|question| scope.spawn(|| answer(&engine, question)))
            .collect();
        for (question, answer) in questions.iter().zip(answers) {
            match answer.join() {
                Ok(Ok(answer)) => println!("{question} {answer}"),
                Ok(Err(error)) => eprintln!("{question} {error}"),
                Err(_) => eprintln!("{question} its thread panicked"),
            }
        }
    });
    let stats = engine.stats();
    eprintln!(
        "{} tokens in {} steps",
        stats.completion_tokens, stats.steps
    );
    Ok(())
}

fn answer(engine: &Engine, question: &str) -> qwen2_core::Result<String> {
    let options = GenerateOptions::greedy().max_new_tokens(64);
    let request = Request::new([Message::user(question)], &options);
    let mut text = String::new();
    // Dropping the stream ends its own request and no other.
    for piece in engine.submit_request(request)? {
        text.push_str(&piece?.text);
    }
    Ok(text)
}
