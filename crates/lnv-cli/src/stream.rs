//! An answer on its way to stdout: tokens to text, held back where a stop string may be beginning.

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

/// Prints an answer as it comes.
pub struct AnswerStream {
    detokenizer: Detokenizer,
    stop: StopStrings,
    held: String,
    started: bool,
    stopped: bool,
    /// What was printed.
    pub printed: String,
}

impl AnswerStream {
    /// A stream that ends before any of `stop`.
    pub fn new(tokenizer: &Tokenizer, stop: Vec<String>) -> Self {
        Self {
            detokenizer: tokenizer.detokenizer(true, None),
            stop: StopStrings::new(stop),
            held: String::new(),
            started: false,
            stopped: false,
            printed: String::new(),
        }
    }

    /// Adds a token.
    pub fn push(&mut self, id: u32) -> Result<()> {
        match self.detokenizer.push(id) {
            Some(text) => self.add(&text),
            None => Ok(()),
        }
    }

    /// Prints what is left and ends the line.
    pub fn finish(&mut self) -> Result<()> {
        if let Some(text) = self.detokenizer.flush() {
            self.add(&text)?;
        }
        if !self.stopped {
            let rest = std::mem::take(&mut self.held);
            self.print(rest.trim_end())?;
        }
        output::write("\n")
    }

    fn add(&mut self, text: &str) -> Result<()> {
        if self.stopped {
            return Ok(());
        }
        self.held.push_str(text);
        if let Some(found) = self.stop.find(&self.held) {
            self.stopped = true;
            let answer = self.held[..found.start].to_owned();
            self.held.clear();
            return self.print(&answer);
        }
        // Trailing blanks wait too: an answer ends without them.
        let certain = self.held.len() - self.stop.held_back(&self.held);
        let ready = self.held[..certain].trim_end().len();
        let rest = self.held.split_off(ready);
        let ready = std::mem::replace(&mut self.held, rest);
        self.print(&ready)
    }

    fn print(&mut self, text: &str) -> Result<()> {
        // The space between the prompt's last word and the answer's first.
        let text = if self.started {
            text
        } else {
            text.trim_start()
        };
        if text.is_empty() {
            return Ok(());
        }
        self.started = true;
        self.printed.push_str(text);
        output::write(text)
    }
}
