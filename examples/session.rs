//! A conversation that keeps its cache: what was said is not read again.
//!
//! `cargo run --release -p qwen2-core --example session [MODEL]`

use qwen2_core::{GenerateOptions, Message, Model};

fn main() -> qwen2_core::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "examples/demo-model".to_owned());
    let model = Model::load(model)?;
    let options = GenerateOptions::greedy().max_new_tokens(64);
    let mut session = model.session();
    for question in ["What is 12 plus 30?", "What is 50 minus 8?"] {
        session.append([Message::user(question)])?;
        let answer = session.generate(&options)?;
        println!("> {question}\n{}", answer.text);
        println!("  {} prompt tokens, {} of them cached", answer.usage.prompt_tokens, answer.usage.cached_tokens);
    }
    Ok(())
}
