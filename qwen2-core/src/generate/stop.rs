//! Where a generation ends.

use serde::{Deserialize, Serialize};

/// Why a generation ended.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A token or a string of the stop set came; which one, says [`StopMatch`].
    Stop,
    /// `max_new_tokens` or the end of the context was reached.
    Length,
    /// The model asks for tools to be called.
    ToolCalls,
    /// The caller cancelled; the text so far is kept.
    Cancelled,
    /// The `timeout` passed; the text so far is kept.
    Timeout,
}

impl FinishReason {
    /// The name as Python, JSON and OpenAI's interface spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::Cancelled => "cancelled",
            Self::Timeout => "timeout",
        }
    }
}

/// What stopped a generation with [`FinishReason::Stop`].
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopMatch {
    /// An end token of the checkpoint.
    Eos(u32),
    /// One of the caller's `stop_token_ids`.
    Token(u32),
    /// One of the caller's `stop` strings.
    Text(String),
    /// The constraint, which allows nothing more.
    Constraint,
}

/// Looks for stop strings in text that comes in pieces.
///
/// The match that completes first wins, whatever the pieces are; of several that complete at the
/// same character the longest. The stop text itself is not let out.
#[derive(Debug, Default)]
pub(crate) struct StopMatcher {
    stop: Vec<String>,
    // The end of the text so far that may still become a stop string.
    held: String,
    matched: Option<StopMatch>,
}

impl StopMatcher {
    /// `stop`: non-empty strings, as `Resolved` guarantees.
    pub(crate) fn new(stop: &[String]) -> Self {
        Self {
            stop: stop.to_vec(),
            ..Self::default()
        }
    }

    /// The text that is certain now, and the stop string if one came. After a match nothing more
    /// comes out.
    pub(crate) fn push(&mut self, text: &str) -> (String, Option<StopMatch>) {
        if self.matched.is_some() {
            return (String::new(), self.matched.clone());
        }
        self.held.push_str(text);
        if let Some((start, stop)) = self.find() {
            self.held.truncate(start);
            self.matched = Some(StopMatch::Text(stop));
            return (std::mem::take(&mut self.held), self.matched.clone());
        }
        let certain = self.held.len() - self.undecided();
        let rest = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// The text that was held back and can no longer become a stop string.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start and text of the match that completes first. What was held back covers every match
    /// that could have begun earlier.
    fn find(&self) -> Option<(usize, String)> {
        let found = self.stop.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, stop))
        });
        let (_, start, stop) = found.min_by_key(|&(end, start, _)| (end, start))?;
        Some((start, stop.clone()))
    }

    /// Length of the longest end of the held text that begins a stop string.
    fn undecided(&self) -> usize {
        let longest = |stop: &String| {
            let starts = stop.char_indices().map(|(at, _)| at).skip(1);
            starts
                .filter(|&len| self.held.ends_with(&stop[..len]))
                .max()
                .unwrap_or(0)
        };
        self.stop.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Deserialize)]
    struct Vectors {
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        name: String,
        pieces: Vec<String>,
        stop: Vec<String>,
        deltas: Vec<String>,
        flush: String,
        emitted: String,
        matched: Option<String>,
    }

    #[test]
    fn the_shared_vectors_come_out_piece_by_piece() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../conformance/stop.json");
        let vectors: Vectors = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(!vectors.cases.is_empty());
        for case in vectors.cases {
            let mut matcher = StopMatcher::new(&case.stop);
            let mut deltas = Vec::new();
            let mut matched = None;
            for piece in &case.pieces {
                let (text, found) = matcher.push(piece);
                deltas.push(text);
                matched = found;
                if matched.is_some() {
                    break;
                }
            }
            let flush = matcher.finish();
            assert_eq!(deltas, case.deltas, "{}", case.name);
            assert_eq!(flush, case.flush, "{}", case.name);
            assert_eq!(deltas.concat() + &flush, case.emitted, "{}", case.name);
            assert_eq!(matched, case.matched.map(StopMatch::Text), "{}", case.name);
        }
    }

    #[test]
    fn nothing_comes_out_after_a_match() {
        let mut matcher = StopMatcher::new(&["END".to_owned()]);
        let end = Some(StopMatch::Text("END".to_owned()));
        assert_eq!(matcher.push("a END b"), ("a ".to_owned(), end.clone()));
        assert_eq!(matcher.push(" c"), (String::new(), end));
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn names_are_those_of_serde() {
        for reason in [
            FinishReason::Stop,
            FinishReason::Length,
            FinishReason::ToolCalls,
            FinishReason::Cancelled,
            FinishReason::Timeout,
        ] {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.name());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Few letters, so that stop strings overlap; the reference reads character by character.
        #[test]
        fn the_output_is_the_text_cut_at_the_first_match_whatever_the_splits(
            pieces in prop::collection::vec("[ab你]{0,4}", 0..8),
            stop in prop::collection::vec("[ab你]{1,4}", 0..4),
        ) {
            let text = pieces.concat();
            let mut expected = (text.clone(), None);
            for (at, c) in text.char_indices() {
                let so_far = &text[..at + c.len_utf8()];
                let found = stop.iter().filter(|stop| so_far.ends_with(stop.as_str())).max_by_key(|stop| stop.len());
                if let Some(stop) = found {
                    let rest = so_far.len() - stop.len();
                    expected = (so_far[..rest].to_owned(), Some(StopMatch::Text(stop.clone())));
                    break;
                }
            }
            let mut matcher = StopMatcher::new(&stop);
            let mut out = String::new();
            let mut matched = None;
            for piece in &pieces {
                let (text, found) = matcher.push(piece);
                out += &text;
                matched = found;
                // Never more is held back than could still become a stop string.
                let longest = stop.iter().map(String::len).max().unwrap_or(1);
                prop_assert!(matcher.held.len() < longest);
            }
            out += &matcher.finish();
            prop_assert_eq!((out, matched), expected);
        }
    }
}
