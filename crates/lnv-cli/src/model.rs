//! From what was typed to a loaded model and the library's options.

use std::str::FromStr;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use llava_next_video::config::{
    BitsAndBytesConfig, BitsAndBytesKind, CheckpointFiles, Dtype, GenerationConfig,
    LlavaNextVideoConfig, QuantType, Quantization, RopeOverride, parse_rope_override,
};
use llava_next_video::engine::{EarlyStopping, GenerationOptions, Sampling};
use llava_next_video::media::FrameSampling;
use llava_next_video::model::{Checkpoint, LlavaNextVideoModel, LoadOptions};
use lnv_kernels::{Device, KvDtype};

use crate::args::{
    BitsAndBytesArgs, ComputeArg, DtypeArg, EarlyStoppingArg, FrameArgs, GenerationArgs,
    KvDtypeArg, QuantizeArg, RunArgs,
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
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// Type of the weights that are not quantised.
    pub dtype: Option<Dtype>,
    /// How the others are quantised.
    pub quantization: Option<Quantization>,
    /// What was typed of bitsandbytes' settings.
    bitsandbytes: BitsAndBytesArgs,
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
        let dtype = dtype(args.dtype);
        let quantization = match args.quantize {
            Some(wanted) => Some(quantization(wanted, &args.bitsandbytes, dtype)?),
            None => {
                not_typed(&args.bitsandbytes, "without --quantize")?;
                None
            }
        };
        Ok(Self {
            dtype,
            quantization,
            bitsandbytes: args.bitsandbytes.clone(),
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
            ..self.load_options(&config, frames)
        };
        let model = LlavaNextVideoModel::from_checkpoint(config, checkpoint, &options);
        progress.finish_and_clear();
        Ok(Loaded {
            model: model?,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// The library's options for a checkpoint, without progress.
    pub fn load_options(
        &self,
        config: &LlavaNextVideoConfig,
        frames: usize,
    ) -> LoadOptions<'static> {
        let mut quantization = self.quantization.clone();
        if let Some(Quantization::BitsAndBytes(wanted)) = &mut quantization
            && let Some(stored) = &config.quantization_config
        {
            // What was not typed is as the checkpoint has it.
            let typed = &self.bitsandbytes;
            if typed.compute_dtype.is_none() {
                wanted.bnb_4bit_compute_dtype = stored.bnb_4bit_compute_dtype;
            }
            if typed.int8_threshold.is_none() {
                wanted.llm_int8_threshold = stored.llm_int8_threshold;
            }
        }
        LoadOptions {
            dtype: self.dtype,
            quantization,
            kv_cache_dtype: self.kv_cache_dtype,
            device: Some(self.device),
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

/// `--quantize` and `--to`, with what belongs to them; `dtype` is what stays dense.
pub fn quantization(
    arg: QuantizeArg,
    typed: &BitsAndBytesArgs,
    dtype: Option<Dtype>,
) -> Result<Quantization> {
    let kind = match arg {
        QuantizeArg::Q8 => {
            not_typed(typed, "with q8")?;
            return Ok(Quantization::Q8);
        }
        QuantizeArg::Q4 => {
            not_typed(typed, "with q4")?;
            return Ok(Quantization::Q4);
        }
        QuantizeArg::Nf4 => BitsAndBytesKind::FourBit(QuantType::Nf4),
        QuantizeArg::Fp4 => BitsAndBytesKind::FourBit(QuantType::Fp4),
        QuantizeArg::Int8 => BitsAndBytesKind::Int8,
    };
    let mut config = BitsAndBytesConfig {
        llm_int8_skip_modules: typed.skip_modules.clone(),
        ..BitsAndBytesConfig::of(kind)
    };
    match kind {
        BitsAndBytesKind::FourBit(_) => {
            if typed.int8_threshold.is_some() {
                bail!(
                    "--int8-threshold is for int8, not {}: leave it out",
                    kind.name()
                );
            }
            config.bnb_4bit_use_double_quant = typed.double_quant;
            config.bnb_4bit_compute_dtype = match (typed.compute_dtype, dtype) {
                (Some(ComputeArg::F32), _) | (None, Some(Dtype::F32)) => Dtype::F32,
                (Some(ComputeArg::F16), _) => Dtype::F16,
                (Some(ComputeArg::Bf16) | None, _) => Dtype::Bf16,
            };
        }
        BitsAndBytesKind::Int8 => {
            if typed.double_quant {
                bail!("--double-quant is for nf4 and fp4, not int8: leave it out");
            }
            if typed.compute_dtype.is_some() {
                bail!("--compute-dtype is for nf4 and fp4, not int8: leave it out");
            }
            if let Some(threshold) = typed.int8_threshold {
                if !(threshold >= 0.0 && threshold.is_finite()) {
                    bail!("--int8-threshold is {threshold}; it must be 0 or above");
                }
                config.llm_int8_threshold = threshold;
            }
        }
    }
    Ok(config.into())
}

/// Refuses bitsandbytes' settings where they have no effect.
fn not_typed(typed: &BitsAndBytesArgs, place: &str) -> Result<()> {
    let given = [
        ("--double-quant", typed.double_quant),
        ("--compute-dtype", typed.compute_dtype.is_some()),
        ("--skip-modules", typed.skip_modules.is_some()),
        ("--int8-threshold", typed.int8_threshold.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((name, _)) => {
            bail!("{name} has no effect {place}: it belongs to --quantize nf4, fp4 or int8")
        }
        None => Ok(()),
    }
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
        logprobs: None,
    })
}
