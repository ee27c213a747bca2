//! The vision tower's configuration: CLIP, or SigLIP (a tower without a class token).
//!
//! A key that is missing takes the *class* default (224 px, patches of 32), not the 336/14 of the
//! published checkpoints: that is what Transformers does with a partial `vision_config`.

use lnv_kernels::Activation;

use super::fields::Fields;
use super::read_activation;
use crate::error::Result;

/// Which family of vision transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VisionTowerKind {
    /// `clip_vision_model`: a class token in front of the patches, LayerNorm before the encoder.
    Clip,
    /// `siglip_vision_model`: patches only, a bias on the patch embedding.
    Siglip,
}

/// `vision_config`.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Family (`model_type`).
    pub kind: VisionTowerKind,
    /// Width of a token.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers of the encoder.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Colour channels; 3.
    pub num_channels: usize,
    /// Side of a tile in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Activation of the MLP.
    pub hidden_act: Activation,
    /// Epsilon of the LayerNorms.
    pub layer_norm_eps: f64,
}

impl VisionConfig {
    /// Patches along a side of a tile.
    pub fn patches_per_side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Tokens of a tile, the class token included.
    pub fn tokens(&self) -> usize {
        self.patches_per_side().pow(2) + usize::from(self.has_class_token())
    }

    /// True for a tower with a class token (CLIP).
    pub fn has_class_token(&self) -> bool {
        self.kind == VisionTowerKind::Clip
    }

    /// Dimensions of an attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// What Transformers builds when there is no `vision_config` at all: CLIP-L/14 at 336 px.
    pub(crate) fn when_absent() -> Self {
        Self {
            kind: VisionTowerKind::Clip,
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            num_channels: 3,
            image_size: 336,
            patch_size: 14,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }

    pub(crate) fn read(fields: &Fields<'_>) -> Result<Self> {
        let (kind, patch, act, eps) = match fields.text("model_type")? {
            None | Some("clip_vision_model") => {
                (VisionTowerKind::Clip, 32, Activation::QuickGelu, 1e-5)
            }
            Some("siglip_vision_model") => {
                (VisionTowerKind::Siglip, 16, Activation::GeluTanh, 1e-6)
            }
            Some(other) => {
                return Err(fields.complain(
                    "model_type",
                    &format!(
                        "is {other:?}; supported are clip_vision_model and siglip_vision_model"
                    ),
                ));
            }
        };
        let config = Self {
            kind,
            hidden_size: fields.size("hidden_size", 768, 1..=1 << 16)?,
            intermediate_size: fields.size("intermediate_size", 3072, 1..=1 << 18)?,
            num_hidden_layers: fields.size("num_hidden_layers", 12, 1..=1024)?,
            num_attention_heads: fields.size("num_attention_heads", 12, 1..=1024)?,
            num_channels: fields.size("num_channels", 3, 3..=3)?,
            image_size: fields.size("image_size", 224, 1..=8192)?,
            patch_size: fields.size("patch_size", patch, 1..=1024)?,
            hidden_act: read_activation(fields, "hidden_act", act)?,
            layer_norm_eps: fields.positive("layer_norm_eps", eps)?,
        };
        if !config
            .hidden_size
            .is_multiple_of(config.num_attention_heads)
        {
            return Err(fields.complain(
                "hidden_size",
                &format!(
                    "is {}, which {} attention heads do not divide",
                    config.hidden_size, config.num_attention_heads
                ),
            ));
        }
        if config.patch_size > config.image_size {
            return Err(fields.complain(
                "patch_size",
                &format!(
                    "is {}, larger than image_size {}",
                    config.patch_size, config.image_size
                ),
            ));
        }
        Ok(config)
    }
}
