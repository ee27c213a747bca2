//! JPEG as Pillow reads it: libjpeg-turbo's arithmetic, Pillow's own CMYK to RGB.
//!
//! The pure-Rust decoders differ from libjpeg-turbo by up to 3 levels (docs/decisions/0004, row 29), so the C
//! library runs, in the `mozjpeg` crate's build. It reports errors by unwinding, without a panic message; that
//! is caught here and becomes an error.

use std::cell::Cell;
use std::io::{BufRead, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};

use mozjpeg::{ColorSpace, Decompress, Marker};

use super::convert::Turn;
use super::{Image, ImageSize, MediaLimits};
use crate::{Error, Result};

/// Decodes `bytes`, upright; `name` is for errors.
pub(super) fn decode(bytes: &[u8], name: &str, limits: &MediaLimits) -> Result<Image> {
    let damaged = |cause: &str| {
        Error::Media(format!(
            "cannot read {name}: the JPEG file is damaged or cut off ({cause})"
        ))
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| pixels(bytes, name, limits)));
    let (image, turn) = match outcome {
        Ok(Ok(done)) => done,
        Ok(Err(Failure::Told(error))) => return Err(error),
        Ok(Err(Failure::Library(cause))) => return Err(damaged(&cause)),
        Err(payload) => {
            let cause = payload.downcast_ref::<String>().map(String::as_str);
            let cause = cause.unwrap_or("the decoder gave up");
            return Err(damaged(cause.trim_start_matches("libjpeg fatal error: ")));
        }
    };
    Ok(turn.apply(image))
}

enum Failure {
    Told(Error),
    Library(String),
}

impl From<std::io::Error> for Failure {
    fn from(cause: std::io::Error) -> Self {
        Failure::Library(cause.to_string())
    }
}

fn pixels(bytes: &[u8], name: &str, limits: &MediaLimits) -> Result<(Image, Turn), Failure> {
    let ran_out = Cell::new(false);
    let source = Source {
        rest: bytes,
        ran_out: &ran_out,
    };
    let jpeg = Decompress::with_markers(&[Marker::APP(1)]).from_reader(source)?;
    let size = ImageSize::new(jpeg.height(), jpeg.width());
    super::still::check_size(size, name, limits).map_err(Failure::Told)?;
    let turn = orientation(jpeg.markers().map(|marker| marker.data));
    let channels = jpeg.components().len();
    let wanted = match channels {
        1 => ColorSpace::JCS_GRAYSCALE,
        3 => ColorSpace::JCS_RGB,
        4 => ColorSpace::JCS_CMYK,
        n => return Err(Failure::Library(format!("{n} colour channels"))),
    };
    let mut started = jpeg.to_colorspace(wanted)?;
    let mut raw = vec![0u8; size.area() * channels];
    started.read_scanlines_into(&mut raw)?;
    if ran_out.get() {
        return Err(Failure::Library("it ends before its last row".into()));
    }
    let data = match channels {
        1 => raw.iter().flat_map(|v| [*v, *v, *v]).collect(),
        3 => raw,
        _ => raw.chunks_exact(4).flat_map(cmyk).collect(),
    };
    Ok((Image { size, data }, turn))
}

/// The file's bytes. libjpeg paints the rest of a picture grey when they run out; Pillow refuses such a file,
/// so that is remembered here.
struct Source<'a> {
    rest: &'a [u8],
    ran_out: &'a Cell<bool>,
}

impl Read for Source<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.rest.read(into)
    }
}

impl BufRead for Source<'_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        if self.rest.is_empty() {
            self.ran_out.set(true);
        }
        Ok(self.rest)
    }

    fn consume(&mut self, count: usize) {
        self.rest = self.rest.get(count..).unwrap_or_default();
    }
}

/// Pillow takes every four-channel JPEG for Adobe's inverted kind, then converts as here.
fn cmyk(inverted: &[u8]) -> [u8; 3] {
    let light = u32::from(inverted[3]);
    let channel = |value: u8| {
        let product = u32::from(255 - value) * light + 128;
        (light - ((product + (product >> 8)) >> 8)) as u8
    };
    [
        channel(inverted[0]),
        channel(inverted[1]),
        channel(inverted[2]),
    ]
}

/// EXIF first, XMP where that has none, as Pillow's `exif_transpose`.
fn orientation<'a>(markers: impl Iterator<Item = &'a [u8]>) -> Turn {
    let mut exif = None;
    let mut xmp = None;
    for data in markers {
        if let Some(tiff) = data.strip_prefix(b"Exif\0\0") {
            exif = exif.or_else(|| super::still::exif_orientation(tiff));
        } else if let Some(text) = data.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0") {
            xmp = xmp.or_else(|| super::still::xmp_orientation(text));
        }
    }
    Turn::from_exif(exif.or(xmp).unwrap_or(1))
}
