//! From what was typed to a loaded model and the library's options.

use std::str::FromStr;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use llava_next_video::config::{
    CheckpointFiles, Dtype, GenerationConfig, LlavaNextVideoConfig, Quantization, RopeOverride,
    parse_rope_override,
};
use llava_next_video::engine::{EarlyStopping, GenerationOptions, Sampling};
use llava_next_video::media::FrameSampling;
use llava_next_video::model::{Checkpoint, LlavaNextVideoModel, LoadOptions};
use lnv_kernels::{Device, KvDtype};

use crate::args::{
    DtypeArg, EarlyStoppingArg, FrameArgs, GenerationArgs, KvDtypeArg, QuantizeArg, RunArgs,
};
use crate::progress::{Unit, bar, note};

/// Frames of a video when nothing else is said.
pub const DEFAULT_FRAMES: usize = 8;

/// The most frames a second that may be asked for; no clip has more.
const MAX_FPS: f64 = 1000.0;

/// A model in memory, and how long that took.
pub struct Loaded {
    /// The model.
    pub model: LlavaNextVideoModel,
    /// Seconds.
    pub seconds: f64,
}

/// Settings that were checked before anything is read.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions {
    /// Type of the weights that are not quantised.
    pub dtype: Option<Dtype>,
    /// How the others are quantised.
    pub quantization: Option<Quantization>,
    /// Type of the keys and values.
    pub kv_cache_dtype: Option<KvDtype>,
    /// Where to compute.
    pub device: Device,
    /// Rotary scaling.
    pub rope: Option<RopeOverride>,
}

impl RunOptions {
    /// Checks what was typed.
    pub fn new(args: &RunArgs) -> Result<Self> {
        Ok(Self {
            dtype: dtype(args.dtype),
            quantization: args.quantize.map(quantization).transpose()?,
            kv_cache_dtype: kv_dtype(args.kv_cache_dtype),
            device: Device::from_str(&args.device).map_err(|e| anyhow!("{e}"))?,
            rope: args
                .rope_scaling
                .as_deref()
                .map(parse_rope_override)
                .transpose()?,
        })
    }

    /// Loads a checkpoint with a progress bar; `frames` is what `--rope-scaling auto` reckons with.
    pub fn load(
        &self,
        config: LlavaNextVideoConfig,
        files: &CheckpointFiles,
        frames: usize,
    ) -> Result<Loaded> {
        let start = Instant::now();
        let checkpoint = Checkpoint::open(files)?;
        let model = self.load_from(config, &checkpoint, frames)?.model;
        Ok(Loaded {
            model,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// The same from a checkpoint that is open.
    pub fn load_from(
        &self,
        config: LlavaNextVideoConfig,
        checkpoint: &Checkpoint,
        frames: usize,
    ) -> Result<Loaded> {
        let start = Instant::now();
        let progress = bar(0, Unit::Bytes, "loading");
        let report = |done: usize, total: usize| {
            progress.set_length(total as u64);
            progress.set_position(done as u64);
        };
        let options = LoadOptions {
            progress: Some(&report),
            ..self.load_options(frames)
        };
        let model = LlavaNextVideoModel::from_checkpoint(config, checkpoint, &options);
        progress.finish_and_clear();
        Ok(Loaded {
            model: model?,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// The library's options, without progress.
    pub fn load_options(&self, frames: usize) -> LoadOptions<'static> {
        LoadOptions {
            dtype: self.dtype,
            quantization: self.quantization,
            kv_cache_dtype: self.kv_cache_dtype,
            device: self.device,
            rope: self.rope.map(|rope| (rope, frames)),
            progress: None,
        }
    }
}

/// `--dtype`.
pub fn dtype(arg: DtypeArg) -> Option<Dtype> {
    match arg {
        DtypeArg::Auto => None,
        DtypeArg::F32 => Some(Dtype::F32),
        DtypeArg::Bf16 => Some(Dtype::Bf16),
        DtypeArg::F16 => Some(Dtype::F16),
    }
}

/// `--quantize` and `--to`.
pub fn quantization(arg: QuantizeArg) -> Result<Quantization> {
    let name = match arg {
        QuantizeArg::Q8 => return Ok(Quantization::Q8),
        QuantizeArg::Q4 => return Ok(Quantization::Q4),
        QuantizeArg::Nf4 => "nf4",
        QuantizeArg::Fp4 => "fp4",
        QuantizeArg::Int8 => "int8",
    };
    bail!("{name} is not available in this version: use q8 or q4")
}

fn kv_dtype(arg: KvDtypeArg) -> Option<KvDtype> {
    match arg {
        KvDtypeArg::Auto => None,
        KvDtypeArg::F32 => Some(KvDtype::F32),
        KvDtypeArg::Bf16 => Some(KvDtype::Bf16),
        KvDtypeArg::Int8 => Some(KvDtype::Int8),
    }
}

/// Which frames to take.
pub fn sampling(args: &FrameArgs) -> Result<FrameSampling> {
    match (args.num_frames, args.fps) {
        (Some(0), _) => bail!("--num-frames is 0; it must be at least 1"),
        (Some(n), _) => Ok(FrameSampling::NumFrames(n)),
        (None, Some(fps)) if !(fps > 0.0 && fps.is_finite()) => {
            bail!("--fps is {fps}; it must be above 0")
        }
        (None, Some(fps)) if fps > MAX_FPS => {
            bail!("--fps is above {MAX_FPS}; ask for fewer frames")
        }
        (None, Some(fps)) => Ok(FrameSampling::Fps(fps)),
        (None, None) => Ok(FrameSampling::Default(DEFAULT_FRAMES)),
    }
}

/// How to generate; `default_tokens` is the limit where none was typed.
pub fn generation(
    args: &GenerationArgs,
    defaults: &GenerationConfig,
    default_tokens: Option<usize>,
) -> Result<GenerationOptions> {
    if args.num_return_sequences == 0 {
        bail!("--num-return-sequences is 0; it must be at least 1");
    }
    let warped = args.top_k.is_some() || args.top_p.is_some() || args.min_p.is_some();
    // What is not typed is as the checkpoint likes it, once sampling is asked for at all.
    let usual = Sampling::default();
    let usual = Sampling {
        temperature: defaults.temperature.map_or(usual.temperature, |t| t as f32),
        top_k: defaults.top_k.unwrap_or(usual.top_k),
        top_p: defaults.top_p.map_or(usual.top_p, |p| p as f32),
        min_p: defaults.min_p.map_or(usual.min_p, |p| p as f32),
    };
    let default_tokens = defaults.max_new_tokens.or(default_tokens);
    let sampling = match args.temperature {
        Some(0.0) => None,
        None if !warped => None,
        temperature => Some(Sampling {
            temperature: temperature.unwrap_or(usual.temperature),
            top_k: args.top_k.unwrap_or(usual.top_k),
            top_p: args.top_p.unwrap_or(usual.top_p),
            min_p: args.min_p.unwrap_or(usual.min_p),
        }),
    };
    if sampling.is_none() && args.temperature.is_none() && defaults.do_sample == Some(true) {
        note("the checkpoint would sample; answers here are greedy unless --temperature says else");
    }
    Ok(GenerationOptions {
        max_new_tokens: match args.max_length {
            Some(_) => args.max_new_tokens,
            None => args.max_new_tokens.or(default_tokens),
        },
        max_length: args.max_length,
        min_new_tokens: args.min_new_tokens,
        sampling,
        seed: args.seed,
        repetition_penalty: args.repetition_penalty,
        no_repeat_ngram_size: args.no_repeat_ngram_size,
        num_beams: args.num_beams,
        num_return_sequences: args.num_return_sequences,
        length_penalty: args.length_penalty,
        early_stopping: match args.early_stopping {
            Some(EarlyStoppingArg::True) => EarlyStopping::WhenFull,
            Some(EarlyStoppingArg::Never) => EarlyStopping::Never,
            _ => EarlyStopping::Heuristic,
        },
        eos_token_ids: None,
        stop: args.stop.clone(),
    })
}
