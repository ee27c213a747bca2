//! Blocks of keys and values for the kernels that compute in f32.
//!
//! Decision: such a kernel reads keys as `[d][KV_BLOCK]` and values as `[KV_BLOCK][d]`. An f32 cache
//! lies so and is read where it is; the other types are widened a block at a time into the thread's
//! scratch, which the block's queries then share, or, for a few queries, on the way into the product
//! (`pairs.rs`). Widening is exact (int8: rounded once, code times scale), so the results are those of the
//! reference up to the order of sums, and the same both ways.

use std::cell::Cell;

use crate::buffer::Aligned;
use crate::cpu::pairs::{Pairs, Product, pairs_product};
use crate::cpu::scratch::with;
use crate::cpu::simd::Simd;
use crate::cpu::small::{Small, small_product};
use crate::kv_cache::{KV_BLOCK, KvDtype, LayerCache, Record};

thread_local! {
    static WIDE: Cell<Option<Aligned<f32>>> = const { Cell::new(None) };
}

/// The keys and values of one head.
pub(crate) trait Blocks {
    /// Makes a block ready to be read.
    fn load<S: Simd>(&mut self, s: S, block: usize);
    /// The keys of the block that was loaded last, `[d][KV_BLOCK]`.
    fn keys(&self, block: usize) -> &[f32];
    /// The values of the block that was loaded last, `[KV_BLOCK][d]`.
    fn values(&self, block: usize) -> &[f32];
    /// What of a block that will be loaded is worth fetching.
    fn ahead(&self, block: usize) -> &[f32];

    /// The products of queries `q` `[rows, d]` with the first so many keys of a block to `out` `[rows, KV_BLOCK]`,
    /// in whole registers; the rest of `out` may be written too.
    #[inline(always)]
    fn scores<S: Simd>(
        &mut self,
        s: S,
        (block, keys): (usize, usize),
        (q, d): (&[f32], usize),
        out: &mut [f32],
    ) {
        self.load(s, block);
        let product = Small {
            a: q,
            a_stride: d,
            b: self.keys(block),
            b_stride: KV_BLOCK,
            depth: d,
            cols: keys.next_multiple_of(S::LANES),
            c_stride: KV_BLOCK,
            next: self.values(block),
        };
        small_product(s, &product, q.len() / d, None, out);
    }

    /// `out[row] = out[row] * keep[row] + p·values`, for out `[rows, d]` and the weights p `[rows, KV_BLOCK]` of
    /// the first so many keys of the block whose scores came last; `next` is the block that follows.
    #[inline(always)]
    fn outputs<S: Simd>(
        &self,
        s: S,
        (block, next): (usize, Option<usize>),
        (p, keys, keep): (&[f32], usize, &[f32]),
        (out, d): (&mut [f32], usize),
    ) {
        let product = Small {
            a: p,
            a_stride: KV_BLOCK,
            b: self.values(block),
            b_stride: d,
            depth: keys,
            cols: d,
            c_stride: d,
            next: next.map_or(&[], |next| self.ahead(next)),
        };
        small_product(s, &product, keep.len(), Some(keep), out);
    }
}

/// Blocks of an f32 cache.
pub(crate) struct Paged<'a> {
    pub(crate) cache: &'a LayerCache,
    pub(crate) kv_head: usize,
    pub(crate) table: &'a [u32],
}

impl Paged<'_> {
    fn record(&self, block: usize) -> (&[f32], &[f32]) {
        let record = self.cache.record(self.table[block], self.kv_head);
        bytemuck::cast_slice(record).split_at(self.cache.record.keys_len())
    }
}

impl Blocks for Paged<'_> {
    fn load<S: Simd>(&mut self, _: S, _: usize) {}
    fn keys(&self, block: usize) -> &[f32] {
        self.record(block).0
    }
    fn values(&self, block: usize) -> &[f32] {
        self.record(block).1
    }
    fn ahead(&self, block: usize) -> &[f32] {
        self.keys(block)
    }
}

/// Blocks of a cache of another type for at most [`ROWS`](crate::cpu::pairs::ROWS) queries.
pub(crate) struct Pairwise<'a> {
    pub(crate) cache: &'a LayerCache,
    pub(crate) kv_head: usize,
    pub(crate) table: &'a [u32],
}

impl Pairwise<'_> {
    fn record(&self, block: usize) -> (Record, &[u32]) {
        let form = self.cache.record;
        let record = self.cache.record(self.table[block], self.kv_head);
        assert!(record.len() == form.len());
        (form, record)
    }
}

impl Blocks for Pairwise<'_> {
    fn load<S: Simd>(&mut self, _: S, _: usize) {}
    fn keys(&self, _: usize) -> &[f32] {
        &[]
    }
    fn values(&self, _: usize) -> &[f32] {
        &[]
    }
    fn ahead(&self, _: usize) -> &[f32] {
        &[]
    }

    #[inline(always)]
    fn scores<S: Simd>(
        &mut self,
        s: S,
        (block, _): (usize, usize),
        (q, d): (&[f32], usize),
        out: &mut [f32],
    ) {
        let (form, record) = self.record(block);
        let (rows, columns) = (q.len() / d, KV_BLOCK);
        macro_rules! product {
            ($b:expr) => {{
                let (a, a_stride, depth, cols) = (q, d, d, KV_BLOCK);
                let product = Product {
                    a,
                    a_stride,
                    b: $b,
                    depth,
                    cols,
                };
                // SAFETY: the record has pairs of d values of KV_BLOCK keys, and a scale of each.
                unsafe { pairs_product(s, &product, rows, None, out) };
            }};
        }
        if form.dtype == KvDtype::Bf16 {
            product!(Bf16Pairs {
                pairs: record,
                columns
            });
        } else {
            let (codes, scales) = (bytemuck::cast_slice(record), form.scales(record));
            product!(Int8Pairs::<true> {
                codes,
                columns,
                scales
            });
        }
    }

    #[inline(always)]
    fn outputs<S: Simd>(
        &self,
        s: S,
        (block, _): (usize, Option<usize>),
        (p, keys, keep): (&[f32], usize, &[f32]),
        (out, d): (&mut [f32], usize),
    ) {
        let (form, record) = self.record(block);
        let (columns, values) = (form.columns(), &record[form.keys_len()..]);
        macro_rules! product {
            ($b:expr) => {{
                let (a, a_stride, depth, cols) = (p, KV_BLOCK, keys, d);
                let product = Product { a, a_stride, b: $b, depth, cols };
                // SAFETY: the record has pairs of KV_BLOCK values, each of whole registers of columns, and a
                // scale of each.
                unsafe { pairs_product(s, &product, keep.len(), Some(keep), out) };
            }};
        }
        if form.dtype == KvDtype::Bf16 {
            product!(Bf16Pairs {
                pairs: values,
                columns
            });
        } else {
            let scales = &form.scales(record)[KV_BLOCK..];
            product!(Int8Pairs::<false> {
                codes: bytemuck::cast_slice(values),
                columns,
                scales
            });
        }
    }
}

/// Pairs of bf16, `[pairs][columns]`.
#[derive(Clone, Copy)]
struct Bf16Pairs<'a> {
    pairs: &'a [u32],
    columns: usize,
}

impl Pairs for Bf16Pairs<'_> {
    const BYTES: usize = 4;

    #[inline(always)]
    fn place(self, pair: usize, column: usize) -> *const u8 {
        let start = self.pairs.as_ptr();
        start.wrapping_add(pair * self.columns + column).cast()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(self, s: S, pair: usize, column: usize) -> (S::F, S::F) {
        // SAFETY: the caller's contract.
        unsafe { s.load_bf16_pairs(self.place(pair, column)) }
    }
}

/// Pairs of codes, `[pairs][columns]`, and a scale of each column (keys) or of each row (values).
#[derive(Clone, Copy)]
struct Int8Pairs<'a, const KEYS: bool> {
    codes: &'a [u8],
    columns: usize,
    scales: &'a [f32],
}

impl<const KEYS: bool> Pairs for Int8Pairs<'_, KEYS> {
    const BYTES: usize = 2;

    #[inline(always)]
    fn place(self, pair: usize, column: usize) -> *const u8 {
        let start = self.codes.as_ptr();
        start.wrapping_add(2 * (pair * self.columns + column))
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(self, s: S, pair: usize, column: usize) -> (S::F, S::F) {
        // SAFETY: the caller's contract; as many scales as columns, or two for a pair.
        unsafe {
            let (first, second) = s.load_byte_pairs(self.place(pair, column));
            let (x, y) = if KEYS {
                let scales = s.load(self.scales.as_ptr().add(column));
                (scales, scales)
            } else {
                let [x, y] = *self.scales.as_ptr().add(2 * pair).cast::<[f32; 2]>();
                (s.splat(x), s.splat(y))
            };
            (s.mul(s.to_float(first), x), s.mul(s.to_float(second), y))
        }
    }
}

/// Blocks of a cache of another type.
pub(crate) struct Widened<'a> {
    cache: &'a LayerCache,
    kv_head: usize,
    table: &'a [u32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

impl<'a> Widened<'a> {
    /// Runs `work` with the blocks, and room for one in the thread's scratch.
    pub(crate) fn with<R>(
        cache: &'a LayerCache,
        kv_head: usize,
        table: &'a [u32],
        work: impl FnOnce(&mut Widened<'_>) -> R,
    ) -> R {
        let len = cache.record.dim * KV_BLOCK;
        with(&WIDE, 2 * len, |scratch| {
            let (keys, values) = scratch.split_at_mut(len);
            work(&mut Widened {
                cache,
                kv_head,
                table,
                keys,
                values,
            })
        })
    }
}

impl Blocks for Widened<'_> {
    #[inline(always)]
    fn load<S: Simd>(&mut self, s: S, block: usize) {
        let record = self.cache.record(self.table[block], self.kv_head);
        widen(s, self.cache.record, record, self.keys, self.values);
    }
    fn keys(&self, _: usize) -> &[f32] {
        self.keys
    }
    fn values(&self, _: usize) -> &[f32] {
        self.values
    }
    fn ahead(&self, _: usize) -> &[f32] {
        &[]
    }
}

/// A record's keys to `[d][KV_BLOCK]`, its values to `[KV_BLOCK][d]`.
#[inline(always)]
fn widen<S: Simd>(s: S, form: Record, record: &[u32], keys: &mut [f32], values: &mut [f32]) {
    match form.dtype {
        KvDtype::F32 => unreachable!("an f32 cache is read where it is"),
        KvDtype::Bf16 => widen_bf16(s, form, record, keys, values),
        KvDtype::Int8 => widen_int8(form, record, keys, values),
    }
}

#[inline(always)]
fn widen_bf16<S: Simd>(s: S, form: Record, record: &[u32], keys: &mut [f32], values: &mut [f32]) {
    let (d, columns) = (form.dim, form.columns());
    assert!(record.len() == form.len());
    assert!(keys.len() == d * KV_BLOCK && values.len() == d * KV_BLOCK);
    let (from, keys) = (record.as_ptr(), keys.as_mut_ptr());
    for pair in 0..form.pairs() {
        for lane in (0..KV_BLOCK).step_by(S::LANES) {
            // SAFETY: pair `pair` of KV_BLOCK keys is in the record, rows 2 pair and, if the head has
            // it, 2 pair + 1 in keys.
            unsafe {
                let pairs = from.add(pair * KV_BLOCK + lane);
                let (first, second) = s.load_bf16_pairs(pairs.cast());
                s.store(keys.add(2 * pair * KV_BLOCK + lane), first);
                if 2 * pair + 1 < d {
                    s.store(keys.add((2 * pair + 1) * KV_BLOCK + lane), second);
                }
            }
        }
    }
    let (from, values) = (record[form.keys_len()..].as_ptr(), values.as_mut_ptr());
    for pair in 0..KV_BLOCK / 2 {
        for column in (0..d).step_by(S::LANES) {
            let n = S::LANES.min(d - column);
            // SAFETY: the record's rows have whole registers of columns; n values are left in rows
            // 2 pair and 2 pair + 1 of values.
            unsafe {
                let pairs = from.add(pair * columns + column);
                let (first, second) = s.load_bf16_pairs(pairs.cast());
                s.store_part(values.add(2 * pair * d + column), first, n);
                s.store_part(values.add((2 * pair + 1) * d + column), second, n);
            }
        }
    }
}

#[inline(always)]
fn widen_int8(form: Record, record: &[u32], keys: &mut [f32], values: &mut [f32]) {
    let (d, columns) = (form.dim, form.columns());
    let (key_scales, value_scales) = form.scales(record).split_at(KV_BLOCK);
    let codes: &[i8] = bytemuck::cast_slice(record);
    let (key_codes, value_codes) = codes.split_at(4 * form.keys_len());
    for (i, keys) in keys.chunks_exact_mut(KV_BLOCK).enumerate() {
        let codes = &key_codes[i / 2 * KV_BLOCK * 2..][..KV_BLOCK * 2];
        for ((key, pair), scale) in keys.iter_mut().zip(codes.chunks_exact(2)).zip(key_scales) {
            *key = f32::from(pair[i % 2]) * scale;
        }
    }
    for (offset, values) in values.chunks_exact_mut(d).enumerate() {
        let codes = &value_codes[offset / 2 * columns * 2..][..columns * 2];
        for (value, pair) in values.iter_mut().zip(codes.chunks_exact(2)) {
            *value = f32::from(pair[offset % 2]) * value_scales[offset];
        }
    }
}
