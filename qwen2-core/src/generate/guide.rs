//! One request's constraint at work: which tokens may follow, and which must.

use crate::error::Result;
use crate::generate::Constraint;
use crate::text::Tokenizer;

#[cfg(not(feature = "constraint"))]
pub(crate) use absent::Guide;
#[cfg(feature = "constraint")]
pub(crate) use present::Guide;

#[cfg(feature = "constraint")]
mod present {
    use std::collections::VecDeque;

    use llguidance::Matcher;
    use llguidance::toktrie::SimpleVob;

    use super::{Constraint, Result, Tokenizer};
    use crate::error::{Error, ErrorKind};
    use crate::fence::fenced;
    use crate::generate::compile::{compile, failed, one_line};

    /// Where a text stands in its constraint.
    pub(crate) struct Guide {
        matcher: Matcher,
        /// The bit of the masks that stands for every end token.
        end: u32,
        /// Tokens that must follow.
        forced: VecDeque<u32>,
        /// Tokens that may follow, when none must.
        mask: Option<SimpleVob>,
        may_end: bool,
        complete: bool,
    }

    impl Guide {
        /// # Errors
        /// `InvalidConstraint` for a constraint that cannot be compiled or that no text keeps to.
        pub(crate) fn new(tokenizer: &Tokenizer, constraint: &Constraint) -> Result<Self> {
            let mut guide = Self {
                matcher: compile(tokenizer, constraint)?,
                end: tokenizer.end_id(),
                forced: VecDeque::new(),
                mask: None,
                may_end: false,
                complete: false,
            };
            guide.look_ahead()?;
            Ok(guide)
        }

        /// The next token, where the constraint leaves no choice.
        pub(crate) fn forced(&self) -> Option<u32> {
            self.forced.front().copied()
        }

        /// Whether nothing may follow any more.
        pub(crate) fn is_complete(&self) -> bool {
            self.complete
        }

        /// Makes every token impossible that may not follow; the `ends` may where the text may end.
        ///
        /// # Errors
        /// `InvalidConstraint` when nothing else made possible may follow.
        pub(crate) fn mask(&self, logits: &mut [f32], ends: &[u32]) -> Result<()> {
            let end_logits = ends
                .iter()
                .filter(|_| self.may_end)
                .filter_map(|&id| Some((id as usize, *logits.get(id as usize)?)));
            let end_logits: Vec<(usize, f32)> = end_logits.collect();
            match (self.forced(), &self.mask) {
                (Some(token), _) => keep_only(logits, token as usize),
                (None, Some(mask)) => keep(logits, mask.as_slice()),
                (None, None) => logits.fill(f32::NEG_INFINITY),
            }
            for (id, logit) in end_logits {
                logits[id] = logit;
            }
            match logits.iter().all(|&logit| logit == f32::NEG_INFINITY) {
                false => Ok(()),
                true => Err(
                    Error::new(ErrorKind::InvalidConstraint, "no token is possible")
                        .with_key("constraint")
                        .with_why("other settings forbid every token that the constraint allows")
                        .with_help(
                            "check the logits processor and the settings that forbid tokens",
                        ),
                ),
            }
        }

        /// Takes the token that was chosen.
        ///
        /// # Errors
        /// `InvalidConstraint` for one that may not follow, and when the work exceeds the bounds.
        pub(crate) fn accept(&mut self, token: u32) -> Result<()> {
            self.run(|matcher| matcher.consume_token(token).map_err(|e| e.to_string()))?;
            self.forced.pop_front();
            match self.forced.is_empty() {
                true => self.look_ahead(),
                false => Ok(()),
            }
        }

        /// What may follow the text so far.
        fn look_ahead(&mut self) -> Result<()> {
            self.mask = None;
            self.may_end = false;
            self.complete = self.matcher.is_stopped();
            if self.complete {
                return Ok(());
            }
            self.forced = self.run(|matcher| Ok(matcher.compute_ff_tokens()))?.into();
            if !self.forced.is_empty() {
                return Ok(());
            }
            let mut mask = self.run(|m| m.compute_mask().map_err(|e| e.to_string()))?;
            self.may_end = mask.is_allowed(self.end);
            // Behind the last token of the tokenizer a model has rows that are no tokens.
            mask.disallow_token(self.end);
            self.complete = self.may_end && mask.is_zero();
            self.mask = Some(mask);
            Ok(())
        }

        fn run<T>(&mut self, body: impl FnOnce(&mut Matcher) -> Result<T, String>) -> Result<T> {
            let outcome = fenced(|| body(&mut self.matcher)).unwrap_or_else(Err);
            // Some operations report a failure by the state that they leave.
            let why = match (outcome, self.matcher.get_error()) {
                (Ok(value), None) => return Ok(value),
                (Err(why), None) | (_, Some(why)) => why,
            };
            Err(failed("constraint cannot be kept to").with_why(one_line(&why)))
        }
    }

    /// Keeps the logits whose bits are set.
    fn keep(logits: &mut [f32], mask: &[u32]) {
        let mut words = mask.iter();
        for logits in logits.chunks_mut(32) {
            match words.next() {
                Some(&u32::MAX) => {}
                None | Some(0) => logits.fill(f32::NEG_INFINITY),
                Some(word) => {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }

    fn keep_only(logits: &mut [f32], token: usize) {
        let logit = logits.get(token).copied();
        logits.fill(f32::NEG_INFINITY);
        if let Some(logit) = logit {
            logits[token] = logit;
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn logits_without_a_bit_are_impossible_those_behind_the_mask_too() {
            let mut logits: Vec<f32> = (0..70).map(|i| i as f32).collect();
            keep(&mut logits, &[u32::MAX, 0b101]);
            let kept: Vec<usize> = (0..70).filter(|&i| logits[i].is_finite()).collect();
            assert_eq!(kept, (0..33).chain([34]).collect::<Vec<_>>());
            keep_only(&mut logits, 34);
            assert_eq!(logits[34], 34.0);
            assert_eq!(logits.iter().filter(|logit| logit.is_finite()).count(), 1);
        }
    }
}

/// Without the library there is none.
#[cfg(not(feature = "constraint"))]
mod absent {
    use super::{Constraint, Result, Tokenizer};
    use crate::error::{Error, ErrorKind};

    pub(crate) enum Guide {}

    impl Guide {
        pub(crate) fn new(_: &Tokenizer, _: &Constraint) -> Result<Self> {
            Err(
                Error::new(ErrorKind::Unsupported, "this build has no constraints")
                    .with_key("constraint")
                    .with_help("build qwen2-core with the feature constraint"),
            )
        }

        pub(crate) fn forced(&self) -> Option<u32> {
            match *self {}
        }

        pub(crate) fn is_complete(&self) -> bool {
            match *self {}
        }

        pub(crate) fn mask(&self, _: &mut [f32], _: &[u32]) -> Result<()> {
            match *self {}
        }

        pub(crate) fn accept(&mut self, _: u32) -> Result<()> {
            match *self {}
        }
    }
}
