//! Text to tokens and back.

mod added;
mod bpe;
mod byte_level;
mod chat;
mod decode;
mod files;
mod strftime;
mod template;
mod tokenizer;
#[cfg(feature = "constraint")]
mod vocabulary;

pub use chat::Message;
pub(crate) use decode::TextDecoder;
pub use tokenizer::Tokenizer;
