//! Room in the cache: taken as sequences grow, shared as they fork, given back as they end.
//!
//! Decision: a prompt's blocks are taken when it is let in, an answer's one by one. Where none is left, the
//! request that was let in last loses its blocks and is computed again later: of all that could be lost
//! that is the least work. What a sequence leaves behind is made known by name, its last block too.

use lnv_kernels::KV_BLOCK;

use super::block_manager::Content;
use super::job::{Job, Stage};
use super::request::FinishReason;
use super::runner::{Engine, Sink};
use super::sequence::Sequence;
use super::strategy::Continuation;

impl Engine {
    /// Gives a request's blocks back; what its last ones hold is made known.
    pub(super) fn give_back(&mut self, job: &Job) {
        for sequence in &job.sequences {
            let block = sequence.cached / KV_BLOCK;
            let begun = !sequence.cached.is_multiple_of(KV_BLOCK);
            if begun && self.shares_prefixes() && !self.blocks.is_shared(sequence.blocks[block]) {
                self.blocks
                    .publish(sequence.blocks[block], content(sequence, block));
            }
            self.blocks.release(&sequence.blocks);
        }
    }

    /// Replaces the sequences by their continuations, sharing blocks; `append` adds the tokens.
    pub(super) fn fork(
        &mut self,
        running: &mut Vec<Sequence>,
        go_on: &[Continuation],
        append: bool,
    ) {
        let in_place = go_on.len() == running.len()
            && (go_on.iter().enumerate()).all(|(i, on)| on.parent == i);
        if !in_place {
            let next: Vec<Sequence> = go_on
                .iter()
                .map(|continuation| {
                    let child = running[continuation.parent].clone();
                    self.blocks.share(&child.blocks);
                    child
                })
                .collect();
            for parent in running.iter() {
                self.blocks.release(&parent.blocks);
            }
            *running = next;
        }
        if append {
            for (sequence, continuation) in running.iter_mut().zip(go_on) {
                sequence.ids.push(continuation.token);
                sequence.chain.extend(&sequence.ids);
            }
        }
    }

    /// Makes room for the next token of all that decode. Where the cache is full, the youngest goes back
    /// to wait; one that is alone and fills it is cut short.
    pub(super) fn make_room(&mut self, sink: Sink<'_>) {
        let mut i = 0;
        while i < self.running.len() {
            if self.running[i].stage == Stage::Decode {
                let mut sequences = std::mem::take(&mut self.running[i].sequences);
                let fits = sequences.iter_mut().all(|s| self.reserve(s, s.ids.len()));
                self.running[i].sequences = sequences;
                if !fits {
                    let youngest = (0..self.running.len())
                        .max_by_key(|job| self.running[*job].admitted)
                        .unwrap_or(i);
                    let mut job = self.running.remove(youngest);
                    if self.running.is_empty() {
                        return self.complete(job, Some(FinishReason::Length), sink);
                    }
                    self.put_back(&mut job);
                    self.waiting.insert(0, job);
                    i = 0;
                    continue;
                }
            }
            i += 1;
        }
    }

    pub(super) fn put_back(&mut self, job: &mut Job) {
        self.stats.preempted += 1;
        self.give_back(job);
        for sequence in &mut job.sequences {
            sequence.blocks.clear();
            sequence.cached = 0;
        }
        job.units.iter_mut().for_each(|unit| unit.features = None);
        job.scores = vec![Vec::new(); job.sequences.len()];
        job.stage = Stage::Prefill;
    }

    /// Makes room for `tokens` tokens of a sequence, its own where it will write; false where there is
    /// none.
    pub(super) fn reserve(&mut self, sequence: &mut Sequence, tokens: usize) -> bool {
        let needed = tokens.div_ceil(KV_BLOCK);
        let missing = needed.saturating_sub(sequence.blocks.len());
        let writes_from = sequence.cached / KV_BLOCK;
        let shared = (sequence.blocks.iter().take(needed).skip(writes_from))
            .filter(|block| self.blocks.is_shared(**block))
            .count();
        if !self.ensure_available(missing + shared) {
            return false;
        }
        for _ in 0..missing {
            sequence.blocks.extend(self.blocks.allocate());
        }
        for block in sequence.blocks.iter_mut().take(needed).skip(writes_from) {
            if self.blocks.is_shared(*block)
                && let Some(own) = self.blocks.allocate()
            {
                self.copy(*block, own);
                self.blocks.release(&[*block]);
                *block = own;
            }
        }
        true
    }

    pub(super) fn copy(&mut self, from: u32, to: u32) {
        self.cache.copy_block(from, to);
    }

    /// Whether so many blocks can be handed out, after growing the cache if it may grow.
    pub(super) fn ensure_available(&mut self, wanted: usize) -> bool {
        if self.blocks.available() >= wanted {
            return true;
        }
        if self.limits.cache_blocks.is_some() {
            return false;
        }
        let more = wanted.max(self.blocks.capacity() / 2);
        let grown = self.blocks.capacity() + more - self.blocks.available();
        if self.cache.grow(grown).is_err() {
            // The device is full: as with a cache that may not grow.
            return false;
        }
        self.blocks.ensure_available(more);
        true
    }
}

/// What a sequence holds in a block.
pub(super) fn content(sequence: &Sequence, block: usize) -> Content {
    let full = sequence.cached >= (block + 1) * KV_BLOCK;
    let cached = &sequence.ids[..sequence.cached];
    Content {
        parent: sequence.chain.before(block),
        name: sequence.chain.name(block).filter(|_| full),
        keys: sequence.chain.keys(cached, block),
    }
}
