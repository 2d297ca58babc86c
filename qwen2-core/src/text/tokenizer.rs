//! Text to tokens and tokens to text.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use tokenizers::{
    AddedVocabulary, Model, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizer,
};

use crate::config::one_line;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::fenced;
use crate::text::files::{self, BpeTokenizer, ReadFile, TokenizerFiles};
use crate::text::template::ChatTemplate;
use crate::text::token_bytes::TokenBytes;

/// Longest run of white space that is encoded. Beyond about half a million the regular
/// expression engine gives up backtracking over `\s+(?!\S)`, and the tokenizers crate then
/// returns other tokens without a word.
const MAX_WHITE_SPACE_RUN: usize = 250_000;

/// Turns text into the model's tokens and back.
///
/// A handle: cloning is cheap, and one tokenizer serves many threads. It needs no weights, so
/// prompts can be counted and prepared without a model.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

pub(super) struct Inner {
    path: PathBuf,
    tokenizer: BpeTokenizer,
    // Encoding with no added tokens is what keeps special tokens in a text ordinary text.
    no_added_tokens: AddedVocabulary,
    bytes: TokenBytes,
    // Made when it is first asked for.
    by_bytes: OnceLock<Arc<[u32]>>,
    added: Vec<String>,
    special: HashSet<u32>,
    special_tokens: BTreeMap<&'static str, String>,
    template: Option<ChatTemplate>,
    #[cfg(feature = "constraint")]
    vocabulary: std::sync::OnceLock<super::vocabulary::Vocabulary>,
}

/// A stretch of text between added tokens, or one of them.
#[derive(Debug, PartialEq)]
pub(super) enum Segment {
    Token(u32),
    Text(String),
}

impl Tokenizer {
    /// From a directory with `tokenizer.json` and its neighbours, or from that file.
    pub(crate) fn from_files(path: &Path) -> Result<Self> {
        Self::of_files(&TokenizerFiles::read(path)?)
    }

    /// From the files that `read` gives by their names; `path` is tokenizer.json's, for messages.
    pub(crate) fn from_reader(path: PathBuf, read: ReadFile<'_>) -> Result<Self> {
        Self::of_files(&TokenizerFiles::of(path, read)?)
    }

    fn of_files(files: &TokenizerFiles) -> Result<Self> {
        Self::from_bytes(
            &files.tokenizer,
            files.config.as_deref(),
            files.chat_template.as_deref(),
            &files.path,
        )
    }

    /// From the contents of the files; `path` is tokenizer.json's, for messages.
    pub(crate) fn from_bytes(
        tokenizer_json: &[u8],
        tokenizer_config: Option<&[u8]>,
        chat_template: Option<&str>,
        path: &Path,
    ) -> Result<Self> {
        let mut tokenizer = files::parse_tokenizer(tokenizer_json, path)?;
        let config = tokenizer_config.map(|bytes| files::parse_config(bytes, path));
        let config = config.transpose()?.unwrap_or_default();
        files::add_from_config(&mut tokenizer, &config.added_tokens, path)?;
        for (key, token) in &config.special_tokens {
            if tokenizer.token_to_id(token).is_none() {
                return Err(
                    files::invalid(&path.with_file_name("tokenizer_config.json"))
                        .with_key(*key)
                        .with_why(one_line(&format!("tokenizer.json has no token {token:?}")))
                        .with_help("are both files from the same checkpoint?"),
                );
            }
        }
        let bytes = TokenBytes::new(&tokenizer, tokenizer_json.len(), path)?;
        // A file of its own is how transformers 5 saves it; it wins there, too.
        let template = chat_template.map(str::to_owned).or(config.chat_template);
        Ok(Self(Arc::new(Inner {
            path: path.to_owned(),
            no_added_tokens: AddedVocabulary::new(),
            bytes,
            by_bytes: OnceLock::new(),
            added: added_strings(&tokenizer),
            special: special_ids(&tokenizer),
            special_tokens: config.special_tokens,
            template: template.map(ChatTemplate::new),
            #[cfg(feature = "constraint")]
            vocabulary: std::sync::OnceLock::new(),
            tokenizer,
        })))
    }

    /// The tokens of `text`, all of it ordinary text: `<|im_end|>` becomes the tokens of these
    /// ten characters. Nothing is put in front or behind.
    ///
    /// # Errors
    /// `InvalidArgument` for a run of more than 250,000 white-space characters.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, &self.0.no_added_tokens)
    }

    /// The tokens of `text` with special tokens recognised, as transformers' `tokenizer(text)`.
    ///
    /// Never for untrusted text: whoever writes `<|im_end|>` ends the turn.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, self.0.tokenizer.get_added_vocabulary())
    }

    fn encode_with(&self, text: &str, added: &AddedVocabulary) -> Result<Vec<u32>> {
        check_white_space(text)?;
        let tokenizer = &self.0.tokenizer;
        run(|| {
            let mut pieces = added.extract_and_normalize(tokenizer.get_normalizer(), text);
            if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut pieces)?;
            }
            pieces.tokenize(|piece| tokenizer.get_model().tokenize(piece.get()))?;
            let encoding = pieces.into_encoding(None, 0, OffsetType::None)?;
            Ok(encoding.get_ids().to_vec())
        })
    }

    /// The number of tokens [`encode`](Self::encode) makes of `text`.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn count(&self, text: &str) -> Result<usize> {
        Ok(self.encode(text)?.len())
    }

    /// The text of tokens; bytes that are not UTF-8 become U+FFFD. `skip_special_tokens` leaves
    /// out tokens like `<|im_end|>`.
    ///
    /// # Errors
    /// `InvalidArgument` for an id that no token has.
    pub fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String> {
        let mut bytes = Vec::with_capacity(4 * tokens.len());
        for (position, &id) in tokens.iter().enumerate() {
            let token = self.token_bytes(id).ok_or_else(|| {
                Error::new(ErrorKind::InvalidArgument, "no such token")
                    .with_key(format!("tokens[{position}]"))
                    .with_why(format!("{id} is not an id of this tokenizer"))
                    .with_help(format!(
                        "ids go up to {}",
                        self.vocab_size().saturating_sub(1)
                    ))
            })?;
            if !(skip_special_tokens && self.is_special(id)) {
                bytes.extend_from_slice(token);
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The highest id plus one. A model may have more rows than this: they are padding.
    pub fn vocab_size(&self) -> usize {
        self.0.bytes.len()
    }

    /// The id of a token by its name in the vocabulary, for example `<|im_end|>` or `Ġhello`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// The name of a token in the vocabulary, with `Ġ` for a space.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.tokenizer.id_to_token(id)
    }

    /// Whether the token is a control token, which `decode` can leave out.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.special.contains(&id)
    }

    /// The token that ends a turn, from `tokenizer_config.json`.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.special_token_id("eos_token")
    }

    /// The token that fills a batch, from `tokenizer_config.json`.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.special_token_id("pad_token")
    }

    /// The Jinja source of the chat template; base models may have none.
    pub fn chat_template(&self) -> Option<&str> {
        self.template().map(ChatTemplate::source)
    }

    /// The exact bytes a token stands for, which may be a part of a character.
    pub(crate) fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.0.bytes.get(id)
    }

    /// The tokens that stand for text, in the order of their bytes.
    pub(crate) fn ids_by_bytes(&self) -> Arc<[u32]> {
        let make = || {
            let ids = 0..self.vocab_size() as u32;
            let has_text = |id: &u32| !self.is_special(*id) && self.token_bytes(*id).is_some();
            let mut ids: Vec<u32> = ids.filter(has_text).collect();
            ids.sort_unstable_by_key(|id| self.token_bytes(*id));
            ids.into()
        };
        Arc::clone(self.0.by_bytes.get_or_init(make))
    }

    fn special_token_id(&self, key: &str) -> Option<u32> {
        self.token_to_id(self.0.special_tokens.get(key)?)
    }

    pub(super) fn template(&self) -> Option<&ChatTemplate> {
        self.0.template.as_ref()
    }

    #[cfg(feature = "constraint")]
    pub(super) fn vocabulary(&self) -> &std::sync::OnceLock<super::vocabulary::Vocabulary> {
        &self.0.vocabulary
    }

    #[cfg(feature = "constraint")]
    pub(super) fn downgrade(&self) -> std::sync::Weak<Inner> {
        Arc::downgrade(&self.0)
    }

    #[cfg(feature = "constraint")]
    pub(super) fn from_inner(inner: Arc<Inner>) -> Self {
        Self(inner)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0.path
    }

    /// Every string that is read as an added token.
    pub(super) fn added_tokens(&self) -> &[String] {
        &self.0.added
    }

    /// `eos_token` and the like, as a template sees them.
    pub(super) fn special_token_variables(&self) -> minijinja::Value {
        minijinja::value::Serde(&self.0.special_tokens).into()
    }

    /// `text` cut at its added tokens, by their exact strings: no normalization, which could
    /// make one of text that only resembles it.
    pub(super) fn split_added(&self, text: &str) -> Result<Vec<Segment>> {
        let added = self.0.tokenizer.get_added_vocabulary();
        run(|| {
            let pieces = added.extract_and_normalize(None::<&NormalizerWrapper>, text);
            let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
            Ok(splits
                .into_iter()
                .map(|(text, _, tokens)| match tokens.as_deref() {
                    Some([token]) => Segment::Token(token.id),
                    _ => Segment::Text(text.to_owned()),
                })
                .collect())
        })
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.0.path)
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

/// Runs the tokenizers crate; its errors and panics here are bugs, of its or ours.
fn run<T>(body: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let failed = || Error::new(ErrorKind::Internal, "tokenizer failed");
    match fenced(body) {
        Ok(result) => {
            result.map_err(|error| failed().with_why(error.to_string()).with_source(error))
        }
        Err(panic) => Err(failed().with_why(format!("the tokenizers crate panicked: {panic}"))),
    }
}

fn check_white_space(text: &str) -> Result<()> {
    // Most texts are shorter than the limit in bytes and need no look.
    if text.len() <= MAX_WHITE_SPACE_RUN {
        return Ok(());
    }
    let mut run = 0;
    for c in text.chars() {
        run = if c.is_whitespace() { run + 1 } else { 0 };
        if run > MAX_WHITE_SPACE_RUN {
            return Err(
                Error::new(ErrorKind::InvalidArgument, "text cannot be encoded")
                    .with_key("text")
                    .with_why(format!(
                        "more than {MAX_WHITE_SPACE_RUN} white-space characters in a row"
                    ))
                    .with_help("shorten the run of white space"),
            );
        }
    }
    Ok(())
}

fn added_strings(tokenizer: &BpeTokenizer) -> Vec<String> {
    let vocabulary = tokenizer.get_added_vocabulary();
    let decoder = vocabulary.get_added_tokens_decoder();
    // A token with `normalized` is matched in its normalized spelling.
    let normalized = decoder
        .keys()
        .filter_map(|&id| vocabulary.simple_id_to_token(id));
    let contents = decoder.values().map(|token| token.content.clone());
    let mut strings: Vec<String> = contents.chain(normalized).collect();
    strings.sort_unstable();
    strings.dedup();
    strings
}

fn special_ids(tokenizer: &BpeTokenizer) -> HashSet<u32> {
    let decoder = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
    let special = decoder.iter().filter(|(_, token)| token.special);
    special.map(|(&id, _)| id).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// The 256 bytes, a few merges, an ordinary added token and Qwen2's three specials.
    fn small_json() -> Value {
        let mut vocab = serde_json::Map::new();
        let mut by_byte: Vec<(u8, char)> = crate::text::token_bytes::byte_alphabet()
            .into_iter()
            .map(|(c, b)| (b, c))
            .collect();
        by_byte.sort_unstable();
        for (byte, c) in by_byte {
            vocab.insert(c.to_string(), json!(byte));
        }
        let merges = [("h", "i"), ("Ġ", "hi"), ("<", "|"), ("ä", "½")];
        for (left, right) in merges {
            vocab.insert(format!("{left}{right}"), json!(vocab.len()));
        }
        let contents = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"];
        let added: Vec<Value> = contents
            .iter()
            .zip(vocab.len()..)
            .map(|(content, id)| {
                json!({"id": id, "content": content, "special": id != vocab.len() + 3, "normalized": false,
                       "single_word": false, "lstrip": false, "rstrip": false})
            })
            .collect();
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}, byte_level]},
            "post_processor": byte_level, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                      "merges": merges.map(|(left, right)| format!("{left} {right}"))},
        })
    }

    pub(in crate::text) fn config_with_template(template: &str) -> String {
        json!({"chat_template": template, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>",
               "bos_token": null})
        .to_string()
    }

    pub(in crate::text) fn small_tokenizer(
        config: Option<&str>,
        template: Option<&str>,
    ) -> Result<Tokenizer> {
        build(&small_json(), config, template)
    }

    fn build(json: &Value, config: Option<&str>, template: Option<&str>) -> Result<Tokenizer> {
        let path = Path::new("/m/tokenizer.json");
        Tokenizer::from_bytes(
            json.to_string().as_bytes(),
            config.map(str::as_bytes),
            template,
            path,
        )
    }

    #[test]
    fn added_tokens_are_read_only_when_asked() {
        let tokenizer = small_tokenizer(None, None).unwrap();
        let id = |token| tokenizer.token_to_id(token).unwrap();
        let text = "hi<|im_end|><tool>";
        let plain = tokenizer.encode(text).unwrap();
        assert!(plain.iter().all(|&id| id < 260), "{plain:?}");
        assert_eq!(tokenizer.decode(&plain, true).unwrap(), text);
        let read = tokenizer.encode_with_special_tokens(text).unwrap();
        assert_eq!(read, [id("hi"), id("<|im_end|>"), id("<tool>")]);
        assert_eq!(tokenizer.decode(&read, true).unwrap(), "hi<tool>");
        assert_eq!(tokenizer.decode(&read, false).unwrap(), text);
        assert!(tokenizer.encode("").unwrap().is_empty());
    }

    #[test]
    fn token_bytes_are_the_bytes_and_not_their_alphabet() {
        let tokenizer = small_tokenizer(None, None).unwrap();
        let bytes = |token| {
            tokenizer
                .token_bytes(tokenizer.token_to_id(token).unwrap())
                .unwrap()
        };
        assert_eq!(bytes("Ġhi"), b" hi");
        assert_eq!(bytes("ä½"), [0xE4, 0xBD]);
        assert_eq!(bytes("<|im_end|>"), b"<|im_end|>");
        for byte in 0..=255_u8 {
            assert_eq!(tokenizer.token_bytes(u32::from(byte)), Some(&[byte][..]));
        }
        assert_eq!(tokenizer.vocab_size(), 264);
        assert_eq!(tokenizer.token_bytes(264), None);
    }

    #[test]
    fn the_config_names_the_end_of_a_turn_and_the_template() {
        let tokenizer = small_tokenizer(Some(&config_with_template("from config")), None).unwrap();
        assert_eq!(
            tokenizer.eos_token_id(),
            tokenizer.token_to_id("<|im_end|>")
        );
        assert_eq!(
            tokenizer.pad_token_id(),
            tokenizer.token_to_id("<|endoftext|>")
        );
        assert_eq!(tokenizer.chat_template(), Some("from config"));
        let own =
            small_tokenizer(Some(&config_with_template("from config")), Some("own file")).unwrap();
        assert_eq!(own.chat_template(), Some("own file"));
        let listed = r#"{"chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]}"#;
        assert_eq!(
            small_tokenizer(Some(listed), None).unwrap().chat_template(),
            Some("b")
        );
    }

    #[test]
    fn a_token_only_the_config_has_is_added() {
        let config = r#"{"added_tokens_decoder": {"264": {"content": "<new>", "special": true}}}"#;
        let tokenizer = small_tokenizer(Some(config), None).unwrap();
        assert_eq!(
            tokenizer.encode_with_special_tokens("<new>").unwrap(),
            [264]
        );
        assert!(tokenizer.is_special(264));
        let config = r#"{"added_tokens_decoder": {"999": {"content": "<new>"}}}"#;
        let error = small_tokenizer(Some(config), None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFile);
    }

    #[test]
    fn a_config_of_wrong_types_names_its_key() {
        let cases = [
            (r#"[]"#, "(whole file)"),
            (r#"{"eos_token": 7}"#, "eos_token"),
            (r#"{"eos_token": {"contents": "x"}}"#, "eos_token"),
            (r#"{"eos_token": "<nowhere>"}"#, "eos_token"),
            (r#"{"chat_template": 7}"#, "chat_template"),
            (r#"{"chat_template": []}"#, "chat_template"),
            (r#"{"added_tokens_decoder": []}"#, "added_tokens_decoder"),
            (
                r#"{"added_tokens_decoder": {"x": {"content": "y"}}}"#,
                "added_tokens_decoder.x",
            ),
            (
                r#"{"added_tokens_decoder": {"1": 5}}"#,
                "added_tokens_decoder.1",
            ),
        ];
        for (config, key) in cases {
            let error = small_tokenizer(Some(config), None).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidFile, "{config}");
            assert_eq!(error.key(), Some(key), "{config}");
            assert_eq!(error.path(), Some(Path::new("/m/tokenizer_config.json")));
            assert!(error.help().is_some());
        }
    }

    #[test]
    fn a_bad_file_is_a_typed_error() {
        let refuse = |edit: &dyn Fn(&mut Value)| {
            let mut json = small_json();
            edit(&mut json);
            build(&json, None, None).unwrap_err()
        };
        let absurd = refuse(&|json| json["model"]["vocab"]["Ġhi"] = json!(4_000_000_000_u32));
        assert_eq!(absurd.kind(), ErrorKind::InvalidFile);
        assert!(absurd.to_string().contains("4000000000"), "{absurd}");
        let shifted = refuse(&|json| json["added_tokens"][1]["id"] = json!(4_000_000_000_u32));
        assert!(shifted.key().unwrap().contains("<|im_start|>"));
        let twice = refuse(&|json| json["model"]["vocab"]["Ġhi"] = json!(0));
        assert_eq!(twice.kind(), ErrorKind::InvalidFile);
        let merges = refuse(&|json| json["model"]["merges"][0] = json!("q zzz"));
        assert_eq!(merges.kind(), ErrorKind::InvalidFile);
        let unigram = refuse(&|json| json["model"]["type"] = json!("Unigram"));
        assert_eq!(
            (unigram.kind(), unigram.key()),
            (ErrorKind::Unsupported, Some("model.type"))
        );
        let decoder = refuse(&|json| json["decoder"] = Value::Null);
        assert_eq!(decoder.kind(), ErrorKind::Unsupported);
        let dropout = refuse(&|json| json["model"]["dropout"] = json!(0.1));
        assert_eq!(dropout.key(), Some("model.dropout"));
    }

    #[test]
    fn cropping_and_padding_in_the_file_do_not_change_tokens() {
        let mut json = small_json();
        json["truncation"] =
            json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
        let tokenizer = build(&json, None, None).unwrap();
        assert_eq!(tokenizer.encode("a b c d").unwrap().len(), 7);
    }

    #[test]
    fn cut_off_text_and_bad_utf8_name_line_and_column() {
        let path = Path::new("/m/tokenizer.json");
        let error =
            Tokenizer::from_bytes(b"{\"model\": {\n\"type\"", None, None, path).unwrap_err();
        assert!(error.to_string().contains("cut off"), "{error}");
        assert!(error.to_string().contains("line 2 column 6"), "{error}");
        let error = Tokenizer::from_bytes(b"{\n \"\xFF\"}", None, None, path).unwrap_err();
        assert!(
            error.to_string().contains("not UTF-8 at line 2 column 3"),
            "{error}"
        );
        assert_eq!(error.kind(), ErrorKind::InvalidFile);
    }

    #[test]
    fn a_missing_file_says_how_to_get_it() {
        let directory = tempfile::tempdir().unwrap();
        let error = Tokenizer::from_files(directory.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.path().unwrap().ends_with("tokenizer.json"));
        assert!(error.help().unwrap().contains("save_pretrained"));
    }

    #[test]
    fn an_unknown_id_is_not_decoded() {
        let tokenizer = small_tokenizer(None, None).unwrap();
        let error = tokenizer.decode(&[104, 999], false).unwrap_err();
        assert_eq!(
            (error.kind(), error.key()),
            (ErrorKind::InvalidArgument, Some("tokens[1]"))
        );
    }

    #[test]
    fn a_long_run_of_white_space_is_encoded_right_or_refused() {
        let tokenizer = small_tokenizer(None, None).unwrap();
        let text = " ".repeat(MAX_WHITE_SPACE_RUN) + "hi";
        let tokens = tokenizer.encode(&text).unwrap();
        // `\s+(?!\S)` leaves the last space to the word.
        assert_eq!(tokens.last(), tokenizer.token_to_id("Ġhi").as_ref());
        let error = tokenizer.encode(&format!(" {text}")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn ascii_text_survives_the_round_trip(text in "[ -~\n]{0,40}") {
            let tokenizer = small_tokenizer(None, None).unwrap();
            let tokens = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text);
        }

        /// Flips bytes of a good file: an error or a tokenizer, never a panic.
        #[test]
        fn a_damaged_file_never_panics(at in 0..6000_usize, byte in any::<u8>(), cut in any::<bool>()) {
            let mut bytes = small_json().to_string().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(if cut { at } else { bytes.len() });
            if let Ok(tokenizer) = Tokenizer::from_bytes(&bytes, None, None, Path::new("/m/tokenizer.json")) {
                tokenizer.encode_with_special_tokens("hi <|im_end|> there").unwrap();
            }
        }
    }
}
