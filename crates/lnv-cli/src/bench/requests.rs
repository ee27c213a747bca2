//! Many requests at once, as a server has them.
//!
//! Decision: through the engine alone, without sockets and media, so that what is compared is the engine:
//! the same questions about some clips, one after another by an engine that remembers nothing (as a new
//! process would), then all at once. Then two things that a reader notices: how soon a question about a
//! clip that was seen before is answered, and how much slower tokens come while somebody else's long clip
//! is read.

use std::ops::ControlFlow;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use llava_next_video::config::GenerationConfig;
use llava_next_video::engine::{
    Engine, EngineLimits, Event, GenerationOptions, Prefer, Request, RequestEvent, Service,
    ServiceLimits,
};
use llava_next_video::model::LlavaNextVideoModel;
use llava_next_video::processor::inputs::ModelInputs;

use crate::progress;

/// Readers whose tokens are timed beside a long clip, and the length of their answers.
const READERS: usize = 4;
const READ: usize = 48;
/// Blocks of 64 tokens of the cache.
const CACHE_BLOCKS: usize = 512;
/// How much longer the long clip is.
const LONGER: usize = 3;

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Requests.
    pub requests: usize,
    /// Clips that they are about.
    pub clips: usize,
    /// New tokens of each.
    pub new_tokens: usize,
    /// Frames of a clip.
    pub frames: usize,
}

/// What was measured, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Requests {
    /// What was asked.
    pub load: Load,
    /// All, one after another.
    pub one_by_one_s: f64,
    /// All at once, by an engine that prefers latency, and by one that prefers throughput.
    pub together_s: [f64; 2],
    /// First token of a question about a clip nobody has seen.
    pub first_s: f64,
    /// First token of another question about it.
    pub again_s: f64,
    /// A token of readers alone, on average and at worst.
    pub token_s: (f64, f64),
    /// A token of readers while a long clip is read.
    pub beside_s: (f64, f64),
}

impl Requests {
    /// Measures all of it.
    ///
    /// # Errors
    /// The clips do not fit the model's context.
    pub fn measure(model: &Arc<LlavaNextVideoModel>, load: Load) -> Result<Self> {
        let spinner = progress::spinner("answering requests");
        let clips: Vec<ModelInputs> = (0..load.clips)
            .map(|clip| super::inputs(model.config(), load.frames, clip as u32))
            .collect();
        let asked: Vec<ModelInputs> = (0..load.requests)
            .map(|i| question(&clips[i % load.clips], i as u32))
            .collect();
        let one_by_one_s = one_by_one(model, &asked, load.new_tokens)?;
        let together_s = [
            together(model, Prefer::Latency, &asked, load.new_tokens)?,
            together(model, Prefer::Throughput, &asked, load.new_tokens)?,
        ];
        let service = service(model, Prefer::Latency)?;
        let first = |inputs: ModelInputs| -> Result<f64> {
            let start = Instant::now();
            let times = ask(&service, inputs, 2, 0)?.times()?;
            Ok((times[0] - start).as_secs_f64())
        };
        let first_s = first(clips[0].clone())?;
        let again_s = first(question(&clips[0], 1))?;

        let token_s = readers(model, None)?;
        let long = super::inputs(model.config(), LONGER * load.frames, 77);
        let beside_s = readers(model, Some(long))?;
        spinner.finish_and_clear();
        Ok(Self {
            load,
            one_by_one_s,
            together_s,
            first_s,
            again_s,
            token_s,
            beside_s,
        })
    }
}

/// The same clip, another last word.
fn question(clip: &ModelInputs, i: u32) -> ModelInputs {
    let mut other = clip.clone();
    if let Some(last) = other.input_ids[0].last_mut() {
        *last = *last % 1000 + i;
    }
    other
}

fn options(new_tokens: usize) -> GenerationOptions {
    GenerationOptions {
        max_new_tokens: Some(new_tokens),
        num_return_sequences: 1,
        eos_token_ids: Some(Vec::new()),
        ..GenerationOptions::default()
    }
}

fn service(model: &Arc<LlavaNextVideoModel>, prefer: Prefer) -> Result<Service> {
    // As a server has it: room for all from the start, which costs what is written of it.
    let limits = EngineLimits {
        cache_blocks: Some(CACHE_BLOCKS),
        prefer,
        ..EngineLimits::default()
    };
    let engine = Engine::with_limits(Arc::clone(model), GenerationConfig::default(), limits)?;
    let limits = ServiceLimits::default();
    Ok(Service::start(engine, Arc::new(()), limits))
}

fn one_by_one(
    model: &Arc<LlavaNextVideoModel>,
    asked: &[ModelInputs],
    new_tokens: usize,
) -> Result<f64> {
    let forgetful = EngineLimits {
        feature_bytes: 0,
        prefix_caching: false,
        ..EngineLimits::default()
    };
    let defaults = GenerationConfig::default();
    let mut engine = Engine::with_limits(Arc::clone(model), defaults, forgetful)?;
    let start = Instant::now();
    for inputs in asked {
        let watch = &mut |_: Event| ControlFlow::Continue(());
        engine.generate(inputs, &options(new_tokens), &(), watch)?;
    }
    Ok(start.elapsed().as_secs_f64())
}

fn together(
    model: &Arc<LlavaNextVideoModel>,
    prefer: Prefer,
    asked: &[ModelInputs],
    new_tokens: usize,
) -> Result<f64> {
    let service = service(model, prefer)?;
    let start = Instant::now();
    let answers: Vec<Asked> = asked
        .iter()
        .enumerate()
        .map(|(i, inputs)| ask(&service, inputs.clone(), new_tokens, i as u64))
        .collect::<Result<_>>()?;
    for answer in &answers {
        answer.times()?;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// A request that was handed over.
struct Asked {
    tokens: mpsc::Receiver<Result<Instant>>,
}

impl Asked {
    /// When its tokens came, once it is over.
    fn times(&self) -> Result<Vec<Instant>> {
        self.tokens.iter().collect()
    }
}

fn ask(service: &Service, inputs: ModelInputs, new_tokens: usize, client: u64) -> Result<Asked> {
    let (sender, tokens) = mpsc::channel();
    let on_event = move |event: RequestEvent| {
        let gone = match event {
            RequestEvent::Progress(Event::Token { .. }) => sender.send(Ok(Instant::now())),
            RequestEvent::Done(Err(error)) => sender.send(Err(anyhow!(error))),
            _ => Ok(()),
        };
        match gone {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    };
    let request = Request {
        inputs,
        options: options(new_tokens),
        constraints: None,
        client,
        on_event: Box::new(on_event),
    };
    match service.submit(request) {
        Ok(_) => Ok(Asked { tokens }),
        Err(refused) => bail!("a request was not taken: {refused:?}"),
    }
}

/// The mean and the longest time between two tokens of readers; with a long clip, only of the tokens that
/// came while it was being read.
fn readers(model: &Arc<LlavaNextVideoModel>, long: Option<ModelInputs>) -> Result<(f64, f64)> {
    let service = service(model, Prefer::Latency)?;
    let text = |reader: usize| ModelInputs {
        input_ids: vec![(0..200).map(|i| (i * 7 + reader as u32) % 1000).collect()],
        attention_mask: vec![vec![true; 200]],
        ..ModelInputs::default()
    };
    // With a clip beside, more is read than is measured, so that somebody reads all the while.
    let tokens = if long.is_some() { 60 * READ } else { READ };
    let readers: Vec<Asked> = (0..READERS)
        .map(|reader| ask(&service, text(reader), tokens, reader as u64))
        .collect::<Result<_>>()?;
    // Everybody decodes.
    let mut firsts = Vec::new();
    for reader in &readers {
        firsts.push(
            reader
                .tokens
                .recv()
                .map_err(|_| anyhow!("no token came"))??,
        );
    }
    let (begin, end) = match long {
        None => (firsts[READERS - 1], None),
        Some(long) => {
            let begin = Instant::now();
            let first = ask(&service, long, 1, 99)?.times()?;
            (begin, first.first().copied())
        }
    };
    let mut between = Vec::new();
    for reader in readers {
        let times: Vec<Instant> = match end {
            None => reader.times()?,
            Some(_) => reader.tokens.try_iter().collect::<Result<_>>()?,
        };
        let inside = |at: &Instant| *at >= begin && end.is_none_or(|end| *at <= end);
        let times: Vec<Instant> = times.into_iter().filter(inside).collect();
        between.extend(times.windows(2).map(|two| (two[1] - two[0]).as_secs_f64()));
    }
    if between.is_empty() {
        bail!("no token came while the clip was read");
    }
    let mean = between.iter().sum::<f64>() / between.len() as f64;
    Ok((mean, between.into_iter().fold(0.0, f64::max)))
}
