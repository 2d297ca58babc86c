//! The model of a `tokenizer.json`, read piece by piece into flat tables; where it has settings that no
//! Qwen2 tokenizer has, into the crate's own.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use tokenizers::models::bpe::{BPE, BpeTrainer, Vocab};
use tokenizers::{Model, Result, Token};

use super::tables::{MergeList, Misfit, Tables, Vocabulary};

/// Byte-pair encoding.
pub(super) enum Bpe {
    Tables(Tables),
    Crate(Box<BPE>),
}

/// The keys that the crate reads; its defaults hold for what is missing.
#[derive(serde::Deserialize)]
struct File {
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    vocab: Option<Vocabulary>,
    merges: Option<MergeList>,
}

impl File {
    /// Whether there is nothing but tokens and merges.
    fn is_plain(&self) -> bool {
        let is_empty = |text: &Option<String>| text.as_deref().unwrap_or("").is_empty();
        self.dropout.is_none()
            && self.unk_token.is_none()
            && is_empty(&self.continuing_subword_prefix)
            && is_empty(&self.end_of_word_suffix)
            && !self.byte_fallback.unwrap_or(false)
    }
}

impl<'de> Deserialize<'de> for Bpe {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let mut file = File::deserialize(deserializer)?;
        let (Some(vocab), Some(merges)) = (file.vocab.take(), file.merges.take()) else {
            return Err(Error::custom("Missing vocab/merges"));
        };
        if file.is_plain() {
            let mut tables = Tables::new(vocab, &merges).map_err(misfit)?;
            tables.ignore_merges = file.ignore_merges.unwrap_or(false);
            return Ok(Self::Tables(tables));
        }
        let model = of_crate(file, &vocab, &merges).map_err(Error::custom)?;
        Ok(Self::Crate(Box::new(model)))
    }
}

fn misfit<E: Error>(misfit: Misfit) -> E {
    E::custom(misfit.0)
}

fn of_crate(file: File, vocab: &Vocabulary, merges: &MergeList) -> Result<BPE> {
    let vocab: Vocab = vocab
        .iter()
        .map(|(token, id)| (token.to_owned(), id))
        .collect();
    let merges = merges.iter().map(|(a, b)| (a.to_owned(), b.to_owned()));
    let mut builder = BPE::builder().vocab_and_merges(vocab, merges.collect());
    if let Some(dropout) = file.dropout {
        builder = builder.dropout(dropout);
    }
    if let Some(token) = file.unk_token {
        builder = builder.unk_token(token);
    }
    if let Some(prefix) = file.continuing_subword_prefix {
        builder = builder.continuing_subword_prefix(prefix);
    }
    if let Some(suffix) = file.end_of_word_suffix {
        builder = builder.end_of_word_suffix(suffix);
    }
    builder
        .fuse_unk(file.fuse_unk.unwrap_or(false))
        .byte_fallback(file.byte_fallback.unwrap_or(false))
        .ignore_merges(file.ignore_merges.unwrap_or(false))
        .build()
}

/// What a text is expected to be, and what becomes of it, without a copy of its own.
struct Text<F>(&'static str, F);

impl<'de, T, F: FnOnce(&str) -> std::result::Result<T, Misfit>> DeserializeSeed<'de> for Text<F> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<T, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<T, F: FnOnce(&str) -> std::result::Result<T, Misfit>> Visitor<'_> for Text<F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: Error>(self, text: &str) -> std::result::Result<T, E> {
        (self.1)(text).map_err(misfit)
    }
}

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vocabulary;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tokens to ids")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Vocabulary, A::Error> {
                let (mut vocabulary, mut token) = (Vocabulary::default(), String::new());
                loop {
                    let keep = |text: &str| {
                        token.clear();
                        token.push_str(text);
                        Ok(())
                    };
                    if map.next_key_seed(Text("a token", keep))?.is_none() {
                        break;
                    }
                    vocabulary
                        .insert(&token, map.next_value()?)
                        .map_err(misfit)?;
                }
                Ok(vocabulary)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'de> Deserialize<'de> for MergeList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = MergeList;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of merges")
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> std::result::Result<MergeList, A::Error> {
                let mut merges = MergeList::default();
                while list.next_element_seed(Merge(&mut merges))?.is_some() {}
                Ok(merges)
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// `["a", "b"]`, or `"a b"` as older files have it; nothing for the line with the version.
struct Merge<'a>(&'a mut MergeList);

impl<'de> DeserializeSeed<'de> for Merge<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Merge<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a merge: two tokens, or a text with one space")
    }

    fn visit_str<E: Error>(self, line: &str) -> std::result::Result<(), E> {
        if line.starts_with("#version") {
            return Ok(());
        }
        match line.split_once(' ') {
            Some((a, b)) if !b.contains(' ') => self.0.push(a, b).map_err(misfit),
            _ => Err(E::invalid_value(serde::de::Unexpected::Str(line), &self)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> std::result::Result<(), A::Error> {
        let list = &mut *self.0;
        let mut token = || pair.next_element_seed(Text("a token", |token: &str| list.add(token)));
        let (first, second) = (token()?, token()?);
        let more = match second {
            Some(_) => pair.next_element::<serde::de::IgnoredAny>()?,
            None => None,
        };
        match (first, second, more) {
            (Some(first), Some(second), None) => {
                self.0.pair(first, second);
                Ok(())
            }
            (Some(_), Some(_), Some(_)) => Err(A::Error::invalid_length(3, &self)),
            (Some(_), None, _) => Err(A::Error::invalid_length(1, &self)),
            (None, ..) => Err(A::Error::invalid_length(0, &self)),
        }
    }
}

impl Bpe {
    /// All tokens with their ids.
    pub(super) fn tokens(&self) -> Vec<(Cow<'_, str>, u32)> {
        match self {
            Self::Tables(tables) => {
                let tokens = tables.vocabulary().iter();
                tokens.map(|(token, id)| (token.into(), id)).collect()
            }
            Self::Crate(model) => {
                let tokens = model.get_vocab().into_iter();
                tokens.map(|(token, id)| (token.into(), id)).collect()
            }
        }
    }
}

/// What the crate's tokenizer asks of a model.
impl Model for Bpe {
    type Trainer = BpeTrainer;

    fn tokenize(&self, sequence: &str) -> Result<Vec<Token>> {
        let tables = match self {
            Self::Tables(tables) => tables,
            Self::Crate(model) => return model.tokenize(sequence),
        };
        let mut end = 0;
        let tokens = tables.encode(sequence).into_iter().map(|(id, len)| {
            let start = end;
            end += len;
            let token = tables.token(id).unwrap_or_default();
            Token::new(id, token.to_owned(), (start, end))
        });
        Ok(tokens.collect())
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Tables(tables) => tables.vocabulary().id(token),
            Self::Crate(model) => model.token_to_id(token),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Self::Tables(tables) => tables.token(id).map(str::to_owned),
            Self::Crate(model) => model.id_to_token(id),
        }
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        match self {
            Self::Tables(tables) => {
                let tokens = tables.vocabulary().iter();
                tokens.map(|(token, id)| (token.to_owned(), id)).collect()
            }
            Self::Crate(model) => model.get_vocab(),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match self {
            Self::Tables(tables) => tables.vocabulary().len(),
            Self::Crate(model) => model.get_vocab_size(),
        }
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> Result<Vec<PathBuf>> {
        match self {
            Self::Tables(_) => Err("tables are not written".into()),
            Self::Crate(model) => model.save(folder, prefix),
        }
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn file(merges: &Value) -> Value {
        json!({
            "type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
            "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4, "bc": 5}, "merges": merges,
        })
    }

    #[test]
    fn the_model_is_that_of_the_crates_own_reader() {
        for (key, value) in [
            ("ignore_merges", json!(false)),
            ("ignore_merges", json!(true)),
            ("continuing_subword_prefix", json!("")),
            ("unk_token", json!("c")),
            ("end_of_word_suffix", json!("b")),
            ("byte_fallback", json!(true)),
        ] {
            for merges in [
                json!([["a", "b"], ["ab", "c"]]),
                json!(["#version: 0.2", "a b", "ab c"]),
                json!([["b", "c"], ["a", "bc"], ["a", "b"]]),
                json!([]),
            ] {
                let mut file = file(&merges);
                file[key] = value.clone();
                let text = file.to_string();
                let ours: Bpe = serde_json::from_str(&text).unwrap();
                let theirs: BPE = serde_json::from_str(&text).unwrap();
                let is_plain = ["ignore_merges", "continuing_subword_prefix"].contains(&key);
                assert_eq!(matches!(ours, Bpe::Tables(_)), is_plain);
                for word in ["", "a", "abc", "abcab", "cabbabcc", "axb", "x", "aé中b"] {
                    let (ours, theirs) = (ours.tokenize(word), theirs.tokenize(word));
                    assert_eq!(ours.unwrap(), theirs.unwrap(), "{key} {merges} {word}");
                }
                assert_eq!(ours.get_vocab(), theirs.get_vocab());
                assert_eq!(ours.get_vocab_size(), 6);
                for id in 0..7 {
                    assert_eq!(ours.id_to_token(id), theirs.id_to_token(id));
                }
                assert_eq!(ours.token_to_id("ab"), Some(2));
                assert_eq!(ours.token_to_id("x"), None);
            }
        }
    }

    proptest! {
        /// Of random merges over three letters, so that they overlap in every way.
        #[test]
        fn words_are_merged_as_the_crate_merges_them(
            choices in proptest::collection::vec((any::<u16>(), any::<u16>()), 0..30),
            words in proptest::collection::vec("[abc]{0,40}", 1..8),
        ) {
            let mut tokens = vec!["a".to_owned(), "b".to_owned(), "c".to_owned()];
            let mut merges = Vec::new();
            for (first, second) in choices {
                let one = |n: u16| tokens[usize::from(n) % tokens.len()].clone();
                let (first, second) = (one(first), one(second));
                let both = format!("{first}{second}");
                if !tokens.contains(&both) {
                    tokens.push(both);
                }
                merges.push([first, second]);
            }
            let vocab: serde_json::Map<_, _> =
                tokens.into_iter().zip(0..).map(|(token, id): (_, u32)| (token, json!(id))).collect();
            let text = json!({"type": "BPE", "vocab": vocab, "merges": merges}).to_string();
            let ours: Bpe = serde_json::from_str(&text).unwrap();
            let theirs: BPE = serde_json::from_str(&text).unwrap();
            for word in words {
                prop_assert_eq!(ours.tokenize(&word).unwrap(), theirs.tokenize(&word).unwrap());
            }
        }
    }

    #[test]
    fn the_last_id_of_a_token_that_comes_twice_holds() {
        let text = r#"{"type": "BPE", "vocab": {"a": 0, "b": 1, "a": 5}, "merges": []}"#;
        let ours: Bpe = serde_json::from_str(text).unwrap();
        assert_eq!(ours.token_to_id("a"), Some(5));
        assert_eq!(
            (ours.id_to_token(0), ours.id_to_token(5)),
            (None, Some("a".to_owned()))
        );
        assert_eq!(ours.get_vocab_size(), 2);
    }

    #[test]
    fn what_the_crate_refuses_is_refused() {
        for bad in [
            file(&json!([["a"]])),
            file(&json!([["a", "b", "c"]])),
            file(&json!([[]])),
            file(&json!(["a"])),
            file(&json!(["a b c"])),
            file(&json!([["a", "x"]])),
            file(&json!([1])),
            file(&json!(null)),
            json!({"type": "BPE", "merges": []}),
            json!({"type": "BPE", "vocab": [], "merges": []}),
            json!({"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        ] {
            let text = bad.to_string();
            assert!(serde_json::from_str::<BPE>(&text).is_err(), "{text}");
            assert!(serde_json::from_str::<Bpe>(&text).is_err(), "{text}");
        }
    }
}
