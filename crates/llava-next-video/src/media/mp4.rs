//! The one thing that FFmpeg does not hand out of an MP4 header: which pictures an edit list cuts off.
//!
//! FFmpeg decodes pictures that an edit list hides and drops them afterwards; the packet flag that says so is not
//! part of the safe API. So the edit lists (`moov/trak/edts/elst`) are read here, a few hundred bytes found by
//! stepping over boxes. One cut is understood; anything more, and anything malformed, is reported as
//! such, and the caller decodes the file from its start.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// What the edit lists of a file's video tracks ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edits {
    /// Everything is shown.
    None,
    /// One stretch is shown: so many ticks of the track, from its first shown picture on.
    One(i64),
    /// Several stretches, or a list that cannot be understood.
    Many,
}

/// Reads the edit lists of `path`, where `container` is of the MP4 family.
pub(super) fn edits(path: &Path, container: &str) -> Edits {
    if !container.split(',').any(|name| name == "mp4") {
        return Edits::None;
    }
    let read = || {
        let mut file = File::open(path).ok()?;
        let end = file.metadata().ok()?.len();
        let moov = find(&mut file, 0, end, b"moov").ok()??;
        movie(&mut file, moov).ok()
    };
    read().unwrap_or(Edits::Many)
}

/// Why reading stopped: the file system or a malformed box.
struct Malformed;

impl From<std::io::Error> for Malformed {
    fn from(_: std::io::Error) -> Self {
        Malformed
    }
}

type Parsed<T> = std::result::Result<T, Malformed>;

/// Where a box's content lies.
type Span = (u64, u64);

const MAX_BOXES: usize = 100_000;

/// The boxes between `start` and `end`, by type.
fn boxes(file: &mut File, start: u64, end: u64) -> Parsed<Vec<([u8; 4], Span)>> {
    let mut found = Vec::new();
    let mut at = start;
    while at.checked_add(8).is_some_and(|header| header <= end) && found.len() < MAX_BOXES {
        let mut header = [0u8; 8];
        read_at(file, at, &mut header)?;
        let [a, b, c, d, kind @ ..] = header;
        let (size, content) = match u64::from(u32::from_be_bytes([a, b, c, d])) {
            0 => (end - at, at + 8),
            1 => {
                let mut long = [0u8; 8];
                read_at(file, at + 8, &mut long)?;
                (u64::from_be_bytes(long), at + 16)
            }
            size => (size, at + 8),
        };
        let next = at.checked_add(size).ok_or(Malformed)?;
        if next < content {
            return Err(Malformed);
        }
        // A file that was cut off ends within its last box.
        found.push((kind, (content, next.min(end))));
        at = next;
    }
    Ok(found)
}

fn read_at(file: &mut File, at: u64, into: &mut [u8]) -> Parsed<()> {
    file.seek(SeekFrom::Start(at))?;
    Ok(file.read_exact(into)?)
}

fn find(file: &mut File, start: u64, end: u64, kind: &[u8; 4]) -> Parsed<Option<Span>> {
    let all = boxes(file, start, end)?;
    Ok(all
        .into_iter()
        .find(|(found, _)| found == kind)
        .map(|(_, span)| span))
}

fn content(file: &mut File, span: Span) -> Parsed<Vec<u8>> {
    let length = span.1.saturating_sub(span.0);
    if length > 1 << 20 {
        return Err(Malformed);
    }
    let mut bytes = vec![0; length as usize];
    read_at(file, span.0, &mut bytes)?;
    Ok(bytes)
}

fn number(bytes: &[u8], at: usize, wide: bool) -> Parsed<u64> {
    let size = if wide { 8 } else { 4 };
    let slice = bytes.get(at..at + size).ok_or(Malformed)?;
    Ok(slice
        .iter()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

/// `mvhd` and `mdhd` have their time scale at the same place.
fn time_scale(file: &mut File, span: Span) -> Parsed<u64> {
    let bytes = content(file, span)?;
    let wide = bytes.first() == Some(&1);
    number(&bytes, if wide { 20 } else { 12 }, false)
}

fn movie(file: &mut File, moov: Span) -> Parsed<Edits> {
    let all = boxes(file, moov.0, moov.1)?;
    let mvhd = all
        .iter()
        .find(|(kind, _)| kind == b"mvhd")
        .ok_or(Malformed)?;
    let movie_scale = time_scale(file, mvhd.1)?;
    let mut edits = Edits::None;
    for (_, trak) in all.iter().filter(|(kind, _)| kind == b"trak") {
        match (track(file, *trak, movie_scale)?, edits) {
            (Edits::None, _) => {}
            // With two video tracks it is not plain here which one is read.
            (found, Edits::None) => edits = found,
            _ => return Ok(Edits::Many),
        }
    }
    Ok(edits)
}

fn track(file: &mut File, trak: Span, movie_scale: u64) -> Parsed<Edits> {
    let mdia = find(file, trak.0, trak.1, b"mdia")?.ok_or(Malformed)?;
    let Some(hdlr) = find(file, mdia.0, mdia.1, b"hdlr")? else {
        return Ok(Edits::None);
    };
    if content(file, hdlr)?.get(8..12) != Some(b"vide") {
        return Ok(Edits::None);
    }
    let Some(edts) = find(file, trak.0, trak.1, b"edts")? else {
        return Ok(Edits::None);
    };
    let Some(elst) = find(file, edts.0, edts.1, b"elst")? else {
        return Ok(Edits::None);
    };
    let mdhd = find(file, mdia.0, mdia.1, b"mdhd")?.ok_or(Malformed)?;
    let scale = time_scale(file, mdhd)?;
    list(&content(file, elst)?, scale, movie_scale)
}

fn list(elst: &[u8], scale: u64, movie_scale: u64) -> Parsed<Edits> {
    let wide = elst.first() == Some(&1);
    let (step, half) = if wide { (20, 8) } else { (12, 4) };
    let count = number(elst, 4, false)? as usize;
    let mut edits = Edits::None;
    for entry in 0..count.min(elst.len()) {
        let at = 8 + entry * step;
        let duration = number(elst, at, wide)?;
        let start = number(elst, at + half, wide)?;
        let empty = if wide { u64::MAX } else { u64::from(u32::MAX) };
        if start == empty {
            continue;
        }
        if edits != Edits::None
            || movie_scale == 0
            || number(elst, at + 2 * half, false)? != 1 << 16
        {
            return Ok(Edits::Many);
        }
        // As FFmpeg: to the nearest tick.
        let ticks = u128::from(duration) * u128::from(scale) + u128::from(movie_scale / 2);
        let ticks = i64::try_from(ticks / u128::from(movie_scale)).map_err(|_| Malformed)?;
        // A duration of zero lasts to the end, as in fragmented files.
        edits = Edits::One(if duration == 0 { i64::MAX } else { ticks });
    }
    Ok(edits)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn elst(entries: &[(u32, u32, u32)]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 0, 0];
        bytes.extend((entries.len() as u32).to_be_bytes());
        for (duration, start, rate) in entries {
            for value in [duration, start, rate] {
                bytes.extend(value.to_be_bytes());
            }
        }
        bytes
    }

    fn parsed(entries: &[(u32, u32, u32)]) -> Option<Edits> {
        list(&elst(entries), 12800, 1000).ok()
    }

    #[test]
    fn edit_lists() {
        let one = 1 << 16;
        assert_eq!(parsed(&[]), Some(Edits::None));
        assert_eq!(parsed(&[(2300, 3840, one)]), Some(Edits::One(29440)));
        let delayed = [(80, u32::MAX, one), (2300, 3840, one)];
        assert_eq!(parsed(&delayed), Some(Edits::One(29440)));
        assert_eq!(parsed(&[(10, 0, one), (10, 500, one)]), Some(Edits::Many));
        assert_eq!(parsed(&[(10, 0, one / 2)]), Some(Edits::Many));
        assert_eq!(parsed(&[(0, 0, one)]), Some(Edits::One(i64::MAX)));
        assert!(list(&[0, 0, 0, 0, 0, 0, 0, 9, 1], 1, 1).is_err());
        assert!(list(&elst(&[(u32::MAX, 0, one)]), u64::MAX, 1).is_err());
    }

    #[test]
    fn other_containers_have_none_and_garbage_is_not_trusted() {
        assert_eq!(edits(Path::new("nowhere"), "matroska,webm"), Edits::None);
        assert_eq!(edits(Path::new("nowhere"), "mov,mp4"), Edits::Many);
    }
}
