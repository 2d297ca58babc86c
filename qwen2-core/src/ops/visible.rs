//! Which past positions a query sees: all of them, or a sliding window.

/// The past of one forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Visible {
    /// Positions in the cache before the first query.
    pub(crate) n_past: usize,
    /// A query at position `i` sees the positions `j` with `i - window < j <= i`.
    pub(crate) window: Option<usize>,
}

impl Visible {
    /// First visible position of the query at position `position`.
    pub(crate) fn first(self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }
}
