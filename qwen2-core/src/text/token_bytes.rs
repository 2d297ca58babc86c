//! What the bytes of each token are.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::Result;
use crate::text::files::{self, BpeTokenizer};

/// The bytes of every token, end to end.
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    // By id: start and end in `bytes`. An id that no token has is `NO_TOKEN`.
    spans: Vec<(u32, u32)>,
}

const NO_TOKEN: (u32, u32) = (u32::MAX, u32::MAX);

impl TokenBytes {
    /// `file_len` bounds the table: each token takes at least a byte of the file.
    pub(super) fn new(tokenizer: &BpeTokenizer, file_len: usize, path: &Path) -> Result<Self> {
        let letters = byte_alphabet();
        let last = letters
            .keys()
            .next_back()
            .map_or(0, |letter| *letter as usize);
        let mut alphabet = vec![None; last + 1];
        for (letter, byte) in letters {
            alphabet[letter as usize] = Some(byte);
        }
        let vocabulary = tokenizer.get_model().tokens();
        let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let ids = vocabulary.iter().map(|(_, id)| id).chain(added.keys());
        let highest = ids.copied().max().unwrap_or(0);
        if highest as usize > file_len {
            return Err(files::invalid(path)
                .with_key("model.vocab")
                .with_why(format!(
                    "the id {highest} is too high for a file of {file_len} bytes"
                ))
                .with_help("ids count up from 0; download tokenizer.json again"));
        }
        let mut table = Self {
            bytes: Vec::with_capacity(8 * vocabulary.len()),
            spans: vec![NO_TOKEN; highest as usize + 1],
        };
        let mut decoded = Vec::new();
        for (token, id) in &vocabulary {
            if !added.contains_key(id) {
                decoded.clear();
                let byte = |c: char| alphabet.get(c as usize).copied().flatten();
                decoded.extend(token.chars().map_while(byte));
                // Like transformers, a token outside of the alphabet stands for itself.
                let whole = decoded.len() == token.chars().count();
                let bytes = if whole { &decoded } else { token.as_bytes() };
                table.set(*id, bytes, path)?;
            }
        }
        for (&id, token) in added {
            table.set(id, token.content.as_bytes(), path)?;
        }
        Ok(table)
    }

    fn set(&mut self, id: u32, token: &[u8], path: &Path) -> Result<()> {
        let span = &mut self.spans[id as usize];
        let start = u32::try_from(self.bytes.len());
        let end = u32::try_from(self.bytes.len() + token.len());
        match (start, end) {
            (Ok(start), Ok(end)) if *span == NO_TOKEN => *span = (start, end),
            _ => {
                return Err(files::invalid(path)
                    .with_key("model.vocab")
                    .with_why(format!("two tokens have the id {id}"))
                    .with_help("download tokenizer.json again"));
            }
        }
        self.bytes.extend_from_slice(token);
        Ok(())
    }

    /// One more than the highest id.
    pub(super) fn len(&self) -> usize {
        self.spans.len()
    }

    pub(super) fn get(&self, id: u32) -> Option<&[u8]> {
        let &(start, end) = self.spans.get(id as usize)?;
        self.bytes.get(start as usize..end as usize)
    }
}

/// GPT-2's alphabet: printable bytes stand for themselves, the others are the characters from
/// U+0100 on, in order.
pub(super) fn byte_alphabet() -> BTreeMap<char, u8> {
    let mut others = '\u{100}'..;
    (0..=255_u8)
        .filter_map(|byte| match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => Some((char::from(byte), byte)),
            _ => others.next().map(|c| (c, byte)),
        })
        .collect()
}
