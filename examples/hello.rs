//! The shortest program: a question in, an answer out.
//!
//! `cargo run --release -p qwen2-core --example hello [MODEL]`

use qwen2_core::{GenerateOptions, Message, Model};

fn main() -> qwen2_core::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "examples/demo-model".to_owned());
    let model = Model::load(model)?;
    let answer = model.chat(&[Message::user("What is 12 plus 30?")], &GenerateOptions::greedy())?;
    println!("{}", answer.text);
    Ok(())
}
