//! A constraint's source to the library's parser, within bounds.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::{Matcher, TokenParser};
use serde_json::{Value, json};

use super::bounds::{check_grammar, check_schema};
use super::constraint::{Form, WHITE_SPACE};
use crate::error::{Error, ErrorKind, Result};
use crate::fence::fenced;
use crate::generate::Constraint;
use crate::text::Tokenizer;

/// Longest source, the texts of a choice together. Far above what a prompt would explain.
const MAX_SOURCE: usize = 256 << 10;
const MAX_CHOICES: usize = 4096;
/// The library's parsers recurse: a source of nothing but brackets must not overflow the caller's
/// stack. The pages are only touched when needed.
const STACK_SIZE: usize = 256 << 20;
/// What of the library's message is kept; it may quote the grammar.
const MAX_MESSAGE: usize = 500;

/// How long a source may take.
const MAX_TIME: Duration = Duration::from_secs(10);
/// Sources that took longer and are worked on still: nothing can stop the library, so that there must not be
/// many of them.
const MAX_OVERDUE: usize = 2;
static OVERDUE: AtomicUsize = AtomicUsize::new(0);

/// What the thread that works on a source, and the one that waits for it, tell each other.
#[derive(Default)]
struct Desk {
    state: Mutex<State>,
    done: Condvar,
}

#[derive(Default)]
struct State {
    outcome: Option<Result<TokenParser, String>>,
    /// Nobody waits any more.
    overdue: bool,
}

/// # Errors
/// `InvalidConstraint`, `Unsupported` for a vocabulary without constraints.
pub(crate) fn compile(tokenizer: &Tokenizer, constraint: &Constraint) -> Result<Matcher> {
    tokenizer.constraints()?;
    let form = &constraint.0;
    let source = source(form)?;
    if OVERDUE.load(Ordering::Acquire) >= MAX_OVERDUE {
        let why = format!("{MAX_OVERDUE} others take longer than they may, and are not done yet");
        return Err(invalid(form, why));
    }
    let tokenizer = tokenizer.clone();
    let work = move || match tokenizer.constraints() {
        Ok(factory) => fenced(|| factory.create_parser(source).map_err(|e| format!("{e:#}")))
            .unwrap_or_else(Err),
        Err(error) => Err(error.to_string()),
    };
    match in_time(MAX_TIME, work)? {
        Some(parser) => {
            let parser = parser.map_err(|why| invalid(form, one_line(&why)))?;
            Ok(Matcher::new(Ok(parser)))
        }
        None => {
            let why = format!("it takes longer than {} s to compile", MAX_TIME.as_secs());
            Err(invalid(form, why))
        }
    }
}

/// What `work` gives on a thread of its own; `None`, and the thread is left to itself, where it takes longer.
fn in_time(
    time: Duration,
    work: impl FnOnce() -> Result<TokenParser, String> + Send + 'static,
) -> Result<Option<Result<TokenParser, String>>> {
    let desk = Arc::<Desk>::default();
    let theirs = desk.clone();
    let body = move || {
        let outcome = work();
        let mut state = theirs.lock();
        match state.overdue {
            true => _ = OVERDUE.fetch_sub(1, Ordering::AcqRel),
            false => state.outcome = Some(outcome),
        }
        theirs.done.notify_one();
    };
    let thread = std::thread::Builder::new()
        .name("qwen2-constraint".to_owned())
        .stack_size(STACK_SIZE)
        .spawn(body)
        .map_err(|error| {
            Error::new(ErrorKind::OutOfMemory, "no thread for the constraint")
                .with_why(error.to_string())
                .with_source(error)
        })?;
    let waited = desk
        .done
        .wait_timeout_while(desk.lock(), time, |state| state.outcome.is_none());
    let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
    let outcome = state.outcome.take();
    if outcome.is_none() {
        state.overdue = true;
        OVERDUE.fetch_add(1, Ordering::AcqRel);
        return Ok(None);
    }
    drop(state);
    // It has nothing left to do, and cannot have panicked: it is fenced.
    let _ = thread.join();
    Ok(outcome)
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside the few lines that hold it leaves nothing half-done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The library's form of the source.
fn source(form: &Form) -> Result<TopLevelGrammar> {
    let len = match form {
        Form::JsonSchema(text) | Form::Regex(text) | Form::Grammar(text) => text.len(),
        Form::Choice(choices) => choices.iter().map(String::len).sum(),
    };
    if len > MAX_SOURCE {
        let why = format!("{len} bytes, the most is {MAX_SOURCE}");
        return Err(invalid(form, why));
    }
    match form {
        Form::JsonSchema(text) => Ok(TopLevelGrammar::from_json_schema(schema(form, text)?)),
        Form::Regex(text) => {
            // The library would drop it.
            let backslashes = text.len() - text.trim_end_matches('\\').len();
            match backslashes % 2 {
                0 => Ok(TopLevelGrammar::from_regex(text)),
                _ => Err(invalid(form, "it ends with half an escape".to_owned())),
            }
        }
        Form::Grammar(text) => {
            check_grammar(text).map_err(|why| invalid(form, why))?;
            Ok(TopLevelGrammar::from_lark(text.clone()))
        }
        Form::Choice(choices) => choice(form, choices),
    }
}

fn schema(form: &Form, text: &str) -> Result<Value> {
    let mut schema: Value =
        serde_json::from_str(text).map_err(|error| invalid(form, error.to_string()))?;
    check_schema(&schema).map_err(|why| invalid(form, why))?;
    if let Value::Object(keys) = &mut schema
        && !keys.contains_key("x-guidance")
    {
        keys.insert(
            "x-guidance".to_owned(),
            json!({"whitespace_pattern": WHITE_SPACE}),
        );
    }
    Ok(schema)
}

fn choice(form: &Form, choices: &[String]) -> Result<TopLevelGrammar> {
    let why = match choices.len() {
        0 => Some("the list is empty".to_owned()),
        n if n > MAX_CHOICES => Some(format!("{n} texts, the most is {MAX_CHOICES}")),
        _ => choices
            .iter()
            .position(String::is_empty)
            .map(|at| format!("text {at} is empty")),
    };
    if let Some(why) = why {
        return Err(invalid(form, why));
    }
    // Lark's strings have the escapes of JSON's.
    let texts: Vec<String> = choices.iter().map(|text| json!(text).to_string()).collect();
    let lark = format!("start: CHOICE\nCHOICE: {}", texts.join(" | "));
    Ok(TopLevelGrammar::from_grammar(GrammarWithLexer::from_lark(
        lark,
    )))
}

fn invalid(form: &Form, why: String) -> Error {
    let (what, help) = match form {
        Form::JsonSchema(_) => (
            "JSON schema cannot be used",
            "docs/structured-output.md lists the keywords; leave out those that need not hold",
        ),
        Form::Regex(_) => (
            "regular expression cannot be used",
            "the syntax is that of the regex crate, without anchors and look-around",
        ),
        Form::Grammar(_) => (
            "grammar cannot be used",
            "the syntax is llguidance's variant of Lark; the first rule is `start`",
        ),
        Form::Choice(_) => (
            "choice cannot be used",
            "give at least one text, none empty",
        ),
    };
    failed(what).with_why(why).with_help(help)
}

pub(crate) fn failed(what: &str) -> Error {
    Error::new(ErrorKind::InvalidConstraint, what).with_key("constraint")
}

/// A message of the library as a part of one line.
pub(crate) fn one_line(message: &str) -> String {
    let message = message.split("<backtrace>").next().unwrap_or_default();
    let message = message.replace("<non-verbose/>", "");
    let lines: Vec<&str> = message.lines().map(str::trim).collect();
    let text = lines.join(" ");
    match text.char_indices().nth(MAX_MESSAGE) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.trim().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The thread that is late is counted until it ends.
    #[test]
    fn what_takes_too_long_is_left_to_itself_and_counted() {
        let (go_on, wait) = std::sync::mpsc::channel();
        let late = move || {
            let _ = wait.recv();
            Err("late".to_owned())
        };
        let outcome = in_time(Duration::from_millis(20), late).expect("a thread");
        assert!(outcome.is_none());
        assert_eq!(OVERDUE.load(Ordering::Acquire), 1);
        go_on.send(()).expect("it waits");
        while OVERDUE.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        let soon = in_time(Duration::from_secs(60), || Err("soon".to_owned()));
        let soon = soon.expect("a thread").expect("in time");
        assert_eq!(soon.err().as_deref(), Some("soon"));
    }
}
