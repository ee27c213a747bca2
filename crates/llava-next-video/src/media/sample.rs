//! Which frames of a video to take: `i * total / n` in integers.
//!
//! Transformers 4.53.3 computes the same indices in floating point, where a few pairs of numbers
//! yield one index too many and an `IndexError`; wherever its length is right, its indices are these.
//! It refuses more frames than there are, and so does [`FrameSampling::NumFrames`].

use std::ops::Range;

use super::{FrameSampling, VideoPart};
use crate::{Error, Result};

/// Presentation times are whole ticks turned into seconds; a time that was typed may miss them by rounding.
const ROUNDING: f64 = 1e-6;

/// The frames that `sampling` takes of a video of `total` frames at `video_fps` frames a second
/// (0 where unknown; only [`FrameSampling::Fps`] needs it), in rising order and without repeats.
///
/// # Errors
///
/// [`Error::Input`] for a count of zero, a rate that is not positive, or more frames than there are;
/// [`Error::Media`] for a video without frames, or without a rate where one is needed.
pub fn sample_indices(total: usize, video_fps: f64, sampling: FrameSampling) -> Result<Vec<usize>> {
    if total == 0 {
        return Err(Error::Media("the video has no frames".into()));
    }
    let count = match sampling {
        FrameSampling::Default(n) => positive(n)?.min(total),
        FrameSampling::NumFrames(n) => {
            if positive(n)? > total {
                return Err(Error::Input(format!(
                    "{n} frames were asked for, but the video has only {total}: ask for at most {total}, \
                     or give no number to take what there is"
                )));
            }
            n
        }
        FrameSampling::Fps(fps) => count_for_rate(total, video_fps, fps)?,
        FrameSampling::All => total,
    };
    Ok((0..count).map(|i| spread(i, total, count)).collect())
}

fn positive(n: usize) -> Result<usize> {
    if n == 0 {
        return Err(Error::Input(
            "0 frames were asked for: ask for at least 1".into(),
        ));
    }
    Ok(n)
}

fn count_for_rate(total: usize, video_fps: f64, fps: f64) -> Result<usize> {
    if !fps.is_finite() || fps <= 0.0 {
        return Err(Error::Input(format!(
            "{fps} frames a second were asked for: the rate must be a positive number"
        )));
    }
    if !video_fps.is_finite() || video_fps <= 0.0 {
        return Err(Error::Media(
            "the video does not tell its frame rate: ask for a number of frames instead of a rate"
                .into(),
        ));
    }
    let count = (total as f64 / video_fps * fps).trunc();
    if count > total as f64 {
        return Err(Error::Input(format!(
            "{fps} frames a second were asked for, {count} in all, but the video has {total} at \
             {video_fps:.3} a second: ask for a lower rate"
        )));
    }
    Ok((count as usize).max(1))
}

// In 128 bits: a forged count must not overflow.
fn spread(i: usize, total: usize, count: usize) -> usize {
    (i as u128 * total as u128 / count as u128) as usize
}

/// The frames of a video of `total` frames that are shown in `part`; `time` tells when a frame comes up, in seconds
/// from the first, and never falls.
///
/// # Errors
///
/// [`Error::Input`] for times that are not numbers, a part that ends before it begins, or one behind the last frame.
pub(super) fn frames_in(
    part: VideoPart,
    total: usize,
    time: impl Fn(usize) -> f64,
) -> Result<Range<usize>> {
    let (start, end) = (part.start.unwrap_or(0.0), part.end.unwrap_or(f64::MAX));
    if !start.is_finite() || !end.is_finite() || start < 0.0 || end <= start {
        return Err(Error::Input(format!(
            "the part of the video from {start} s to {} was asked for: it must begin at 0 or later and end after it \
             begins",
            part.end.map_or("the end".into(), |end| format!("{end} s"))
        )));
    }
    // The first frame at or after a time, by halving.
    let at_or_after = |goal: f64| {
        let (mut low, mut high) = (0, total);
        while low < high {
            let middle = low + (high - low) / 2;
            match time(middle) < goal {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        low
    };
    let last = if total == 0 { 0.0 } else { time(total - 1) };
    // How long the last frame stays is not known; as long as the one before is a fair guess.
    let stays = match total {
        0 | 1 => f64::MAX,
        _ => (last - time(total - 2)).max(0.0),
    };
    if total > 0 && start >= last + stays - ROUNDING {
        return Err(Error::Input(format!(
            "the part of the video from {start} s on was asked for, but its last frame is at {last:.3} s: begin earlier"
        )));
    }
    // Frames up to `start`, of which the last is on the screen then.
    let first = at_or_after(start + ROUNDING).saturating_sub(1);
    let behind = at_or_after(end - ROUNDING).max(first + 1);
    Ok(first..behind.min(total))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn part(start: impl Into<Option<f64>>, end: impl Into<Option<f64>>) -> VideoPart {
        VideoPart {
            start: start.into(),
            end: end.into(),
        }
    }

    #[test]
    fn a_part_holds_the_frames_that_are_shown_in_it() {
        // Ten frames a second, ten frames.
        let range = |start, end| frames_in(part(start, end), 10, |i| i as f64 / 10.0);
        assert_eq!(range(None, None).unwrap(), 0..10);
        assert_eq!(range(Some(0.3), None).unwrap(), 3..10);
        assert_eq!(range(Some(0.3), Some(0.6)).unwrap(), 3..6);
        assert_eq!(range(None, Some(0.55)).unwrap(), 0..6);
        // Frame 3 is still on the screen at 0.35 s.
        assert_eq!(range(Some(0.35), Some(0.36)).unwrap(), 3..4);
        assert_eq!(range(Some(0.95), Some(99.0)).unwrap(), 9..10);
        // 0.1 + 0.2 is a little more than 0.3.
        assert_eq!(range(Some(0.1 + 0.2), Some(0.4)).unwrap(), 3..4);
    }

    #[test]
    fn parts_that_cannot_be_are_refused() {
        let range = |start, end| frames_in(part(start, end), 10, |i| i as f64 / 10.0);
        for (start, end) in [
            (Some(1.0), None),
            (Some(7.0), Some(8.0)),
            (Some(0.5), Some(0.5)),
            (Some(0.5), Some(0.2)),
            (Some(-1.0), None),
            (Some(f64::NAN), None),
            (None, Some(f64::INFINITY)),
            (None, Some(f64::NAN)),
            (None, Some(0.0)),
        ] {
            assert!(range(start, end).is_err(), "{start:?} {end:?}");
        }
        assert_eq!(
            range(Some(7.0), None).unwrap_err().to_string(),
            "the part of the video from 7 s on was asked for, but its last frame is at 0.900 s: begin earlier"
        );
        assert_eq!(frames_in(part(None, None), 0, |_| 0.0).unwrap(), 0..0);
        assert_eq!(frames_in(part(5.0, 6.0), 1, |_| 0.0).unwrap(), 0..1);
    }

    #[test]
    fn spreads_as_the_table_of_the_specification() {
        let got = sample_indices(100, 25.0, FrameSampling::Default(8)).unwrap();
        assert_eq!(got, [0, 12, 25, 37, 50, 62, 75, 87]);
        let got = sample_indices(10, 25.0, FrameSampling::NumFrames(4)).unwrap();
        assert_eq!(got, [0, 2, 5, 7]);
        // The two pairs on which the floating-point version overshoots.
        let got = sample_indices(17, 0.0, FrameSampling::NumFrames(7)).unwrap();
        assert_eq!(got, [0, 2, 4, 7, 9, 12, 14]);
        assert_eq!(
            sample_indices(61, 0.0, FrameSampling::NumFrames(7))
                .unwrap()
                .len(),
            7
        );
    }

    #[test]
    fn few_frames_are_all_taken_by_default_and_refused_when_asked_for() {
        assert_eq!(
            sample_indices(3, 0.0, FrameSampling::Default(8)).unwrap(),
            [0, 1, 2]
        );
        let error = sample_indices(3, 0.0, FrameSampling::NumFrames(8)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "8 frames were asked for, but the video has only 3: ask for at most 3, \
             or give no number to take what there is"
        );
    }

    #[test]
    fn a_rate_gives_a_count() {
        let at = |fps| sample_indices(250, 25.0, FrameSampling::Fps(fps)).map(|v| v.len());
        assert_eq!(at(1.0).unwrap(), 10);
        assert_eq!(at(0.01).unwrap(), 1);
        assert_eq!(at(25.0).unwrap(), 250);
        assert!(at(30.0).is_err());
        assert!(at(0.0).is_err());
        assert!(at(f64::NAN).is_err());
        assert!(at(f64::INFINITY).is_err());
        assert!(sample_indices(250, 0.0, FrameSampling::Fps(1.0)).is_err());
    }

    #[test]
    fn absurd_numbers_do_not_overflow() {
        let got = sample_indices(usize::MAX, 1.0, FrameSampling::NumFrames(4)).unwrap();
        assert_eq!(got[2], usize::MAX / 2);
        assert!(sample_indices(0, 1.0, FrameSampling::All).is_err());
        assert!(sample_indices(5, 1.0, FrameSampling::NumFrames(0)).is_err());
    }
}
