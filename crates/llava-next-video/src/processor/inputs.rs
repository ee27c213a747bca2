//! What the model takes: padded token rows and the pixels that their placeholders stand for.
//!
//! The shape of Transformers' `BatchFeature` without its tensor library: rows of ids with a mask, and
//! the media of all rows in row-major order of their placeholders.

use std::sync::Arc;

use super::anyres::AnyResLayout;
use super::arriving::Arriving;
use crate::media::ImageSize;

/// A stack of square pictures, f32, channels first: `[count, 3, size.height, size.width]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// How many pictures.
    pub count: usize,
    /// Height and width of each.
    pub size: ImageSize,
    /// `count * 3 * height * width` values, rescaled and normalised. Shared, so that a copy costs nothing.
    pub data: Arc<Vec<f32>>,
}

impl Pixels {
    /// Values in one picture.
    pub fn stride(&self) -> usize {
        3 * self.size.area()
    }
}

/// One image: its tiles (base tile first) and the layout that says how their features are packed.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageInput {
    /// `layout.tiles` pictures: the base tile, then the grid row by row.
    pub tiles: Pixels,
    /// Grid, unpadded window and token count, computed once.
    pub layout: AnyResLayout,
}

/// One video: its frames.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoInput {
    /// `num_frames` pictures; without data where they are still arriving.
    pub frames: Pixels,
    /// Where the frames come from that are not here yet, made by [`VideoInput::arriving`].
    pub arriving: Option<Arriving>,
}

impl From<Pixels> for VideoInput {
    /// A video whose frames are all here.
    fn from(frames: Pixels) -> Self {
        Self {
            frames,
            arriving: None,
        }
    }
}

/// A batch for the model. Media are in the order of their placeholders, row by row.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ModelInputs {
    /// `[B][S]`, padded to one length; placeholders already expanded, one id a feature row.
    pub input_ids: Vec<Vec<u32>>,
    /// `[B][S]`, true where a token is to be attended to.
    pub attention_mask: Vec<Vec<bool>>,
    /// Images of all rows.
    pub images: Vec<ImageInput>,
    /// Videos of all rows.
    pub videos: Vec<VideoInput>,
}

impl ModelInputs {
    /// Frames of all videos, arriving ones too.
    pub fn frames(&self) -> usize {
        self.videos.iter().map(|video| video.frames.count).sum()
    }

    /// Has a listener told of every frame that arrives from now on.
    pub(crate) fn listen(&self, listener: impl Fn() -> Box<dyn Fn() + Send>) {
        for arriving in self.videos.iter().filter_map(|v| v.arriving.as_ref()) {
            arriving.listen(listener());
        }
    }
}
