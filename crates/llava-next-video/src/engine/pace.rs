//! How much else a step may do beside decoding, so that tokens keep coming.
//!
//! Decision: measured, not configured. A step that only decodes tells what the readers are used to; what
//! a prompt's token or a layer of the vision tower adds is measured likewise. Beside decoding, vision
//! and prefill may each add nearly half of a decode step's time, so that a token takes at most about
//! twice as long however long a video waits. Where nothing decodes, they go at full size.

use std::time::Duration;

/// Weight of the newest measurement.
const NEWEST: f64 = 0.3;
/// What vision may add to a step, and what prefill may, in parts of a decode step.
const SHARE: f64 = 0.45;
/// The fewest prompt tokens beside decoding: below, reading the weights is all that they cost.
const LEAST: usize = 8;
/// Before anything is measured.
const FIRST: Duration = Duration::from_millis(20);

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

    /// How long vision may take in a step that decodes.
    pub fn vision(&self) -> Duration {
        let decode = self.decode.unwrap_or(FIRST.as_secs_f64());
        Duration::from_secs_f64(SHARE * decode)
    }

    /// How many tokens of prompts a step that decodes may take.
    pub fn tokens(&self) -> usize {
        let decode = self.decode.unwrap_or(FIRST.as_secs_f64());
        match self.token {
            Some(token) if token > 0.0 => ((SHARE * decode / token) as usize).max(LEAST),
            _ => LEAST,
        }
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
        assert_eq!(pace.tokens(), LEAST);
        let ms = Duration::from_millis;
        (0..50).for_each(|_| pace.stepped(ms(20), 4, 0));
        (0..50).for_each(|_| pace.stepped(ms(30), 4, 50));
        // 0.2 ms a token, 9 ms of a step.
        assert!((44..=46).contains(&pace.tokens()), "{}", pace.tokens());
        assert!(pace.vision() > ms(8) && pace.vision() < ms(10));
        (0..50).for_each(|_| pace.stepped(ms(30), 4, 1));
        assert_eq!(pace.tokens(), LEAST);
    }
}
