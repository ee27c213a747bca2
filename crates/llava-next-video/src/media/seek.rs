//! Frames by seeking: only the groups of pictures that hold sampled frames are decoded.
//!
//! Sampled frames fall into runs. For each run: seek to the packet from which decoding is exact (`index`), decode forward,
//! take frames by their presentation time, and stop at the last packet that is needed. H.264 pictures that no
//! other refers to are skipped unless sampled. Anything that does not go as the index promised
//! ends the attempt, and the caller decodes the file from its start.

use ffmpeg_next::Packet;
use ffmpeg_next::codec::Id;

use super::bitstream::{self, Start};
use super::convert::Converter;
use super::decode::Decoder;
use super::demux::{Demuxer, Next};
use super::index::Index;
use super::video::{Job, Out, VideoSummary, seconds, stream_turn};
use crate::Result;

/// Packets that are decoded past rather than seeked over.
const WORTH_DECODING: usize = 4;

/// Hands the sampled frames to `out`; `None` where a frame does not come out as the index promised, after some
/// were handed over perhaps.
pub(super) fn seeking(
    job: &Job<'_>,
    demuxer: &mut Demuxer,
    index: &Index,
    out: &mut Out<'_>,
) -> Result<Option<VideoSummary>> {
    let base = demuxer.time_base;
    let time = |frame| seconds(index.pts_of(frame) - index.pts_of(0), base);
    let frames = job.sample(index.len(), demuxer.frame_rate, time, out)?;
    out.begin(&frames);
    let mut decoder = Decoder::open(demuxer, job.limits, true)?;
    let mut converter = Converter::new(stream_turn(demuxer).0);
    let mut rest = frames.get(out.given()..).unwrap_or_default();
    while !rest.is_empty() {
        let (start, end, count) = run_of(index, rest);
        let (now, later) = rest.split_at(count);
        let mut run = Run {
            job,
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
    let mut summary = job.summary(demuxer, index.len(), frames, Vec::new());
    summary.seeked = true;
    Ok(Some(summary))
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
        if !self.may_start(&packet) {
            return Ok(false);
        }
        decoder.flush();
        let skips = bitstream::can_skip_unreferenced(self.demuxer.codec);
        let finish_at = self.finish_at();
        let mut at = self.start;
        loop {
            self.job.control.check()?;
            let entry = &self.index.entries[at];
            if packet.pts() != Some(entry.pts) || packet.is_corrupt() {
                return Ok(false);
            }
            let needed = !skips || self.is_wanted(entry.pts);
            decoder.send(&packet, needed, self.job.path)?;
            if at == finish_at {
                decoder.finish();
            }
            self.hand_over(decoder, converter, out)?;
            if decoder.failed {
                return Ok(false);
            }
            if self.wanted.is_empty() {
                return Ok(true);
            }
            if at == finish_at {
                return Ok(false);
            }
            at += 1;
            packet = match self.demuxer.next() {
                Next::Packet(packet) => packet,
                Next::End | Next::Broken => return Ok(false),
            };
        }
    }

    /// The packet after which the decoder is told that no more come, so that it lets go of what it holds back.
    fn finish_at(&self) -> usize {
        if self.demuxer.codec == Id::AV1 {
            // Some versions of dav1d keep frames for themselves then; feeding on brings them out.
            return self.index.entries.len() - 1;
        }
        self.end
    }

    /// Whether a start that only the container's table claims is one.
    fn may_start(&self, packet: &Packet) -> bool {
        if self.start == 0 || !self.index.claimed {
            return true;
        }
        let data = packet.data().unwrap_or_default();
        packet.is_key() && bitstream::start_of(self.demuxer.codec, data) >= Start::Open
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
        while let Some(frame) = decoder.receive(self.job.path)? {
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
    fn first_packet(&mut self) -> Result<Option<Packet>> {
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

    fn read_up_to_start(&mut self) -> Result<Option<Packet>> {
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
