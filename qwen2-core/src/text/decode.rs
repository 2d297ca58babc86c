//! Token bytes to whole UTF-8 pieces.

/// Collects the bytes of tokens and hands out whole characters.
///
/// What all pushes and `finish` return, joined, equals `String::from_utf8_lossy` of all bytes:
/// invalid bytes become U+FFFD one per maximal subpart, as `errors="replace"` does in Python.
#[derive(Debug, Default)]
pub(crate) struct TextDecoder {
    // The start of a character that is not over yet: at most 3 bytes between two pushes.
    pending: Vec<u8>,
}

impl TextDecoder {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// The characters that are complete now; the bytes of one that is not are kept.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::with_capacity(self.pending.len());
        let mut kept = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            // What breaks off in the middle is over; at the end it may go on.
            if chunks.peek().is_none() && is_incomplete(chunk.invalid()) {
                kept = chunk.invalid().len();
            } else if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - kept);
        text
    }

    /// What is left: nothing, or U+FFFD for a character that was cut off.
    pub(crate) fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Whether more bytes could still make a character of these.
fn is_incomplete(invalid: &[u8]) -> bool {
    matches!(std::str::from_utf8(invalid), Err(error) if error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that are mostly pieces of multi-byte characters, in and out of order.
    fn broken_utf8() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![
            any::<u8>(),
            0x80..=0xBF_u8,
            prop::sample::select(vec![0xC2, 0xE0, 0xE4, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, b'a']),
        ];
        prop::collection::vec(byte, 0..40)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn pieces_join_to_the_lossy_text_whatever_the_splits(
            bytes in broken_utf8(),
            cuts in prop::collection::vec(0..40_usize, 0..12),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut decoder = TextDecoder::new();
            let mut text = String::new();
            for pair in cuts.windows(2) {
                text += &decoder.push(&bytes[pair[0]..pair[1]]);
                prop_assert!(decoder.pending.len() <= 3);
            }
            text += &decoder.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn valid_text_never_gains_a_replacement_character(text in "\\PC{0,20}") {
            let mut decoder = TextDecoder::new();
            let mut out = String::new();
            for byte in text.bytes() {
                out += &decoder.push(&[byte]);
            }
            prop_assert_eq!(out, text);
            prop_assert_eq!(decoder.finish(), "");
        }
    }

    #[test]
    fn a_character_comes_out_whole() {
        let mut decoder = TextDecoder::new();
        assert_eq!(decoder.push(&[0xE4, 0xBD]), "");
        assert_eq!(decoder.push(&[0xA0, b'!']), "你!");
        assert_eq!(decoder.push(&[0xF0, 0x9F]), "");
        assert_eq!(decoder.finish(), "\u{FFFD}");
        assert_eq!(decoder.finish(), "");
    }

    #[test]
    fn a_character_that_breaks_off_is_one_replacement_in_mid_stream() {
        let mut decoder = TextDecoder::new();
        assert_eq!(decoder.push(&[0xF0, 0x9F, 0x98]), "");
        assert_eq!(decoder.push(b"x"), "\u{FFFD}x");
        assert_eq!(decoder.push(&[0xED, 0xA0]), "\u{FFFD}\u{FFFD}"); // a surrogate, two subparts
    }
}
