//! The order in which a stream's pictures are shown and the places where decoding may start, learned
//! from packet headers without decoding.
//!
//! Frame `i` is the `i`-th picture in order of presentation. A frame is reached by decoding forward from
//! the latest packet after which nothing older is needed; where the packets do not say enough to know
//! that (no or repeated timestamps, unknown codecs, a beginning that is not clean, edit lists that cut), the
//! index says so and the caller decodes the file from its start instead.

use ffmpeg_next::codec::Id;

use super::MediaLimits;
use super::bitstream::{self, Start};
use super::decode::Control;
use super::demux::{Demuxer, Next};
use super::mp4::{self, Edits};
use crate::{Error, Result};

/// One packet, in the order of the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// Presentation time in ticks.
    pub(super) pts: i64,
    /// Decoding time in ticks; Matroska does not keep it.
    pub(super) dts: Option<i64>,
    /// Whether decoding may start here.
    pub(super) start: Start,
    /// How long its picture is shown, in ticks; 0 where unknown.
    pub(super) duration: i64,
    /// Whether it yields a picture.
    pub(super) shown: bool,
}

/// All packets of a video stream, in both orders.
#[derive(Debug)]
pub(super) struct Index {
    /// Packets in the order of decoding.
    pub(super) entries: Vec<Entry>,
    /// For each shown picture, in order of presentation, its packet.
    pub(super) order: Vec<u32>,
    starts: Vec<u32>,
}

/// What reading all packets told.
#[derive(Debug)]
pub(super) enum Scan {
    /// Frames can be reached by seeking.
    Seekable(Index),
    /// The file is sound as far as one can see, but only decoding it tells its frames.
    Sequential {
        /// Pictures that the packets promise.
        promised: usize,
    },
    /// The file breaks off or is damaged.
    Damaged {
        /// Pictures that the packets promise.
        promised: usize,
    },
}

/// Reads every packet of the video stream.
pub(super) fn scan(
    demuxer: &mut Demuxer,
    limits: &MediaLimits,
    control: &Control<'_>,
) -> Result<Scan> {
    let codec = demuxer.codec;
    let mut entries: Vec<Entry> = Vec::new();
    let (mut complete, mut broken) = (bitstream::can_seek(codec), false);
    let mut promised = 0;
    let mut read = 0u64;
    loop {
        let packet = match demuxer.next() {
            Next::Packet(packet) => packet,
            Next::End => break,
            Next::Broken => {
                broken = true;
                break;
            }
        };
        read += 1;
        if read > limits.packets {
            return Err(too_many_packets(demuxer, limits));
        }
        if read.is_multiple_of(64) {
            control.check()?;
        }
        broken |= packet.is_corrupt();
        let data = packet.data().unwrap_or_default();
        let shown = bitstream::is_shown(codec, data);
        promised += usize::from(shown);
        let Some(pts) = packet.pts() else {
            complete = false;
            continue;
        };
        let start = if packet.is_key() {
            bitstream::start_of(codec, data)
        } else {
            Start::No
        };
        if complete {
            entries.push(Entry {
                pts,
                dts: packet.dts(),
                duration: packet.duration(),
                start,
                shown,
            });
        }
    }
    if broken {
        return Ok(Scan::Damaged { promised });
    }
    if complete
        && apply_edits(&mut entries, demuxer)
        && let Some(index) = Index::new(entries, codec)
    {
        return Ok(Scan::Seekable(index));
    }
    Ok(Scan::Sequential { promised })
}

/// Marks the pictures that an edit list hides; false where that is not beyond doubt.
fn apply_edits(entries: &mut [Entry], demuxer: &Demuxer) -> bool {
    let length = match mp4::edits(demuxer.path(), &demuxer.container()) {
        Edits::None => return true,
        Edits::Many => return false,
        Edits::One(length) => length,
    };
    let Some(start) = demuxer.start_time else {
        return false;
    };
    let end = start.saturating_add(length);
    for entry in entries {
        entry.shown &= entry.pts >= start && entry.pts < end;
        // The stretch may begin a little before its first picture, so a picture across its end is in doubt.
        if entry.shown && entry.pts > end.saturating_sub(entry.duration.max(1)) {
            return false;
        }
    }
    true
}

fn too_many_packets(demuxer: &Demuxer, limits: &MediaLimits) -> Error {
    Error::Media(format!(
        "cannot use {}: it has more than {} packets, the limit; cut it into shorter files",
        demuxer.path().display(),
        limits.packets
    ))
}

impl Index {
    /// Sorts `entries` by presentation; `None` where they do not tell the order beyond doubt.
    pub(super) fn new(entries: Vec<Entry>, codec: Id) -> Option<Self> {
        let shown = |at: &u32| entries[*at as usize].shown;
        let mut order: Vec<u32> = (0..u32::try_from(entries.len()).ok()?)
            .filter(shown)
            .collect();
        order.sort_by_key(|at| entries[*at as usize].pts);
        let pts = |at: u32| entries[at as usize].pts;
        let distinct = order.windows(2).all(|pair| pts(pair[0]) < pts(pair[1]));
        let forward = entries.windows(2).all(|pair| pair[0].dts <= pair[1].dts);
        if order.is_empty() || !distinct || !forward || !clean_beginning(&entries, &order, codec) {
            return None;
        }
        let starts = (0..entries.len() as u32)
            .filter(|at| entries[*at as usize].start != Start::No)
            .collect();
        Some(Self {
            entries,
            order,
            starts,
        })
    }

    /// Frames that a full decode yields.
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// The packet of frame `frame`.
    pub(super) fn packet_of(&self, frame: usize) -> usize {
        self.order[frame] as usize
    }

    /// Presentation time of frame `frame` in ticks.
    pub(super) fn pts_of(&self, frame: usize) -> i64 {
        self.entries[self.packet_of(frame)].pts
    }

    /// The packet shown at `pts`.
    pub(super) fn packet_at(&self, pts: i64) -> Option<usize> {
        let found = self
            .order
            .binary_search_by_key(&pts, |at| self.entries[*at as usize].pts);
        found.ok().map(|frame| self.packet_of(frame))
    }

    /// The latest packet from which decoding gives frame `frame` as decoding from packet 0 would.
    pub(super) fn start_for(&self, frame: usize) -> usize {
        let packet = self.packet_of(frame);
        let pts = self.entries[packet].pts;
        let upto = self.starts.partition_point(|at| *at as usize <= packet);
        let mut before = self.starts[..upto].iter().rev().map(|at| *at as usize);
        // A picture shown before the key picture that it follows in the file may need the group before.
        let found = before.find(|at| {
            let entry = &self.entries[*at];
            entry.start == Start::Closed || entry.pts <= pts
        });
        match found {
            Some(at) if self.entries[at].start == Start::AfterOneMore => before.next().unwrap_or(0),
            Some(at) => at,
            None => 0,
        }
    }
}

/// Whether all packets from the first on yield their pictures: decoding begins at a key picture and
/// nothing shown before it follows.
fn clean_beginning(entries: &[Entry], order: &[u32], codec: Id) -> bool {
    let (Some(first), Some(earliest)) = (entries.first(), order.first()) else {
        return false;
    };
    match first.start {
        Start::No => false,
        // Leading pictures of an IDR picture decode; FFmpeg shows them.
        Start::Closed => codec == Id::HEVC || *earliest == 0 || !first.shown,
        Start::Open | Start::AfterOneMore => *earliest == 0,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn entry(pts: i64, dts: i64, start: Start) -> Entry {
        Entry {
            pts,
            dts: Some(dts),
            duration: 1,
            start,
            shown: true,
        }
    }

    #[test]
    fn leading_pictures_start_one_group_earlier() {
        // I0 P2 B1 | I5 B3 B4 P6
        let entries = vec![
            entry(0, 0, Start::Closed),
            entry(2, 1, Start::No),
            entry(1, 2, Start::No),
            entry(5, 3, Start::Open),
            entry(3, 4, Start::No),
            entry(4, 5, Start::No),
            entry(6, 6, Start::No),
        ];
        let index = Index::new(entries, Id::HEVC).unwrap();
        let starts: Vec<usize> = (0..7).map(|frame| index.start_for(frame)).collect();
        assert_eq!(starts, [0, 0, 0, 0, 0, 3, 3]);
        assert_eq!(index.packet_at(4), Some(5));
        assert_eq!(index.packet_at(9), None);
    }

    #[test]
    fn h264_open_groups_start_one_more_earlier() {
        let entries = (0..6).map(|i| entry(i, i, Start::AfterOneMore)).collect();
        let index = Index::new(entries, Id::H264).unwrap();
        let starts: Vec<usize> = (0..6).map(|frame| index.start_for(frame)).collect();
        assert_eq!(starts, [0, 0, 1, 2, 3, 4]);
    }

    #[test]
    fn doubtful_orders_are_refused() {
        let repeated = vec![entry(0, 0, Start::Closed), entry(0, 1, Start::No)];
        assert!(Index::new(repeated, Id::H264).is_none());
        let backward = vec![entry(0, 5, Start::Closed), entry(1, 1, Start::No)];
        assert!(Index::new(backward, Id::H264).is_none());
        let no_key = vec![entry(0, 0, Start::No)];
        assert!(Index::new(no_key, Id::H264).is_none());
        let leading = vec![entry(1, 0, Start::Open), entry(0, 1, Start::No)];
        assert!(Index::new(leading, Id::HEVC).is_none());
        assert!(Index::new(Vec::new(), Id::H264).is_none());
    }
}
