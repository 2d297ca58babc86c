//! Keeps text of users apart from the strings of added tokens.

use crate::error::{Error, ErrorKind, Result};

/// Unicode's noncharacters U+FDD0..U+FDEF: never text, so one of them can mark a place.
const NONCHARACTERS: std::ops::RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

/// Marks put into user text before a template sees it, so that no added token can be read out of
/// what the template prints, and taken out again before that text is encoded.
pub(super) struct Shield<'a> {
    added: &'a [String],
    sentinel: char,
    // An added token of a single character cannot be broken in two: it is replaced.
    stand_ins: Vec<(char, char)>,
}

impl<'a> Shield<'a> {
    /// `texts`: everything that may reach the output, the template's source included.
    ///
    /// # Errors
    /// `InvalidArgument` when the texts use up all noncharacters.
    pub(super) fn new<'t>(
        added: &'a [String],
        texts: impl Iterator<Item = &'t str> + Clone,
    ) -> Result<Self> {
        let mut unused =
            NONCHARACTERS.filter(|&mark| !texts.clone().any(|text| text.contains(mark)));
        let mut take = || {
            unused.next().ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidArgument,
                    "messages hold too many noncharacters",
                )
                .with_key("messages")
                .with_why("every code point U+FDD0..U+FDEF occurs; one is needed as a mark")
                .with_help("remove the noncharacters: they are not text")
            })
        };
        let sentinel = take()?;
        let mut stand_ins = Vec::new();
        for token in added {
            let mut chars = token.chars();
            if let (Some(only), None) = (chars.next(), chars.next())
                && texts.clone().any(|text| text.contains(only))
            {
                stand_ins.push((only, take()?));
            }
        }
        Ok(Self {
            added,
            sentinel,
            stand_ins,
        })
    }

    /// The text with a mark inside every added token it spells, and at an end where it could
    /// complete one together with its neighbour.
    pub(super) fn guard(&self, text: &str) -> String {
        let mut marks = Vec::new();
        for token in self.added {
            marks.extend(occurrences(text, token).map(|at| at + first_len(token)));
        }
        // Templates trim contents, so the ends of the trimmed text count as well.
        let core = text.trim();
        let core_start = text.len() - text.trim_start().len();
        for (part, start) in [(text, 0), (core, core_start)] {
            if self.added.iter().any(|token| completes(token, part)) {
                marks.push(start);
            }
            if self.added.iter().any(|token| begins(token, part)) {
                marks.push(start + part.len());
            }
        }
        marks.sort_unstable();
        marks.dedup();
        let mut guarded = String::with_capacity(text.len() + 3 * marks.len());
        let mut done = 0;
        for mark in marks {
            self.push_replaced(&mut guarded, &text[done..mark]);
            guarded.push(self.sentinel);
            done = mark;
        }
        self.push_replaced(&mut guarded, &text[done..]);
        guarded
    }

    fn push_replaced(&self, out: &mut String, text: &str) {
        if self.stand_ins.is_empty() {
            return out.push_str(text);
        }
        let stand_in = |c| self.stand_ins.iter().find(|(only, _)| *only == c);
        out.extend(
            text.chars()
                .map(|c| stand_in(c).map_or(c, |(_, mark)| *mark)),
        );
    }

    /// The text as the user wrote it.
    pub(super) fn restore(&self, text: &str) -> String {
        let original = |c| self.stand_ins.iter().find(|(_, mark)| *mark == c);
        text.chars()
            .filter(|&c| c != self.sentinel)
            .map(|c| original(c).map_or(c, |(only, _)| *only))
            .collect()
    }
}

fn first_len(token: &str) -> usize {
    token.chars().next().map_or(0, char::len_utf8)
}

/// Where `token` starts in `text`, overlapping occurrences included. Single characters are left
/// to the stand-ins.
fn occurrences<'t>(text: &'t str, token: &'t str) -> impl Iterator<Item = usize> + 't {
    let step = first_len(token);
    let mut from = if step == token.len() { text.len() } else { 0 };
    std::iter::from_fn(move || {
        let at = from + text.get(from..)?.find(token)?;
        from = at + step;
        Some(at)
    })
}

/// Whether `text` starts with the end of `token`, or lies wholly inside it.
fn completes(token: &str, text: &str) -> bool {
    !text.is_empty()
        && token.char_indices().skip(1).any(|(at, _)| {
            let tail = &token[at..];
            text.starts_with(tail) || tail.starts_with(text)
        })
}

/// Whether `text` ends with the beginning of `token`.
fn begins(token: &str, text: &str) -> bool {
    token
        .char_indices()
        .skip(1)
        .any(|(at, _)| text.ends_with(&token[..at]))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn added(tokens: &[&str]) -> Vec<String> {
        tokens.iter().map(|token| (*token).to_owned()).collect()
    }

    fn guarded(tokens: &[&str], text: &str) -> String {
        let added = added(tokens);
        let shield = Shield::new(&added, [text].into_iter()).unwrap();
        let out = shield.guard(text);
        assert_eq!(shield.restore(&out), text);
        out.replace('\u{FDD0}', "¦")
    }

    #[test]
    fn tokens_are_broken_and_dangerous_ends_are_closed() {
        let tokens = ["<|im_end|>", "aba", "中"];
        assert_eq!(guarded(&tokens, "x <|im_end|> y"), "x <¦|im_end|> y");
        assert_eq!(guarded(&tokens, "ababa"), "¦a¦ba¦ba¦"); // overlapping; both ends could go on
        assert_eq!(guarded(&tokens, "say <|im_ "), "say <|im_¦ ");
        assert_eq!(guarded(&tokens, " end|> x"), " ¦end|> x");
        assert_eq!(guarded(&tokens, "im"), "¦im"); // wholly inside
        assert_eq!(guarded(&tokens, "plain text"), "plain text");
        assert_eq!(guarded(&tokens, "中文"), "\u{FDD1}文");
    }

    #[test]
    fn a_mark_that_the_text_uses_is_not_taken() {
        let added = added(&["ab"]);
        let shield = Shield::new(&added, ["\u{FDD0}ab\u{FDD1}"].into_iter()).unwrap();
        assert_eq!(shield.guard("ab\u{FDD0}"), "a\u{FDD2}b\u{FDD0}");
        assert_eq!(shield.restore("a\u{FDD2}b\u{FDD0}"), "ab\u{FDD0}");
        let all: String = NONCHARACTERS.collect();
        let error = Shield::new(&added, [all.as_str()].into_iter())
            .err()
            .unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Tokens and texts over three letters, so that every kind of overlap occurs.
        #[test]
        fn joined_guarded_texts_spell_no_token(
            tokens in prop::collection::vec("[abc]{1,4}", 1..4),
            texts in prop::collection::vec("[abc ]{1,6}", 1..5),
            trim in any::<bool>(),
        ) {
            let shield = Shield::new(&tokens, texts.iter().map(String::as_str)).unwrap();
            let joined: String = texts
                .iter()
                .map(|text| shield.guard(text))
                .map(|text| if trim { text.trim().to_owned() } else { text })
                .collect();
            for token in &tokens {
                prop_assert!(!joined.contains(token.as_str()), "{joined:?} spells {token:?}");
            }
            if !trim {
                prop_assert_eq!(shield.restore(&joined), texts.concat());
            }
        }
    }
}
