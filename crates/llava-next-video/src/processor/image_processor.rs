//! Images to AnyRes tiles: Transformers' `LlavaNextImageProcessor` and, with
//! [`Arithmetic::Torchvision`], `LlavaNextImageProcessorFast`.
//!
//! An image becomes a base tile (the whole image squeezed into a square) and a grid of tiles (the image
//! fitted into the best of the pinpoints, centred on black, cut up). Decision: the slow processor's
//! Pillow arithmetic by default, because that is what Transformers 4.53.3 runs on images whatever the
//! files say.
//!
//! Where the reference misreads a picture that is 1 or 3 pixels high or wide as having its channels
//! first, this does the right thing. Refuses: pinpoints or sizes that make tiles of different sizes.

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::anyres::{AnyResLayout, select_best_resolution};
use super::inputs::{ImageInput, Pixels};
use super::resize::{Arithmetic, Resizer};
use super::settings::{Fields, NormaliseTable, PixelSettings, TargetSize};
use crate::error::{Error, Result};
use crate::media::{Image, ImageSize};

/// The most pinpoints that a file may list.
const MAX_PINPOINTS: usize = 1024;

/// The largest resolution that a file may list, in pixels.
const MAX_PINPOINT_PIXELS: usize = 64_000_000;

/// Turns images into base tile and grid tiles.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaNextImageProcessor {
    /// Resize, crop, rescale, normalise.
    pub settings: PixelSettings,
    /// The candidate (height, width) resolutions, in the order that breaks ties.
    pub image_grid_pinpoints: Vec<ImageSize>,
    /// Pad the tile axis to the batch's maximum when tensors are written; kept for the record, tiles are
    /// held without padding.
    pub do_pad: bool,
}

impl LlavaNextImageProcessor {
    /// The defaults of the Transformers class: 224 pixels, five pinpoints of 336-pixel tiles. Not usable
    /// with a model as they stand.
    pub fn class_default(arithmetic: Arithmetic) -> Self {
        let pinpoints = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)];
        Self {
            settings: PixelSettings::class_default(arithmetic),
            image_grid_pinpoints: pinpoints.map(|(h, w)| ImageSize::new(h, w)).to_vec(),
            do_pad: true,
        }
    }

    /// The processor of a `preprocessor_config.json`, which `file` names in messages.
    ///
    /// # Errors
    /// A setting of the wrong kind or out of range.
    pub fn from_json(
        settings: &Map<String, Value>,
        arithmetic: Arithmetic,
        file: &str,
    ) -> Result<Self> {
        let mut this = Self::class_default(arithmetic);
        this.settings = PixelSettings::from_json(settings, arithmetic, file)?;
        let fields = Fields { settings, file };
        fields.flag("do_pad", &mut this.do_pad)?;
        if let Some(value) = fields.get("image_grid_pinpoints") {
            let wrong = || {
                fields.wrong(
                    "image_grid_pinpoints",
                    value,
                    "a list of [height, width] pairs",
                )
            };
            let list = value.as_array().ok_or_else(wrong)?;
            if list.is_empty() || list.len() > MAX_PINPOINTS {
                return Err(wrong());
            }
            this.image_grid_pinpoints = list
                .iter()
                .map(|pair| fields.pair("image_grid_pinpoints", pair))
                .collect::<Result<_>>()?;
            if this
                .image_grid_pinpoints
                .iter()
                .any(|pinpoint| pinpoint.area() > MAX_PINPOINT_PIXELS)
            {
                return Err(fields.wrong(
                    "image_grid_pinpoints",
                    value,
                    "pairs of at most 64 million pixels",
                ));
            }
        }
        Ok(this)
    }

    /// The tiles and the layout of each image; `patch_size` is the ViT's.
    ///
    /// # Errors
    /// An empty image, or settings that give tiles of different sizes.
    pub fn preprocess(&self, images: &[Image], patch_size: usize) -> Result<Vec<ImageInput>> {
        let table = self.settings.normalisation();
        images
            .par_iter()
            .map(|image| self.preprocess_one(image, patch_size, &table))
            .collect()
    }

    /// The layout that this processor gives an image of `size`.
    ///
    /// # Errors
    /// An empty image, or a patch larger than a tile.
    pub fn layout(&self, size: ImageSize, patch_size: usize) -> Result<AnyResLayout> {
        let tile = self
            .settings
            .output_size()
            .unwrap_or(self.settings.crop_size)
            .height;
        if patch_size == 0 || patch_size > tile {
            return Err(Error::Config(format!(
                "patch_size is {patch_size}, but must be from 1 to the {tile} pixels of a tile"
            )));
        }
        AnyResLayout::new(size, &self.image_grid_pinpoints, tile, patch_size)
    }

    fn preprocess_one(
        &self,
        image: &Image,
        patch_size: usize,
        table: &NormaliseTable,
    ) -> Result<ImageInput> {
        let layout = self.layout(image.size, patch_size)?;
        let mut entries = vec![self.base_entry(image)?];
        entries.extend(self.grid_entries(image)?);
        let tiles = self.finish(&entries, table)?;
        Ok(ImageInput { tiles, layout })
    }

    /// The whole image, squeezed into a square without keeping its shape.
    fn base_entry(&self, image: &Image) -> Result<Image> {
        let target = match (self.settings.size, self.settings.arithmetic) {
            (TargetSize::ShortestEdge(side), _) => ImageSize::square(side),
            (TargetSize::Exact(size), Arithmetic::Pillow) => {
                ImageSize::square(size.height.min(size.width))
            }
            (TargetSize::Exact(size), Arithmetic::Torchvision) => size,
        };
        self.resize(image, target)
    }

    /// The image fitted into its best resolution, centred on black, and cut into tiles, row by row;
    /// where the resolution is no multiple of the tile, the last of a row or column are smaller.
    fn grid_entries(&self, image: &Image) -> Result<Vec<Image>> {
        let best =
            select_best_resolution(image.size, &self.image_grid_pinpoints).ok_or_else(|| {
                Error::Config("image_grid_pinpoints is empty: list at least one pair".into())
            })?;
        let fitted = self.resize(image, fit(image.size, best))?;
        let canvas = centre_on_black(&fitted, best);
        let tile = self.settings.crop_size.height;
        let mut entries = Vec::new();
        for top in (0..best.height).step_by(tile) {
            for left in (0..best.width).step_by(tile) {
                let size = ImageSize::new(tile.min(best.height - top), tile.min(best.width - left));
                entries.push(cut(&canvas, top, left, size));
            }
        }
        Ok(entries)
    }

    fn resize(&self, image: &Image, to: ImageSize) -> Result<Image> {
        Resizer::whole(
            image.size,
            to,
            self.settings.resample,
            self.settings.arithmetic,
        )?
        .resize(image)
    }

    /// Resizes, crops and normalises base tile and grid tiles into one stack.
    fn finish(&self, entries: &[Image], table: &NormaliseTable) -> Result<Pixels> {
        let plans = entries
            .iter()
            .map(|entry| self.settings.plan(entry.size))
            .collect::<Result<Vec<_>>>()?;
        let size = plans[0].output;
        if let Some(other) = plans.iter().find(|plan| plan.output != size) {
            return Err(Error::Config(format!(
                "image_grid_pinpoints, size and crop_size of the image processor give tiles of {} x {} \
                 and of {} x {} pixels: all must have the size that the vision tower takes",
                size.width, size.height, other.output.width, other.output.height
            )));
        }
        let stride = 3 * size.area();
        let mut data = vec![0.0; entries.len() * stride];
        for ((entry, plan), out) in entries
            .iter()
            .zip(&plans)
            .zip(data.chunks_exact_mut(stride))
        {
            plan.apply(entry, table, out)?;
        }
        Ok(Pixels {
            count: entries.len(),
            size,
            data: data.into(),
        })
    }
}

/// The largest size of the same shape as `size` that fits into `target` (`get_patch_output_size`).
fn fit(size: ImageSize, target: ImageSize) -> ImageSize {
    let (h, w) = (size.height as f64, size.width as f64);
    let scale_w = target.width as f64 / w;
    let scale_h = target.height as f64 / h;
    if scale_w < scale_h {
        let height = (h * scale_w).ceil() as usize;
        ImageSize::new(height.min(target.height), target.width)
    } else {
        let width = (w * scale_h).ceil() as usize;
        ImageSize::new(target.height, width.min(target.width))
    }
}

/// The picture in the middle of a black canvas; an odd pixel of padding goes right and below.
fn centre_on_black(image: &Image, canvas: ImageSize) -> Image {
    let top = (canvas.height - image.size.height) / 2;
    let left = (canvas.width - image.size.width) / 2;
    let mut data = vec![0; canvas.area() * 3];
    let rows = data.chunks_exact_mut(canvas.width * 3).skip(top);
    for (row, pixels) in rows.zip(image.data.chunks_exact(image.size.width * 3)) {
        row[left * 3..][..pixels.len()].copy_from_slice(pixels);
    }
    Image { size: canvas, data }
}

fn cut(image: &Image, top: usize, left: usize, size: ImageSize) -> Image {
    let mut data = Vec::with_capacity(size.area() * 3);
    let rows = image.data.chunks_exact(image.size.width * 3);
    for row in rows.skip(top).take(size.height) {
        data.extend_from_slice(&row[left * 3..(left + size.width) * 3]);
    }
    Image { size, data }
}
