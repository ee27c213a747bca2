//! `lnv bench`: each stage as time, rate and share of what this machine can do.
//!
//! The limits are measured in the same run, before the model is loaded: the arithmetic peak of the type
//! in use on all cores, and the read bandwidth. A share counts only what the task needs (the vision
//! layers that are read, no padding, the last layer's one row, no logits that nobody reads), so work
//! that need not be done lowers it.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use llava_next_video::config::{Dtype, GenerationConfig, LlavaNextVideoConfig, TextConfig};
use llava_next_video::engine::{Engine, Event, GenerationOptions};
use llava_next_video::media::{FrameSampling, ImageSize};
use llava_next_video::model::{Checkpoint, LlavaNextVideoModel, LoadOptions, kv_bytes_per_token};
use llava_next_video::processor::conversation::{
    Content, Conversation, MediaSource, Message, Role,
};
use llava_next_video::processor::inputs::{ModelInputs, Pixels, VideoInput};
use llava_next_video::processor::resize::Arithmetic;
use llava_next_video::processor::video_processor::LlavaNextVideoVideoProcessor;
use lnv_kernels::{Ops, WeightDtype, probe};
use serde_json::json;

use crate::args::{BenchArgs, Format, Synthetic};
use crate::media::LoadedMedia;
use crate::model::RunOptions;
use crate::pipeline::Pipeline;
use crate::{checkpoint, output, progress};

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
    let media_s = args
        .video
        .as_deref()
        .map(|path| media_seconds(path, args))
        .transpose()?;
    let start = Instant::now();
    let model = load(args, &options)?;
    let load_s = start.elapsed().as_secs_f64();
    let limits = Limits::measure(&model, options.device)?;
    let measured = measure(model, args)?;
    let first_token_s =
        load_s + media_s.unwrap_or(0.0) + measured.vision.seconds + measured.prefill.seconds;
    let report = Report {
        load_s,
        media_s,
        first_token_s,
        limits,
        measured,
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

fn load(args: &BenchArgs, options: &RunOptions) -> Result<LlavaNextVideoModel> {
    match args.synthetic {
        None => {
            let files = checkpoint::open(args.model.as_deref())?;
            let config = LlavaNextVideoConfig::read(&files)?;
            Ok(options.load(config, &files, args.frames)?.model)
        }
        Some(synthetic) => {
            let config = synthetic_config(synthetic, args.text_layers)?;
            let dtype = options.dtype.unwrap_or(Dtype::Bf16);
            let spinner = progress::spinner("making random weights");
            let load = LoadOptions {
                dtype: Some(dtype),
                kv_cache_dtype: options.kv_cache_dtype,
                device: options.device,
                rope: options.rope.map(|rope| (rope, args.frames)),
                progress: None,
            };
            let checkpoint = Checkpoint::synthetic(&config);
            let model = LlavaNextVideoModel::from_checkpoint(config, &checkpoint, &load);
            spinner.finish_and_clear();
            Ok(model?)
        }
    }
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
    peak_gflops: f64,
    bandwidth_gbs: f64,
}

impl Limits {
    fn measure(model: &LlavaNextVideoModel, device: lnv_kernels::Device) -> Result<Self> {
        let ops = Ops::new(device).map_err(|e| anyhow::anyhow!("{e}"))?;
        let dtype = match model.dtype() {
            Dtype::F32 => WeightDtype::F32,
            Dtype::Bf16 => WeightDtype::Bf16,
            Dtype::F16 => WeightDtype::F16,
        };
        let spinner = progress::spinner("measuring this machine's limits");
        let limits = Self {
            peak_gflops: probe::peak_gflops(ops.isa(), dtype),
            bandwidth_gbs: probe::read_bandwidth_gbs(),
        };
        spinner.finish_and_clear();
        Ok(limits)
    }
}

/// The stages.
struct Measured {
    dtype: Dtype,
    vision: Stage,
    prefill: Stage,
    decode: Stage,
    prefill_tokens: usize,
}

fn measure(model: LlavaNextVideoModel, args: &BenchArgs) -> Result<Measured> {
    let config = model.config().clone();
    let dtype = model.dtype();
    let inputs = inputs(&config, args.frames);
    let tokens = inputs.input_ids[0].len();
    let vision_needed = vision_flops(&model, args.frames);
    let kv_dtype = model.language_model().kv_dtype();
    let decode_weights = model.language_model().bytes().1 as f64;
    let mut engine = Engine::new(Arc::new(model), GenerationConfig::default());
    let options = GenerationOptions {
        max_new_tokens: Some(args.steps + 1),
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
        let generation = engine.generate(&inputs, &options, &(), &mut watch)?;
        vision = vision.min(generation.timings.vision_s);
        prefill = prefill.min(generation.timings.prefill_s);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let text = &config.text_config;
    let kv = kv_bytes_per_token(text, kv_dtype) as f64;
    Ok(Measured {
        dtype,
        vision: Stage {
            seconds: vision,
            needed: vision_needed,
        },
        prefill: Stage {
            seconds: prefill,
            needed: prefill_flops(text, tokens),
        },
        decode: Stage {
            seconds: decode,
            needed: decode_weights + kv * tokens as f64,
        },
        prefill_tokens: tokens,
    })
}

/// A clip of noise and a prompt of nothing in particular.
fn inputs(config: &LlavaNextVideoConfig, frames: usize) -> ModelInputs {
    let side = config.vision_config.image_size;
    let mut state = 1u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let data = (0..frames * 3 * side * side).map(|_| noise()).collect();
    let frames_input = Pixels {
        count: frames,
        size: ImageSize::square(side),
        data,
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
        videos: vec![VideoInput {
            frames: frames_input,
        }],
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

struct Report {
    load_s: f64,
    media_s: Option<f64>,
    first_token_s: f64,
    limits: Limits,
    measured: Measured,
}

impl Report {
    fn json(&self) -> serde_json::Value {
        let (m, l) = (&self.measured, &self.limits);
        let mut json = json!({
            "dtype": m.dtype.name(),
            "load_s": self.load_s,
            "vision_s": m.vision.seconds,
            "prefill_s": m.prefill.seconds,
            "prefill_tokens": m.prefill_tokens,
            "decode_s": m.decode.seconds,
            "first_token_s": self.first_token_s,
            "peak_gflops": l.peak_gflops,
            "bandwidth_gbs": l.bandwidth_gbs,
            "vision_gflops": m.vision.rate(),
            "prefill_gflops": m.prefill.rate(),
            "decode_gbs": m.decode.rate(),
            "vision_share": m.vision.rate() / l.peak_gflops,
            "prefill_share": m.prefill.rate() / l.peak_gflops,
            "decode_share": m.decode.rate() / l.bandwidth_gbs,
        });
        if let Some(media_s) = self.media_s {
            json["media_s"] = json!(media_s);
        }
        json
    }

    fn text(&self, frames: usize) -> String {
        let (m, l) = (&self.measured, &self.limits);
        let compute = |name: &str, stage: &Stage, what: &str| {
            format!(
                "{name:<8} {:>9.3} s   {:>7.1} GFLOP/s  {:>5.1} % of the peak   {what}\n",
                stage.seconds,
                stage.rate(),
                100.0 * stage.rate() / l.peak_gflops
            )
        };
        let mut text = format!(
            "limits   {:.1} GFLOP/s in {}, {:.1} GB/s read, {} threads\n",
            l.peak_gflops,
            m.dtype.name(),
            l.bandwidth_gbs,
            std::thread::available_parallelism().map_or(1, usize::from)
        );
        text += &format!("load     {:>9.3} s\n", self.load_s);
        if let Some(media) = self.media_s {
            text += &format!("media    {media:>9.3} s   decoding and preprocessing, second time\n");
        }
        text += &compute("vision", &m.vision, &format!("{frames} frames"));
        text += &compute(
            "prefill",
            &m.prefill,
            &format!("{} tokens", m.prefill_tokens),
        );
        text += &format!(
            "decode   {:>9.4} s   {:>7.1} GB/s     {:>5.1} % of the bandwidth   {:.1} tokens/s\n",
            m.decode.seconds,
            m.decode.rate(),
            100.0 * m.decode.rate() / l.bandwidth_gbs,
            1.0 / m.decode.seconds
        );
        text += &format!(
            "first token after {:.2} s, loading included\n",
            self.first_token_s
        );
        text
    }
}
