//! `lnv bench`: each stage as time, rate and share of what this machine can do.
//!
//! The limits are measured in the same run, before the model is loaded: the arithmetic peak of the type
//! in use on all cores, and the read bandwidth. The type in use is the one that products are computed
//! in: 8-bit integers for q8 and q4. A share counts only what the task needs (the vision layers that
//! are read, no padding, the last layer's one row, no logits that nobody reads), so work that need not
//! be done lowers it; the bytes of a decode step are those that its weights have in memory.

mod report;
mod requests;
mod rows;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use llava_next_video::config::{GenerationConfig, LlavaNextVideoConfig, TextConfig};
use llava_next_video::engine::{Engine, EngineLimits, Event, GenerationOptions};
use llava_next_video::media::{FrameSampling, ImageSize};
use llava_next_video::model::{Checkpoint, Formats, LlavaNextVideoModel, kv_bytes_per_token};
use llava_next_video::processor::conversation::{
    Content, Conversation, MediaSource, Message, Role,
};
use llava_next_video::processor::inputs::{ModelInputs, Pixels, VideoInput};
use llava_next_video::processor::resize::Arithmetic;
use llava_next_video::processor::video_processor::LlavaNextVideoVideoProcessor;
use lnv_kernels::WeightDtype;
use lnv_kernels::probe::{self, Peak};
use serde_json::json;

use crate::args::{BenchArgs, Format, Synthetic};
use crate::media::LoadedMedia;
use crate::model::RunOptions;
use crate::pipeline::Pipeline;
use crate::{checkpoint, memory, output, progress};
use report::Report;
use requests::{Load, Requests};
use rows::Rows;

/// Text tokens beside the frames'.
const TEXT_TOKENS: usize = 40;

/// Whole runs; the best of each stage counts, since a shared machine only ever adds time.
const RUNS: usize = 3;

/// Seconds and needs of one run.
#[derive(Debug, Clone, Copy)]
struct Stage {
    seconds: f64,
    /// Floating-point operations, or bytes.
    needed: f64,
}

impl Stage {
    /// Giga-units a second.
    fn rate(&self) -> f64 {
        self.needed / self.seconds / 1e9
    }
}

/// Runs the command.
pub fn run(args: &BenchArgs) -> Result<()> {
    let options = RunOptions::new(&args.run)?;
    if args.frames == 0 || args.frames > 4096 || args.steps == 0 {
        bail!("--frames must be from 1 to 4096 and --steps at least 1");
    }
    if args.batch.is_some_and(|rows| !(1..=1024).contains(&rows)) {
        bail!("--batch must be from 1 to 1024");
    }
    if args.requests.is_some_and(|n| !(1..=1024).contains(&n)) || args.clips == 0 {
        bail!("--requests must be from 1 to 1024 and --clips at least 1");
    }
    let contexts = &args.context;
    if contexts.iter().any(|n| !(1..=1 << 20).contains(n)) {
        bail!("--context must be from 1 to {}", 1 << 20);
    }
    let media_s = args
        .video
        .as_deref()
        .map(|path| media_seconds(path, args))
        .transpose()?;
    let opening = Instant::now();
    let (config, checkpoint) = open(args)?;
    let load_options = options.load_options(&config, args.frames);
    let formats = Formats::choose(&config, &checkpoint, &load_options)?;
    let opening = opening.elapsed().as_secs_f64();
    let limits = Limits::measure(&formats, options.device)?;
    memory::reset_peak();
    let loaded = options.load_from(config, &checkpoint, args.frames)?;
    drop(checkpoint);
    let measured = measure(loaded.model, formats, (args, limits.bandwidth_gbs))?;
    let report = Report {
        load_s: opening + loaded.seconds,
        media_s,
        limits,
        measured,
        peak_rss_bytes: memory::peak(),
    };
    match args.format {
        Format::Json => output::line(&report.json().to_string()),
        Format::Text => output::write(&report.text(args.frames)),
    }
}

/// Seconds that decoding and preprocessing take once the file is in memory.
fn media_seconds(path: &std::path::Path, args: &BenchArgs) -> Result<f64> {
    let processor = match args.synthetic {
        // The synthetic towers take what the class makes when nothing is said.
        Some(_) => LlavaNextVideoVideoProcessor::class_default(Arithmetic::Torchvision),
        None => {
            let pipeline = Pipeline::open(args.model.as_deref(), false)?;
            pipeline.processor.video_processor
        }
    };
    let video = MediaSource::Path(path.to_owned());
    let content = vec![Content::Video(Some(video)), Content::Text("?".into())];
    let conversation = Conversation {
        messages: vec![Message::new(Role::User, content)],
    };
    let mut seconds = f64::MAX;
    for _ in 0..RUNS {
        let start = Instant::now();
        let sampling = FrameSampling::Default(args.frames);
        let media = LoadedMedia::load(std::slice::from_ref(&conversation), sampling)?;
        processor.preprocess(&media.videos)?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    Ok(seconds)
}

fn open(args: &BenchArgs) -> Result<(LlavaNextVideoConfig, Checkpoint)> {
    let Some(synthetic) = args.synthetic else {
        let files = checkpoint::open(args.model.as_deref())?;
        let config = LlavaNextVideoConfig::read(&files)?;
        return Ok((config, Checkpoint::open(&files)?));
    };
    let config = synthetic_config(synthetic, args.text_layers)?;
    let checkpoint = Checkpoint::synthetic(&config);
    Ok((config, checkpoint))
}

/// The dimensions of the published checkpoints.
fn synthetic_config(size: Synthetic, text_layers: Option<usize>) -> Result<LlavaNextVideoConfig> {
    let (mut text, vision) = match size {
        Synthetic::B7 => (
            json!({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
                "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32064,
                "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}),
            None,
        ),
        Synthetic::B7K32 => (
            json!({"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                "vocab_size": 32064, "max_position_embeddings": 32768, "rope_theta": 1e6,
                "sliding_window": null, "rms_norm_eps": 1e-5}),
            None,
        ),
        Synthetic::B34 => (
            json!({"model_type": "llama", "hidden_size": 7168, "intermediate_size": 20480,
                "num_hidden_layers": 60, "num_attention_heads": 56, "num_key_value_heads": 8,
                "vocab_size": 64064, "max_position_embeddings": 4096, "rope_theta": 5e6,
                "rms_norm_eps": 1e-5}),
            None,
        ),
        Synthetic::Tiny => (
            json!({"model_type": "llama", "hidden_size": 256, "intermediate_size": 688,
                "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 32064,
                "max_position_embeddings": 8192}),
            Some(
                json!({"model_type": "clip_vision_model", "hidden_size": 128,
                "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
                "image_size": 336, "patch_size": 14}),
            ),
        ),
    };
    if let Some(layers) = text_layers {
        text["num_hidden_layers"] = json!(layers);
    }
    let mut config = json!({"model_type": "llava_next_video", "text_config": text});
    if let Some(vision) = vision {
        config["vision_config"] = vision;
    }
    Ok(LlavaNextVideoConfig::from_json("--synthetic", &config)?)
}

/// What the machine can do.
struct Limits {
    peak_type: &'static str,
    peak: Peak,
    bandwidth_gbs: f64,
}

impl Limits {
    fn measure(formats: &Formats, device: lnv_kernels::Device) -> Result<Self> {
        let ops = formats.ops(Some(device))?;
        let dtype = formats.computed();
        let spinner = progress::spinner("measuring this machine's limits");
        let (peak, bandwidth_gbs) = probe::limits(&ops, dtype);
        let limits = Self {
            peak_type: match dtype {
                // A GPU multiplies what quantised weights stand for.
                _ if ops.is_cuda() => formats.dtype.name(),
                WeightDtype::F32 => "f32",
                WeightDtype::Bf16 => "bf16",
                WeightDtype::F16 => "f16",
                _ => "int8",
            },
            peak,
            bandwidth_gbs,
        };
        spinner.finish_and_clear();
        Ok(limits)
    }
}

/// The stages.
struct Measured {
    formats: Formats,
    resident_bytes: usize,
    vision: Stage,
    prefill: Stage,
    decode: Stage,
    prefill_tokens: usize,
    rows: Vec<Rows>,
    requests: Option<Requests>,
}

fn measure(
    model: LlavaNextVideoModel,
    formats: Formats,
    (args, bandwidth_gbs): (&BenchArgs, f64),
) -> Result<Measured> {
    let inputs = inputs(model.config(), args.frames, 1);
    let tokens = inputs.input_ids[0].len();
    let decode_bytes = model.language_model().bytes().1 as f64 + kv_bytes(&model) * tokens as f64;
    let model = Arc::new(model);
    let seconds = Seconds::best(&model, &inputs, args.steps)?;
    let mut rows = Vec::new();
    if args.batch.is_some() || !args.context.is_empty() {
        let spinner = progress::spinner("decoding rows");
        let contexts = match args.context.as_slice() {
            [] => &[tokens],
            typed => typed,
        };
        let how = (args.batch.unwrap_or(1), contexts, args.steps);
        let measured = Rows::measure_all(&model, how, bandwidth_gbs);
        spinner.finish_and_clear();
        rows = measured?;
    }
    let load = args.requests.map(|requests| Load {
        requests,
        clips: args.clips.min(requests),
        new_tokens: args.new_tokens,
        frames: args.frames,
    });
    let requests = load
        .map(|load| Requests::measure(&model, load))
        .transpose()?;
    Ok(Measured {
        requests,
        formats,
        resident_bytes: model.bytes(),
        vision: Stage {
            seconds: seconds.vision,
            needed: vision_flops(&model, args.frames),
        },
        prefill: Stage {
            seconds: seconds.prefill,
            needed: prefill_flops(&model.config().text_config, tokens),
        },
        decode: Stage {
            seconds: seconds.decode,
            needed: decode_bytes,
        },
        prefill_tokens: tokens,
        rows,
    })
}

/// Bytes of the keys and values of a token.
fn kv_bytes(model: &LlavaNextVideoModel) -> f64 {
    let kv_dtype = model.language_model().kv_dtype();
    kv_bytes_per_token(&model.config().text_config, kv_dtype) as f64
}

/// Seconds of the stages, the best of several runs.
struct Seconds {
    vision: f64,
    prefill: f64,
    decode: f64,
}

impl Seconds {
    fn best(model: &Arc<LlavaNextVideoModel>, inputs: &ModelInputs, steps: usize) -> Result<Self> {
        // Each run is to do all of the work.
        let limits = EngineLimits {
            feature_bytes: 0,
            prefix_caching: false,
            ..EngineLimits::default()
        };
        let defaults = GenerationConfig::default();
        let mut engine = Engine::with_limits(Arc::clone(model), defaults, limits)?;
        let options = GenerationOptions {
            max_new_tokens: Some(steps + 1),
            num_return_sequences: 1,
            eos_token_ids: Some(Vec::new()),
            ..GenerationOptions::default()
        };
        let bar = progress::bar(RUNS as u64, progress::Unit::Count, "measuring");
        let (mut vision, mut prefill, mut decode) = (f64::MAX, f64::MAX, f64::MAX);
        for _ in 0..RUNS {
            let mut last = None;
            let mut watch = |event: Event| {
                if let Event::Token { .. } = event {
                    let now = Instant::now();
                    if let Some(before) = last.replace(now) {
                        decode = decode.min((now - before).as_secs_f64());
                    }
                }
                ControlFlow::Continue(())
            };
            let generation = engine.generate(inputs, &options, &(), &mut watch)?;
            vision = vision.min(generation.timings.vision_s);
            prefill = prefill.min(generation.timings.prefill_s);
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(Self {
            vision,
            prefill,
            decode,
        })
    }
}

/// A clip of noise and a prompt of nothing in particular.
fn inputs(config: &LlavaNextVideoConfig, frames: usize, seed: u32) -> ModelInputs {
    let side = config.vision_config.image_size;
    let mut state = seed;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let data: Vec<f32> = (0..frames * 3 * side * side).map(|_| noise()).collect();
    let frames_input = Pixels {
        count: frames,
        size: ImageSize::square(side),
        data: data.into(),
    };
    let placeholders = frames * config.tokens_per_frame();
    let word_ids = (config.text_config.vocab_size as u32)
        .min(config.image_token_index)
        .min(config.video_token_index)
        .max(1);
    let text = (0..TEXT_TOKENS as u32).map(|i| i * 7 % word_ids);
    let video = std::iter::repeat_n(config.video_token_index, placeholders);
    let ids: Vec<u32> = text
        .clone()
        .take(20)
        .chain(video)
        .chain(text.skip(20))
        .collect();
    ModelInputs {
        attention_mask: vec![vec![true; ids.len()]],
        input_ids: vec![ids],
        images: Vec::new(),
        videos: vec![VideoInput::from(frames_input)],
    }
}

fn vision_flops(model: &LlavaNextVideoModel, frames: usize) -> f64 {
    let config = model.config();
    let (_, tower) = model.vision_tower().cost();
    let (d, k) = (
        config.text_config.hidden_size as f64,
        config.projector_inputs() as f64,
    );
    let projected = config.tokens_per_frame() as f64;
    frames as f64 * (tower + 2.0 * projected * (k * d + d * d))
}

/// What a prompt of `t` tokens needs: in the last layer every key and value, but one row of the rest.
fn prefill_flops(c: &TextConfig, t: usize) -> f64 {
    let (d, f, t) = (c.hidden_size as f64, c.intermediate_size as f64, t as f64);
    let q = (c.num_attention_heads * c.head_dim) as f64;
    let kv = (2 * c.num_key_value_heads * c.head_dim) as f64;
    let row = 2.0 * (d * q + q * d + 3.0 * d * f);
    let keys = 2.0 * d * kv;
    let attention = 4.0 * q * t * (t + 1.0) / 2.0;
    let whole = c.num_hidden_layers as f64 - 1.0;
    whole * (t * (row + keys) + attention)
        + (t * keys + row + 4.0 * q * t)
        + 2.0 * d * c.vocab_size as f64
}
