//! How weights are quantised: what may be asked for, and what a checkpoint says it holds.
//!
//! `quantization_config` has one of two methods. "lnv" describes a directory that `lnv quantize` wrote:
//! its matrices are stored as the kernels read them. The layout has a version; another one is refused by
//! name rather than misread. "bitsandbytes" describes what Transformers writes (`bitsandbytes.rs`). Every
//! other method is refused by name.

use super::bitsandbytes::{BitsAndBytesConfig, BitsAndBytesKind, QuantType};
use super::fields::Fields;
use super::model::Dtype;
use crate::error::Result;

/// The version of the packed layout that this program writes and reads.
pub const PACKED_VERSION: usize = 3;

/// The key of `config.json`.
const KEY: &str = "quantization_config";

/// A way to quantise weights.
#[derive(Debug, Clone, PartialEq)]
pub enum Quantization {
    /// 8-bit weights and activations, rotated along k; the head stays dense.
    Q8,
    /// 16 levels in groups of 64, 8-bit activations; the vision tower as with [`Quantization::Q8`].
    Q4,
    /// As bitsandbytes does it.
    BitsAndBytes(BitsAndBytesConfig),
}

impl Quantization {
    /// Every way, the usual settings of each.
    pub const ALL: [Self; 5] = [
        Self::Q8,
        Self::Q4,
        Self::BitsAndBytes(BitsAndBytesConfig::of(BitsAndBytesKind::FourBit(
            QuantType::Nf4,
        ))),
        Self::BitsAndBytes(BitsAndBytesConfig::of(BitsAndBytesKind::FourBit(
            QuantType::Fp4,
        ))),
        Self::BitsAndBytes(BitsAndBytesConfig::of(BitsAndBytesKind::Int8)),
    ];

    /// The name that the command line and `config.json` use.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Q8 => "q8",
            Self::Q4 => "q4",
            // A configuration that asks for nothing is refused before it gets a name.
            Self::BitsAndBytes(config) => config.kind().map_or("none", BitsAndBytesKind::name),
        }
    }
}

impl From<BitsAndBytesConfig> for Quantization {
    fn from(config: BitsAndBytesConfig) -> Self {
        Self::BitsAndBytes(config)
    }
}

/// What `lnv quantize` packs weights into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackedQuantization {
    /// [`Quantization::Q8`].
    Q8,
    /// [`Quantization::Q4`].
    Q4,
}

impl From<PackedQuantization> for Quantization {
    fn from(packed: PackedQuantization) -> Self {
        match packed {
            PackedQuantization::Q8 => Self::Q8,
            PackedQuantization::Q4 => Self::Q4,
        }
    }
}

/// What a checkpoint says of its weights.
pub(super) enum Stored {
    /// They are packed as the kernels read them.
    Packed(PackedFormat),
    /// They are bitsandbytes'.
    BitsAndBytes(BitsAndBytesConfig),
}

/// What a packed checkpoint holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedFormat {
    /// The format of the quantised matrices.
    pub quantization: PackedQuantization,
    /// The type of everything else.
    pub dense: Dtype,
}

impl PackedFormat {
    /// The `quantization_config` that describes it.
    pub fn to_json(self) -> serde_json::Value {
        serde_json::json!({
            "quant_method": "lnv",
            "version": PACKED_VERSION,
            "format": Quantization::from(self.quantization).name(),
            "dense": self.dense.name(),
        })
    }
}

/// Reads `quantization_config`, where there is one.
///
/// # Errors
/// A method, version or format that this program does not know, named.
pub(super) fn read_stored(fields: &Fields<'_>) -> Result<Option<Stored>> {
    let Some(fields) = fields.object(KEY, KEY)? else {
        return Ok(None);
    };
    match fields.text("quant_method")? {
        Some("lnv") => read_packed(&fields).map(Stored::Packed).map(Some),
        Some("bitsandbytes") => read_bitsandbytes(&fields),
        // Before there were other methods, Transformers did not name this one.
        None if fields
            .get("load_in_4bit")
            .or(fields.get("load_in_8bit"))
            .is_some() =>
        {
            read_bitsandbytes(&fields)
        }
        other => {
            let method = other.unwrap_or("unknown");
            Err(fields.complain(
                "quant_method",
                &format!(
                    "says the weights are quantised with {method:?}, which is not supported: use \
                     the checkpoint in bf16, f16 or f32"
                ),
            ))
        }
    }
}

fn read_bitsandbytes(fields: &Fields<'_>) -> Result<Option<Stored>> {
    let config = BitsAndBytesConfig::read(fields)?;
    Ok(Some(Stored::BitsAndBytes(config)))
}

fn read_packed(fields: &Fields<'_>) -> Result<PackedFormat> {
    let version = fields.size("version", 0, 0..=usize::MAX >> 11)?;
    if version != PACKED_VERSION {
        return Err(fields.complain(
            "version",
            &format!(
                "is {version}, and this program reads version {PACKED_VERSION} of its packed \
                 weights: quantise the original checkpoint again with `lnv quantize`"
            ),
        ));
    }
    let quantization = match fields.text("format")?.unwrap_or("missing") {
        "q8" => PackedQuantization::Q8,
        "q4" => PackedQuantization::Q4,
        other => {
            return Err(fields.complain(
                "format",
                &format!("is {other:?}; this program knows \"q8\" and \"q4\""),
            ));
        }
    };
    let dense = match fields.text("dense")?.unwrap_or("missing") {
        "f32" => Dtype::F32,
        "bf16" => Dtype::Bf16,
        "f16" => Dtype::F16,
        other => {
            return Err(fields.complain(
                "dense",
                &format!("is {other:?}; this program knows \"f32\", \"bf16\" and \"f16\""),
            ));
        }
    };
    Ok(PackedFormat {
        quantization,
        dense,
    })
}
