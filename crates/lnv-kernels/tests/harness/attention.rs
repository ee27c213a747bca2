//! Rotary embedding, cache and attention.

use lnv_kernels::{
    AttentionShape, Buffer, Heads, Isa, KV_BLOCK, KvCache, KvDtype, Ops, Precision, Slot, Span,
};

use crate::{all, assert_close, assert_same, matrix, noise, oracle};

/// `heads` query heads on `kv_heads` key/value heads of `head_dim` values.
const fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads {
        heads,
        kv_heads,
        head_dim,
    }
}

const HEADS: [Heads; 5] = [
    heads(4, 4, 8),
    heads(6, 2, 18),
    heads(7, 1, 40),
    heads(2, 2, 64),
    heads(4, 1, 128),
];

/// Those and the other sizes of real towers and decoders, with 7 and 8 queries to a key.
const MORE_HEADS: [Heads; 4] = [
    heads(7, 1, 128),
    heads(8, 1, 64),
    heads(2, 1, 96),
    heads(1, 1, 80),
];

const DTYPES: [KvDtype; 3] = [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8];

/// What attention over values below 1.3 may differ by from the reference over the same cache: the
/// order of sums, or queries and probabilities that are rounded to 8 bits.
fn tolerance(ops: &Ops, dtype: KvDtype) -> f32 {
    match (ops.isa(), dtype) {
        (Isa::Avx512Bf16 | Isa::Amx, KvDtype::Bf16 | KvDtype::Int8) => 8e-3,
        _ => 3e-6,
    }
}

/// A sequence in a cache, its blocks in disorder among those of another.
struct Sequence {
    heads: Heads,
    dtype: KvDtype,
    qkv: Vec<f32>,
    angles: Vec<f32>,
    blocks: Vec<u32>,
    len: usize,
}

impl Sequence {
    fn new(seed: usize, heads: Heads, dtype: KvDtype, len: usize) -> Sequence {
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
            dtype,
            qkv,
            angles,
            blocks,
            len,
        }
    }

    fn cols(&self) -> usize {
        self.heads.heads * self.heads.head_dim
    }

    fn cache(&self) -> KvCache {
        KvCache::new(2, self.heads, 2 * self.blocks.len(), self.dtype)
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
            let mut out = ops.buffer(to - from, self.cols());
            let (spans, shape) = ([self.span(0, from, to)], self.shape(window));
            ops.paged_attention(&qkv, &cache, 1, &spans, &shape, &mut out);
            all.extend(ops.download(&out));
            from = to;
        }
        all
    }

    /// The attention of the last `rows` tokens, the others being in the cache.
    fn last(&self, ops: &Ops, rows: usize, window: Option<usize>) -> Buffer {
        let mut cache = self.cache();
        let before = self.len - rows;
        // What is in the cache is the reference's, so that only attention is compared.
        self.write(&oracle(), &mut cache, 0, before);
        let qkv = self.write(&oracle(), &mut cache, before, self.len);
        let mut out = ops.buffer(rows, self.cols());
        let (spans, shape) = ([self.span(0, before, self.len)], self.shape(window));
        ops.paged_attention(&qkv, &cache, 1, &spans, &shape, &mut out);
        out
    }
}

#[test]
fn rotation_agrees() {
    for heads in HEADS {
        let sequence = Sequence::new(3, heads, KvDtype::F32, 70);
        let expected = sequence.write(&oracle(), &mut sequence.cache(), 0, 70);
        for ops in all() {
            let found = sequence.write(&ops, &mut sequence.cache(), 0, 70);
            assert_close(&found, &expected, 1e-6, &format!("{} {heads:?}", ops.isa()));
        }
    }
}

#[test]
fn causal_attention_agrees() {
    for heads in HEADS.into_iter().chain(MORE_HEADS) {
        for (len, rows, window) in [
            (1, 1, None),
            (5, 5, None),
            (64, 64, None),
            (65, 65, Some(1)),
            (200, 200, None),
            (201, 201, Some(70)),
            (131, 40, None),
            (333, 7, Some(129)),
        ] {
            for dtype in DTYPES {
                let sequence = Sequence::new(len, heads, dtype, len);
                let expected = sequence.last(&oracle(), rows, window);
                for ops in all() {
                    let found = sequence.last(&ops, rows, window);
                    let what = format!("{} {heads:?} {dtype} {rows}/{len} {window:?}", ops.isa());
                    assert_close(&found, &expected, tolerance(&ops, dtype), &what);
                }
            }
        }
    }
}

/// Every number of query rows, so every way to tile them.
#[test]
fn any_number_of_rows_agrees() {
    for heads in [heads(2, 1, 64), heads(1, 1, 128)] {
        for rows in 1..=70 {
            let sequence = Sequence::new(rows, heads, KvDtype::Bf16, rows + 90);
            let expected = sequence.last(&oracle(), rows, None);
            for ops in all() {
                let found = sequence.last(&ops, rows, None);
                let what = format!("{} {heads:?} {rows}", ops.isa());
                assert_close(&found, &expected, tolerance(&ops, KvDtype::Bf16), &what);
            }
        }
    }
}

#[test]
fn a_prompt_has_the_same_bits_in_every_chunking() {
    for (heads, dtype) in HEADS.into_iter().flat_map(|h| DTYPES.map(|d| (h, d))) {
        for window in [None, Some(1), Some(50), Some(64), Some(100)] {
            let sequence = Sequence::new(8, heads, dtype, 203);
            for ops in all() {
                let whole = sequence.attend(&ops, &[203], window);
                for chunks in [&[1][..], &[64], &[100, 3], &[7, 1, 31], &[202]] {
                    let what = format!("{} {heads:?} {dtype} {window:?} {chunks:?}", ops.isa());
                    assert_same(&sequence.attend(&ops, chunks, window), &whole, &what);
                }
            }
        }
    }
}

/// So long that the keys are cut into segments, which threads may take apart.
#[test]
fn a_long_prompt_has_the_same_bits_in_every_chunking() {
    for (heads, dtype) in [heads(2, 2, 16), heads(3, 1, 8), heads(2, 1, 32)]
        .into_iter()
        .flat_map(|h| DTYPES.map(|d| (h, d)))
    {
        for window in [None, Some(1500)] {
            let len = 2500;
            let sequence = Sequence::new(8, heads, dtype, len);
            let expected = sequence.last(&oracle(), 40, window);
            let tail = 40 * sequence.cols();
            for ops in all().into_iter().filter(|ops| ops.isa() != Isa::Scalar) {
                let what = format!("{} {heads:?} {dtype} {window:?}", ops.isa());
                let whole = sequence.attend(&ops, &[len], window);
                for chunks in [&[2460, 1][..], &[1200, 37]] {
                    let found = sequence.attend(&ops, chunks, window);
                    assert_same(&found, &whole, &format!("{what} {chunks:?}"));
                }
                let found = ops.upload(40, sequence.cols(), &whole[whole.len() - tail..]);
                // Rotated here by this instruction set, there by the reference's.
                let tolerance = 10.0 * tolerance(&ops, dtype);
                assert_close(&found, &expected, tolerance, &what);
            }
        }
    }
}

#[test]
fn a_sequence_has_the_same_bits_in_every_batch() {
    for (heads, dtype) in HEADS.into_iter().flat_map(|h| DTYPES.map(|d| (h, d))) {
        let (long, short) = (
            Sequence::new(4, heads, dtype, 150),
            Sequence::new(5, heads, dtype, 33),
        );
        let cols = long.cols();
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
            let what = format!("{} {heads:?} {dtype}", ops.isa());
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

/// What lies in a block beyond the sequence does not matter, be it no number at all.
#[test]
fn what_is_beyond_the_sequence_is_not_read() {
    for (heads, dtype) in HEADS.into_iter().flat_map(|h| DTYPES.map(|d| (h, d))) {
        for (len, rows) in [(67, 1), (67, 9), (69, 67)] {
            let sequence = Sequence::new(6, heads, dtype, len);
            for ops in all() {
                let expected = sequence.last(&ops, rows, None);
                let mut cache = sequence.cache();
                let blocks = &sequence.blocks;
                let poison = Sequence {
                    qkv: vec![f32::NAN; blocks.len() * KV_BLOCK * heads.qkv_cols()],
                    angles: vec![f32::NAN; blocks.len() * KV_BLOCK * heads.head_dim],
                    blocks: blocks.clone(),
                    len: blocks.len() * KV_BLOCK,
                    ..sequence
                };
                poison.write(&oracle(), &mut cache, 0, poison.len);
                sequence.write(&oracle(), &mut cache, 0, len - rows);
                let qkv = sequence.write(&oracle(), &mut cache, len - rows, len);
                let mut out = ops.buffer(rows, sequence.cols());
                let spans = [sequence.span(0, len - rows, len)];
                ops.paged_attention(&qkv, &cache, 1, &spans, &sequence.shape(None), &mut out);
                let what = format!("{} {heads:?} {dtype} {rows}/{len}", ops.isa());
                assert_same(&ops.download(&out), &ops.download(&expected), &what);
            }
        }
    }
}

/// A block that was copied, in a cache that has grown, serves as the one that it was copied from.
#[test]
fn a_copied_block_serves_as_well() {
    for (heads, dtype) in HEADS.into_iter().flat_map(|h| DTYPES.map(|d| (h, d))) {
        let sequence = Sequence::new(6, heads, dtype, 97);
        for ops in all() {
            let mut cache = sequence.cache();
            let qkv = sequence.write(&ops, &mut cache, 0, 97);
            let attend = |cache: &KvCache, blocks: &[u32]| {
                let mut out = ops.buffer(97, sequence.cols());
                let span = Span {
                    blocks,
                    ..sequence.span(0, 0, 97)
                };
                ops.paged_attention(&qkv, cache, 1, &[span], &sequence.shape(None), &mut out);
                ops.download(&out)
            };
            let expected = attend(&cache, &sequence.blocks);
            cache.grow(9).unwrap();
            cache.copy_block(sequence.blocks[1], 8);
            let found = attend(&cache, &[sequence.blocks[0], 8]);
            assert_same(
                &found,
                &expected,
                &format!("{} {heads:?} {dtype}", ops.isa()),
            );
        }
    }
}

#[test]
fn the_eager_form_agrees_and_returns_the_weights() {
    for (heads, dtype) in HEADS.into_iter().flat_map(|h| DTYPES.map(|d| (h, d))) {
        for window in [None, Some(20)] {
            let sequence = Sequence::new(6, heads, dtype, 97);
            let shape = sequence.shape(window);
            let mut cache = sequence.cache();
            let qkv = sequence.write(&oracle(), &mut cache, 0, 97);
            let spans = [sequence.span(0, 0, 97)];
            let mut expected = oracle().buffer(97, sequence.cols());
            let eager = |ops: &Ops, out: &mut Buffer| {
                ops.paged_attention_eager(&qkv, &cache, 1, &spans, &shape, out)
            };
            let expected_weights = eager(&oracle(), &mut expected);
            for ops in all() {
                let what = format!("{} {heads:?} {dtype} {window:?}", ops.isa());
                let mut out = ops.buffer(97, sequence.cols());
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

/// The last queries alone have the output and the weights that they have in the whole prompt.
#[test]
fn the_eager_form_has_the_same_bits_in_every_chunking() {
    for (heads, window) in HEADS
        .into_iter()
        .flat_map(|h| [None, Some(70)].map(|w| (h, w)))
    {
        let sequence = Sequence::new(2, heads, KvDtype::F32, 203);
        let (cols, shape) = (sequence.cols(), sequence.shape(window));
        for ops in all() {
            let mut cache = sequence.cache();
            let qkv = sequence.write(&ops, &mut cache, 0, 203);
            let tail = ops.download_rows(&qkv, 150..203);
            let tail = ops.upload(53, heads.qkv_cols(), &tail);
            let run = |qkv: &Buffer, span: Span<'_>| {
                let mut out = ops.buffer(span.q_len, cols);
                let weights = ops.paged_attention_eager(qkv, &cache, 1, &[span], &shape, &mut out);
                (ops.download(&out), weights[0].clone())
            };
            let (whole, whole_weights) = run(&qkv, sequence.span(0, 0, 203));
            let (part, part_weights) = run(&tail, sequence.span(0, 150, 203));
            let what = format!("{} {heads:?} {window:?}", ops.isa());
            assert_same(&part, &whole[150 * cols..], &what);
            for (part, whole) in part_weights
                .chunks(53 * 203)
                .zip(whole_weights.chunks(203 * 203))
            {
                assert_same(part, &whole[150 * 203..], &what);
            }
        }
    }
}

#[test]
fn bidirectional_attention_agrees() {
    for heads in HEADS.into_iter().chain(MORE_HEADS).chain([
        heads(2, 2, 72),
        heads(1, 1, 7),
        heads(2, 1, 33),
    ]) {
        for (len, segments) in [(1, 3), (5, 1), (17, 2), (64, 1), (145, 2), (200, 1)] {
            let qkv = matrix(len, len * segments, heads.qkv_cols());
            let scale = 1.0 / (heads.head_dim as f32).sqrt();
            let cols = heads.heads * heads.head_dim;
            let mut expected = oracle().buffer(len * segments, cols);
            let exact = (scale, Precision::F32);
            oracle().full_attention(&qkv, len, heads, exact, &mut expected);
            for ops in all() {
                for (precision, dtype) in [
                    (Precision::F32, KvDtype::F32),
                    (Precision::Bf16, KvDtype::Bf16),
                ] {
                    let mut out = ops.buffer(len * segments, cols);
                    ops.full_attention(&qkv, len, heads, (scale, precision), &mut out);
                    let what = format!("{} {heads:?} {precision:?} {segments}x{len}", ops.isa());
                    assert_close(&out, &expected, tolerance(&ops, dtype), &what);
                }
            }
            bytes_agree(&qkv, len, heads, &expected);
        }
    }
}

/// Attention in bytes is near that in f32, and where it runs near its slow twin.
fn bytes_agree(qkv: &Buffer, len: usize, heads: Heads, exact: &Buffer) {
    let how = (1.0 / (heads.head_dim as f32).sqrt(), Precision::Int8);
    let attend = |ops: &Ops| {
        let mut out = ops.buffer(exact.rows(), exact.cols());
        ops.full_attention(qkv, len, heads, how, &mut out);
        out
    };
    let expected = attend(&oracle());
    assert_close(&expected, exact, 0.02, &format!("{heads:?} {len}"));
    for ops in all() {
        let what = format!("{} {heads:?} Int8 {len}", ops.isa());
        // A probability may be rounded the other way.
        let tolerance = if ops.isa() == Isa::Avx512Vnni {
            1e-4
        } else {
            0.02
        };
        assert_close(&attend(&ops), &expected, tolerance, &what);
    }
}

/// A segment has the same bits whatever segments are beside it.
#[test]
fn a_picture_has_the_same_bits_in_every_batch() {
    let (heads, len) = (heads(2, 2, 64), 145);
    let cols = heads.heads * heads.head_dim;
    for ops in all() {
        for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
            let attend = |qkv: &Buffer| {
                let mut out = ops.buffer(qkv.rows(), cols);
                ops.full_attention(qkv, len, heads, (0.125, precision), &mut out);
                ops.download(&out)
            };
            let qkv = matrix(4, 3 * len, heads.qkv_cols());
            let second = ops.download_rows(&qkv, len..2 * len);
            let second = ops.upload(len, heads.qkv_cols(), &second);
            let expected = attend(&second);
            let found = &attend(&qkv)[len * cols..2 * len * cols];
            assert_same(found, &expected, &format!("{} {precision:?}", ops.isa()));
        }
    }
}

/// Large scores: the maximum must be subtracted, and far keys must vanish, not overflow.
#[test]
fn extreme_scores_stay_finite() {
    let heads = heads(1, 1, 16);
    let qkv: Vec<f32> = noise(1, 130 * heads.qkv_cols())
        .iter()
        .map(|v| v * 60.0)
        .collect();
    for ops in all() {
        for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
            let qkv = ops.upload(130, heads.qkv_cols(), &qkv);
            let mut out = ops.buffer(130, 16);
            ops.full_attention(&qkv, 130, heads, (1.0, precision), &mut out);
            assert!(
                ops.download(&out).iter().all(|v| v.abs() <= 60.3),
                "{} {precision:?}",
                ops.isa()
            );
        }
    }
}

/// Scores that grow along the keys, from far below to far above: the reference point of the
/// exponents moves again and again.
#[test]
fn growing_scores_agree() {
    for (heads, dtype) in [heads(1, 1, 16), heads(2, 1, 72)]
        .into_iter()
        .flat_map(|h| DTYPES.map(|d| (h, d)))
    {
        let mut sequence = Sequence::new(9, heads, dtype, 300);
        let (d, queries) = (heads.head_dim, heads.heads * heads.head_dim);
        for (i, row) in sequence.qkv.chunks_exact_mut(heads.qkv_cols()).enumerate() {
            row[..queries].fill(4.0);
            row[queries..queries + d].fill(i as f32 / 4.0 - 40.0);
        }
        for angles in sequence.angles.chunks_exact_mut(d) {
            angles[..d / 2].fill(1.0);
            angles[d / 2..].fill(0.0);
        }
        for (rows, window) in [(300, None), (5, None), (60, Some(90))] {
            let expected = sequence.last(&oracle(), rows, window);
            for ops in all() {
                let found = sequence.last(&ops, rows, window);
                let what = format!("{} {heads:?} {dtype} {rows} {window:?}", ops.isa());
                assert_close(&found, &expected, 2.0 * tolerance(&ops, dtype), &what);
            }
        }
    }
}
