//! Causal attention with whole softmax rows, which the caller gets too.
//!
//! Decision: the scores of a tile of one query head go straight into the returned matrix, are
//! turned into weights there, and multiply the value blocks from there: three passes and no online
//! softmax, so the weights are those that made the output. A row's sums run over its own keys in
//! order, so its bits do not depend on chunking here either.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use crate::buffer::{Aligned, Buffer};
use crate::cpu::launch::{Kernel, launch};
use crate::cpu::scratch::{Shared, with};
use crate::cpu::simd::Simd;
use crate::cpu::small::{Small, small_product};
use crate::cpu::widen::{Blocks, Paged, Widened};
use crate::isa::Isa;
use crate::kv_cache::{KV_BLOCK, KvDtype, LayerCache};
use crate::ops::{AttentionShape, Span};
use crate::reference::visible_keys;

/// Query rows in a tile.
const TILE_ROWS: usize = 24;

thread_local! {
    static TILE: Cell<Option<Aligned<f32>>> = const { Cell::new(None) };
}

/// Attention and each span's weights `[heads, q_len, kv_len]`; the shapes fit.
pub(crate) fn paged_attention_eager(
    isa: Isa,
    qkv: &Buffer,
    cache: &LayerCache,
    (spans, shape): (&[Span<'_>], &AttentionShape),
    out: &mut Buffer,
) -> Vec<Vec<f32>> {
    let (heads, d) = (shape.heads.heads, shape.heads.head_dim);
    let shared = shape.heads.queries_per_kv();
    let shared_out = Shared::new(out.host_mut());
    let attend = |span: &Span<'_>| {
        let mut weights = vec![0.0; heads * span.q_len * span.kv_len];
        let place = Shared::new(&mut weights);
        let tiles = span.q_len.div_ceil(TILE_ROWS);
        (0..heads * tiles).into_par_iter().for_each(|index| {
            let (head, first) = (index / tiles, index % tiles * TILE_ROWS);
            let queries = first..span.q_len.min(first + TILE_ROWS);
            let (count, at) = (queries.len(), (head * span.q_len + first) * span.kv_len);
            // SAFETY: the rows `queries` of this head, which no other tile has.
            let weights =
                unsafe { std::slice::from_raw_parts_mut(place.at(at), count * span.kv_len) };
            with(&TILE, count * (2 * d + KV_BLOCK), |scratch| {
                let (q, scratch) = scratch.split_at_mut(count * d);
                let (o, scores) = scratch.split_at_mut(count * d);
                let job = Job {
                    qkv,
                    span,
                    shape,
                    head,
                    queries,
                    out: shared_out,
                };
                let eager = Eager {
                    job,
                    weights,
                    q,
                    o,
                    scores,
                };
                let (kv_head, table) = (head / shared, span.blocks);
                match cache.record.dtype {
                    KvDtype::F32 => eager.launch(
                        isa,
                        &mut Paged {
                            cache,
                            kv_head,
                            table,
                        },
                    ),
                    KvDtype::Bf16 | KvDtype::Int8 => {
                        Widened::with(cache, kv_head, table, |blocks| eager.launch(isa, blocks));
                    }
                }
            });
        });
        weights
    };
    spans.iter().map(attend).collect()
}

/// Some queries of one head.
struct Job<'a> {
    qkv: &'a Buffer,
    span: &'a Span<'a>,
    shape: &'a AttentionShape,
    head: usize,
    queries: Range<usize>,
    out: Shared<f32>,
}

struct Eager<'a> {
    job: Job<'a>,
    /// `[queries, kv_len]`
    weights: &'a mut [f32],
    /// `[queries, d]`
    q: &'a mut [f32],
    o: &'a mut [f32],
    /// `[queries, KV_BLOCK]`
    scores: &'a mut [f32],
}

impl Eager<'_> {
    fn launch<B: Blocks>(self, isa: Isa, blocks: &mut B) {
        launch(
            isa,
            Over {
                eager: self,
                blocks,
            },
        );
    }
}

/// A tile and the blocks that it goes through.
struct Over<'a, B> {
    eager: Eager<'a>,
    blocks: &'a mut B,
}

impl<B: Blocks> Kernel for Over<'_, B> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.eager.run(s, self.blocks);
    }
}

impl Eager<'_> {
    #[inline(always)]
    fn run<S: Simd, B: Blocks>(mut self, s: S, from: &mut B) {
        let Job {
            qkv,
            span,
            shape,
            head,
            queries,
            ..
        } = &self.job;
        let (d, kv_len, head, queries) =
            (shape.heads.head_dim, span.kv_len, *head, queries.clone());
        let (cols, start) = (qkv.cols(), span.q_start + queries.start);
        let values = qkv.host();
        for (row, q) in self.q.chunks_exact_mut(d).enumerate() {
            q.copy_from_slice(&values[(start + row) * cols + head * d..][..d]);
        }
        let keys_from = visible_keys(span, queries.start, shape.window).start;
        let keys_to = visible_keys(span, queries.end - 1, shape.window).end;
        let blocks = keys_from / KV_BLOCK..keys_to.div_ceil(KV_BLOCK);
        for block in blocks.clone() {
            from.load(s, block);
            self.score(s, block, from.keys(block), d);
        }
        for row in 0..queries.len() {
            let visible = visible_keys(self.job.span, queries.start + row, self.job.shape.window);
            softmax_row(s, &mut self.weights[row * kv_len..][..kv_len], visible);
        }
        self.o.fill(0.0);
        for block in blocks {
            from.load(s, block);
            self.add_values(s, block, from.values(block), d);
        }
        let out_cols = self.job.shape.heads.heads * d;
        for (row, o) in self.o.chunks_exact(d).enumerate() {
            // SAFETY: the head's part of the query's row, which this tile alone writes.
            unsafe {
                let out = self.job.out.at((start + row) * out_cols + head * d);
                std::ptr::copy_nonoverlapping(o.as_ptr(), out, d);
            }
        }
    }
}

impl Eager<'_> {
    /// The scaled scores of a block, of invisible keys too.
    #[inline(always)]
    fn score<S: Simd>(&mut self, s: S, block: usize, keys: &[f32], d: usize) {
        let Job { span, shape, .. } = &self.job;
        let rows = self.q.len() / d;
        let product = Small {
            a: self.q,
            a_stride: d,
            b: keys,
            b_stride: KV_BLOCK,
            depth: d,
            cols: KV_BLOCK,
            c_stride: KV_BLOCK,
            next: &[],
        };
        small_product(s, &product, rows, None, self.scores);
        let live = KV_BLOCK.min(span.kv_len - block * KV_BLOCK);
        for (scores, row) in self
            .scores
            .chunks_exact(KV_BLOCK)
            .zip(self.weights.chunks_exact_mut(span.kv_len))
        {
            let row = &mut row[block * KV_BLOCK..][..live];
            for (weight, score) in row.iter_mut().zip(scores) {
                *weight = score * shape.scale;
            }
        }
    }

    /// Adds a block's weighted values to the outputs.
    #[inline(always)]
    fn add_values<S: Simd>(&mut self, s: S, block: usize, values: &[f32], d: usize) {
        let span = self.job.span;
        let rows = self.q.len() / d;
        let product = Small {
            a: &self.weights[block * KV_BLOCK..],
            a_stride: span.kv_len,
            b: values,
            b_stride: d,
            depth: KV_BLOCK.min(span.kv_len - block * KV_BLOCK),
            cols: d,
            c_stride: d,
            next: &[],
        };
        small_product(s, &product, rows, Some(&[1.0; TILE_ROWS][..rows]), self.o);
    }
}

/// Softmax over the visible keys of a row of scaled scores, zero elsewhere.
#[inline(always)]
fn softmax_row<S: Simd>(s: S, row: &mut [f32], visible: Range<usize>) {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    let row = &mut row[visible];
    let (len, at) = (row.len(), row.as_mut_ptr());
    let hidden = s.splat(f32::NEG_INFINITY);
    let mut max = hidden;
    for i in (0..len).step_by(S::LANES) {
        let n = S::LANES.min(len - i);
        // SAFETY: n values are left from i on.
        max = s.max(
            s.keep(unsafe { s.load_part(at.add(i), n) }, 0, n, hidden),
            max,
        );
    }
    let max = s.splat(s.largest(max));
    let mut sum = s.splat(0.0);
    for i in (0..len).step_by(S::LANES) {
        let n = S::LANES.min(len - i);
        // SAFETY: as above.
        unsafe {
            let weight = s.exp(s.sub(s.load_part(at.add(i), n), max));
            s.store_part(at.add(i), weight, n);
            sum = s.add(sum, s.keep(weight, 0, n, s.splat(0.0)));
        }
    }
    let factor = s.splat(1.0 / s.sum(sum));
    for i in (0..len).step_by(S::LANES) {
        let n = S::LANES.min(len - i);
        // SAFETY: as above.
        unsafe { s.store_part(at.add(i), s.mul(s.load_part(at.add(i), n), factor), n) };
    }
}
