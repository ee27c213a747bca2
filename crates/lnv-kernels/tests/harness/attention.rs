//! Rotary embedding, cache and attention.

use lnv_kernels::{AttentionShape, Buffer, Heads, KV_BLOCK, KvCache, Ops, Slot, Span};

use crate::{all, assert_close, assert_same, matrix, noise, oracle};

const HEADS: [Heads; 5] = [
    Heads {
        heads: 4,
        kv_heads: 4,
        head_dim: 8,
    },
    Heads {
        heads: 6,
        kv_heads: 2,
        head_dim: 18,
    },
    Heads {
        heads: 7,
        kv_heads: 1,
        head_dim: 40,
    },
    Heads {
        heads: 2,
        kv_heads: 2,
        head_dim: 64,
    },
    Heads {
        heads: 4,
        kv_heads: 1,
        head_dim: 128,
    },
];

/// A sequence in a cache, its blocks in disorder among those of another.
struct Sequence {
    heads: Heads,
    qkv: Vec<f32>,
    angles: Vec<f32>,
    blocks: Vec<u32>,
    len: usize,
}

impl Sequence {
    fn new(seed: usize, heads: Heads, len: usize) -> Sequence {
        let qkv = noise(seed, len * heads.qkv_cols())
            .iter()
            .map(|v| v * 1.3)
            .collect();
        let angles = noise(seed + 1, len * heads.head_dim);
        let count = len.div_ceil(KV_BLOCK) as u32;
        let blocks = (0..count)
            .rev()
            .map(|block| 2 * block + seed as u32 % 2)
            .collect();
        Sequence {
            heads,
            qkv,
            angles,
            blocks,
            len,
        }
    }

    fn cache(&self) -> KvCache {
        KvCache::new(2, self.heads, 2 * self.blocks.len())
    }

    fn slots(&self, from: usize, to: usize) -> Vec<Slot> {
        let slot = |i: usize| Slot {
            block: self.blocks[i / KV_BLOCK],
            offset: (i % KV_BLOCK) as u32,
        };
        (from..to).map(slot).collect()
    }

    /// Writes tokens `from..to` to the cache and returns their rotated qkv.
    fn write(&self, ops: &Ops, cache: &mut KvCache, from: usize, to: usize) -> Buffer {
        let (cols, d, rows) = (self.heads.qkv_cols(), self.heads.head_dim, to - from);
        let mut qkv = ops.upload(rows, cols, &self.qkv[from * cols..to * cols]);
        let angles = ops.upload(rows, d, &self.angles[from * d..to * d]);
        ops.rope_write_kv(
            &mut qkv,
            &angles,
            self.heads,
            cache,
            1,
            &self.slots(from, to),
        );
        qkv
    }

    fn span(&self, q_start: usize, from: usize, to: usize) -> Span<'_> {
        Span {
            q_start,
            q_len: to - from,
            kv_len: to,
            blocks: &self.blocks,
        }
    }

    fn shape(&self, window: Option<usize>) -> AttentionShape {
        let scale = 1.0 / (self.heads.head_dim as f32).sqrt();
        AttentionShape {
            heads: self.heads,
            scale,
            window,
        }
    }

    /// The attention of all tokens, given to the cache in chunks.
    fn attend(&self, ops: &Ops, chunks: &[usize], window: Option<usize>) -> Vec<f32> {
        let mut cache = self.cache();
        let (mut all, mut from) = (Vec::new(), 0);
        for chunk in chunks.iter().copied().cycle() {
            if from == self.len {
                return all;
            }
            let to = self.len.min(from + chunk);
            let qkv = self.write(ops, &mut cache, from, to);
            let mut out = ops.buffer(to - from, self.heads.heads * self.heads.head_dim);
            let (spans, shape) = ([self.span(0, from, to)], self.shape(window));
            ops.paged_attention(&qkv, &cache, 1, &spans, &shape, &mut out);
            all.extend(ops.download(&out));
            from = to;
        }
        all
    }
}

#[test]
fn rotation_agrees() {
    for heads in HEADS {
        let sequence = Sequence::new(3, heads, 70);
        let expected = sequence.write(&oracle(), &mut sequence.cache(), 0, 70);
        for ops in all() {
            let found = sequence.write(&ops, &mut sequence.cache(), 0, 70);
            assert_close(&found, &expected, 1e-6, &format!("{} {heads:?}", ops.isa()));
        }
    }
}

#[test]
fn causal_attention_agrees() {
    for heads in HEADS {
        for (len, window) in [
            (1, None),
            (5, None),
            (64, None),
            (65, Some(1)),
            (200, None),
            (201, Some(70)),
        ] {
            let sequence = Sequence::new(len, heads, len);
            let cols = heads.heads * heads.head_dim;
            let expected = sequence.attend(&oracle(), &[len], window);
            let expected = oracle().upload(len, cols, &expected);
            for ops in all() {
                let found = oracle().upload(len, cols, &sequence.attend(&ops, &[len], window));
                let what = format!("{} {heads:?} {len} {window:?}", ops.isa());
                assert_close(&found, &expected, 3e-6, &what);
            }
        }
    }
}

#[test]
fn a_prompt_has_the_same_bits_in_every_chunking() {
    for heads in HEADS {
        for window in [None, Some(1), Some(50), Some(64), Some(100)] {
            let sequence = Sequence::new(8, heads, 203);
            for ops in all() {
                let whole = sequence.attend(&ops, &[203], window);
                for chunks in [&[1][..], &[64], &[100, 3], &[7, 1, 31], &[202]] {
                    let what = format!("{} {heads:?} {window:?} {chunks:?}", ops.isa());
                    assert_same(&sequence.attend(&ops, chunks, window), &whole, &what);
                }
            }
        }
    }
}

#[test]
fn a_sequence_has_the_same_bits_in_every_batch() {
    for heads in HEADS {
        let (long, short) = (Sequence::new(4, heads, 150), Sequence::new(5, heads, 33));
        let cols = heads.heads * heads.head_dim;
        for ops in all() {
            let alone = [&long, &short].map(|sequence| {
                let out = sequence.attend(&ops, &[1], None);
                out[out.len() - 3 * cols..].to_vec()
            });
            let mut cache = long.cache();
            let first = long.write(&ops, &mut cache, 0, 150);
            let second = short.write(&ops, &mut cache, 0, 33);
            let last = |buffer: &Buffer, len| ops.download_rows(buffer, len - 3..len);
            let both = [
                last(&first, 150),
                vec![9.0; heads.qkv_cols()],
                last(&second, 33),
            ]
            .concat();
            let qkv = ops.upload(7, heads.qkv_cols(), &both);
            let mut out = ops.buffer(7, cols);
            let spans = [long.span(0, 147, 150), short.span(4, 30, 33)];
            ops.paged_attention(&qkv, &cache, 1, &spans, &long.shape(None), &mut out);
            let what = format!("{} {heads:?}", ops.isa());
            assert_same(&ops.download_rows(&out, 0..3), &alone[0], &what);
            assert_same(
                &ops.download_rows(&out, 3..4),
                &vec![0.0; cols],
                "a row of no span",
            );
            assert_same(&ops.download_rows(&out, 4..7), &alone[1], &what);
        }
    }
}

#[test]
fn the_eager_form_agrees_and_returns_the_weights() {
    for heads in HEADS {
        for window in [None, Some(20)] {
            let sequence = Sequence::new(6, heads, 97);
            let shape = sequence.shape(window);
            let mut cache = sequence.cache();
            let qkv = sequence.write(&oracle(), &mut cache, 0, 97);
            let spans = [sequence.span(0, 0, 97)];
            let mut expected = oracle().buffer(97, heads.heads * heads.head_dim);
            let eager = |ops: &Ops, out: &mut Buffer| {
                ops.paged_attention_eager(&qkv, &cache, 1, &spans, &shape, out)
            };
            let expected_weights = eager(&oracle(), &mut expected);
            for ops in all() {
                let what = format!("{} {heads:?} {window:?}", ops.isa());
                let mut out = ops.buffer(97, heads.heads * heads.head_dim);
                let weights = eager(&ops, &mut out);
                assert_close(&out, &expected, 3e-6, &what);
                assert_eq!(weights.len(), 1);
                let rows = heads.heads * 97;
                let weights = ops.upload(rows, 97, &weights[0]);
                let expected = ops.upload(rows, 97, &expected_weights[0]);
                assert_close(&weights, &expected, 1e-6, &what);
                for row in ops.download(&weights).chunks(97) {
                    assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{what}");
                }
            }
        }
    }
}

#[test]
fn bidirectional_attention_agrees() {
    for heads in HEADS {
        for (len, segments) in [(1, 3), (5, 1), (17, 2), (64, 1), (145, 2)] {
            let qkv = matrix(len, len * segments, heads.qkv_cols());
            let scale = 1.0 / (heads.head_dim as f32).sqrt();
            let cols = heads.heads * heads.head_dim;
            let mut expected = oracle().buffer(len * segments, cols);
            oracle().full_attention(&qkv, len, heads, scale, &mut expected);
            for ops in all() {
                let mut out = ops.buffer(len * segments, cols);
                ops.full_attention(&qkv, len, heads, scale, &mut out);
                let what = format!("{} {heads:?} {segments}x{len}", ops.isa());
                assert_close(&out, &expected, 3e-6, &what);
            }
        }
    }
}

/// Large scores: the maximum must be subtracted, and far keys must vanish, not overflow.
#[test]
fn extreme_scores_stay_finite() {
    let heads = Heads {
        heads: 1,
        kv_heads: 1,
        head_dim: 16,
    };
    let qkv: Vec<f32> = noise(1, 130 * heads.qkv_cols())
        .iter()
        .map(|v| v * 60.0)
        .collect();
    for ops in all() {
        let qkv = ops.upload(130, heads.qkv_cols(), &qkv);
        let mut out = ops.buffer(130, 16);
        ops.full_attention(&qkv, 130, heads, 1.0, &mut out);
        assert!(
            ops.download(&out).iter().all(|v| v.abs() <= 60.0),
            "{}",
            ops.isa()
        );
    }
}
