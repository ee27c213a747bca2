//! How much else a step may do beside decoding, so that tokens keep coming.
//!
//! Decision: measured, not configured. A step that only decodes tells what the readers are used to; what
//! a prompt's token adds is measured likewise. Beside decoding, vision and prefill together may add most of
//! a decode step's time, so that a token takes at most about twice as long however long a video waits.
//! Where nothing decodes, or nobody minds waiting for tokens, they go at full size. Which of these holds is asked
//! here and nowhere else.

use std::time::Duration;

/// Weight of the newest measurement.
const NEWEST: f64 = 0.3;
/// What vision and prefill may add to a step, in parts of a decode step.
const SHARE: f64 = 0.65;
/// The fewest prompt tokens beside decoding: below, reading the weights is all that they cost.
const LEAST: usize = 8;
/// Before anything is measured.
const FIRST: Duration = Duration::from_millis(20);

/// Who waits where prompts are to be read while answers grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prefer {
    /// Prompts: a token takes at most about twice as long, however many videos wait.
    #[default]
    Latency,
    /// Answers: prompts are read at full size, with a token of each answer beside, so that more answers grow
    /// together and all of them are done sooner.
    Throughput,
}

/// What steps take, and what they may.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    prefer: Prefer,
    /// Seconds of a step that only decodes.
    decode: Option<f64>,
    /// Seconds that a prompt's token adds.
    token: Option<f64>,
}

impl Pace {
    /// Nothing is measured yet.
    pub fn new(prefer: Prefer) -> Self {
        Self {
            prefer,
            ..Self::default()
        }
    }

    /// A step took so long for so many rows that decode and so many tokens of prompts.
    pub fn stepped(&mut self, time: Duration, rows: usize, tokens: usize) {
        let seconds = time.as_secs_f64();
        if rows > 0 && tokens == 0 {
            blend(&mut self.decode, seconds);
        } else if tokens > 0 {
            let decode = if rows > 0 {
                self.decode.unwrap_or(0.0)
            } else {
                0.0
            };
            blend(&mut self.token, (seconds - decode).max(0.0) / tokens as f64);
        }
    }

    /// How long vision may take in a step, where somebody `decodes` in it; half of what there is if prompts are
    /// read in it too. `None` for a whole pass.
    pub fn vision(&self, decodes: bool, shared: bool) -> Option<Duration> {
        let seconds = self.spare() / if shared { 2.0 } else { 1.0 };
        self.holds(decodes)
            .then(|| Duration::from_secs_f64(seconds))
    }

    /// How many tokens of prompts a step may take at most, where somebody `decodes` in it, after vision took so
    /// long.
    pub fn tokens(&self, decodes: bool, vision: Duration) -> usize {
        if !self.holds(decodes) {
            return usize::MAX;
        }
        let left = (self.spare() - vision.as_secs_f64()).max(0.0);
        match self.token {
            Some(token) if token > 0.0 => ((left / token) as usize).max(LEAST),
            _ => LEAST,
        }
    }

    /// Whether somebody's next token waits for the step and may not wait long.
    fn holds(&self, decodes: bool) -> bool {
        decodes && self.prefer == Prefer::Latency
    }

    /// Seconds that a step may take longer than one that only decodes.
    fn spare(&self) -> f64 {
        SHARE * self.decode.unwrap_or(FIRST.as_secs_f64())
    }
}

fn blend(old: &mut Option<f64>, new: f64) {
    *old = Some(old.map_or(new, |old| old + NEWEST * (new - old)));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn prompts_get_as_many_tokens_as_fit_into_their_share() {
        let mut pace = Pace::default();
        let none = Duration::ZERO;
        assert_eq!(pace.tokens(true, none), LEAST);
        let ms = Duration::from_millis;
        (0..50).for_each(|_| pace.stepped(ms(20), 4, 0));
        (0..50).for_each(|_| pace.stepped(ms(30), 4, 50));
        // 0.2 ms a token, 13 ms of a step.
        assert!(
            (63..=66).contains(&pace.tokens(true, none)),
            "{}",
            pace.tokens(true, none)
        );
        assert!((18..=21).contains(&pace.tokens(true, ms(9))));
        assert_eq!(pace.tokens(true, ms(30)), LEAST);
        let vision = |shared| pace.vision(true, shared).unwrap();
        assert!(vision(true) > ms(6) && vision(true) < ms(7));
        assert_eq!(vision(false), 2 * vision(true));
        (0..50).for_each(|_| pace.stepped(ms(30), 4, 1));
        assert_eq!(pace.tokens(true, none), LEAST);
    }

    #[test]
    fn nothing_is_held_back_where_nobody_waits_for_the_next_token() {
        let none = Duration::ZERO;
        for (prefer, decodes, held) in [
            (Prefer::Latency, true, true),
            (Prefer::Latency, false, false),
            (Prefer::Throughput, true, false),
            (Prefer::Throughput, false, false),
        ] {
            let pace = Pace::new(prefer);
            assert_eq!(pace.vision(decodes, false).is_some(), held);
            assert_eq!(pace.tokens(decodes, none) < usize::MAX, held);
        }
    }
}
