//! A constraint's source to the library's parser, within bounds.

use llguidance::Matcher;
use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::{Value, json};

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

/// # Errors
/// `InvalidConstraint`, `Unsupported` for a vocabulary without constraints.
pub(crate) fn compile(tokenizer: &Tokenizer, constraint: &Constraint) -> Result<Matcher> {
    let factory = tokenizer.constraints()?;
    let source = source(&constraint.0)?;
    let parser = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("qwen2-constraint".to_owned())
            .stack_size(STACK_SIZE)
            .spawn_scoped(scope, || {
                fenced(|| factory.create_parser(source).map_err(|e| format!("{e:#}")))
                    .unwrap_or_else(Err)
            });
        let thread = thread.map_err(|error| {
            Error::new(ErrorKind::OutOfMemory, "no thread for the constraint")
                .with_why(error.to_string())
                .with_source(error)
        })?;
        let outcome = thread.join().unwrap_or_else(|_| Err("panicked".to_owned()));
        outcome.map_err(|why| invalid(&constraint.0, one_line(&why)))
    })?;
    Ok(Matcher::new(Ok(parser)))
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
        Form::Grammar(text) => Ok(TopLevelGrammar::from_lark(text.clone())),
        Form::Choice(choices) => choice(form, choices),
    }
}

fn schema(form: &Form, text: &str) -> Result<Value> {
    let mut schema: Value =
        serde_json::from_str(text).map_err(|error| invalid(form, error.to_string()))?;
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
