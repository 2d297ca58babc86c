//! Which past positions a query sees, all of them or a sliding window, and from how far.

/// The past of one forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Visible {
    /// Positions in the cache before the first query.
    pub(crate) n_past: usize,
    /// A query at position `i` sees the positions `j` with `i - window < j <= i`.
    pub(crate) window: Option<usize>,
    /// The length of a chunk (arXiv:2402.17463): queries come in [`Distance::COUNT`] rotations, and
    /// the chunks between a query and a key decide which of them the key meets.
    pub(crate) chunk: Option<usize>,
}

/// How far a key is from a query, in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Distance {
    /// In the same chunk.
    Intra,
    /// In the chunk before.
    Successive,
    /// Further back.
    Inter,
}

impl Distance {
    pub(crate) const COUNT: usize = 3;
}

impl Visible {
    /// All that is before, in one rotation.
    #[cfg(test)]
    pub(crate) fn all(n_past: usize) -> Self {
        Self {
            n_past,
            window: None,
            chunk: None,
        }
    }

    /// First visible position of the query at position `position`.
    pub(crate) fn first(self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The rotations that queries come in.
    pub(crate) fn rotations(self) -> usize {
        self.chunk.map_or(1, |_| Distance::COUNT)
    }

    /// Of the key at position `key` from the query at `position`, which is not before it.
    pub(crate) fn distance(self, position: usize, key: usize) -> Distance {
        let Some(chunk) = self.chunk else {
            return Distance::Intra;
        };
        match position / chunk - key / chunk {
            0 => Distance::Intra,
            1 => Distance::Successive,
            _ => Distance::Inter,
        }
    }
}
