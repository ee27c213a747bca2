//! Media as a person wants to see them before asking: sizes, times, thumbnails.
//!
//! Decision: of the frames that the model will see, not of others; small JPEGs, made anew each time, since shrinking a
//! few frames costs less than keeping the results in order.

use image::codecs::jpeg::JpegEncoder;
use image::{RgbImage, imageops};
use llava_next_video::media::Image;

use super::{MediaError, MediaErrorKind, MediaKind, Medium};

/// The longer side of a thumbnail in pixels.
const SIDE: u32 = 160;

/// JPEG's quality.
const QUALITY: u8 = 80;

/// What can be told of a source.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    /// As what it was read.
    pub kind: MediaKind,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Length of a video in seconds.
    pub duration_s: Option<f64>,
    /// Frames in the whole video.
    pub total_frames: Option<usize>,
    /// Frames a second of the whole video.
    pub fps: Option<f64>,
    /// The frames that were sampled; of a picture itself.
    pub frames: Vec<DescribedFrame>,
    /// What a person should know, a sentence each.
    pub notes: Vec<String>,
}

/// One frame.
#[derive(Debug, Clone, PartialEq)]
pub struct DescribedFrame {
    /// Which frame of the video.
    pub index: usize,
    /// When it comes up, in seconds.
    pub time_s: f64,
    /// A small JPEG file.
    pub thumbnail: Vec<u8>,
}

/// Describes `medium`.
pub(super) fn describe(medium: &Medium) -> Result<Described, MediaError> {
    match medium {
        Medium::Image(image) => Ok(Described {
            kind: MediaKind::Image,
            width: image.size.width,
            height: image.size.height,
            duration_s: None,
            total_frames: None,
            fps: None,
            frames: vec![frame(0, 0.0, image)?],
            notes: Vec::new(),
        }),
        Medium::Video(video, size) => {
            let places = video.frames_indices.iter().zip(&video.timestamps);
            let frames = video.frames.iter().zip(places);
            Ok(Described {
                kind: MediaKind::Video,
                width: size.width,
                height: size.height,
                duration_s: Some(video.metadata.duration),
                total_frames: Some(video.metadata.total_num_frames),
                fps: Some(video.metadata.fps),
                frames: frames
                    .map(|(image, (index, time))| frame(*index, *time, image))
                    .collect::<Result<_, _>>()?,
                notes: video.notes.clone(),
            })
        }
    }
}

fn frame(index: usize, time_s: f64, image: &Image) -> Result<DescribedFrame, MediaError> {
    Ok(DescribedFrame {
        index,
        time_s,
        thumbnail: thumbnail(image).ok_or_else(|| {
            let message = "a thumbnail of the source cannot be made";
            MediaError::new(MediaErrorKind::Invalid, message.into())
        })?,
    })
}

/// A JPEG file of `image`, no side longer than [`SIDE`], none shorter than a pixel.
fn thumbnail(image: &Image) -> Option<Vec<u8>> {
    let (width, height) = (
        u32::try_from(image.size.width).ok()?,
        u32::try_from(image.size.height).ok()?,
    );
    let longer = width.max(height);
    let fit = |side: u32| match longer > SIDE {
        true => u32::try_from(u64::from(side) * u64::from(SIDE) / u64::from(longer))
            .ok()
            .map(|side| side.max(1)),
        false => Some(side),
    };
    // Borrowed: a large picture is not worth a copy.
    let full =
        image::ImageBuffer::<image::Rgb<u8>, &[u8]>::from_raw(width, height, &image.data[..])?;
    let small: RgbImage = imageops::thumbnail(&full, fit(width)?, fit(height)?);
    let mut out = Vec::new();
    JpegEncoder::new_with_quality(&mut out, QUALITY)
        .encode_image(&small)
        .ok()?;
    Some(out)
}
