//! Prints an answer as it comes.
//!
//!     cargo run --release -p qwen2-core --example stream [MODEL [QUESTION]]
#![allow(clippy::print_stdout, clippy::print_stderr)] // a program prints

use std::error::Error;
use std::io::Write;

use qwen2_core::{GenerateOptions, Message, Model};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments
        .next()
        .unwrap_or_else(|| "examples/demo-model".to_owned());
    let question = arguments
        .next()
        .unwrap_or_else(|| "Count from 3 to 9.".to_owned());

    let model = Model::load(directory)?;
    let options = GenerateOptions::new().max_new_tokens(64);
    // Dropping the stream stops it; its cancel_token() does so from another thread.
    let mut stream = model.stream([Message::user(question)], &options)?;
    for piece in &mut stream {
        print!("{}", piece?);
        std::io::stdout().flush()?;
    }
    println!();
    let answer = stream.finish()?;
    eprintln!("ended by {}", answer.finish_reason.name());
    Ok(())
}
