//! What the last piece of a stream or a request was, besides its text.

use qwen2_core::Piece;

use crate::calls::Calls;
use crate::logprobs::Recorded;

pub(crate) struct Last {
    pub(crate) token: u32,
    pub(crate) logprobs: Recorded,
    pub(crate) calls: Calls,
}

impl Default for Last {
    fn default() -> Self {
        Self {
            token: u32::MAX,
            logprobs: Recorded::default(),
            calls: Calls::default(),
        }
    }
}

impl From<&Piece> for Last {
    fn from(piece: &Piece) -> Self {
        Self {
            token: piece.token,
            logprobs: piece.logprobs.iter().collect(),
            calls: Calls::from(&piece.tool_calls[..]),
        }
    }
}

impl Last {
    /// The generation has ended: whoever looks for calls after every step is not told the same ones twice.
    pub(crate) fn end(&mut self) {
        self.calls = Calls::default();
    }
}
