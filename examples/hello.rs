//! Loads a model and asks it one question.
//!
//!     cargo run --release -p qwen2-core --example hello [MODEL]
#![allow(clippy::print_stdout)] // a program prints

use qwen2_core::{GenerateOptions, Message, Model};

fn main() -> qwen2_core::Result<()> {
    let directory = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "examples/demo-model".to_owned());
    let model = Model::load(directory)?;
    let answer = model.chat(&[Message::user("What is 2 + 3?")], &GenerateOptions::new())?;
    println!("{}", answer.text);
    Ok(())
}
