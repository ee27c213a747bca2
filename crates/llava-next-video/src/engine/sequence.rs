//! A sequence in the engine: its ids, and the blocks of the cache that hold its keys and values.

/// Which medium stands where in a sequence: part of what a cached prefix is compared by, since two
/// videos share their placeholder ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MediaSpan {
    /// First placeholder's index in the ids.
    pub start: usize,
    /// Placeholders.
    pub len: usize,
    /// Digest of the pixels.
    pub digest: u64,
}

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
}

impl Sequence {
    /// Ids after the prompt.
    pub fn new_ids(&self) -> &[u32] {
        &self.ids[self.prompt..]
    }
}
