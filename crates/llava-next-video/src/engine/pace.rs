//! How much else a step may do beside decoding, so that tokens keep coming.
//!
//! Decision: measured, not configured. A step that only decodes tells what the readers are used to; what
//! a prompt's token adds is measured likewise. Beside decoding, vision and prefill together may add most of
//! a decode step's time, so that a token takes at most about twice as long however long a video waits.
//! Where nothing decodes, or nobody minds waiting for tokens, they go at full size.

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

/// What steps take.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Seconds of a step that only decodes.
    decode: Option<f64>,
    /// Seconds that a prompt's token adds.
    token: Option<f64>,
}

impl Pace {
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

    /// How long vision may take in a step that decodes; half of what there is if prompts are read in it
    /// too.
    pub fn vision(&self, shared: bool) -> Duration {
        Duration::from_secs_f64(self.spare() / if shared { 2.0 } else { 1.0 })
    }

    /// How many tokens of prompts a step that decodes may take, after vision took so long.
    pub fn tokens(&self, vision: Duration) -> usize {
        let left = (self.spare() - vision.as_secs_f64()).max(0.0);
        match self.token {
            Some(token) if token > 0.0 => ((left / token) as usize).max(LEAST),
            _ => LEAST,
        }
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
mod tests {
    use super::*;

    #[test]
    fn prompts_get_as_many_tokens_as_fit_into_their_share() {
        let mut pace = Pace::default();
        let none = Duration::ZERO;
        assert_eq!(pace.tokens(none), LEAST);
        let ms = Duration::from_millis;
        (0..50).for_each(|_| pace.stepped(ms(20), 4, 0));
        (0..50).for_each(|_| pace.stepped(ms(30), 4, 50));
        // 0.2 ms a token, 13 ms of a step.
        assert!(
            (63..=66).contains(&pace.tokens(none)),
            "{}",
            pace.tokens(none)
        );
        assert!((18..=21).contains(&pace.tokens(ms(9))));
        assert_eq!(pace.tokens(ms(30)), LEAST);
        assert!(pace.vision(true) > ms(6) && pace.vision(true) < ms(7));
        assert_eq!(pace.vision(false), 2 * pace.vision(true));
        (0..50).for_each(|_| pace.stepped(ms(30), 4, 1));
        assert_eq!(pace.tokens(none), LEAST);
    }
}
