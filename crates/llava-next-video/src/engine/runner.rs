//! The one loop of the program: in each step what waits is let in, pictures are looked at, tokens go
//! through the decoder, and each request's strategy picks what comes next.
//!
//! Decision: a step is one pass through the decoder, of the last token of every sequence that grows and
//! of as many tokens of prompts as there is time for, all requests together. Requests that begin alike
//! share blocks of the cache, found by name; one that begins as another does whose blocks are just being
//! computed waits for them. A request whose blocks are needed by older ones goes back to wait and is
//! computed again. A request's frames may come one by one: what is there is looked at and read while the next is
//! still being decoded. The engine knows pixels only as inputs of the model, and text only through
//! [`TokenText`]. What happens is told to a sink that belongs to the caller of the step.

use std::ops::ControlFlow;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use lnv_kernels::KvCache;

use super::block_manager::BlockManager;
use super::feature_store::FeatureStore;
use super::features::FeatureCache;
use super::job::{Job, Prepared, Stage};
use super::pace::{Pace, Prefer};
use super::recall::Recall;
use super::request::{Event, FinishReason, Generation, GenerationOptions};
use super::service::{RequestEvent, RequestId, ServiceStats};
use super::sight::{Seen, Sight};
use super::stop::TokenText;
use crate::config::GenerationConfig;
use crate::error::{Error, Result};
use crate::model::LlavaNextVideoModel;
use crate::processor::inputs::ModelInputs;

/// What a caller is told while a call runs.
pub type OnEvent<'a> = &'a mut (dyn FnMut(Event) -> ControlFlow<()> + Send);

/// What a step tells of every request; `Break` cancels the request.
pub(crate) type Sink<'a> = &'a mut (dyn FnMut(RequestId, RequestEvent) -> ControlFlow<()> + Send);

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
    /// Who waits where prompts are to be read while answers grow.
    pub prefer: Prefer,
}

impl Default for EngineLimits {
    fn default() -> Self {
        Self {
            cache_blocks: None,
            batch: 64,
            prefill_chunk: 2048,
            feature_bytes: 256 << 20,
            prefix_caching: true,
            prefer: Prefer::default(),
        }
    }
}

/// Runs requests on one model.
pub struct Engine {
    pub(super) model: Arc<LlavaNextVideoModel>,
    defaults: GenerationConfig,
    pub(super) limits: EngineLimits,
    pub(super) cache: KvCache,
    pub(super) blocks: BlockManager,
    features: FeatureCache,
    store: Option<Arc<FeatureStore>>,
    /// Where a store is to be read.
    pub(super) recall: Option<Recall>,
    /// By arrival; those that were put back come first.
    pub(super) waiting: Vec<Job>,
    /// By when they began to run.
    pub(super) running: Vec<Job>,
    sight: Option<Sight>,
    pub(super) pace: Pace,
    next_id: u64,
    pub(super) admitted: u64,
    pub(super) stats: ServiceStats,
}

impl Engine {
    /// An engine without requests; the cache grows with need.
    pub fn new(model: Arc<LlavaNextVideoModel>, defaults: GenerationConfig) -> Self {
        let limits = EngineLimits::default();
        let cache = model.language_model().empty_cache(model.ops());
        Self::with_cache(model, defaults, limits, cache)
    }

    /// An engine without requests.
    ///
    /// # Errors
    /// The device has no room for the cache.
    pub fn with_limits(
        model: Arc<LlavaNextVideoModel>,
        defaults: GenerationConfig,
        limits: EngineLimits,
    ) -> Result<Self> {
        let first = limits.cache_blocks.unwrap_or(0);
        let cache = model.language_model().new_cache(model.ops(), first)?;
        Ok(Self::with_cache(model, defaults, limits, cache))
    }

    fn with_cache(
        model: Arc<LlavaNextVideoModel>,
        defaults: GenerationConfig,
        limits: EngineLimits,
        cache: KvCache,
    ) -> Self {
        let mut blocks = BlockManager::default();
        blocks.ensure_available(limits.cache_blocks.unwrap_or(0));
        Self {
            cache,
            blocks,
            features: FeatureCache::new(limits.feature_bytes),
            store: None,
            recall: None,
            waiting: Vec::new(),
            running: Vec::new(),
            sight: None,
            pace: Pace::new(limits.prefer),
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

    /// Keeps features of pictures on disk too; the store must have been opened for this model.
    pub fn set_feature_store(&mut self, store: Arc<FeatureStore>) {
        self.store = Some(Arc::clone(&store));
        self.recall = Some(Recall::new(move |digest, shape| store.get(digest, shape)));
    }

    /// Bytes of the cache.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Blocks in use.
    pub fn blocks_in_use(&self) -> usize {
        self.blocks.capacity() - self.blocks.available()
    }

    /// Answers every row of a batch, and nobody else meanwhile. Frames that are still arriving are waited for.
    ///
    /// # Errors
    /// The options are nonsense, the inputs do not fit the model, a prompt is longer than the
    /// context, or frames did not arrive. A stop asked for by `on_event` is no error: what there is comes back.
    pub fn generate(
        &mut self,
        inputs: &ModelInputs,
        options: &GenerationOptions,
        text: &dyn TokenText,
        on_event: OnEvent<'_>,
    ) -> Result<Generation> {
        let inputs = inputs.clone();
        let (wake, woken) = mpsc::channel();
        inputs.listen(|| {
            let wake = wake.clone();
            Box::new(move || {
                let _ = wake.send(());
            })
        });
        drop(wake);
        let prepared = Prepared::new(&self.model, &self.defaults, inputs, options, None)?;
        let own = self.submit(prepared, 0);
        let mut result = None;
        while result.is_none() {
            let busy = self.step(text, &mut |id, event| match event {
                RequestEvent::Progress(event) if id == own => on_event(event),
                RequestEvent::Done(done) if id == own => {
                    result = Some(done);
                    ControlFlow::Continue(())
                }
                _ => ControlFlow::Continue(()),
            });
            if !busy && result.is_none() {
                // An error says that all frames are there, or no more will come.
                let _ = woken.recv();
            }
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
            features_on_disk: (self.store.as_ref()).map_or_else(Default::default, |s| s.stats()),
            blocks_in_use: self.blocks_in_use(),
            blocks_kept: self.blocks.kept(),
            blocks: self.limits.cache_blocks.unwrap_or(self.blocks.capacity()),
            cache_bytes: self.cache.bytes(),
            ..self.stats
        }
    }

    /// One step; false where it had nothing to do, and will not before a frame arrives or a request comes or goes.
    pub(crate) fn step(&mut self, text: &dyn TokenText, sink: Sink<'_>) -> bool {
        self.arrive(sink);
        self.sweep(sink);
        self.admit(sink);
        if self.running.is_empty() {
            return false;
        }
        self.stats.steps += 1;
        let decodes = self.running.iter().any(|job| job.stage == Stage::Decode);
        let allowed = self.pace.vision(decodes, self.reads_prompts());
        let begun = Instant::now();
        let looked = self.look(allowed, sink);
        self.sweep(sink);
        let passed = self.pass(begun.elapsed(), sink);
        self.pick(text, sink);
        looked || passed || self.recall.as_mut().is_some_and(Recall::wait)
    }

    /// Takes the frames that have arrived; a request whose frames will not all come is over.
    fn arrive(&mut self, sink: Sink<'_>) {
        let jobs = self.waiting.iter_mut().chain(&mut self.running);
        let arrived = |job: &mut Job| Some((job.id, job.arrive().err()?));
        let failed: Vec<(RequestId, Error)> = jobs.filter_map(arrived).collect();
        for (id, error) in failed {
            self.fail(id, error, sink);
        }
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

    /// Looks at pictures: one pass through the tower, or where only so much time is `allowed` a part of one. False
    /// where there was nothing to look at.
    fn look(&mut self, allowed: Option<Duration>, sink: Sink<'_>) -> bool {
        let mut looked = false;
        let until = allowed.map(|allowed| Instant::now() + allowed);
        let few = until.is_some();
        loop {
            self.stats.features_found += self.recognise(sink);
            self.remember(sink);
            let begun = Instant::now();
            if self.sight.is_none() {
                let mut prefills = (self.running.iter_mut()).filter(|j| j.stage == Stage::Prefill);
                let how = (few, self.recall.is_some());
                let new =
                    prefills.find_map(|job| Some((Sight::begin(&self.model, job, how)?, job)));
                if let Some((sight, job)) = new {
                    let (done, total) = job.seen;
                    let event = RequestEvent::Progress(Event::Vision { done, total });
                    job.cancelled |= sink(job.id, event).is_break();
                    self.sight = Some(sight);
                }
            }
            let Some(sight) = &mut self.sight else { break };
            looked = true;
            let (job, through) = (sight.job, !sight.advance(&self.model));
            let seen = match through {
                true => self.sight.take().map(|s| s.finish(&self.model, few)),
                false => None,
            };
            if through {
                // A GPU has only begun: how long it takes is what the pace goes by.
                self.model.ops().wait();
            }
            if let Some(job) = self.running.iter_mut().find(|of| of.id == job) {
                job.timings.vision_s += begun.elapsed().as_secs_f64();
            }
            match seen {
                None => {}
                Some(Ok(Seen::More(sight))) => self.sight = Some(*sight),
                Some(Ok(Seen::Features(features))) => {
                    self.stats.features_encoded += features.len();
                    // Held until they have been given to those who wait for them.
                    let keep = |(digest, features)| {
                        let features = self.features.insert(digest, features);
                        if let Some(store) = &self.store {
                            store.put(&digest, &features);
                        }
                        features
                    };
                    let held: Vec<_> = features.into_iter().map(keep).collect();
                    self.recognise(sink);
                    drop(held);
                }
                Some(Err(error)) => self.fail(job, error, sink),
            }
            let enough = match until {
                // Rather stop early than be a layer late.
                Some(until) => Instant::now() + begun.elapsed() > until,
                None => through,
            };
            if enough {
                break;
            }
        }
        looked
    }

    /// Takes what the disk has of the pictures that wait to be seen, whoever asks, and asks it for more.
    fn remember(&mut self, sink: Sink<'_>) {
        let Some(recall) = &mut self.recall else {
            return;
        };
        // Held until they have been given to those who wait for them.
        let mut held = Vec::new();
        for (digest, found) in recall.take() {
            match found {
                Some(found) => held.push(self.features.insert(digest, found)),
                None => (self.running.iter_mut()).for_each(|job| job.mark_not_on_disk(&digest)),
            }
        }
        if !held.is_empty() {
            self.stats.features_read += held.len();
            self.recognise(sink);
        }
        let columns = self.model.config().text_config.hidden_size;
        let Some(recall) = &mut self.recall else {
            return;
        };
        let prefills = |job: &&Job| job.stage == Stage::Prefill;
        for job in self.running.iter().filter(prefills) {
            for (unit, digest) in job.unseen_digests() {
                let unit = &job.units[unit];
                if !unit.not_on_disk && self.features.get(&digest).is_none() {
                    recall.ask(digest, (unit.positions.len(), columns));
                }
            }
        }
    }

    /// Whether a prompt could go on without seeing more.
    fn reads_prompts(&self) -> bool {
        let prefills = |job: &&Job| job.stage == Stage::Prefill;
        let mut jobs = self.running.iter().filter(prefills);
        jobs.any(|job| job.sequences.iter().any(|s| job.ready(s) > s.cached))
    }

    /// Gives known features to those that wait for them; to how many.
    fn recognise(&mut self, sink: Sink<'_>) -> usize {
        let mut found = 0;
        for job in &mut self.running {
            let unseen = match job.stage {
                Stage::Prefill => job.unseen_digests(),
                Stage::Decode => continue,
            };
            for (unit, digest) in unseen {
                let Some(features) = self.features.get(&digest) else {
                    continue;
                };
                job.units[unit].features = Some(features);
                job.units[unit].not_on_disk = false;
                job.seen.0 += job.units[unit].pictures();
                let (done, total) = job.seen;
                let event = RequestEvent::Progress(Event::Vision { done, total });
                job.cancelled |= sink(job.id, event).is_break();
                found += 1;
            }
        }
        found
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
            prompt_tokens: std::mem::take(&mut job.prompt_tokens),
            cached_tokens: job.cached_tokens,
            timings: job.timings,
        };
        // Whoever hears of the end may count on its pixels being free, and on a feed knowing.
        let id = job.id;
        drop(job);
        let _ = sink(id, RequestEvent::Done(Ok(generation)));
    }

    /// Ends a request with an error.
    pub(super) fn fail(&mut self, id: RequestId, error: Error, sink: Sink<'_>) {
        let own = |job: &Job| job.id == id;
        let job = match self.running.iter().position(own) {
            Some(i) => self.running.remove(i),
            None => match self.waiting.iter().position(own) {
                Some(i) => self.waiting.remove(i),
                None => return,
            },
        };
        self.give_back(&job);
        drop(job);
        self.stats.failed += 1;
        let _ = sink(id, RequestEvent::Done(Err(error)));
    }

    /// Rotary scaling that looks at the whole length gives a beginning other keys in each prompt.
    pub(super) fn shares_prefixes(&self) -> bool {
        let rope = &self.model.config().text_config.rope;
        self.limits.prefix_caching && !rope.depends_on_length()
    }
}
