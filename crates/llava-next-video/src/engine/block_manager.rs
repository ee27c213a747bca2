//! Which blocks of the cache belong to whom: integers only, the memory itself is the kernels'.
//!
//! A block may belong to several sequences (beams, several answers to one prompt); it is freed with its
//! last owner, and copied before one of several owners writes to it.

/// Free list and owner counts.
#[derive(Debug, Default)]
pub struct BlockManager {
    owners: Vec<u32>,
    free: Vec<u32>,
}

impl BlockManager {
    /// Blocks in the pool.
    pub fn capacity(&self) -> usize {
        self.owners.len()
    }

    /// Blocks without an owner.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Adds blocks so that at least `wanted` are free; returns the new capacity.
    pub fn ensure_free(&mut self, wanted: usize) -> usize {
        let missing = wanted.saturating_sub(self.free.len());
        let first = self.owners.len() as u32;
        self.owners.resize(self.owners.len() + missing, 0);
        // Handed out from the end: the lowest block first, so that a fresh cache is walked in order.
        self.free
            .splice(0..0, (first..first + missing as u32).rev());
        self.owners.len()
    }

    /// Takes a free block, `None` where there is none.
    pub fn allocate(&mut self) -> Option<u32> {
        let block = self.free.pop()?;
        self.owners[block as usize] = 1;
        Some(block)
    }

    /// Adds an owner to each block.
    pub fn share(&mut self, blocks: &[u32]) {
        for block in blocks {
            self.owners[*block as usize] += 1;
        }
    }

    /// True where a block has more than one owner.
    pub fn is_shared(&self, block: u32) -> bool {
        self.owners[block as usize] > 1
    }

    /// Takes an owner from each block; those without one are free again.
    pub fn release(&mut self, blocks: &[u32]) {
        for block in blocks {
            let owners = &mut self.owners[*block as usize];
            *owners -= 1;
            if *owners == 0 {
                self.free.push(*block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::BlockManager;

    #[test]
    fn a_shared_block_is_freed_with_its_last_owner() {
        let mut blocks = BlockManager::default();
        assert_eq!(blocks.allocate(), None);
        assert_eq!(blocks.ensure_free(2), 2);
        let a = blocks.allocate().expect("one is free");
        assert_eq!(a, 0);
        blocks.share(&[a]);
        assert!(blocks.is_shared(a));
        blocks.release(&[a]);
        assert!(!blocks.is_shared(a));
        assert_eq!(blocks.free_blocks(), 1);
        blocks.release(&[a]);
        assert_eq!(blocks.free_blocks(), 2);
    }
}
