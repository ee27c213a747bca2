//! Bytes to pixels: stills and videos become [`Image`] and [`Video`], 8-bit RGB, upright.
//!
//! FFmpeg's libraries decode videos in process and open local files only; stills go through the
//! `image` crate, JPEG through libjpeg-turbo's arithmetic so that pixels equal Pillow's. Fetching a URL
//! is not done here: the caller downloads, with its own limits, and passes bytes or a path.

/// Height and width in pixels. Always this struct, height first; never a bare pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
