//! The command `qwen2`: a user of the library's public interface, one file for each command.

mod args;
mod bandwidth;
mod bench;
mod chat;
mod convert;
mod demo;
mod failure;
mod generate;
mod info;
mod interrupt;
mod load;
mod output;
mod perplexity;
mod quantize;
#[cfg(feature = "serve")]
mod serve;
mod streams;
mod tokenize;

use std::ffi::OsString;

use clap::Parser;

use args::{Cli, Command};
use failure::Failure;

/// Runs the command that `args` say, the first of them being the program's name, and returns its
/// exit code: 0 for success, 1 for an error, 2 for wrong usage, 130 if Ctrl-C ended it.
///
/// Text goes to stdout, everything else to stderr. No signal handler is installed; see
/// [`run_program`].
pub fn run<I: IntoIterator<Item = OsString>>(args: I) -> i32 {
    parse(args).map_or_else(|code| code, |command| execute(&command))
}

/// As [`run`], for a process that is this command and nothing else: Ctrl-C stops the answer that
/// is being written, and the program only where there is none.
pub fn run_program<I: IntoIterator<Item = OsString>>(args: I) -> i32 {
    parse(args).map_or_else(
        |code| code,
        |command| {
            // A server has signal handlers of its own.
            if !command.is_server() {
                interrupt::install();
            }
            execute(&command)
        },
    )
}

/// The command, or the exit code of a program that has none to run.
fn parse<I: IntoIterator<Item = OsString>>(args: I) -> Result<Command, i32> {
    match Cli::try_parse_from(args) {
        Ok(cli) => Ok(cli.command),
        Err(error) => {
            // Help and version are "errors" of clap that it prints to stdout with code 0.
            let _ = error.print();
            Err(error.exit_code())
        }
    }
}

fn execute(command: &Command) -> i32 {
    let outcome = match command {
        Command::Chat(args) => chat::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Info(args) => info::run(args),
        Command::Tokenize(args) => tokenize::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Convert(args) => convert::run(args),
        Command::MergeLora(args) => convert::merge(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Bench(args) => bench::run(args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(args),
    };
    outcome.map_or_else(Failure::report, |()| 0)
}
