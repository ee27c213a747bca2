//! Decoding several rows at once, at a context of any length.
//!
//! The cache is filled with noise rather than by a prefill: a step costs the same whatever the keys and
//! values are, and a prefill of eight rows of 8000 tokens takes an hour.

use std::time::Instant;

use anyhow::Result;
use llava_next_video::model::{Batch, BatchSpan, Keep, LlavaNextVideoModel, Taps};
use lnv_kernels::{KV_BLOCK, KvCache, Slot};

use super::Stage;

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
}

impl Rows {
    /// The fastest of `steps` steps of `rows` sequences that have `context` tokens each.
    pub fn measure(
        model: &LlavaNextVideoModel,
        (rows, context, steps): (usize, usize, usize),
    ) -> Result<Self> {
        let decoder = model.language_model();
        let row_blocks = (context + steps).div_ceil(KV_BLOCK);
        let mut cache = decoder.new_cache(rows * row_blocks);
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
                needed: weights + (rows * context) as f64 * super::kv_bytes(model),
            },
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
        let mut qkv = ops.upload(here, heads.qkv_cols(), &noise[..here * heads.qkv_cols()]);
        for layer in 0..cache.layers() {
            ops.rope_write_kv(&mut qkv, &cos_sin, heads, cache, layer, &slots);
        }
    }
}
