//! `LlavaNextVideoModel` and `LlavaNextVideoForConditionalGeneration`: all towers together, weights and
//! arithmetic only. What a request is, how long it may run and which token is picked is the engine's.

use std::cell::{Cell, RefCell};

use lnv_kernels::{Buffer, Device, KvCache, KvDtype, Ops, Vector};

use super::batch::{Batch, DecoderOutput, Keep, Taps};
use super::fingerprint::Fingerprint;
use super::formats::Formats;
use super::language_model::{LanguageModel, OnLayer, default_kv_dtype, pick};
use super::loader::{Loader, Loading, PlannedWeight, Sink};
use super::merge::{Placeholders, check_counts, placeholder_positions};
use super::pack::{PackedRow, packed_rows};
use super::projector::{MultiModalProjector, Pooler};
use super::vision_tower::VisionTower;
use super::weights::Checkpoint;
use crate::config::{
    CheckpointFiles, Dtype, LlavaNextVideoConfig, Quantization, RopeOverride, RopeScaling,
    linear_factor_for_frames,
};
use crate::error::{Error, Result};
use crate::processor::inputs::{ImageInput, ModelInputs, Pixels, VideoInput};

/// How a checkpoint is to be loaded.
#[derive(Clone, Default)]
pub struct LoadOptions<'a> {
    /// The type that matrices are kept and multiplied in, those that are not quantised; `None` for the
    /// stored one (`auto`); when quantising bf16, or f16 for bitsandbytes' formats.
    pub dtype: Option<Dtype>,
    /// Quantise the weights while loading; `None` leaves them as they are stored.
    pub quantization: Option<Quantization>,
    /// The type that keys and values are kept in; `None` for f32 with f32 weights, else bf16.
    pub kv_cache_dtype: Option<KvDtype>,
    /// Where to compute; `None` for what the environment variable `LNV_DEVICE` says, else the processor.
    pub device: Option<Device>,
    /// Rotary scaling instead of the configuration's, and the frames that `auto` is to reckon with.
    pub rope: Option<(RopeOverride, usize)>,
    /// Called with `(bytes loaded, bytes in all)`.
    pub progress: Option<OnBytes<'a>>,
}

/// Called while loading with `(bytes loaded, bytes in all)`.
pub type OnBytes<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// The towers and the decoder (`LlavaNextVideoModel`).
pub struct LlavaNextVideoModel {
    config: LlavaNextVideoConfig,
    formats: Formats,
    ops: Ops,
    weights: Weights,
}

/// Everything that is loaded.
struct Weights {
    vision_tower: VisionTower,
    vision_resampler: Pooler,
    multi_modal_projector: MultiModalProjector,
    image_newline: Vector,
    language_model: LanguageModel,
}

impl Weights {
    fn load(
        loader: &Loader<'_>,
        config: &LlavaNextVideoConfig,
        kv_dtype: Option<KvDtype>,
    ) -> Result<Self> {
        let kv_dtype = kv_dtype.unwrap_or_else(|| default_kv_dtype(loader.dtype()));
        let d = config.text_config.hidden_size;
        Ok(Self {
            vision_tower: VisionTower::load(loader, config)?,
            vision_resampler: Pooler::load(loader, config)?,
            multi_modal_projector: MultiModalProjector::load(loader, config)?,
            image_newline: loader.vector("image_newline", d)?,
            language_model: LanguageModel::load(loader, &config.text_config, kv_dtype)?,
        })
    }
}

/// Token embeddings with the media merged in, rows of the batch one after another, padding left out.
pub struct InputsEmbeds {
    /// `[tokens, D]`.
    pub embeds: Buffer,
    /// The rows of the batch.
    pub rows: Vec<EmbeddedRow>,
    /// All packed image features, `[image tokens, D]` (`image_hidden_states`).
    pub image_features: Option<Buffer>,
    /// All video features, `[video tokens, D]` (`video_hidden_states`).
    pub video_features: Option<Buffer>,
}

/// The rows of a batch, and the places of its media in all rows one after another.
pub struct Placed {
    /// The rows of the batch.
    pub rows: Vec<EmbeddedRow>,
    /// The places of all image features.
    pub images: Vec<u32>,
    /// The places of all video features.
    pub videos: Vec<u32>,
}

impl Placed {
    /// The ids of all rows, one after another.
    pub fn ids(&self) -> Vec<u32> {
        let ids = self.rows.iter().flat_map(|row| row.ids.iter().copied());
        ids.collect()
    }

    /// The row that a place is in.
    pub fn row_of(&self, place: u32) -> usize {
        self.rows
            .partition_point(|row| row.first <= place as usize)
            .saturating_sub(1)
    }
}

/// One row of a batch without its padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedRow {
    /// Its token ids.
    pub ids: Vec<u32>,
    /// The column that each token had in the padded row.
    pub columns: Vec<u32>,
    /// Its first row in [`InputsEmbeds::embeds`].
    pub first: usize,
}

/// Called while media are encoded with `(pictures done, pictures in all)`.
pub type OnPicture<'a> = &'a mut dyn FnMut(usize, usize) -> Result<()>;

impl LlavaNextVideoModel {
    /// Loads a checkpoint.
    ///
    /// # Errors
    /// A file is missing or malformed, a setting is not supported, a tensor does not fit, or the
    /// device is not there: each named.
    pub fn load(files: &CheckpointFiles, options: &LoadOptions<'_>) -> Result<Self> {
        Self::load_as(LlavaNextVideoConfig::read(files)?, files, options)
    }

    /// Loads a checkpoint's weights under a configuration that was read before, perhaps with the
    /// placeholder ids of its tokenizer.
    ///
    /// # Errors
    /// As [`LlavaNextVideoModel::load`].
    pub fn load_as(
        config: LlavaNextVideoConfig,
        files: &CheckpointFiles,
        options: &LoadOptions<'_>,
    ) -> Result<Self> {
        Self::from_checkpoint(config, &Checkpoint::open(files)?, options)
    }

    /// Loads from a checkpoint that is already open.
    ///
    /// # Errors
    /// As [`LlavaNextVideoModel::load`].
    pub fn from_checkpoint(
        mut config: LlavaNextVideoConfig,
        checkpoint: &Checkpoint,
        options: &LoadOptions<'_>,
    ) -> Result<Self> {
        let formats = Formats::choose(&config, checkpoint, options)?;
        let ops = formats.ops(options.device)?;
        if ops.is_cuda() {
            // Whether this fails is told when the first kernel is wanted.
            let ops = ops.clone();
            std::thread::spawn(move || ops.prepare());
        }
        apply_rope(&mut config, options.rope);
        if config.packed.is_some() {
            checkpoint.read_in_background();
        }
        let how = (&ops, &formats, options.kv_cache_dtype);
        let weights = load_weights(&config, checkpoint, how, options.progress, None)?;
        Ok(Self {
            weights,
            formats,
            ops,
            config,
        })
    }

    /// What loading would make of a checkpoint with this configuration, in the order of loading; reads
    /// nothing.
    ///
    /// # Errors
    /// A dimension that no format takes.
    pub fn plan(config: &LlavaNextVideoConfig, formats: &Formats) -> Result<Vec<PlannedWeight>> {
        let weights = RefCell::default();
        Weights::load(&Loader::plan(formats, &weights), config, None)?;
        Ok(weights.into_inner())
    }

    /// The configuration, with the rotary scaling in force.
    pub fn config(&self) -> &LlavaNextVideoConfig {
        &self.config
    }

    /// The type that matrices are kept in, those that are not quantised.
    pub fn dtype(&self) -> Dtype {
        self.formats.dtype
    }

    /// How the weights are quantised.
    pub fn quantization(&self) -> Option<&Quantization> {
        self.formats.quantization.as_ref()
    }

    /// The device's operations.
    pub fn ops(&self) -> &Ops {
        &self.ops
    }

    /// The vision tower.
    pub fn vision_tower(&self) -> &VisionTower {
        &self.weights.vision_tower
    }

    /// The decoder.
    pub fn language_model(&self) -> &LanguageModel {
        &self.weights.language_model
    }

    /// The name of everything that a picture's features depend on besides the picture. Reads all
    /// weights that pictures go through.
    pub fn vision_fingerprint(&self) -> [u8; 32] {
        let mut to = Fingerprint::new();
        to.setting(&(self.ops.isa(), self.ops.is_cuda()));
        let Weights {
            vision_tower,
            vision_resampler,
            multi_modal_projector,
            image_newline,
            language_model: _,
        } = &self.weights;
        vision_tower.fingerprint(&mut to);
        vision_resampler.fingerprint(&mut to);
        multi_modal_projector.fingerprint(&mut to);
        to.vector(Some(image_newline));
        to.finish()
    }

    /// Bytes of weights in memory.
    pub fn bytes(&self) -> usize {
        self.weights.vision_tower.bytes()
            + self.weights.multi_modal_projector.bytes()
            + self.weights.language_model.bytes().0
    }

    /// The packed features of each image, `[tokens, D]` each, newlines in place.
    ///
    /// # Errors
    /// A tile has the wrong size, or `on_picture` asks to stop.
    pub fn get_image_features(
        &self,
        images: &[ImageInput],
        on_picture: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Buffer>> {
        self.check_layouts(images)?;
        let tiles: Vec<&Pixels> = images.iter().map(|image| &image.tiles).collect();
        let selected = self
            .weights
            .vision_tower
            .forward(&self.ops, &tiles, on_picture)?;
        let projected = self
            .weights
            .multi_modal_projector
            .forward(&self.ops, &selected);
        let mut first = 0;
        let mut packed = Vec::with_capacity(images.len());
        for image in images {
            packed.push(self.pack(&projected, first, image));
            first += image.layout.tiles * self.weights.vision_tower.feature_tokens();
        }
        Ok(packed)
    }

    /// The features of each video, `[frames * tokens a frame, D]` each, frame by frame.
    ///
    /// # Errors
    /// A frame has the wrong size, or `on_picture` asks to stop.
    pub fn get_video_features(
        &self,
        videos: &[VideoInput],
        on_picture: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Buffer>> {
        let frames: Vec<&Pixels> = videos.iter().map(|video| &video.frames).collect();
        let selected = self
            .weights
            .vision_tower
            .forward(&self.ops, &frames, on_picture)?;
        let projected = self.project_frames(&selected)?;
        let mut first = 0;
        let mut features = Vec::with_capacity(videos.len());
        for video in videos {
            let rows = video.frames.count * self.weights.vision_resampler.tokens();
            features.push(pick(&self.ops, &projected, &numbers(first, rows)));
            first += rows;
        }
        Ok(features)
    }

    /// Selected features of whole frames, pooled and projected: `[frames * tokens a frame, D]`.
    ///
    /// # Errors
    /// The rows are not whole frames.
    pub fn project_frames(&self, selected: &Buffer) -> Result<Buffer> {
        let pooled = self.weights.vision_resampler.forward(&self.ops, selected)?;
        Ok(self
            .weights
            .multi_modal_projector
            .forward(&self.ops, &pooled))
    }

    /// Selected features of an image's tiles, projected and packed: `[tokens, D]`.
    pub fn project_image(&self, selected: &Buffer, image: &ImageInput) -> Buffer {
        let projected = self
            .weights
            .multi_modal_projector
            .forward(&self.ops, selected);
        self.pack(&projected, 0, image)
    }

    /// The rows of a batch without padding, and where its media stand; nothing is computed.
    ///
    /// # Errors
    /// An id is outside the vocabulary, media and placeholders do not match, or pictures do not fit the
    /// tower.
    pub fn place(&self, inputs: &ModelInputs) -> Result<Placed> {
        let rows = unpad_rows(&inputs.input_ids, &inputs.attention_mask)?;
        let mut placed = Placed {
            rows,
            images: Vec::new(),
            videos: Vec::new(),
        };
        let ids = placed.ids();
        self.check_ids(&ids)?;
        self.check_layouts(&inputs.images)?;
        let tiles = inputs.images.iter().map(|image| &image.tiles);
        let frames = inputs.videos.iter().map(|video| &video.frames);
        let pixels: Vec<&Pixels> = tiles.chain(frames).collect();
        self.weights.vision_tower.check(&pixels)?;
        let image_lengths: Vec<usize> = inputs
            .images
            .iter()
            .map(|image| image.layout.feature_tokens())
            .collect();
        let video_lengths: Vec<usize> = inputs
            .videos
            .iter()
            .map(|video| video.frames.count * self.weights.vision_resampler.tokens())
            .collect();
        let places = |id: u32, modality: &'static str, lengths: &[usize]| -> Result<Vec<u32>> {
            if lengths.is_empty() {
                // Without media the ids are ordinary tokens, as in the reference.
                return Ok(Vec::new());
            }
            let positions = placeholder_positions(&ids, id);
            let row_of = |position: u32| placed.row_of(position);
            let kind = Placeholders {
                token_id: id,
                modality,
            };
            check_counts(kind, &positions, lengths, &row_of)?;
            Ok(positions)
        };
        let images = places(self.config.image_token_index, "Image", &image_lengths)?;
        let videos = places(self.config.video_token_index, "Video", &video_lengths)?;
        (placed.images, placed.videos) = (images, videos);
        Ok(placed)
    }

    /// Embeds the ids of a batch and merges its media: everything before the decoder.
    ///
    /// # Errors
    /// An id is outside the vocabulary, media and placeholders do not match, or `on_picture` asks to
    /// stop.
    pub fn embed(&self, inputs: &ModelInputs, on_picture: OnPicture<'_>) -> Result<InputsEmbeds> {
        let placed = self.place(inputs)?;
        let ids = placed.ids();
        let mut embeds = self.weights.language_model.embed(&self.ops, &ids);
        let images: usize = inputs.images.iter().map(|image| image.tiles.count).sum();
        let all = images + inputs.frames();

        let mut image_features = None;
        if !inputs.images.is_empty() {
            let features = self.get_image_features(&inputs.images, &mut |n| on_picture(n, all))?;
            image_features = Some(self.merge(&features, &placed.images, &mut embeds));
        }
        let mut video_features = None;
        if !inputs.videos.is_empty() {
            let features =
                self.get_video_features(&inputs.videos, &mut |n| on_picture(images + n, all))?;
            video_features = Some(self.merge(&features, &placed.videos, &mut embeds));
        }
        Ok(InputsEmbeds {
            embeds,
            rows: placed.rows,
            image_features,
            video_features,
        })
    }

    /// Runs embedded tokens through the decoder.
    ///
    /// # Errors
    /// `on_layer` asks to stop.
    pub fn decode(
        &self,
        embeds: Buffer,
        batch: &Batch<'_>,
        cache: &mut KvCache,
        read: (Keep, Taps),
        on_layer: OnLayer<'_>,
    ) -> Result<DecoderOutput> {
        self.weights
            .language_model
            .forward(&self.ops, embeds, batch, cache, read, on_layer)
    }

    /// Joins the features of all media and writes them over their placeholders.
    fn merge(&self, features: &[Buffer], places: &[u32], embeds: &mut Buffer) -> Buffer {
        let rows: usize = features.iter().map(Buffer::rows).sum();
        let mut joined = self.ops.buffer(rows, embeds.cols());
        let mut first = 0;
        for own in features {
            let n = own.rows();
            self.ops
                .copy_rows(own, &numbers(0, n), &mut joined, &numbers(first, n));
            first += n;
        }
        self.ops
            .copy_rows(&joined, &numbers(0, rows), embeds, places);
        joined
    }

    /// Packs one image out of the projected tiles, which start at row `first`.
    fn pack(&self, projected: &Buffer, first: usize, image: &ImageInput) -> Buffer {
        let order = packed_rows(&image.layout);
        let (mut from, mut to, mut newlines) = (Vec::new(), Vec::new(), Vec::new());
        for (i, row) in order.iter().enumerate() {
            match row {
                PackedRow::Feature(f) => {
                    from.push(first as u32 + f);
                    to.push(i as u32);
                }
                PackedRow::Newline => newlines.push(i as u32),
            }
        }
        let mut out = self.ops.buffer(order.len(), projected.cols());
        self.ops.copy_rows(projected, &from, &mut out, &to);
        self.ops
            .broadcast_row(&self.weights.image_newline, &mut out, &newlines);
        out
    }

    fn check_layouts(&self, images: &[ImageInput]) -> Result<()> {
        let side = self.config.vision_config.patches_per_side();
        for image in images {
            let layout = &image.layout;
            if layout.patches_per_side != side
                || image.tiles.count < layout.tiles
                || layout.tiles != 1 + layout.grid.rows * layout.grid.cols
            {
                return Err(Error::Input(format!(
                    "an image of {} tiles of {} x {} patches does not fit the model, which takes \
                     {} tiles of {side} x {side}: check the sizes in preprocessor_config.json",
                    image.tiles.count,
                    layout.patches_per_side,
                    layout.patches_per_side,
                    layout.tiles
                )));
            }
        }
        Ok(())
    }

    pub(super) fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocabulary = self.config.text_config.vocab_size;
        match ids.iter().find(|id| **id as usize >= vocabulary) {
            None => Ok(()),
            Some(id) => Err(Error::Input(format!(
                "token id {id} is outside the model's vocabulary of {vocabulary}: the tokenizer \
                 and the weights are not of one model"
            ))),
        }
    }
}

/// Packs all weights and hands each to `sink`, keeping none.
pub(super) fn write_weights(
    config: &LlavaNextVideoConfig,
    checkpoint: &Checkpoint,
    (ops, formats): (&Ops, &Formats),
    sink: Sink<'_>,
) -> Result<()> {
    let how = (ops, formats, None);
    load_weights(config, checkpoint, how, None, Some(sink)).map(drop)
}

/// Loads all weights; with a sink, each goes there and the model that comes out is empty.
fn load_weights(
    config: &LlavaNextVideoConfig,
    checkpoint: &Checkpoint,
    (ops, formats, kv_dtype): (&Ops, &Formats, Option<KvDtype>),
    progress: Option<OnBytes<'_>>,
    sink: Option<Sink<'_>>,
) -> Result<Weights> {
    let plan = LlavaNextVideoModel::plan(config, formats)?;
    let packed = config.packed.is_some();
    let stored = |weight: &PlannedWeight| -> usize {
        match packed {
            true => checkpoint.stored_bytes(&weight.name),
            false => weight
                .tensors
                .iter()
                .map(|name| checkpoint.stored_bytes(name))
                .sum(),
        }
    };
    let total = plan.iter().map(stored).sum();
    let done = Cell::new(0);
    let on_bytes = |bytes: usize| {
        done.set(done.get() + bytes);
        if let Some(report) = progress {
            report(done.get(), total);
        }
    };
    let loading = Loading::new(ops, checkpoint, (plan, packed), &on_bytes);
    Weights::load(&Loader::new(formats, &loading, sink), config, kv_dtype)
}

fn apply_rope(config: &mut LlavaNextVideoConfig, rope: Option<(RopeOverride, usize)>) {
    let factor = match rope {
        None => None,
        Some((RopeOverride::Linear(factor), _)) => Some(factor),
        Some((RopeOverride::Auto, frames)) => {
            linear_factor_for_frames(frames, config.tokens_per_frame())
        }
    };
    if let Some(factor) = factor {
        config.text_config.rope.scaling = RopeScaling::Linear { factor };
    }
}

/// So many row numbers, from `first` on.
pub(crate) fn numbers(first: usize, n: usize) -> Vec<u32> {
    (first as u32..(first + n) as u32).collect()
}

/// Leaves out what the mask hides.
pub(super) fn unpad_rows(ids: &[Vec<u32>], masks: &[Vec<bool>]) -> Result<Vec<EmbeddedRow>> {
    let mut rows = Vec::with_capacity(ids.len());
    let mut first = 0;
    for (ids, mask) in ids.iter().zip(masks) {
        let kept = || ids.iter().zip(mask).enumerate().filter(|(_, (_, m))| **m);
        let row = EmbeddedRow {
            ids: kept().map(|(_, (id, _))| *id).collect(),
            columns: kept().map(|(i, _)| i as u32).collect(),
            first,
        };
        if row.ids.is_empty() {
            return Err(Error::Input(format!(
                "row {} of the batch has no token: every prompt needs at least one",
                rows.len() + 1
            )));
        }
        first += row.ids.len();
        rows.push(row);
    }
    if rows.is_empty() {
        return Err(Error::Input(
            "the batch is empty: give at least one prompt".into(),
        ));
    }
    Ok(rows)
}
