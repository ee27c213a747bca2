//! One picture from bytes, a file or a data URI: what `transformers.image_utils.load_image` gives with Pillow 11.3,
//! that is `exif_transpose` and then `convert("RGB")`.
//!
//! PNG, JPEG, WebP, GIF and BMP are read, told apart by their first bytes and never by name. Alpha is dropped,
//! not blended; of an animation the first frame is taken. Sizes are checked before anything is allocated.

use std::io::{Cursor, Read};
use std::path::Path;

use base64::Engine;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use image::{DynamicImage, ImageDecoder};

use super::convert::Turn;
use super::{Image, ImageSize, MediaLimits, gif, jpeg};
use crate::{Error, Result};

/// Reads the image file `path`.
///
/// # Errors
///
/// [`Error::Io`] where the file cannot be read, [`Error::Media`] where it is no image, damaged, or beyond `limits`.
pub fn load_image(path: impl AsRef<Path>, limits: &MediaLimits) -> Result<Image> {
    let path = path.as_ref();
    let io = |cause: std::io::Error| Error::io("open", path, &cause);
    let name = path.display().to_string();
    let meta = std::fs::metadata(path).map_err(io)?;
    if !meta.is_file() {
        return Err(Error::Media(format!(
            "cannot open {name}: it is not a regular file"
        )));
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(io)?;
    // One byte more than allowed tells a file that is too large from one that just fits.
    let most = limits.still_bytes.saturating_add(1);
    file.take(most)
        .read_to_end(&mut bytes)
        .map_err(|cause| Error::io("read", path, &cause))?;
    decode_image(&bytes, &name, limits)
}

/// Decodes an image file's `bytes`; `name` stands for it in errors.
///
/// # Errors
///
/// [`Error::Media`] where the bytes are no image, damaged, or beyond `limits`.
pub fn decode_image(bytes: &[u8], name: &str, limits: &MediaLimits) -> Result<Image> {
    if bytes.is_empty() {
        return Err(Error::Media(format!("cannot read {name}: it is empty")));
    }
    if bytes.len() as u64 > limits.still_bytes {
        return Err(Error::Media(format!(
            "cannot read {name}: it has more than {} bytes, the limit for an image",
            limits.still_bytes
        )));
    }
    match Kind::of(bytes) {
        Some(Kind::Jpeg) => jpeg::decode(bytes, name, limits),
        Some(Kind::Gif) => gif::decode(bytes, name, limits),
        Some(Kind::Png) => png(bytes, name, limits),
        Some(Kind::WebP) => webp(bytes, name, limits),
        Some(Kind::Bmp) => bmp(bytes, name, limits),
        None => Err(Error::Media(format!(
            "cannot read {name}: it is not a PNG, JPEG, WebP, GIF or BMP image"
        ))),
    }
}

/// Decodes `data:image/...;base64,...` or bare base64.
///
/// # Errors
///
/// [`Error::Input`] where the text is not base64, else as [`decode_image`].
pub fn decode_data_uri_or_base64(text: &str, limits: &MediaLimits) -> Result<Image> {
    let is_uri = text.starts_with("data:");
    if is_uri && !text.starts_with("data:image/") {
        let kind: String = text
            .chars()
            .skip(5)
            .take(40)
            .take_while(|c| !",;".contains(*c))
            .collect();
        return Err(Error::Input(format!(
            "the data URI holds {kind:?}, not an image: it must begin with data:image/"
        )));
    }
    let body = if is_uri {
        text.split(',').nth(1)
    } else {
        Some(text)
    };
    let Some(body) = body else {
        return Err(Error::Input(
            "the data URI has no comma before its data".into(),
        ));
    };
    if body.len() as u64 / 4 * 3 > limits.still_bytes {
        return Err(Error::Media(format!(
            "the base64 image has more than {} bytes, the limit for an image",
            limits.still_bytes
        )));
    }
    let bytes = base64_bytes(body)?;
    decode_image(
        &bytes,
        if is_uri {
            "the data URI"
        } else {
            "the base64 image"
        },
        limits,
    )
}

/// As Python's `base64.decodebytes`: characters outside the alphabet are passed over.
fn base64_bytes(body: &str) -> Result<Vec<u8>> {
    let config = GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::RequireCanonical)
        .with_decode_allow_trailing_bits(true);
    let engine = GeneralPurpose::new(&base64::alphabet::STANDARD, config);
    let kept: Vec<u8> = body
        .bytes()
        .filter(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(byte))
        .collect();
    let decoded = engine.decode(&kept).ok().filter(|bytes| !bytes.is_empty());
    decoded.ok_or_else(|| {
        let shown: String = body.chars().take(32).collect();
        Error::Input(format!(
            "the text {shown:?} is neither a file nor a base64 image: give a path, a URL, a data URI or base64"
        ))
    })
}

enum Kind {
    Png,
    Jpeg,
    WebP,
    Gif,
    Bmp,
}

impl Kind {
    fn of(bytes: &[u8]) -> Option<Self> {
        let webp = bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP");
        match bytes {
            _ if bytes.starts_with(b"\x89PNG\r\n\x1a\n") => Some(Kind::Png),
            _ if bytes.starts_with(b"\xff\xd8\xff") => Some(Kind::Jpeg),
            _ if bytes.starts_with(b"GIF87a") || bytes.starts_with(b"GIF89a") => Some(Kind::Gif),
            _ if bytes.starts_with(b"BM") => Some(Kind::Bmp),
            _ if webp => Some(Kind::WebP),
            _ => None,
        }
    }
}

/// Refuses a picture of no or too many pixels.
pub(super) fn check_size(size: ImageSize, name: &str, limits: &MediaLimits) -> Result<()> {
    let pixels = size.height as u64 * size.width as u64;
    if pixels == 0 {
        return Err(Error::Media(format!(
            "cannot read {name}: the image has no pixels"
        )));
    }
    if pixels > limits.still_pixels {
        return Err(Error::Media(format!(
            "cannot read {name}: {}x{} is more than {} pixels, the limit for an image; make it smaller",
            size.width, size.height, limits.still_pixels
        )));
    }
    Ok(())
}

fn damaged(name: &str, format: &str, cause: &image::ImageError) -> Error {
    Error::Media(format!(
        "cannot read {name}: the {format} file is damaged or cut off ({cause})"
    ))
}

fn png(bytes: &[u8], name: &str, limits: &MediaLimits) -> Result<Image> {
    let fail = |cause: image::ImageError| damaged(name, "PNG", &cause);
    let decoder = image::codecs::png::PngDecoder::new(Cursor::new(bytes)).map_err(fail)?;
    // IHDR is the first chunk of every file that the decoder takes: depth at 24, colour type at 25.
    let sixteen_bit_gray = bytes.get(24..26) == Some(&[16, 0]);
    let (picture, turn) = read(decoder, name, limits, "PNG")?;
    let mut image = if sixteen_bit_gray {
        clipped_gray(&picture)
    } else {
        rgb(&picture)
    };
    image = turn.apply(image);
    Ok(image)
}

fn webp(bytes: &[u8], name: &str, limits: &MediaLimits) -> Result<Image> {
    let fail = |cause: image::ImageError| damaged(name, "WebP", &cause);
    let decoder = image::codecs::webp::WebPDecoder::new(Cursor::new(bytes)).map_err(fail)?;
    let (picture, turn) = read(decoder, name, limits, "WebP")?;
    Ok(turn.apply(rgb(&picture)))
}

fn bmp(bytes: &[u8], name: &str, limits: &MediaLimits) -> Result<Image> {
    let fail = |cause: image::ImageError| damaged(name, "BMP", &cause);
    let decoder = image::codecs::bmp::BmpDecoder::new(Cursor::new(bytes)).map_err(fail)?;
    let (picture, _) = read(decoder, name, limits, "BMP")?;
    Ok(rgb(&picture))
}

fn read(
    mut decoder: impl ImageDecoder,
    name: &str,
    limits: &MediaLimits,
    format: &str,
) -> Result<(DynamicImage, Turn)> {
    let (width, height) = decoder.dimensions();
    check_size(
        ImageSize::new(height as usize, width as usize),
        name,
        limits,
    )?;
    // A block of metadata that cannot be read asks for no rotation.
    let exif = decoder.exif_metadata().ok().flatten();
    let xmp = decoder.xmp_metadata().ok().flatten();
    let exif = exif.and_then(|tiff| exif_orientation(&tiff));
    let orientation = exif.or_else(|| xmp.and_then(|text| xmp_orientation(&text)));
    let picture =
        DynamicImage::from_decoder(decoder).map_err(|cause| damaged(name, format, &cause))?;
    Ok((picture, Turn::from_exif(orientation.unwrap_or(1))))
}

/// The orientation in a TIFF block, where it has one.
pub(super) fn exif_orientation(tiff: &[u8]) -> Option<u32> {
    let tiff = tiff.strip_prefix(b"Exif\0\0").unwrap_or(tiff);
    image::metadata::Orientation::from_exif_chunk(tiff).map(|found| u32::from(found.to_exif()))
}

/// `tiff:Orientation="6"` or `<tiff:Orientation>6`, as Pillow searches for it.
pub(super) fn xmp_orientation(text: &[u8]) -> Option<u32> {
    const TAG: &[u8] = b"tiff:Orientation";
    let at = text.windows(TAG.len()).position(|window| window == TAG)?;
    let digit = match &text[at + TAG.len()..] {
        [b'=', b'"', digit, ..] | [b'>', digit, ..] => *digit,
        _ => return None,
    };
    digit.is_ascii_digit().then(|| u32::from(digit - b'0'))
}

/// Pillow's `RGB` of the other modes: grey repeated, alpha dropped, the high byte of 16 bits.
fn rgb(picture: &DynamicImage) -> Image {
    let size = ImageSize::new(picture.height() as usize, picture.width() as usize);
    let high = |value: &u16| (value >> 8) as u8;
    let data = match picture {
        DynamicImage::ImageLuma8(p) => p.as_raw().iter().flat_map(|v| [*v; 3]).collect(),
        DynamicImage::ImageLumaA8(p) => {
            p.as_raw().chunks_exact(2).flat_map(|v| [v[0]; 3]).collect()
        }
        DynamicImage::ImageRgb8(p) => p.as_raw().clone(),
        DynamicImage::ImageRgba8(p) => p
            .as_raw()
            .chunks_exact(4)
            .flat_map(|v| [v[0], v[1], v[2]])
            .collect(),
        DynamicImage::ImageLumaA16(p) => p
            .as_raw()
            .chunks_exact(2)
            .flat_map(|v| [high(&v[0]); 3])
            .collect(),
        DynamicImage::ImageRgb16(p) => p.as_raw().iter().map(high).collect(),
        DynamicImage::ImageRgba16(p) => p
            .as_raw()
            .chunks_exact(4)
            .flat_map(|v| [high(&v[0]), high(&v[1]), high(&v[2])])
            .collect(),
        other => other.to_rgb8().into_raw(),
    };
    Image { size, data }
}

/// Pillow's mode `I;16` to `RGB`: values above 255 are clipped, not scaled.
fn clipped_gray(picture: &DynamicImage) -> Image {
    let size = ImageSize::new(picture.height() as usize, picture.width() as usize);
    let clip = |value: u16| [value.min(255) as u8; 3];
    let data = match picture {
        DynamicImage::ImageLuma16(p) => p.as_raw().iter().flat_map(|v| clip(*v)).collect(),
        DynamicImage::ImageLumaA16(p) => p
            .as_raw()
            .chunks_exact(2)
            .flat_map(|v| clip(v[0]))
            .collect(),
        other => return rgb(other),
    };
    Image { size, data }
}
