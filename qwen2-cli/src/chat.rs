//! `qwen2 chat`: a conversation, one line a message.

use std::io::{self, BufRead, IsTerminal, Write};

use qwen2_core::{GenerateOptions, Model, Session};

use crate::args::ChatArgs;
use crate::failure::Failure;
use crate::interrupt::Guard;
use crate::{load, output};

pub(crate) fn run(args: &ChatArgs) -> Result<(), Failure> {
    let model = load::load(args.model.as_deref(), &args.load)?;
    let interactive = io::stdin().is_terminal();
    if interactive {
        greet(args, &model);
    }
    let mut chat = Chat {
        args,
        options: args.sample.options(),
        session: model.session(),
        model,
    };
    let mut failed = false;
    while let Some(line) = read_line(interactive)? {
        match line.trim() {
            "" => {}
            "/exit" => break,
            "/reset" => chat.session = chat.model.session(),
            message => match chat.answer(message) {
                Ok(()) => {}
                Err(failure) if failure.is_silent() => return Err(failure),
                // The conversation goes on, as it was before this message.
                Err(failure) => {
                    failure.report();
                    failed = true;
                }
            },
        }
    }
    match failed && !interactive {
        // A script must learn of it; the lines were printed when it happened.
        true => Err(Failure::reported()),
        false => Ok(()),
    }
}

fn greet(args: &ChatArgs, model: &Model) {
    let name = if args.model.is_some() {
        model.name()
    } else {
        "the demo model"
    };
    output::note(&format!(
        "{name} on {}; /reset starts over, /exit or Ctrl-D ends",
        model.device()
    ));
    if args.model.is_none() {
        output::note("it adds, subtracts, compares, counts and repeats; try: What is 12 plus 30?");
    }
}

/// The next message, or `None` at the end of the input.
fn read_line(interactive: bool) -> Result<Option<String>, Failure> {
    if interactive {
        let mut stderr = io::stderr();
        let _ = stderr.write_all(b"> ").and_then(|()| stderr.flush());
    }
    let mut line = Vec::new();
    match io::stdin().lock().read_until(b'\n', &mut line)? {
        0 => Ok(None),
        _ => Ok(Some(output::utf8(line)?)),
    }
}

struct Chat<'a> {
    args: &'a ChatArgs,
    options: GenerateOptions,
    model: Model,
    session: Session,
}

impl Chat<'_> {
    /// Answers one message; on failure the conversation is as it was before.
    fn answer(&mut self, message: &str) -> Result<(), Failure> {
        let before = self.session.messages().to_vec();
        self.try_answer(message).inspect_err(|_| {
            self.session = self.model.session();
            if !before.is_empty() {
                // It fitted before, so it fits now.
                let _ = self.session.append(before);
            }
        })
    }

    fn try_answer(&mut self, message: &str) -> Result<(), Failure> {
        let first = self.session.messages().is_empty();
        let system = self.args.system.as_deref().filter(|_| first);
        self.session
            .append(output::messages(system, message.to_owned()))?;
        let guard = Guard::new();
        let options = self.options.clone().cancel(guard.token());
        let mut stream = self.session.stream(&options)?;
        if self.args.json {
            return output::print_json(&output::generation_json(&stream.finish()?));
        }
        output::print_pieces(&mut stream)?;
        output::note(&output::summary(&stream.finish()?));
        Ok(())
    }
}
