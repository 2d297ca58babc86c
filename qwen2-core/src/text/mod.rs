//! Text to tokens and back.

mod added;
mod bpe;
mod byte_level;
mod chat;
mod decode;
mod files;
mod strftime;
mod tables;
mod template;
mod token_bytes;
mod tokenizer;
mod tool_parser;
mod tool_prompt;
mod tools;
#[cfg(feature = "constraint")]
mod vocabulary;

pub use chat::Message;
pub(crate) use decode::TextDecoder;
pub use tokenizer::Tokenizer;
pub(crate) use tool_parser::ToolParser;
pub(crate) use tools::markers;
pub use tools::{Tool, ToolCall, ToolChoice, ToolFormat};
