//! Words that a generation never produces.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::penalties::forbid;
use crate::error::{Error, ErrorKind, Result};
use crate::text::Tokenizer;

/// Something that must not be produced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BadWord {
    /// A text, exactly as written and in whichever tokens: the output never contains it, not in a
    /// longer word either.
    Text(String),
    /// A sequence of tokens: the last is impossible where prompt and output end with those before it, as
    /// in transformers.
    Tokens(Vec<u32>),
}

impl From<&str> for BadWord {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for BadWord {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<u32>> for BadWord {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

impl<const N: usize> From<[u32; N]> for BadWord {
    fn from(tokens: [u32; N]) -> Self {
        Self::Tokens(tokens.into())
    }
}

/// The words of one generation, made ready for a look at every step.
#[derive(Default)]
pub(crate) struct BadWords {
    /// Impossible everywhere: words of one token, and tokens whose text has a bad text in it.
    always: Vec<u32>,
    /// Of two tokens or more.
    sequences: Vec<Vec<u32>>,
    texts: Vec<Text>,
    tokenizer: Option<Tokenizer>,
    /// The ids in the order of their bytes, which puts those that begin alike side by side.
    by_bytes: Arc<[u32]>,
    // The end of the output's text; as long as the longest text at most.
    tail: Vec<u8>,
}

struct Text {
    word: Vec<u8>,
    /// `endings[k]`: the tokens in `by_bytes` that begin with what is missing behind `k` bytes.
    endings: Vec<Range<usize>>,
}

impl BadWords {
    /// `words` that are not empty, as `Resolved` guarantees.
    pub(super) fn new(words: &[BadWord], tokenizer: &Tokenizer) -> Self {
        let mut made = Self::default();
        let mut texts = Vec::new();
        for word in words {
            match word {
                BadWord::Tokens(tokens) if tokens.len() == 1 => made.always.push(tokens[0]),
                BadWord::Tokens(tokens) => made.sequences.push(tokens.clone()),
                BadWord::Text(text) => texts.push(text.as_bytes().to_vec()),
            }
        }
        if texts.is_empty() {
            return made;
        }
        made.by_bytes = tokenizer.ids_by_bytes();
        made.tokenizer = Some(tokenizer.clone());
        made.forbid_tokens_with(&texts, tokenizer);
        made.texts = texts
            .into_iter()
            .map(|word| Text {
                endings: (0..word.len())
                    .map(|k| beginning_with(&word[k..], &made.by_bytes, tokenizer))
                    .collect(),
                word,
            })
            .collect();
        made.tail.reserve(made.longest_text());
        made
    }

    /// Tokens that hold a whole text.
    fn forbid_tokens_with(&mut self, texts: &[Vec<u8>], tokenizer: &Tokenizer) {
        let mut by_first: [Vec<&[u8]>; 256] = std::array::from_fn(|_| Vec::new());
        for text in texts {
            by_first[usize::from(text[0])].push(text);
        }
        let holds_one = |bytes: &[u8]| {
            (0..bytes.len()).any(|at| {
                let texts = &by_first[usize::from(bytes[at])];
                texts.iter().any(|text| bytes[at..].starts_with(text))
            })
        };
        let tokens = self.by_bytes.iter().copied();
        self.always
            .extend(tokens.filter(|&id| tokenizer.token_bytes(id).is_some_and(holds_one)));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.always.is_empty() && self.sequences.is_empty() && self.texts.is_empty()
    }

    /// Makes impossible what would complete a word behind `tokens`, of which `n_prompt` are the prompt's.
    pub(super) fn ban(&mut self, logits: &mut [f32], tokens: &[u32], n_prompt: usize) {
        self.always.iter().for_each(|&id| forbid(logits, id));
        for sequence in &self.sequences {
            if let Some((&last, before)) = sequence.split_last()
                && tokens.ends_with(before)
            {
                forbid(logits, last);
            }
        }
        if self.texts.is_empty() {
            return;
        }
        self.read_tail(tokens.get(n_prompt..).unwrap_or_default());
        for text in &self.texts {
            for (k, ending) in text.endings.iter().enumerate().skip(1) {
                if self.tail.ends_with(&text.word[..k]) {
                    let ids = &self.by_bytes[ending.clone()];
                    ids.iter().for_each(|&id| forbid(logits, id));
                }
            }
        }
    }

    /// The last bytes of the text of `output`, as many as a text can begin with.
    fn read_tail(&mut self, output: &[u32]) {
        self.tail.clear();
        let most = self.longest_text() - 1;
        let Some(tokenizer) = &self.tokenizer else {
            return;
        };
        // From the last token on, backwards; turned around at the end.
        let shown = output.iter().rev().filter(|id| !tokenizer.is_special(**id));
        let bytes =
            shown.flat_map(|&id| tokenizer.token_bytes(id).unwrap_or_default().iter().rev());
        self.tail.extend(bytes.take(most));
        self.tail.reverse();
    }

    fn longest_text(&self) -> usize {
        self.texts
            .iter()
            .map(|text| text.word.len())
            .max()
            .unwrap_or(1)
    }
}

/// Where in `by_bytes` the tokens are that begin with `start`.
fn beginning_with(start: &[u8], by_bytes: &[u32], tokenizer: &Tokenizer) -> Range<usize> {
    let bytes = |id: &u32| tokenizer.token_bytes(*id).unwrap_or_default();
    let first = by_bytes.partition_point(|id| bytes(id) < start);
    let n = by_bytes[first..].partition_point(|id| bytes(id).starts_with(start));
    first..first + n
}

/// Refuses words that are empty, too long or too many, and tokens that the vocabulary lacks.
pub(super) fn check(words: &[BadWord], vocab_size: Option<usize>) -> Result<()> {
    let refuse = |key: String, expected: &str, found: String| {
        Err(
            Error::new(ErrorKind::InvalidArgument, "option out of range")
                .with_key(key)
                .with_why(format!("expected {expected}, found {found}"))
                .with_help("an empty word would forbid everything, a long one never comes"),
        )
    };
    if words.len() > MAX_WORDS {
        let found = format!("{} words", words.len());
        return refuse("bad_words".to_owned(), "at most 1024", found);
    }
    for (position, word) in words.iter().enumerate() {
        let key = format!("bad_words[{position}]");
        let (len, unit) = match word {
            BadWord::Text(text) => (text.len(), "bytes"),
            BadWord::Tokens(tokens) => (tokens.len(), "tokens"),
        };
        if !(1..=MAX_LEN).contains(&len) {
            return refuse(key, &format!("1 to 256 {unit}"), format!("{len} {unit}"));
        }
        if let (BadWord::Tokens(tokens), Some(vocab_size)) = (word, vocab_size) {
            super::resolved::check_ids(&key, tokens.iter().copied(), vocab_size)?;
        }
    }
    Ok(())
}

const MAX_WORDS: usize = 1024;
const MAX_LEN: usize = 256;

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokenizer() -> Tokenizer {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../conformance/models/tied");
        Tokenizer::from_files(path.as_ref()).unwrap()
    }

    fn banned(words: &mut BadWords, tokens: &[u32], n_prompt: usize) -> Vec<u32> {
        let mut logits = [0.0; 300];
        words.ban(&mut logits, tokens, n_prompt);
        let ids = (0..)
            .zip(logits)
            .filter(|(_, logit)| *logit == f32::NEG_INFINITY);
        ids.map(|(id, _)| id).collect()
    }

    /// The text that a generation would show for the output.
    fn shown(tokenizer: &Tokenizer, output: &[u32]) -> Vec<u8> {
        let ids = output.iter().filter(|id| !tokenizer.is_special(**id));
        ids.flat_map(|id| tokenizer.token_bytes(*id).unwrap_or_default().to_vec())
            .collect()
    }

    fn contains(text: &[u8], word: &str) -> bool {
        text.windows(word.len()).any(|part| part == word.as_bytes())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// Few letters, so that words overlap and are begun often; each step takes an allowed token. The
        /// reference appends every token and looks for a word in the whole text.
        #[test]
        fn exactly_the_tokens_that_complete_a_text_are_impossible(
            words in prop::collection::vec("[theo ]{1,4}|[你好é]{1,2}", 1..4),
            draws in prop::collection::vec(0..1000_usize, 1..12),
        ) {
            let tokenizer = tokenizer();
            let bad: Vec<BadWord> = words.iter().map(|word| word.as_str().into()).collect();
            let mut bad = BadWords::new(&bad, &tokenizer);
            let likely: Vec<u32> = (0..300)
                .filter(|id| tokenizer.token_bytes(*id).is_some_and(|bytes| {
                    !bytes.is_empty() && bytes.iter().all(|byte| b"theo ".contains(byte) || *byte >= 128)
                }) || tokenizer.is_special(*id))
                .collect();
            let mut tokens = vec![1, 2];
            for draw in draws {
                let found = banned(&mut bad, &tokens, 2);
                for id in 0..300 {
                    let mut output = tokens[2..].to_vec();
                    output.push(id);
                    let text = shown(&tokenizer, &output);
                    let completes = words.iter().any(|word| contains(&text, word))
                        && !tokenizer.is_special(id) && tokenizer.token_bytes(id).is_some();
                    prop_assert_eq!(found.contains(&id), completes, "{} behind {:?}", id, tokens);
                }
                let allowed: Vec<u32> = likely.iter().copied().filter(|id| !found.contains(id)).collect();
                if allowed.is_empty() {
                    break;
                }
                tokens.push(allowed[draw % allowed.len()]);
            }
        }
    }

    #[test]
    fn a_sequence_counts_from_the_prompt_on_and_a_single_token_always() {
        let words = [BadWord::from([5, 6, 7]), BadWord::from([9])];
        let mut bad = BadWords::new(&words, &tokenizer());
        for (tokens, expected) in [
            (&[5, 6][..], &[7, 9][..]),
            (&[1, 5, 6], &[7, 9]),
            (&[5, 6, 1], &[9]),
            (&[6], &[9]),
        ] {
            assert_eq!(banned(&mut bad, tokens, tokens.len()), expected);
        }
    }

    #[test]
    fn the_text_of_the_prompt_does_not_begin_a_word() {
        let tokenizer = tokenizer();
        let mut bad = BadWords::new(&["xy".into()], &tokenizer);
        let [x, y] = ["x", "y"].map(|letter| tokenizer.encode(letter).unwrap()[0]);
        assert!(!banned(&mut bad, &[x], 1).contains(&y));
        assert!(banned(&mut bad, &[x], 0).contains(&y));
    }

    #[test]
    fn words_come_from_json_as_texts_or_tokens() {
        let words: Vec<BadWord> = serde_json::from_str(r#"["a", [1, 2]]"#).unwrap();
        assert_eq!(words, [BadWord::from("a"), BadWord::from([1, 2])]);
    }
}
