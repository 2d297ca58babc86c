//! The calls of tools that the model asks for, whole or as they stream.

use std::ffi::c_char;

use qwen2_core::ToolCall;

use crate::fence;
use crate::generation::qwen2_generation;
use crate::request::qwen2_request;
use crate::stream::qwen2_stream;
use crate::values::Terminated;

/// Name and arguments of each.
#[derive(Default)]
pub(crate) struct Calls(Vec<(Terminated, Terminated)>);

impl From<&[ToolCall]> for Calls {
    fn from(calls: &[ToolCall]) -> Self {
        let show = |text: &str| Terminated::from(text);
        let calls = calls.iter();
        let calls = calls.map(|call| (show(&call.name), show(&call.arguments)));
        Self(calls.collect())
    }
}

impl Calls {
    fn len(&self) -> usize {
        self.0.len()
    }

    /// NULL where there is none.
    unsafe fn name(&self, index: usize, len: *mut usize) -> *const c_char {
        let call = self.0.get(index);
        call.map_or(std::ptr::null(), |(name, _)| name.show(len))
    }

    /// NULL where there is none.
    unsafe fn arguments(&self, index: usize, len: *mut usize) -> *const c_char {
        let call = self.0.get(index);
        call.map_or(std::ptr::null(), |(_, arguments)| arguments.show(len))
    }
}

/// The number of tools that the model asks for; 0 for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_n_tool_calls(
    generation: *const qwen2_generation,
) -> usize {
    fence::read(generation, 0, |generation| generation.calls.len())
}

/// The name in the call at `index`, NUL-terminated, or NULL; `len` (may be NULL) gets its length in
/// bytes. Valid until the generation is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_tool_call_name(
    generation: *const qwen2_generation,
    index: usize,
    len: *mut usize,
) -> *const c_char {
    fence::set_optional(len, 0);
    fence::read(generation, std::ptr::null(), |generation| {
        generation.calls.name(index, len)
    })
}

/// The arguments in the call at `index`: the text of a JSON object, NUL-terminated, or NULL; `len` (may
/// be NULL) gets its length in bytes. Valid until the generation is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_generation_tool_call_arguments(
    generation: *const qwen2_generation,
    index: usize,
    len: *mut usize,
) -> *const c_char {
    fence::set_optional(len, 0);
    fence::read(generation, std::ptr::null(), |generation| {
        generation.calls.arguments(index, len)
    })
}

/// The number of calls of tools that became whole with the last piece, whose text is in no piece; 0 before
/// the first piece, behind the end, and for a handle that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_stream_n_tool_calls(stream: *const qwen2_stream) -> usize {
    fence::read(stream, 0, |stream| {
        stream.with_last(|last| last.calls.len()).unwrap_or(0)
    })
}

/// As `qwen2_generation_tool_call_name`, of the last piece; valid until the next call on this stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_stream_tool_call_name(
    stream: *const qwen2_stream,
    index: usize,
    len: *mut usize,
) -> *const c_char {
    fence::set_optional(len, 0);
    fence::read(stream, std::ptr::null(), |stream| {
        let name = stream.with_last(|last| last.calls.name(index, len));
        name.unwrap_or(std::ptr::null())
    })
}

/// As `qwen2_generation_tool_call_arguments`, of the last piece; valid until the next call on this stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_stream_tool_call_arguments(
    stream: *const qwen2_stream,
    index: usize,
    len: *mut usize,
) -> *const c_char {
    fence::set_optional(len, 0);
    fence::read(stream, std::ptr::null(), |stream| {
        let arguments = stream.with_last(|last| last.calls.arguments(index, len));
        arguments.unwrap_or(std::ptr::null())
    })
}

/// As `qwen2_stream_n_tool_calls`, of a request to an engine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_request_n_tool_calls(request: *const qwen2_request) -> usize {
    fence::read(request, 0, |request| {
        request.with_last(|last| last.calls.len()).unwrap_or(0)
    })
}

/// As `qwen2_stream_tool_call_name`, of a request to an engine; inside its callback valid during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_request_tool_call_name(
    request: *const qwen2_request,
    index: usize,
    len: *mut usize,
) -> *const c_char {
    fence::set_optional(len, 0);
    fence::read(request, std::ptr::null(), |request| {
        let name = request.with_last(|last| last.calls.name(index, len));
        name.unwrap_or(std::ptr::null())
    })
}

/// As `qwen2_stream_tool_call_arguments`, of a request to an engine; inside its callback valid during the
/// call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qwen2_request_tool_call_arguments(
    request: *const qwen2_request,
    index: usize,
    len: *mut usize,
) -> *const c_char {
    fence::set_optional(len, 0);
    fence::read(request, std::ptr::null(), |request| {
        let arguments = request.with_last(|last| last.calls.arguments(index, len));
        arguments.unwrap_or(std::ptr::null())
    })
}
