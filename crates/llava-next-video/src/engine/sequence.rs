//! A sequence in the engine: its ids, and the blocks of the cache that hold its keys and values.

use super::prefix::Chain;

/// One running sequence.
#[derive(Debug, Clone, Default)]
pub struct Sequence {
    /// Row of the batch that it answers.
    pub row: usize,
    /// Prompt and new ids.
    pub ids: Vec<u32>,
    /// How many of the ids are the prompt.
    pub prompt: usize,
    /// How much longer the longest prompt of its batch is. Rotary scaling that looks at the length
    /// (`dynamic`, `longrope`) looks at the whole batch's in the reference, so here too.
    pub behind_longest: usize,
    /// Tokens whose keys and values are in the cache.
    pub cached: usize,
    /// Its blocks, in order.
    pub blocks: Vec<u32>,
    /// The names of its blocks.
    pub(crate) chain: Chain,
}

impl Sequence {
    /// Ids after the prompt.
    pub fn new_ids(&self) -> &[u32] {
        &self.ids[self.prompt..]
    }
}
