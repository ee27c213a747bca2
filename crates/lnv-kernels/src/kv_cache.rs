//! The paged key/value cache.
//!
//! Decision: blocks of [`KV_BLOCK`] tokens, for each layer and key/value head one block of keys and
//! one of values side by side in memory. Keys are transposed, `[head_dim][KV_BLOCK]`, so that a
//! score is a broadcast of a query's value times 64 neighbouring keys; values lie as rows,
//! `[KV_BLOCK][head_dim]`, so that an output is a broadcast of a probability times a row. Both
//! reach the speed of a matrix product with no shuffling. The memory is zeroed lazily: a cache
//! planned for a long context costs what is written of it.
//!
//! Refused: knowing which block belongs to which sequence. The caller keeps the block tables.

use crate::buffer::Aligned;

/// Tokens in a block of the cache.
pub const KV_BLOCK: usize = 64;

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

    /// Values in one head's keys (or values) of a block.
    pub(crate) fn block_len(&self) -> usize {
        self.head_dim * KV_BLOCK
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

pub(crate) struct LayerCache {
    /// `[blocks][kv_heads][head_dim][KV_BLOCK]`
    pub(crate) keys: Aligned<f32>,
    /// `[blocks][kv_heads][KV_BLOCK][head_dim]`
    pub(crate) values: Aligned<f32>,
}

/// Keys and values of all layers, in blocks.
pub struct KvCache {
    layers: Vec<LayerCache>,
    heads: Heads,
    blocks: usize,
}

impl KvCache {
    /// A cache of `blocks` blocks of [`KV_BLOCK`] tokens for each of `layers` layers, all zero.
    pub fn new(layers: usize, heads: Heads, blocks: usize) -> KvCache {
        let layer = |_| LayerCache::new(heads, blocks);
        KvCache {
            layers: (0..layers).map(layer).collect(),
            heads,
            blocks,
        }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The heads that it was made for.
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// Bytes of address space, all layers together.
    pub fn bytes(&self) -> usize {
        self.layers
            .iter()
            .map(|layer| layer.keys.bytes() + layer.values.bytes())
            .sum()
    }

    /// Copies block `from` over block `to` in every layer.
    ///
    /// # Panics
    /// A block that does not exist.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        self.check_block(from);
        self.check_block(to);
        let len = self.heads.kv_heads * self.heads.block_len();
        let (from, to) = (from as usize * len, to as usize * len);
        for layer in &mut self.layers {
            layer.keys.as_mut_slice().copy_within(from..from + len, to);
            layer
                .values
                .as_mut_slice()
                .copy_within(from..from + len, to);
        }
    }

    /// Makes it `blocks` blocks large; what is in the present ones stays. Does nothing if it has as
    /// many. Copies the cache, so grow in big steps.
    pub fn grow(&mut self, blocks: usize) {
        if blocks <= self.blocks {
            return;
        }
        for layer in &mut self.layers {
            let mut larger = LayerCache::new(self.heads, blocks);
            let keys = layer.keys.as_slice();
            larger.keys.as_mut_slice()[..keys.len()].copy_from_slice(keys);
            let values = layer.values.as_slice();
            larger.values.as_mut_slice()[..values.len()].copy_from_slice(values);
            *layer = larger;
        }
        self.blocks = blocks;
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

impl LayerCache {
    fn new(heads: Heads, blocks: usize) -> LayerCache {
        let len = blocks * heads.kv_heads * heads.block_len();
        LayerCache {
            keys: Aligned::zeroed(len),
            values: Aligned::zeroed(len),
        }
    }

    /// One head's keys of a block, `[head_dim][KV_BLOCK]`.
    pub(crate) fn key_block(&self, heads: &Heads, block: u32, kv_head: usize) -> &[f32] {
        let start = (block as usize * heads.kv_heads + kv_head) * heads.block_len();
        &self.keys.as_slice()[start..start + heads.block_len()]
    }

    /// One head's values of a block, `[KV_BLOCK][head_dim]`.
    pub(crate) fn value_block(&self, heads: &Heads, block: u32, kv_head: usize) -> &[f32] {
        let start = (block as usize * heads.kv_heads + kv_head) * heads.block_len();
        &self.values.as_slice()[start..start + heads.block_len()]
    }
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "KvCache[{} layers, {} blocks, {:?}]",
            self.layers.len(),
            self.blocks,
            self.heads
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

    #[test]
    fn growing_keeps_the_blocks_and_copying_takes_all_layers() {
        let mut cache = KvCache::new(2, HEADS, 2);
        let len = 2 * 8 * KV_BLOCK;
        for layer in 0..2 {
            cache.layer_mut(layer).keys.as_mut_slice()[..len].fill(1.0 + layer as f32);
            cache.layer_mut(layer).values.as_mut_slice()[..len].fill(-1.0);
        }
        cache.grow(5);
        cache.copy_block(0, 4);
        assert_eq!(cache.blocks(), 5);
        assert_eq!(cache.bytes(), 2 * 2 * 5 * len * 4);
        for layer in 0..2 {
            for kv_head in 0..2 {
                let keys = cache.layer(layer).key_block(&HEADS, 4, kv_head);
                assert!(keys.iter().all(|v| *v == 1.0 + layer as f32));
                let values = cache.layer(layer).value_block(&HEADS, 4, kv_head);
                assert!(values.iter().all(|v| *v == -1.0));
                assert!(cache.layer(layer).key_block(&HEADS, 3, kv_head)[0] == 0.0);
            }
        }
        cache.grow(1);
        assert_eq!(cache.blocks(), 5);
    }
}
