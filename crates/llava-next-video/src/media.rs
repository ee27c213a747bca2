//! Bytes to pixels: stills and videos become [`Image`] and [`Video`], 8-bit RGB, upright.
//!
//! FFmpeg's libraries decode videos in process and open local files only; stills go through the
//! `image` crate, JPEG through libjpeg-turbo's arithmetic so that pixels equal Pillow's. Fetching a URL
//! is not done here: the caller downloads, with its own limits, and passes bytes or a path.
//!
//! | part | does |
//! | --- | --- |
//! | `still`, `jpeg`, `gif` | one picture, pixels as Pillow 11.3 gives them |
//! | `sample` | which frames: the integer formula, and the part of a video that it is applied to |
//! | `demux` | opens a local file, and nothing else, and hands out packets |
//! | `index`, `bitstream`, `mp4` | the order of presentation and where decoding may start, without decoding |
//! | `decode` | packets to frames, threads on |
//! | `convert` | frames to upright RGB as PyAV's `rgb24` |
//! | `seek`, `sequential` | the two ways to a frame |
//! | `video` | puts those together |

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

mod bitstream;
mod convert;
mod decode;
mod demux;
mod gif;
mod index;
mod jpeg;
mod mp4;
mod sample;
mod seek;
mod sequential;
mod still;
mod video;

pub use sample::sample_indices;
pub use still::{decode_data_uri_or_base64, decode_image, load_image};
pub use video::{
    SampledFrame, VideoSummary, decode_video, decode_video_everything, decode_video_part,
    decode_video_with, probe_video,
};

/// Height and width in pixels. Always this struct, height first; never a bare pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ImageSize {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl ImageSize {
    /// `height` rows of `width` columns.
    pub const fn new(height: usize, width: usize) -> Self {
        Self { height, width }
    }
    /// A square of `side` pixels.
    pub const fn square(side: usize) -> Self {
        Self {
            height: side,
            width: side,
        }
    }
    /// Number of pixels.
    pub const fn area(self) -> usize {
        self.height * self.width
    }
}

/// One picture: 8-bit RGB, row-major, channels last (H, W, 3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Height and width.
    pub size: ImageSize,
    /// `height * width * 3` bytes.
    pub data: Vec<u8>,
}

/// What is known of a video as a whole; Transformers' `VideoMetadata`.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoMetadata {
    /// Frames in the stream.
    pub total_num_frames: usize,
    /// Average frame rate in frames a second.
    pub fps: f64,
    /// Length in seconds.
    pub duration: f64,
}

/// The sampled frames of one video, all of one size.
#[derive(Debug, Clone, PartialEq)]
pub struct Video {
    /// Frames in presentation order.
    pub frames: Vec<Image>,
    /// Which frames of the stream these are (`frames_indices`).
    pub frames_indices: Vec<usize>,
    /// Presentation time of each frame in seconds from the start.
    pub timestamps: Vec<f64>,
    /// The whole stream.
    pub metadata: VideoMetadata,
    /// What a person should know: rotation applied, fewer frames than asked for, and the like.
    pub notes: Vec<String>,
}

/// Which frames of a video to take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FrameSampling {
    /// Frames `i * total / n` for `i` in `0..n`; all frames, with a note, where the video has fewer.
    Default(usize),
    /// As [`FrameSampling::Default`], but more frames than the video has are an error.
    NumFrames(usize),
    /// `trunc(total / video_fps * fps)` frames, at least one, spread as above.
    Fps(f64),
    /// Every frame, up to the limit.
    All,
}

/// The stretch of a video that frames are taken from, in seconds from its first frame: those that are shown in
/// `start..end`. The frame that is on the screen at `start` belongs to it, even where it came up before.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct VideoPart {
    /// Where it begins; the beginning of the video by default.
    pub start: Option<f64>,
    /// Where it ends; the end of the video by default.
    pub end: Option<f64>,
}

impl VideoPart {
    /// The whole video.
    pub const WHOLE: Self = Self {
        start: None,
        end: None,
    };
}

/// What a video file says of itself and what counting its packets says; nothing is decoded.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoInfo {
    /// The codec's short name, such as `h264`.
    pub codec: String,
    /// The container's short name, such as `mov,mp4,m4a,3gp,3g2,mj2`.
    pub container: String,
    /// Height and width as shown, that is after rotation.
    pub size: ImageSize,
    /// Average frame rate in frames a second; 0 where the file does not tell.
    pub fps: f64,
    /// Frames that a full decode yields; where `seekable` is false, frames that the packets promise.
    pub frames: usize,
    /// Length in seconds.
    pub duration: f64,
    /// Clockwise turn, in degrees, that showing the video takes: 0, 90, 180 or 270.
    pub rotation: u32,
    /// Whether frames can be reached by seeking; otherwise sampling decodes the file from its start.
    pub seekable: bool,
}

/// How much one call may read, allocate and compute. The defaults suit a server that takes files
/// from strangers and has 8 GiB of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MediaLimits {
    /// Bytes of one still image, encoded. Default 256 MiB.
    pub still_bytes: u64,
    /// Pixels of one still image. Default 100 million.
    pub still_pixels: u64,
    /// Pixels of one video frame. Default 8192 x 8192.
    pub video_pixels: u64,
    /// Frames that one call may sample. Default 4096.
    pub sampled_frames: usize,
    /// Bytes of RGB that one call may hand out. Default 4 GiB.
    pub sampled_bytes: u64,
    /// Frames that one call may decode, sampled or not. Default one million (11 hours at 25 a second).
    pub decoded_frames: u64,
    /// Packets that one call may read to count frames. Default 20 million.
    pub packets: u64,
    /// Length of a video of which frames are sampled, by its number of frames and its frame rate. Default none.
    pub duration: Option<Duration>,
    /// The moment at which decoding gives up. Default none.
    pub deadline: Option<Instant>,
}

impl Default for MediaLimits {
    fn default() -> Self {
        Self {
            still_bytes: 256 << 20,
            still_pixels: 100_000_000,
            video_pixels: 8192 * 8192,
            sampled_frames: 4096,
            sampled_bytes: 4 << 30,
            decoded_frames: 1_000_000,
            packets: 20_000_000,
            duration: None,
            deadline: None,
        }
    }
}
