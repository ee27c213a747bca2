//! What the server and a process that decodes say to each other, over its stdin and stdout.
//!
//! Decision: a word is a line of JSON, which a person can read and which bounds itself; pixels follow raw behind the line
//! that announces them. The server asks with one [`Task`]; the process says what memory the server will need, waits for
//! leave (a line), and then hands over each picture as soon as it has it, so that work on the first can begin before
//! the last is there. Times travel as bits: a decimal that comes back one bit off would be another answer.
//!
//! The process has looked at a stranger's file and may be anybody's by then: what it says is checked by who reads it.

use std::path::PathBuf;
use std::time::Duration;

use llava_next_video::media::{FrameSampling, ImageSize};
use llava_next_video::processor::settings::Resizing;
use serde::{Deserialize, Serialize};

use super::{MediaError, MediaErrorKind, MediaKind};

/// Bytes of a line, beside what a video's list of frames takes.
pub(super) const LINE_BYTES: u64 = 256 << 10;

/// What is to be decoded, and how much at most.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Task {
    /// What errors call the source.
    pub(super) name: String,
    pub(super) kind: MediaKind,
    /// The file; none where the pictures of a video follow this line.
    pub(super) file: Option<PathBuf>,
    /// How many bytes each of those has.
    pub(super) pictures: Vec<usize>,
    /// As [`sampling_code`] has it.
    pub(super) sampling: (u8, u64),
    /// Where the part begins and ends, in seconds, as bits.
    pub(super) part: [Option<u64>; 2],
    /// How frames are to be resized where that makes them smaller.
    pub(super) shrinking: Option<Resizing>,
    pub(super) most: Most,
}

/// How much one decode may give and take.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Most {
    /// Bytes of a picture's file.
    pub(super) file_bytes: u64,
    /// Pixels of a picture or frame.
    pub(super) pixels: u64,
    /// Sampled frames.
    pub(super) frames: usize,
    /// Bytes of them.
    pub(super) bytes: u64,
    /// Length of a video; none where there is no such limit.
    pub(super) duration: Option<Duration>,
    /// How long it may take, from the leave.
    pub(super) time: Duration,
}

/// What the process says.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Word {
    /// Bytes that the server is to set aside before it gives leave.
    Needs(u64),
    /// A picture, whose three bytes for each pixel follow.
    Picture(Picture),
    /// All pictures were handed over; of a video, what else there is to know.
    End(Option<Facts>),
    /// There is nothing (more) to hand over.
    Failed {
        kind: MediaErrorKind,
        message: String,
        param: String,
    },
}

/// What is known of a picture before its pixels.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Picture {
    /// Which of the video's frames it is; from 0 again where the file turns out to be damaged.
    pub(super) position: usize,
    /// How many there will be, as far as is known.
    pub(super) of: usize,
    /// The size of what follows.
    pub(super) size: ImageSize,
    /// The size in the file.
    pub(super) whole: ImageSize,
    /// When it comes up, in seconds, as bits.
    pub(super) time: u64,
}

/// What is known of a video at its end.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Facts {
    pub(super) indices: Vec<usize>,
    pub(super) total: usize,
    /// As bits.
    pub(super) fps: u64,
    /// As bits.
    pub(super) duration: u64,
    pub(super) notes: Vec<String>,
}

/// A sampling as numbers.
pub(super) fn sampling_code(sampling: FrameSampling) -> (u8, u64) {
    match sampling {
        FrameSampling::Default(n) => (1, n as u64),
        FrameSampling::NumFrames(n) => (2, n as u64),
        FrameSampling::Fps(fps) => (3, fps.to_bits()),
        FrameSampling::All => (4, 0),
    }
}

/// The sampling of [`sampling_code`].
pub(super) fn sampling_of((code, value): (u8, u64)) -> Option<FrameSampling> {
    Some(match code {
        1 => FrameSampling::Default(usize::try_from(value).ok()?),
        2 => FrameSampling::NumFrames(usize::try_from(value).ok()?),
        3 => FrameSampling::Fps(f64::from_bits(value)),
        4 => FrameSampling::All,
        _ => return None,
    })
}

/// The time is over.
pub(super) fn too_slow(name: &str) -> MediaError {
    let message = format!("decoding {name} takes too long: use a shorter or smaller file");
    MediaError::new(MediaErrorKind::Timeout, message)
}

/// The ceiling of memory, in MiB, was reached.
pub(super) fn too_hungry(name: &str, mib: u64) -> MediaError {
    let message = format!(
        "decoding {name} takes more than {mib} MiB of memory, the limit: use a smaller size or a file that is encoded \
         more simply"
    );
    MediaError::new(MediaErrorKind::TooLarge, message)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn samplings_travel_as_they_are() {
        for sampling in [
            FrameSampling::Default(8),
            FrameSampling::NumFrames(usize::MAX),
            FrameSampling::Fps(0.1 + 0.2),
            FrameSampling::All,
        ] {
            assert_eq!(sampling_of(sampling_code(sampling)), Some(sampling));
        }
        assert_eq!(sampling_of((0, 0)), None);
    }

    #[test]
    fn words_are_lines() {
        let word = Word::Failed {
            kind: MediaErrorKind::Invalid,
            message: "two\nlines".into(),
            param: "url".into(),
        };
        let text = serde_json::to_string(&word).unwrap();
        assert!(!text.contains('\n'));
        assert!(serde_json::from_str::<Word>(&text).is_ok());
        for bad in [
            "{}",
            "[]",
            "{\"needs\":-1}",
            "{\"other\":1}",
            "{\"end\":{\"total\":1}}",
        ] {
            assert!(serde_json::from_str::<Word>(bad).is_err(), "{bad}");
        }
    }
}
