//! A sequence that the engine computes: its tokens and cache, and the way to its reader.

use std::sync::Arc;
use std::time::Instant;

use super::super::outlet::Outlet;
use super::super::prefix::{Found, PrefixCache};
use super::super::queue::Place;
use super::super::worker::Waiting;
use super::Share;
use crate::error::{Error, Result};
use crate::fence::fenced;
use crate::generate::{Network, Piece, Sequence, Timings};
use crate::model::cache::Cache;
use crate::model::{Part, Rows};

/// A sequence that is computed.
pub(super) struct Running {
    pub(super) network: Arc<Network>,
    pub(super) sequence: Sequence,
    pub(super) cache: Cache,
    pub(super) outlet: Outlet,
    pub(super) place: Place,
    /// Whole pages at its start that the prefix tree has.
    pub(super) n_pinned: usize,
    /// Its prompt is in the prefix tree.
    pub(super) shared: bool,
    /// It was part of a batch that failed: it runs alone, so that it fails alone.
    pub(super) alone: bool,
    pub(super) started: Instant,
    /// When its first token came.
    pub(super) first: Option<Instant>,
}

impl Running {
    pub(super) fn new(waiting: Waiting, place: Place) -> Self {
        let Waiting { job, outlet } = waiting;
        Self {
            network: job.network,
            sequence: job.sequence,
            cache: job.cache,
            outlet,
            place,
            n_pinned: 0,
            shared: false,
            alone: false,
            started: Instant::now(),
            first: None,
        }
    }

    /// Hands on the token that was chosen and those that a constraint forces behind it, which the next
    /// step reads together; returns how many.
    pub(super) fn take(&mut self, chosen: Result<Piece>) -> Result<u64> {
        let mut n_tokens = 0;
        let mut next = Some(chosen);
        while let Some(piece) = next {
            self.outlet.push(piece?);
            n_tokens += 1;
            next = self.sequence.forced();
        }
        Ok(n_tokens)
    }

    /// Tokens that no forward has seen.
    pub(super) fn pending(&self) -> usize {
        self.sequence.tokens().len() - self.cache.n_tokens()
    }

    /// Bytes of its cache without what the prefix tree has.
    pub(super) fn own_bytes(&self) -> u64 {
        self.cache.bytes() - self.cache.bytes_of_pages(self.n_pinned)
    }

    /// What a step of so many tokens is to give, alone in its batch or not.
    pub(super) fn rows(&self, n_tokens: usize, single: bool) -> Rows {
        let is_last = n_tokens == self.pending();
        match (is_last, single && self.sequence.screens()) {
            _ if self.sequence.reads_prompt() => Rows::All,
            (false, _) => Rows::None,
            (true, true) => Rows::Screened,
            (true, false) => Rows::Last,
        }
    }

    pub(super) fn part(&mut self, share: Share) -> Part<'_> {
        let n_past = self.cache.n_tokens();
        Part {
            tokens: &self.sequence.tokens()[n_past..n_past + share.n_tokens],
            cache: &mut self.cache,
            rows: share.rows,
        }
    }

    /// Begins with what others have computed; with how many tokens. Where a device has no memory for its
    /// copies, the sequence reads them itself.
    pub(super) fn adopt(&mut self, found: Found) -> usize {
        let n_tokens = found.n_tokens;
        match fenced(|| self.cache.adopt(found.pages, n_tokens)) {
            Ok(()) => n_tokens,
            Err(why) => {
                tracing::warn!(why, "a shared prefix was not copied");
                self.cache.clear();
                0
            }
        }
    }

    /// Gives what its cache holds to the prefix tree, as far as a device has memory for its copies; whether
    /// it goes on behind it.
    pub(super) fn share(&mut self, prefix: &mut PrefixCache, goes_on: bool) {
        let (tokens, pinned) = (self.sequence.tokens(), self.n_pinned);
        match fenced(|| prefix.add(&self.network, tokens, &self.cache, pinned, goes_on)) {
            Ok(n_pinned) => self.n_pinned = n_pinned,
            Err(why) => tracing::warn!(why, "a prefix was not copied to be shared"),
        }
        self.shared = true;
    }

    /// Hands the result to the reader, once.
    pub(super) fn tell(&mut self, error: Option<Error>) {
        self.outlet.end(match error {
            Some(error) => Err(error),
            None => {
                let usage = self.sequence.usage();
                let first = self.first.unwrap_or_else(Instant::now);
                let timings = Timings::new(
                    first - self.started,
                    usage.prompt_tokens - usage.cached_tokens,
                    first.elapsed(),
                    usage.completion_tokens.saturating_sub(1),
                );
                Ok(self.sequence.take_generation(timings))
            }
        });
    }
}
