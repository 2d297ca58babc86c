//! How likely the tokens of an answer were, in the two forms that OpenAI's API has.

use qwen2_core::{Logprobs, Tokenizer};
use serde_json::{Map, Value, json};

/// A token's text: of a part of a character U+FFFD, as the API has no better place for it.
fn text(tokenizer: &Tokenizer, token: u32) -> String {
    tokenizer.decode(&[token], false).unwrap_or_default()
}

/// `logprobs` of a chat's choice.
pub(crate) fn chat(tokenizer: &Tokenizer, tokens: &[Logprobs]) -> Value {
    let entry = |token: u32, logprob: f32| {
        let text = text(tokenizer, token);
        // Unknown where the token is a part of a character.
        let bytes = (!text.contains('\u{FFFD}')).then(|| text.as_bytes().to_vec());
        json!({"token": text, "logprob": logprob, "bytes": bytes})
    };
    let content = tokens.iter().map(|token| {
        let mut this = entry(token.token, token.logprob);
        let top = token.top.iter().map(|top| entry(top.token, top.logprob));
        this["top_logprobs"] = top.collect();
        this
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

/// `logprobs` of a completion's choice.
#[derive(Default)]
pub(crate) struct Likelihoods {
    tokens: Vec<String>,
    logprobs: Vec<Option<f32>>,
    top: Vec<Option<Map<String, Value>>>,
    offsets: Vec<usize>,
    /// Characters so far.
    offset: usize,
}

impl Likelihoods {
    /// Adds a token that nothing came before, so that nothing could foretell it.
    pub(crate) fn push_first(&mut self, tokenizer: &Tokenizer, token: u32) {
        self.push_text(text(tokenizer, token));
        self.logprobs.push(None);
        self.top.push(None);
    }

    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: &Logprobs) {
        self.push_text(text(tokenizer, token.token));
        self.logprobs.push(Some(token.logprob));
        let top = token.top.iter();
        let top = top.map(|top| (text(tokenizer, top.token), top.logprob.into()));
        self.top.push(Some(top.collect()));
    }

    fn push_text(&mut self, text: String) {
        self.offsets.push(self.offset);
        self.offset += text.chars().count();
        self.tokens.push(text);
    }

    /// What was added since the last time.
    pub(crate) fn take(&mut self) -> Option<Value> {
        (!self.tokens.is_empty()).then(|| {
            json!({
                "tokens": std::mem::take(&mut self.tokens),
                "token_logprobs": std::mem::take(&mut self.logprobs),
                "top_logprobs": std::mem::take(&mut self.top),
                "text_offset": std::mem::take(&mut self.offsets),
            })
        })
    }
}
