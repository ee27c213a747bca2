//! Rotary position embeddings: which frequencies a configuration asks for.
//!
//! Every type of Transformers 4.53.3's `ROPE_INIT_FUNCTIONS`, in both spellings: `rope_scaling` with
//! `rope_theta` (4.x) and `rope_parameters` (5.x). The arithmetic keeps the reference's order and its
//! f32, since a frequency that differs in the last bit differs by radians at position 30,000.
//! Refuses `partial_rotary_factor` other than 1, which the reference's Llama cannot run either.

use std::f64::consts::PI;

use super::fields::Fields;
use crate::error::{Error, Result};

/// Frequencies of a configuration: `rope_theta`, the head size and the scaling.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series (`rope_theta`).
    pub theta: f64,
    /// `max_position_embeddings` of the text model.
    pub max_position_embeddings: usize,
    /// How positions beyond the training length are reached.
    pub scaling: RopeScaling,
}

/// The types of `rope_scaling`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// Frequencies divided by a factor, which is positions divided by it.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// NTK-aware: the base grows with the longest sequence seen.
    Dynamic {
        /// The growth.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn(YarnScaling),
    /// LongRoPE (arXiv 2402.13753).
    LongRope(LongRopeScaling),
    /// Llama 3.1's banded scaling.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Training length.
        original_max_position_embeddings: f64,
    },
}

/// Fields of the `yarn` type.
#[derive(Debug, Clone, PartialEq)]
pub struct YarnScaling {
    /// Interpolation factor; already `max_position / original` where the original is given.
    pub factor: f64,
    /// Multiplies cosine and sine.
    pub attention_factor: f64,
    /// Rotations above which a dimension is extrapolated.
    pub beta_fast: f64,
    /// Rotations below which a dimension is interpolated.
    pub beta_slow: f64,
    /// Training length.
    pub original_max_position_embeddings: f64,
}

/// Fields of the `longrope` type.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRopeScaling {
    /// Divisors of each frequency within the training length.
    pub short_factor: Vec<f32>,
    /// Divisors beyond it.
    pub long_factor: Vec<f32>,
    /// Multiplies cosine and sine.
    pub attention_factor: f64,
    /// Training length.
    pub original_max_position_embeddings: usize,
}

/// Frequencies for one forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeFrequencies {
    /// `head_dim / 2` angular frequencies, radians a position.
    pub inv_freq: Vec<f32>,
    /// Multiplies cosine and sine (`attention_scaling`).
    pub attention_scaling: f32,
}

impl RopeConfig {
    /// Reads the fields of a text configuration.
    pub(crate) fn read(
        text: &Fields<'_>,
        head_dim: usize,
        max_position_embeddings: usize,
    ) -> Result<Self> {
        refuse_partial(text)?;
        let modern = text.object("rope_parameters", "text_config.rope_parameters")?;
        let legacy = text.object("rope_scaling", "text_config.rope_scaling")?;
        let fields = modern.or(legacy);
        if let Some(fields) = &fields {
            refuse_partial(fields)?;
        }
        let theta = match &modern {
            Some(fields) if fields.get("rope_theta").is_some() => {
                fields.positive("rope_theta", 10_000.0)?
            }
            _ => text.positive("rope_theta", 10_000.0)?,
        };
        let scaling = match fields {
            Some(fields) => read_scaling(text, &fields, head_dim, max_position_embeddings)?,
            None => RopeScaling::Default,
        };
        Ok(Self {
            theta,
            max_position_embeddings,
            scaling,
        })
    }

    /// Frequencies for heads of `head_dim` when the longest position of the pass is `seq_len - 1`.
    ///
    /// Only `dynamic` and `longrope` look at `seq_len`. Dynamic frequencies are those of `seq_len`
    /// itself; the reference also remembers the longest sequence that a model object has ever seen,
    /// which makes an answer depend on earlier questions: not copied.
    pub fn frequencies(&self, head_dim: usize, seq_len: usize) -> RopeFrequencies {
        let plain = || inverse_frequencies(self.theta, head_dim);
        let (inv_freq, scaling) = match &self.scaling {
            RopeScaling::Default => (plain(), 1.0),
            RopeScaling::Linear { factor } => {
                (plain().iter().map(|f| f / *factor as f32).collect(), 1.0)
            }
            RopeScaling::Dynamic { factor } => {
                let (d, max) = (head_dim as f64, self.max_position_embeddings as f64);
                let length = (seq_len as f64).max(max);
                let grown = (factor * length / max) - (factor - 1.0);
                (
                    inverse_frequencies(self.theta * grown.powf(d / (d - 2.0)), head_dim),
                    1.0,
                )
            }
            RopeScaling::Yarn(yarn) => (
                yarn.inverse_frequencies(self.theta, head_dim),
                yarn.attention_factor,
            ),
            RopeScaling::LongRope(long) => (
                long.inverse_frequencies(self.theta, head_dim, seq_len),
                long.attention_factor,
            ),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let bands = Llama3Bands {
                    factor: *factor as f32,
                    low: *low_freq_factor as f32,
                    high: *high_freq_factor as f32,
                    original: *original as f32,
                };
                (plain().into_iter().map(|f| bands.scale(f)).collect(), 1.0)
            }
        };
        RopeFrequencies {
            inv_freq,
            attention_scaling: scaling as f32,
        }
    }

    /// True where the frequencies depend on the length of the sequence, so that a cache filled with
    /// shorter ones differs from a pass over the whole.
    pub fn depends_on_length(&self) -> bool {
        matches!(
            self.scaling,
            RopeScaling::Dynamic { .. } | RopeScaling::LongRope(_)
        )
    }
}

fn refuse_partial(fields: &Fields<'_>) -> Result<()> {
    let factor = fields.number("partial_rotary_factor", 1.0)?;
    if factor == 1.0 {
        return Ok(());
    }
    Err(fields.complain(
        "partial_rotary_factor",
        &format!("is {factor}; only 1 is supported (all of a head's dimensions rotate)"),
    ))
}

fn read_scaling(
    text: &Fields<'_>,
    fields: &Fields<'_>,
    head_dim: usize,
    max_position: usize,
) -> Result<RopeScaling> {
    let kind = match fields.text("rope_type")? {
        Some(kind) => kind,
        None => fields.text("type")?.unwrap_or("default"),
    };
    let required = |key: &str| -> Result<f64> {
        fields.optional_number(key)?.ok_or_else(|| {
            fields.complain(key, &format!("is missing; rope type {kind:?} needs it"))
        })
    };
    let factor = || -> Result<f64> {
        let factor = required("factor")?;
        if factor > 0.0 {
            return Ok(factor);
        }
        Err(fields.complain("factor", &format!("is {factor}; it must be above 0")))
    };
    Ok(match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" => RopeScaling::Dynamic { factor: factor()? },
        "yarn" => RopeScaling::Yarn(read_yarn(fields, factor()?, max_position)?),
        "longrope" => RopeScaling::LongRope(read_longrope(text, fields, head_dim, max_position)?),
        "llama3" => RopeScaling::Llama3 {
            factor: factor()?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_max_position_embeddings: required("original_max_position_embeddings")?,
        },
        other => {
            return Err(fields.complain(
                "rope_type",
                &format!(
                    "is {other:?}; supported are default, linear, dynamic, yarn, longrope, llama3"
                ),
            ));
        }
    })
}

fn read_yarn(fields: &Fields<'_>, factor: f64, max_position: usize) -> Result<YarnScaling> {
    let original = fields.optional_number("original_max_position_embeddings")?;
    let factor = original.map_or(factor, |o| max_position as f64 / o);
    // Python's `or` and `and`: a zero counts as absent.
    let given = |key: &str| -> Result<Option<f64>> {
        Ok(fields.optional_number(key)?.filter(|x| *x != 0.0))
    };
    let m = |scale: f64, mscale: f64| {
        if scale <= 1.0 {
            1.0
        } else {
            0.1 * mscale * scale.ln() + 1.0
        }
    };
    let attention_factor = match fields.optional_number("attention_factor")? {
        Some(given) => given,
        None => match (given("mscale")?, given("mscale_all_dim")?) {
            (Some(one), Some(all)) => m(factor, one) / m(factor, all),
            _ => m(factor, 1.0),
        },
    };
    Ok(YarnScaling {
        factor,
        attention_factor,
        beta_fast: given("beta_fast")?.unwrap_or(32.0),
        beta_slow: given("beta_slow")?.unwrap_or(1.0),
        original_max_position_embeddings: original.unwrap_or(max_position as f64),
    })
}

fn read_longrope(
    text: &Fields<'_>,
    fields: &Fields<'_>,
    head_dim: usize,
    max_position: usize,
) -> Result<LongRopeScaling> {
    let factors = |key: &str| -> Result<Vec<f32>> {
        let list = fields
            .numbers(key)?
            .ok_or_else(|| fields.complain(key, "is missing; rope type \"longrope\" needs it"))?;
        if list.len() != head_dim / 2 {
            return Err(fields.complain(
                key,
                &format!(
                    "has {} numbers; head_dim / 2 = {} are needed",
                    list.len(),
                    head_dim / 2
                ),
            ));
        }
        Ok(list.into_iter().map(|x| x as f32).collect())
    };
    // The original length is an attribute of the text configuration in 4.x, of the parameters in 5.x.
    let bounds = 1..=1 << 30;
    let key = "original_max_position_embeddings";
    let original = match text.optional_size(key, bounds.clone())? {
        Some(n) => Some(n),
        None if fields.path.ends_with("rope_parameters") => fields.optional_size(key, bounds)?,
        None => None,
    };
    let factor = match original {
        Some(o) => Some(max_position as f64 / o as f64),
        None => fields.optional_number("factor")?,
    };
    let original = original.unwrap_or(max_position);
    let attention_factor = match (fields.optional_number("attention_factor")?, factor) {
        (Some(given), _) => given,
        (None, Some(f)) if f > 1.0 => (1.0 + f.ln() / (original as f64).ln()).sqrt(),
        (None, Some(_)) => 1.0,
        (None, None) => {
            return Err(fields.complain(
                "factor",
                "is missing; rope type \"longrope\" needs it, or attention_factor, or \
                 text_config.original_max_position_embeddings",
            ));
        }
    };
    Ok(LongRopeScaling {
        short_factor: factors("short_factor")?,
        long_factor: factors("long_factor")?,
        attention_factor,
        original_max_position_embeddings: original,
    })
}

/// `theta^(2i/d)` for `i < d/2`, in f32 as torch raises a Python float to a tensor.
fn powers(theta: f64, head_dim: usize) -> impl Iterator<Item = f32> {
    (0..head_dim / 2).map(move |i| {
        let exponent = (2 * i) as f32 / head_dim as f32;
        (theta as f32 as f64).powf(exponent as f64) as f32
    })
}

fn inverse_frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
    powers(theta, head_dim).map(|p| 1.0 / p).collect()
}

impl YarnScaling {
    fn inverse_frequencies(&self, theta: f64, head_dim: usize) -> Vec<f32> {
        let d = head_dim as f64;
        let correction = |rotations: f64| {
            d * (self.original_max_position_embeddings / (rotations * 2.0 * PI)).ln()
                / (2.0 * theta.ln())
        };
        let low = correction(self.beta_fast).floor().max(0.0);
        let mut high = correction(self.beta_slow).ceil().min(d - 1.0);
        if low == high {
            high += 0.001;
        }
        let (low, span) = (low as f32, (high - low) as f32);
        powers(theta, head_dim)
            .enumerate()
            .map(|(i, power)| {
                let ramp = ((i as f32 - low) / span).clamp(0.0, 1.0);
                let extrapolated = 1.0 - ramp;
                let interpolation = 1.0 / (self.factor as f32 * power);
                interpolation * (1.0 - extrapolated) + (1.0 / power) * extrapolated
            })
            .collect()
    }
}

impl LongRopeScaling {
    fn inverse_frequencies(&self, theta: f64, head_dim: usize, seq_len: usize) -> Vec<f32> {
        let long = seq_len > self.original_max_position_embeddings;
        let factors = if long {
            &self.long_factor
        } else {
            &self.short_factor
        };
        powers(theta, head_dim)
            .zip(factors)
            .map(|(power, f)| 1.0 / (f * power))
            .collect()
    }
}

struct Llama3Bands {
    factor: f32,
    low: f32,
    high: f32,
    original: f32,
}

impl Llama3Bands {
    fn scale(&self, frequency: f32) -> f32 {
        let wavelength = (2.0 * PI) as f32 / frequency;
        let divided = if wavelength > self.original / self.low {
            frequency / self.factor
        } else {
            frequency
        };
        let is_medium =
            wavelength >= self.original / self.high && wavelength <= self.original / self.low;
        if !is_medium {
            return divided;
        }
        let smooth = (self.original / wavelength - self.low) / (self.high - self.low);
        (1.0 - smooth) * divided / self.factor + smooth * divided
    }
}

/// The research code's rule for a clip longer than the training length: `needed = frames * tokens a
/// frame + 1000`, `k = ceil(needed / 4096)`; from 2 on, Vicuna's positions are divided by `k`.
///
/// Returns the linear factor, or `None` where none is needed.
pub fn linear_factor_for_frames(frames: usize, tokens_per_frame: usize) -> Option<f64> {
    let k = (frames * tokens_per_frame + 1000).div_ceil(4096);
    (k >= 2).then_some(k as f64)
}

/// Parses `--rope-scaling`: `linear:F` or `auto`.
///
/// # Errors
/// Anything else.
pub fn parse_rope_override(text: &str) -> Result<RopeOverride> {
    if text == "auto" {
        return Ok(RopeOverride::Auto);
    }
    let factor = text
        .strip_prefix("linear:")
        .and_then(|f| f.parse::<f64>().ok());
    match factor.filter(|f| f.is_finite() && *f > 0.0) {
        Some(factor) => Ok(RopeOverride::Linear(factor)),
        None => Err(Error::Input(format!(
            "rope scaling {text:?} is not known: write linear:F with F above 0, or auto"
        ))),
    }
}

/// A person's choice of rope scaling, instead of the configuration's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeOverride {
    /// `linear` with this factor.
    Linear(f64),
    /// `linear` with [`linear_factor_for_frames`], where one is needed.
    Auto,
}
