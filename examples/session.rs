//! A conversation of two turns: the second one only reads what is new.
//!
//!     cargo run --release -p qwen2-core --example session [MODEL]
#![allow(clippy::print_stdout)] // a program prints

use qwen2_core::{GenerateOptions, Message, Model, Result};

fn main() -> Result<()> {
    let directory = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "examples/demo-model".to_owned());
    let mut session = Model::load(directory)?.session();
    let options = GenerateOptions::greedy().max_new_tokens(24);
    for question in ["What is 2 + 3?", "What is 7 - 4?"] {
        session.append([Message::user(question)])?;
        let answer = session.generate(&options)?;
        println!("> {question}\n{}", answer.text);
        println!(
            "({} of {} tokens were read before)",
            answer.usage.cached_tokens, answer.usage.prompt_tokens
        );
    }
    Ok(())
}
