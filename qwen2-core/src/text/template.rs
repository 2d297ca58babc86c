//! A checkpoint's Jinja template, run within bounds.
//!
//! Steps, output and stack are bounded. Not bounded: a template that builds `[x, x]` dozens of
//! times over and then concatenates it with `~` or compares it; the engine gives no hook there.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind as JinjaKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::ser::Formatter;

use crate::config::one_line;
use crate::error::{Error, ErrorKind, Result};
use crate::text::strftime::strftime_now;

/// Longest text a template may print. Far above any context: 128k tokens are about half a MiB.
const MAX_OUTPUT: usize = 16 << 20;
/// Steps of the template engine: what a template may always use, what each byte of the messages
/// adds, and the most there can be. One step is one instruction or 64 bytes moved, so a chat of
/// 10,000 messages fits and an endless loop ends in a fraction of a second.
const BASE_FUEL: u64 = 500_000;
const BYTES_PER_FUEL: u64 = 8;
const MAX_FUEL: u64 = 2_500_000;
/// A list nested once per step is freed by as deep a recursion, about 50 bytes a level; such a
/// template would overflow the caller's stack. The pages are only touched when needed.
const STACK_SIZE: usize = 256 << 20;
const NAME: &str = "chat_template";

/// A template, compiled once. One that does not compile is kept with its error, so that the
/// tokenizer still serves plain text.
pub(super) struct ChatTemplate {
    source: String,
    compiled: std::result::Result<Environment<'static>, String>,
    knows_tools: bool,
}

/// What `raise_exception` leaves as the source of the engine's error.
#[derive(Debug)]
struct Raised;

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("raised by the template")
    }
}

impl std::error::Error for Raised {}

impl ChatTemplate {
    pub(super) fn new(source: String) -> Self {
        let mut environment = environment();
        let compiled = environment
            .add_template_owned(NAME, source.clone())
            .map_err(|error| one_line(&error.to_string()));
        let reads_tools = |environment: &Environment<'_>| {
            let template = environment.get_template(NAME);
            template.is_ok_and(|template| template.undeclared_variables(false).contains("tools"))
        };
        Self {
            source,
            knows_tools: compiled.is_ok() && reads_tools(&environment),
            compiled: compiled.map(|()| environment),
        }
    }

    /// Whether it reads the variable `tools`.
    pub(super) fn knows_tools(&self) -> bool {
        self.knows_tools
    }

    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// The text that the template prints; `input_len` is the length of all messages in bytes.
    ///
    /// # Errors
    /// `InvalidTemplate` when it does not compile, throws, runs or prints without end.
    pub(super) fn render(&self, context: &Value, input_len: usize) -> Result<String> {
        let environment = self.compiled.as_ref().map_err(|why| {
            invalid(why.clone())
                .with_help("the template is not valid Jinja; compare it with the original file")
        })?;
        let fuel = (BASE_FUEL + input_len as u64 / BYTES_PER_FUEL).min(MAX_FUEL);
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("qwen2-template".to_owned())
                .stack_size(STACK_SIZE)
                .spawn_scoped(scope, || run(environment, context, fuel));
            let thread = thread.map_err(|error| {
                Error::new(ErrorKind::OutOfMemory, "no thread for the chat template")
                    .with_why(error.to_string())
                    .with_source(error)
            })?;
            thread
                .join()
                .unwrap_or_else(|_| Err(invalid("the template engine panicked")))
        })
    }
}

fn run(environment: &Environment<'static>, context: &Value, fuel: u64) -> Result<String> {
    let mut environment = environment.clone();
    environment.set_fuel(Some(fuel));
    let mut output = Bounded::default();
    environment
        .get_template(NAME)
        .and_then(|template| template.render_captured_to(context.clone(), &mut output))
        .map_err(|error| translate(error, fuel))?;
    String::from_utf8(output.bytes).map_err(|error| invalid(error.to_string()))
}

/// The engine as transformers sets it up (`_compile_jinja_template`).
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    if let Ok(syntax) = syntax {
        environment.set_syntax(syntax);
    }
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(bounded_method);
    // The engine's own build the text of a container whole before they charge for it.
    environment.set_formatter(|out, state, value| match value.as_object() {
        Some(_) => Ok(out.write_str(&bounded_text(state, value)?)?),
        None => minijinja::escape_formatter(out, state, value),
    });
    environment.remove_filter("pprint");
    for name in ["string", "escape", "e"] {
        environment.add_filter(name, |state: &State, value: &Value| {
            bounded_text(state, value)
        });
    }
    environment.add_filter("join", join);
    environment.add_filter("tojson", tojson);
    environment.add_filter("split", split);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: &str| strftime_now(format));
    environment
}

fn raise_exception(message: &str) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(JinjaKind::InvalidOperation, message.to_owned()).with_source(Raised))
}

fn translate(error: minijinja::Error, fuel: u64) -> Error {
    let line = error
        .line()
        .map_or(String::new(), |line| format!(" (line {line})"));
    let detail = error.detail().unwrap_or_default();
    let raised = std::error::Error::source(&error).is_some_and(|source| source.is::<Raised>());
    match error.kind() {
        _ if raised => invalid(format!(
            "the template refuses these messages: {}{line}",
            one_line(detail)
        ))
        .with_help("send the roles in the order that this model's template expects"),
        JinjaKind::OutOfFuel => invalid(format!("it did not end within {fuel} steps{line}"))
            .with_help("the template loops or builds too much text; use the original file"),
        JinjaKind::WriteFailure => invalid(format!("it prints more than {MAX_OUTPUT} bytes"))
            .with_help("the template prints too much, or the messages are longer than any context"),
        _ => invalid(one_line(&error.to_string())).with_source(error),
    }
}

fn invalid(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidTemplate, "chat template failed")
        .with_key(NAME)
        .with_why(why)
}

/// Python's methods on strings, lists and dicts; those that can multiply text are charged before
/// they run, because the engine sees only their results.
fn bounded_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> std::result::Result<Value, minijinja::Error> {
    let too_much = || minijinja::Error::from(JinjaKind::OutOfFuel);
    let text = match value.as_str() {
        Some(text) if value.kind() == ValueKind::String => text,
        _ => return unknown_method_callback(state, value, method, args),
    };
    state.consume_fuel(text.len() as u64 / 64)?;
    match (method, args) {
        ("join", [items]) => return state.apply_filter("join", &[items.clone(), value.clone()]),
        ("split" | "splitlines", _) => state.consume_fuel(text.len() as u64 / 16)?,
        ("replace", [old, new, ..]) => {
            let (old, new) = (
                old.as_str().unwrap_or_default(),
                new.as_str().unwrap_or_default(),
            );
            let grown = text.matches(old).count().saturating_mul(new.len());
            if grown > MAX_OUTPUT {
                return Err(too_much());
            }
        }
        ("format", _) if args.iter().any(|arg| arg.as_object().is_some()) => {
            return Err(minijinja::Error::new(
                JinjaKind::InvalidOperation,
                "format takes strings and numbers here",
            ));
        }
        // A width as in "{:999999999}" is an allocation of that size.
        ("format", _)
            if text
                .split(|c: char| !c.is_ascii_digit())
                .any(|run| run.len() > 4) =>
        {
            return Err(too_much());
        }
        _ => {}
    }
    unknown_method_callback(state, value, method, args)
}

/// The built-in filter, charged before it makes a list of the whole text.
fn split(
    state: &State,
    value: &Value,
    separator: Option<Arc<str>>,
    max_splits: Option<i64>,
) -> std::result::Result<Value, minijinja::Error> {
    state.consume_fuel(value.as_str().map_or(0, str::len) as u64 / 16)?;
    minijinja::filters::split(value, separator, max_splits)
}

/// The text of a value, charged and never longer than a template may print: `[x, x]` a few dozen
/// times over is a small value with a text beyond all memory.
fn bounded_text(state: &State, value: &Value) -> std::result::Result<String, minijinja::Error> {
    let mut output = Bounded::default();
    write!(output, "{value}").map_err(|_| minijinja::Error::from(JinjaKind::OutOfFuel))?;
    state.consume_fuel(output.bytes.len() as u64 / 16)?;
    Ok(String::from_utf8_lossy(&output.bytes).into_owned())
}

fn join(
    state: &State,
    items: &Value,
    separator: Option<&str>,
    options: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let attribute = options.get::<Option<&str>>("attribute")?;
    options.assert_all_used()?;
    let mut joined = String::new();
    for (position, item) in items.try_iter()?.enumerate() {
        if position > 0 {
            joined.push_str(separator.unwrap_or_default());
        }
        joined.push_str(&match attribute {
            Some(name) => bounded_text(state, &item.get_attr(name)?)?,
            None => bounded_text(state, &item)?,
        });
        state.consume_fuel(1 + separator.map_or(0, str::len) as u64 / 16)?;
    }
    Ok(joined)
}

/// `json.dumps` as transformers' filter calls it: no HTML escapes, non-ASCII kept unless asked.
fn tojson(
    state: &State,
    value: &Value,
    options: Kwargs,
) -> std::result::Result<Value, minijinja::Error> {
    let ascii = options
        .get::<Option<bool>>("ensure_ascii")?
        .unwrap_or(false);
    let indent = options.get::<Option<usize>>("indent")?;
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let separators = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        _ if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        _ => (", ".to_owned(), ": ".to_owned()),
    };
    let formatter = PythonJson {
        ascii,
        separators,
        indent: indent.map(|n| " ".repeat(n.min(64))),
        depth: 0,
        has_value: false,
    };
    let mut output = Bounded::default();
    let mut serializer = serde_json::Serializer::with_formatter(&mut output, formatter);
    let written = if sort_keys {
        serde_json::to_value(value).and_then(|mut sorted| {
            sorted.sort_all_objects();
            sorted.serialize(&mut serializer)
        })
    } else {
        value.serialize(&mut serializer)
    };
    written.map_err(|error| {
        minijinja::Error::new(JinjaKind::BadSerialization, format!("tojson: {error}"))
    })?;
    state.consume_fuel(output.bytes.len() as u64 / 4)?;
    Ok(Value::from(
        String::from_utf8_lossy(&output.bytes).into_owned(),
    ))
}

/// As Python's `json.dumps(value, ensure_ascii=False)`.
pub(super) fn python_json(value: &serde_json::Value) -> String {
    let formatter = PythonJson {
        ascii: false,
        separators: (", ".to_owned(), ": ".to_owned()),
        indent: None,
        depth: 0,
        has_value: false,
    };
    let mut output = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut output, formatter);
    // Writing a JSON value to memory does not fail.
    let _ = value.serialize(&mut serializer);
    String::from_utf8_lossy(&output).into_owned()
}

/// The layout of Python's `json.dumps`.
struct PythonJson {
    ascii: bool,
    separators: (String, String),
    indent: Option<String>,
    depth: usize,
    has_value: bool,
}

impl PythonJson {
    fn new_line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        if let Some(indent) = &self.indent {
            writer.write_all(b"\n")?;
            for _ in 0..self.depth {
                writer.write_all(indent.as_bytes())?;
            }
        }
        Ok(())
    }

    fn begin<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        writer.write_all(bracket)
    }

    fn end<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.new_line(writer)?;
        }
        self.has_value = true;
        writer.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.separators.0.as_bytes())?;
        }
        self.new_line(writer)
    }
}

impl Formatter for PythonJson {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.item(w, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.item(w, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.separators.1.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        w: &mut W,
        text: &str,
    ) -> io::Result<()> {
        if !self.ascii {
            return w.write_all(text.as_bytes());
        }
        for c in text.chars() {
            if c.is_ascii() {
                write!(w, "{c}")?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(w, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

/// Memory that refuses to grow beyond `MAX_OUTPUT`.
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "too much output",
            ));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use minijinja::context;
    use std::time::{Duration, Instant};

    fn render(template: &str) -> Result<String> {
        let tools =
            serde_json::json!([{"name": "f", "x": "<é>\n", "n": [1, 2.5, null, true], "e": []}]);
        let context = context! { word => "Hello World", tools => Value::from(minijinja::value::Serde(tools)) };
        ChatTemplate::new(template.to_owned()).render(&context, 0)
    }

    #[test]
    fn values_print_as_in_python() {
        let cases = [
            (
                "{{ true }} {{ none }} {{ 3 / 2 }} {{ missing }}|",
                "True None 1.5 |",
            ),
            (
                "{{ word.upper() }} {{ word.split(' ')[-1] }}",
                "HELLO WORLD World",
            ),
            (
                "{{ word.replace('l', 'L') }} {{ '-'.join(['a', 'b']) }}",
                "HeLLo WorLd a-b",
            ),
            (
                "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
                "01",
            ),
            ("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny"),
            ("{{ '<b>' }}", "<b>"),
            ("{{ ''.join(strftime_now('%Y')[:2]) }}", "20"),
        ];
        for (template, expected) in cases {
            assert_eq!(render(template).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn tojson_equals_json_dumps() {
        let cases = [
            (
                "{{ tools | tojson }}",
                r#"[{"name": "f", "x": "<é>\n", "n": [1, 2.5, null, true], "e": []}]"#,
            ),
            (
                "{{ tools | tojson(ensure_ascii=true, separators=[',', ':']) }}",
                r#"[{"name":"f","x":"<\u00e9>\n","n":[1,2.5,null,true],"e":[]}]"#,
            ),
            (
                "{{ {'b': 1, 'a': '😀'} | tojson(sort_keys=true) }}",
                r#"{"a": "😀", "b": 1}"#,
            ),
            (
                "{{ [{'a': [], 'b': [1]}] | tojson(indent=2) }}",
                "[\n  {\n    \"a\": [],\n    \"b\": [\n      1\n    ]\n  }\n]",
            ),
        ];
        for (template, expected) in cases {
            assert_eq!(render(template).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn a_template_that_throws_says_its_own_message() {
        let error = render("\n{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidTemplate);
        assert!(
            error.to_string().ends_with("roles must alternate (line 2)"),
            "{error}"
        );
    }

    #[test]
    fn a_template_that_does_not_compile_names_the_line() {
        let error = render("a\n{% if %}").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidTemplate);
        assert!(error.to_string().contains(":2)"), "{error}");
    }

    /// Each of these would take minutes, gigabytes or the stack; 5 s leaves room for a debug
    /// build on a busy machine.
    #[test]
    fn a_template_without_end_is_stopped() {
        let nest = "{% set ns = namespace(x=[]) %}{% for j in range(999) %}\
                    {% for i in range(99999) %}{% set ns.x = [[[[[[[[ns.x]]]]]]]] %}{% endfor %}{% endfor %}";
        let share = "{% set ns = namespace(x=['ab']) %}{% for i in range(60) %}\
                     {% set ns.x = [ns.x, ns.x] %}{% endfor %}";
        let templates = [
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}".to_owned(),
            "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}".to_owned(),
            "{{ 'x' * 1000000000 }}".to_owned(),
            "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
                .to_owned(),
            "{{ ('a' * 3000000).replace('a', 'b' * 3000000) | length }}".to_owned(),
            "{{ ('a' * 3000000) | replace('a', 'b' * 3000000) | length }}".to_owned(),
            "{{ ('b' * 3000000).join(range(99999) | list) | length }}".to_owned(),
            "{{ '{:999999999999}'.format('x') | length }}".to_owned(),
            "{% for i in range(99999) %}{% set x = ('a ' * 999999).split(' ') %}{% endfor %}".to_owned(),
            "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(1) }}".to_owned(),
            nest.to_owned(),
            format!("{share}{{{{ ns.x | tojson | length }}}}"),
            format!("{share}{{{{ ns.x }}}}"),
            format!("{share}{{{{ ns.x | string | length }}}}"),
            format!("{share}{{{{ ns.x | join | length }}}}"),
        ];
        for template in templates {
            let start = Instant::now();
            let error = render(&template).unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::InvalidTemplate,
                "{template}: {error}"
            );
            assert!(
                start.elapsed() < Duration::from_secs(5),
                "{template}: {:?}",
                start.elapsed()
            );
        }
    }
}
