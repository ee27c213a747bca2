//! A request inside the engine: its sequences, its pictures, its strategy, and how far it has come.
//!
//! Decision: everything that costs time and needs no model (checking, resolving options, digests of
//! pixels) is done by [`Prepared::new`], on the caller's thread. Whether a job waits or runs is the
//! engine's to know; a job that is put back to wait keeps its sequences and loses only their blocks.

use std::sync::Arc;

use lnv_kernels::{Buffer, KV_BLOCK};

use super::beam::Beams;
use super::constraint::Constraints;
use super::prefix::{Chain, Digest, RowPictures, image_digest, picture_digest};
use super::request::{GenerationOptions, Resolved, Timings};
use super::sequence::Sequence;
use super::strategy::{Continuation, Pick, Strategy};
use super::{RequestId, check_context};
use crate::config::GenerationConfig;
use crate::error::Result;
use crate::model::{LlavaNextVideoModel, Placed};
use crate::processor::inputs::{ImageInput, ModelInputs, VideoInput};

/// A request, checked and ready to run.
pub struct Prepared {
    options: Arc<Resolved>,
    constraints: Option<Arc<dyn Constraints>>,
    sequences: Vec<Sequence>,
    units: Vec<Unit>,
    images: Vec<ImageInput>,
    videos: Vec<VideoInput>,
}

/// One unit of sight, which a digest names: a frame or an image.
pub(crate) struct Unit {
    pub row: usize,
    /// Where its features stand in the row, in order.
    pub positions: Vec<u32>,
    pub digest: Digest,
    pub source: Source,
    /// Once they are known and until they have been read.
    pub features: Option<Arc<Buffer>>,
    /// Whether they were looked for on disk in vain.
    pub not_on_disk: bool,
}

/// Where a unit's pixels are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Image(usize),
    Frame { video: usize, frame: usize },
}

impl Prepared {
    /// Checks a request against the model, and names its prompt and pictures.
    ///
    /// # Errors
    /// The options are nonsense, the inputs do not fit the model, or a prompt is longer than the context.
    pub fn new(
        model: &LlavaNextVideoModel,
        defaults: &GenerationConfig,
        inputs: ModelInputs,
        options: &GenerationOptions,
        constraints: Option<Arc<dyn Constraints>>,
    ) -> Result<Self> {
        let text = &model.config().text_config;
        let columns = inputs.input_ids.first().map_or(0, Vec::len);
        let options = Arc::new(options.resolve(defaults, text, columns)?);
        let placed = model.place(&inputs)?;
        check_context(&placed.rows, text)?;
        let units = units(&placed, &inputs);
        let longest = placed.rows.iter().map(|row| row.ids.len()).max();
        let longest = longest.unwrap_or(0);
        let sequence = |(row, embedded): (usize, crate::model::EmbeddedRow)| {
            let mut pictures = RowPictures::default();
            for unit in units.iter().filter(|unit| unit.row == row) {
                pictures.push(unit.digest, &unit.positions);
            }
            pictures.sort();
            Sequence {
                row,
                prompt: embedded.ids.len(),
                behind_longest: longest - embedded.ids.len(),
                chain: Chain::new(&embedded.ids, Arc::new(pictures)),
                ids: embedded.ids,
                ..Sequence::default()
            }
        };
        let sequences = placed.rows.into_iter().enumerate().map(sequence).collect();
        Ok(Self {
            options,
            constraints,
            sequences,
            units,
            images: inputs.images,
            videos: inputs.videos,
        })
    }

    /// Sequences that it will decode at once.
    pub fn sequences(&self) -> usize {
        self.sequences.len() * copies(&self.options)
    }

    /// Cache blocks that its prompts take.
    pub fn blocks(&self) -> usize {
        let blocks = |sequence: &Sequence| sequence.ids.len().div_ceil(KV_BLOCK);
        self.sequences.iter().map(blocks).sum()
    }
}

/// What is placed where, picture by picture.
fn units(placed: &Placed, inputs: &ModelInputs) -> Vec<Unit> {
    let mut units = Vec::new();
    let mut unit = |places: &[u32], digest: Digest, source: Source| {
        let row = placed.row_of(places.first().copied().unwrap_or(0));
        let first = placed.rows[row].first as u32;
        units.push(Unit {
            row,
            positions: places.iter().map(|place| place - first).collect(),
            digest,
            source,
            features: None,
            not_on_disk: false,
        });
    };
    let mut places = placed.images.as_slice();
    for (i, image) in inputs.images.iter().enumerate() {
        let (own, rest) = places.split_at(image.layout.feature_tokens());
        places = rest;
        unit(own, image_digest(image), Source::Image(i));
    }
    let frames: usize = inputs.videos.iter().map(|video| video.frames.count).sum();
    let per_frame = placed.videos.len() / frames.max(1);
    let mut places = placed.videos.chunks(per_frame.max(1));
    for (video, input) in inputs.videos.iter().enumerate() {
        for frame in 0..input.frames.count {
            let digest = picture_digest(&input.frames, frame);
            let source = Source::Frame { video, frame };
            unit(places.next().unwrap_or_default(), digest, source);
        }
    }
    units
}

fn copies(options: &Resolved) -> usize {
    match options.num_beams {
        0 | 1 => options.num_return_sequences,
        beams => beams,
    }
}

/// What a job does when it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Its uncached tokens go through the decoder, as far as their pictures are known.
    Prefill,
    /// Its sequences grow by a token a step.
    Decode,
}

/// A request in the engine.
pub(crate) struct Job {
    pub id: RequestId,
    pub client: u64,
    /// When it began to run, counted in jobs: the last is put back first.
    pub admitted: u64,
    pub stage: Stage,
    pub sequences: Vec<Sequence>,
    /// What is known of the next token of each sequence; empty where nothing is.
    pub scores: Vec<Vec<f32>>,
    pub units: Vec<Unit>,
    pub images: Vec<ImageInput>,
    pub videos: Vec<VideoInput>,
    pub strategy: Box<dyn Strategy + Send>,
    /// Answers a row; made from the rows when their prompts are through.
    pub copies: usize,
    pub forked: bool,
    pub cancelled: bool,
    pub prompt_tokens: Vec<usize>,
    /// Prompt tokens found in the cache when it first ran.
    pub cached_tokens: usize,
    pub timings: Timings,
    /// Prompt tokens times layers: done, and in all.
    pub prefilled: (usize, usize),
    /// Pictures: seen, and to be seen.
    pub seen: (usize, usize),
}

impl Job {
    pub fn new(id: RequestId, client: u64, prepared: Prepared) -> Self {
        let Prepared {
            options,
            constraints,
            sequences,
            units,
            images,
            videos,
        } = prepared;
        let (rows, copies) = (sequences.len(), copies(&options));
        let strategy: Box<dyn Strategy + Send> = match options.num_beams > 1 {
            true => Box::new(Beams::new(options, rows)),
            false => Box::new(Pick::new(options, rows * copies, constraints.as_deref())),
        };
        Self {
            id,
            client,
            admitted: 0,
            stage: Stage::Prefill,
            scores: vec![Vec::new(); rows],
            prompt_tokens: sequences.iter().map(|s| s.prompt).collect(),
            sequences,
            units,
            images,
            videos,
            strategy,
            copies,
            forked: false,
            cancelled: false,
            cached_tokens: 0,
            timings: Timings::default(),
            prefilled: (0, 0),
            seen: (0, 0),
        }
    }

    /// Sequences that it decodes at once, now or later.
    pub fn width(&self) -> usize {
        match self.forked {
            true => self.sequences.len(),
            false => self.sequences.len() * self.copies,
        }
    }

    /// The continuations that make each row into its answers.
    pub fn copies_of_rows(&self) -> Vec<Continuation> {
        (0..self.sequences.len() * self.copies)
            .map(|i| Continuation {
                parent: i / self.copies,
                token: 0,
            })
            .collect()
    }

    /// How many tokens of a sequence can go through the decoder by now: up to the first that stands for a
    /// picture whose features are not known.
    pub fn ready(&self, sequence: &Sequence) -> usize {
        self.units
            .iter()
            .filter(|unit| unit.row == sequence.row && unit.features.is_none())
            .filter_map(|unit| first_from(&unit.positions, sequence.cached))
            .min()
            .unwrap_or(sequence.ids.len())
    }

    /// The units that are to be seen: their features are not known, and somebody will read them.
    pub fn unseen(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.units.len()).filter(|unit| {
            let unit = &self.units[*unit];
            unit.features.is_none() && self.reads(unit)
        })
    }

    /// Whether a token that stands for the unit still has to go through the decoder.
    pub fn reads(&self, unit: &Unit) -> bool {
        let reads =
            |s: &Sequence| s.row == unit.row && first_from(&unit.positions, s.cached).is_some();
        self.sequences.iter().any(reads)
    }

    /// Pictures of a unit.
    pub fn pictures(&self, unit: &Unit) -> usize {
        match unit.source {
            Source::Frame { .. } => 1,
            Source::Image(image) => self.images[image].layout.tiles,
        }
    }

    /// The pixels of a unit's picture.
    pub fn pixels(&self, unit: &Unit, picture: usize) -> &[f32] {
        let (pixels, index) = match unit.source {
            Source::Frame { video, frame } => (&self.videos[video].frames, frame),
            Source::Image(image) => (&self.images[image].tiles, picture),
        };
        let stride = pixels.stride();
        &pixels.data[index * stride..(index + 1) * stride]
    }
}

/// The first of `positions` that is not before `start`.
pub(crate) fn first_from(positions: &[u32], start: usize) -> Option<usize> {
    let index = positions.partition_point(|position| (*position as usize) < start);
    positions.get(index).map(|position| *position as usize)
}
