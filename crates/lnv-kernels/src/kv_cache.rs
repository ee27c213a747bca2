//! The paged key/value cache.
//!
//! Decision: blocks of [`KV_BLOCK`] tokens; for each layer, block and key/value head one *record*: the
//! keys, then the values. Each type lies as its fastest kernel reads it, with no shuffling:
//!
//! - f32: keys transposed, `[head_dim][KV_BLOCK]`, so that a score is a broadcast of a query's value
//!   times neighbouring keys; values as rows, `[KV_BLOCK][head_dim]`.
//! - bf16: the same in pairs, as the bf16 dot product takes them. Keys
//!   `[head_dim / 2][KV_BLOCK][2]`: pairs along the head; values `[KV_BLOCK / 2][columns][2]`: pairs
//!   along the keys.
//! - int8: bf16's order, one byte a value, then the scale of each token's key and of its value.
//!
//! bf16 rounds to nearest, ties to even, and subnormal values to zero, as the dot product would read
//! them. int8 divides a token's key (or value) by a 127th of its largest size and rounds likewise.
//! What is written does not depend on the instruction set, nor on what is written with it.
//!
//! On a GPU a record is rows of keys, then rows of values (`cuda.rs`, `DeviceLayer`).
//!
//! The memory is zeroed lazily: a cache planned for a long context costs what is written of it.
//!
//! Refused: knowing which block belongs to which sequence. The caller keeps the block tables.

use std::fmt;
#[cfg(feature = "cuda")]
use std::sync::Arc;

use half::bf16;

use crate::KernelError;
use crate::buffer::Aligned;
#[cfg(feature = "cuda")]
use crate::cuda::memory::Memory;
#[cfg(feature = "cuda")]
use crate::cuda::{Cuda, DeviceLayer};

/// Tokens in a block of the cache.
pub const KV_BLOCK: usize = 64;

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32-bit floats: nothing is rounded.
    F32,
    /// bfloat16.
    Bf16,
    /// 8-bit integers with one scale a token and head, for keys and for values.
    Int8,
}

impl KvDtype {
    /// Bytes that one layer keeps of a token: keys, values and what belongs to them.
    pub fn bytes_per_token(self, heads: &Heads) -> usize {
        let record = Record::new(self, heads.head_dim);
        heads.kv_heads * record.len() * 4 / KV_BLOCK
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
            KvDtype::Int8 => "int8",
        })
    }
}

/// The heads of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; each serves `heads / kv_heads` neighbouring query heads.
    pub kv_heads: usize,
    /// Values in a head.
    pub head_dim: usize,
}

impl Heads {
    /// Columns of a fused `q | k | v` matrix.
    pub fn qkv_cols(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Query heads that share a key/value head.
    ///
    /// # Panics
    /// `heads` is no multiple of `kv_heads`.
    pub fn queries_per_kv(&self) -> usize {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "{} query heads cannot share {} key/value heads. This is a bug.",
            self.heads,
            self.kv_heads
        );
        self.heads / self.kv_heads
    }
}

/// Where a token's key and value go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot {
    /// The block.
    pub block: u32,
    /// The token's place in it, below [`KV_BLOCK`].
    pub offset: u32,
}

/// The form of a record: one head's keys and values of a block, in units of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) dtype: KvDtype,
    /// Values in a head.
    pub(crate) dim: usize,
}

impl Record {
    pub(crate) fn new(dtype: KvDtype, dim: usize) -> Record {
        Record { dtype, dim }
    }

    /// Pairs along the head; the last of an odd head has a zero.
    pub(crate) fn pairs(&self) -> usize {
        self.dim.div_ceil(2)
    }

    /// Columns of the values: whole registers; beyond the head there is nothing.
    pub(crate) fn columns(&self) -> usize {
        match self.dtype {
            KvDtype::F32 => self.dim,
            KvDtype::Bf16 | KvDtype::Int8 => self.dim.next_multiple_of(16),
        }
    }

    /// Length of the keys, where the values begin.
    pub(crate) fn keys_len(&self) -> usize {
        match self.dtype {
            KvDtype::F32 => self.dim * KV_BLOCK,
            KvDtype::Bf16 => self.pairs() * KV_BLOCK,
            KvDtype::Int8 => self.pairs() * KV_BLOCK / 2,
        }
    }

    /// Length of keys and values, where int8's scales begin.
    fn scales_at(&self) -> usize {
        let values = match self.dtype {
            KvDtype::F32 => self.columns() * KV_BLOCK,
            KvDtype::Bf16 => self.columns() * KV_BLOCK / 2,
            KvDtype::Int8 => self.columns() * KV_BLOCK / 4,
        };
        self.keys_len() + values
    }

    /// Length.
    pub(crate) fn len(&self) -> usize {
        let scales = match self.dtype {
            KvDtype::Int8 => 2 * KV_BLOCK,
            KvDtype::F32 | KvDtype::Bf16 => 0,
        };
        self.scales_at() + scales
    }

    /// Place of value `i` of the key of token `offset`, in units of the type.
    fn key_at(&self, offset: usize, i: usize) -> usize {
        match self.dtype {
            KvDtype::F32 => i * KV_BLOCK + offset,
            KvDtype::Bf16 | KvDtype::Int8 => (i / 2 * KV_BLOCK + offset) * 2 + i % 2,
        }
    }

    /// Place of value `i` of token `offset`, in units of the type, counted from the first value.
    fn value_at(&self, offset: usize, i: usize) -> usize {
        match self.dtype {
            KvDtype::F32 => offset * self.dim + i,
            KvDtype::Bf16 | KvDtype::Int8 => (offset / 2 * self.columns() + i) * 2 + offset % 2,
        }
    }

    /// Writes the key and the value of token `offset`.
    pub(crate) fn write(&self, record: &mut [u32], offset: usize, key: &[f32], value: &[f32]) {
        let (keys, rest) = record.split_at_mut(self.keys_len());
        let key_at = |i: usize| self.key_at(offset, i);
        let value_at = |i: usize| self.value_at(offset, i);
        match self.dtype {
            KvDtype::F32 => {
                let of = |x: &f32| x.to_bits();
                key.iter()
                    .enumerate()
                    .for_each(|(i, x)| keys[key_at(i)] = of(x));
                let start = value_at(0);
                let rest = &mut rest[start..start + value.len()];
                rest.copy_from_slice(bytemuck::cast_slice(value));
            }
            KvDtype::Bf16 => {
                let keys: &mut [u16] = bytemuck::cast_slice_mut(keys);
                key.iter()
                    .enumerate()
                    .for_each(|(i, x)| keys[key_at(i)] = to_bf16(*x));
                let rest: &mut [u16] = bytemuck::cast_slice_mut(rest);
                value
                    .iter()
                    .enumerate()
                    .for_each(|(i, x)| rest[value_at(i)] = to_bf16(*x));
            }
            KvDtype::Int8 => {
                let (values, scales) = rest.split_at_mut(self.scales_at() - keys.len());
                let (keys, values): (&mut [i8], &mut [i8]) = (
                    bytemuck::cast_slice_mut(keys),
                    bytemuck::cast_slice_mut(values),
                );
                scales[offset] = quantize(key, |i, code| keys[key_at(i)] = code).to_bits();
                let scale = quantize(value, |i, code| values[value_at(i)] = code);
                scales[KV_BLOCK + offset] = scale.to_bits();
            }
        }
    }

    /// Value `i` of the key of token `offset`.
    pub(crate) fn key(&self, record: &[u32], offset: usize, i: usize) -> f32 {
        let at = self.key_at(offset, i);
        match self.dtype {
            KvDtype::F32 => f32::from_bits(record[at]),
            KvDtype::Bf16 => widen(bytemuck::cast_slice::<_, u16>(record)[at]),
            KvDtype::Int8 => {
                f32::from(bytemuck::cast_slice::<_, i8>(record)[at]) * self.scales(record)[offset]
            }
        }
    }

    /// Value `i` of token `offset`.
    pub(crate) fn value(&self, record: &[u32], offset: usize, i: usize) -> f32 {
        let at = self.value_at(offset, i);
        let values = &record[self.keys_len()..];
        match self.dtype {
            KvDtype::F32 => f32::from_bits(values[at]),
            KvDtype::Bf16 => widen(bytemuck::cast_slice::<_, u16>(values)[at]),
            KvDtype::Int8 => {
                let scale = self.scales(record)[KV_BLOCK + offset];
                f32::from(bytemuck::cast_slice::<_, i8>(values)[at]) * scale
            }
        }
    }

    /// int8's scales: of the keys, then of the values.
    pub(crate) fn scales<'a>(&self, record: &'a [u32]) -> &'a [f32] {
        bytemuck::cast_slice(&record[self.scales_at()..self.len()])
    }
}

/// x in bf16: nearest, ties to even; zero if that is subnormal.
fn to_bf16(x: f32) -> u16 {
    let rounded = bf16::from_f32(x);
    let sign = rounded.to_bits() & 0x8000;
    if rounded.is_normal() || !rounded.is_finite() {
        rounded.to_bits()
    } else {
        sign
    }
}

fn widen(bits: u16) -> f32 {
    bf16::from_bits(bits).to_f32()
}

/// Hands out the codes of the values and returns their scale, a 127th of the largest size; not a
/// finite number if a value is none.
fn quantize(values: &[f32], mut put: impl FnMut(usize, i8)) -> f32 {
    let larger = |size: f32, x: &f32| {
        // A NaN stays.
        if x.abs() <= size || size.is_nan() {
            size
        } else {
            x.abs()
        }
    };
    let scale = values.iter().fold(0.0, larger) / 127.0;
    let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (i, x) in values.iter().enumerate() {
        put(i, (x * factor).round_ties_even().clamp(-127.0, 127.0) as i8);
    }
    scale
}

/// Keys and values of one layer: `[blocks][kv_heads]` records.
pub(crate) struct LayerCache {
    pub(crate) data: Aligned<u32>,
    pub(crate) record: Record,
    pub(crate) kv_heads: usize,
}

/// Keys and values of all layers, in blocks.
pub struct KvCache {
    /// Of the processor; none where a GPU has them.
    layers: Vec<LayerCache>,
    #[cfg(feature = "cuda")]
    device: Vec<Memory>,
    heads: Heads,
    blocks: usize,
    dtype: KvDtype,
}

impl KvCache {
    /// A cache of `blocks` blocks of [`KV_BLOCK`] tokens for each of `layers` layers, all zero.
    pub fn new(layers: usize, heads: Heads, blocks: usize, dtype: KvDtype) -> KvCache {
        let layer = |_| LayerCache::new(heads, blocks, dtype);
        KvCache {
            layers: (0..layers).map(layer).collect(),
            #[cfg(feature = "cuda")]
            device: Vec::new(),
            heads,
            blocks,
            dtype,
        }
    }

    /// A cache without blocks in a GPU's memory.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(
        cuda: &Arc<Cuda>,
        layers: usize,
        heads: Heads,
        dtype: KvDtype,
    ) -> KvCache {
        KvCache {
            layers: Vec::new(),
            device: (0..layers).map(|_| cuda.nothing()).collect(),
            heads,
            blocks: 0,
            dtype,
        }
    }

    /// A layer for kernels.
    ///
    /// # Panics
    /// The cache is the host's.
    #[cfg(feature = "cuda")]
    pub(crate) fn device_layer(&self, layer: usize) -> DeviceLayer {
        DeviceLayer {
            ptr: self.device[layer].ptr(),
            kind: self.dtype,
            head_dim: self.heads.head_dim,
        }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        #[cfg(feature = "cuda")]
        if !self.device.is_empty() {
            return self.device.len();
        }
        self.layers.len()
    }

    /// The heads that it was made for.
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// How it keeps keys and values.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// Bytes of address space, all layers together.
    pub fn bytes(&self) -> usize {
        #[cfg(feature = "cuda")]
        if !self.device.is_empty() {
            return self.device.iter().map(Memory::len).sum();
        }
        self.layers.iter().map(|layer| layer.data.bytes()).sum()
    }

    /// Copies block `from` over block `to` in every layer.
    ///
    /// # Panics
    /// A block that does not exist.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        self.check_block(from);
        self.check_block(to);
        #[cfg(feature = "cuda")]
        for memory in &self.device {
            let len = memory.len() / self.blocks;
            let (from, to) = (from as usize * len, to as usize * len);
            memory.cuda().copy((memory, from), (memory, to), len);
        }
        for layer in &mut self.layers {
            let len = layer.kv_heads * layer.record.len();
            let (from, to) = (from as usize * len, to as usize * len);
            layer.data.as_mut_slice().copy_within(from..from + len, to);
        }
    }

    /// Makes it `blocks` blocks large; what is in the present ones stays. Does nothing if it has as
    /// many. Copies the cache, so grow in big steps.
    ///
    /// # Errors
    /// It is on a GPU that has no room; it stays as it was.
    pub fn grow(&mut self, blocks: usize) -> Result<(), KernelError> {
        if blocks <= self.blocks {
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        if !self.device.is_empty() {
            self.grow_on_device(blocks)?;
        }
        for layer in &mut self.layers {
            let mut larger = LayerCache::new(self.heads, blocks, self.dtype);
            let data = layer.data.as_slice();
            larger.data.as_mut_slice()[..data.len()].copy_from_slice(data);
            *layer = larger;
        }
        self.blocks = blocks;
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn grow_on_device(&mut self, blocks: usize) -> Result<(), KernelError> {
        let cuda = Arc::clone(self.device[0].cuda());
        let bytes = blocks * device_block_bytes(&cuda, self.heads, self.dtype);
        let larger = |_: &Memory| cuda.try_alloc(bytes).map_err(KernelError::Cuda);
        let larger: Vec<Memory> = self.device.iter().map(larger).collect::<Result<_, _>>()?;
        for (memory, larger) in self.device.iter_mut().zip(larger) {
            // Keys that nobody wrote must not be NaN: their weight is 0.
            cuda.zero(&larger);
            cuda.copy((memory, 0), (&larger, 0), memory.len());
            *memory = larger;
        }
        Ok(())
    }

    pub(crate) fn check_block(&self, block: u32) {
        assert!(
            (block as usize) < self.blocks,
            "block {block} of a cache of {} blocks. This is a bug.",
            self.blocks
        );
    }

    pub(crate) fn layer(&self, layer: usize) -> &LayerCache {
        &self.layers[layer]
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }
}

/// Bytes of a block of one layer on a GPU.
#[cfg(feature = "cuda")]
fn device_block_bytes(cuda: &Arc<Cuda>, heads: Heads, dtype: KvDtype) -> usize {
    let values = 2 * KV_BLOCK * heads.head_dim;
    let record = match dtype {
        KvDtype::F32 => 4 * values,
        KvDtype::Bf16 => cuda.half().bytes() * values,
        KvDtype::Int8 => values + 2 * KV_BLOCK * size_of::<f32>(),
    };
    heads.kv_heads * record
}

impl LayerCache {
    fn new(heads: Heads, blocks: usize, dtype: KvDtype) -> LayerCache {
        let record = Record::new(dtype, heads.head_dim);
        LayerCache {
            data: Aligned::zeroed(blocks * heads.kv_heads * record.len()),
            record,
            kv_heads: heads.kv_heads,
        }
    }

    /// Where a record starts.
    pub(crate) fn record_at(&self, block: u32, kv_head: usize) -> usize {
        (block as usize * self.kv_heads + kv_head) * self.record.len()
    }

    /// One head's keys and values of a block.
    pub(crate) fn record(&self, block: u32, kv_head: usize) -> &[u32] {
        let start = self.record_at(block, kv_head);
        &self.data.as_slice()[start..start + self.record.len()]
    }

    /// One head's keys and values of a block.
    pub(crate) fn record_mut(&mut self, block: u32, kv_head: usize) -> &mut [u32] {
        let (start, len) = (self.record_at(block, kv_head), self.record.len());
        &mut self.data.as_mut_slice()[start..start + len]
    }
}

impl fmt::Debug for KvCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "KvCache[{} layers, {} blocks, {:?}, {}]",
            self.layers.len(),
            self.blocks,
            self.heads,
            self.dtype
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads {
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
    };

    const ALL: [KvDtype; 3] = [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8];

    #[test]
    fn growing_keeps_the_blocks_and_copying_takes_all_layers() {
        for dtype in ALL {
            let mut cache = KvCache::new(2, HEADS, 2, dtype);
            for layer in 0..2 {
                for kv_head in 0..2 {
                    cache
                        .layer_mut(layer)
                        .record_mut(0, kv_head)
                        .fill(1 + layer as u32);
                }
            }
            cache.grow(5).expect("the host has room");
            cache.copy_block(0, 4);
            assert_eq!(cache.blocks(), 5);
            let bytes = 2 * 5 * KV_BLOCK * dtype.bytes_per_token(&HEADS);
            assert_eq!(cache.bytes(), bytes);
            for layer in 0..2 {
                for kv_head in 0..2 {
                    let record = |block| cache.layer(layer).record(block, kv_head);
                    assert!(record(4).iter().all(|v| *v == 1 + layer as u32));
                    assert!(record(3).iter().all(|v| *v == 0));
                }
            }
            cache.grow(1).expect("smaller is nothing");
            assert_eq!(cache.blocks(), 5);
        }
    }

    /// What comes back of a token, whatever is written around it and in whatever order: the value in
    /// f32, the nearest bf16, the nearest of 255 steps.
    #[test]
    fn a_token_comes_back_rounded() {
        for dim in [1, 7, 8, 18, 40, 64, 72] {
            let token = |seed: usize| -> Vec<f32> {
                (0..dim)
                    .map(|i| ((i * 37 + seed * 11) % 64) as f32 / 31.0 - 1.0)
                    .collect()
            };
            for dtype in ALL {
                let record = Record::new(dtype, dim);
                let mut data = vec![0; record.len()];
                for offset in [5, 0, 63, 4, 1, 17] {
                    record.write(&mut data, offset, &token(offset), &token(offset + 100));
                }
                for offset in [5, 0, 63, 4, 1, 17] {
                    for (i, (key, value)) in
                        token(offset).iter().zip(token(offset + 100)).enumerate()
                    {
                        let key = (*key, record.key(&data, offset, i));
                        let value = (value, record.value(&data, offset, i));
                        for (x, found) in [key, value] {
                            let what = format!("{dtype} {dim} {offset} {i}: {found} for {x}");
                            match dtype {
                                KvDtype::F32 => assert_eq!(x, found, "{what}"),
                                KvDtype::Bf16 => {
                                    assert_eq!(bf16::from_f32(x).to_f32(), found, "{what}");
                                }
                                // Half a step of the largest possible scale, and its rounding.
                                KvDtype::Int8 => {
                                    assert!((x - found).abs() <= 0.501 * 1.04 / 127.0, "{what}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_is_not_hidden_and_subnormals_are_zero() {
        for dtype in ALL {
            let record = Record::new(dtype, 4);
            let mut data = vec![0; record.len()];
            record.write(&mut data, 3, &[1.0, f32::NAN, 0.0, 1.0], &[0.0; 4]);
            assert!(record.key(&data, 3, 1).is_nan(), "{dtype}");
            assert_eq!(record.value(&data, 3, 2), 0.0, "{dtype}");
        }
        assert_eq!(to_bf16(-1e-39), 0x8000);
        assert_eq!(to_bf16(f32::INFINITY), 0x7f80);
        assert_eq!(to_bf16(f32::MIN_POSITIVE), 0x0080);
    }

    /// 32 layers of the 7B keep half a megabyte of a token in f32's half.
    #[test]
    fn bytes_of_a_token() {
        let heads = Heads {
            heads: 32,
            kv_heads: 32,
            head_dim: 128,
        };
        let bytes = ALL.map(|dtype| dtype.bytes_per_token(&heads));
        assert_eq!(bytes, [2 * 4 * 4096, 2 * 2 * 4096, 2 * 4096 + 32 * 2 * 4]);
    }
}
