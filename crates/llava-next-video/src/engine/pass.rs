//! One pass through the decoder: what goes through, with which embeddings, and what is read of it.
//!
//! Decision: those that decode come first, a token for each sequence; then prompts by when they were let
//! in, as far as their pictures are known and as there is time. A row's result does not depend on what
//! else is in the pass, so nothing here can change an answer.

use std::time::{Duration, Instant};

use lnv_kernels::{Buffer, KV_BLOCK};

use super::job::Stage;
use super::request::Event;
use super::room::content;
use super::runner::{Engine, Sink};
use super::sequence::Sequence;
use super::service::{RequestEvent, RequestId};
use crate::error::{Error, Result};
use crate::model::{Batch, BatchSpan, Keep, Taps, pick};

/// Prompt tokens that are worth a pass of their own while more of the prompt is still being looked at.
const WORTH_A_PASS: usize = 512;

/// A run of one sequence's tokens.
struct Part {
    job: usize,
    sequence: usize,
    start: usize,
    end: usize,
}

impl Part {
    fn span<'a>(&self, sequence: &'a Sequence) -> BatchSpan<'a> {
        BatchSpan {
            positions: (self.start as u32..self.end as u32).collect(),
            // A prompt is one pass however it is cut, so dynamic scaling looks at all of it.
            rope_length: sequence.prompt.max(self.end) + sequence.behind_longest,
            kv_len: self.end,
            blocks: &sequence.blocks,
        }
    }
}

impl Engine {
    /// One pass through the decoder, in a step that has spent so long on vision; false where nothing is ready
    /// for it.
    pub(super) fn pass(&mut self, vision: Duration, sink: Sink<'_>) -> bool {
        self.make_room(sink);
        let (parts, decoding) = self.parts(vision);
        if parts.is_empty() {
            return false;
        }
        let start = Instant::now();
        let x = self.embed(&parts);
        let tokens = x.rows();
        match self.decode(x, &parts, sink) {
            Ok(states) => self.read(&parts, &states),
            // All that ran in the pass were cancelled.
            Err(Error::Cancelled) => return true,
            Err(error) => {
                let mut jobs: Vec<RequestId> =
                    parts.iter().map(|p| self.running[p.job].id).collect();
                jobs.dedup();
                // What was asked for had been checked before it came here.
                let message = error.to_string();
                for job in jobs {
                    self.fail(job, Error::Internal(message.clone()), sink);
                }
                return true;
            }
        }
        // What was not read back may still be under way on a GPU.
        self.model.ops().wait();
        let elapsed = start.elapsed();
        self.pace.stepped(elapsed, decoding, tokens - decoding);
        let mut jobs: Vec<usize> = parts.iter().map(|part| part.job).collect();
        jobs.dedup();
        for job in jobs {
            let job = &mut self.running[job];
            match job.stage {
                Stage::Prefill => job.timings.prefill_s += elapsed.as_secs_f64(),
                Stage::Decode => {
                    job.timings.decode_s += elapsed.as_secs_f64();
                    job.timings.decode_steps += 1;
                }
            }
        }
        true
    }

    /// What goes through the decoder in this step, those that decode first, and how many those are.
    fn parts(&self, vision: Duration) -> (Vec<Part>, usize) {
        let of = |stage: Stage| {
            let jobs = self.running.iter().enumerate();
            jobs.filter(move |(_, job)| job.stage == stage && !job.cancelled)
        };
        let mut parts = Vec::new();
        // Those that share blocks side by side, so that these are read from memory once.
        let mut decode: Vec<_> = of(Stage::Decode).collect();
        decode.sort_by_key(|(_, of)| of.sequences.first().map(|s| &s.blocks));
        for (job, of) in decode {
            for (sequence, s) in of.sequences.iter().enumerate() {
                parts.push(Part {
                    job,
                    sequence,
                    start: s.cached,
                    end: s.ids.len(),
                });
            }
        }
        let decoding = parts.len();
        let most = self.pace.tokens(decoding > 0, vision);
        let mut room = most.min(self.limits.prefill_chunk);
        for (job, of) in of(Stage::Prefill) {
            let looking = of.is_arriving() || of.unseen().next().is_some();
            for (sequence, s) in of.sequences.iter().enumerate() {
                let (start, ready) = (s.cached, of.ready(s));
                let end = ready.min(start + room);
                // Beside decoding the weights are read anyway.
                let waits = looking && decoding == 0 && end - start < WORTH_A_PASS.min(room);
                if end == start || waits {
                    continue;
                }
                room -= end - start;
                parts.push(Part {
                    job,
                    sequence,
                    start,
                    end,
                });
            }
        }
        (parts, decoding)
    }

    /// Embeds the tokens of all parts, with the features of pictures in their places.
    fn embed(&self, parts: &[Part]) -> Buffer {
        let sequence = |part: &Part| &self.running[part.job].sequences[part.sequence];
        let ids: Vec<u32> = parts
            .iter()
            .flat_map(|part| sequence(part).ids[part.start..part.end].iter().copied())
            .collect();
        let ops = self.model.ops();
        let mut x = self.model.language_model().embed(ops, &ids);
        let mut first = 0;
        for part in parts {
            let row = sequence(part).row;
            for unit in self.running[part.job].units.iter().filter(|u| u.row == row) {
                let at =
                    |position: usize| unit.positions.partition_point(|p| (*p as usize) < position);
                let places = at(part.start)..at(part.end);
                let Some(features) = unit.features.as_ref().filter(|_| !places.is_empty()) else {
                    continue;
                };
                let from: Vec<u32> = places.clone().map(|place| place as u32).collect();
                let to: Vec<u32> = unit.positions[places]
                    .iter()
                    .map(|position| (first + *position as usize - part.start) as u32)
                    .collect();
                ops.copy_rows(features, &from, &mut x, &to);
            }
            first += part.end - part.start;
        }
        x
    }

    /// Runs the parts; the last state of each. Layers are told to those whose prompt it is.
    fn decode(&mut self, x: Buffer, parts: &[Part], sink: Sink<'_>) -> Result<Buffer> {
        let layers = self.model.config().text_config.num_hidden_layers;
        let jobs = &self.running;
        let mut told: Vec<(RequestId, usize, (usize, usize))> = Vec::new();
        let mut decodes = false;
        for part in parts {
            let job = &jobs[part.job];
            decodes |= job.stage == Stage::Decode;
            match told.last_mut().filter(|(id, ..)| *id == job.id) {
                Some((_, tokens, _)) => *tokens += part.end - part.start,
                None if job.stage == Stage::Prefill => {
                    told.push((job.id, part.end - part.start, job.prefilled));
                }
                None => {}
            }
        }
        let mut broken: Vec<RequestId> = Vec::new();
        let mut on_layer = |layer: usize| {
            for (id, tokens, (done, total)) in &told {
                if broken.contains(id) {
                    continue;
                }
                let (done, total) = (done + tokens * layer, *total);
                let event = RequestEvent::Progress(Event::Prefill { done, total });
                if sink(*id, event).is_break() {
                    broken.push(*id);
                }
            }
            match !decodes && broken.len() == told.len() {
                true => Err(Error::Cancelled),
                false => Ok(()),
            }
        };
        let spans = parts.iter().map(|part| {
            let sequence = &jobs[part.job].sequences[part.sequence];
            part.span(sequence)
        });
        let batch = Batch {
            spans: spans.collect(),
        };
        let read = (Keep::Last(1), Taps::default());
        // Told at its beginning too, when nothing is through yet.
        let (model, cache) = (&self.model, &mut self.cache);
        let out = on_layer(0).and_then(|()| model.decode(x, &batch, cache, read, &mut on_layer));
        drop(batch);
        for job in &mut self.running {
            job.cancelled |= broken.contains(&job.id);
            if let Some((_, tokens, _)) = told.iter().find(|(id, ..)| *id == job.id) {
                job.prefilled.0 += tokens * layers;
            }
        }
        Ok(out?.last_hidden_state)
    }

    /// Marks what went through as cached, and scores what comes next where a part ends its sequence.
    fn read(&mut self, parts: &[Part], states: &Buffer) {
        let mut ending: Vec<(u32, usize)> = Vec::new();
        for (i, part) in parts.iter().enumerate() {
            let sequence = &mut self.running[part.job].sequences[part.sequence];
            sequence.cached = part.end;
            if part.end == sequence.ids.len() {
                ending.push((i as u32, i));
            }
            if self.shares_prefixes() {
                let sequence = &self.running[part.job].sequences[part.sequence];
                for block in part.start / KV_BLOCK..part.end / KV_BLOCK {
                    self.blocks
                        .publish(sequence.blocks[block], content(sequence, block));
                }
            }
        }
        if ending.is_empty() {
            return;
        }
        let ops = self.model.ops();
        let rows: Vec<u32> = ending.iter().map(|(row, _)| *row).collect();
        let last = pick(ops, states, &rows);
        let logits = self.model.language_model().logits(ops, &last);
        for (row, (_, part)) in ending.iter().enumerate() {
            let part = &parts[*part];
            self.running[part.job].scores[part.sequence] = ops.download_rows(&logits, row..row + 1);
        }
    }
}
