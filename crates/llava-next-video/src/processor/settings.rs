//! The settings that image and video processors share, as they stand in `preprocessor_config.json`
//! and its neighbours, and what follows from them: sizes, crops and the arithmetic of normalising.
//!
//! Decision: everything a JSON file may say is read here once and checked once, so that the processors
//! never meet a half-formed setting. An absent (or null) setting takes the class default, as in
//! Transformers; a setting that cannot be honoured is an error that names the file.
//!
//! Normalising goes through a table of 256 floats a channel: exact, because an 8-bit pixel has only 256
//! values, and faster than the arithmetic.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::resize::{Arithmetic, Resample, Resizer, Span};
use crate::error::{Error, Result};
use crate::media::{Image, ImageSize};

/// Mean of the three channels in CLIP's training data (`OPENAI_CLIP_MEAN`).
pub const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Standard deviation of the three channels (`OPENAI_CLIP_STD`).
pub const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
/// The largest side, in pixels, that a size setting may ask for.
const MAX_SIDE: u64 = 1 << 15;

/// The `size` setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetSize {
    /// The short side becomes this long, the long one follows: `{"shortest_edge": n}`.
    ShortestEdge(usize),
    /// Exactly this size: `{"height": h, "width": w}`.
    Exact(ImageSize),
}

impl TargetSize {
    /// The size that a picture of `size` is resized to (`get_resize_output_image_size`).
    pub fn for_picture(self, size: ImageSize) -> ImageSize {
        match self {
            Self::Exact(exact) => exact,
            Self::ShortestEdge(short) => {
                let (h, w) = (size.height.max(1), size.width.max(1));
                if w <= h {
                    ImageSize::new(short * h / w, short)
                } else {
                    ImageSize::new(short, short * w / h)
                }
            }
        }
    }
}

/// How pictures are resized, before anything is cut off. Whoever keeps or sends frames can do this beforehand:
/// resizing what has its size already changes nothing, so a processor makes of the result what it makes of the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resizing {
    /// What to resize to, in pixels.
    pub size: TargetSize,
    /// The filter.
    pub resample: Resample,
    /// Whose integers to reproduce.
    pub arithmetic: Arithmetic,
}

impl Resizing {
    /// For pictures of `size` of which it makes smaller ones; none where they would not become smaller.
    ///
    /// # Errors
    /// As [`Resizer::new`].
    pub fn shrinking(&self, size: ImageSize) -> Result<Option<Resizer>> {
        let resized = self.size.for_picture(size);
        match resized.area() < size.area() {
            true => Resizer::whole(size, resized, self.resample, self.arithmetic).map(Some),
            false => Ok(None),
        }
    }
}

/// The settings of `LlavaNextImageProcessor` and `LlavaNextVideoVideoProcessor` that are the same.
#[derive(Debug, Clone, PartialEq)]
pub struct PixelSettings {
    /// Resize before cropping.
    pub do_resize: bool,
    /// What to resize to, in pixels.
    pub size: TargetSize,
    /// The filter.
    pub resample: Resample,
    /// Cut the centre out (smaller pictures are padded with black).
    pub do_center_crop: bool,
    /// Size of the centre in pixels; its height is also the side of an AnyRes tile.
    pub crop_size: ImageSize,
    /// Multiply by `rescale_factor`.
    pub do_rescale: bool,
    /// Usually 1/255.
    pub rescale_factor: f64,
    /// Subtract the mean, divide by the standard deviation.
    pub do_normalize: bool,
    /// Mean of each channel, after rescaling.
    pub image_mean: [f64; 3],
    /// Standard deviation of each channel, after rescaling.
    pub image_std: [f64; 3],
    /// Convert to RGB; kept for the record, pictures are always RGB here.
    pub do_convert_rgb: bool,
    /// Whose integers and floats to reproduce.
    pub arithmetic: Arithmetic,
}

impl PixelSettings {
    /// The defaults of the Transformers classes: 224 pixels, CLIP's mean and deviation.
    pub fn class_default(arithmetic: Arithmetic) -> Self {
        Self {
            do_resize: true,
            size: TargetSize::ShortestEdge(224),
            resample: Resample::Bicubic,
            do_center_crop: true,
            crop_size: ImageSize::square(224),
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            image_mean: CLIP_MEAN,
            image_std: CLIP_STD,
            do_convert_rgb: true,
            arithmetic,
        }
    }

    /// The settings of a JSON object; what is absent or null takes the class default. `file` names the
    /// object in messages.
    ///
    /// # Errors
    /// A setting of the wrong kind or out of range.
    pub fn from_json(
        settings: &Map<String, Value>,
        arithmetic: Arithmetic,
        file: &str,
    ) -> Result<Self> {
        let fields = Fields { settings, file };
        let mut this = Self::class_default(arithmetic);
        fields.flag("do_resize", &mut this.do_resize)?;
        fields.flag("do_center_crop", &mut this.do_center_crop)?;
        fields.flag("do_rescale", &mut this.do_rescale)?;
        fields.flag("do_normalize", &mut this.do_normalize)?;
        fields.flag("do_convert_rgb", &mut this.do_convert_rgb)?;
        if let Some(value) = fields.get("size") {
            let mut square = false;
            fields.flag("default_to_square", &mut square)?;
            this.size = fields.size("size", value, square)?;
        }
        if let Some(value) = fields.get("crop_size") {
            this.crop_size = match fields.size("crop_size", value, true)? {
                TargetSize::Exact(size) => size,
                TargetSize::ShortestEdge(_) => {
                    return Err(fields.wrong("crop_size", value, "{\"height\": h, \"width\": w}"));
                }
            };
        }
        if let Some(value) = fields.get("resample") {
            this.resample = value
                .as_u64()
                .and_then(Resample::from_number)
                .ok_or_else(|| {
                    fields.wrong("resample", value, "a number from 0 to 5 (3 is bicubic)")
                })?;
        }
        if let Some(value) = fields.get("rescale_factor") {
            this.rescale_factor = fields.number("rescale_factor", value)?;
        }
        if let Some(value) = fields.get("image_mean") {
            this.image_mean = fields.channels("image_mean", value)?;
        }
        if let Some(value) = fields.get("image_std") {
            this.image_std = fields.channels("image_std", value)?;
            if this.image_std.contains(&0.0) {
                return Err(fields.wrong("image_std", value, "numbers other than 0"));
            }
        }
        Ok(this)
    }

    /// How pictures are resized, if they are.
    pub fn resizing(&self) -> Option<Resizing> {
        self.do_resize.then_some(Resizing {
            size: self.size,
            resample: self.resample,
            arithmetic: self.arithmetic,
        })
    }

    /// The size of every processed picture, where it does not depend on the picture.
    pub fn output_size(&self) -> Option<ImageSize> {
        match (self.do_center_crop, self.do_resize, self.size) {
            (true, _, _) => Some(self.crop_size),
            (false, true, TargetSize::Exact(size)) => Some(size),
            _ => None,
        }
    }

    /// The floats that the 256 byte values of each channel become.
    pub fn normalisation(&self) -> NormaliseTable {
        let fused = self.arithmetic == Arithmetic::Torchvision && self.do_rescale;
        let table = |channel: usize| {
            let (mean, std) = (
                self.image_mean[channel] as f32,
                self.image_std[channel] as f32,
            );
            std::array::from_fn(|byte| match (self.do_normalize, self.do_rescale) {
                // Fused: mean and deviation are scaled up, in single precision, instead of the pixel down.
                (true, true) if fused => {
                    let unscale = (1.0 / self.rescale_factor) as f32;
                    (byte as f32 - mean * unscale) / (std * unscale)
                }
                (true, _) => (self.rescaled(byte) - mean) / std,
                (false, _) => self.rescaled(byte),
            })
        };
        NormaliseTable(std::array::from_fn(table))
    }

    fn rescaled(&self, byte: usize) -> f32 {
        match (self.do_rescale, self.arithmetic) {
            (false, _) => byte as f32,
            (true, Arithmetic::Pillow) => (byte as f64 * self.rescale_factor) as f32,
            (true, Arithmetic::Torchvision) => byte as f32 * self.rescale_factor as f32,
        }
    }

    /// Plans resize and centre crop for pictures of `size`.
    ///
    /// # Errors
    /// The picture is empty or would become absurdly large.
    pub fn plan(&self, size: ImageSize) -> Result<PicturePlan> {
        let resized = if self.do_resize {
            self.size.for_picture(size)
        } else {
            size
        };
        let output = if self.do_center_crop {
            self.crop_size
        } else {
            resized
        };
        let rows = Cropped::new(resized.height, output.height, self.arithmetic);
        let columns = Cropped::new(resized.width, output.width, self.arithmetic);
        let window = (rows.kept, columns.kept);
        Ok(PicturePlan {
            resizer: Resizer::new(size, resized, window, self.resample, self.arithmetic)?,
            output,
            top: rows.padding,
            left: columns.padding,
            kept: ImageSize::new(rows.kept.length, columns.kept.length),
        })
    }
}

/// One axis of a centre crop.
struct Cropped {
    /// What is kept of the picture.
    kept: Span,
    /// Black pixels before it.
    padding: usize,
}

impl Cropped {
    /// The references round differently: see behaviour in the processors' tests.
    fn new(length: usize, crop: usize, arithmetic: Arithmetic) -> Self {
        if length >= crop {
            let spare = length - crop;
            let start = match arithmetic {
                Arithmetic::Pillow => spare / 2,
                // Python's round(): a half goes to the even neighbour.
                Arithmetic::Torchvision => spare / 2 + usize::from(spare % 4 == 3),
            };
            return Self {
                kept: Span {
                    start,
                    length: crop,
                },
                padding: 0,
            };
        }
        let missing = crop - length;
        Self {
            kept: Span::all(length),
            padding: match arithmetic {
                Arithmetic::Pillow => missing.div_ceil(2),
                Arithmetic::Torchvision => missing / 2,
            },
        }
    }
}

/// Resize and crop, planned once for all pictures of one size.
#[derive(Debug, Clone)]
pub struct PicturePlan {
    resizer: Resizer,
    /// Size of the result in pixels.
    pub output: ImageSize,
    top: usize,
    left: usize,
    kept: ImageSize,
}

impl PicturePlan {
    /// Resizes, crops and normalises one picture into `out`, `3 x height x width` floats, channels
    /// first.
    ///
    /// # Errors
    /// The picture is not of the planned size.
    pub fn apply(&self, image: &Image, table: &NormaliseTable, out: &mut [f32]) -> Result<()> {
        let resized = self.resizer.resize(image)?;
        let ImageSize { height, width } = self.output;
        let padded = self.kept != self.output;
        for (channel, (plane, values)) in out
            .chunks_exact_mut(height * width)
            .zip(&table.0)
            .enumerate()
        {
            if padded {
                plane.fill(values[0]);
            }
            let rows = plane.chunks_exact_mut(width).skip(self.top);
            for (row, pixels) in rows.zip(resized.data.chunks_exact(self.kept.width * 3)) {
                for (out, pixel) in row[self.left..].iter_mut().zip(pixels.chunks_exact(3)) {
                    *out = values[usize::from(pixel[channel])];
                }
            }
        }
        Ok(())
    }
}

/// For each channel, what each byte becomes.
#[derive(Debug, Clone, PartialEq)]
pub struct NormaliseTable(pub [[f32; 256]; 3]);

/// Typed access to a JSON object whose name goes into messages.
pub(crate) struct Fields<'a> {
    pub(crate) settings: &'a Map<String, Value>,
    pub(crate) file: &'a str,
}

impl Fields<'_> {
    /// The setting, unless absent or null.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.settings.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn wrong(&self, name: &str, value: &Value, expected: &str) -> Error {
        let mut shown = value.to_string();
        if shown.len() > 80 {
            shown = shown.chars().take(77).collect::<String>() + "...";
        }
        Error::Config(format!(
            "{}: {name} is {shown}, but must be {expected}",
            self.file
        ))
    }

    pub(crate) fn flag(&self, name: &str, into: &mut bool) -> Result<()> {
        if let Some(value) = self.get(name) {
            *into = value
                .as_bool()
                .ok_or_else(|| self.wrong(name, value, "true or false"))?;
        }
        Ok(())
    }

    pub(crate) fn number(&self, name: &str, value: &Value) -> Result<f64> {
        value
            .as_f64()
            .filter(|n| n.is_finite())
            .ok_or_else(|| self.wrong(name, value, "a number"))
    }

    /// A count or side in pixels.
    pub(crate) fn whole(&self, name: &str, value: &Value) -> Result<usize> {
        value
            .as_u64()
            .or_else(|| {
                value
                    .as_f64()
                    .filter(|n| n.fract() == 0.0 && *n >= 0.0)
                    .map(|n| n as u64)
            })
            .filter(|n| (1..=MAX_SIDE).contains(n))
            .map(|n| n as usize)
            .ok_or_else(|| self.wrong(name, value, "a whole number of pixels, at least 1"))
    }

    fn channels(&self, name: &str, value: &Value) -> Result<[f64; 3]> {
        let wrong = || self.wrong(name, value, "a number or a list of three");
        if value.is_number() {
            return Ok([self.number(name, value)?; 3]);
        }
        let list = value
            .as_array()
            .filter(|l| l.len() == 3)
            .ok_or_else(wrong)?;
        let mut channels = [0.0; 3];
        for (channel, value) in channels.iter_mut().zip(list) {
            *channel = value.as_f64().filter(|n| n.is_finite()).ok_or_else(wrong)?;
        }
        Ok(channels)
    }

    /// A height and width as `[h, w]`, the form of pinpoints.
    pub(crate) fn pair(&self, name: &str, value: &Value) -> Result<ImageSize> {
        match value.as_array().map(Vec::as_slice) {
            Some([h, w]) => Ok(ImageSize::new(self.whole(name, h)?, self.whole(name, w)?)),
            _ => Err(self.wrong(name, value, "a [height, width] pair")),
        }
    }

    /// `get_size_dict`: every spelling that the published files use.
    fn size(&self, name: &str, value: &Value, square: bool) -> Result<TargetSize> {
        if value.is_number() {
            let side = self.whole(name, value)?;
            return Ok(if square {
                TargetSize::Exact(ImageSize::square(side))
            } else {
                TargetSize::ShortestEdge(side)
            });
        }
        if value.is_array() {
            return Ok(TargetSize::Exact(self.pair(name, value)?));
        }
        let part = |key: &str| value.get(key).filter(|v| !v.is_null());
        if let (Some(h), Some(w)) = (part("height"), part("width")) {
            let size = ImageSize::new(self.whole(name, h)?, self.whole(name, w)?);
            return Ok(TargetSize::Exact(size));
        }
        match part("shortest_edge") {
            Some(side) if part("longest_edge").is_none() => {
                Ok(TargetSize::ShortestEdge(self.whole(name, side)?))
            }
            _ => Err(self.wrong(
                name,
                value,
                "{\"shortest_edge\": n}, {\"height\": h, \"width\": w}, a number or a [height, width] pair",
            )),
        }
    }
}
