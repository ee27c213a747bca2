//! What a packet's first bytes say: whether decoding may start there and whether a picture is shown.
//!
//! A container's key flag means different things. In H.264 it may mark an open group or the start of
//! an intra refresh, and in HEVC a clean random access picture whose leading pictures need what came
//! before. Only the few header bits that settle those questions are read; everything else is left
//! to FFmpeg. Data that cannot be understood is reported as such and never trusted.

use ffmpeg_next::codec::Id;

/// How far a packet that the container calls a key packet can be relied on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Start {
    /// Not a place to start.
    No,
    /// Pictures shown at or after it decode exactly once the group before it was decoded too (H.264 open
    /// group: reference lists may still name older pictures).
    AfterOneMore,
    /// Pictures shown at or after it decode exactly; those shown before may not.
    Open,
    /// Everything after it decodes exactly.
    Closed,
}

/// Whether this module knows `codec` well enough to seek in it.
pub(super) fn can_seek(codec: Id) -> bool {
    matches!(
        codec,
        Id::H264 | Id::HEVC | Id::VP8 | Id::VP9 | Id::AV1 | Id::MPEG2VIDEO | Id::MPEG4
    ) || is_intra_only(codec)
}

/// Whether each packet stands alone.
pub(super) fn is_intra_only(codec: Id) -> bool {
    matches!(
        codec,
        Id::MJPEG | Id::PRORES | Id::RAWVIDEO | Id::DNXHD | Id::PNG | Id::HUFFYUV | Id::FFVHUFF
    )
}

/// Whether H.264's `nal_ref_idc` may be used to skip pictures that no other picture needs.
pub(super) fn can_skip_unreferenced(codec: Id) -> bool {
    codec == Id::H264
}

/// Whether a packet yields a picture; VP8 and VP9 have packets that only update references.
pub(super) fn is_shown(codec: Id, data: &[u8]) -> bool {
    match codec {
        Id::VP8 => data.first().is_none_or(|byte| byte & 0x10 != 0),
        Id::VP9 => vp9_is_shown(data),
        _ => true,
    }
}

/// What kind of start the container's key packet `data` is.
pub(super) fn start_of(codec: Id, data: &[u8]) -> Start {
    match codec {
        Id::H264 => h264_start(data),
        Id::HEVC => hevc_start(data),
        // An I picture: B pictures shown before it may need the group before.
        Id::MPEG2VIDEO | Id::MPEG4 => Start::Open,
        _ => Start::Closed,
    }
}

fn h264_start(data: &[u8]) -> Start {
    let mut start = Start::No;
    let complete = for_each_nal(data, |nal| match nal[0] & 0x1f {
        5 => start = Start::Closed,
        6 if start == Start::No && recovery_frames(&nal[1..]) == Some(0) => {
            start = Start::AfterOneMore;
        }
        _ => {}
    });
    if complete { start } else { Start::No }
}

fn hevc_start(data: &[u8]) -> Start {
    let mut start = Start::No;
    let complete = for_each_nal(data, |nal| match (nal[0] >> 1) & 0x3f {
        19 | 20 => start = start.max(Start::Closed),
        16..=18 | 21 => start = start.max(Start::Open),
        _ => {}
    });
    if complete { start } else { Start::No }
}

/// Calls `visit` for every NAL unit, Annex B or length-prefixed; false where neither reading holds.
fn for_each_nal(data: &[u8], mut visit: impl FnMut(&[u8])) -> bool {
    if data.starts_with(&[0, 0, 1]) || data.starts_with(&[0, 0, 0, 1]) {
        // A length-prefixed packet can begin so too (a first NAL of 1 or 256..511 bytes); see below.
        if prefixed(data, 4).is_none() {
            for nal in annex_b(data) {
                visit(nal);
            }
            return true;
        }
    }
    for size in [4, 2, 1, 3] {
        if let Some(nals) = prefixed(data, size) {
            nals.into_iter().for_each(visit);
            return true;
        }
    }
    false
}

/// NAL units behind `size`-byte lengths, where those lengths add up to the packet.
fn prefixed(data: &[u8], size: usize) -> Option<Vec<&[u8]>> {
    let mut rest = data;
    let mut nals = Vec::new();
    while !rest.is_empty() {
        let (prefix, after) = rest.split_at_checked(size)?;
        let length = prefix
            .iter()
            .fold(0usize, |sum, byte| sum << 8 | usize::from(*byte));
        let (nal, next) = after.split_at_checked(length)?;
        // The forbidden bit is zero in every real NAL unit of both codecs.
        if nal.first().is_some_and(|byte| byte & 0x80 != 0) {
            return None;
        }
        if !nal.is_empty() {
            nals.push(nal);
        }
        rest = next;
    }
    (!nals.is_empty()).then_some(nals)
}

fn annex_b(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut starts: Vec<usize> = Vec::new();
    let mut at = 0;
    while at + 3 <= data.len() {
        if data[at..at + 3] == [0, 0, 1] {
            starts.push(at + 3);
            at += 3;
        } else {
            at += 1;
        }
    }
    let ends: Vec<usize> = starts
        .iter()
        .skip(1)
        .map(|s| s - 3)
        .chain([data.len()])
        .collect();
    starts
        .into_iter()
        .zip(ends)
        .map(|(start, end)| &data[start..end.max(start)])
        .filter(|nal| !nal.is_empty())
}

/// `recovery_frame_cnt` of the recovery point message in an SEI payload, where there is one.
fn recovery_frames(sei: &[u8]) -> Option<u32> {
    let mut bytes = sei.iter().copied();
    loop {
        let kind = sei_number(&mut bytes)?;
        let size = sei_number(&mut bytes)?;
        if kind == 6 {
            let payload: Vec<u8> = bytes.by_ref().take(size as usize).collect();
            return exp_golomb(&payload);
        }
        if size > 0 {
            bytes.nth(size as usize - 1)?;
        }
        // A trailing 0x80 ends the messages.
        if bytes.clone().next()? == 0x80 {
            return None;
        }
    }
}

fn sei_number(bytes: &mut impl Iterator<Item = u8>) -> Option<u32> {
    let mut sum = 0u32;
    loop {
        let byte = bytes.next()?;
        sum = sum.checked_add(u32::from(byte))?;
        if byte != 0xff {
            return Some(sum);
        }
    }
}

fn exp_golomb(bytes: &[u8]) -> Option<u32> {
    let bit = |at: usize| {
        bytes
            .get(at / 8)
            .map(|byte| u32::from(byte >> (7 - at % 8)) & 1)
    };
    let mut zeros = 0;
    while bit(zeros)? == 0 {
        zeros += 1;
        if zeros > 16 {
            return None;
        }
    }
    let mut value = 0;
    for at in zeros..=2 * zeros {
        value = value << 1 | bit(at)?;
    }
    Some(value - 1)
}

/// VP9: a superframe's last frame decides, and a lone frame's own header otherwise.
fn vp9_is_shown(data: &[u8]) -> bool {
    let Some(&last) = data.last() else {
        return true;
    };
    // A superframe index ends the packet; muxers put hidden frames only before a shown one.
    if last & 0xe0 == 0xc0 {
        return true;
    }
    let Some(&first) = data.first() else {
        return true;
    };
    let bit = |at: u32| (first >> (7 - at)) & 1;
    if first >> 6 != 2 {
        return true;
    }
    let profile = bit(2) | bit(3) << 1;
    let mut at = if profile == 3 { 5 } else { 4 };
    let show_existing = bit(at) == 1;
    at += 2;
    show_existing || bit(at) == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h264_starts() {
        let idr = [0, 0, 0, 2, 0x65, 0x88];
        assert_eq!(h264_start(&idr), Start::Closed);
        let annexb = [0, 0, 0, 1, 0x67, 1, 0, 0, 1, 0x65, 0x88];
        assert_eq!(h264_start(&annexb), Start::Closed);
        // recovery_frame_cnt ue(0) = '1'; then a plain slice.
        let open = [0, 0, 0, 5, 0x06, 6, 1, 0xc0, 0x80, 0, 0, 0, 2, 0x61, 0x88];
        assert_eq!(h264_start(&open), Start::AfterOneMore);
        // ue(24) = 0000 11001: an intra refresh that takes 24 frames.
        let refresh = [
            0, 0, 0, 6, 0x06, 6, 2, 0x0c, 0xc0, 0x80, 0, 0, 0, 2, 0x61, 0x88,
        ];
        assert_eq!(h264_start(&refresh), Start::No);
        let plain = [0, 0, 0, 2, 0x61, 0x88];
        assert_eq!(h264_start(&plain), Start::No);
        assert_eq!(h264_start(&[9, 9, 9]), Start::No);
        assert_eq!(h264_start(&[]), Start::No);
    }

    #[test]
    fn hevc_starts() {
        assert_eq!(hevc_start(&[0, 0, 0, 2, 19 << 1, 1]), Start::Closed);
        assert_eq!(hevc_start(&[0, 0, 0, 2, 21 << 1, 1]), Start::Open);
        assert_eq!(hevc_start(&[0, 0, 0, 2, 1 << 1, 1]), Start::No);
    }

    #[test]
    fn hidden_pictures() {
        assert!(is_shown(Id::VP8, &[0x10]));
        assert!(!is_shown(Id::VP8, &[0x00]));
        // frame marker 2, profile 0, no show-existing, inter, shown / hidden.
        assert!(is_shown(Id::VP9, &[0b1000_0110]));
        assert!(!is_shown(Id::VP9, &[0b1000_0100]));
        assert!(is_shown(Id::VP9, &[0b1000_1000]));
        assert!(is_shown(Id::VP9, &[]));
    }
}
