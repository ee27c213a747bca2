//! Resizing 8-bit RGB pictures with exactly the integers of Pillow 11.3 or of torchvision.
//!
//! Decision: an own resampler, because "nearly the same" pixels give different answers and no crate is
//! bit-exact with either. Both references do the same separable two-pass resampling with a rounded
//! 8-bit intermediate, horizontally first; they differ in how weights become integers:
//!
//! * [`Arithmetic::Pillow`]: 22-bit fixed point in 32-bit integers;
//! * [`Arithmetic::Torchvision`]: 16-bit weights with as many fraction bits as the largest allows
//!   (antialiased resizing of `uint8` tensors on the CPU).
//!
//! One kernel serves both passes and both arithmetics: an output row is a weighted sum of input rows.
//! The horizontal pass transposes a few rows at a time so that the picture's columns become rows. A
//! Pillow weight is split into two 16-bit halves, so that every product is 16 x 16 bits, which compilers
//! turn into vector code on every machine without `unsafe`.
//!
//! Refuses: for torchvision every filter but nearest, bilinear and bicubic (its tensor resize has no
//! other); pictures whose result would be absurdly large ([`MAX_RESIZED_PIXELS`]).

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::media::{Image, ImageSize};

/// The largest picture a resize may produce, in pixels.
pub const MAX_RESIZED_PIXELS: usize = 1 << 28;

/// Whose integers to reproduce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Arithmetic {
    /// Pillow 11.3, as the slow processors use it; what Transformers 4.53.3 does to images.
    #[default]
    Pillow,
    /// torchvision on `uint8` tensors, as the fast processors use it; what 4.53.3 does to videos.
    Torchvision,
}

/// The resampling filter, `PILImageResampling`, with its number in JSON files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Resample {
    /// 0: the nearest pixel.
    Nearest,
    /// 1: a windowed sinc over 6 pixels.
    Lanczos,
    /// 2: a triangle over 2 pixels.
    Bilinear,
    /// 3: a cubic over 4 pixels (a = -0.5).
    #[default]
    Bicubic,
    /// 4: the mean of the pixels covered.
    Box,
    /// 5: a Hamming-windowed sinc over 2 pixels.
    Hamming,
}

impl Resample {
    /// The filter of a `resample` setting in a JSON file.
    pub fn from_number(number: u64) -> Option<Self> {
        Some(match number {
            0 => Self::Nearest,
            1 => Self::Lanczos,
            2 => Self::Bilinear,
            3 => Self::Bicubic,
            4 => Self::Box,
            5 => Self::Hamming,
            _ => return None,
        })
    }

    /// Half the filter's width in pixels when it does not shrink.
    fn support(self) -> f64 {
        match self {
            Self::Nearest | Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    /// The filter's value at `x` pixels from its centre.
    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Nearest | Self::Box => f64::from(x > -0.5 && x <= 0.5),
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Bicubic => cubic(x.abs()),
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
            Self::Hamming => hamming(x.abs()),
        }
    }
}

/// Keys' cubic with a = -0.5, factored as both references factor it.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * std::f64::consts::PI;
    x.sin() / x
}

fn hamming(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    if x >= 1.0 {
        return 0.0;
    }
    let x = x * std::f64::consts::PI;
    // Pillow writes these two as single-precision constants.
    x.sin() / x * (f64::from(0.54_f32) + f64::from(0.46_f32) * x.cos())
}

/// A part of one axis of the resized picture: `length` pixels from `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First pixel kept.
    pub start: usize,
    /// Pixels kept.
    pub length: usize,
}

impl Span {
    /// The whole axis.
    pub const fn all(length: usize) -> Self {
        Self { start: 0, length }
    }
}

/// Resizes pictures of one size to another: weights are computed once, for all frames of a video.
#[derive(Debug, Clone)]
pub struct Resizer {
    from: ImageSize,
    to: ImageSize,
    horizontal: Axis,
    vertical: Axis,
}

/// What happens along one axis.
#[derive(Debug, Clone)]
enum Axis {
    /// Sizes are equal: the pass is skipped and the span is cut out.
    Keep(Span),
    /// Pixel `i` of the result is pixel `.0[i]` of the source.
    Pick(Vec<usize>),
    /// Weighted sums.
    Weigh(Weights),
}

impl Resizer {
    /// From pictures of size `from` to pictures of size `to`, of which only `rows` x `columns` are
    /// wanted (a crop costs nothing that it throws away).
    ///
    /// # Errors
    /// An empty size, a result above [`MAX_RESIZED_PIXELS`], or a filter that torchvision lacks.
    pub fn new(
        from: ImageSize,
        to: ImageSize,
        (rows, columns): (Span, Span),
        resample: Resample,
        arithmetic: Arithmetic,
    ) -> Result<Self> {
        use Resample::{Bicubic, Bilinear, Nearest};
        if from.area() == 0 || to.area() == 0 || rows.length == 0 || columns.length == 0 {
            return Err(Error::Media(format!(
                "a picture of {} x {} pixels cannot be resized to {} x {}: neither side may be 0",
                from.width, from.height, to.width, to.height
            )));
        }
        if to.height.max(to.width) > MAX_RESIZED_PIXELS
            || rows.length.saturating_mul(columns.length) > MAX_RESIZED_PIXELS
        {
            return Err(Error::Media(format!(
                "a picture of {} x {} pixels would become one of {} x {}, which is too large: crop it to \
                 a less extreme shape",
                from.width, from.height, to.width, to.height
            )));
        }
        if arithmetic == Arithmetic::Torchvision
            && !matches!(resample, Nearest | Bilinear | Bicubic)
        {
            return Err(Error::Config(format!(
                "torchvision cannot resize with the filter {resample:?}: set resample to 3 (bicubic), 2 \
                 (bilinear) or 0 (nearest)"
            )));
        }
        Ok(Self {
            from,
            to: ImageSize::new(rows.length, columns.length),
            horizontal: Axis::new(from.width, to.width, columns, resample, arithmetic),
            vertical: Axis::new(from.height, to.height, rows, resample, arithmetic),
        })
    }

    /// The whole of a picture, resized.
    ///
    /// # Errors
    /// As [`Resizer::new`].
    pub fn whole(
        from: ImageSize,
        to: ImageSize,
        resample: Resample,
        arithmetic: Arithmetic,
    ) -> Result<Self> {
        let window = (Span::all(to.height), Span::all(to.width));
        Self::new(from, to, window, resample, arithmetic)
    }

    /// Resizes one picture.
    ///
    /// # Errors
    /// The picture is not of the size this was made for, or its data do not fit its size.
    pub fn resize(&self, image: &Image) -> Result<Image> {
        if image.size != self.from || image.data.len() != image.size.area() * 3 {
            return Err(Error::Media(format!(
                "a picture of {} x {} pixels with {} bytes was given where {} x {} pixels of RGB were \
                 expected: the frames of a video must be of one size",
                image.size.width,
                image.size.height,
                image.data.len(),
                self.from.width,
                self.from.height
            )));
        }
        let narrow = self.resize_rows(&image.data);
        Ok(Image {
            size: self.to,
            data: self.resize_columns(narrow),
        })
    }

    /// The horizontal pass over those rows that the vertical pass reads: rows of `to.width` pixels.
    fn resize_rows(&self, data: &[u8]) -> Vec<u8> {
        let from_row = self.from.width * 3;
        let to_row = self.to.width * 3;
        let rows = self.vertical.source();
        let data = &data[rows.start * from_row..rows.end * from_row];
        let mut out = vec![0; rows.len() * to_row];
        match &self.horizontal {
            Axis::Keep(span) => {
                for (row, out) in data
                    .chunks_exact(from_row)
                    .zip(out.chunks_exact_mut(to_row))
                {
                    out.copy_from_slice(&row[span.start * 3..][..to_row]);
                }
            }
            Axis::Pick(columns) => {
                for (row, out) in data
                    .chunks_exact(from_row)
                    .zip(out.chunks_exact_mut(to_row))
                {
                    for (&x, out) in columns.iter().zip(out.chunks_exact_mut(3)) {
                        out.copy_from_slice(&row[x * 3..][..3]);
                    }
                }
            }
            Axis::Weigh(weights) => {
                let read = weights.source.start * 3..weights.source.end * 3;
                let mut columns = vec![0; weights.source.len() * LANES];
                let mut summed = vec![0; self.to.width * LANES];
                let blocks = data.chunks(from_row * BLOCK_ROWS);
                for (block, out) in blocks.zip(out.chunks_mut(to_row * BLOCK_ROWS)) {
                    rows_to_columns(block, from_row, read.clone(), &mut columns);
                    weights.sum_rows(&columns, LANES, &mut summed);
                    columns_to_rows(&summed, to_row, out);
                }
            }
        }
        out
    }

    /// The vertical pass over rows that are already `to.width` pixels wide.
    fn resize_columns(&self, narrow: Vec<u8>) -> Vec<u8> {
        let row = self.to.width * 3;
        match &self.vertical {
            Axis::Keep(_) => narrow,
            Axis::Pick(rows) => {
                let mut out = Vec::with_capacity(rows.len() * row);
                for &y in rows {
                    out.extend_from_slice(&narrow[y * row..][..row]);
                }
                out
            }
            Axis::Weigh(weights) => {
                let mut out = vec![0; self.to.height * row];
                weights.sum_rows(&narrow, row, &mut out);
                out
            }
        }
    }
}

impl Axis {
    fn new(from: usize, to: usize, span: Span, resample: Resample, arithmetic: Arithmetic) -> Self {
        if from == to {
            return Self::Keep(span);
        }
        if resample == Resample::Nearest {
            let mut picked = nearest(from, to, arithmetic);
            picked.truncate(span.start + span.length);
            return Self::Pick(picked.split_off(span.start));
        }
        Self::Weigh(Weights::new(from, to, span, resample, arithmetic))
    }

    /// The source pixels that this axis reads.
    fn source(&self) -> Range<usize> {
        match self {
            Self::Keep(span) => span.start..span.start + span.length,
            Self::Pick(picked) => 0..picked.iter().max().map_or(0, |last| last + 1),
            Self::Weigh(weights) => weights.source.clone(),
        }
    }
}

/// The source pixel of each pixel of the result.
fn nearest(from: usize, to: usize, arithmetic: Arithmetic) -> Vec<usize> {
    let step = from as f64 / to as f64;
    match arithmetic {
        // Pillow adds up the position, rounding errors included.
        Arithmetic::Pillow => {
            let mut position = step * 0.5;
            (0..to)
                .map(|_| {
                    let picked = (position as usize).min(from - 1);
                    position += step;
                    picked
                })
                .collect()
        }
        // torchvision's NEAREST_EXACT, in single precision.
        Arithmetic::Torchvision => {
            let step = from as f32 / to as f32;
            (0..to)
                .map(|i| (((i as f32 + 0.5) * step) as usize).min(from - 1))
                .collect()
        }
    }
}

/// Rows that the horizontal pass handles at a time.
const BLOCK_ROWS: usize = 16;
/// Bytes of one column of such a block.
const LANES: usize = BLOCK_ROWS * 3;
/// Bits below the split of a 22-bit Pillow weight.
const SPLIT: u32 = 11;

/// The integer weights of one axis.
#[derive(Debug, Clone)]
struct Weights {
    /// Source pixels with a weight; the picture given to [`Weights::sum_rows`] begins with the first.
    source: Range<usize>,
    /// For each pixel of the result: first pixel of `source`, and where its weights begin.
    first: Vec<(usize, usize)>,
    /// Weights of all pixels one after another; for Pillow the part above [`SPLIT`] bits.
    high: Vec<i16>,
    /// Pillow's low parts; empty for torchvision.
    low: Vec<i16>,
    /// Fraction bits of a weight.
    precision: u32,
}

impl Weights {
    fn new(from: usize, to: usize, span: Span, resample: Resample, arithmetic: Arithmetic) -> Self {
        let filter = AxisFilter::new(from, to, resample);
        let precision = match arithmetic {
            Arithmetic::Pillow => 22,
            // The precision depends on the largest weight of the whole axis, cropped or not.
            Arithmetic::Torchvision => torch_precision(filter.largest(to)),
        };
        let unit = f64::from(1_u32 << precision);
        let mut weights = Self {
            source: filter.reach(span.start).start..filter.reach(span.start + span.length - 1).end,
            first: Vec::with_capacity(span.length + 1),
            high: Vec::new(),
            low: Vec::new(),
            precision,
        };
        let mut taps = Vec::new();
        for x in span.start..span.start + span.length {
            let first = filter.taps(x, &mut taps);
            weights
                .first
                .push((first - weights.source.start, weights.high.len()));
            for &tap in &taps {
                // Half away from zero, as both references write it.
                let fixed = (tap * unit + if tap < 0.0 { -0.5 } else { 0.5 }) as i32;
                if arithmetic == Arithmetic::Pillow {
                    weights.high.push((fixed >> SPLIT) as i16);
                    weights.low.push((fixed & ((1 << SPLIT) - 1)) as i16);
                } else {
                    weights.high.push(fixed as i16);
                }
            }
        }
        weights.first.push((0, weights.high.len()));
        weights
    }

    /// Output row `y` is the weighted sum of its source rows, rounded and clamped to a byte.
    fn sum_rows(&self, src: &[u8], row: usize, out: &mut [u8]) {
        for (ends, out) in self.first.windows(2).zip(out.chunks_exact_mut(row)) {
            let (first, begin) = ends[0];
            let taps = begin..ends[1].1;
            let src = &src[first * row..(first + taps.len()) * row];
            let high = &self.high[taps.clone()];
            let low = self.low.get(taps).unwrap_or(&[]);
            let whole = row - row % LANES;
            for at in (0..whole).step_by(LANES) {
                let sum = self.sum::<LANES>(src, row, at, high, low);
                out[at..at + LANES].copy_from_slice(&sum);
            }
            for (at, out) in out.iter_mut().enumerate().skip(whole) {
                *out = self.sum::<1>(src, row, at, high, low)[0];
            }
        }
    }

    /// The sums of `N` neighbouring bytes, from column `at` on.
    #[inline(always)]
    fn sum<const N: usize>(
        &self,
        src: &[u8],
        row: usize,
        at: usize,
        high: &[i16],
        low: &[i16],
    ) -> [u8; N] {
        let mut total = products::<N>(src, row, at, high);
        if !low.is_empty() {
            let fine = products::<N>(src, row, at, low);
            for (total, fine) in total.iter_mut().zip(fine) {
                *total = (*total << SPLIT) + fine;
            }
        }
        let half = 1 << (self.precision - 1);
        total.map(|sum| ((sum + half) >> self.precision).clamp(0, 255) as u8)
    }
}

/// `sum over k of weights[k] * src[k][at..at + N]`.
#[inline(always)]
fn products<const N: usize>(src: &[u8], row: usize, at: usize, weights: &[i16]) -> [i32; N] {
    let mut acc = [0_i32; N];
    for (&weight, src) in weights.iter().zip(src.chunks_exact(row)) {
        for (acc, &px) in acc.iter_mut().zip(&src[at..at + N]) {
            *acc += i32::from(weight) * i32::from(px);
        }
    }
    acc
}

/// The real-valued weights of one axis.
struct AxisFilter {
    from: usize,
    resample: Resample,
    scale: f64,
    /// How much wider the filter is because the picture shrinks.
    stretch: f64,
}

impl AxisFilter {
    fn new(from: usize, to: usize, resample: Resample) -> Self {
        let scale = from as f64 / to as f64;
        Self {
            from,
            resample,
            scale,
            stretch: scale.max(1.0),
        }
    }

    /// The source pixels of output pixel `x`.
    fn reach(&self, x: usize) -> Range<usize> {
        let centre = (x as f64 + 0.5) * self.scale;
        let support = self.resample.support() * self.stretch;
        let first = (centre - support + 0.5).max(0.0) as usize;
        first..((centre + support + 0.5) as usize).min(self.from)
    }

    /// Writes the normalised weights of output pixel `x` to `taps`; returns the first source pixel.
    fn taps(&self, x: usize, taps: &mut Vec<f64>) -> usize {
        let centre = (x as f64 + 0.5) * self.scale;
        let shrink = 1.0 / self.stretch;
        let reach = self.reach(x);
        let first = reach.start;
        taps.clear();
        taps.extend(reach.map(|j| {
            let distance = j as f64 - centre + 0.5;
            self.resample.weight(distance * shrink)
        }));
        let sum: f64 = taps.iter().sum();
        if sum != 0.0 {
            taps.iter_mut().for_each(|tap| *tap /= sum);
        }
        first
    }

    fn largest(&self, to: usize) -> f64 {
        let mut taps = Vec::new();
        let mut largest = 0.0_f64;
        for x in 0..to {
            self.taps(x, &mut taps);
            largest = taps.iter().fold(largest, |a, &b| a.max(b));
        }
        largest
    }
}

/// Fraction bits such that the largest weight just fits 16 bits, at most 22.
fn torch_precision(largest: f64) -> u32 {
    (0..22)
        .find(|&bits| (0.5 + largest * f64::from(1_u32 << (bits + 1))) as i32 >= 1 << 15)
        .unwrap_or(22)
        .max(1)
}

/// The bytes `read` of up to [`BLOCK_ROWS`] rows, column by column; missing rows keep what was there.
fn rows_to_columns(block: &[u8], row: usize, read: Range<usize>, columns: &mut [u8]) {
    for (y, row) in block.chunks_exact(row).enumerate() {
        let pixels = row[read.clone()].chunks_exact(3);
        for (pixel, column) in pixels.zip(columns.chunks_exact_mut(LANES)) {
            column[y * 3..y * 3 + 3].copy_from_slice(pixel);
        }
    }
}

/// The inverse of [`rows_to_columns`].
fn columns_to_rows(columns: &[u8], row: usize, block: &mut [u8]) {
    for (y, row) in block.chunks_exact_mut(row).enumerate() {
        for (pixel, column) in row.chunks_exact_mut(3).zip(columns.chunks_exact(LANES)) {
            pixel.copy_from_slice(&column[y * 3..y * 3 + 3]);
        }
    }
}
