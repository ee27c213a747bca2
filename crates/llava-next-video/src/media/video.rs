//! The sampled frames of a video file.
//!
//! Two ways lead to a frame. Where the MP4 table (first choice) or the packets (second) tell the order of
//! presentation and the places to start (`index`), only the groups of pictures that hold sampled frames are decoded
//! (`seek`). Otherwise, and whenever a frame does not come out as the index promised, the file is decoded from its
//! start (`sequential`). All ways give the same frames; the tests hold them against each other.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use ffmpeg_next::Rational;

use super::convert::Turn;
use super::decode::{Control, Decoder};
use super::demux::Demuxer;
use super::index::{self, Scan};
use super::mp4;
use super::sample::frames_in;
use super::seek::seeking;
use super::sequential::{Plan, sequential};
use super::{
    FrameSampling, Image, ImageSize, MediaLimits, Video, VideoInfo, VideoMetadata, VideoPart,
    sample_indices,
};
use crate::{Error, Result};

/// One frame on its way to the caller.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledFrame {
    /// Which of the sampled frames this is, from 0.
    pub position: usize,
    /// How many frames are sampled in all; the first frame tells already.
    pub of: usize,
    /// Which frame of the stream it is, from 0.
    pub index: usize,
    /// Presentation time in seconds from the first frame.
    pub timestamp: f64,
    /// The picture, upright.
    pub image: Image,
}

/// What [`decode_video_with`] learned besides the frames.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoSummary {
    /// The whole stream.
    pub metadata: VideoMetadata,
    /// Which frames were sampled.
    pub frames_indices: Vec<usize>,
    /// What a person should know, a sentence each.
    pub notes: Vec<String>,
    /// Whether only the groups of pictures that hold sampled frames were decoded, and not the whole file.
    pub seeked: bool,
}

/// Decodes the frames of the file `path` that `sampling` takes.
///
/// # Errors
///
/// [`Error::Io`] or [`Error::Media`] where the file cannot be read or is no video, [`Error::Input`] where
/// `sampling` asks for what it does not have, [`Error::Media`] beyond `limits`, [`Error::Cancelled`] soon after
/// `cancel` becomes true.
pub fn decode_video(
    path: impl AsRef<Path>,
    sampling: FrameSampling,
    limits: &MediaLimits,
    cancel: Option<&AtomicBool>,
) -> Result<Video> {
    decode_video_part(path, sampling, VideoPart::WHOLE, limits, cancel)
}

/// As [`decode_video`], but of the frames that are shown in `part`. Their numbers and times are still those of the
/// whole video.
///
/// # Errors
///
/// As [`decode_video`], and [`Error::Input`] where `part` lies outside the video.
pub fn decode_video_part(
    path: impl AsRef<Path>,
    sampling: FrameSampling,
    part: VideoPart,
    limits: &MediaLimits,
    cancel: Option<&AtomicBool>,
) -> Result<Video> {
    collect(|sink| decode_video_with(path, sampling, part, limits, cancel, sink))
}

/// As [`decode_video`], but always decodes the file from its start: slow, and the truth that the tests hold
/// [`decode_video`] against.
///
/// # Errors
///
/// As [`decode_video`].
#[doc(hidden)]
pub fn decode_video_everything(
    path: impl AsRef<Path>,
    sampling: FrameSampling,
    part: VideoPart,
    limits: &MediaLimits,
) -> Result<Video> {
    let path = path.as_ref();
    collect(|sink| {
        let control = Control {
            cancel: None,
            deadline: limits.deadline,
        };
        let job = Job {
            path,
            sampling,
            part,
            limits,
            control: &control,
        };
        let mut out = Out::new(path, limits, sink);
        let plan = Plan {
            threaded: true,
            promised: None,
        };
        sequential(&job, &mut out, plan)
    })
}

/// As [`decode_video_part`], handing each frame to `sink` as it is decoded, in order of presentation; memory stays at a
/// few frames however many are sampled. An error from `sink` ends the call with that error.
///
/// Which frames to take is decided on what the packets promise. Where a damaged file turns out to hold fewer, frames
/// begin again at position 0, and those handed over before count no more.
///
/// # Errors
///
/// As [`decode_video_part`].
pub fn decode_video_with(
    path: impl AsRef<Path>,
    sampling: FrameSampling,
    part: VideoPart,
    limits: &MediaLimits,
    cancel: Option<&AtomicBool>,
    sink: &mut dyn FnMut(SampledFrame) -> Result<()>,
) -> Result<VideoSummary> {
    let path = path.as_ref();
    let control = Control {
        cancel,
        deadline: limits.deadline,
    };
    let job = Job {
        path,
        sampling,
        part,
        limits,
        control: &control,
    };
    let mut out = Out::new(path, limits, sink);
    let mut demuxer = Demuxer::open(path)?;
    if let Some(index) = index::from_table(&mut demuxer, limits)
        && let Some(summary) = seeking(&job, &mut demuxer, &index, &mut out)?
    {
        return Ok(summary);
    }
    demuxer = demuxer.rewound()?;
    let plan = match index::scan(&mut demuxer, limits, &control)? {
        Scan::Seekable(index) => {
            if let Some(summary) = seeking(&job, &mut demuxer, &index, &mut out)? {
                return Ok(summary);
            }
            // The index promised what the stream does not hold.
            Plan {
                threaded: false,
                promised: None,
            }
        }
        Scan::Sequential { promised } => Plan {
            threaded: true,
            promised: Some(promised),
        },
        Scan::Damaged { promised } => Plan {
            threaded: false,
            promised: Some(promised),
        },
    };
    drop(demuxer);
    sequential(&job, &mut out, plan)
}

/// What can be known of the video file `path` without decoding it.
///
/// # Errors
///
/// [`Error::Io`] or [`Error::Media`] where the file cannot be read or is no video.
pub fn probe_video(path: impl AsRef<Path>) -> Result<VideoInfo> {
    let limits = MediaLimits::default();
    let control = Control {
        cancel: None,
        deadline: None,
    };
    let mut demuxer = Demuxer::open(path.as_ref())?;
    let (turn, _) = stream_turn(&demuxer);
    let size = Decoder::open(&demuxer, &limits, false)?.size();
    let scan = match index::from_table(&mut demuxer, &limits) {
        Some(index) => Scan::Seekable(index),
        None => {
            demuxer = demuxer.rewound()?;
            index::scan(&mut demuxer, &limits, &control)?
        }
    };
    let (frames, seekable) = match &scan {
        Scan::Seekable(index) => (index.len(), true),
        Scan::Sequential { promised } | Scan::Damaged { promised } => (*promised, false),
    };
    let fps = demuxer.frame_rate;
    Ok(VideoInfo {
        codec: demuxer.codec.name().to_string(),
        container: demuxer.container(),
        size: turn.size(size),
        fps,
        frames,
        duration: if fps > 0.0 { frames as f64 / fps } else { 0.0 },
        rotation: turn.degrees(),
        seekable,
    })
}

fn collect(
    decode: impl FnOnce(&mut dyn FnMut(SampledFrame) -> Result<()>) -> Result<VideoSummary>,
) -> Result<Video> {
    let (mut frames, mut timestamps) = (Vec::new(), Vec::new());
    let summary = decode(&mut |frame: SampledFrame| {
        if frame.position == 0 {
            // The file did not keep what it promised at first.
            (frames, timestamps) = (Vec::new(), Vec::new());
        }
        frames.push(frame.image);
        timestamps.push(frame.timestamp);
        Ok(())
    })?;
    Ok(Video {
        frames,
        frames_indices: summary.frames_indices,
        timestamps,
        metadata: summary.metadata,
        notes: summary.notes,
    })
}

/// The turn that the stream's header asks for, and whether it could be understood.
pub(super) fn stream_turn(demuxer: &Demuxer) -> (Turn, bool) {
    match demuxer.display_matrix.as_deref() {
        None => (Turn::default(), true),
        Some(bytes) => match Turn::from_matrix(bytes) {
            Some(turn) => (turn, true),
            None => (Turn::default(), false),
        },
    }
}

/// The caller's side: counts the frames handed over and holds them to one size.
pub(super) struct Out<'a> {
    path: &'a Path,
    limits: &'a MediaLimits,
    sink: &'a mut dyn FnMut(SampledFrame) -> Result<()>,
    size: Option<ImageSize>,
    given: usize,
    bytes: u64,
    wanted: Vec<usize>,
}

impl<'a> Out<'a> {
    fn new(
        path: &'a Path,
        limits: &'a MediaLimits,
        sink: &'a mut dyn FnMut(SampledFrame) -> Result<()>,
    ) -> Self {
        Self {
            path,
            limits,
            sink,
            size: None,
            given: 0,
            bytes: 0,
            wanted: Vec::new(),
        }
    }

    fn admit(&self, count: usize) -> Result<()> {
        let most = self.limits.sampled_frames;
        if count <= most {
            return Ok(());
        }
        Err(Error::Input(format!(
            "{count} frames of {} were asked for, but at most {most} are taken: ask for fewer",
            self.path.display()
        )))
    }

    /// These are the frames to hand over. An attempt before this one may have handed over some: if it was to take the
    /// same, they count; otherwise all begins again.
    pub(super) fn begin(&mut self, wanted: &[usize]) {
        if self.wanted != wanted {
            (self.given, self.bytes) = (0, 0);
            self.wanted = wanted.to_vec();
        }
    }

    /// Frames handed over so far.
    pub(super) fn given(&self) -> usize {
        self.given
    }

    /// Hands over frame `index`.
    pub(super) fn give(&mut self, index: usize, timestamp: f64, image: Image) -> Result<()> {
        let size = *self.size.get_or_insert(image.size);
        if image.size != size {
            return Err(Error::Media(format!(
                "cannot use {}: its frames change size from {}x{} to {}x{} at frame {index}; re-encode it at one size",
                self.path.display(),
                size.width,
                size.height,
                image.size.width,
                image.size.height
            )));
        }
        self.bytes += image.data.len() as u64;
        if self.bytes > self.limits.sampled_bytes {
            return Err(Error::Media(format!(
                "cannot use {}: its sampled frames take more than {} MiB, the limit; sample fewer frames",
                self.path.display(),
                self.limits.sampled_bytes >> 20
            )));
        }
        let position = self.given;
        self.given += 1;
        (self.sink)(SampledFrame {
            position,
            of: self.wanted.len(),
            index,
            timestamp,
            image,
        })
    }
}

/// One call's question.
pub(super) struct Job<'a> {
    pub(super) path: &'a Path,
    sampling: FrameSampling,
    part: VideoPart,
    pub(super) limits: &'a MediaLimits,
    pub(super) control: &'a Control<'a>,
}

impl Job<'_> {
    /// Whether frames are taken from all of the video, so that nobody asks when a frame comes up.
    pub(super) fn takes_the_whole(&self) -> bool {
        self.part == VideoPart::WHOLE
    }

    /// Which frames to take of `total`; `time` tells when one comes up.
    pub(super) fn sample(
        &self,
        total: usize,
        fps: f64,
        time: impl Fn(usize) -> f64,
        out: &Out<'_>,
    ) -> Result<Vec<usize>> {
        let named = |cause: String| format!("cannot use {}: {cause}", self.path.display());
        let name = |error| match error {
            Error::Input(cause) => Error::Input(named(cause)),
            Error::Media(cause) => Error::Media(named(cause)),
            other => other,
        };
        self.check_duration(total, fps).map_err(name)?;
        let within = match self.takes_the_whole() {
            true => 0..total,
            false => frames_in(self.part, total, time).map_err(name)?,
        };
        if let FrameSampling::All = self.sampling {
            out.admit(within.len())?;
        }
        let mut indices = sample_indices(within.len(), fps, self.sampling).map_err(name)?;
        out.admit(indices.len())?;
        indices.iter_mut().for_each(|at| *at += within.start);
        Ok(indices)
    }

    fn check_duration(&self, total: usize, fps: f64) -> Result<()> {
        let Some(most) = self.limits.duration else {
            return Ok(());
        };
        let seconds = if fps > 0.0 { total as f64 / fps } else { 0.0 };
        if seconds <= most.as_secs_f64() {
            return Ok(());
        }
        Err(Error::Media(format!(
            "it lasts {seconds:.0} s, more than {} s, the limit; cut it into shorter files",
            most.as_secs()
        )))
    }

    /// What to tell about the whole.
    pub(super) fn summary(
        &self,
        demuxer: &Demuxer,
        total: usize,
        frames_indices: Vec<usize>,
        mut notes: Vec<String>,
    ) -> VideoSummary {
        let shown = self.path.display();
        let (turn, known) = stream_turn(demuxer);
        if !known {
            notes.push(format!(
                "{shown} asks for a rotation that is not a quarter turn; it was left as it is"
            ));
        } else if turn != Turn::default() {
            notes.push(match turn.degrees() {
                0 => format!("{shown} was mirrored, as the file asks"),
                degrees => {
                    format!("{shown} was rotated by {degrees} degrees clockwise, as the file asks")
                }
            });
        }
        if mp4::is_cut_off(self.path, &demuxer.container()) {
            notes.push(format!(
                "{shown} is cut off: only the {total} frames that are left of it count"
            ));
        }
        if let FrameSampling::Default(wanted) = self.sampling
            && wanted > frames_indices.len()
        {
            let (place, has) = match self.takes_the_whole() {
                true => (String::new(), total),
                false => ("the part of ".into(), frames_indices.len()),
            };
            notes.push(format!(
                "{place}{shown} has {has} frames, fewer than {wanted}: all of them were taken"
            ));
        }
        let fps = demuxer.frame_rate;
        let duration = if fps > 0.0 { total as f64 / fps } else { 0.0 };
        VideoSummary {
            metadata: VideoMetadata {
                total_num_frames: total,
                fps,
                duration,
            },
            frames_indices,
            notes,
            seeked: false,
        }
    }
}

/// Ticks in seconds.
pub(super) fn seconds(ticks: i64, base: Rational) -> f64 {
    ticks as f64 * f64::from(base)
}
