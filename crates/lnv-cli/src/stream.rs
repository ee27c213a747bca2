//! An answer on its way out: tokens to text, held back where a stop string may be beginning.

use anyhow::Result;
use llava_next_video::engine::{StopStrings, TokenText};
use llava_next_video::processor::tokenizer::{Detokenizer, Tokenizer};

use crate::output;

/// The tokenizer as the engine asks for it.
pub struct Text<'a>(pub &'a Tokenizer);

impl TokenText for Text<'_> {
    fn text(&self, ids: &[u32]) -> String {
        // Ids come from the model; one that the tokenizer lacks spells nothing.
        self.0.decode(ids, false, Some(false)).unwrap_or_default()
    }
}

/// An answer's text, piece by piece: no character is split, no stop string shows, no blanks stand around
/// it. All pieces together are the same whether they are asked for one by one or at the end.
pub struct AnswerText {
    detokenizer: Detokenizer,
    stop: StopStrings,
    held: String,
    started: bool,
    stopped: bool,
}

impl AnswerText {
    /// A text that ends before any of `stop`.
    pub fn new(tokenizer: &Tokenizer, stop: Vec<String>) -> Self {
        Self {
            detokenizer: tokenizer.detokenizer(true, None),
            stop: StopStrings::new(stop),
            held: String::new(),
            started: false,
            stopped: false,
        }
    }

    /// Adds a token; gives what is certain now, perhaps nothing.
    pub fn push(&mut self, id: u32) -> String {
        match self.detokenizer.push(id) {
            Some(text) => self.add(&text),
            None => String::new(),
        }
    }

    /// What is left at the end.
    pub fn finish(&mut self) -> String {
        let mut text = match self.detokenizer.flush() {
            Some(text) => self.add(&text),
            None => String::new(),
        };
        if !self.stopped {
            let rest = std::mem::take(&mut self.held);
            text += &self.begun(rest.trim_end());
        }
        text
    }

    fn add(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(found) = self.stop.find(&self.held) {
            self.stopped = true;
            let answer = self.held[..found.start].to_owned();
            self.held.clear();
            return self.begun(answer.trim_end());
        }
        // Trailing blanks wait too: an answer ends without them.
        let certain = self.held.len() - self.stop.held_back(&self.held);
        let ready = self.held[..certain].trim_end().len();
        let rest = self.held.split_off(ready);
        let ready = std::mem::replace(&mut self.held, rest);
        self.begun(&ready)
    }

    /// Drops the space between the prompt's last word and the answer's first.
    fn begun(&mut self, text: &str) -> String {
        let text = if self.started {
            text
        } else {
            text.trim_start()
        };
        self.started |= !text.is_empty();
        text.to_owned()
    }
}

/// Prints an answer as it comes.
pub struct AnswerStream {
    text: AnswerText,
    /// What was printed.
    pub printed: String,
}

impl AnswerStream {
    /// A stream that ends before any of `stop`.
    pub fn new(tokenizer: &Tokenizer, stop: Vec<String>) -> Self {
        Self {
            text: AnswerText::new(tokenizer, stop),
            printed: String::new(),
        }
    }

    /// Adds a token.
    pub fn push(&mut self, id: u32) -> Result<()> {
        let text = self.text.push(id);
        self.print(&text)
    }

    /// Prints what is left and ends the line.
    pub fn finish(&mut self) -> Result<()> {
        let text = self.text.finish();
        self.print(&text)?;
        output::write("\n")
    }

    fn print(&mut self, text: &str) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.printed.push_str(text);
        output::write(text)
    }
}
