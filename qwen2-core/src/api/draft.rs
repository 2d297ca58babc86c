//! A small model beside a large one, for speculative decoding.

use std::sync::Arc;

use super::model::{Inner, Model};
use crate::error::{Error, ErrorKind, Result};
use crate::generate::{DraftModel, Host};
use crate::text::Tokenizer;

impl Model {
    /// This model with `draft`, a smaller one of the same vocabulary, which proposes tokens; several are
    /// checked in one step. The tokens are those of this model alone, for every seed, as far as a
    /// forward of several tokens rounds like one of a single token; how fast they come depends on how
    /// often both agree: see [`Usage::accepted_tokens`](crate::Usage::accepted_tokens).
    ///
    /// Both models stay usable on their own, and share their weights with the new handle. Beyond the
    /// draft's context it proposes nothing, and an [`Engine`](crate::Engine) computes without it. For the number of tokens see
    /// [`GenerateOptions::draft_tokens`](crate::GenerateOptions::draft_tokens).
    ///
    /// # Errors
    /// `InvalidArgument` where the vocabularies differ.
    pub fn with_draft(&self, draft: &Self) -> Result<Self> {
        check_vocabulary(self.tokenizer(), draft.tokenizer())?;
        let host = &draft.inner.host;
        let vocab_size = |model: &Self| model.inner.config.vocab_size;
        let draft = DraftModel {
            network: Arc::clone(&host.network),
            prefill_chunk: host.prefill_chunk,
            context_length: draft.inner.context_length,
            vocab_size: vocab_size(self).min(vocab_size(draft)),
        };
        let inner = Inner::clone(&self.inner);
        Ok(Self {
            inner: Arc::new(Inner {
                host: Host {
                    draft: Some(draft),
                    ..inner.host
                },
                ..inner
            }),
        })
    }
}

fn check_vocabulary(ours: &Tokenizer, theirs: &Tokenizer) -> Result<()> {
    let names = |id| (ours.id_to_token(id), theirs.id_to_token(id));
    // Where one has more, they are padding, or control tokens that the other never proposes.
    let shared = ours.vocab_size().min(theirs.vocab_size());
    let differs = |id: &u32| {
        ours.token_bytes(*id) != theirs.token_bytes(*id)
            || ours.is_special(*id) != theirs.is_special(*id)
    };
    // Ids are u32 everywhere, so the count of them fits.
    let Some(id) = (0..shared as u32).find(differs) else {
        return Ok(());
    };
    let name = |name: Option<String>| name.map_or("nothing".to_owned(), |name| format!("{name:?}"));
    let (our, their) = names(id);
    Err(Error::new(
        ErrorKind::InvalidArgument,
        "draft model has another vocabulary",
    )
    .with_key("draft")
    .with_why(format!(
        "token {id} is {}, in the draft model {}",
        name(our),
        name(their)
    ))
    .with_help("take a smaller model of the same family, such as Qwen2-0.5B for Qwen2-7B"))
}
