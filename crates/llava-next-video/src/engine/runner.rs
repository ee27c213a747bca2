//! The one loop of the program: in each step what waits is let in, pictures are looked at, tokens go
//! through the decoder, and each request's strategy picks what comes next.
//!
//! Decision: a step is one pass through the decoder, of the last token of every sequence that grows and
//! of as many tokens of prompts as there is time for, all requests together. Requests that begin alike
//! share blocks of the cache, found by name; one that begins as another does whose blocks are just being
//! computed waits for them. A request whose blocks are needed by older ones goes back to wait and is
//! computed again. The engine knows pixels only as inputs of the model, and text only through
//! [`TokenText`]. What happens is told to a sink that belongs to the caller of the step.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use lnv_kernels::{Buffer, KV_BLOCK, KvCache};

use super::block_manager::{BlockManager, Content};
use super::features::FeatureCache;
use super::job::{Job, Prepared, Stage};
use super::pace::Pace;
use super::request::{Event, FinishReason, Generation, GenerationOptions};
use super::sequence::Sequence;
use super::service::{RequestEvent, RequestId, ServiceStats};
use super::sight::{Seen, Sight};
use super::stop::TokenText;
use super::strategy::Continuation;
use crate::config::GenerationConfig;
use crate::error::{Error, Result};
use crate::model::{Batch, BatchSpan, Keep, LlavaNextVideoModel, Taps};
use crate::processor::inputs::ModelInputs;

/// What a caller is told while a call runs.
pub type OnEvent<'a> = &'a mut (dyn FnMut(Event) -> ControlFlow<()> + Send);

/// What a step tells of every request; `Break` cancels the request.
pub(crate) type Sink<'a> = &'a mut (dyn FnMut(RequestId, RequestEvent) -> ControlFlow<()> + Send);

/// Prompt tokens that are worth a pass of their own while more of the prompt is still being looked at.
const WORTH_A_PASS: usize = 512;

/// How much the engine may take.
#[derive(Debug, Clone, Copy)]
pub struct EngineLimits {
    /// Blocks of 64 tokens that the cache of keys and values may have; `None` lets it grow with need.
    pub cache_blocks: Option<usize>,
    /// Sequences that decode together.
    pub batch: usize,
    /// Prompt tokens that go through the decoder together where nothing decodes: enough to keep the
    /// kernels busy, few enough that the activations of a long video stay small.
    pub prefill_chunk: usize,
    /// Bytes of picture features that are kept for the next who asks about the same picture.
    pub feature_bytes: usize,
    /// Whether requests that begin alike share keys and values, also with those that are over.
    pub prefix_caching: bool,
}

impl Default for EngineLimits {
    fn default() -> Self {
        Self {
            cache_blocks: None,
            batch: 64,
            prefill_chunk: 2048,
            feature_bytes: 256 << 20,
            prefix_caching: true,
        }
    }
}

/// Runs requests on one model.
pub struct Engine {
    model: Arc<LlavaNextVideoModel>,
    defaults: GenerationConfig,
    limits: EngineLimits,
    cache: KvCache,
    pub(super) blocks: BlockManager,
    features: FeatureCache,
    /// By arrival; those that were put back come first.
    pub(super) waiting: Vec<Job>,
    /// By when they began to run.
    pub(super) running: Vec<Job>,
    sight: Option<Sight>,
    pace: Pace,
    next_id: u64,
    pub(super) admitted: u64,
    pub(super) stats: ServiceStats,
}

impl Engine {
    /// An engine without requests; the cache grows with need.
    pub fn new(model: Arc<LlavaNextVideoModel>, defaults: GenerationConfig) -> Self {
        Self::with_limits(model, defaults, EngineLimits::default())
    }

    /// An engine without requests.
    pub fn with_limits(
        model: Arc<LlavaNextVideoModel>,
        defaults: GenerationConfig,
        limits: EngineLimits,
    ) -> Self {
        let mut blocks = BlockManager::default();
        let first = limits.cache_blocks.unwrap_or(0);
        blocks.ensure_available(first);
        Self {
            cache: model.language_model().new_cache(first),
            blocks,
            features: FeatureCache::new(limits.feature_bytes),
            waiting: Vec::new(),
            running: Vec::new(),
            sight: None,
            pace: Pace::default(),
            next_id: 0,
            admitted: 0,
            stats: ServiceStats::default(),
            limits,
            model,
            defaults,
        }
    }

    /// The model.
    pub fn model(&self) -> &Arc<LlavaNextVideoModel> {
        &self.model
    }

    /// What requests leave to the checkpoint.
    pub fn defaults(&self) -> &GenerationConfig {
        &self.defaults
    }

    /// How much it may take.
    pub fn limits(&self) -> EngineLimits {
        self.limits
    }

    /// Sets how many prompt tokens go through the decoder together; at least 1. Default 2048.
    pub fn set_prefill_chunk(&mut self, tokens: usize) {
        self.limits.prefill_chunk = tokens.max(1);
    }

    /// Bytes of the cache.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Blocks in use.
    pub fn blocks_in_use(&self) -> usize {
        self.blocks.capacity() - self.blocks.available()
    }

    /// Answers every row of a batch, and nobody else meanwhile.
    ///
    /// # Errors
    /// The options are nonsense, the inputs do not fit the model, or a prompt is longer than the
    /// context. A stop asked for by `on_event` is no error: what there is comes back.
    pub fn generate(
        &mut self,
        inputs: &ModelInputs,
        options: &GenerationOptions,
        text: &dyn TokenText,
        on_event: OnEvent<'_>,
    ) -> Result<Generation> {
        let inputs = inputs.clone();
        let prepared = Prepared::new(&self.model, &self.defaults, inputs, options, None)?;
        let own = self.submit(prepared, 0);
        let mut result = None;
        while result.is_none() {
            self.step(text, &mut |id, event| match event {
                RequestEvent::Progress(event) if id == own => on_event(event),
                RequestEvent::Done(done) if id == own => {
                    result = Some(done);
                    ControlFlow::Continue(())
                }
                _ => ControlFlow::Continue(()),
            });
        }
        result.unwrap_or(Err(Error::Cancelled))
    }

    /// Lets a request wait for its turn.
    pub(crate) fn submit(&mut self, prepared: Prepared, client: u64) -> RequestId {
        self.next_id += 1;
        let id = RequestId(self.next_id);
        self.submit_as(id, prepared, client);
        id
    }

    /// The same under a number that the caller has chosen.
    pub(crate) fn submit_as(&mut self, id: RequestId, prepared: Prepared, client: u64) {
        self.waiting.push(Job::new(id, client, prepared));
    }

    /// Marks a request as cancelled; the next step ends it.
    pub(crate) fn cancel(&mut self, id: RequestId) {
        let mut all = self.waiting.iter_mut().chain(&mut self.running);
        if let Some(job) = all.find(|job| job.id == id) {
            job.cancelled = true;
        }
    }

    /// True where nothing waits or runs.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// What there is to tell, at this moment.
    pub(crate) fn stats(&self) -> ServiceStats {
        let decodes = |job: &&Job| job.stage == Stage::Decode;
        ServiceStats {
            waiting: self.waiting.len(),
            running: self.running.len(),
            batch: (self.running.iter().filter(decodes))
                .map(|job| job.sequences.len())
                .sum(),
            features_bytes: self.features.bytes(),
            blocks_in_use: self.blocks_in_use(),
            blocks_kept: self.blocks.kept(),
            blocks: self.limits.cache_blocks.unwrap_or(self.blocks.capacity()),
            cache_bytes: self.cache.bytes(),
            ..self.stats
        }
    }

    /// One step.
    pub(crate) fn step(&mut self, text: &dyn TokenText, sink: Sink<'_>) {
        self.sweep(sink);
        self.admit(sink);
        if self.running.is_empty() {
            return;
        }
        self.stats.steps += 1;
        let decodes = self.running.iter().any(|job| job.stage == Stage::Decode);
        self.look(decodes, sink);
        self.sweep(sink);
        self.pass(sink);
        self.pick(text, sink);
    }

    /// Ends what was cancelled.
    fn sweep(&mut self, sink: Sink<'_>) {
        while let Some(i) = self.waiting.iter().position(|job| job.cancelled) {
            let job = self.waiting.remove(i);
            self.complete(job, Some(FinishReason::Cancelled), sink);
        }
        while let Some(i) = self.running.iter().position(|job| job.cancelled) {
            let job = self.running.remove(i);
            self.complete(job, Some(FinishReason::Cancelled), sink);
        }
        let gone = |sight: &Sight| !self.running.iter().any(|job| job.id == sight.job);
        if self.sight.as_ref().is_some_and(gone) {
            self.sight = None;
        }
    }

    /// Looks at pictures: one pass through the tower, or beside decoding a part of one.
    fn look(&mut self, decodes: bool, sink: Sink<'_>) {
        let start = Instant::now();
        loop {
            self.stats.features_found += self.recognise(sink);
            if self.sight.is_none() {
                let prefills = |job: &&Job| job.stage == Stage::Prefill;
                self.sight = (self.running.iter().filter(prefills))
                    .find_map(|job| Sight::begin(&self.model, job, decodes));
            }
            let Some(sight) = &mut self.sight else { break };
            let begun = Instant::now();
            let (job, through) = (sight.job, !sight.advance(&self.model));
            let seen = match through {
                true => self.sight.take().map(|s| s.finish(&self.model, decodes)),
                false => None,
            };
            if let Some(job) = self.running.iter_mut().find(|of| of.id == job) {
                job.timings.vision_s += begun.elapsed().as_secs_f64();
            }
            match seen {
                None => {}
                Some(Ok(Seen::More(sight))) => self.sight = Some(*sight),
                Some(Ok(Seen::Features(features))) => {
                    self.stats.features_encoded += features.len();
                    // Held until they have been given to those who wait for them.
                    let held: Vec<_> = features
                        .into_iter()
                        .map(|(digest, features)| self.features.insert(digest, features))
                        .collect();
                    self.recognise(sink);
                    drop(held);
                }
                Some(Err(error)) => self.fail(job, error, sink),
            }
            let enough = match decodes {
                true => start.elapsed() >= self.pace.vision(),
                false => through,
            };
            if enough {
                break;
            }
        }
    }

    /// Gives known features to those that wait for them; to how many.
    fn recognise(&mut self, sink: Sink<'_>) -> usize {
        let mut found = 0;
        for job in &mut self.running {
            let unseen: Vec<usize> = match job.stage {
                Stage::Prefill => job.unseen().collect(),
                Stage::Decode => continue,
            };
            for unit in unseen {
                let Some(features) = self.features.get(&job.units[unit].digest) else {
                    continue;
                };
                job.units[unit].features = Some(features);
                job.seen.0 += job.pictures(&job.units[unit]);
                let (done, total) = job.seen;
                let event = RequestEvent::Progress(Event::Vision { done, total });
                job.cancelled |= sink(job.id, event).is_break();
                found += 1;
            }
        }
        found
    }

    /// One pass through the decoder.
    fn pass(&mut self, sink: Sink<'_>) {
        self.make_room(sink);
        let (parts, decoding) = self.parts();
        if parts.is_empty() {
            return;
        }
        let start = Instant::now();
        let x = self.embed(&parts);
        let tokens = x.rows();
        match self.decode(x, &parts, sink) {
            Ok(states) => self.read(&parts, &states),
            // All that ran in the pass were cancelled.
            Err(Error::Cancelled) => return,
            Err(error) => {
                let mut jobs: Vec<RequestId> =
                    parts.iter().map(|p| self.running[p.job].id).collect();
                jobs.dedup();
                let message = error.to_string();
                for job in jobs {
                    self.fail(job, Error::Input(message.clone()), sink);
                }
                return;
            }
        }
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
    }

    /// What goes through the decoder in this step, those that decode first, and how many those are.
    fn parts(&self) -> (Vec<Part>, usize) {
        let of = |stage: Stage| {
            let jobs = self.running.iter().enumerate();
            jobs.filter(move |(_, job)| job.stage == stage && !job.cancelled)
        };
        let mut parts = Vec::new();
        for (job, of) in of(Stage::Decode) {
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
        let mut room = match decoding {
            0 => self.limits.prefill_chunk,
            _ => self.pace.tokens().min(self.limits.prefill_chunk),
        };
        for (job, of) in of(Stage::Prefill) {
            let looking = of.unseen().next().is_some();
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
        let out = self
            .model
            .decode(x, &batch, &mut self.cache, read, &mut on_layer);
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
        let here: Vec<u32> = (0..rows.len() as u32).collect();
        let mut last = ops.buffer(rows.len(), states.cols());
        ops.copy_rows(states, &rows, &mut last, &here);
        let logits = self.model.language_model().logits(ops, &last);
        for (row, (_, part)) in ending.iter().enumerate() {
            let part = &parts[*part];
            self.running[part.job].scores[part.sequence] = ops.download_rows(&logits, row..row + 1);
        }
    }

    /// Lets the strategy of every request whose scores are known pick what comes next.
    fn pick(&mut self, text: &dyn TokenText, sink: Sink<'_>) {
        let mut i = 0;
        while i < self.running.len() {
            let job = &self.running[i];
            if job.cancelled || job.scores.iter().any(Vec::is_empty) {
                i += 1;
                continue;
            }
            let mut job = self.running.remove(i);
            match self.pick_for(&mut job, text, sink) {
                Ok(true) => {
                    self.running.insert(i, job);
                    i += 1;
                }
                Ok(false) => self.complete(job, None, sink),
                Err(error) => {
                    self.give_back(&job);
                    self.stats.failed += 1;
                    let _ = sink(job.id, RequestEvent::Done(Err(error)));
                }
            }
        }
    }

    /// The same for one; false where it is over.
    fn pick_for(&mut self, job: &mut Job, text: &dyn TokenText, sink: Sink<'_>) -> Result<bool> {
        let mut scores = std::mem::take(&mut job.scores);
        if !job.forked {
            let copies = job.copies_of_rows();
            self.fork(&mut job.sequences, &copies, false);
            scores = (scores.into_iter())
                .flat_map(|scores| vec![scores; job.copies])
                .collect();
            job.forked = true;
        }
        let step = job.strategy.step(&job.sequences, scores, text)?;
        self.stats.new_tokens += step.shown.len();
        for shown in step.shown {
            let event = Event::Token {
                sequence: shown.place,
                id: shown.id,
                logprob: shown.logprob,
            };
            job.cancelled |= sink(job.id, RequestEvent::Progress(event)).is_break();
        }
        if step.go_on.is_empty() {
            return Ok(false);
        }
        self.fork(&mut job.sequences, &step.go_on, true);
        job.scores = vec![Vec::new(); job.sequences.len()];
        if job.stage == Stage::Prefill {
            job.stage = Stage::Decode;
            job.units.iter_mut().for_each(|unit| unit.features = None);
            self.features.shrink();
        }
        Ok(true)
    }

    /// Ends a request that is in no list any more, and gives its blocks back.
    pub(super) fn complete(&mut self, mut job: Job, cut: Option<FinishReason>, sink: Sink<'_>) {
        if !job.forked {
            let copies = job.copies_of_rows();
            self.fork(&mut job.sequences, &copies, false);
        }
        let completions = job.strategy.finish(&job.sequences, cut);
        self.give_back(&job);
        match cut {
            Some(FinishReason::Cancelled) => self.stats.cancelled += 1,
            _ => self.stats.answered += 1,
        }
        let generation = Generation {
            completions,
            prompt_tokens: job.prompt_tokens,
            cached_tokens: job.cached_tokens,
            timings: job.timings,
        };
        let _ = sink(job.id, RequestEvent::Done(Ok(generation)));
    }

    /// Ends a running request with an error.
    pub(super) fn fail(&mut self, id: RequestId, error: Error, sink: Sink<'_>) {
        let Some(i) = self.running.iter().position(|job| job.id == id) else {
            return;
        };
        let job = self.running.remove(i);
        self.give_back(&job);
        self.stats.failed += 1;
        let _ = sink(id, RequestEvent::Done(Err(error)));
    }

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

    /// Rotary scaling that looks at the whole length gives a beginning other keys in each prompt.
    pub(super) fn shares_prefixes(&self) -> bool {
        let rope = &self.model.config().text_config.rope;
        self.limits.prefix_caching && !rope.depends_on_length()
    }

    /// Replaces the sequences by their continuations, sharing blocks; `append` adds the tokens.
    fn fork(&mut self, running: &mut Vec<Sequence>, go_on: &[Continuation], append: bool) {
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
    fn make_room(&mut self, sink: Sink<'_>) {
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

    fn put_back(&mut self, job: &mut Job) {
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
        let grown = self.blocks.ensure_available(more);
        self.cache.grow(grown);
        true
    }
}

/// What a sequence holds in a block.
fn content(sequence: &Sequence, block: usize) -> Content {
    let full = sequence.cached >= (block + 1) * KV_BLOCK;
    let cached = &sequence.ids[..sequence.cached];
    Content {
        parent: sequence.chain.before(block),
        name: sequence.chain.name(block).filter(|_| full),
        keys: sequence.chain.keys(cached, block),
    }
}

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
