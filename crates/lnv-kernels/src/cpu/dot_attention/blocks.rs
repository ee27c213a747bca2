//! Where the blocks of a head come from, always as records of bf16.
//!
//! Decision: the kernels know one form. A bf16 cache is read where it lies, a segment without a cache is
//! packed once, and an int8 block becomes bf16 in the thread's scratch, where it stays in the nearest
//! caches while it is used: code times scale, rounded, which adds little to the error of a code.

use crate::cpu::dot::{Dot, LANES};
use crate::kv_cache::{KV_BLOCK, KvDtype, LayerCache, Record};

/// The blocks of one head.
#[derive(Clone, Copy)]
pub(super) enum Blocks<'a> {
    /// Records one after the other.
    Packed(&'a [u32], Record),
    /// A cache, the head and the sequence's blocks.
    Paged(&'a LayerCache, usize, &'a [u32]),
}

impl Blocks<'_> {
    /// The record of a block; one that has to be made is made in `room`.
    ///
    /// # Safety
    /// A record of bf16 can be written to `room`.
    #[inline(always)]
    pub(super) unsafe fn record(&self, dot: Dot, block: usize, room: *mut u32) -> *const u32 {
        let stored = self.stored(block);
        match self {
            Blocks::Paged(cache, ..) if cache.record.dtype == KvDtype::Int8 => {
                let next = self.ahead(block);
                // SAFETY: the caller's contract; a stored record has its form's length.
                unsafe { widen(dot, cache.record, stored, next, room) };
                room
            }
            _ => stored.as_ptr(),
        }
    }

    /// Whether records are read where they lie.
    pub(super) fn in_place(&self) -> bool {
        !matches!(self, Blocks::Paged(cache, ..) if cache.record.dtype == KvDtype::Int8)
    }

    /// A block as it lies in memory.
    fn stored(&self, block: usize) -> &[u32] {
        match self {
            Blocks::Packed(records, form) => &records[block * form.len()..][..form.len()],
            Blocks::Paged(cache, kv_head, table) => cache.record(table[block], *kv_head),
        }
    }

    /// Where the next block lies; where this one does, if it is the last.
    pub(super) fn ahead(&self, block: usize) -> *const u32 {
        let last = match self {
            Blocks::Packed(records, form) => records.len() / form.len() - 1,
            Blocks::Paged(_, _, table) => table.len() - 1,
        };
        self.stored(last.min(block + 1)).as_ptr()
    }
}

/// An int8 record as one of bf16. Fetches the record at `next` meanwhile.
///
/// # Safety
/// A record of bf16 can be written to `out`.
#[inline(always)]
unsafe fn widen(dot: Dot, form: Record, record: &[u32], next: *const u32, out: *mut u32) {
    assert!(record.len() == form.len());
    let (scales, codes) = (form.scales(record), record.as_ptr().cast::<i8>());
    // 16 lanes hold 8 keys' pairs.
    let mut key_scales = [dot.splat(0.0); KV_BLOCK / 8];
    for (i, key_scales) in key_scales.iter_mut().enumerate() {
        // SAFETY: 8 of KV_BLOCK scales.
        *key_scales = unsafe { dot.load_twice(scales.as_ptr().add(8 * i)) };
    }
    for pair in 0..form.pairs() {
        for (i, scales) in key_scales.chunks_exact(2).enumerate() {
            let at = pair * KV_BLOCK + i * LANES;
            // SAFETY: pair `pair` of KV_BLOCK keys is in both records.
            unsafe {
                let codes = codes.add(2 * at);
                dot.prefetch(next.wrapping_add(at / 2));
                let first = dot.mul(dot.load_codes(codes), scales[0]);
                let second = dot.mul(dot.load_codes(codes.add(LANES)), scales[1]);
                dot.store_bits(out.add(at), dot.round(first, second));
            }
        }
    }
    let values_at = form.pairs() * KV_BLOCK;
    for pair in 0..KV_BLOCK / 2 {
        // SAFETY: two of KV_BLOCK scales.
        let scales = unsafe { dot.load_two(scales.as_ptr().add(KV_BLOCK + 2 * pair)) };
        for column in (0..form.columns()).step_by(LANES) {
            let at = values_at + pair * form.columns() + column;
            // SAFETY: whole registers of columns are in both records.
            unsafe {
                let codes = codes.add(2 * at);
                dot.prefetch(next.wrapping_add(at / 2));
                let first = dot.mul(dot.load_codes(codes), scales);
                let second = dot.mul(dot.load_codes(codes.add(LANES)), scales);
                dot.store_bits(out.add(at), dot.round(first, second));
            }
        }
    }
}
