//! What goes where: text and JSON to stdout, everything about them to stderr.

use std::io::{self, IsTerminal, Read, Write};

use qwen2_core::{FinishReason, Generation, Message, Piece};
use serde_json::{Value, json};

use crate::failure::Failure;

/// Writes to stdout at once: a piece of an answer must not wait for the next one.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}

/// One JSON object on a line of its own.
pub(crate) fn print_json(value: &Value) -> Result<(), Failure> {
    print(&format!("{value}\n"))
}

/// One line to stderr; nobody is there to tell if that fails.
pub(crate) fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

pub(crate) fn stderr_is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// Prints the pieces as they come and ends the line.
pub(crate) fn print_pieces(
    pieces: impl Iterator<Item = qwen2_core::Result<Piece>>,
) -> Result<(), Failure> {
    let mut outcome = Ok(());
    for piece in pieces {
        match piece {
            Ok(piece) if piece.text.is_empty() => {}
            Ok(piece) => print(&piece.text)?,
            Err(error) => outcome = Err(error.into()), // the last item
        }
    }
    print("\n")?;
    outcome
}

/// The line about an answer, for people: `[12 tokens, 34.5 tokens/s]`.
pub(crate) fn summary(generation: &Generation) -> String {
    let end = match generation.finish_reason {
        FinishReason::Stop => String::new(),
        reason => format!(", ended by {}", reason.name()),
    };
    let n = generation.usage.completion_tokens;
    let rate = generation.timings.decode_tokens_per_s;
    format!("[{n} tokens, {rate:.1} tokens/s{end}]")
}

/// The object of `--json`; its keys are documented in docs/command-line.md.
pub(crate) fn generation_json(generation: &Generation) -> Value {
    let (usage, timings) = (&generation.usage, &generation.timings);
    let mut object = json!({
        "text": generation.text,
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason.name(),
        "stop_match": generation.stop_match,
        "seed": generation.seed,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        },
        "timings": {
            "prefill_s": timings.prefill.as_secs_f64(),
            "decode_s": timings.decode.as_secs_f64(),
            "prefill_tokens_per_s": timings.prefill_tokens_per_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
        },
    });
    if !generation.logprobs.is_empty() {
        object["logprobs"] = json!(generation.logprobs);
    }
    object
}

/// `text` itself, or for `-` what stdin holds, without the newline at its end.
pub(crate) fn text_or_stdin(text: &str) -> Result<String, Failure> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes)?;
    let mut text = utf8(bytes)?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// The text of bytes from stdin.
pub(crate) fn utf8(bytes: Vec<u8>) -> Result<String, Failure> {
    String::from_utf8(bytes).map_err(|error| {
        Failure::usage(
            format!("input is not UTF-8: {}", error.utf8_error()),
            "convert it first",
        )
    })
}

/// A conversation of one message, behind instructions if there are any.
pub(crate) fn messages(system: Option<&str>, user: String) -> Vec<Message> {
    system
        .map(Message::system)
        .into_iter()
        .chain([Message::user(user)])
        .collect()
}

/// A size for people, in powers of ten: `987 B`, `1.5 kB`, `15.2 GB`.
pub(crate) fn human_bytes(bytes: u64) -> String {
    human(bytes, &["B", "kB", "MB", "GB", "TB"])
}

/// A count for people: `494.0 M`.
pub(crate) fn human_count(count: u64) -> String {
    human(count, &["", "k", "M", "B", "T"])
        .trim_end()
        .to_owned()
}

fn human(value: u64, units: &[&str]) -> String {
    let mut scaled = value as f64;
    let mut unit = 0;
    while scaled >= 999.95 && unit + 1 < units.len() {
        scaled /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{value} {}", units[0]),
        _ => format!("{scaled:.1} {}", units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.0 kB"),
            (999_960, "1.0 MB"),
            (15_230_000_000, "15.2 GB"),
        ] {
            assert_eq!(human_bytes(bytes), text);
        }
        assert_eq!(human_count(494_032_768), "494.0 M");
        assert_eq!(human_count(7), "7");
    }
}
