//! The media of a command on their way: read on a thread of their own, while the model is loaded and while it
//! looks at what is there.
//!
//! Decision: the prompt needs the number of frames of every video, so all media but the last video are whole when
//! it is made; the last one's frames come one by one, which for one clip is all of it. Where the file turns out to be
//! damaged and its frames begin again, so does the answer, of which nothing has been shown by then. What
//! goes wrong while reading is told rather than what came of it.

use std::sync::mpsc;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use llava_next_video::Error;
use llava_next_video::media::{FrameSampling, MediaLimits, SampledFrame};
use llava_next_video::processor::LlavaNextVideoProcessor;
use llava_next_video::processor::arriving::ScalingFeed;
use llava_next_video::processor::conversation::Conversation;
use llava_next_video::processor::inputs::{ImageInput, ModelInputs, VideoInput};

use crate::media::{self, named};
use crate::pipeline::{Pipeline, seconds};
use crate::progress::{Unit, bar, note};

/// The media of a batch as the model takes them, in the order of their placeholders.
#[derive(Clone, Default)]
struct Scaled {
    images: Vec<ImageInput>,
    videos: Vec<VideoInput>,
}

/// Inputs whose media are being read.
pub struct Incoming<'a> {
    pipeline: &'a Pipeline,
    conversations: &'a [Conversation],
    media: mpsc::Receiver<Scaled>,
}

impl Incoming<'_> {
    /// The inputs, as soon as the numbers of frames are known; the last video's frames are arriving.
    pub fn inputs(&self) -> Result<ModelInputs> {
        let media = self.media.recv();
        self.inputs_of(media.map_err(|_| anyhow!("the media could not be read"))?)
    }

    /// What `work` makes of the inputs, of those that count in the end.
    pub fn answer<T>(
        &self,
        mut inputs: ModelInputs,
        mut work: impl FnMut(ModelInputs) -> Result<T>,
    ) -> Result<T> {
        loop {
            match (work(inputs), self.media.try_recv()) {
                (Err(_), Ok(again)) => inputs = self.inputs_of(again)?,
                (done, _) => return done,
            }
        }
    }

    fn inputs_of(&self, media: Scaled) -> Result<ModelInputs> {
        let Scaled { images, videos } = media;
        Ok(self
            .pipeline
            .inputs_scaled(self.conversations, images, videos)?)
    }
}

/// Runs `work` while the media of `conversations` are read; what it returns, and the seconds that reading took.
pub fn reading<T>(
    pipeline: &Pipeline,
    conversations: &[Conversation],
    sampling: FrameSampling,
    work: impl FnOnce(&Incoming<'_>) -> Result<T>,
) -> Result<(T, f64)> {
    let (sender, media) = mpsc::channel();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let start = Instant::now();
            let notes = read(&pipeline.processor, conversations, sampling, &sender)?;
            Ok((notes, seconds(start)))
        });
        let incoming = Incoming {
            pipeline,
            conversations,
            media,
        };
        let worked = work(&incoming);
        // Whoever still reads for nobody stops.
        drop(incoming);
        let stopped =
            |error: &anyhow::Error| matches!(error.downcast_ref::<Error>(), Some(Error::Cancelled));
        match reader.join() {
            Ok(Ok((notes, seconds))) => {
                notes.iter().for_each(|text| note(text));
                Ok((worked?, seconds))
            }
            Ok(Err(error)) if stopped(&error) => Ok((worked?, 0.0)),
            Ok(Err(error)) => Err(error),
            Err(_) => bail!("reading the media broke off. This is a bug: please report it"),
        }
    })
}

/// Reads and scales all media, and hands them over once the last video's first frame is there; what a person
/// should know.
fn read(
    processor: &LlavaNextVideoProcessor,
    conversations: &[Conversation],
    sampling: FrameSampling,
    sender: &mpsc::Sender<Scaled>,
) -> Result<Vec<String>> {
    let limits = MediaLimits::default();
    let images: Vec<_> = (conversations.iter())
        .flat_map(Conversation::images)
        .collect();
    let videos: Vec<_> = (conversations.iter())
        .flat_map(Conversation::videos)
        .collect();
    let progress = bar((images.len() + videos.len()) as u64, Unit::Count, "media");
    let (mut scaled, mut notes) = (Scaled::default(), Vec::new());
    for source in images {
        let image = media::image(named(source, "an image")?, &limits)?;
        scaled.images.push(processor.scale_image(&image)?);
        progress.inc(1);
    }
    let Some((last, whole)) = videos.split_last() else {
        progress.finish_and_clear();
        let _ = sender.send(scaled);
        return Ok(notes);
    };
    for source in whole {
        let video = media::video(named(*source, "a video")?, sampling, &limits)?;
        scaled.videos.push(processor.scale_video(&video)?);
        notes.extend(video.notes);
        progress.inc(1);
    }
    let mut feed = None;
    let mut sink = |frame: SampledFrame| {
        if frame.position == 0 {
            let scaler = processor.frame_scaler(frame.image.size)?;
            let (own, video) = ScalingFeed::new(scaler, frame.of)?;
            let mut all = scaled.clone();
            all.videos.push(video);
            // Those who wait for frames that were handed over before hear that those ended, and find these.
            sender.send(all).map_err(|_| Error::Cancelled)?;
            feed = Some(own);
            progress.finish_and_clear();
        }
        match &mut feed {
            Some(feed) => feed.push(&frame.image),
            None => Err(Error::Internal("frames began behind the first".into())),
        }
    };
    let source = named(*last, "a video")?;
    notes.extend(media::frames(source, sampling, &limits, &mut sink)?);
    progress.finish_and_clear();
    Ok(notes)
}
