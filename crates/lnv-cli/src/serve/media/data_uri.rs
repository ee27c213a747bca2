//! Data URIs and bare base64.
//!
//! Decision: as browsers read them (RFC 2397; percent signs undone, spaces passed over, padding optional), and `video/jpeg`
//! with pictures between commas as vLLM has it. The media type decides nothing else. Length is
//! checked on the text, before anything is decoded.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};

use super::{MediaError, MediaErrorKind};

/// Pictures of one `video/jpeg`.
const MAX_FRAMES: usize = 4096;

/// What a data URI holds.
#[derive(Debug, PartialEq)]
pub(super) enum Data {
    /// One file.
    Bytes(Vec<u8>),
    /// The frames of a video, a picture file each.
    Frames(Vec<Vec<u8>>),
}

fn invalid(message: String) -> MediaError {
    MediaError::new(MediaErrorKind::Invalid, message)
}

/// Reads the data URI `text`, of at most `most` bytes.
pub(super) fn read(text: &str, most: u64) -> Result<Data, MediaError> {
    let missing = || {
        invalid("the data URI has no comma before its data: write data:<type>;base64,<data>".into())
    };
    let rest = text.get("data:".len()..).ok_or_else(missing)?;
    let (head, body) = rest.split_once(',').ok_or_else(missing)?;
    let mut parameters = head.split(';').map(str::trim);
    let kind = parameters.next().unwrap_or_default();
    let encoded = parameters.any(|parameter| parameter.eq_ignore_ascii_case("base64"));
    // Percent signs may triple the text.
    let longest = match (encoded, body.contains('%')) {
        (true, false) => most.saturating_mul(4).div_ceil(3).saturating_add(4),
        (true, true) => most.saturating_mul(4).saturating_add(12),
        (false, _) => most.saturating_mul(3),
    };
    if body.len() as u64 > longest {
        return Err(MediaError::new(
            MediaErrorKind::TooLarge,
            format!(
                "the data URI holds more than {most} bytes, the limit: make it smaller or shorter"
            ),
        ));
    }
    let body = percent_decoded(body);
    if !encoded {
        return Ok(Data::Bytes(body.into_owned()));
    }
    if !kind.eq_ignore_ascii_case("video/jpeg") || !body.contains(&b',') {
        return base64_bytes(&body, "the data URI").map(Data::Bytes);
    }
    let pieces: Vec<&[u8]> = body.split(|byte| *byte == b',').collect();
    if pieces.len() > MAX_FRAMES {
        return Err(MediaError::new(
            MediaErrorKind::TooLarge,
            format!("the data URI holds more than {MAX_FRAMES} frames, the limit: send fewer"),
        ));
    }
    let frames = pieces
        .into_iter()
        .map(|piece| base64_bytes(piece, "the data URI"))
        .collect::<Result<_, _>>()?;
    Ok(Data::Frames(frames))
}

/// Reads base64 that stands alone; `name` is for errors.
pub(super) fn base64(text: &str, name: &str) -> Result<Vec<u8>, MediaError> {
    base64_bytes(text.as_bytes(), name)
}

fn base64_bytes(text: &[u8], name: &str) -> Result<Vec<u8>, MediaError> {
    let config = GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true);
    let engine = GeneralPurpose::new(&base64::alphabet::STANDARD, config);
    let plain = |byte: u8| match byte {
        // The alphabet for addresses.
        b'-' => b'+',
        b'_' => b'/',
        other => other,
    };
    let kept: Vec<u8> = text
        .iter()
        .copied()
        .filter(|byte| !byte.is_ascii_whitespace())
        .map(plain)
        .collect();
    engine.decode(kept).map_err(|_| {
        invalid(format!(
            "{name} does not hold valid base64: encode the file again"
        ))
    })
}

fn percent_decoded(text: &str) -> Cow<'_, [u8]> {
    if !text.contains('%') {
        return Cow::Borrowed(text.as_bytes());
    }
    let hex = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = match (first, after) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)),
            _ => None,
        };
        match code {
            Some((high, low)) => {
                out.push(high << 4 | low);
                rest = &after[2..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_data_uris() {
        let bytes = |text: &str| read(text, 100).unwrap();
        for text in [
            "data:image/png;base64,aGkh",
            "data:;base64,aGkh",
            "data:text/plain;charset=x;BASE64,aG kh\n",
            "data:video/mp4;base64,%61Gkh",
            "data:,hi!",
            "data:,h%69!",
        ] {
            assert_eq!(bytes(text), Data::Bytes(b"hi!".into()), "{text}");
        }
        assert_eq!(bytes("data:;base64,aGk"), bytes("data:;base64,aGk="));
        assert_eq!(bytes("data:;base64,-_8"), Data::Bytes(vec![0xfb, 0xff]));
        assert_eq!(bytes("data:,%zz%4"), Data::Bytes(b"%zz%4".into()));
        assert_eq!(
            bytes("data:video/jpeg;base64,aGkh,aGk="),
            Data::Frames(vec![b"hi!".into(), b"hi".into()])
        );
    }

    #[test]
    fn bad_and_huge_ones() {
        let kind = |text: &str, most| read(text, most).unwrap_err().kind;
        for text in [
            "data:",
            "data:image/png",
            "data:;base64,a",
            "data:;base64,a!b?",
            "data:;base64,aa,aa",
        ] {
            assert_eq!(kind(text, 100), MediaErrorKind::Invalid, "{text}");
        }
        for text in [
            format!("data:;base64,{}", "A".repeat(200)),
            format!("data:,{}", "A".repeat(400)),
            format!("data:;base64,{}", "%41".repeat(200)),
            format!("data:video/jpeg;base64,{}", ",".repeat(5000)),
        ] {
            assert_eq!(kind(&text, 100), MediaErrorKind::TooLarge, "{text}");
        }
        let many = format!("data:video/jpeg;base64,{}", ",".repeat(5000));
        assert_eq!(kind(&many, 100_000), MediaErrorKind::TooLarge);
    }
}
