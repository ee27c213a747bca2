//! When a sequence ends: an end-of-sequence id, or a text that the answer must not go past.

use std::ops::Range;

/// Text of ids, as the stop strings see it. The engine asks for this and knows no tokenizer.
pub trait TokenText {
    /// The text of `ids`, special tokens included.
    fn text(&self, ids: &[u32]) -> String;
}

/// For callers without stop strings.
impl TokenText for () {
    fn text(&self, _ids: &[u32]) -> String {
        String::new()
    }
}

/// The texts that end an answer.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    strings: Vec<String>,
}

impl StopStrings {
    /// Watches for any of `strings`.
    pub fn new(strings: Vec<String>) -> Self {
        Self { strings }
    }

    /// True where the last of `ids` completes a stop string.
    ///
    /// A match may begin in earlier tokens and need not end where the last token ends
    /// (`StopStringCriteria`).
    pub fn hit(&self, ids: &[u32], text: &dyn TokenText) -> bool {
        let Some(longest) = self.strings.iter().map(String::len).max() else {
            return false;
        };
        // A token spells at least one byte, so a match fits into so many last tokens; a few more let
        // a decoder that joins tokens see their left neighbours.
        let tail = &ids[ids.len().saturating_sub(longest + 8)..];
        let now = text.text(tail);
        let before = text.text(&tail[..tail.len().saturating_sub(1)]);
        self.strings
            .iter()
            .any(|s| now.contains(s.as_str()) && !before.contains(s.as_str()))
    }

    /// The first stop string in `text`, as a byte range.
    pub fn find(&self, text: &str) -> Option<Range<usize>> {
        let found = |s: &String| text.find(s.as_str()).map(|at| at..at + s.len());
        self.strings
            .iter()
            .filter_map(found)
            .min_by_key(|range| range.start)
    }

    /// How many last bytes of `text` might be the beginning of a stop string: what a stream holds back.
    pub fn held_back(&self, text: &str) -> usize {
        let partial = |s: &String| {
            (1..s.len().min(text.len() + 1))
                .rev()
                .find(|n| s.is_char_boundary(*n) && text.ends_with(&s[..*n]))
                .unwrap_or(0)
        };
        self.strings.iter().map(partial).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::{StopStrings, TokenText};

    struct Letters;
    impl TokenText for Letters {
        fn text(&self, ids: &[u32]) -> String {
            ids.iter().map(|id| char::from(*id as u8)).collect()
        }
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn a_stop_string_hits_when_it_is_complete_and_only_then() {
        let stop = StopStrings::new(vec!["END".into(), "##".into()]);
        assert!(!stop.hit(&ids("the EN"), &Letters));
        assert!(stop.hit(&ids("the END"), &Letters));
        assert!(!stop.hit(&ids("the END."), &Letters));
        assert!(stop.hit(&ids("a##"), &Letters));
    }

    #[test]
    fn a_stream_holds_back_what_may_become_a_stop_string() {
        let stop = StopStrings::new(vec!["END".into(), "é!".into()]);
        assert_eq!(stop.held_back("the E"), 1);
        assert_eq!(stop.held_back("the EN"), 2);
        assert_eq!(stop.held_back("the ENd"), 0);
        assert_eq!(stop.held_back("caf\u{e9}"), 2);
        assert_eq!(stop.find("the END and ##"), Some(4..7));
    }
}
