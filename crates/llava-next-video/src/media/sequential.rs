//! Frames by decoding the file from its start: for files whose packets do not tell the order of presentation
//! (AVI, raw streams, GIF, old codecs), for damaged ones, and as the truth in tests.
//!
//! The number of frames must be known before any is sampled. Where the packets promise a number, frames are
//! kept as if it were right, and handed over once it turns out to be; otherwise the file is decoded twice, to count
//! and to pick. A damaged file is decoded by one thread and yields what comes out, with a note.

use super::Image;
use super::convert::Converter;
use super::decode::Decoder;
use super::demux::{Demuxer, Next};
use super::video::{Job, Out, VideoSummary, seconds, stream_turn};
use crate::{Error, Result};
use ffmpeg_next::frame;

/// Bytes of RGB kept on the strength of a promise. More frames than that are decoded twice.
const KEPT_BYTES: usize = 256 << 20;

/// How to go about it.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    /// Whether to use all processors.
    pub(super) threaded: bool,
    /// Pictures that the packets promise, if that is worth believing.
    pub(super) promised: Option<usize>,
}

/// What came of decoding every frame.
struct Counted {
    frames: usize,
    failed: bool,
    /// When each comes up, in seconds; left empty where nobody asks.
    times: Vec<f64>,
}

/// Hands the sampled frames to `out`, less those that an earlier attempt handed over.
pub(super) fn sequential(job: &Job<'_>, out: &mut Out<'_>, plan: Plan) -> Result<VideoSummary> {
    let demuxer = Demuxer::open(job.path)?;
    let mut threaded = plan.threaded;
    let mut kept = Kept::new(job, &demuxer, out, plan.promised);
    let mut counted = every_frame(job, threaded, &mut |at, frame| kept.see(at, frame))?;
    counted.times = std::mem::take(&mut kept.times);
    if counted.failed && threaded {
        // What a damaged stream yields must not depend on the threads.
        threaded = false;
        let mut again = Kept::new(job, &demuxer, out, None);
        counted = every_frame(job, threaded, &mut |at, frame| again.see(at, frame))?;
        counted.times = again.times;
    } else if plan.promised == Some(counted.frames) && kept.complete() {
        out.begin(&kept.wanted);
        for (at, time, image) in kept.frames {
            out.give(at, time, image)?;
        }
        let notes = damage(job, &counted);
        return Ok(job.summary(&demuxer, counted.frames, kept.wanted, notes));
    }
    drop(kept);
    pick(job, out, &demuxer, &counted, threaded)
}

fn damage(job: &Job<'_>, counted: &Counted) -> Vec<String> {
    if !counted.failed {
        return Vec::new();
    }
    let (shown, total) = (job.path.display(), counted.frames);
    vec![format!(
        "{shown} is damaged or cut off: {total} frames could be decoded"
    )]
}

/// Decodes once more, knowing how many frames there are.
fn pick(
    job: &Job<'_>,
    out: &mut Out<'_>,
    demuxer: &Demuxer,
    counted: &Counted,
    threaded: bool,
) -> Result<VideoSummary> {
    let total = counted.frames;
    if total == 0 {
        return Err(Error::Media(format!(
            "cannot use {}: none of its frames can be decoded; the file is damaged or cut off",
            job.path.display()
        )));
    }
    let time = |at: usize| counted.times.get(at).copied().unwrap_or(0.0);
    let frames = job.sample(total, demuxer.frame_rate, time, out)?;
    out.begin(&frames);
    let mut wanted = frames.iter().copied().skip(out.given()).peekable();
    let mut clock = Clock::new(demuxer);
    let mut converter = Converter::new(stream_turn(demuxer).0);
    every_frame(job, threaded, &mut |at, frame| {
        let time = clock.time(at, &frame);
        if wanted.next_if_eq(&at).is_some() {
            out.give(at, time, converter.convert(frame)?)?;
        }
        Ok(wanted.peek().is_some())
    })?;
    if wanted.peek().is_some() {
        return Err(contradiction(job, total));
    }
    let notes = damage(job, counted);
    Ok(job.summary(demuxer, total, frames, notes))
}

fn contradiction(job: &Job<'_>, total: usize) -> Error {
    Error::Media(format!(
        "cannot use {}: it is damaged, {total} frames could be decoded at first and fewer later; re-encode it",
        job.path.display()
    ))
}

/// Seconds from the first frame.
struct Clock {
    base: ffmpeg_next::Rational,
    rate: f64,
    first: Option<i64>,
}

impl Clock {
    fn new(demuxer: &Demuxer) -> Self {
        Self {
            base: demuxer.time_base,
            rate: demuxer.frame_rate,
            first: None,
        }
    }

    fn time(&mut self, at: usize, frame: &frame::Video) -> f64 {
        let ticks = frame.timestamp();
        let first = *self.first.get_or_insert(ticks.unwrap_or(0));
        match ticks {
            Some(ticks) => seconds(ticks.saturating_sub(first), self.base),
            None if self.rate > 0.0 => at as f64 / self.rate,
            None => 0.0,
        }
    }
}

/// Frames kept on the strength of a promised count.
struct Kept {
    wanted: Vec<usize>,
    frames: Vec<(usize, f64, Image)>,
    bytes: usize,
    keeps_times: bool,
    times: Vec<f64>,
    clock: Clock,
    converter: Converter,
}

impl Kept {
    fn new(job: &Job<'_>, demuxer: &Demuxer, out: &Out<'_>, promised: Option<usize>) -> Self {
        let sample = |total| job.sample(total, demuxer.frame_rate, |_| 0.0, out).ok();
        // Nothing is kept where the promise does not allow the sampling, frames were handed over already, or only
        // their times tell which are wanted.
        let wanted = promised
            .filter(|_| out.given() == 0 && job.takes_the_whole())
            .and_then(sample);
        Self {
            wanted: wanted.unwrap_or_default(),
            frames: Vec::new(),
            bytes: 0,
            keeps_times: !job.takes_the_whole(),
            times: Vec::new(),
            clock: Clock::new(demuxer),
            converter: Converter::new(stream_turn(demuxer).0),
        }
    }

    fn see(&mut self, at: usize, frame: frame::Video) -> Result<bool> {
        let time = self.clock.time(at, &frame);
        if self.keeps_times {
            // A damaged file's times may fall; frames stay in the order in which they came out.
            self.times
                .push(self.times.last().map_or(time, |last| time.max(*last)));
        }
        if self.wanted.get(self.frames.len()) == Some(&at) && self.bytes <= KEPT_BYTES {
            let image = self.converter.convert(frame)?;
            self.bytes += image.data.len();
            self.frames.push((at, time, image));
        }
        Ok(true)
    }

    fn complete(&self) -> bool {
        !self.wanted.is_empty() && self.frames.len() == self.wanted.len()
    }
}

/// Calls `visit` with every frame in order of presentation until it returns false.
fn every_frame(
    job: &Job<'_>,
    threaded: bool,
    visit: &mut dyn FnMut(usize, frame::Video) -> Result<bool>,
) -> Result<Counted> {
    let mut demuxer = Demuxer::open(job.path)?;
    let mut decoder = Decoder::open(&demuxer, job.limits, threaded)?;
    let mut counted = Counted {
        frames: 0,
        failed: false,
        times: Vec::new(),
    };
    let mut ahead = None;
    loop {
        job.control.check()?;
        let more = match ahead.take().unwrap_or_else(|| demuxer.next()) {
            Next::Packet(packet) => {
                if packet.is_corrupt() {
                    counted.failed = true;
                    ahead = Some(demuxer.next());
                }
                // What is left of a packet where a file was cut off is no picture.
                let whole = !matches!(ahead, Some(Next::End | Next::Broken));
                if whole {
                    decoder.send(&packet, true, job.path)?;
                }
                whole
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
        while let Some(frame) = decoder.receive(job.path)? {
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
