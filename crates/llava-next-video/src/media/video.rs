//! The sampled frames of a video file.
//!
//! Two ways lead to a frame. Where the packets tell the order of presentation and the places to start
//! (`index`), only the groups of pictures that hold sampled frames are decoded: seek, decode forward,
//! match frames by their presentation time. Otherwise, and whenever a frame does not come out as the
//! index promised, the file is decoded from its start, once to count and once to pick. Both ways give
//! the same frames; the tests hold them against each other.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use ffmpeg_next::{Rational, frame};

use super::convert::{Converter, Turn};
use super::decode::{Control, Decoder};
use super::demux::{Demuxer, Next};
use super::index::{self, Index, Scan};
use super::{
    FrameSampling, Image, ImageSize, MediaLimits, Video, VideoInfo, VideoMetadata, bitstream,
    sample_indices,
};
use crate::{Error, Result};

/// Packets that are decoded past rather than seeked over.
const WORTH_DECODING: usize = 4;

/// One frame on its way to the caller.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledFrame {
    /// Which of the sampled frames this is, from 0.
    pub position: usize,
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
    collect(path.as_ref(), limits, |sink| {
        decode_video_with(path.as_ref(), sampling, limits, cancel, sink)
    })
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
    limits: &MediaLimits,
) -> Result<Video> {
    let path = path.as_ref();
    collect(path, limits, |sink| {
        let control = Control {
            cancel: None,
            deadline: limits.deadline,
        };
        let job = Job {
            path,
            sampling,
            limits,
            control: &control,
        };
        let mut out = Out::new(path, limits, sink);
        let notes = Vec::new();
        job.sequential(&mut out, Sequential::Count { threaded: true }, notes)
    })
}

/// As [`decode_video`], handing each frame to `sink` as it is decoded, in order of presentation; memory stays at a
/// few frames however many are sampled. An error from `sink` ends the call with that error.
///
/// # Errors
///
/// As [`decode_video`].
pub fn decode_video_with(
    path: impl AsRef<Path>,
    sampling: FrameSampling,
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
        limits,
        control: &control,
    };
    let mut out = Out::new(path, limits, sink);
    let mut demuxer = Demuxer::open(path)?;
    let notes = Vec::new();
    match index::scan(&mut demuxer, limits, &control)? {
        Scan::Seekable(index) => {
            if let Some(summary) = job.seeking(&mut demuxer, &index, &mut out)? {
                return Ok(summary);
            }
            // The index promised what the stream does not hold.
            drop(demuxer);
            job.sequential(&mut out, Sequential::Count { threaded: false }, notes)
        }
        Scan::Sequential { .. } => {
            drop(demuxer);
            job.sequential(&mut out, Sequential::Count { threaded: true }, notes)
        }
        Scan::Damaged { .. } => {
            drop(demuxer);
            job.sequential(&mut out, Sequential::Count { threaded: false }, notes)
        }
    }
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
    let scan = index::scan(&mut demuxer, &limits, &control)?;
    let size = Decoder::size(&demuxer, &limits)?;
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
    path: &Path,
    limits: &MediaLimits,
    decode: impl FnOnce(&mut dyn FnMut(SampledFrame) -> Result<()>) -> Result<VideoSummary>,
) -> Result<Video> {
    let (mut frames, mut timestamps) = (Vec::new(), Vec::new());
    let mut held = 0u64;
    let summary = decode(&mut |frame: SampledFrame| {
        held += frame.image.data.len() as u64;
        if held > limits.sampled_bytes {
            return Err(Error::Media(format!(
                "cannot use {}: its sampled frames take more than {} MiB, the limit; sample fewer frames",
                path.display(),
                limits.sampled_bytes >> 20
            )));
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

fn stream_turn(demuxer: &Demuxer) -> (Turn, bool) {
    match demuxer.display_matrix.as_deref() {
        None => (Turn::default(), true),
        Some(bytes) => match Turn::from_matrix(bytes) {
            Some(turn) => (turn, true),
            None => (Turn::default(), false),
        },
    }
}

/// The caller's side: counts the frames handed over and holds them to one size.
struct Out<'a> {
    path: &'a Path,
    most: usize,
    sink: &'a mut dyn FnMut(SampledFrame) -> Result<()>,
    size: Option<ImageSize>,
    given: usize,
}

impl<'a> Out<'a> {
    fn new(
        path: &'a Path,
        limits: &MediaLimits,
        sink: &'a mut dyn FnMut(SampledFrame) -> Result<()>,
    ) -> Self {
        Self {
            path,
            most: limits.sampled_frames,
            sink,
            size: None,
            given: 0,
        }
    }

    fn admit(&self, count: usize) -> Result<()> {
        if count <= self.most {
            return Ok(());
        }
        Err(Error::Input(format!(
            "{count} frames of {} were asked for, but at most {} are taken: ask for fewer",
            self.path.display(),
            self.most
        )))
    }

    fn give(&mut self, index: usize, timestamp: f64, image: Image) -> Result<()> {
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
        let position = self.given;
        self.given += 1;
        (self.sink)(SampledFrame {
            position,
            index,
            timestamp,
            image,
        })
    }
}

/// How to decode from the start.
enum Sequential {
    /// Decode once to count, then again to pick.
    Count {
        /// Whether to use all processors.
        threaded: bool,
    },
}

/// One call's question.
struct Job<'a> {
    path: &'a Path,
    sampling: FrameSampling,
    limits: &'a MediaLimits,
    control: &'a Control<'a>,
}

impl Job<'_> {
    fn sample(&self, total: usize, fps: f64, out: &Out<'_>) -> Result<Vec<usize>> {
        if let FrameSampling::All = self.sampling {
            out.admit(total)?;
        }
        let named = |cause: String| format!("cannot use {}: {cause}", self.path.display());
        let indices = sample_indices(total, fps, self.sampling).map_err(|error| match error {
            Error::Input(cause) => Error::Input(named(cause)),
            Error::Media(cause) => Error::Media(named(cause)),
            other => other,
        })?;
        out.admit(indices.len())?;
        Ok(indices)
    }

    fn summary(
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
        if let FrameSampling::Default(wanted) = self.sampling
            && wanted > total
        {
            notes.push(format!(
                "{shown} has {total} frames, fewer than {wanted}: all of them were taken"
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
        }
    }

    /// Decodes only the groups of pictures that hold sampled frames; `None` where a frame does not come out as
    /// the index promised and none was handed over wrongly.
    fn seeking(
        &self,
        demuxer: &mut Demuxer,
        index: &Index,
        out: &mut Out<'_>,
    ) -> Result<Option<VideoSummary>> {
        let frames = self.sample(index.len(), demuxer.frame_rate, out)?;
        let mut decoder = Decoder::open(demuxer, self.limits, true)?;
        let mut converter = Converter::new(stream_turn(demuxer).0);
        let mut rest = frames.as_slice();
        while !rest.is_empty() {
            let (start, end, count) = run_of(index, rest);
            let (now, later) = rest.split_at(count);
            let mut run = Run {
                job: self,
                demuxer,
                index,
                start,
                end,
                wanted: now,
            };
            if !run.decode(&mut decoder, &mut converter, out)? {
                return Ok(None);
            }
            rest = later;
        }
        let total = index.len();
        Ok(Some(self.summary(demuxer, total, frames, Vec::new())))
    }

    /// Decodes the file from its start.
    fn sequential(
        &self,
        out: &mut Out<'_>,
        how: Sequential,
        mut notes: Vec<String>,
    ) -> Result<VideoSummary> {
        let Sequential::Count { mut threaded } = how;
        let mut counted = self.every_frame(threaded, &mut |_, _| Ok(true))?;
        if counted.failed && threaded {
            threaded = false;
            counted = self.every_frame(threaded, &mut |_, _| Ok(true))?;
        }
        let total = counted.frames;
        if total == 0 {
            return Err(Error::Media(format!(
                "cannot use {}: none of its frames can be decoded; the file is damaged or cut off",
                self.path.display()
            )));
        }
        let demuxer = Demuxer::open(self.path)?;
        let frames = self.sample(total, demuxer.frame_rate, out)?;
        if counted.failed {
            notes.push(format!(
                "{} is damaged or cut off: {total} frames could be decoded",
                self.path.display()
            ));
        }
        let given = out.given;
        if given > frames.len() {
            return Err(self.contradiction(total));
        }
        let mut wanted = frames.iter().copied().skip(given).peekable();
        let mut converter = Converter::new(stream_turn(&demuxer).0);
        let mut first = None;
        self.every_frame(threaded, &mut |at, frame| {
            let ticks = frame.timestamp();
            let start = *first.get_or_insert(ticks.unwrap_or(0));
            if wanted.next_if_eq(&at).is_some() {
                let time = match ticks {
                    Some(ticks) => seconds(ticks - start, demuxer.time_base),
                    None if demuxer.frame_rate > 0.0 => at as f64 / demuxer.frame_rate,
                    None => 0.0,
                };
                out.give(at, time, converter.convert(frame)?)?;
            }
            Ok(wanted.peek().is_some())
        })?;
        if wanted.peek().is_some() {
            return Err(self.contradiction(total));
        }
        Ok(self.summary(&demuxer, total, frames, notes))
    }

    fn contradiction(&self, total: usize) -> Error {
        Error::Media(format!(
            "cannot use {}: it is damaged, {total} frames could be decoded at first and fewer later; re-encode it",
            self.path.display()
        ))
    }

    /// Calls `visit` with every frame in order of presentation until it returns false.
    fn every_frame(
        &self,
        threaded: bool,
        visit: &mut dyn FnMut(usize, frame::Video) -> Result<bool>,
    ) -> Result<Counted> {
        let mut demuxer = Demuxer::open(self.path)?;
        let mut decoder = Decoder::open(&demuxer, self.limits, threaded)?;
        let mut counted = Counted {
            frames: 0,
            failed: false,
        };
        loop {
            self.control.check()?;
            let more = match demuxer.next() {
                // What is left of a packet at the end of a file that was cut off.
                Next::Packet(packet)
                    if packet.is_corrupt() && !threaded && is_last(&mut demuxer) =>
                {
                    false
                }
                Next::Packet(packet) => {
                    counted.failed |= packet.is_corrupt();
                    decoder.send(&packet, true, self.path)?;
                    true
                }
                Next::End => false,
                Next::Broken => {
                    counted.failed = true;
                    false
                }
            };
            if !more {
                decoder.finish();
            }
            while let Some(frame) = decoder.receive() {
                if !visit(counted.frames, frame)? {
                    return Ok(counted);
                }
                counted.frames += 1;
            }
            if !more {
                counted.failed |= decoder.failed;
                return Ok(counted);
            }
        }
    }
}

fn is_last(demuxer: &mut Demuxer) -> bool {
    !matches!(demuxer.next(), Next::Packet(_))
}

struct Counted {
    frames: usize,
    failed: bool,
}

fn seconds(ticks: i64, base: Rational) -> f64 {
    ticks as f64 * f64::from(base)
}

/// The packets `start..=end` that one stretch of decoding takes, and how many of `frames` come out of it.
fn run_of(index: &Index, frames: &[usize]) -> (usize, usize, usize) {
    let start = index.start_for(frames[0]);
    let mut end = index.packet_of(frames[0]);
    let mut count = 1;
    for frame in &frames[1..] {
        if index.start_for(*frame) > end + WORTH_DECODING {
            break;
        }
        end = end.max(index.packet_of(*frame));
        count += 1;
    }
    (start, end, count)
}

/// One stretch of decoding.
struct Run<'a> {
    job: &'a Job<'a>,
    demuxer: &'a mut Demuxer,
    index: &'a Index,
    start: usize,
    end: usize,
    wanted: &'a [usize],
}

impl Run<'_> {
    /// Hands over the wanted frames; false where the stream is not as the index says.
    fn decode(
        &mut self,
        decoder: &mut Decoder,
        converter: &mut Converter,
        out: &mut Out<'_>,
    ) -> Result<bool> {
        let Some(mut packet) = self.first_packet()? else {
            return Ok(false);
        };
        decoder.flush();
        let skips = bitstream::can_skip_unreferenced(self.demuxer.codec);
        let mut at = self.start;
        loop {
            self.job.control.check()?;
            let entry = &self.index.entries[at];
            if packet.pts() != Some(entry.pts) || packet.is_corrupt() {
                return Ok(false);
            }
            let needed = !skips || self.is_wanted(entry.pts);
            decoder.send(&packet, needed, self.job.path)?;
            if at == self.end {
                decoder.finish();
            }
            self.hand_over(decoder, converter, out)?;
            if decoder.failed {
                return Ok(false);
            }
            if self.wanted.is_empty() {
                return Ok(true);
            }
            if at == self.end {
                return Ok(false);
            }
            at += 1;
            packet = match self.demuxer.next() {
                Next::Packet(packet) => packet,
                Next::End | Next::Broken => return Ok(false),
            };
        }
    }

    fn is_wanted(&self, pts: i64) -> bool {
        self.wanted
            .binary_search_by_key(&pts, |frame| self.index.pts_of(*frame))
            .is_ok()
    }

    fn hand_over(
        &mut self,
        decoder: &mut Decoder,
        converter: &mut Converter,
        out: &mut Out<'_>,
    ) -> Result<()> {
        while let Some(frame) = decoder.receive() {
            let Some((&next, later)) = self.wanted.split_first() else {
                continue;
            };
            if frame.pts() == Some(self.index.pts_of(next)) && !decoder.failed {
                let ticks = self.index.pts_of(next) - self.index.pts_of(0);
                let time = seconds(ticks, self.demuxer.time_base);
                out.give(next, time, converter.convert(frame)?)?;
                self.wanted = later;
            }
        }
        Ok(())
    }

    /// Seeks until reading arrives at the packet `start`; `None` where it does not.
    fn first_packet(&mut self) -> Result<Option<ffmpeg_next::Packet>> {
        let (entry, first) = (self.index.entries[self.start], self.index.entries[0]);
        let dts = entry.dts.unwrap_or(entry.pts);
        let earliest = first.dts.unwrap_or(first.pts).min(first.pts);
        // MP4 seeks by decoding time and Matroska by presentation time; a packet at either is right.
        let tries = [entry.pts.max(dts), entry.pts.min(dts), earliest];
        for ticks in tries {
            if self.demuxer.seek(ticks)
                && let Some(packet) = self.read_up_to_start()?
            {
                return Ok(Some(packet));
            }
        }
        Ok(None)
    }

    fn read_up_to_start(&mut self) -> Result<Option<ffmpeg_next::Packet>> {
        let goal = self.index.entries[self.start];
        for read in 0..=self.index.entries.len() {
            if read.is_multiple_of(64) {
                self.job.control.check()?;
            }
            let Next::Packet(packet) = self.demuxer.next() else {
                return Ok(None);
            };
            if packet.pts() == Some(goal.pts) {
                return Ok(Some(packet));
            }
            let beyond = |at: usize| at > self.start;
            if packet
                .pts()
                .and_then(|pts| self.index.packet_at(pts))
                .is_some_and(beyond)
            {
                return Ok(None);
            }
        }
        Ok(None)
    }
}
