//! Who is let in: from waiting to running.
//!
//! Decision: by arrival, but a client that runs less goes first, so that one who asks a hundred times does
//! not make the others wait for all of them; those that were put back go before everybody. A request
//! takes all blocks of its prompt when it is let in, less those that it finds; what its answer needs is
//! taken as it grows. Where the first in the row does not fit, nobody overtakes it. One whose beginning is
//! being computed for another waits until it can be found. One whose frames are still arriving waits as long as all
//! that is known of it can be found, because what comes next may be found too; and it never makes others
//! wait for its frames: where they lack its room, it goes back until all are there.

use std::cmp::Reverse;

use lnv_kernels::KV_BLOCK;

use super::job::{Job, Stage};
use super::request::FinishReason;
use super::runner::{Engine, Sink};
use super::sequence::Sequence;
use super::service::RequestEvent;
use crate::error::Error;

/// What a sequence finds in the cache.
#[derive(Debug, Default)]
struct Found {
    /// Full blocks.
    blocks: Vec<u32>,
    /// A block that begins like the next, and how many of its tokens do.
    beginning: Option<(u32, usize)>,
}

enum Outcome {
    In,
    Held,
    NoRoom,
}

impl Engine {
    /// Lets in what there is room for.
    pub(super) fn admit(&mut self, sink: Sink<'_>) {
        'again: loop {
            for i in self.order() {
                match self.try_admit(i, sink) {
                    Outcome::In => continue 'again,
                    Outcome::Held => {}
                    Outcome::NoRoom if self.running.is_empty() => {
                        let job = self.waiting.remove(i);
                        self.refuse(job, sink);
                        continue 'again;
                    }
                    Outcome::NoRoom if self.make_way(i) => continue 'again,
                    Outcome::NoRoom => return,
                }
            }
            return;
        }
    }

    /// The waiting, first those that were put back, then those whose clients run least.
    fn order(&self) -> Vec<usize> {
        let runs = |client: u64| self.running.iter().filter(|j| j.client == client).count();
        let mut order: Vec<usize> = (0..self.waiting.len()).collect();
        order.sort_by_key(|i| {
            let job = &self.waiting[*i];
            (Reverse(job.admitted > 0), runs(job.client), *i)
        });
        order
    }

    /// Puts one that waits for frames back for the sake of `i`, which does not; false where there is none.
    fn make_way(&mut self, i: usize) -> bool {
        let arriving = self.running.iter().rposition(Job::is_arriving);
        match arriving.filter(|_| !self.waiting[i].is_arriving()) {
            Some(youngest) => {
                let mut job = self.running.remove(youngest);
                self.put_back(&mut job);
                self.waiting.insert(0, job);
                true
            }
            None => false,
        }
    }

    fn try_admit(&mut self, i: usize, sink: Sink<'_>) -> Outcome {
        let width: usize = self.running.iter().map(Job::width).sum();
        let job = &self.waiting[i];
        if job.is_arriving() && job.admitted > 0 {
            return Outcome::Held;
        }
        if width > 0 && width + job.width() > self.limits().batch {
            return Outcome::NoRoom;
        }
        let shares = self.shares_prefixes();
        let mut found = Vec::with_capacity(job.sequences.len());
        for sequence in &job.sequences {
            let one = match shares {
                true => self.find(sequence),
                false => Found::default(),
            };
            if shares && self.is_being_computed(job, sequence, one.blocks.len()) {
                return Outcome::Held;
            }
            let beginning = one.beginning.map_or(0, |(_, tokens)| tokens);
            let certain = sequence.chain.known(&sequence.ids);
            if job.is_arriving() && one.blocks.len() * KV_BLOCK + beginning >= certain {
                return Outcome::Held;
            }
            found.push(one);
        }
        let kept = |found: &Found| {
            let mut blocks = found.blocks.clone();
            blocks.extend(found.beginning.map(|(block, _)| block));
            blocks
                .into_iter()
                .filter(|block| self.blocks.is_kept(*block))
                .count()
        };
        let needs = |(sequence, found): (&Sequence, &Found)| {
            sequence.ids.len().div_ceil(KV_BLOCK) - found.blocks.len() + kept(found)
        };
        let needed: usize = job.sequences.iter().zip(&found).map(needs).sum();
        let spare = if self.running.is_empty() {
            0
        } else {
            job.width()
        };
        if !self.ensure_available(needed + spare) {
            return Outcome::NoRoom;
        }
        let mut job = self.waiting.remove(i);
        // All is held before anything is handed out, which might be what another row has found.
        for found in &found {
            self.blocks.share(&found.blocks);
            found
                .beginning
                .iter()
                .for_each(|(block, _)| self.blocks.share(&[*block]));
        }
        for (sequence, found) in job.sequences.iter_mut().zip(found) {
            self.take(sequence, found);
        }
        self.begin(&mut job, sink);
        self.running.push(job);
        Outcome::In
    }

    /// Blocks that begin as the sequence does. Its last token is always run again, for its scores.
    fn find(&self, sequence: &Sequence) -> Found {
        let most = sequence.ids.len().saturating_sub(1);
        let most = most.min(sequence.chain.known(&sequence.ids));
        let mut found = Found::default();
        while (found.blocks.len() + 1) * KV_BLOCK <= most {
            let name = sequence.chain.name(found.blocks.len());
            let Some(block) = name.and_then(|name| self.blocks.find(&name)) else {
                break;
            };
            found.blocks.push(block);
        }
        let next = found.blocks.len();
        let keys = sequence.chain.keys(&sequence.ids[..most], next);
        let parent = sequence.chain.before(next);
        found.beginning = self.blocks.find_beginning(&parent, &keys);
        found
    }

    /// Whether a running prompt is about to fill the block behind those that were found. One that waits for frames
    /// may be long about it, so only those that wait for theirs wait for it.
    fn is_being_computed(&self, job: &Job, sequence: &Sequence, block: usize) -> bool {
        let Some(name) = sequence.chain.name(block) else {
            return false;
        };
        let computes = |other: &Sequence| {
            other.chain.name(block) == Some(name) && other.cached < (block + 1) * KV_BLOCK
        };
        let prefills = |other: &&Job| {
            let soon = job.is_arriving() || !other.is_arriving();
            other.stage == Stage::Prefill && !other.cancelled && soon
        };
        let mut jobs = self.running.iter().filter(prefills);
        jobs.any(|job| job.sequences.iter().any(computes))
    }

    /// Takes what was found and is held, and blocks for the rest of the prompt.
    fn take(&mut self, sequence: &mut Sequence, found: Found) {
        sequence.cached = found.blocks.len() * KV_BLOCK;
        sequence.blocks = found.blocks;
        self.reserve(sequence, sequence.ids.len());
        if let Some((block, tokens)) = found.beginning {
            let own = sequence.blocks[sequence.cached / KV_BLOCK];
            self.copy(block, own);
            sequence.cached += tokens;
            self.blocks.release(&[block]);
        }
    }

    /// A request begins to run.
    fn begin(&mut self, job: &mut Job, sink: Sink<'_>) {
        let first = job.admitted == 0;
        self.admitted += 1;
        job.admitted = self.admitted;
        let layers = self.model().config().text_config.num_hidden_layers;
        let left = |sequence: &Sequence| sequence.ids.len() - sequence.cached;
        let tokens: usize = job.sequences.iter().map(left).sum();
        job.prefilled = (0, tokens * layers);
        job.seen = (0, job.pictures_to_see());
        if first {
            job.cached_tokens = job.sequences.iter().map(|s| s.cached).sum();
            self.stats.cached_tokens += job.cached_tokens;
            self.stats.prompt_tokens += job.prompt_tokens.iter().sum::<usize>();
            job.cancelled |= sink(job.id, RequestEvent::Started).is_break();
        }
    }

    /// Ends a request for which there is no room even where nothing else runs.
    fn refuse(&mut self, job: Job, sink: Sink<'_>) {
        if job.forked {
            return self.complete(job, Some(FinishReason::Length), sink);
        }
        let tokens: usize = job.sequences.iter().map(|s| s.ids.len()).sum();
        let room = self.blocks.capacity() * KV_BLOCK;
        self.stats.failed += 1;
        let error = Error::Input(format!(
            "the prompt has {tokens} tokens, but the cache of keys and values holds {room}: use fewer \
             frames or images, or give the cache more memory"
        ));
        let _ = sink(job.id, RequestEvent::Done(Err(error)));
    }
}
