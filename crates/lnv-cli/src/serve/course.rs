//! How a question went: when its stages began and ended, and what it came to.
//!
//! Decision: it is noted on the engine's thread as things happen, not where a client reads them. So a slow reader does
//! not make an answer look slow, and a question that is given up has its figures as far as it came. The line in the
//! log, the metrics and the spans of a trace all tell it from here.

use std::time::Instant;

use llava_next_video::engine::{Event, FinishReason, RequestEvent, Timings};

/// From when to when.
pub type Stretch = (Instant, Instant);

/// One question in the engine.
#[derive(Debug)]
pub struct Course {
    submitted: Instant,
    started: Option<Instant>,
    vision: Option<Stretch>,
    prefill: Option<Stretch>,
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

/// A stage, when it ran, and the seconds that the engine has spent on it, where it says so.
pub type Stage = (&'static str, Stretch, Option<f64>);

impl Course {
    /// A question that is handed over now.
    pub fn new(prompt_tokens: usize) -> Self {
        Self {
            submitted: Instant::now(),
            started: None,
            vision: None,
            prefill: None,
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
            // One that was put back for want of memory reads its prompt again in the middle of its answer.
            RequestEvent::Progress(_) if self.tokens.is_some() => {}
            RequestEvent::Progress(Event::Vision { .. }) => widen(&mut self.vision, now),
            RequestEvent::Progress(Event::Prefill { .. }) => widen(&mut self.prefill, now),
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

    /// Its stages so far, each that it came to.
    pub fn stages(&self) -> impl Iterator<Item = Stage> {
        let queue = (self.submitted, self.started.unwrap_or_else(Instant::now));
        let first = self.first_token();
        let prefill = self.prefill.map(|(from, to)| (from, first.unwrap_or(to)));
        let spent = &self.timings;
        [
            ("queue", Some(queue), None),
            ("vision", self.vision, Some(spent.vision_s)),
            ("prefill", prefill, Some(spent.prefill_s)),
            ("decode", self.tokens, Some(spent.decode_s)),
        ]
        .into_iter()
        .filter_map(|(name, stretch, spent)| Some((name, stretch?, spent.filter(|s| *s > 0.0))))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_follow_each_other_and_a_second_reading_is_no_stage() {
        let mut course = Course::new(7);
        let names = |course: &Course| course.stages().map(|stage| stage.0).collect::<Vec<_>>();
        assert_eq!(names(&course), ["queue"]);
        course.hear(&RequestEvent::Started);
        let prefill = || RequestEvent::Progress(Event::Prefill { done: 0, total: 1 });
        let token = || {
            RequestEvent::Progress(Event::Token {
                sequence: 0,
                id: 1,
                logprob: None,
            })
        };
        for event in [prefill(), token(), prefill(), token()] {
            course.hear(&event);
        }
        assert_eq!(names(&course), ["queue", "prefill", "decode"]);
        let stretches: Vec<Stretch> = course.stages().map(|stage| stage.1).collect();
        for pair in stretches.windows(2) {
            assert!(pair[0].1 <= pair[1].0 && pair[1].0 <= pair[1].1, "{pair:?}");
        }
        assert_eq!(stretches[1].1, stretches[2].0);
        assert_eq!((course.prompt_tokens, course.new_tokens), (7, 2));
        assert!(course.finish_reasons.is_empty());
    }
}
