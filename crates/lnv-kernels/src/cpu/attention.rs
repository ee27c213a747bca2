//! Attention in tiles: some query rows against one block of keys and values after the other.
//!
//! Decision: the online softmax, in f32. A tile holds the queries (at most 24 rows) that share a
//! key/value head: neighbouring positions of a prompt, or the query heads of a group at one
//! position. Scores are a small matrix product with the transposed key block, outputs one with the
//! value rows.
//!
//! A row goes through blocks of [`KV_BLOCK`] keys counted from the start of its sequence, one
//! maximum, one sum and one rescaling a block, whoever else is in the tile. A key that the row does
//! not see has the probability zero exactly, and a block without any visible key changes nothing:
//! the rescaling is by e⁰ = 1. So a row's bits do not depend on chunking or batching.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use crate::buffer::{Aligned, Buffer};
use crate::cpu::formats::fetch_line;
use crate::cpu::launch::{Kernel, launch};
use crate::cpu::scratch::{Shared, with};
use crate::cpu::simd::Simd;
use crate::cpu::widen::{Blocks, Paged, Pairwise, Widened};
use crate::cpu::{byte_attention, dot_attention, pairs};
use crate::isa::Isa;
use crate::kv_cache::{Heads, KV_BLOCK, KvDtype, LayerCache};
use crate::ops::{AttentionShape, Precision, Span};

/// Query rows in a tile: four times the six that have their sums in registers.
const TILE_ROWS: usize = 24;
/// Rows ahead of which a head's keys and values are fetched to be packed: they lie too far apart for the processor
/// to guess.
const AHEAD: usize = 8;

thread_local! {
    static TILE: Cell<Option<Aligned<f32>>> = const { Cell::new(None) };
    static SEGMENT: Cell<Option<Aligned<f32>>> = const { Cell::new(None) };
}

/// Causal attention over the cache; the shapes fit.
pub(crate) fn paged_attention(
    isa: Isa,
    qkv: &Buffer,
    cache: &LayerCache,
    (spans, shape): (&[Span<'_>], &AttentionShape),
    out: &mut Buffer,
) {
    if cache.record.dtype != KvDtype::F32 && matches!(isa, Isa::Avx512Bf16 | Isa::Amx) {
        return dot_attention::paged_attention(isa, qkv, cache, (spans, shape), out);
    }
    let heads = &shape.heads;
    let shared = heads.queries_per_kv();
    let tile = (TILE_ROWS / shared).max(1);
    let matrices = Matrices::new(qkv, *heads, shape.scale, out);
    spans.par_iter().for_each(|span| {
        let tiles = span.q_len.div_ceil(tile);
        (0..heads.kv_heads * tiles)
            .into_par_iter()
            .with_max_len(1)
            .for_each(|index| {
                let (kv_head, first) = (index / tiles, index % tiles * tile);
                let queries = first..span.q_len.min(first + tile);
                let mask = Mask::Causal {
                    before: span.kv_len - span.q_len,
                    window: shape.window,
                };
                let rows = Rows {
                    start: span.q_start,
                    queries,
                    kv_head,
                    mask,
                };
                let table = span.blocks;
                match cache.record.dtype {
                    KvDtype::F32 => {
                        let mut blocks = Paged {
                            cache,
                            kv_head,
                            table,
                        };
                        matrices.attend(isa, &rows, &mut blocks);
                    }
                    KvDtype::Bf16 | KvDtype::Int8 if rows.queries.len() * shared <= pairs::ROWS => {
                        let mut blocks = Pairwise {
                            cache,
                            kv_head,
                            table,
                        };
                        matrices.attend(isa, &rows, &mut blocks);
                    }
                    KvDtype::Bf16 | KvDtype::Int8 => {
                        Widened::with(cache, kv_head, table, |blocks| {
                            matrices.attend(isa, &rows, blocks);
                        });
                    }
                }
            });
    });
}

/// Attention of each segment of `len` rows with itself; the shapes fit.
pub(crate) fn full_attention(
    isa: Isa,
    qkv: &Buffer,
    (len, heads, (scale, precision)): (usize, Heads, (f32, Precision)),
    out: &mut Buffer,
) {
    match (precision, isa) {
        (Precision::Bf16 | Precision::Int8, Isa::Avx512Bf16 | Isa::Amx) => {
            return dot_attention::full_attention(isa, qkv, (len, heads, scale), out);
        }
        (Precision::Int8, Isa::Avx512Vnni) => {
            return byte_attention::full_attention(qkv, (len, heads, scale), out);
        }
        _ => {}
    }
    let tile = (TILE_ROWS / heads.queries_per_kv()).max(1);
    let segments = qkv.rows() / len;
    let matrices = Matrices::new(qkv, heads, scale, out);
    let block_len = heads.head_dim * KV_BLOCK;
    let head_len = len.div_ceil(KV_BLOCK) * block_len;
    (0..segments * heads.kv_heads)
        .into_par_iter()
        .with_max_len(1)
        .for_each(|index| {
            let (segment, kv_head) = (index / heads.kv_heads, index % heads.kv_heads);
            with(&SEGMENT, 2 * head_len, |scratch| {
                let (keys, values) = scratch.split_at_mut(head_len);
                matrices.pack_segment(segment * len..(segment + 1) * len, kv_head, keys, values);
                let mut blocks = Packed {
                    keys,
                    values,
                    block_len,
                };
                for first in (0..len).step_by(tile) {
                    let queries = first..len.min(first + tile);
                    let rows = Rows {
                        start: segment * len,
                        queries,
                        kv_head,
                        mask: Mask::All(len),
                    };
                    matrices.attend(isa, &rows, &mut blocks);
                }
            });
        });
}

/// The keys and values of a segment's head, packed.
struct Packed<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    block_len: usize,
}

impl Blocks for Packed<'_> {
    fn load<S: Simd>(&mut self, _: S, _: usize) {}
    fn keys(&self, block: usize) -> &[f32] {
        &self.keys[block * self.block_len..(block + 1) * self.block_len]
    }
    fn values(&self, block: usize) -> &[f32] {
        &self.values[block * self.block_len..(block + 1) * self.block_len]
    }
    fn ahead(&self, block: usize) -> &[f32] {
        self.keys(block)
    }
}

/// Which keys a query sees.
#[derive(Clone, Copy)]
pub(crate) enum Mask {
    /// All of so many.
    All(usize),
    /// Those up to its own position, which is `before` plus its index, at most `window` of them.
    Causal {
        before: usize,
        window: Option<usize>,
    },
}

impl Mask {
    /// The keys that a query sees.
    pub(crate) fn visible(&self, query: usize) -> Range<usize> {
        match *self {
            Mask::All(len) => 0..len,
            Mask::Causal { before, window } => {
                let end = before + query + 1;
                end.saturating_sub(window.unwrap_or(end))..end
            }
        }
    }
}

/// The rows of a tile: `queries` of a sequence that starts at row `start` of the matrices, for each
/// the query heads of `kv_head`.
struct Rows {
    start: usize,
    queries: Range<usize>,
    kv_head: usize,
    mask: Mask,
}

/// What a call reads and writes.
struct Matrices<'a> {
    qkv: &'a [f32],
    cols: usize,
    heads: Heads,
    shared: usize,
    scale: f32,
    out: Shared<f32>,
}

impl<'a> Matrices<'a> {
    fn new(qkv: &'a Buffer, heads: Heads, scale: f32, out: &mut Buffer) -> Matrices<'a> {
        let (shared, out) = (heads.queries_per_kv(), Shared::new(out.host_mut()));
        Matrices {
            qkv: qkv.host(),
            cols: qkv.cols(),
            heads,
            shared,
            scale,
            out,
        }
    }

    fn attend<B: Blocks>(&self, isa: Isa, rows: &Rows, blocks: &mut B) {
        let (count, d) = (rows.queries.len() * self.shared, self.heads.head_dim);
        with(&TILE, count * (2 * d + KV_BLOCK + 3), |scratch| {
            let (q, scratch) = scratch.split_at_mut(count * d);
            let (o, scratch) = scratch.split_at_mut(count * d);
            let (scores, scratch) = scratch.split_at_mut(count * KV_BLOCK);
            let (max, scratch) = scratch.split_at_mut(count);
            let (sum, rescale) = scratch.split_at_mut(count);
            let tile = Tile {
                q,
                o,
                scores,
                max,
                sum,
                rescale,
            };
            launch(
                isa,
                Attend {
                    matrices: self,
                    rows,
                    blocks,
                    tile,
                },
            );
        });
    }

    /// The query and the head of a tile's row.
    #[inline(always)]
    fn place(&self, rows: &Rows, row: usize) -> (usize, usize) {
        (
            rows.queries.start + row / self.shared,
            rows.kv_head * self.shared + row % self.shared,
        )
    }

    /// Copies a head's keys, transposed, and values of some rows into blocks.
    fn pack_segment(
        &self,
        rows: Range<usize>,
        kv_head: usize,
        keys: &mut [f32],
        values: &mut [f32],
    ) {
        let Heads {
            heads,
            kv_heads,
            head_dim: d,
        } = self.heads;
        let (keys_at, values_at) = ((heads + kv_head) * d, (heads + kv_heads + kv_head) * d);
        for (j, row) in rows.enumerate() {
            let ahead = self.qkv.as_ptr().wrapping_add((row + AHEAD) * self.cols);
            for line in (0..d).step_by(16) {
                fetch_line(ahead.wrapping_add(keys_at + line).cast());
                fetch_line(ahead.wrapping_add(values_at + line).cast());
            }
            let row = &self.qkv[row * self.cols..][..self.cols];
            let start = j / KV_BLOCK * d * KV_BLOCK;
            let column = keys[start + j % KV_BLOCK..].iter_mut().step_by(KV_BLOCK);
            column
                .zip(&row[keys_at..keys_at + d])
                .for_each(|(out, value)| *out = *value);
            values[start + j % KV_BLOCK * d..][..d].copy_from_slice(&row[values_at..][..d]);
        }
    }
}

/// A tile's scratch, each with one entry a row.
struct Tile<'a> {
    /// `[rows, d]`
    q: &'a mut [f32],
    /// `[rows, d]`: the outputs, not yet divided by the sum.
    o: &'a mut [f32],
    /// `[rows, KV_BLOCK]`: scores, then probabilities.
    scores: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// The factor by which a new maximum makes what was summed smaller.
    rescale: &'a mut [f32],
}

struct Attend<'a, B> {
    matrices: &'a Matrices<'a>,
    rows: &'a Rows,
    blocks: &'a mut B,
    tile: Tile<'a>,
}

impl<B: Blocks> Kernel for Attend<'_, B> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let d = self.matrices.heads.head_dim;
        self.load_queries(d);
        self.tile.o.fill(0.0);
        self.tile.max.fill(f32::NEG_INFINITY);
        self.tile.sum.fill(0.0);
        let queries = &self.rows.queries;
        let start = self.rows.mask.visible(queries.start).start;
        let end = self.rows.mask.visible(queries.end - 1).end;
        let last = (end - 1) / KV_BLOCK;
        for block in start / KV_BLOCK..=last {
            let keys = KV_BLOCK.min(end - block * KV_BLOCK);
            let Tile { q, scores, .. } = &mut self.tile;
            self.blocks.scores(s, (block, keys), (q, d), scores);
            self.softmax(s, block * KV_BLOCK, keys);
            let Tile {
                o, scores, rescale, ..
            } = &mut self.tile;
            let places = (block, Some(block + 1).filter(|next| *next <= last));
            self.blocks
                .outputs(s, places, (scores, keys, rescale), (o, d));
        }
        self.store(s, d);
    }
}

impl<B: Blocks> Attend<'_, B> {
    #[inline(always)]
    fn load_queries(&mut self, d: usize) {
        for (row, q) in self.tile.q.chunks_exact_mut(d).enumerate() {
            let (query, head) = self.matrices.place(self.rows, row);
            let at = (self.rows.start + query) * self.matrices.cols + head * d;
            q.copy_from_slice(&self.matrices.qkv[at..at + d]);
        }
    }

    /// Scores to probabilities, with the new maximum, sum and rescaling of each row. `first` is the
    /// block's first key, `keys` how many of it are looked at.
    #[inline(always)]
    fn softmax<S: Simd>(&mut self, s: S, first: usize, keys: usize) {
        let tile = &mut self.tile;
        let (hidden, scale) = (s.splat(f32::NEG_INFINITY), s.splat(self.matrices.scale));
        let looked_at = keys.next_multiple_of(S::LANES);
        for (row, scores) in tile.scores.chunks_exact_mut(KV_BLOCK).enumerate() {
            let (query, _) = self.matrices.place(self.rows, row);
            let visible = self.rows.mask.visible(query);
            let from = visible.start.saturating_sub(first);
            let to = visible.end.saturating_sub(first);
            let all = from == 0 && to >= looked_at;
            let mut max = hidden;
            for lane in (0..looked_at).step_by(S::LANES) {
                let at = scores[lane..lane + S::LANES].as_mut_ptr();
                // SAFETY: LANES scores.
                let mut score = s.mul(unsafe { s.load(at) }, scale);
                if !all {
                    let from = from.saturating_sub(lane).min(S::LANES);
                    let to = to.saturating_sub(lane).min(S::LANES).max(from);
                    score = s.keep(score, from, to, hidden);
                }
                // SAFETY: as above.
                unsafe { s.store(at, score) };
                max = s.max(score, max);
            }
            let before = tile.max[row];
            tile.max[row] = s.largest(max).max(before);
            tile.rescale[row] = before - finite(tile.max[row]);
        }
        for first in (0..tile.rescale.len()).step_by(S::LANES) {
            let part = &mut tile.rescale[first..];
            let n = part.len().min(S::LANES);
            // SAFETY: n values are left.
            unsafe {
                let rescale = s.exp(s.load_part(part.as_ptr(), n));
                s.store_part(part.as_mut_ptr(), rescale, n);
            }
        }
        for (row, scores) in tile.scores.chunks_exact_mut(KV_BLOCK).enumerate() {
            let max = s.splat(finite(tile.max[row]));
            let mut sum = s.splat(0.0);
            for lane in (0..looked_at).step_by(S::LANES) {
                let at = scores[lane..lane + S::LANES].as_mut_ptr();
                // SAFETY: LANES scores.
                unsafe {
                    let probability = s.exp(s.sub(s.load(at), max));
                    s.store(at, probability);
                    sum = s.add(sum, probability);
                }
            }
            tile.sum[row] = tile.sum[row] * tile.rescale[row] + s.sum(sum);
        }
    }

    /// Divides by the sums and writes the tile's part of the result.
    #[inline(always)]
    fn store<S: Simd>(&self, s: S, d: usize) {
        let out_cols = self.matrices.heads.heads * d;
        for (row, o) in self.tile.o.chunks_exact(d).enumerate() {
            let (query, head) = self.matrices.place(self.rows, row);
            let at = (self.rows.start + query) * out_cols + head * d;
            let factor = s.splat(1.0 / self.tile.sum[row]);
            for i in (0..d).step_by(S::LANES) {
                let n = S::LANES.min(d - i);
                // SAFETY: n values are left in the row of o and in the head's part of the result,
                // which this tile alone writes.
                unsafe {
                    let value = s.mul(s.load_part(o.as_ptr().add(i), n), factor);
                    s.store_part(self.matrices.out.at(at + i), value, n);
                }
            }
        }
    }
}

/// A row that has seen no key yet has the maximum -∞, whose difference to itself is no number.
#[inline(always)]
fn finite(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}
