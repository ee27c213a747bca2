//! The one loop of the program: embed, prefill in chunks, then decode step by step what the strategy
//! lets go on.
//!
//! The engine owns the cache and its blocks. Sequences that share a beginning share its blocks; a block
//! is copied before one of several owners writes to it. It knows pixels only as inputs that it hands to
//! the model, and text only through [`TokenText`].

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use lnv_kernels::{Buffer, KV_BLOCK, KvCache};

use super::beam::Beams;
use super::block_manager::BlockManager;
use super::request::{Event, Generation, GenerationOptions, Resolved, Timings};
use super::sequence::{MediaSpan, Sequence};
use super::stop::TokenText;
use super::strategy::{Continuation, Pick, Strategy};
use crate::config::{GenerationConfig, RopeScaling, TextConfig};
use crate::error::{Error, Result};
use crate::model::{Batch, BatchSpan, Keep, LlavaNextVideoModel, Taps};
use crate::processor::inputs::{ModelInputs, Pixels};

/// Prompt tokens that go through the decoder together: enough to keep the kernels busy, few enough
/// that the activations of a long video stay small.
const PREFILL_CHUNK: usize = 2048;

/// What a caller is told while a call runs.
pub type OnEvent<'a> = &'a mut (dyn FnMut(Event) -> ControlFlow<()> + Send);

/// Runs requests on one model.
pub struct Engine {
    model: Arc<LlavaNextVideoModel>,
    defaults: GenerationConfig,
    cache: KvCache,
    blocks: BlockManager,
    prefill_chunk: usize,
    timings: Timings,
}

/// What a chat keeps between its turns: the sequence so far, and which media stand in it.
#[derive(Debug, Default)]
pub struct Session {
    sequence: Sequence,
    media: Vec<MediaSpan>,
}

impl Engine {
    /// An engine without sequences; the cache grows with need.
    pub fn new(model: Arc<LlavaNextVideoModel>, defaults: GenerationConfig) -> Self {
        Self {
            cache: model.language_model().new_cache(0),
            blocks: BlockManager::default(),
            prefill_chunk: PREFILL_CHUNK,
            timings: Timings::default(),
            model,
            defaults,
        }
    }

    /// The model.
    pub fn model(&self) -> &LlavaNextVideoModel {
        &self.model
    }

    /// Sets how many prompt tokens go through the decoder together; at least 1. Default 2048.
    pub fn set_prefill_chunk(&mut self, tokens: usize) {
        self.prefill_chunk = tokens.max(1);
    }

    /// Bytes of the cache.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Blocks in use.
    pub fn blocks_in_use(&self) -> usize {
        self.blocks.capacity() - self.blocks.free_blocks()
    }

    /// Answers every row of a batch.
    ///
    /// # Errors
    /// The options are nonsense, the inputs do not fit the model, or a prompt is longer than the
    /// context. A stop asked for by `on_event` is no error: what there is comes back.
    pub fn generate(
        &mut self,
        inputs: &ModelInputs,
        options: &GenerationOptions,
        text: &dyn TokenText,
        on_event: OnEvent<'_>,
    ) -> Result<Generation> {
        let columns = inputs.input_ids.first().map_or(0, Vec::len);
        let options = options.resolve(&self.defaults, &self.model.config().text_config, columns)?;
        let rows = prompt_rows(inputs);
        check_context(&rows, &self.model.config().text_config)?;
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        let sequence = |(row, ids): (usize, Vec<u32>)| Sequence {
            row,
            prompt: ids.len(),
            behind_longest: longest - ids.len(),
            ids,
            ..Sequence::default()
        };
        let mut sequences: Vec<Sequence> = rows.into_iter().enumerate().map(sequence).collect();
        let result = self.run(&mut sequences, inputs, &options, text, on_event);
        for sequence in &sequences {
            self.blocks.release(&sequence.blocks);
        }
        result
    }

    /// Answers one row and keeps its keys and values in `session`, so that the next turn of the same
    /// conversation runs only what is new: text, and media too.
    ///
    /// # Errors
    /// As [`Engine::generate`]; beams and several answers are refused.
    pub fn generate_in_session(
        &mut self,
        session: &mut Session,
        inputs: &ModelInputs,
        options: &GenerationOptions,
        text: &dyn TokenText,
        on_event: OnEvent<'_>,
    ) -> Result<Generation> {
        let columns = inputs.input_ids.first().map_or(0, Vec::len);
        let options = options.resolve(&self.defaults, &self.model.config().text_config, columns)?;
        if inputs.input_ids.len() != 1 || options.num_beams * options.num_return_sequences != 1 {
            return Err(Error::Input(
                "a chat has one row, one beam and one answer".into(),
            ));
        }
        let rows = prompt_rows(inputs);
        check_context(&rows, &self.model.config().text_config)?;
        let ids = rows.into_iter().next().unwrap_or_default();
        let media = media_spans(&ids, inputs, self.model.config());
        let (prefix, rest) = self.reuse(session, ids, &media, inputs);
        let mut sequences = vec![prefix];
        let result = self.run(&mut sequences, &rest, &options, text, on_event);
        // Whatever happened, what is in the cache stays usable.
        session.sequence = sequences.pop().unwrap_or_default();
        session.media = media;
        if let Ok(generation) = &result {
            let ids = generation.completions.first().map_or(&[][..], |c| &c.ids);
            session.sequence.ids.truncate(session.sequence.prompt);
            session.sequence.ids.extend_from_slice(ids);
        }
        result
    }

    /// Gives a session's blocks back.
    pub fn forget(&mut self, session: &mut Session) {
        self.blocks.release(&session.sequence.blocks);
        *session = Session::default();
    }

    /// Splits a new prompt into what the session's cache already holds and what is to be run.
    fn reuse(
        &mut self,
        session: &mut Session,
        ids: Vec<u32>,
        media: &[MediaSpan],
        inputs: &ModelInputs,
    ) -> (Sequence, ModelInputs) {
        let old = std::mem::take(&mut session.sequence);
        let scaling = &self.model.config().text_config.rope;
        let same = old.ids.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        // The last token is run again for its logits.
        let mut keep = same.min(old.cached).min(ids.len().saturating_sub(1));
        if scaling.depends_on_length() {
            keep = 0;
        }
        for (i, span) in media.iter().enumerate() {
            let differs = session.media.get(i) != Some(span);
            if span.start < keep && (differs || keep < span.start + span.len) {
                keep = span.start;
            }
        }
        let blocks = keep.div_ceil(KV_BLOCK);
        let (kept, freed) = old.blocks.split_at(blocks.min(old.blocks.len()));
        self.blocks.release(freed);
        let row = ids[keep..].to_vec();
        let held = media.iter().filter(|span| span.start < keep);
        let (images, videos) = held.fold((0, 0), |(i, v), span| {
            match ids[span.start] == self.model.config().image_token_index {
                true => (i + 1, v),
                false => (i, v + 1),
            }
        });
        let rest = ModelInputs {
            attention_mask: vec![vec![true; row.len()]],
            input_ids: vec![row],
            images: inputs.images[images..].to_vec(),
            videos: inputs.videos[videos..].to_vec(),
        };
        let prompt = ids.len();
        (
            Sequence {
                ids,
                prompt,
                cached: keep,
                blocks: kept.to_vec(),
                ..Sequence::default()
            },
            rest,
        )
    }

    /// Runs `sequences`, whose uncached tokens are the rows of `inputs`.
    fn run(
        &mut self,
        sequences: &mut Vec<Sequence>,
        inputs: &ModelInputs,
        options: &Resolved,
        text: &dyn TokenText,
        on_event: OnEvent<'_>,
    ) -> Result<Generation> {
        self.timings = Timings::default();
        let prompt_tokens: Vec<usize> = sequences.iter().map(|s| s.prompt).collect();
        let cached_tokens = sequences.iter().map(|s| s.cached).sum();
        let rows = sequences.len();
        let beams = options.num_beams > 1;
        let copies = if beams {
            options.num_beams
        } else {
            options.num_return_sequences
        };
        let mut strategy: Box<dyn Strategy + '_> = match beams {
            true => Box::new(Beams::new(options, rows)),
            false => Box::new(Pick::new(options, rows * copies)),
        };
        let cancelled = match self.prefill(sequences, inputs, on_event) {
            Ok(scores) => {
                let all: Vec<Continuation> = repeat(rows, copies, 0);
                self.fork(sequences, &all, false);
                let scores = scores.into_iter().flat_map(|s| vec![s; copies]).collect();
                self.decode(sequences, scores, strategy.as_mut(), text, on_event)?
            }
            Err(Error::Cancelled) => {
                self.fork(sequences, &repeat(rows, copies, 0), false);
                true
            }
            Err(error) => return Err(error),
        };
        Ok(Generation {
            completions: strategy.finish(sequences, cancelled),
            prompt_tokens,
            cached_tokens,
            timings: self.timings,
        })
    }

    /// Runs every prompt; gives the scores of each row's last token.
    fn prefill(
        &mut self,
        sequences: &mut [Sequence],
        inputs: &ModelInputs,
        on_event: OnEvent<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        let start = Instant::now();
        let model = Arc::clone(&self.model);
        let embedded = model.embed(inputs, &mut |done, total| {
            go_on(on_event(Event::Vision { done, total }))
        })?;
        self.timings.vision_s = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let layers = model.config().text_config.num_hidden_layers;
        let total = embedded.embeds.rows() * layers;
        let mut done = 0;
        let mut scores = vec![Vec::new(); sequences.len()];
        for (chunk, first) in chunks(sequences, self.prefill_chunk) {
            for part in &chunk {
                self.reserve(&mut sequences[part.sequence], part.end)?;
            }
            let tokens: usize = chunk.iter().map(Part::len).sum();
            let batch = Batch {
                spans: chunk.iter().map(|p| p.span(sequences)).collect(),
            };
            let x = rows_of(&model, &embedded.embeds, first, tokens);
            let mut report = |layer: usize| {
                let done = done + tokens * layer;
                go_on(on_event(Event::Prefill { done, total }))
            };
            let read = (Keep::Last(1), Taps::default());
            let out = model.decode(x, &batch, &mut self.cache, read, &mut report)?;
            done += tokens * layers;
            self.finish_chunk(sequences, &chunk, &out.last_hidden_state, &mut scores);
        }
        self.timings.prefill_s = start.elapsed().as_secs_f64();
        Ok(scores)
    }

    /// Marks a chunk's tokens as cached and scores the rows whose prompt ends in it.
    fn finish_chunk(
        &self,
        sequences: &mut [Sequence],
        chunk: &[Part],
        last: &Buffer,
        scores: &mut [Vec<f32>],
    ) {
        for part in chunk {
            sequences[part.sequence].cached = part.end;
        }
        let ends = |(_, part): &(usize, &Part)| part.end == sequences[part.sequence].ids.len();
        let ending: Vec<(usize, &Part)> = chunk.iter().enumerate().filter(ends).collect();
        if ending.is_empty() {
            return;
        }
        let ops = self.model.ops();
        let rows: Vec<u32> = ending.iter().map(|(i, _)| *i as u32).collect();
        let here: Vec<u32> = (0..rows.len() as u32).collect();
        let mut states = ops.buffer(rows.len(), last.cols());
        ops.copy_rows(last, &rows, &mut states, &here);
        let logits = self.model.language_model().logits(ops, &states);
        for (i, (_, part)) in ending.iter().enumerate() {
            scores[part.sequence] = ops.download_rows(&logits, i..i + 1);
        }
    }

    /// Steps until the strategy lets nothing go on; true where the caller stopped it.
    fn decode(
        &mut self,
        running: &mut Vec<Sequence>,
        mut scores: Vec<Vec<f32>>,
        strategy: &mut dyn Strategy,
        text: &dyn TokenText,
        on_event: OnEvent<'_>,
    ) -> Result<bool> {
        let start = Instant::now();
        loop {
            let step = strategy.step(running, scores, text);
            let mut stopped = false;
            for (sequence, id) in step.shown {
                stopped |= on_event(Event::Token { sequence, id }).is_break();
            }
            if step.go_on.is_empty() {
                self.timings.decode_s = start.elapsed().as_secs_f64();
                return Ok(false);
            }
            self.fork(running, &step.go_on, true);
            if stopped {
                self.timings.decode_s = start.elapsed().as_secs_f64();
                return Ok(true);
            }
            scores = self.step(running)?;
            self.timings.decode_steps += 1;
        }
    }

    /// Runs the last token of every sequence.
    fn step(&mut self, running: &mut [Sequence]) -> Result<Vec<Vec<f32>>> {
        for sequence in running.iter_mut() {
            let len = sequence.ids.len();
            self.reserve(sequence, len)?;
        }
        let model = Arc::clone(&self.model);
        let last: Vec<u32> = running
            .iter()
            .filter_map(|s| s.ids.last().copied())
            .collect();
        let x = model.language_model().embed(model.ops(), &last);
        let part = |(i, s): (usize, &Sequence)| Part {
            sequence: i,
            start: s.cached,
            end: s.ids.len(),
        };
        let parts: Vec<Part> = running.iter().enumerate().map(part).collect();
        let batch = Batch {
            spans: parts.iter().map(|p| p.span(running)).collect(),
        };
        let read = (Keep::Last(1), Taps::default());
        let out = model.decode(x, &batch, &mut self.cache, read, &mut |_| Ok(()))?;
        let logits = model
            .language_model()
            .logits(model.ops(), &out.last_hidden_state);
        let scores = (0..running.len())
            .map(|i| model.ops().download_rows(&logits, i..i + 1))
            .collect();
        for sequence in running {
            sequence.cached = sequence.ids.len();
        }
        Ok(scores)
    }

    /// Replaces the running sequences by their continuations, sharing blocks; `append` adds the tokens.
    fn fork(&mut self, running: &mut Vec<Sequence>, go_on: &[Continuation], append: bool) {
        let next: Vec<Sequence> = go_on
            .iter()
            .map(|continuation| {
                let mut child = running[continuation.parent].clone();
                self.blocks.share(&child.blocks);
                if append {
                    child.ids.push(continuation.token);
                }
                child
            })
            .collect();
        for parent in running.iter() {
            self.blocks.release(&parent.blocks);
        }
        *running = next;
    }

    /// Makes room for `tokens` tokens of a sequence, its own where it will write.
    fn reserve(&mut self, sequence: &mut Sequence, tokens: usize) -> Result<()> {
        let needed = tokens.div_ceil(KV_BLOCK);
        let missing = needed.saturating_sub(sequence.blocks.len());
        // One more for the copy of a shared block.
        if self.blocks.free_blocks() < missing + 1 {
            let grown = self
                .blocks
                .ensure_free((missing + 1).max(self.blocks.capacity() / 2));
            self.cache.grow(grown);
        }
        let mut allocate = || {
            self.blocks.allocate().ok_or_else(|| {
                Error::Input("the key-value cache is full. This is a bug: please report it".into())
            })
        };
        for _ in 0..missing {
            sequence.blocks.push(allocate()?);
        }
        let writes_from = sequence.cached / KV_BLOCK;
        for block in sequence.blocks.iter_mut().take(needed).skip(writes_from) {
            if !self.blocks.is_shared(*block) {
                continue;
            }
            let Some(own) = self.blocks.allocate() else {
                continue;
            };
            self.cache.copy_block(*block, own);
            self.blocks.release(&[*block]);
            *block = own;
        }
        Ok(())
    }
}

/// A run of one sequence's tokens.
struct Part {
    sequence: usize,
    start: usize,
    end: usize,
}

impl Part {
    fn len(&self) -> usize {
        self.end - self.start
    }

    fn span<'a>(&self, sequences: &'a [Sequence]) -> BatchSpan<'a> {
        let sequence = &sequences[self.sequence];
        BatchSpan {
            positions: (self.start as u32..self.end as u32).collect(),
            // A prompt is one pass however it is cut, so dynamic scaling looks at all of it.
            rope_length: sequence.prompt.max(self.end) + sequence.behind_longest,
            kv_len: self.end,
            blocks: &sequence.blocks,
        }
    }
}

/// Cuts the uncached tokens of all sequences into passes: `(parts, first row of the embeddings)`.
fn chunks(sequences: &[Sequence], chunk: usize) -> Vec<(Vec<Part>, usize)> {
    let (mut passes, mut parts, mut room, mut first, mut row) =
        (Vec::new(), Vec::new(), chunk, 0, 0);
    for (i, sequence) in sequences.iter().enumerate() {
        let mut start = sequence.cached;
        while start < sequence.ids.len() {
            let end = sequence.ids.len().min(start + room);
            parts.push(Part {
                sequence: i,
                start,
                end,
            });
            row += end - start;
            room -= end - start;
            start = end;
            if room == 0 {
                passes.push((std::mem::take(&mut parts), first));
                (room, first) = (chunk, row);
            }
        }
    }
    if !parts.is_empty() {
        passes.push((parts, first));
    }
    passes
}

fn rows_of(model: &LlavaNextVideoModel, embeds: &Buffer, first: usize, n: usize) -> Buffer {
    let from: Vec<u32> = (first as u32..(first + n) as u32).collect();
    let to: Vec<u32> = (0..n as u32).collect();
    let mut out = model.ops().buffer(n, embeds.cols());
    model.ops().copy_rows(embeds, &from, &mut out, &to);
    out
}

fn repeat(rows: usize, copies: usize, token: u32) -> Vec<Continuation> {
    (0..rows * copies)
        .map(|i| Continuation {
            parent: i / copies,
            token,
        })
        .collect()
}

fn go_on(flow: ControlFlow<()>) -> Result<()> {
    if flow.is_break() {
        Err(Error::Cancelled)
    } else {
        Ok(())
    }
}

/// The rows without what their masks hide.
fn prompt_rows(inputs: &ModelInputs) -> Vec<Vec<u32>> {
    let shown = |(ids, mask): (&Vec<u32>, &Vec<bool>)| {
        ids.iter()
            .zip(mask)
            .filter(|(_, shown)| **shown)
            .map(|(id, _)| *id)
            .collect()
    };
    inputs
        .input_ids
        .iter()
        .zip(&inputs.attention_mask)
        .map(shown)
        .collect()
}

/// How many tokens the rotary embedding was made for.
pub fn context_length(text: &TextConfig) -> usize {
    let max = text.max_position_embeddings;
    match &text.rope.scaling {
        RopeScaling::Linear { factor } => (max as f64 * factor.max(1.0)) as usize,
        // Grows with the sequence.
        RopeScaling::Dynamic { .. } => usize::MAX,
        RopeScaling::Yarn(yarn) if yarn.original_max_position_embeddings == max as f64 => {
            (max as f64 * yarn.factor.max(1.0)) as usize
        }
        _ => max,
    }
}

fn check_context(rows: &[Vec<u32>], text: &TextConfig) -> Result<()> {
    let fits = context_length(text);
    match rows.iter().map(Vec::len).max() {
        Some(longest) if longest >= fits => Err(Error::Input(format!(
            "the prompt has {longest} tokens, but the model's context holds {fits} and at least one \
             must be left for the answer: use fewer frames (--num-frames) or images, ask shorter, \
             or stretch the context with --rope-scaling linear:{}",
            (longest / text.max_position_embeddings.max(1) + 1).max(2)
        ))),
        _ => Ok(()),
    }
}

/// Where each medium stands in `ids`, and a digest of its pixels.
fn media_spans(
    ids: &[u32],
    inputs: &ModelInputs,
    config: &crate::config::LlavaNextVideoConfig,
) -> Vec<MediaSpan> {
    let mut spans = Vec::new();
    let mut walk = |id: u32, media: Vec<(&Pixels, usize)>| {
        let mut places = ids
            .iter()
            .enumerate()
            .filter(|(_, x)| **x == id)
            .map(|(i, _)| i);
        for (pixels, len) in media {
            let Some(start) = places.next() else { return };
            places.by_ref().take(len - 1).for_each(drop);
            spans.push(MediaSpan {
                start,
                len,
                digest: digest(pixels),
            });
        }
    };
    let images = inputs
        .images
        .iter()
        .map(|i| (&i.tiles, i.layout.feature_tokens()));
    walk(config.image_token_index, images.collect());
    let per_frame = config.tokens_per_frame();
    let videos = inputs
        .videos
        .iter()
        .map(|v| (&v.frames, v.frames.count * per_frame));
    walk(config.video_token_index, videos.collect());
    spans.sort_by_key(|span| span.start);
    spans
}

fn digest(pixels: &Pixels) -> u64 {
    let mut hasher = DefaultHasher::new();
    (pixels.count, pixels.size).hash(&mut hasher);
    bytemuck::cast_slice::<f32, u8>(&pixels.data).hash(&mut hasher);
    hasher.finish()
}
