//! AnyRes: how a picture of any size becomes a base tile and a grid of tiles, and how many tokens
//! these give. The layout is computed here, once; the image processor cuts by it and the model packs
//! by it, so the two cannot disagree.
//!
//! Transformers: `select_best_resolution`, `get_anyres_image_grid_shape`, `unpad_image`.

use crate::error::{Error, Result};
use crate::media::ImageSize;

/// Rows and columns of tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileGrid {
    /// Tiles down.
    pub rows: usize,
    /// Tiles across.
    pub cols: usize,
}

/// The window of ViT patches that holds the picture once its padding is cut away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchWindow {
    /// First row kept of the canvas of `grid.rows * side` patch rows.
    pub top: usize,
    /// First column kept.
    pub left: usize,
    /// Rows kept; 0 for very wide pictures.
    pub rows: usize,
    /// Columns kept; 0 for very tall pictures.
    pub cols: usize,
}

/// How one image is cut into tiles and its features packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnyResLayout {
    /// Size of the original image.
    pub image_size: ImageSize,
    /// The pinpoint chosen by [`select_best_resolution`].
    pub best_resolution: ImageSize,
    /// Tiles of the grid.
    pub grid: TileGrid,
    /// The base tile and the grid's: `1 + rows * cols`.
    pub tiles: usize,
    /// ViT patches along a tile's side (24 for 336/14).
    pub patches_per_side: usize,
    /// The unpadded window of patches.
    pub window: PatchWindow,
}

impl AnyResLayout {
    /// Lays out an image of `image_size` on the best of `pinpoints`, in tiles of `tile` pixels and
    /// patches of `patch` pixels.
    ///
    /// # Errors
    /// No pinpoint fits (an empty list), or an empty image.
    pub fn new(
        image_size: ImageSize,
        pinpoints: &[ImageSize],
        tile: usize,
        patch: usize,
    ) -> Result<Self> {
        if image_size.height == 0 || image_size.width == 0 {
            return Err(Error::Input(format!(
                "an image of {} x {} pixels has nothing in it",
                image_size.width, image_size.height
            )));
        }
        let best_resolution = select_best_resolution(image_size, pinpoints).ok_or_else(|| {
            Error::Config(
                "image_grid_pinpoints is empty: the configuration must list at least one [height, \
                 width] pair"
                    .into(),
            )
        })?;
        let grid = TileGrid {
            rows: best_resolution.height / tile,
            cols: best_resolution.width / tile,
        };
        let patches_per_side = tile / patch;
        let window = unpad(
            ImageSize::new(grid.rows * patches_per_side, grid.cols * patches_per_side),
            image_size,
        );
        let tiles =
            best_resolution.height.div_ceil(tile) * best_resolution.width.div_ceil(tile) + 1;
        Ok(Self {
            image_size,
            best_resolution,
            grid,
            tiles,
            patches_per_side,
            window,
        })
    }

    /// Feature rows of the packed image: base tile, window, and one newline a window row.
    pub fn feature_tokens(&self) -> usize {
        self.patches_per_side * self.patches_per_side
            + self.window.rows * self.window.cols
            + self.window.rows
    }
}

/// The pinpoint that keeps most of the picture and, among equals, wastes least; the first wins a tie.
/// `None` for an empty list.
pub fn select_best_resolution(size: ImageSize, pinpoints: &[ImageSize]) -> Option<ImageSize> {
    let (h, w) = (size.height as f64, size.width as f64);
    let mut best = None;
    let (mut best_effective, mut least_waste) = (0.0, f64::INFINITY);
    for &candidate in pinpoints {
        let (ch, cw) = (candidate.height as f64, candidate.width as f64);
        let scale = (cw / w).min(ch / h);
        let scaled = (w * scale).trunc() * (h * scale).trunc();
        let effective = scaled.min(w * h);
        let waste = cw * ch - effective;
        if effective > best_effective || (effective == best_effective && waste < least_waste) {
            best = Some(candidate);
            (best_effective, least_waste) = (effective, waste);
        }
    }
    best
}

/// The window of `canvas` that a picture of `original` size covers when it was fitted into the canvas
/// and centred. Where an odd number of rows is padding, one padding row stays, as in the reference.
fn unpad(canvas: ImageSize, original: ImageSize) -> PatchWindow {
    let (ch, cw) = (canvas.height, canvas.width);
    let (h, w) = (original.height, original.width);
    if (w as f64 / h as f64) > (cw as f64 / ch as f64) {
        let kept = round7(h as f64 * (cw as f64 / w as f64));
        let top = ch.saturating_sub(kept) / 2;
        PatchWindow {
            top,
            left: 0,
            rows: ch - 2 * top,
            cols: cw,
        }
    } else {
        let kept = round7(w as f64 * (ch as f64 / h as f64));
        let left = cw.saturating_sub(kept) / 2;
        PatchWindow {
            top: 0,
            left,
            rows: ch,
            cols: cw - 2 * left,
        }
    }
}

/// Python's `int(round(x, 7))`: rounding first keeps float noise from losing a row.
fn round7(x: f64) -> usize {
    ((x * 1e7).round_ties_even() / 1e7).trunc() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    type Pair = (usize, usize);

    /// `(height, width)` of the image, best resolution, tiles, window rows x cols, tokens.
    const TABLE: [(Pair, Pair, usize, Pair, usize); 19] = [
        ((480, 640), (672, 672), 5, (36, 48), 2340),
        ((640, 480), (672, 672), 5, (48, 36), 2352),
        ((336, 336), (336, 672), 3, (24, 24), 1176),
        ((100, 100), (336, 672), 3, (24, 24), 1176),
        ((1, 1), (336, 672), 3, (24, 24), 1176),
        ((337, 336), (672, 336), 3, (24, 24), 1176),
        ((1080, 1920), (672, 672), 5, (28, 48), 1948),
        ((720, 1280), (672, 672), 5, (28, 48), 1948),
        ((1920, 1080), (672, 672), 5, (48, 28), 1968),
        ((899, 1024), (672, 672), 5, (42, 48), 2634),
        ((672, 672), (672, 672), 5, (48, 48), 2928),
        ((1365, 2048), (672, 672), 5, (32, 48), 2144),
        ((300, 100), (336, 672), 3, (24, 8), 792),
        ((500, 30), (672, 336), 3, (48, 2), 720),
        ((10, 2000), (336, 1008), 4, (0, 72), 576),
        ((2000, 10), (1008, 336), 4, (72, 0), 648),
        ((503, 316), (672, 336), 3, (38, 24), 1526),
        ((1, 1_000_000), (336, 672), 3, (0, 48), 576),
        ((1_000_000, 1), (336, 672), 3, (24, 0), 600),
    ];

    fn pinpoints(list: &[(usize, usize)]) -> Vec<ImageSize> {
        list.iter().map(|&(h, w)| ImageSize::new(h, w)).collect()
    }

    #[test]
    fn worked_token_counts() {
        let default = pinpoints(&[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]);
        for ((h, w), best, tiles, window, tokens) in TABLE {
            let layout =
                AnyResLayout::new(ImageSize::new(h, w), &default, 336, 14).expect("a layout");
            assert_eq!(
                layout.best_resolution,
                ImageSize::new(best.0, best.1),
                "{h} x {w}"
            );
            assert_eq!(layout.tiles, tiles, "{h} x {w}");
            assert_eq!(
                (layout.window.rows, layout.window.cols),
                window,
                "{h} x {w}"
            );
            assert_eq!(layout.feature_tokens(), tokens, "{h} x {w}");
        }
    }

    #[test]
    fn the_first_of_equal_pinpoints_wins() {
        let documented = pinpoints(&[(672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336)]);
        let best = select_best_resolution(ImageSize::square(336), &documented);
        assert_eq!(best, Some(ImageSize::new(672, 336)));
    }

    #[test]
    fn empty_images_and_lists_are_refused() {
        assert!(AnyResLayout::new(ImageSize::new(0, 5), &pinpoints(&[(4, 4)]), 4, 2).is_err());
        assert!(AnyResLayout::new(ImageSize::square(5), &[], 4, 2).is_err());
    }
}
