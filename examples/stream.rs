//! Text as it comes, and what it took.
//!
//! `cargo run --release -p qwen2-core --example stream [MODEL]`

use std::io::Write;

use qwen2_core::{GenerateOptions, Message, Model};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "examples/demo-model".to_owned());
    let model = Model::load(model)?;
    let mut stream = model.stream([Message::user("Count from 5 to 15.")], &GenerateOptions::greedy())?;
    for piece in &mut stream {
        print!("{}", piece?);
        std::io::stdout().flush()?;
    }
    let answer = stream.finish()?;
    println!();
    eprintln!("{} tokens, {:.1} tokens/s", answer.usage.completion_tokens, answer.timings.decode_tokens_per_s);
    Ok(())
}
