//! The rotary embedding, and the way of keys and values into the cache.
//!
//! Decision: two passes. Rows are rotated in parallel; then each head's keys and values are written
//! by one thread, token after token, so that the transposed key block fills in the nearest cache
//! instead of bouncing between cores.

use rayon::prelude::*;

use crate::buffer::Buffer;
use crate::cpu::launch::{Kernel, launch};
use crate::cpu::scratch::Shared;
use crate::cpu::simd::Simd;
use crate::cpu::{SERIAL, each_row};
use crate::isa::Isa;
use crate::kv_cache::{Heads, LayerCache, Record, Slot};

/// Rotates q and k of every row, then writes k and v to the cache; the shapes fit.
pub(crate) fn rope_write_kv(
    isa: Isa,
    qkv: &mut Buffer,
    (cos_sin, heads): (&Buffer, Heads),
    cache: &mut LayerCache,
    slots: &[Slot],
) {
    let Heads {
        heads: q_heads,
        kv_heads,
        head_dim,
    } = heads;
    let (cols, cos_sin) = (qkv.cols(), cos_sin.host());
    let rotated = (q_heads + kv_heads) * head_dim;
    each_row(qkv.host_mut(), cols, |row, values| {
        let cos_sin = &cos_sin[row * head_dim..][..head_dim];
        launch(
            isa,
            Rotate {
                heads: &mut values[..rotated],
                cos_sin,
            },
        );
    });
    let qkv = qkv.host();
    let (record, data) = (cache.record, Shared::new(cache.data.as_mut_slice()));
    let write = Write {
        qkv,
        cols,
        heads,
        slots,
        record,
        data,
    };
    if qkv.len() <= SERIAL {
        (0..kv_heads).for_each(|kv_head| write.head(kv_head));
    } else {
        (0..kv_heads)
            .into_par_iter()
            .for_each(|kv_head| write.head(kv_head));
    }
}

/// Keys and values on their way into the cache.
struct Write<'a> {
    qkv: &'a [f32],
    cols: usize,
    heads: Heads,
    slots: &'a [Slot],
    record: Record,
    data: Shared<u32>,
}

impl Write<'_> {
    fn head(&self, kv_head: usize) {
        let Heads {
            heads,
            kv_heads,
            head_dim: d,
        } = self.heads;
        let (keys_at, values_at) = ((heads + kv_head) * d, (heads + kv_heads + kv_head) * d);
        for (row, slot) in self.qkv.chunks_exact(self.cols).zip(self.slots) {
            let (block, len) = (slot.block as usize, self.record.len());
            // SAFETY: Ops checked the slots, so all of this head's record is inside the cache; this
            // thread alone writes the head.
            let record = unsafe {
                let start = self.data.at((block * kv_heads + kv_head) * len);
                std::slice::from_raw_parts_mut(start, len)
            };
            let (key, value) = (&row[keys_at..][..d], &row[values_at..][..d]);
            self.record.write(record, slot.offset as usize, key, value);
        }
    }
}

/// Rotates every head of `heads` (`[heads, d]`) by the angles of `cos_sin` (`cos | sin`, d values).
struct Rotate<'a> {
    heads: &'a mut [f32],
    cos_sin: &'a [f32],
}

impl Kernel for Rotate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let d = self.cos_sin.len();
        let half = d / 2;
        let (cos, sin) = (self.cos_sin.as_ptr(), self.cos_sin[half..].as_ptr());
        for head in self.heads.chunks_exact_mut(d) {
            let (low, high) = head.split_at_mut(half);
            let (low, high) = (low.as_mut_ptr(), high.as_mut_ptr());
            for i in (0..half).step_by(S::LANES) {
                let n = S::LANES.min(half - i);
                // SAFETY: n values are left in each half of the head and of the angles from i on.
                unsafe {
                    let (x, y) = (s.load_part(low.add(i), n), s.load_part(high.add(i), n));
                    let (c, z) = (s.load_part(cos.add(i), n), s.load_part(sin.add(i), n));
                    s.store_part(low.add(i), s.fnma(y, z, s.mul(x, c)), n);
                    s.store_part(high.add(i), s.fma(x, z, s.mul(y, c)), n);
                }
            }
        }
    }
}
