//! Decoding several rows at once, at contexts of any length.
//!
//! A step of several rows is compared with one row's at the same context. A step at a long context is
//! compared with one at the context before it plus the time that reading the keys and values takes that
//! are more: it can hardly be less.
//!
//! The cache is filled with noise rather than by a prefill: a step costs the same whatever the keys and
//! values are, and a prefill of eight rows of 8000 tokens takes an hour.

use std::time::Instant;

use anyhow::{Result, bail};
use llava_next_video::model::{Batch, BatchSpan, Keep, LlavaNextVideoModel, Taps};
use lnv_kernels::{KV_BLOCK, KvCache, Slot};

use super::Stage;
use crate::{memory, output};

/// Tokens that are written to the cache at once.
const FILL: usize = 256;

/// Decode steps of `rows` sequences.
pub struct Rows {
    /// Sequences.
    pub rows: usize,
    /// Tokens in the cache of each.
    pub context: usize,
    /// One step, and the bytes that it reads.
    pub stage: Stage,
    /// What it is to be compared with, where there is something.
    pub beside: Option<Beside>,
}

/// A step beside another.
pub enum Beside {
    /// How many times the tokens a second of one row at the same context.
    OneRow(f64),
    /// The share of the time of a step at a shorter context (of so many tokens) plus that of reading
    /// the keys and values that are more.
    Shorter(usize, f64),
}

impl Rows {
    /// Steps of one row at each context; then of `rows` rows at the first of them, if more than one.
    ///
    /// # Errors
    /// The caches do not fit into memory.
    pub fn measure_all(
        model: &LlavaNextVideoModel,
        (rows, contexts, steps): (usize, &[usize], usize),
        bandwidth_gbs: f64,
    ) -> Result<Vec<Self>> {
        let mut all: Vec<Self> = Vec::with_capacity(contexts.len() + 1);
        for context in contexts {
            let mut one = Self::measure(model, (1, *context, steps))?;
            if let Some(before) = all.last().filter(|before| before.context < *context) {
                let more = one.stage.needed - before.stage.needed;
                let expected = before.stage.seconds + more / (1e9 * bandwidth_gbs);
                let share = one.stage.seconds / expected;
                one.beside = Some(Beside::Shorter(before.context, share));
            }
            all.push(one);
        }
        if rows > 1 {
            let mut many = Self::measure(model, (rows, contexts[0], steps))?;
            let speedup = rows as f64 * all[0].stage.seconds / many.stage.seconds;
            many.beside = Some(Beside::OneRow(speedup));
            all.push(many);
        }
        Ok(all)
    }

    /// Tokens a second of all rows together.
    pub fn tokens_s(&self) -> f64 {
        self.rows as f64 / self.stage.seconds
    }

    /// The fastest of `steps` steps of `rows` sequences that have `context` tokens each.
    fn measure(
        model: &LlavaNextVideoModel,
        (rows, context, steps): (usize, usize, usize),
    ) -> Result<Self> {
        let decoder = model.language_model();
        let row_blocks = (context + steps).div_ceil(KV_BLOCK);
        let kv_bytes = super::kv_bytes(model);
        let cache_bytes = (rows * row_blocks * KV_BLOCK) as f64 * kv_bytes;
        let free = match model.ops().device_memory() {
            Some((free, _)) => Some(free as u64),
            None => memory::available(),
        };
        if let Some(free) = free.filter(|free| cache_bytes > *free as f64) {
            bail!(
                "the keys and values of {rows} row(s) of {context} tokens take {}, and {} of memory \
                 are free: ask for a smaller --batch or --context",
                output::size(cache_bytes as usize),
                output::size(free as usize)
            );
        }
        let mut cache = decoder.new_cache(model.ops(), rows * row_blocks)?;
        let blocks: Vec<Vec<u32>> = (0..rows)
            .map(|row| {
                (row * row_blocks..(row + 1) * row_blocks)
                    .map(|b| b as u32)
                    .collect()
            })
            .collect();
        blocks
            .iter()
            .for_each(|blocks| fill(model, &mut cache, blocks, context));
        let mut seconds = f64::MAX;
        for step in 0..steps {
            let start = Instant::now();
            let ids: Vec<u32> = (0..rows as u32).map(|row| row % 7).collect();
            let x = decoder.embed(model.ops(), &ids);
            let length = context + step + 1;
            let span = |blocks| BatchSpan {
                positions: vec![(length - 1) as u32],
                rope_length: length,
                kv_len: length,
                blocks,
            };
            let batch = Batch {
                spans: blocks
                    .iter()
                    .map(|blocks| span(blocks.as_slice()))
                    .collect(),
            };
            let read = (Keep::Last(1), Taps::default());
            let out = model.decode(x, &batch, &mut cache, read, &mut |_| Ok(()))?;
            let logits = decoder.logits(model.ops(), &out.last_hidden_state);
            model.ops().download(&logits);
            seconds = seconds.min(start.elapsed().as_secs_f64());
        }
        let weights = decoder.bytes().1 as f64;
        Ok(Self {
            rows,
            context,
            stage: Stage {
                seconds,
                needed: weights + (rows * context) as f64 * kv_bytes,
            },
            beside: None,
        })
    }
}

/// Writes noise as the keys and values of `tokens` tokens in every layer.
fn fill(model: &LlavaNextVideoModel, cache: &mut KvCache, blocks: &[u32], tokens: usize) {
    let (ops, heads) = (model.ops(), cache.heads());
    let mut state = 1u32;
    let noise: Vec<f32> = (0..FILL * heads.qkv_cols())
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    // Angles of zero: nothing turns.
    let half = heads.head_dim / 2;
    let angles = |i: usize| if i % heads.head_dim < half { 1.0 } else { 0.0 };
    for first in (0..tokens).step_by(FILL) {
        let here = FILL.min(tokens - first);
        let slots: Vec<Slot> = (first..first + here)
            .map(|token| Slot {
                block: blocks[token / KV_BLOCK],
                offset: (token % KV_BLOCK) as u32,
            })
            .collect();
        let cos_sin: Vec<f32> = (0..here * heads.head_dim).map(angles).collect();
        let cos_sin = ops.upload(here, heads.head_dim, &cos_sin);
        let mut qkv = ops.scratch(here, heads.qkv_cols());
        ops.write_rows(&mut qkv, 0, &noise[..here * heads.qkv_cols()]);
        for layer in 0..cache.layers() {
            ops.rope_write_kv(&mut qkv, &cos_sin, heads, cache, layer, &slots);
        }
    }
}
