//! What FFmpeg's safe API does not hand out of an MP4 header: the table of samples and the edit list.
//!
//! The table tells the order of presentation and the key pictures without reading the media, gigabytes in a
//! file of two hours; a few boxes of `moov` are read instead. The edit list tells which pictures are cut
//! off: FFmpeg decodes and drops those, and the packet flag that says so is not part of the safe API. One
//! cut is understood. Anything more, anything malformed, fragments, several video tracks or
//! descriptions, or a file that is cut off yield no table, and the caller reads the packets instead.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// What the edit lists of a file's video tracks ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edits {
    /// Everything is shown.
    None,
    /// One stretch is shown.
    One {
        /// Where it begins in the track, in ticks.
        start: i64,
        /// Its length in ticks.
        length: i64,
    },
    /// Several stretches, or a list that cannot be understood.
    Many,
}

/// One sample of the video track, in ticks of the track and before any edit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sample {
    /// Decoding time.
    pub(super) dts: i64,
    /// Presentation time.
    pub(super) pts: i64,
    /// How long it is shown.
    pub(super) duration: i64,
    /// Whether the table calls it a key picture.
    pub(super) key: bool,
}

/// The samples of the file's only video track, in the order of decoding.
pub(super) fn samples(path: &Path, container: &str, most: u64) -> Option<Vec<Sample>> {
    if !is_mp4(container) {
        return None;
    }
    let mut file = File::open(path).ok()?;
    let end = file.metadata().ok()?.len();
    let top = boxes(&mut file, 0, end).ok()?;
    // The last box of a file that was cut off is shorter than it says.
    let whole = top.last().is_some_and(|last| last.complete);
    let fragments = top.iter().any(|found| &found.kind == b"moof");
    let moov = top.iter().find(|found| &found.kind == b"moov")?.span;
    if !whole || fragments {
        return None;
    }
    only_video_table(&mut file, moov, most).ok()
}

/// Whether the file ends before its boxes do: a download that broke off. Its table still promises all.
pub(super) fn is_cut_off(path: &Path, container: &str) -> bool {
    let read = || {
        let mut file = File::open(path).ok()?;
        let end = file.metadata().ok()?.len();
        boxes(&mut file, 0, end).ok()
    };
    is_mp4(container) && read().is_some_and(|all| all.last().is_some_and(|last| !last.complete))
}

fn is_mp4(container: &str) -> bool {
    container.split(',').any(|name| name == "mp4")
}

/// Reads the edit lists of `path`, where `container` is of the MP4 family.
pub(super) fn edits(path: &Path, container: &str) -> Edits {
    if !is_mp4(container) {
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

struct Box4 {
    kind: [u8; 4],
    span: Span,
    complete: bool,
}

const MAX_BOXES: usize = 100_000;

/// A box that is read whole: `ctts` of a million samples takes 8 MiB.
const MAX_CONTENT: u64 = 256 << 20;

/// The boxes between `start` and `end`, by type.
fn boxes(file: &mut File, start: u64, end: u64) -> Parsed<Vec<Box4>> {
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
        found.push(Box4 {
            kind,
            span: (content, next.min(end)),
            complete: next <= end,
        });
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
    let wanted = all.into_iter().find(|found| &found.kind == kind);
    Ok(wanted.map(|found| found.span))
}

fn content(file: &mut File, span: Span) -> Parsed<Vec<u8>> {
    let length = span.1.saturating_sub(span.0);
    if length > MAX_CONTENT {
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
        .find(|found| &found.kind == b"mvhd")
        .ok_or(Malformed)?;
    let movie_scale = time_scale(file, mvhd.span)?;
    let mut edits = Edits::None;
    for trak in all.iter().filter(|found| &found.kind == b"trak") {
        match (track(file, trak.span, movie_scale)?, edits) {
            (Edits::None, _) => {}
            // With two video tracks it is not plain here which one is read.
            (found, Edits::None) => edits = found,
            _ => return Ok(Edits::Many),
        }
    }
    Ok(edits)
}

/// `mdia` of a track, where it is a video track.
fn video_media(file: &mut File, trak: Span) -> Parsed<Option<Span>> {
    let mdia = find(file, trak.0, trak.1, b"mdia")?.ok_or(Malformed)?;
    let Some(hdlr) = find(file, mdia.0, mdia.1, b"hdlr")? else {
        return Ok(None);
    };
    let video = content(file, hdlr)?.get(8..12) == Some(b"vide");
    Ok(video.then_some(mdia))
}

fn only_video_table(file: &mut File, moov: Span, most: u64) -> Parsed<Vec<Sample>> {
    let mut video = None;
    for found in boxes(file, moov.0, moov.1)? {
        match &found.kind {
            b"mvex" => return Err(Malformed),
            b"trak" => {
                let mdia = video_media(file, found.span)?;
                if mdia.is_some() && video.is_some() {
                    return Err(Malformed);
                }
                video = video.or(mdia);
            }
            _ => {}
        }
    }
    let mdia = video.ok_or(Malformed)?;
    let minf = find(file, mdia.0, mdia.1, b"minf")?.ok_or(Malformed)?;
    let stbl = find(file, minf.0, minf.1, b"stbl")?.ok_or(Malformed)?;
    let mut part = |kind: &[u8; 4]| -> Parsed<Option<Vec<u8>>> {
        match find(file, stbl.0, stbl.1, kind)? {
            Some(span) => content(file, span).map(Some),
            None => Ok(None),
        }
    };
    let descriptions = part(b"stsd")?.ok_or(Malformed)?;
    let sizes = match part(b"stsz")? {
        Some(sizes) => sizes,
        None => part(b"stz2")?.ok_or(Malformed)?,
    };
    let count = number(&sizes, 8, false)?;
    if number(&descriptions, 4, false)? != 1 || count == 0 || count > most {
        return Err(Malformed);
    }
    let times = part(b"stts")?.ok_or(Malformed)?;
    assemble(
        count,
        &times,
        part(b"ctts")?.as_deref(),
        part(b"stss")?.as_deref(),
    )
}

/// Samples from the tables of decoding times, offsets to presentation, and key pictures.
fn assemble(
    count: u64,
    stts: &[u8],
    ctts: Option<&[u8]>,
    stss: Option<&[u8]>,
) -> Parsed<Vec<Sample>> {
    let mut samples = Vec::new();
    let mut dts = 0i64;
    for entry in 0..number(stts, 4, false)? as usize {
        let run = number(stts, 8 + entry * 8, false)?;
        let duration = number(stts, 12 + entry * 8, false)? as i64;
        // FFmpeg has rules of its own for durations of zero and above 31 bits.
        if duration == 0 || duration > i64::from(i32::MAX) || samples.len() as u64 + run > count {
            return Err(Malformed);
        }
        for _ in 0..run {
            samples.push(Sample {
                dts,
                pts: dts,
                duration,
                key: stss.is_none(),
            });
            dts += duration;
        }
    }
    if samples.len() as u64 != count {
        return Err(Malformed);
    }
    if let Some(ctts) = ctts {
        let mut at = 0usize;
        for entry in 0..number(ctts, 4, false)? as usize {
            let run = number(ctts, 8 + entry * 8, false)? as usize;
            let offset = number(ctts, 12 + entry * 8, false)? as u32 as i32;
            let end = at.checked_add(run).ok_or(Malformed)?;
            for sample in samples.get_mut(at..end).ok_or(Malformed)? {
                sample.pts += i64::from(offset);
            }
            at = end;
        }
        if at as u64 != count {
            return Err(Malformed);
        }
    }
    if let Some(stss) = stss {
        for entry in 0..number(stss, 4, false)? as usize {
            let at = (number(stss, 8 + entry * 4, false)? as usize).checked_sub(1);
            let sample = at.and_then(|at| samples.get_mut(at)).ok_or(Malformed)?;
            sample.key = true;
        }
    }
    Ok(samples)
}

fn track(file: &mut File, trak: Span, movie_scale: u64) -> Parsed<Edits> {
    let Some(mdia) = video_media(file, trak)? else {
        return Ok(Edits::None);
    };
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
        edits = Edits::One {
            start: i64::try_from(start).map_err(|_| Malformed)?,
            length: if duration == 0 { i64::MAX } else { ticks },
        };
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
        assert_eq!(
            parsed(&[(2300, 3840, one)]),
            Some(Edits::One {
                start: 3840,
                length: 29440
            })
        );
        let delayed = [(80, u32::MAX, one), (2300, 3840, one)];
        assert_eq!(
            parsed(&delayed),
            Some(Edits::One {
                start: 3840,
                length: 29440
            })
        );
        assert_eq!(parsed(&[(10, 0, one), (10, 500, one)]), Some(Edits::Many));
        assert_eq!(parsed(&[(10, 0, one / 2)]), Some(Edits::Many));
        assert_eq!(
            parsed(&[(0, 0, one)]),
            Some(Edits::One {
                start: 0,
                length: i64::MAX
            })
        );
        assert!(list(&[0, 0, 0, 0, 0, 0, 0, 9, 1], 1, 1).is_err());
        assert!(list(&elst(&[(u32::MAX, 0, one)]), u64::MAX, 1).is_err());
    }

    #[test]
    fn tables_are_assembled_or_refused() {
        let table = |numbers: &[u32]| -> Vec<u8> {
            [0].iter()
                .chain(numbers)
                .flat_map(|value| value.to_be_bytes())
                .collect()
        };
        let stts = table(&[2, 2, 10, 1, 30]);
        let ctts = table(&[2, 1, 10, 2, 0u32.wrapping_sub(5)]);
        let stss = table(&[1, 1]);
        let samples = assemble(3, &stts, Some(&ctts), Some(&stss)).ok().unwrap();
        let seen: Vec<(i64, i64, i64, bool)> = samples
            .iter()
            .map(|sample| (sample.dts, sample.pts, sample.duration, sample.key))
            .collect();
        assert_eq!(
            seen,
            [(0, 10, 10, true), (10, 5, 10, false), (20, 15, 30, false)]
        );
        assert!(assemble(4, &stts, None, None).is_err());
        assert!(assemble(2, &stts, None, None).is_err());
        assert!(assemble(3, &stts, Some(&table(&[1, 9, 0])), None).is_err());
        assert!(assemble(3, &stts, None, Some(&table(&[1, 0]))).is_err());
        assert!(assemble(3, &stts, None, Some(&table(&[1, 4]))).is_err());
        assert!(assemble(3, &table(&[9, 1]), None, None).is_err());
        assert!(assemble(u64::MAX, &table(&[1, u32::MAX, 0]), None, None).is_err());
    }

    #[test]
    fn other_containers_have_none_and_garbage_is_not_trusted() {
        assert_eq!(edits(Path::new("nowhere"), "matroska,webm"), Edits::None);
        assert_eq!(edits(Path::new("nowhere"), "mov,mp4"), Edits::Many);
    }
}
