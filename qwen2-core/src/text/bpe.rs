//! The model of a `tokenizer.json`, read piece by piece: the crate's own reader holds every merge as a
//! value first, which takes longer than all the rest of loading.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer, Merges, Vocab};
use tokenizers::{Model, Result, Token};

/// The crate's BPE; only its way from JSON is ours.
#[derive(Clone)]
pub(super) struct Bpe(BPE);

impl From<Bpe> for ModelWrapper {
    fn from(bpe: Bpe) -> Self {
        Self::BPE(bpe.0)
    }
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
    vocab: Option<VocabFile>,
    merges: Option<MergesFile>,
}

impl<'de> Deserialize<'de> for Bpe {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let file = File::deserialize(deserializer)?;
        let (Some(vocab), Some(merges)) = (file.vocab, file.merges) else {
            return Err(Error::custom("Missing vocab/merges"));
        };
        let mut builder = BPE::builder().vocab_and_merges(vocab.0, merges.0);
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
        builder = builder
            .fuse_unk(file.fuse_unk.unwrap_or(false))
            .byte_fallback(file.byte_fallback.unwrap_or(false))
            .ignore_merges(file.ignore_merges.unwrap_or(false));
        builder.build().map(Self).map_err(Error::custom)
    }
}

struct VocabFile(Vocab);

impl<'de> Deserialize<'de> for VocabFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = VocabFile;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tokens to ids")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<VocabFile, A::Error> {
                let mut vocab = Vocab::default();
                while let Some((token, id)) = map.next_entry()? {
                    vocab.insert(token, id);
                }
                Ok(VocabFile(vocab))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

struct MergesFile(Merges);

impl<'de> Deserialize<'de> for MergesFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = MergesFile;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of merges")
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> std::result::Result<MergesFile, A::Error> {
                let mut merges = Merges::new();
                while let Some(Merge(merge)) = list.next_element()? {
                    merges.extend(merge);
                }
                Ok(MergesFile(merges))
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// `["a", "b"]`, or `"a b"` as older files have it; nothing for the line with the version.
struct Merge(Option<(String, String)>);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a merge: two tokens, or a text with one space")
            }

            fn visit_str<E: Error>(self, line: &str) -> std::result::Result<Merge, E> {
                if line.starts_with("#version") {
                    return Ok(Merge(None));
                }
                match line.split_once(' ') {
                    Some((a, b)) if !b.contains(' ') => {
                        Ok(Merge(Some((a.to_owned(), b.to_owned()))))
                    }
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(line), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut pair: A,
            ) -> std::result::Result<Merge, A::Error> {
                let (a, b, more) = (
                    pair.next_element()?,
                    pair.next_element()?,
                    pair.next_element::<serde::de::IgnoredAny>()?,
                );
                match (a, b, more) {
                    (Some(a), Some(b), None) => Ok(Merge(Some((a, b)))),
                    (Some(_), Some(_), Some(_)) => Err(A::Error::invalid_length(3, &self)),
                    (Some(_), None, _) => Err(A::Error::invalid_length(1, &self)),
                    (None, ..) => Err(A::Error::invalid_length(0, &self)),
                }
            }
        }
        deserializer.deserialize_any(Pair)
    }
}

/// What the crate's tokenizer asks of a model while it is read.
impl Model for Bpe {
    type Trainer = BpeTrainer;

    fn tokenize(&self, sequence: &str) -> Result<Vec<Token>> {
        self.0.tokenize(sequence)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.get_vocab()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.get_vocab_size()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> Result<Vec<PathBuf>> {
        self.0.save(folder, prefix)
    }

    fn get_trainer(&self) -> BpeTrainer {
        self.0.get_trainer()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn file(merges: &Value) -> Value {
        json!({
            "type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
            "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}, "merges": merges,
        })
    }

    #[test]
    fn the_model_is_that_of_the_crates_own_reader() {
        for merges in [
            json!([["a", "b"], ["ab", "c"]]),
            json!(["#version: 0.2", "a b", "ab c"]),
            json!([]),
        ] {
            let text = file(&merges).to_string();
            let ours: Bpe = serde_json::from_str(&text).unwrap();
            let theirs: BPE = serde_json::from_str(&text).unwrap();
            assert!(ours.0 == theirs, "{merges}");
        }
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
