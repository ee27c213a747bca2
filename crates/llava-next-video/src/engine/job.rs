//! A request inside the engine: its sequences, its pictures, its strategy, and how far it has come.
//!
//! Decision: everything that costs time and needs no model (checking, resolving options, digests of
//! pixels) is done by [`Prepared::new`], on the caller's thread; only frames that arrive later are named on the
//! engine's, in some tenths of a millisecond each. Whether a job waits or runs is the
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
use crate::processor::arriving::Arriving;
use crate::processor::inputs::{ImageInput, ModelInputs, Pixels};

/// A request, checked and ready to run.
pub struct Prepared {
    options: Arc<Resolved>,
    constraints: Option<Arc<dyn Constraints>>,
    sequences: Vec<Sequence>,
    units: Vec<Unit>,
    coming: Vec<Coming>,
}

/// One unit of sight: a frame or an image.
pub(crate) struct Unit {
    pub row: usize,
    /// Where its features stand in the row, in order.
    pub positions: Vec<u32>,
    /// Once it is there.
    pub picture: Option<Picture>,
    /// Once they are known and until they have been read.
    pub features: Option<Arc<Buffer>>,
    /// Whether they were looked for on disk in vain.
    pub not_on_disk: bool,
}

impl Unit {
    /// How many pictures the tower sees for it.
    pub fn pictures(&self) -> usize {
        match self.picture.as_ref().map(|picture| &picture.source) {
            Some(Source::Image(image)) => image.layout.tiles,
            Some(Source::Frame(..)) | None => 1,
        }
    }
}

/// What is to be seen, and its name.
pub(crate) struct Picture {
    pub digest: Digest,
    pub source: Source,
}

/// Pixels, shared with whoever made them.
pub(crate) enum Source {
    Image(ImageInput),
    /// One picture of a stack.
    Frame(Pixels, usize),
}

impl Picture {
    fn image(image: &ImageInput) -> Self {
        Self {
            digest: image_digest(image),
            source: Source::Image(image.clone()),
        }
    }

    fn frame(stack: &Pixels, index: usize) -> Self {
        Self {
            digest: picture_digest(stack, index),
            source: Source::Frame(stack.clone(), index),
        }
    }
}

/// A video whose frames are not all there.
struct Coming {
    video: Arriving,
    /// The unit of the next frame, and how many came before it.
    next: usize,
    taken: usize,
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
        let (units, coming) = units(&placed, &inputs);
        let longest = placed.rows.iter().map(|row| row.ids.len()).max();
        let longest = longest.unwrap_or(0);
        let sequence = |(row, embedded): (usize, crate::model::EmbeddedRow)| {
            let mut pictures = RowPictures::default();
            for unit in units.iter().filter(|unit| unit.row == row) {
                let digest = unit.picture.as_ref().map(|picture| picture.digest);
                pictures.push(digest, &unit.positions);
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
            coming,
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

/// What is placed where, picture by picture, and the videos whose frames are not all there.
fn units(placed: &Placed, inputs: &ModelInputs) -> (Vec<Unit>, Vec<Coming>) {
    let (mut units, mut coming) = (Vec::new(), Vec::new());
    let unit = |places: &[u32], picture: Option<Picture>| {
        let row = placed.row_of(places.first().copied().unwrap_or(0));
        let first = placed.rows[row].first as u32;
        Unit {
            row,
            positions: places.iter().map(|place| place - first).collect(),
            picture,
            features: None,
            not_on_disk: false,
        }
    };
    let mut places = placed.images.as_slice();
    for image in &inputs.images {
        let (own, rest) = places.split_at(image.layout.feature_tokens());
        places = rest;
        units.push(unit(own, Some(Picture::image(image))));
    }
    let per_frame = placed.videos.len() / inputs.frames().max(1);
    let mut places = placed.videos.chunks(per_frame.max(1));
    for video in &inputs.videos {
        coming.extend(video.arriving.clone().map(|video| Coming {
            video,
            next: units.len(),
            taken: 0,
        }));
        let here = video.arriving.is_none();
        for frame in 0..video.frames.count {
            let picture = here.then(|| Picture::frame(&video.frames, frame));
            units.push(unit(places.next().unwrap_or_default(), picture));
        }
    }
    (units, coming)
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
    coming: Vec<Coming>,
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
            coming,
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
            coming,
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

    /// Whether frames are still to come.
    pub fn is_arriving(&self) -> bool {
        !self.coming.is_empty()
    }

    /// Takes the frames that have come.
    ///
    /// # Errors
    /// No more will come, but not all are there.
    pub fn arrive(&mut self) -> Result<()> {
        let mut left = Vec::new();
        for mut coming in std::mem::take(&mut self.coming) {
            let (frames, more) = coming.video.behind(coming.taken)?;
            for frame in &frames {
                let picture = Picture::frame(frame, 0);
                let unit = &mut self.units[coming.next];
                for sequence in self.sequences.iter_mut().filter(|s| s.row == unit.row) {
                    let at = unit.positions.first().copied().unwrap_or_default();
                    sequence.chain.arrive(at, picture.digest, &sequence.ids);
                }
                unit.picture = Some(picture);
                coming.next += 1;
            }
            coming.taken += frames.len();
            if more {
                left.push(coming);
            }
        }
        self.coming = left;
        Ok(())
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

    /// The units that are there to be seen: their features are not known, and somebody will read them.
    pub fn unseen(&self) -> impl Iterator<Item = (usize, &Picture)> + '_ {
        let units = self.units.iter().enumerate();
        units
            .filter(|(_, unit)| unit.features.is_none() && self.reads(unit))
            .filter_map(|(index, unit)| Some((index, unit.picture.as_ref()?)))
    }

    /// Those of them that must be encoded: where features are `stored`, only once they were looked for in vain.
    pub fn to_encode(&self, stored: bool) -> impl Iterator<Item = &Picture> + '_ {
        let unseen = self.unseen();
        unseen
            .filter(move |(unit, _)| !stored || self.units[*unit].not_on_disk)
            .map(|(_, picture)| picture)
    }

    /// Marks a picture that the disk does not have.
    pub fn mark_not_on_disk(&mut self, digest: &Digest) {
        for unit in &mut self.units {
            let picture = unit.picture.as_ref();
            unit.not_on_disk |= picture.is_some_and(|picture| picture.digest == *digest);
        }
    }

    /// The unseen by name.
    pub fn unseen_digests(&self) -> Vec<(usize, Digest)> {
        let name = |(unit, picture): (usize, &Picture)| (unit, picture.digest);
        self.unseen().map(name).collect()
    }

    /// Pictures that are to be seen, here or still to come.
    pub fn pictures_to_see(&self) -> usize {
        let units = self.units.iter();
        units
            .filter(|unit| unit.features.is_none() && self.reads(unit))
            .map(Unit::pictures)
            .sum()
    }

    /// Whether a token that stands for the unit still has to go through the decoder.
    pub fn reads(&self, unit: &Unit) -> bool {
        let reads =
            |s: &Sequence| s.row == unit.row && first_from(&unit.positions, s.cached).is_some();
        self.sequences.iter().any(reads)
    }
}

/// The first of `positions` that is not before `start`.
pub(crate) fn first_from(positions: &[u32], start: usize) -> Option<usize> {
    let index = positions.partition_point(|position| (*position as usize) < start);
    positions.get(index).map(|position| *position as usize)
}
