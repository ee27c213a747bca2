//! Features of pictures that were encoded before, and the pass that encodes others.
//!
//! Decision: the unit is what a digest names: a video's frame, pooled and projected, or a whole image,
//! packed. Features are shared, not copied; those that nobody holds stay until the budget of bytes is
//! used up, and the one unused longest goes first. A pass through the tower can be stopped between
//! layers, so that the tokens of others need not wait for it.

use std::collections::HashMap;
use std::sync::Arc;

use lnv_kernels::Buffer;

use super::prefix::Digest;

/// Features by digest, under a budget.
#[derive(Debug)]
pub struct FeatureCache {
    entries: HashMap<Digest, Entry>,
    bytes: usize,
    budget: usize,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    features: Arc<Buffer>,
    used: u64,
}

impl FeatureCache {
    /// Empty. Nothing that is in use is thrown away, so that it may hold more than `budget` bytes for a
    /// time.
    pub fn new(budget: usize) -> Self {
        Self {
            entries: HashMap::new(),
            bytes: 0,
            budget,
            clock: 0,
        }
    }

    /// Bytes of features that are held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The features of a picture.
    pub fn get(&mut self, digest: &Digest) -> Option<Arc<Buffer>> {
        self.clock += 1;
        let entry = self.entries.get_mut(digest)?;
        entry.used = self.clock;
        Some(Arc::clone(&entry.features))
    }

    /// Keeps the features of a picture.
    pub fn insert(&mut self, digest: Digest, features: Buffer) -> Arc<Buffer> {
        self.clock += 1;
        let features = Arc::new(features);
        self.bytes += bytes_of(&features);
        let entry = Entry {
            features: Arc::clone(&features),
            used: self.clock,
        };
        if let Some(old) = self.entries.insert(digest, entry) {
            self.bytes -= bytes_of(&old.features);
        }
        self.shrink();
        features
    }

    /// Throws away what nobody holds, as much as the budget asks for.
    pub fn shrink(&mut self) {
        while self.bytes > self.budget {
            let unused = |(_, entry): &(&Digest, &Entry)| Arc::strong_count(&entry.features) == 1;
            let oldest = self
                .entries
                .iter()
                .filter(unused)
                .min_by_key(|(_, entry)| entry.used)
                .map(|(digest, _)| *digest);
            let Some(entry) = oldest.and_then(|digest| self.entries.remove(&digest)) else {
                return;
            };
            self.bytes -= bytes_of(&entry.features);
        }
    }
}

fn bytes_of(features: &Buffer) -> usize {
    features.rows() * features.cols() * size_of::<f32>()
}

#[cfg(test)]
mod tests {
    use lnv_kernels::{Isa, Ops};

    use super::*;

    #[test]
    fn the_budget_throws_away_what_is_unused_longest_and_nothing_in_use() {
        let ops = Ops::with_isa(Isa::Scalar);
        let one = |value: f32| ops.upload(1, 4, &[value; 4]);
        let mut cache = FeatureCache::new(40);
        let held = cache.insert([1; 32], one(1.0));
        cache.insert([2; 32], one(2.0));
        assert_eq!(cache.bytes(), 32);
        assert!(cache.get(&[2; 32]).is_some());
        cache.insert([3; 32], one(3.0));
        assert_eq!(cache.bytes(), 32);
        assert!(
            cache.get(&[2; 32]).is_none(),
            "the oldest that nobody holds"
        );
        assert!(cache.get(&[1; 32]).is_some() && cache.get(&[3; 32]).is_some());
        drop(held);
        cache.insert([4; 32], one(4.0));
        assert_eq!(cache.bytes(), 32);
    }
}
