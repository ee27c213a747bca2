//! The media that conversations name, loaded: files, URLs (fetched first), base64, lists of frames.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use llava_next_video::media::{
    FrameSampling, Image, MediaLimits, SampledFrame, Video, VideoMetadata, VideoPart,
    decode_data_uri_or_base64, decode_image, decode_video, decode_video_with, load_image,
    sample_indices,
};
use llava_next_video::processor::conversation::{Conversation, MediaSource};

use crate::fetch;
use crate::progress::{Unit, bar, note};

/// The media of a batch, in the order of their placeholders, and what loading them took.
#[derive(Debug, Default)]
pub struct LoadedMedia {
    /// Images of all conversations.
    pub images: Vec<Image>,
    /// Videos of all conversations.
    pub videos: Vec<Video>,
    /// Seconds.
    pub seconds: f64,
}

impl LoadedMedia {
    /// Frames of all videos.
    pub fn frames(&self) -> usize {
        self.videos.iter().map(|video| video.frames.len()).sum()
    }

    /// Loads everything that `conversations` name.
    pub fn load(conversations: &[Conversation], sampling: FrameSampling) -> Result<Self> {
        let start = Instant::now();
        let limits = MediaLimits::default();
        let images: Vec<_> = conversations
            .iter()
            .flat_map(Conversation::images)
            .collect();
        let videos: Vec<_> = conversations
            .iter()
            .flat_map(Conversation::videos)
            .collect();
        let progress = bar((images.len() + videos.len()) as u64, Unit::Count, "media");
        let mut loaded = Self::default();
        for source in images {
            loaded
                .images
                .push(image(named(source, "an image")?, &limits)?);
            progress.inc(1);
        }
        for source in videos {
            loaded
                .videos
                .push(video(named(source, "a video")?, sampling, &limits)?);
            progress.inc(1);
        }
        progress.finish_and_clear();
        for text in loaded.videos.iter().flat_map(|video| &video.notes) {
            note(text);
        }
        loaded.seconds = start.elapsed().as_secs_f64();
        Ok(loaded)
    }
}

/// What was typed after `--video` or `--image`.
pub fn source(text: &str) -> MediaSource {
    if text.starts_with("data:") {
        return MediaSource::Base64(text.to_owned());
    }
    if let Some(path) = fetch::file_url(text) {
        return MediaSource::Path(path);
    }
    match fetch::is_url(text) && !Path::new(text).exists() {
        true => MediaSource::Url(text.to_owned()),
        false => MediaSource::Path(text.into()),
    }
}

/// The source of a medium, which must have one.
pub fn named<'a>(source: Option<&'a MediaSource>, kind: &str) -> Result<&'a MediaSource> {
    source.with_context(|| {
        format!("the conversation has {kind} without a source: give it a \"path\" or a \"url\"")
    })
}

/// One picture.
pub fn image(source: &MediaSource, limits: &MediaLimits) -> Result<Image> {
    Ok(match source {
        MediaSource::Path(path) => load_image(path, limits)?,
        MediaSource::Base64(text) => decode_data_uri_or_base64(text, limits)?,
        MediaSource::Url(url) => {
            let file = fetch::download(url)?;
            let bytes = std::fs::read(file.path()).context("cannot read what was fetched")?;
            decode_image(&bytes, url, limits)?
        }
        MediaSource::Frames(_) => bail!("an image cannot be a list; give one picture"),
    })
}

/// One video, whole.
pub fn video(source: &MediaSource, sampling: FrameSampling, limits: &MediaLimits) -> Result<Video> {
    if let MediaSource::Frames(frames) = source {
        return video_of_images(frames, sampling, limits);
    }
    local(source, |path| decode_video(path, sampling, limits, None))
}

/// One video, frame by frame as [`decode_video_with`] hands them over; what a person should know of it.
pub fn frames(
    source: &MediaSource,
    sampling: FrameSampling,
    limits: &MediaLimits,
    sink: &mut dyn FnMut(SampledFrame) -> llava_next_video::Result<()>,
) -> Result<Vec<String>> {
    if let MediaSource::Frames(frames) = source {
        let video = video_of_images(frames, sampling, limits)?;
        let of = video.frames.len();
        for (position, image) in video.frames.into_iter().enumerate() {
            sink(SampledFrame {
                position,
                of,
                index: video.frames_indices[position],
                timestamp: video.timestamps[position],
                image,
            })?;
        }
        return Ok(video.notes);
    }
    let part = VideoPart::WHOLE;
    let decode = |path: &Path| decode_video_with(path, sampling, part, limits, None, sink);
    Ok(local(source, decode)?.notes)
}

/// What `decode` makes of a video file, fetched first where it is elsewhere.
fn local<T>(
    source: &MediaSource,
    decode: impl FnOnce(&Path) -> llava_next_video::Result<T>,
) -> Result<T> {
    match source {
        MediaSource::Path(path) => Ok(decode(path)?),
        MediaSource::Url(url) => {
            let file = fetch::download(url)?;
            decode(file.path()).with_context(|| format!("in {url}"))
        }
        MediaSource::Base64(_) | MediaSource::Frames(_) => {
            bail!("a video in base64 cannot be read here: write it to a file and give its path")
        }
    }
}

/// A video given as pictures, sampled like any other. It has no frame rate, so none can be asked for.
fn video_of_images(
    sources: &[MediaSource],
    sampling: FrameSampling,
    limits: &MediaLimits,
) -> Result<Video> {
    if let FrameSampling::Fps(_) = sampling {
        bail!("a video given as pictures has no frame rate: use --num-frames instead of --fps");
    }
    let total = sources.len();
    let indices = sample_indices(total, 1.0, sampling)?;
    let frames = indices
        .iter()
        .map(|i| image(&sources[*i], limits))
        .collect::<Result<Vec<Image>>>()?;
    if let Some(odd) = frames.iter().find(|frame| frame.size != frames[0].size) {
        bail!(
            "the pictures of a video must be of one size, but one has {} x {} pixels and another \
             {} x {}",
            frames[0].size.width,
            frames[0].size.height,
            odd.size.width,
            odd.size.height
        );
    }
    Ok(Video {
        timestamps: indices.iter().map(|i| *i as f64).collect(),
        frames_indices: indices,
        frames,
        metadata: VideoMetadata {
            total_num_frames: total,
            fps: 1.0,
            duration: total as f64,
        },
        notes: Vec::new(),
    })
}
