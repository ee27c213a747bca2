//! `pack_image_features`: the features of an image's tiles, in reading order, without the padding, with
//! the learned newline after each row.
//!
//! The order is worked out as a list of row numbers and the rows are moved once; the numbers come from
//! the [`AnyResLayout`] that the processor computed.

use crate::error::{Error, Result};
use crate::processor::anyres::AnyResLayout;

/// Where one row of a packed image comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackedRow {
    /// This row of the image's tile features (tile-major, then row-major within the tile).
    Feature(u32),
    /// The `image_newline` vector.
    Newline,
}

/// The rows of one packed image: the base tile whole, then the unpadded grid, a newline a grid row.
pub fn packed_rows(layout: &AnyResLayout) -> Vec<PackedRow> {
    let side = layout.patches_per_side;
    let per_tile = side * side;
    let mut rows = Vec::with_capacity(layout.feature_tokens());
    rows.extend((0..per_tile as u32).map(PackedRow::Feature));
    let window = layout.window;
    for y in window.top..window.top + window.rows {
        for x in window.left..window.left + window.cols {
            let tile = 1 + y / side * layout.grid.cols + x / side;
            let within = y % side * side + x % side;
            rows.push(PackedRow::Feature((tile * per_tile + within) as u32));
        }
        rows.push(PackedRow::Newline);
    }
    rows
}

/// `pack_image_features` over plain values: `features` is `[tiles * side², columns]`, the result
/// `[feature_tokens, columns]`. Without `image_newline` no newlines are put in. A single tile (which
/// the processor never makes) keeps its rows and gets one newline.
///
/// # Errors
/// The features are not those of `layout`.
pub fn pack_image_features(
    features: &[f32],
    columns: usize,
    layout: &AnyResLayout,
    image_newline: Option<&[f32]>,
) -> Result<Vec<f32>> {
    let per_tile = layout.patches_per_side.pow(2);
    let rows = features.len() / columns.max(1);
    if rows == per_tile {
        return Ok([features, image_newline.unwrap_or(&[])].concat());
    }
    if rows != layout.tiles * per_tile {
        return Err(Error::Input(format!(
            "{rows} feature rows do not fit an image of {} tiles of {per_tile} patches each",
            layout.tiles
        )));
    }
    let mut out = Vec::with_capacity(layout.feature_tokens() * columns);
    for row in packed_rows(layout) {
        match row {
            PackedRow::Feature(i) => {
                out.extend_from_slice(&features[i as usize * columns..][..columns]);
            }
            PackedRow::Newline => out.extend_from_slice(image_newline.unwrap_or(&[])),
        }
    }
    Ok(out)
}
