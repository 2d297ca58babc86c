//! `qwen2 perplexity`: how well a model foretells a text.

use std::fs;

use serde_json::json;

use crate::args::PerplexityArgs;
use crate::failure::Failure;
use crate::{load, output};

/// llama.cpp's and Hugging Face's usual window.
const WINDOW: usize = 2048;

pub(crate) fn run(args: &PerplexityArgs) -> Result<(), Failure> {
    let text = fs::read_to_string(&args.text).map_err(|error| {
        Failure::new(
            format!("cannot be read: {}: {error}", args.text.display()),
            "give a text file in UTF-8",
        )
    })?;
    let model = load::load(Some(&args.model), &args.load)?;
    let tokens = model.tokenizer().encode(&text)?;
    let window = args.window.unwrap_or(WINDOW.min(model.context_length()));
    let stride = args.stride.unwrap_or((window / 2).max(1));
    let found = model.perplexity(&tokens, window, stride)?;
    match args.json {
        true => output::print_json(&json!({
            "perplexity": found.perplexity,
            "nll": found.nll,
            "n_tokens": found.n_tokens,
            "window": window,
            "stride": stride,
        })),
        false => output::print(&format!(
            "{:.4} over {} tokens, windows of {window} every {stride}\n",
            found.perplexity, found.n_tokens
        )),
    }
}
