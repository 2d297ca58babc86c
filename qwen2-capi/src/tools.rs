//! What the text of a generation must look like, and the tools that the model may ask for.

use std::ffi::c_char;

use qwen2_core::{Constraint, Tool, ToolCall, ToolChoice, ToolFormat};

use crate::error::{QWEN2_OK, qwen2_error, qwen2_status};
use crate::fence;
use crate::options::qwen2_options;
use crate::prompt::qwen2_prompt;

/// The model calls tools as it decides.
pub const QWEN2_TOOL_CHOICE_AUTO: i32 = 0;
/// The tools are not shown to the model.
pub const QWEN2_TOOL_CHOICE_NONE: i32 = 1;
/// The model calls at least one tool.
pub const QWEN2_TOOL_CHOICE_REQUIRED: i32 = 2;

/// As the checkpoint's chat template has it: Hermes' form where it knows tools, else Qwen-Agent's.
pub const QWEN2_TOOL_FORMAT_DEFAULT: i32 = 0;
/// `<tool_call>` with a JSON object.
pub const QWEN2_TOOL_FORMAT_HERMES: i32 = 1;
/// Qwen-Agent's form for Qwen2, with FUNCTION and ARGS between flowers.
pub const QWEN2_TOOL_FORMAT_QWEN_AGENT: i32 = 2;

unsafe fn constrain(
    options: *mut qwen2_options,
    (text, len): (*const c_char, usize),
    name: &'static str,
    error: *mut *mut qwen2_error,
    form: impl FnOnce(&str) -> Constraint,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        options.options.constraint = Some(form(fence::text(text, len, name)?));
        Ok(QWEN2_OK)
    })
}

/// The text must be JSON that this JSON schema allows, replacing any other constraint; `schema` is its
/// text, "{}" allows any JSON. Checked when a generation starts. The text is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_json_schema(
    options: *mut qwen2_options,
    schema: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    constrain(options, (schema, len), "schema", error, |schema| {
        Constraint::json_schema(schema)
    })
}

/// The whole text must match this regular expression, replacing any other constraint. The syntax is that
/// of Rust's regex crate, without anchors and look-around. The text is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_regex(
    options: *mut qwen2_options,
    regex: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    constrain(options, (regex, len), "regex", error, |regex| {
        Constraint::regex(regex)
    })
}

/// The text must be what this grammar allows, replacing any other constraint; it is written in
/// llguidance's variant of Lark, and its first rule is `start`. The text is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_grammar(
    options: *mut qwen2_options,
    lark: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    constrain(options, (lark, len), "lark", error, |lark| {
        Constraint::grammar(lark)
    })
}

/// The text must be one of these, replacing any other constraint. `lens` holds their lengths in bytes;
/// NULL: all of them end with NUL. The texts are copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_choice(
    options: *mut qwen2_options,
    texts: *const *const c_char,
    lens: *const usize,
    n_texts: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        let texts = fence::slice(texts, n_texts, "texts")?;
        let lens = match lens.is_null() {
            true => vec![usize::MAX; texts.len()],
            false => fence::slice(lens, n_texts, "lens")?.to_vec(),
        };
        let texts = texts.iter().zip(lens);
        let texts = texts.map(|(&text, len)| fence::text(text, len, "texts"));
        let texts: Result<Vec<&str>, _> = texts.collect();
        options.options.constraint = Some(Constraint::choice(texts?));
        Ok(QWEN2_OK)
    })
}

/// One more tool that the model may ask for, as OpenAI's interface describes it in JSON:
/// {"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema}}. With
/// "strict": true in the function, the arguments of its calls are forced to keep to the parameters. The
/// prompt is to be messages. The text is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_add_tool(
    options: *mut qwen2_options,
    json: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        let tool = Tool::from_json(fence::text(json, len, "json")?)?;
        options.options.tools.push(tool);
        Ok(QWEN2_OK)
    })
}

/// Whether the model calls tools, one of `QWEN2_TOOL_CHOICE_*`. Default: AUTO.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_tool_choice(
    options: *mut qwen2_options,
    choice: i32,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        fence::borrow_mut(options)?.options.tool_choice = match choice {
            QWEN2_TOOL_CHOICE_AUTO => ToolChoice::Auto,
            QWEN2_TOOL_CHOICE_NONE => ToolChoice::None,
            QWEN2_TOOL_CHOICE_REQUIRED => ToolChoice::Required,
            other => return Err(unknown("choice", other, "QWEN2_TOOL_CHOICE_*")),
        };
        Ok(QWEN2_OK)
    })
}

/// Makes the model call the tool of this name. The text is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_tool_choice_name(
    options: *mut qwen2_options,
    name: *const c_char,
    len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let options = fence::borrow_mut(options)?;
        let name = fence::text(name, len, "name")?;
        options.options.tool_choice = ToolChoice::Named(name.to_owned());
        Ok(QWEN2_OK)
    })
}

/// How calls of tools are written, one of `QWEN2_TOOL_FORMAT_*`. Default: DEFAULT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_options_set_tool_format(
    options: *mut qwen2_options,
    format: i32,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        fence::borrow_mut(options)?.options.tool_format = match format {
            QWEN2_TOOL_FORMAT_DEFAULT => None,
            QWEN2_TOOL_FORMAT_HERMES => Some(ToolFormat::Hermes),
            QWEN2_TOOL_FORMAT_QWEN_AGENT => Some(ToolFormat::QwenAgent),
            other => return Err(unknown("format", other, "QWEN2_TOOL_FORMAT_*")),
        };
        Ok(QWEN2_OK)
    })
}

fn unknown(key: &str, value: i32, constants: &str) -> Box<qwen2_error> {
    let help = format!("give one of {constants}");
    qwen2_error::invalid(key, "no such value", Some(value.to_string()), &help)
}

/// Adds a call of a tool to the last message of the prompt, which repeats what the assistant asked for;
/// `arguments` is the text of a JSON object. The results follow as messages of the role "tool". Both
/// texts are copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_prompt_add_tool_call(
    prompt: *mut qwen2_prompt,
    name: *const c_char,
    name_len: usize,
    arguments: *const c_char,
    arguments_len: usize,
    error: *mut *mut qwen2_error,
) -> qwen2_status {
    fence::entry(error, || {
        let prompt = fence::borrow_mut(prompt)?;
        let name = fence::text(name, name_len, "name")?;
        let call = ToolCall::new(name, fence::text(arguments, arguments_len, "arguments")?);
        match prompt.last_message()? {
            Some(last) if last.role == "assistant" => last.tool_calls.push(call),
            _ => {
                let help = "add a message of the role assistant first; its content may be empty";
                let what = "no message of the assistant to add a call to";
                return Err(qwen2_error::invalid("prompt", what, None, help));
            }
        }
        Ok(QWEN2_OK)
    })
}
