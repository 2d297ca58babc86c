//! The vocabulary as the constraint library reads it: one tree of the bytes of all tokens.

use std::sync::{Arc, Weak};

use llguidance::toktrie::{
    InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv,
};
use llguidance::{ParserFactory, earley::SlicedBiasComputer};

use super::Tokenizer;
use super::tokenizer::Inner;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::fenced;

/// A branch of the library's tree has at most 1024 nodes. Qwen2's longest token has 256 bytes.
const MAX_TOKEN_LEN: usize = 1000;

/// What is shared by all constraints of a tokenizer: the tree, and the parts of it that string and
/// white-space rules take whole. 40 MB and a fifth of a second for Qwen2's 151,646 tokens.
pub(super) type Vocabulary = Result<ParserFactory, String>;

struct Environment {
    trie: TokTrie,
    // Weak: the tokenizer owns this. Whoever runs a constraint holds the tokenizer, too.
    tokenizer: Weak<Inner>,
}

impl Tokenizer {
    /// What compiles constraints, made at the first call.
    ///
    /// # Errors
    /// `Unsupported` for a vocabulary that the library cannot hold.
    pub(crate) fn constraints(&self) -> Result<&ParserFactory> {
        let made = self.vocabulary().get_or_init(|| self.make_vocabulary());
        made.as_ref().map_err(|why| {
            Error::new(ErrorKind::Unsupported, "no constraints for this vocabulary")
                .with_path(self.path())
                .with_why(why)
        })
    }

    /// Stands for every end token in the masks of constraints: the id behind the last one. Which
    /// tokens end a text is a matter of the checkpoint and of the request, not of the vocabulary.
    pub(crate) fn end_id(&self) -> TokenId {
        self.vocab_size() as TokenId
    }

    fn make_vocabulary(&self) -> Vocabulary {
        fenced(|| {
            let mut words: Vec<Vec<u8>> = (0..self.end_id()).map(|id| self.word(id)).collect();
            words.push(b"\xFF<end>".to_vec());
            let info = TokRxInfo::new(words.len() as u32, self.end_id());
            let environment: TokEnv = Arc::new(Environment {
                trie: TokTrie::from(&info, &words),
                tokenizer: self.downgrade(),
            });
            let capabilities = InferenceCapabilities {
                ff_tokens: true,
                ..InferenceCapabilities::default()
            };
            let slices = SlicedBiasComputer::general_slices();
            let mut factory = ParserFactory::new(&environment, capabilities, &slices)
                .map_err(|error| error.to_string())?;
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            Ok(factory)
        })
        .unwrap_or_else(Err)
    }

    /// The bytes of a token; none for a token that no constraint may use. Control tokens begin with
    /// 0xFF, which text never holds: a grammar reaches them by name only.
    fn word(&self, id: TokenId) -> Vec<u8> {
        let bytes = self.token_bytes(id).unwrap_or_default();
        match bytes.first() {
            _ if bytes.len() > MAX_TOKEN_LEN => Vec::new(),
            Some(0xFF) => Vec::new(),
            _ if self.is_special(id) => [b"\xFF", bytes].concat(),
            _ => bytes.to_vec(),
        }
    }
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    /// As the tokenizer would cut the text, so that forced text has the tokens that the model knows.
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            self.encode(text)
                .unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }
}

impl Environment {
    fn encode(&self, text: &str) -> Option<Vec<TokenId>> {
        let tokenizer = Tokenizer::from_inner(self.tokenizer.upgrade()?);
        // Added tokens that are no control tokens, like <tool_call> of later vocabularies, are how
        // the model knows that text.
        let tokens = tokenizer
            .encode_with_special_tokens(text)
            .ok()
            .filter(|tokens| !tokens.iter().any(|&id| tokenizer.is_special(id)))
            .or_else(|| tokenizer.encode(text).ok())?;
        // A normalizer changes the bytes of some texts; forced text must stay as it is.
        (self.trie.decode(&tokens) == text.as_bytes()).then_some(tokens)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use crate::text::tokenizer::tests::small_tokenizer;

    #[test]
    fn the_tree_holds_every_token_and_the_end_behind_them() {
        let tokenizer = small_tokenizer(None, None).unwrap();
        let trie = tokenizer.constraints().unwrap().tok_env().tok_trie();
        assert_eq!(trie.vocab_size(), tokenizer.vocab_size() + 1);
        let id = |token| tokenizer.token_to_id(token).unwrap();
        assert_eq!(trie.token_id(b" hi"), Some(id("Ġhi")));
        // A control token is not its text; an added token that is no control token is.
        assert_eq!(trie.token_id(b"<|im_end|>"), None);
        assert_eq!(trie.get_special_token("<|im_end|>"), Some(id("<|im_end|>")));
        assert_eq!(trie.token_id(b"<tool>"), Some(id("<tool>")));
        assert_eq!(trie.eos_token(), tokenizer.end_id());
    }

    #[test]
    fn forced_text_has_the_tokenizers_tokens_unless_it_would_be_normalized() {
        let tokenizer = small_tokenizer(None, None).unwrap();
        let environment = tokenizer.constraints().unwrap().tok_env();
        let control = "hi hi<|im_end|>";
        assert_eq!(
            environment.tokenize(control),
            tokenizer.encode(control).unwrap()
        );
        let added = tokenizer.encode_with_special_tokens("hi<tool>").unwrap();
        assert_eq!(environment.tokenize("hi<tool>"), added);
        let decomposed = "e\u{301} hi";
        let tokens = environment.tokenize(decomposed);
        assert_eq!(tokenizer.decode(&tokens, false).unwrap(), decomposed);
        // Half a character is text of a token, too.
        assert_eq!(environment.tokenize_bytes(b"\xE4\xBD").len(), 1);
    }
}
