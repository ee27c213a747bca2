//! Model inputs as a safetensors file, in the shapes that Transformers' processor returns.
//!
//! | tensor | type, shape |
//! | --- | --- |
//! | `input_ids`, `attention_mask` | i64 `[B, S]` |
//! | `pixel_values` | f32 `[N, P, 3, H, W]`: tiles, zero-padded to the image with the most |
//! | `image_sizes` | i64 `[N, 2]`: height and width of the original images |
//! | `pixel_values_videos` | f32 `[V, F, 3, H, W]` |
//! | `labels` (read only) | i64 `[B, S]` |
//!
//! Decision: what is read is checked completely, against the model's facts, before anything is computed:
//! a file may come from anywhere. Also read: `[tiles, 3, H, W]` pixels, i32 integers, f16 and bf16 pixels.
//! Writing goes to a temporary file beside the target which is then renamed: a full disk leaves nothing
//! half-written.
//!
//! Refuses: other ranks and types, no media in a media tensor, sizes that the model cannot take.

use std::sync::Arc;

use std::borrow::Cow;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use super::facts::ModelFacts;
use super::inputs::{ImageInput, ModelInputs, Pixels, VideoInput};
use crate::error::{Error, Result};
use crate::media::ImageSize;

/// The longest side of an original image that `image_sizes` may state, in pixels.
const MAX_IMAGE_SIDE: i64 = 1 << 24;

/// A file of model inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInputs {
    /// For the model.
    pub inputs: ModelInputs,
    /// `[B][S]`, -100 where no loss is wanted.
    pub labels: Option<Vec<Vec<i64>>>,
}

impl ModelInputs {
    /// The contents of a safetensors file with these inputs.
    ///
    /// # Errors
    /// Rows or videos of different lengths, which no tensor can hold.
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        let length = self.input_ids.first().map_or(0, Vec::len);
        if self.input_ids.iter().any(|row| row.len() != length) {
            return Err(Error::Input(
                "the rows have different lengths, which one tensor cannot hold: turn padding on"
                    .into(),
            ));
        }
        let mut tensors = Vec::new();
        let rows = vec![self.input_ids.len(), length];
        let ids = self.input_ids.iter().flatten().map(|&id| i64::from(id));
        tensors.push(Tensor::of_i64("input_ids", rows.clone(), ids));
        let mask = self
            .attention_mask
            .iter()
            .flatten()
            .map(|&on| i64::from(on));
        tensors.push(Tensor::of_i64("attention_mask", rows, mask));
        if let Some(first) = self.images.first() {
            tensors.push(self.pixel_values(&first.tiles)?);
            let sizes = self.images.iter().flat_map(|image| {
                let size = image.layout.image_size;
                [size.height as i64, size.width as i64]
            });
            tensors.push(Tensor::of_i64(
                "image_sizes",
                vec![self.images.len(), 2],
                sizes,
            ));
        }
        if let Some(first) = self.videos.first() {
            tensors.push(self.pixel_values_videos(&first.frames)?);
        }
        let views = tensors
            .iter()
            .map(Tensor::view)
            .collect::<Result<Vec<_>>>()?;
        serialize(views, None)
            .map_err(|cause| Error::Io(format!("the tensors cannot be written: {cause}")))
    }

    /// Writes [`ModelInputs::to_safetensors`] to `path`, all or nothing.
    ///
    /// # Errors
    /// As `to_safetensors`, or the file cannot be written.
    pub fn write_safetensors(&self, path: &Path) -> Result<()> {
        write_whole(path, &self.to_safetensors()?)
    }

    fn pixel_values(&self, first: &Pixels) -> Result<Tensor<'_>> {
        let most = self
            .images
            .iter()
            .map(|image| image.tiles.count)
            .max()
            .unwrap_or(0);
        let stride = first.stride();
        if self
            .images
            .iter()
            .any(|image| image.tiles.size != first.size)
        {
            return Err(Error::Input(
                "the images' tiles have different sizes, which one tensor cannot hold".into(),
            ));
        }
        let mut data = vec![0.0_f32; self.images.len() * most * stride];
        for (image, out) in self
            .images
            .iter()
            .zip(data.chunks_exact_mut((most * stride).max(1)))
        {
            out[..image.tiles.data.len()].copy_from_slice(&image.tiles.data);
        }
        let shape = vec![
            self.images.len(),
            most,
            3,
            first.size.height,
            first.size.width,
        ];
        Ok(Tensor::of_f32("pixel_values", shape, &data))
    }

    fn pixel_values_videos(&self, first: &Pixels) -> Result<Tensor<'_>> {
        let same = |video: &VideoInput| {
            video.frames.count == first.count && video.frames.size == first.size
        };
        if !self.videos.iter().all(same) {
            return Err(Error::Input(
                "the videos have different numbers of frames, which one tensor cannot hold: take the same number of \
                 frames of each"
                    .into(),
            ));
        }
        if self.videos.iter().any(|video| video.arriving.is_some()) {
            return Err(Error::Input(
                "a video's frames are still being read: wait for the last one".into(),
            ));
        }
        let data: Vec<f32> = self
            .videos
            .iter()
            .flat_map(|video| video.frames.data.iter())
            .copied()
            .collect();
        let shape = vec![
            self.videos.len(),
            first.count,
            3,
            first.size.height,
            first.size.width,
        ];
        Ok(Tensor::of_f32("pixel_values_videos", shape, &data))
    }

    /// Reads the contents of a safetensors file and checks them against the model.
    ///
    /// # Errors
    /// Not safetensors, or tensors that this model cannot take; the sentence names the tensor.
    pub fn from_safetensors(bytes: &[u8], facts: &ModelFacts) -> Result<TensorInputs> {
        let file = SafeTensors::deserialize(bytes).map_err(|cause| {
            Error::Input(format!(
                "the inputs are not a safetensors file, or one cut short ({cause}): make them anew with \
                 `lnv process`"
            ))
        })?;
        let input_ids = rows(&file, "input_ids")?.ok_or_else(|| {
            Error::Input("the inputs have no input_ids: add an i64 tensor [batch, length]".into())
        })?;
        let input_ids = input_ids
            .into_iter()
            .map(|row| row.into_iter().map(token).collect())
            .collect::<Result<Vec<Vec<u32>>>>()?;
        let shape = (input_ids.len(), input_ids.first().map_or(0, Vec::len));
        let attention_mask = match rows(&file, "attention_mask")? {
            None => vec![vec![true; shape.1]; shape.0],
            Some(mask) => read_mask(&mask, shape)?,
        };
        let labels = rows(&file, "labels")?;
        if let Some(labels) = &labels {
            same_shape("labels", labels, shape)?;
        }
        let inputs = ModelInputs {
            input_ids,
            attention_mask,
            images: read_images(&file, facts)?,
            videos: read_videos(&file, facts)?,
        };
        Ok(TensorInputs { inputs, labels })
    }
}

/// Writes `bytes` to `path`: first beside it, then in its place. What is no plain file (a pipe, a device)
/// is written straight.
///
/// # Errors
/// The file cannot be written; nothing is left behind.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |cause: std::io::Error| Error::io("write", path, &cause);
    if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return File::options()
            .write(true)
            .open(path)
            .and_then(|mut file| file.write_all(bytes).and_then(|()| file.flush()))
            .map_err(failed);
    }
    // Through a link to the file itself.
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary: PathBuf = target.with_file_name(name);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&temporary, &target));
    if written.is_err() {
        // Best effort: the first error is the one to tell.
        let _ = std::fs::remove_file(&temporary);
    }
    written.map_err(failed)
}

/// A tensor ready to be written.
struct Tensor<'a> {
    name: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

impl Tensor<'_> {
    fn of_i64(name: &'static str, shape: Vec<usize>, values: impl Iterator<Item = i64>) -> Self {
        Self {
            name,
            dtype: Dtype::I64,
            shape,
            data: values.flat_map(i64::to_le_bytes).collect(),
        }
    }

    fn of_f32(name: &'static str, shape: Vec<usize>, values: &[f32]) -> Self {
        Self {
            name,
            dtype: Dtype::F32,
            shape,
            data: values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        }
    }

    fn view(&self) -> Result<(&str, TensorView<'_>)> {
        let view = TensorView::new(self.dtype, self.shape.clone(), &self.data)
            .map_err(|cause| Error::Io(format!("{} cannot be written: {cause}", self.name)))?;
        Ok((self.name, view))
    }
}

fn wrong(name: &str, what: &str) -> Error {
    Error::Input(format!("the inputs' {name} {what}"))
}

fn find<'a>(file: &SafeTensors<'a>, name: &str) -> Option<TensorView<'a>> {
    file.tensor(name).ok()
}

/// An integer tensor of two axes as rows; `None` where the file has none.
fn rows(file: &SafeTensors<'_>, name: &str) -> Result<Option<Vec<Vec<i64>>>> {
    let Some(view) = find(file, name) else {
        return Ok(None);
    };
    let &[count, length] = view.shape() else {
        return Err(wrong(
            name,
            &format!("has shape {:?}, but must have two axes", view.shape()),
        ));
    };
    if count == 0 || length == 0 {
        return Err(wrong(
            name,
            &format!("has shape {:?}, which holds nothing", view.shape()),
        ));
    }
    let bytes = view.data();
    let values: Vec<i64> = match view.dtype() {
        Dtype::I64 => words::<8>(bytes).map(i64::from_le_bytes).collect(),
        Dtype::I32 => words::<4>(bytes)
            .map(|word| i32::from_le_bytes(word).into())
            .collect(),
        Dtype::BOOL | Dtype::U8 if name == "attention_mask" => {
            bytes.iter().map(|&b| b.into()).collect()
        }
        other => {
            return Err(wrong(
                name,
                &format!("is of type {other:?}, but must be I64"),
            ));
        }
    };
    Ok(Some(
        values.chunks_exact(length).map(<[i64]>::to_vec).collect(),
    ))
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.chunks_exact(N).map(|chunk| {
        let mut word = [0; N];
        word.copy_from_slice(chunk);
        word
    })
}

fn token(id: i64) -> Result<u32> {
    u32::try_from(id).map_err(|_| {
        wrong(
            "input_ids",
            &format!("has the id {id}, which no vocabulary has"),
        )
    })
}

fn same_shape(name: &str, rows: &[Vec<i64>], (count, length): (usize, usize)) -> Result<()> {
    let own = (rows.len(), rows.first().map_or(0, Vec::len));
    if own == (count, length) {
        return Ok(());
    }
    Err(wrong(
        name,
        &format!(
            "has shape [{}, {}], but input_ids has [{count}, {length}]",
            own.0, own.1
        ),
    ))
}

fn read_mask(mask: &[Vec<i64>], shape: (usize, usize)) -> Result<Vec<Vec<bool>>> {
    same_shape("attention_mask", mask, shape)?;
    mask.iter()
        .map(|row| {
            row.iter()
                .map(|&value| match value {
                    0 => Ok(false),
                    1 => Ok(true),
                    other => Err(wrong(
                        "attention_mask",
                        &format!("has the value {other}, but must be 0 or 1"),
                    )),
                })
                .collect()
        })
        .collect()
}

/// A float tensor of pictures: its leading axes, the pictures' size, and the values.
fn pictures(
    view: &TensorView<'_>,
    name: &str,
    facts: &ModelFacts,
) -> Result<(Vec<usize>, ImageSize, Vec<f32>)> {
    let shape = view.shape();
    let &[ref leading @ .., 3, height, width] = shape else {
        return Err(wrong(
            name,
            &format!("has shape {shape:?}, but must end with 3 channels, height and width"),
        ));
    };
    let size = ImageSize::new(height, width);
    if size != ImageSize::square(facts.image_size) {
        return Err(wrong(
            name,
            &format!(
                "has pictures of {width} x {height} pixels, but the vision tower takes {n} x {n}",
                n = facts.image_size
            ),
        ));
    }
    if leading.contains(&0) {
        return Err(wrong(
            name,
            &format!("has shape {shape:?}, which holds no picture: leave it out"),
        ));
    }
    let bytes = view.data();
    let values = match view.dtype() {
        Dtype::F32 => words::<4>(bytes).map(f32::from_le_bytes).collect(),
        Dtype::F16 => words::<2>(bytes)
            .map(|word| half::f16::from_le_bytes(word).to_f32())
            .collect(),
        Dtype::BF16 => words::<2>(bytes)
            .map(|word| half::bf16::from_le_bytes(word).to_f32())
            .collect(),
        other => {
            return Err(wrong(
                name,
                &format!("is of type {other:?}, but must be F32, F16 or BF16"),
            ));
        }
    };
    Ok((leading.to_vec(), size, values))
}

fn read_images(file: &SafeTensors<'_>, facts: &ModelFacts) -> Result<Vec<ImageInput>> {
    let sizes = rows(file, "image_sizes")?;
    let (view, sizes) = match (find(file, "pixel_values"), sizes) {
        (None, None) => return Ok(vec![]),
        (Some(view), Some(sizes)) => (view, sizes),
        (Some(_), None) => {
            return Err(wrong(
                "image_sizes",
                "are missing, without which pixel_values cannot be packed: add an i64 tensor [images, 2]",
            ));
        }
        (None, Some(_)) => {
            return Err(wrong(
                "pixel_values",
                "are missing, but there are image_sizes",
            ));
        }
    };
    let layouts = sizes
        .iter()
        .map(|row| facts.layout(original_size(row)?))
        .collect::<Result<Vec<_>>>()?;
    let (leading, size, values) = pictures(&view, "pixel_values", facts)?;
    let counts: Vec<usize> = layouts.iter().map(|layout| layout.tiles).collect();
    let starts = tile_starts(&leading, &counts)?;
    let stride = 3 * size.area();
    Ok(layouts
        .into_iter()
        .zip(starts)
        .map(|(layout, start)| {
            let tiles = Pixels {
                count: layout.tiles,
                size,
                data: Arc::new(values[start * stride..(start + layout.tiles) * stride].to_vec()),
            };
            ImageInput { tiles, layout }
        })
        .collect())
}

/// The first tile of each image in a tensor of images (`[N, P]`) or of tiles (`[sum]`).
fn tile_starts(leading: &[usize], counts: &[usize]) -> Result<Vec<usize>> {
    match *leading {
        [images, most] => {
            if images != counts.len() {
                let what = format!(
                    "hold {images} images, but there are {} image_sizes",
                    counts.len()
                );
                return Err(wrong("pixel_values", &what));
            }
            if let Some((index, needed)) = counts.iter().enumerate().find(|(_, n)| **n > most) {
                let what =
                    format!("hold {most} tiles for image {index}, but its size needs {needed}");
                return Err(wrong("pixel_values", &what));
            }
            Ok((0..images).map(|image| image * most).collect())
        }
        [tiles] => {
            let needed: usize = counts.iter().sum();
            if tiles != needed {
                let what = format!("hold {tiles} tiles, but the image_sizes need {needed}");
                return Err(wrong("pixel_values", &what));
            }
            Ok(counts
                .iter()
                .scan(0, |at, n| {
                    *at += n;
                    Some(*at - n)
                })
                .collect())
        }
        _ => Err(wrong(
            "pixel_values",
            "must have 4 axes (tiles) or 5 (images, tiles)",
        )),
    }
}

fn original_size(row: &[i64]) -> Result<ImageSize> {
    match *row {
        [h, w] if (1..=MAX_IMAGE_SIDE).contains(&h) && (1..=MAX_IMAGE_SIDE).contains(&w) => {
            Ok(ImageSize::new(h as usize, w as usize))
        }
        [h, w] => Err(wrong(
            "image_sizes",
            &format!("has the height {h} and width {w}, which no image has"),
        )),
        _ => Err(wrong(
            "image_sizes",
            &format!("has {} columns, but must have height and width", row.len()),
        )),
    }
}

fn read_videos(file: &SafeTensors<'_>, facts: &ModelFacts) -> Result<Vec<VideoInput>> {
    let Some(view) = find(file, "pixel_values_videos") else {
        return Ok(vec![]);
    };
    let (leading, size, values) = pictures(&view, "pixel_values_videos", facts)?;
    let &[_, frames] = leading.as_slice() else {
        let what = format!(
            "has shape {:?}, but must be [videos, frames, 3, height, width]",
            view.shape()
        );
        return Err(wrong("pixel_values_videos", &what));
    };
    Ok(values
        .chunks_exact(frames * 3 * size.area())
        .map(|data| Pixels {
            count: frames,
            size,
            data: Arc::new(data.to_vec()),
        })
        .map(VideoInput::from)
        .collect())
}
