//! A vocabulary of the 256 bytes and the ChatML tokens, for models without a tokenizer of their own.

use std::path::Path;

use serde_json::json;

use super::Tokenizer;
use crate::error::Result;

impl Tokenizer {
    /// Every byte is a token; ids 256 to 258 are Qwen2's control tokens.
    pub(crate) fn byte_level() -> Result<Self> {
        // The alphabet of byte-level BPE: printable bytes stand for themselves, the others for the
        // characters from U+0100 on.
        let printable = |byte: u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        let mut next = 0x100;
        let mut vocab = serde_json::Map::new();
        for byte in 0..256 {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            let character = char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
            vocab.insert(character.to_string(), byte.into());
        }
        let added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            .iter()
            .enumerate();
        let added: Vec<_> = added
            .map(|(i, content)| {
                json!({"id": 256 + i, "content": content, "special": true, "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false})
            })
            .collect();
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": false, "use_regex": false});
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
                "byte_fallback": false, "vocab": vocab, "merges": []},
        });
        let bytes = tokenizer.to_string();
        Self::from_bytes(bytes.as_bytes(), None, None, Path::new("tokenizer.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_its_own_token() {
        let tokenizer = Tokenizer::byte_level().expect("a tokenizer");
        let text = "a é 中 \u{7f}\n";
        let tokens = tokenizer.encode(text).expect("tokens");
        assert_eq!(tokens, text.bytes().map(u32::from).collect::<Vec<_>>());
        assert_eq!(tokenizer.decode(&tokens, true).expect("text"), text);
        assert_eq!(tokenizer.vocab_size(), 259);
    }
}
