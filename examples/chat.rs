//! A conversation that the program keeps itself: all messages go in, the next answer comes out.
//!
//! `cargo run --release -p qwen2-core --example chat [MODEL]`

use qwen2_core::{GenerateOptions, Message, Model};

fn main() -> qwen2_core::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "examples/demo-model".to_owned());
    let model = Model::load(model)?;
    let options = GenerateOptions::greedy().max_new_tokens(64);
    let mut messages = vec![Message::system("You are a helpful assistant.")];
    for question in ["Which is larger, 7 or 9?", "Count from 3 to 8."] {
        messages.push(Message::user(question));
        let answer = model.chat(&messages, &options)?;
        println!("> {question}\n{}", answer.text);
        messages.push(Message::assistant(answer.text));
    }
    Ok(())
}
