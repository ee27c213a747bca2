//! How a question went: when its stages began and ended, and what it came to.
//!
//! Decision: it is noted on the engine's thread as things happen, not where a client reads them. So a slow reader does
//! not make an answer look slow, and a question that is given up has its figures as far as it came. The line in the
//! log and the metrics both tell it from here.

use std::time::Instant;

use llava_next_video::engine::{Event, FinishReason, RequestEvent, Timings};

/// From when to when.
pub type Stretch = (Instant, Instant);

/// One question in the engine.
#[derive(Debug)]
pub struct Course {
    submitted: Instant,
    started: Option<Instant>,
    tokens: Option<Stretch>,
    /// What the engine has spent on it; known at its end.
    pub timings: Timings,
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Of these, found in the cache; known at its end.
    pub cached_tokens: usize,
    /// Of the answers, so far.
    pub new_tokens: usize,
    /// How each answer ended, in OpenAI's words; empty before.
    pub finish_reasons: Vec<&'static str>,
}

impl Course {
    /// A question that is handed over now.
    pub fn new(prompt_tokens: usize) -> Self {
        Self {
            submitted: Instant::now(),
            started: None,
            tokens: None,
            timings: Timings::default(),
            prompt_tokens,
            cached_tokens: 0,
            new_tokens: 0,
            finish_reasons: Vec::new(),
        }
    }

    /// Notes what has happened.
    pub fn hear(&mut self, event: &RequestEvent) {
        let now = Instant::now();
        match event {
            RequestEvent::Started => self.started = Some(now),
            RequestEvent::Progress(Event::Token { .. }) => {
                widen(&mut self.tokens, now);
                self.new_tokens += 1;
            }
            RequestEvent::Progress(_) => {}
            RequestEvent::Done(Ok(generation)) => {
                self.timings = generation.timings;
                self.cached_tokens = generation.cached_tokens;
                let completions = &generation.completions;
                self.new_tokens = completions.iter().map(|c| c.ids.len()).sum();
                let reasons = completions.iter().map(|c| word(c.finish_reason));
                self.finish_reasons = reasons.collect();
            }
            RequestEvent::Done(Err(_)) => {}
        }
    }

    /// Seconds that it waited for the engine.
    pub fn queue_s(&self) -> f64 {
        let until = self.started.unwrap_or_else(Instant::now);
        (until - self.submitted).as_secs_f64()
    }

    /// When its first token came.
    pub fn first_token(&self) -> Option<Instant> {
        self.tokens.map(|(first, _)| first)
    }

    /// When its last token came, so far.
    pub fn last_token(&self) -> Option<Instant> {
        self.tokens.map(|(_, last)| last)
    }
}

fn widen(stretch: &mut Option<Stretch>, now: Instant) {
    stretch.get_or_insert((now, now)).1 = now;
}

fn word(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
    }
}
