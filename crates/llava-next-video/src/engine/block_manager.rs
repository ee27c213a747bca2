//! Which blocks of the cache belong to whom: integers only, the memory itself is the kernels'.
//!
//! Decision: a block may belong to several sequences (beams, several answers, questions that begin
//! alike); it is freed with its last owner, and copied before one of several owners writes to it. A block
//! whose content is known by name is kept when its last owner leaves, for the next sequence that begins
//! the same way, until another needs the room; the one that has been without an owner longest goes first.
//! Names are digests (see `prefix.rs`); the block manager compares them and knows nothing behind them.

use std::collections::{BTreeMap, HashMap};

use super::prefix::{Digest, TokenKey};

/// Blocks under one parent that are looked through for the longest common beginning.
const SIBLINGS: usize = 32;

/// What stands in a block that may be found again.
#[derive(Debug, Clone)]
pub struct Content {
    /// The name of everything before the block.
    pub parent: Digest,
    /// The name of everything up to its end, where it is full.
    pub name: Option<Digest>,
    /// Its tokens.
    pub keys: Vec<TokenKey>,
}

/// Free list, owner counts, and the blocks that can be found by content.
#[derive(Debug, Default)]
pub struct BlockManager {
    owners: Vec<u32>,
    free: Vec<u32>,
    contents: HashMap<u32, Content>,
    by_name: HashMap<Digest, u32>,
    by_parent: HashMap<Digest, Vec<u32>>,
    /// Blocks with content and without an owner, by when they lost it, and the other way round.
    kept: BTreeMap<u64, u32>,
    kept_since: HashMap<u32, u64>,
    clock: u64,
}

impl BlockManager {
    /// Blocks in the pool.
    pub fn capacity(&self) -> usize {
        self.owners.len()
    }

    /// Blocks that can be handed out: without an owner, kept ones included.
    pub fn available(&self) -> usize {
        self.free.len() + self.kept.len()
    }

    /// Blocks without an owner whose content may be found again.
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// True where a block has no owner but its content is kept.
    pub fn is_kept(&self, block: u32) -> bool {
        self.kept_since.contains_key(&block)
    }

    /// Adds blocks so that at least `wanted` are available; returns the new capacity.
    pub fn ensure_available(&mut self, wanted: usize) -> usize {
        let missing = wanted.saturating_sub(self.available());
        let first = self.owners.len() as u32;
        self.owners.resize(self.owners.len() + missing, 0);
        // Handed out from the end: the lowest block first, so that a fresh cache is walked in order.
        self.free
            .splice(0..0, (first..first + missing as u32).rev());
        self.owners.len()
    }

    /// Takes a block, `None` where all have owners. A kept one is forgotten only if no other is free.
    pub fn allocate(&mut self) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.kept.pop_first()?;
                self.kept_since.remove(&block);
                self.forget(block);
                block
            }
        };
        self.owners[block as usize] = 1;
        Some(block)
    }

    /// Adds an owner to each block.
    pub fn share(&mut self, blocks: &[u32]) {
        for block in blocks {
            let owners = &mut self.owners[*block as usize];
            *owners += 1;
            if *owners == 1
                && let Some(since) = self.kept_since.remove(block)
            {
                self.kept.remove(&since);
            }
        }
    }

    /// True where a block has more than one owner.
    pub fn is_shared(&self, block: u32) -> bool {
        self.owners[block as usize] > 1
    }

    /// Takes an owner from each block; those without one are free again, or kept for their content.
    /// The last of them are given away first: what is at a beginning is asked for most.
    pub fn release(&mut self, blocks: &[u32]) {
        for block in blocks.iter().rev() {
            let owners = &mut self.owners[*block as usize];
            *owners -= 1;
            if *owners > 0 {
                continue;
            }
            if self.contents.contains_key(block) {
                self.clock += 1;
                self.kept.insert(self.clock, *block);
                self.kept_since.insert(*block, self.clock);
            } else {
                self.free.push(*block);
            }
        }
    }

    /// Makes a block's content known, unless another block has the same.
    pub fn publish(&mut self, block: u32, content: Content) {
        if content
            .name
            .is_some_and(|name| self.by_name.contains_key(&name))
        {
            return;
        }
        self.forget(block);
        if let Some(name) = content.name {
            self.by_name.insert(name, block);
        }
        let siblings = self.by_parent.entry(content.parent).or_default();
        siblings.push(block);
        self.contents.insert(block, content);
    }

    /// The content of a block is about to change, or it is to be found no more.
    pub fn forget(&mut self, block: u32) {
        let Some(content) = self.contents.remove(&block) else {
            return;
        };
        if let Some(name) = content.name {
            self.by_name.remove(&name);
        }
        if let Some(siblings) = self.by_parent.get_mut(&content.parent) {
            siblings.retain(|sibling| *sibling != block);
            if siblings.is_empty() {
                self.by_parent.remove(&content.parent);
            }
        }
        if let Some(since) = self.kept_since.remove(&block) {
            self.kept.remove(&since);
            self.free.push(block);
        }
    }

    /// The block that ends with this name.
    pub fn find(&self, name: &Digest) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// The block behind `parent` that begins most like `keys`, and how many tokens they share.
    pub fn find_beginning(&self, parent: &Digest, keys: &[TokenKey]) -> Option<(u32, usize)> {
        let siblings = self.by_parent.get(parent)?;
        let common = |block: &u32| {
            let own = &self.contents[block].keys;
            let same = own.iter().zip(keys).take_while(|(a, b)| a == b).count();
            (*block, same)
        };
        siblings
            .iter()
            .rev()
            .take(SIBLINGS)
            .map(common)
            .filter(|(_, same)| *same > 0)
            .max_by_key(|(_, same)| *same)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(parent: u8, name: Option<u8>, ids: &[u32]) -> Content {
        Content {
            parent: [parent; 32],
            name: name.map(|name| [name; 32]),
            keys: ids.iter().map(|id| TokenKey::text(*id)).collect(),
        }
    }

    #[test]
    fn a_shared_block_is_freed_with_its_last_owner() {
        let mut blocks = BlockManager::default();
        assert_eq!(blocks.allocate(), None);
        assert_eq!(blocks.ensure_available(2), 2);
        let a = blocks.allocate().expect("one is free");
        assert_eq!(a, 0);
        blocks.share(&[a]);
        assert!(blocks.is_shared(a));
        blocks.release(&[a]);
        assert!(!blocks.is_shared(a));
        assert_eq!(blocks.available(), 1);
        blocks.release(&[a]);
        assert_eq!(blocks.available(), 2);
    }

    #[test]
    fn what_is_known_is_kept_until_the_room_is_needed() {
        let mut blocks = BlockManager::default();
        blocks.ensure_available(3);
        let [a, b] = [0, 1].map(|_| blocks.allocate().expect("free"));
        blocks.publish(a, content(0, Some(1), &[1, 2]));
        blocks.publish(b, content(1, Some(2), &[3, 4]));
        blocks.release(&[a, b]);
        assert_eq!((blocks.available(), blocks.kept()), (3, 2));
        // Found again, it has an owner again.
        assert_eq!(blocks.find(&[1; 32]), Some(a));
        blocks.share(&[a]);
        assert_eq!((blocks.available(), blocks.kept()), (2, 1));
        blocks.release(&[a]);
        // The free one goes first, then the one that was left alone longest: b, for a was used since.
        assert_eq!(blocks.allocate(), Some(2));
        assert_eq!(blocks.allocate(), Some(b));
        assert_eq!(
            (blocks.find(&[2; 32]), blocks.find(&[1; 32])),
            (None, Some(a))
        );
    }

    #[test]
    fn the_longest_common_beginning_is_found_behind_the_same_parent_only() {
        let mut blocks = BlockManager::default();
        blocks.ensure_available(3);
        let [a, b, c] = [0, 1, 2].map(|_| blocks.allocate().expect("free"));
        blocks.publish(a, content(7, None, &[1, 2, 3]));
        blocks.publish(b, content(7, Some(9), &[1, 2, 4, 5]));
        blocks.publish(c, content(8, None, &[1, 2, 4, 5]));
        let keys: Vec<TokenKey> = [1, 2, 4, 6].map(TokenKey::text).to_vec();
        assert_eq!(blocks.find_beginning(&[7; 32], &keys), Some((b, 3)));
        assert_eq!(blocks.find_beginning(&[6; 32], &keys), None);
        let other = [TokenKey::text(9)];
        assert_eq!(blocks.find_beginning(&[7; 32], &other), None);
        blocks.forget(b);
        assert_eq!(blocks.find_beginning(&[7; 32], &keys), Some((a, 2)));
        assert_eq!(blocks.find(&[9; 32]), None);
    }

    #[test]
    fn the_same_content_is_known_once() {
        let mut blocks = BlockManager::default();
        blocks.ensure_available(2);
        let [a, b] = [0, 1].map(|_| blocks.allocate().expect("free"));
        blocks.publish(a, content(0, Some(1), &[1]));
        blocks.publish(b, content(0, Some(1), &[1]));
        assert_eq!(blocks.find(&[1; 32]), Some(a));
        blocks.release(&[a, b]);
        assert_eq!((blocks.kept(), blocks.available()), (1, 2));
        blocks.forget(a);
        assert_eq!((blocks.kept(), blocks.available()), (0, 2));
    }
}
