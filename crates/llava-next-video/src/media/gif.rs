//! The first frame of a GIF as Pillow gives it: palette colours, transparency ignored.
//!
//! Where the frame does not cover the canvas, Pillow fills the rest with the transparent colour's palette entry, or
//! entry 0; the `image` crate would give black. So the palette indices are read and mapped here.

use super::still::check_size;
use super::{Image, ImageSize, MediaLimits};
use crate::{Error, Result};

/// Decodes the first frame of `bytes`; `name` is for errors.
pub(super) fn decode(bytes: &[u8], name: &str, limits: &MediaLimits) -> Result<Image> {
    let damaged = |cause: gif::DecodingError| {
        Error::Media(format!(
            "cannot read {name}: the GIF file is damaged or cut off ({cause})"
        ))
    };
    let mut options = gif::DecodeOptions::new();
    options.set_color_output(gif::ColorOutput::Indexed);
    let mut decoder = options.read_info(bytes).map_err(damaged)?;
    let size = ImageSize::new(usize::from(decoder.height()), usize::from(decoder.width()));
    check_size(size, name, limits)?;
    let global = decoder.global_palette().map(<[u8]>::to_vec);
    let frame = decoder
        .read_next_frame()
        .map_err(damaged)?
        .ok_or_else(|| Error::Media(format!("cannot read {name}: the GIF file has no frame")))?;
    let palette = frame.palette.clone().or(global);
    let colour = |index: u8| match &palette {
        Some(palette) => {
            let at = usize::from(index) * 3;
            palette
                .get(at..at + 3)
                .map_or([0; 3], |c| [c[0], c[1], c[2]])
        }
        None => [index; 3],
    };
    let fill = colour(frame.transparent.unwrap_or(0));
    let mut data: Vec<u8> = fill.iter().copied().cycle().take(size.area() * 3).collect();
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let width = usize::from(frame.width).max(1);
    for (y, row) in frame.buffer.chunks_exact(width).enumerate() {
        if top + y >= size.height {
            break;
        }
        for (x, index) in row.iter().enumerate().take(size.width.saturating_sub(left)) {
            let at = ((top + y) * size.width + left + x) * 3;
            data[at..at + 3].copy_from_slice(&colour(*index));
        }
    }
    Ok(Image { size, data })
}
