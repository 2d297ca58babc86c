//! Text to tokens and back.

use std::path::PathBuf;

use pyo3::prelude::*;

use crate::arguments::{Messages, TokenIds};
use crate::enter::outside;
use crate::error::{Failure, not_picklable};

/// The tokenizer of a checkpoint.
#[pyclass(module = "qwen2_rs", frozen)]
pub(crate) struct Tokenizer(pub(crate) qwen2_core::Tokenizer);

/// Runs `work` without the GIL.
fn run<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> qwen2_core::Result<T> + Send,
) -> PyResult<T> {
    Ok(outside(py, || work().map_err(Failure::from))?)
}

#[pymethods]
impl Tokenizer {
    /// Reads the tokenizer of a checkpoint's directory, without the weights.
    #[staticmethod]
    fn load(py: Python<'_>, directory: PathBuf) -> PyResult<Self> {
        run(py, || qwen2_core::Tokenizer::load(directory)).map(Self)
    }

    /// The tokens of text, all of it ordinary: `<|im_end|>` is ten characters.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        run(py, || self.0.encode(text))
    }

    /// The tokens of text with special tokens recognised, as transformers' tokenizer(text). Never
    /// for untrusted text: whoever writes `<|im_end|>` ends the turn.
    fn encode_with_special_tokens(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        run(py, || self.0.encode_with_special_tokens(text))
    }

    /// The number of tokens that encode makes of text.
    fn count(&self, py: Python<'_>, text: &str) -> PyResult<usize> {
        run(py, || self.0.count(text))
    }

    /// The text of tokens; bytes that are not UTF-8 become U+FFFD. skip_special_tokens leaves out
    /// tokens like `<|im_end|>`.
    #[pyo3(signature = (tokens, *, skip_special_tokens = false))]
    fn decode(
        &self,
        py: Python<'_>,
        tokens: TokenIds,
        skip_special_tokens: bool,
    ) -> PyResult<String> {
        run(py, || self.0.decode(&tokens.0, skip_special_tokens))
    }

    /// The text that the chat template makes of messages: for showing. To feed a model, use
    /// encode_chat, which keeps control tokens in messages from being obeyed.
    #[pyo3(signature = (messages, *, add_generation_prompt))]
    fn apply_chat_template(
        &self,
        py: Python<'_>,
        messages: Messages,
        add_generation_prompt: bool,
    ) -> PyResult<String> {
        run(py, || {
            self.0
                .apply_chat_template(&messages.0, add_generation_prompt)
        })
    }

    /// The tokens of a conversation: what the template prints becomes control tokens, what the
    /// messages hold never does.
    #[pyo3(signature = (messages, *, add_generation_prompt))]
    fn encode_chat(
        &self,
        py: Python<'_>,
        messages: Messages,
        add_generation_prompt: bool,
    ) -> PyResult<Vec<u32>> {
        run(py, || {
            self.0.encode_chat(&messages.0, add_generation_prompt)
        })
    }

    /// The id of a token by its name in the vocabulary, for example `<|im_end|>`.
    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    /// The name of a token in the vocabulary, with `Ġ` for a space.
    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    /// Whether the token is a control token.
    fn is_special(&self, id: u32) -> bool {
        self.0.is_special(id)
    }

    /// The highest id plus one.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    /// The token that ends a turn.
    #[getter]
    fn eos_token_id(&self) -> Option<u32> {
        self.0.eos_token_id()
    }

    /// The token that fills a batch.
    #[getter]
    fn pad_token_id(&self) -> Option<u32> {
        self.0.pad_token_id()
    }

    /// The Jinja source of the chat template; base models may have none.
    #[getter]
    fn chat_template(&self) -> Option<&str> {
        self.0.chat_template()
    }

    fn __repr__(&self) -> String {
        format!("Tokenizer(vocab_size={})", self.0.vocab_size())
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(not_picklable("Tokenizer", "load it where it is used"))
    }
}
