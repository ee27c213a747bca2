//! Rotary embedding and attention.

use super::{Ops, require};
use crate::buffer::Buffer;
#[cfg(target_arch = "x86_64")]
use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda::attention as gpu;
use crate::kv_cache::{Heads, KV_BLOCK, KvCache, Slot};
use crate::reference;

/// Some queries of one sequence: the last `q_len` of its `kv_len` tokens.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// Their first row in qkv.
    pub q_start: usize,
    /// How many.
    pub q_len: usize,
    /// Tokens of the sequence in the cache, these included.
    pub kv_len: usize,
    /// The sequence's blocks, in order; at least `kv_len / KV_BLOCK`, rounded up.
    pub blocks: &'a [u32],
}

/// What is the same for all spans of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// The heads.
    pub heads: Heads,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// A query at position i sees keys j with `i - window < j <= i`; `None`: all `j <= i`.
    pub window: Option<usize>,
}

/// How attention without a cache multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// In f32.
    F32,
    /// Where the processor has a fast bf16 dot product or AMX: queries, keys, values and probabilities rounded
    /// to bf16, sums and softmax in f32. Elsewhere as `F32`.
    Bf16,
    /// Where the byte dot product is the fastest: queries, keys and values rounded to 8-bit integers
    /// row by row, probabilities to 16-bit ones, sums exact and softmax in f32. Elsewhere as `Bf16`.
    Int8,
}

impl Ops {
    /// Rotates the q and k parts of qkv in place (half-split form), then writes k and v to the
    /// cache. qkv `[t, (heads + 2 kv_heads) * head_dim]`: q | k | v; cos_sin `[t, head_dim]`: the
    /// cosines of `head_dim / 2` angles, then their sines, attention scaling included; one slot per
    /// row.
    ///
    /// # Panics
    /// The shapes do not fit, or a slot or the layer does not exist.
    pub fn rope_write_kv(
        &self,
        qkv: &mut Buffer,
        cos_sin: &Buffer,
        heads: Heads,
        cache: &mut KvCache,
        layer: usize,
        slots: &[Slot],
    ) {
        check_cache("rope_write_kv", cache, heads, layer);
        require(
            "rope_write_kv",
            "columns of qkv",
            qkv.cols(),
            heads.qkv_cols(),
        );
        require(
            "rope_write_kv",
            "columns of cos_sin",
            cos_sin.cols(),
            heads.head_dim,
        );
        require(
            "rope_write_kv",
            "rows of cos_sin",
            cos_sin.rows(),
            qkv.rows(),
        );
        require("rope_write_kv", "slots", slots.len(), qkv.rows());
        require("rope_write_kv", "an odd head_dim", heads.head_dim % 2, 0);
        for slot in slots {
            cache.check_block(slot.block);
            let offset = slot.offset as usize;
            assert!(
                offset < KV_BLOCK,
                "rope_write_kv: offset {offset} in a block. This is a bug."
            );
        }
        on_cuda!(self, cuda => {
            let layer = cache.device_layer(layer);
            gpu::rope_write_kv(cuda, qkv.view(), cos_sin.view(), heads, &layer, slots)
        });
        fast!(
            self,
            cpu::rope::rope_write_kv(
                self.isa,
                qkv,
                (cos_sin, heads),
                cache.layer_mut(layer),
                slots
            )
        );
        reference::rope_write_kv(qkv, cos_sin, heads, cache.layer_mut(layer), slots);
    }

    /// Causal attention of each span's queries over its blocks: query i of a span has position
    /// `kv_len - q_len + i`. Reads the q part of qkv `[t, (heads + 2 kv_heads) * head_dim]`, writes
    /// the spans' rows of out `[t, heads * head_dim]`.
    ///
    /// # Panics
    /// The shapes do not fit, or a block or the layer does not exist.
    pub fn paged_attention(
        &self,
        qkv: &Buffer,
        cache: &KvCache,
        layer: usize,
        spans: &[Span<'_>],
        shape: &AttentionShape,
        out: &mut Buffer,
    ) {
        check_attention("paged_attention", qkv, shape.heads, out);
        check_cache("paged_attention", cache, shape.heads, layer);
        check_spans("paged_attention", cache, spans, shape, qkv.rows());
        on_cuda!(self, cuda => {
            let layer = cache.device_layer(layer);
            gpu::paged_attention(cuda, qkv.view(), &layer, spans, shape, out.view())
        });
        let cache = cache.layer(layer);
        fast!(
            self,
            cpu::attention::paged_attention(self.isa, qkv, cache, (spans, shape), out)
        );
        reference::paged_attention(qkv, cache, spans, shape, out);
    }

    /// The same with whole softmax rows, which are also returned: for each span the weights
    /// `[heads, q_len, kv_len]`, zero where a key is not visible. For looking at, not for speed.
    ///
    /// # Panics
    /// As [`Ops::paged_attention`].
    pub fn paged_attention_eager(
        &self,
        qkv: &Buffer,
        cache: &KvCache,
        layer: usize,
        spans: &[Span<'_>],
        shape: &AttentionShape,
        out: &mut Buffer,
    ) -> Vec<Vec<f32>> {
        check_attention("paged_attention_eager", qkv, shape.heads, out);
        check_cache("paged_attention_eager", cache, shape.heads, layer);
        check_spans("paged_attention_eager", cache, spans, shape, qkv.rows());
        on_cuda!(self, cuda => {
            let layer = cache.device_layer(layer);
            gpu::paged_attention_eager(cuda, qkv.view(), &layer, spans, shape, out.view())
        });
        let cache = cache.layer(layer);
        fast!(
            self,
            cpu::eager::paged_attention_eager(self.isa, qkv, cache, (spans, shape), out)
        );
        reference::paged_attention(qkv, cache, spans, shape, out)
    }

    /// Attention, without a mask, of each segment of `len` consecutive rows with itself (a vision
    /// tower). qkv `[n * len, (heads + 2 kv_heads) * head_dim]`: q | k | v; scores times `scale`; out
    /// `[n * len, heads * head_dim]`.
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn full_attention(
        &self,
        qkv: &Buffer,
        len: usize,
        heads: Heads,
        (scale, precision): (f32, Precision),
        out: &mut Buffer,
    ) {
        check_attention("full_attention", qkv, heads, out);
        assert!(
            len > 0,
            "full_attention: segments without rows. This is a bug."
        );
        require(
            "full_attention",
            "rows beyond whole segments",
            qkv.rows() % len,
            0,
        );
        // Where scratch is 16-bit, so is attention.
        on_cuda!(self, cuda => gpu::full_attention(cuda, qkv.view(), len, heads, scale, out.view()));
        fast!(
            self,
            cpu::attention::full_attention(self.isa, qkv, (len, heads, (scale, precision)), out)
        );
        if precision == Precision::Int8 {
            return reference::bytes::full_attention(qkv, len, heads, scale, out);
        }
        reference::full_attention(qkv, len, heads, scale, out);
    }
}

#[track_caller]
fn check_attention(op: &str, qkv: &Buffer, heads: Heads, out: &Buffer) {
    heads.queries_per_kv();
    require(op, "columns of qkv", qkv.cols(), heads.qkv_cols());
    require(
        op,
        "columns of out",
        out.cols(),
        heads.heads * heads.head_dim,
    );
    require(op, "rows of out", out.rows(), qkv.rows());
}

#[track_caller]
fn check_cache(op: &str, cache: &KvCache, heads: Heads, layer: usize) {
    let (found, layers) = (cache.heads(), cache.layers());
    assert!(
        (found.kv_heads, found.head_dim) == (heads.kv_heads, heads.head_dim) && layer < layers,
        "{op}: layer {layer} of {layers}, {heads:?} with a cache for {found:?}. This is a bug."
    );
}

#[track_caller]
fn check_spans(op: &str, cache: &KvCache, spans: &[Span<'_>], shape: &AttentionShape, rows: usize) {
    assert!(
        shape.window != Some(0),
        "{op}: a window of no keys. This is a bug."
    );
    let mut next_row = 0;
    for span in spans {
        let fits = span.q_start + span.q_len <= rows
            && span.q_len <= span.kv_len
            && span.kv_len <= span.blocks.len() * KV_BLOCK;
        assert!(fits, "{op}: {span:?} with {rows} rows. This is a bug.");
        assert!(
            span.q_start >= next_row,
            "{op}: {span:?} overlaps an earlier one. This is a bug."
        );
        next_row = span.q_start + span.q_len;
        span.blocks
            .iter()
            .for_each(|block| cache.check_block(*block));
    }
}
