//! `qwen2 generate`: continues a text, or answers one message.

use qwen2_core::{FinishReason, Prompt};

use crate::args::GenerateArgs;
use crate::failure::Failure;
use crate::interrupt::Guard;
use crate::{load, output};

pub(crate) fn run(args: &GenerateArgs) -> Result<(), Failure> {
    let text = output::text_or_stdin(&args.prompt)?;
    let prompt = match args.chat {
        true => Prompt::Chat(output::messages(args.system.as_deref(), text)),
        false => Prompt::Text(text),
    };
    let model = load::load(Some(&args.model), &args.load)?;
    let guard = Guard::new();
    let mut stream = model.stream(prompt, &args.sample.options().cancel(guard.token()))?;
    let generation = if args.json {
        let generation = stream.finish()?;
        output::print_json(&output::generation_json(&generation))?;
        generation
    } else {
        output::print_pieces(&mut stream)?;
        let generation = stream.into_generation();
        output::note(&output::summary(&generation));
        generation
    };
    match generation.finish_reason {
        FinishReason::Cancelled => Err(Failure::interrupted()),
        _ => Ok(()),
    }
}
