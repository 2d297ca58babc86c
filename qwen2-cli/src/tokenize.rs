//! `qwen2 tokenize`: text to tokens and back.

use std::path::Path;

use qwen2_core::Tokenizer;
use serde_json::json;

use crate::args::{LoadArgs, TokenizeArgs};
use crate::failure::Failure;
use crate::{load, output};

pub(crate) fn run(args: &TokenizeArgs) -> Result<(), Failure> {
    let text = output::text_or_stdin(&args.text)?;
    let tokenizer = tokenizer(args)?;
    if args.decode {
        return decode(&tokenizer, &text, args.json);
    }
    let tokens = match args.chat {
        true => tokenizer.encode_chat(&output::messages(None, text), true)?,
        false => tokenizer.encode(&text)?,
    };
    let pieces = tokens
        .iter()
        .map(|&id| tokenizer.decode(&[id], false))
        .collect::<Result<Vec<_>, _>>()?;
    if args.json {
        return output::print_json(
            &json!({ "tokens": tokens, "pieces": pieces, "count": tokens.len() }),
        );
    }
    let lines = tokens
        .iter()
        .zip(&pieces)
        .map(|(id, piece)| format!("{id}\t{piece:?}\n"));
    output::print(&lines.collect::<String>())
}

fn decode(tokenizer: &Tokenizer, ids: &str, json: bool) -> Result<(), Failure> {
    let separators = |c: char| c.is_whitespace() || matches!(c, ',' | '[' | ']');
    let tokens = ids
        .split(separators)
        .filter(|id| !id.is_empty())
        .map(id)
        .collect::<Result<Vec<_>, _>>()?;
    let text = tokenizer.decode(&tokens, false)?;
    match json {
        true => {
            output::print_json(&json!({ "tokens": tokens, "text": text, "count": tokens.len() }))
        }
        false => output::print(&format!("{text}\n")),
    }
}

fn id(text: &str) -> Result<u32, Failure> {
    text.parse().map_err(|_| {
        Failure::usage(
            format!("not a token id: `{}`", text.escape_debug()),
            "give numbers, as in 9707,11",
        )
    })
}

/// The tokenizer of a path, without its weights; of anything else, that of the loaded model.
fn tokenizer(args: &TokenizeArgs) -> Result<Tokenizer, Failure> {
    let path = Path::new(&args.model);
    if path.exists() {
        return Ok(Tokenizer::load(path)?);
    }
    Ok(load::load(
        Some(&args.model),
        &LoadArgs {
            device: "cpu".to_owned(),
            ..LoadArgs::default()
        },
    )?
    .tokenizer()
    .clone())
}
