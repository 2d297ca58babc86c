//! A tokenizer from where checkpoints have it: a directory, its `tokenizer.json`, or a GGUF file.

use std::path::Path;

use crate::checkpoint::{Checkpoint, gguf};
use crate::error::Result;
use crate::text::Tokenizer;

impl Tokenizer {
    /// Reads the tokenizer of a checkpoint.
    ///
    /// `path` is a directory with `tokenizer.json` (and, where they exist,
    /// `tokenizer_config.json` and `chat_template.jinja`), that `tokenizer.json` itself, or a GGUF
    /// file, which need not have weights.
    ///
    /// # Errors
    /// `NotFound` when there is no tokenizer; `InvalidFile` when a file is cut off, not what its
    /// name says, not UTF-8 or contradicts itself; `Unsupported` when it is not byte-level BPE.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        match gguf::file_at(path)? {
            None => Self::from_files(path),
            Some(file) => {
                let (tokenizer, config) = gguf::tokenizer(&file)?;
                Self::from_bytes(&tokenizer, Some(&config), None, &file)
            }
        }
    }

    /// The tokenizer of an opened checkpoint.
    pub(super) fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        match checkpoint.embedded() {
            None => Self::from_reader(checkpoint.path().join("tokenizer.json"), &|name| {
                checkpoint.companion(name)
            }),
            Some(files) => Self::from_bytes(
                &files.tokenizer,
                Some(&files.tokenizer_config),
                None,
                &files.path,
            ),
        }
    }
}
