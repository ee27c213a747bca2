//! Frames to pixels: Transformers' `LlavaNextVideoVideoProcessor` (torchvision arithmetic) and, with
//! [`Arithmetic::Pillow`], the deprecated `LlavaNextVideoImageProcessor`.
//!
//! Every frame: short side resized, centre cut out, rescaled, normalised. Decision: torchvision by
//! default, because that is what Transformers 4.53.3 runs on videos; only the cropped part of a frame
//! is ever computed. Frame sampling is here as a function of numbers, because the decoder samples while
//! it decodes: the integer formula, which the references mean and sometimes miss by a rounding error.

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::inputs::{Pixels, VideoInput};
use super::resize::Arithmetic;
use super::settings::{Fields, NormaliseTable, PicturePlan, PixelSettings};
use crate::error::{Error, Result};
use crate::media::{Image, ImageSize, Video, VideoMetadata};

/// Turns videos into normalised frames.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaNextVideoVideoProcessor {
    /// Resize, crop, rescale, normalise.
    pub settings: PixelSettings,
    /// Sample frames although the call does not ask for it.
    pub do_sample_frames: bool,
    /// How many frames to sample where the call does not say.
    pub num_frames: Option<usize>,
    /// How many frames a second to sample where the call does not say.
    pub fps: Option<f64>,
}

/// The deprecated name of the video processor; make it with [`Arithmetic::Pillow`].
pub type LlavaNextVideoImageProcessor = LlavaNextVideoVideoProcessor;

impl LlavaNextVideoVideoProcessor {
    /// The defaults of the Transformers class.
    pub fn class_default(arithmetic: Arithmetic) -> Self {
        Self {
            settings: PixelSettings::class_default(arithmetic),
            do_sample_frames: false,
            num_frames: None,
            fps: None,
        }
    }

    /// The processor of a `video_preprocessor_config.json`, which `file` names in messages.
    ///
    /// # Errors
    /// A setting of the wrong kind or out of range.
    pub fn from_json(
        settings: &Map<String, Value>,
        arithmetic: Arithmetic,
        file: &str,
    ) -> Result<Self> {
        let mut this = Self::class_default(arithmetic);
        this.settings = PixelSettings::from_json(settings, arithmetic, file)?;
        let fields = Fields { settings, file };
        fields.flag("do_sample_frames", &mut this.do_sample_frames)?;
        if let Some(value) = fields.get("num_frames") {
            this.num_frames = Some(fields.whole("num_frames", value)?);
        }
        if let Some(value) = fields.get("fps") {
            this.fps = Some(fields.number("fps", value)?);
        }
        Ok(this)
    }

    /// The normalised frames of each video.
    ///
    /// # Errors
    /// A video without frames or with frames of different sizes.
    pub fn preprocess(&self, videos: &[Video]) -> Result<Vec<VideoInput>> {
        videos
            .iter()
            .map(|video| self.preprocess_one(video))
            .collect()
    }

    /// For the frames of one video, of `size`, one by one.
    ///
    /// # Errors
    /// An empty frame.
    pub fn frame_scaler(&self, size: ImageSize) -> Result<FrameScaler> {
        Ok(FrameScaler {
            plan: self.settings.plan(size)?,
            table: self.settings.normalisation(),
        })
    }

    fn preprocess_one(&self, video: &Video) -> Result<VideoInput> {
        let Some(first) = video.frames.first() else {
            return Err(Error::Media(
                "a video without frames has nothing in it".into(),
            ));
        };
        let scaler = self.frame_scaler(first.size)?;
        let size = scaler.size();
        let mut data = vec![0.0; video.frames.len() * 3 * size.area()];
        data.par_chunks_exact_mut(3 * size.area())
            .zip(&video.frames)
            .try_for_each(|(out, frame)| scaler.scale_into(frame, out))?;
        Ok(VideoInput::from(Pixels {
            count: video.frames.len(),
            size,
            data: data.into(),
        }))
    }

    /// Which frames the call's `num_frames` or `fps` ask for, the file's settings standing in for both
    /// (`sample_frames`); every frame where nothing asks.
    ///
    /// # Errors
    /// As [`sample_frames`].
    pub fn frames_indices(
        &self,
        total: usize,
        num_frames: Option<usize>,
        fps: Option<f64>,
        metadata: Option<&VideoMetadata>,
    ) -> Result<Vec<usize>> {
        let asked = num_frames.is_some() || fps.is_some();
        if !asked && !self.do_sample_frames {
            return Ok((0..total).collect());
        }
        if asked {
            return sample_frames(total, num_frames, fps, metadata);
        }
        // The file's number wins over its rate, as in the reference.
        let fps = self.fps.filter(|_| self.num_frames.is_none());
        sample_frames(total, self.num_frames, fps, metadata)
    }
}

/// What happens to each frame of a video, planned once. A frame's values do not depend on the others.
#[derive(Debug, Clone)]
pub struct FrameScaler {
    plan: PicturePlan,
    table: NormaliseTable,
}

impl FrameScaler {
    /// The size of a normalised frame.
    pub fn size(&self) -> ImageSize {
        self.plan.output
    }

    /// One frame, normalised: a stack of one picture.
    ///
    /// # Errors
    /// The frame is not of the video's size.
    pub fn scale(&self, frame: &Image) -> Result<Pixels> {
        let size = self.size();
        let mut data = vec![0.0; 3 * size.area()];
        self.scale_into(frame, &mut data)?;
        Ok(Pixels {
            count: 1,
            size,
            data: data.into(),
        })
    }

    fn scale_into(&self, frame: &Image, out: &mut [f32]) -> Result<()> {
        self.plan.apply(frame, &self.table, out)
    }
}

/// Indices of the frames to take of `total`: `i * total / n` for `i` in `0..n`, where `n` is
/// `num_frames`, or `trunc(total / metadata.fps * fps)` but at least 1; every frame where neither is given.
///
/// # Errors
/// Both are given, more frames are asked for than there are, or `fps` is given without the video's own
/// rate.
pub fn sample_frames(
    total: usize,
    num_frames: Option<usize>,
    fps: Option<f64>,
    metadata: Option<&VideoMetadata>,
) -> Result<Vec<usize>> {
    let wanted = match (num_frames, fps) {
        (Some(_), Some(_)) => {
            return Err(Error::Input(
                "num_frames and fps were both given: give one, they are two ways to say the same"
                    .into(),
            ));
        }
        (Some(0), None) => {
            return Err(Error::Input(
                "num_frames is 0: ask for at least one frame".into(),
            ));
        }
        (Some(n), None) => n,
        (None, Some(fps)) => frames_at(total, fps, metadata)?,
        (None, None) => total,
    };
    if wanted > total {
        return Err(Error::Input(format!(
            "{wanted} frames were asked for, but the video has {total}: ask for at most {total}"
        )));
    }
    Ok((0..wanted)
        .map(|i| (i as u128 * total as u128 / wanted as u128) as usize)
        .collect())
}

fn frames_at(total: usize, fps: f64, metadata: Option<&VideoMetadata>) -> Result<usize> {
    if !(fps.is_finite() && fps > 0.0) {
        return Err(Error::Input(format!("fps is {fps}: give a rate above 0")));
    }
    match metadata {
        Some(metadata) if metadata.fps.is_finite() && metadata.fps > 0.0 => {
            Ok(((total as f64 / metadata.fps * fps) as usize).max(1))
        }
        _ => Err(Error::Input(
            "fps was given, but the video's own frame rate is not known: give num_frames instead"
                .into(),
        )),
    }
}
