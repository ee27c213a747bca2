//! Which matrix is kept in which format: the one place that decides.
//!
//! - Nothing asked for: every matrix in the model's type.
//! - `q8`: the layers of the vision tower and of the decoder, and the head.
//! - `q4`: the layers of the decoder and the head in 4 bits. The vision tower stays in 8: it is a
//!   twentieth of the weights, and what it sees wrongly no later layer can mend.
//! - A table that is embedding and head at once takes 8 bits in both: as a head it is read for every
//!   token, as an embedding it is the decoder's input.
//!
//! Always in the model's type: embeddings (a step reads one row), the projector (half a percent of the
//! weights, between two worlds of different scale), the patch embedding, the convolutional pooler,
//! norms, biases, `image_newline`. So is a matrix that a format cannot take.

use lnv_kernels::{PackedBytes, Precision, Weight, WeightDtype};

use super::llava_next_video::LoadOptions;
use super::weights::Checkpoint;
use crate::config::{Dtype, LlavaNextVideoConfig, Quantization};
use crate::error::{Error, Result};

/// How the weights of a model are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Formats {
    /// The type of what is not quantised.
    pub dtype: Dtype,
    /// What the rest becomes.
    pub quantization: Option<Quantization>,
    /// The embedding table is the head as well.
    pub tied: bool,
}

/// What a weight belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The layers of the vision tower.
    VisionTower,
    /// Patch embedding, pooler, projector and `image_newline`: what joins the towers.
    Projector,
    /// The layers of the decoder.
    Decoder,
    /// The embedding table; the head as well, where they are tied.
    Embeddings,
    /// The head.
    Head,
}

impl Part {
    /// The part of the tensor with this canonical name.
    pub fn of(name: &str) -> Self {
        let parts = [
            ("vision_tower.encoder.", Self::VisionTower),
            ("language_model.embed_tokens.", Self::Embeddings),
            ("language_model.", Self::Decoder),
            ("lm_head.", Self::Head),
        ];
        let found = parts.iter().find(|(prefix, _)| name.starts_with(prefix));
        found.map_or(Self::Projector, |(_, part)| *part)
    }
}

impl Formats {
    /// The formats of a checkpoint's weights under `options`.
    ///
    /// # Errors
    /// The checkpoint is quantised already, and in another way than was asked for.
    pub fn choose(
        config: &LlavaNextVideoConfig,
        checkpoint: &Checkpoint,
        options: &LoadOptions<'_>,
    ) -> Result<Self> {
        let tied = config.text_config.tie_word_embeddings;
        let Some(packed) = config.packed else {
            let auto = || match options.quantization {
                Some(_) => Dtype::Bf16,
                None => checkpoint.stored_dtype(),
            };
            return Ok(Self {
                dtype: options.dtype.unwrap_or_else(auto),
                quantization: options.quantization,
                tied,
            });
        };
        if let Some(wanted) = options.quantization.filter(|q| *q != packed.quantization) {
            return Err(Error::Checkpoint(format!(
                "the checkpoint's weights are quantised to {} already and cannot become {}: leave \
                 out --quantize, or quantise the original checkpoint",
                packed.quantization.name(),
                wanted.name()
            )));
        }
        if let Some(wanted) = options.dtype.filter(|dtype| *dtype != packed.dense) {
            return Err(Error::Checkpoint(format!(
                "the checkpoint was quantised with {} for what stays dense and cannot become {}: \
                 leave out --dtype, or quantise the original checkpoint with --dtype {}",
                packed.dense.name(),
                wanted.name(),
                wanted.name()
            )));
        }
        Ok(Self {
            dtype: packed.dense,
            quantization: Some(packed.quantization),
            tied,
        })
    }

    /// The format of the matrix `name` (canonical), whose rows have `k` values.
    pub fn of(&self, name: &str, k: usize) -> WeightDtype {
        let wanted = match (self.quantization, Part::of(name)) {
            (Some(Quantization::Q8), Part::VisionTower | Part::Decoder | Part::Head)
            | (Some(Quantization::Q4), Part::VisionTower) => WeightDtype::Q8,
            (Some(Quantization::Q4), Part::Decoder | Part::Head) => WeightDtype::Q4,
            (Some(_), Part::Embeddings) if self.tied => WeightDtype::Q8,
            _ => return self.dense(),
        };
        match empty_weight(k, wanted) {
            Some(_) => wanted,
            None => self.dense(),
        }
    }

    /// The format whose arithmetic the products of towers and decoder are done in.
    pub fn computed(&self) -> WeightDtype {
        match self.quantization {
            None => self.dense(),
            Some(Quantization::Q8 | Quantization::Q4) => WeightDtype::Q8,
        }
    }

    /// How the vision tower's attention may multiply: as its weights are.
    pub fn vision_attention(&self) -> Precision {
        match (self.quantization, self.dtype) {
            (Some(Quantization::Q8 | Quantization::Q4), _) => Precision::Int8,
            (None, Dtype::F32) => Precision::F32,
            (None, Dtype::Bf16 | Dtype::F16) => Precision::Bf16,
        }
    }

    /// The format of a matrix that is not quantised.
    pub fn dense(&self) -> WeightDtype {
        match self.dtype {
            Dtype::F32 => WeightDtype::F32,
            Dtype::Bf16 => WeightDtype::Bf16,
            Dtype::F16 => WeightDtype::F16,
        }
    }
}

/// True for a type that keeps values as they are, but for rounding.
pub(super) fn is_float(dtype: WeightDtype) -> bool {
    matches!(
        dtype,
        WeightDtype::F32 | WeightDtype::Bf16 | WeightDtype::F16
    )
}

/// A weight of no rows; `None` where the format does not take rows of `k` values.
pub(super) fn empty_weight(k: usize, dtype: WeightDtype) -> Option<Weight> {
    Weight::from_packed(0, k, dtype, PackedBytes::copied(&[])).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MATRICES: [&str; 6] = [
        "vision_tower.embeddings.patch_embedding.weight",
        "vision_tower.encoder.layers.0.self_attn.q_proj+k_proj+v_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "language_model.layers.3.mlp.down_proj.weight",
        "language_model.embed_tokens.weight",
        "lm_head.weight",
    ];

    fn formats(quantization: Option<Quantization>, tied: bool) -> [WeightDtype; 6] {
        let formats = Formats {
            dtype: Dtype::Bf16,
            quantization,
            tied,
        };
        MATRICES.map(|name| formats.of(name, 64))
    }

    #[test]
    fn each_matrix_has_its_format() {
        use WeightDtype::{Bf16, Q4, Q8};
        assert_eq!(formats(None, true), [Bf16; 6]);
        let q8 = formats(Some(Quantization::Q8), false);
        assert_eq!(q8, [Bf16, Q8, Bf16, Q8, Bf16, Q8]);
        let q4 = formats(Some(Quantization::Q4), false);
        assert_eq!(q4, [Bf16, Q8, Bf16, Q4, Bf16, Q4]);
        for both in [Quantization::Q8, Quantization::Q4] {
            assert_eq!(formats(Some(both), true)[4], Q8);
        }
    }

    #[test]
    fn a_matrix_too_deep_for_its_format_stays_dense() {
        let formats = Formats {
            dtype: Dtype::F16,
            quantization: Some(Quantization::Q8),
            tied: false,
        };
        assert_eq!(formats.of(MATRICES[3], 1 << 20), WeightDtype::F16);
    }
}
