//! `config.json` and its neighbours, as they are on disk: every field with Transformers' name and class
//! default, both spellings of 4.x and 5.x, checked once so that later stages need not.
//!
//! An unsupported setting is refused here, by name. Nothing is guessed from a model's name.

mod bitsandbytes;
mod fields;
mod files;
mod generation;
mod model;
mod quantization;
mod rope;
mod text;
mod vision;

use lnv_kernels::Activation;

pub use bitsandbytes::{BitsAndBytesConfig, BitsAndBytesKind, QuantStorage, QuantType};
pub(crate) use bitsandbytes::{from_torch_name, torch_name};
pub(crate) use fields::{kind, whole};
pub use files::{CheckpointFiles, MAX_JSON_BYTES};
pub use generation::GenerationConfig;
pub use model::{Dtype, LlavaNextVideoConfig, SelectStrategy, SpatialPoolMode, default_pinpoints};
pub use quantization::{PACKED_VERSION, PackedFormat, PackedQuantization, Quantization};
pub use rope::{
    LongRopeScaling, RopeConfig, RopeFrequencies, RopeOverride, RopeScaling, YarnScaling,
    linear_factor_for_frames, parse_rope_override,
};
pub use text::{TextBackbone, TextConfig};
pub use vision::{VisionConfig, VisionTowerKind};

use crate::error::Result;

/// Reads the name of an activation function (`ACT2FN` in Transformers).
fn read_activation(
    fields: &fields::Fields<'_>,
    key: &str,
    default: Activation,
) -> Result<Activation> {
    Ok(match fields.text(key)? {
        None => default,
        Some("silu" | "swish") => Activation::Silu,
        Some("gelu") => Activation::Gelu,
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Activation::GeluTanh,
        Some("quick_gelu") => Activation::QuickGelu,
        Some("relu") => Activation::Relu,
        Some(other) => {
            return Err(fields.complain(
                key,
                &format!(
                    "is {other:?}; supported are silu, gelu, gelu_pytorch_tanh, quick_gelu, relu"
                ),
            ));
        }
    })
}
