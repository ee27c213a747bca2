//! Which matrix is kept in which format: the one place that decides.
//!
//! - Nothing asked for: every matrix in the model's type.
//! - `q8`: the layers of the vision tower and of the decoder. The head stays as it is, as LLM.int8()
//!   leaves it: it is a fiftieth of the weights of a 7B and a third of what rounding all of them would lose.
//! - `q4`: the layers of the decoder and the head in 4 bits. The vision tower stays in 8: it is a
//!   twentieth of the weights, and what it sees wrongly no later layer can mend. A table that is embedding
//!   and head at once takes 8 bits: as a head it is read for every token, as an embedding it is the
//!   decoder's input.
//!
//! - bitsandbytes (`nf4`, `fp4`, `int8`): what Transformers replaces, that is every linear layer of both
//!   towers and the projector, and not the head, unless the modules to skip are named; never a tied
//!   table. In a checkpoint that is quantised so already, its tensors say what is.
//!
//! Always in the model's type: embeddings (a step reads one row), the patch embedding, the convolutional
//! pooler, norms, biases, `image_newline`; with `q8` and `q4` the projector (half a percent of the weights,
//! between two worlds of different scale). So is a matrix that a format cannot take; where bitsandbytes
//! has quantised it, or would, it holds the values of the codes. A matrix of several tensors is in one
//! format, so one part that is skipped leaves all of it dense.

use std::collections::HashMap;
use std::sync::Arc;

use lnv_kernels::{Bnb4, Compute, Device, Int8, Ops, PackedBytes, Precision, Weight, WeightDtype};

use super::balance::TABLE_SCALES;
use super::bitsandbytes::{self, BLOCK};
use super::llava_next_video::LoadOptions;
use super::weights::Checkpoint;
use crate::config::{
    BitsAndBytesConfig, BitsAndBytesKind, Dtype, LlavaNextVideoConfig, Quantization,
};
use crate::error::{Error, Result};

/// How the weights of a model are kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Formats {
    /// The type of what is not quantised.
    pub dtype: Dtype,
    /// What the rest becomes.
    pub quantization: Option<Quantization>,
    /// The embedding table is the head as well.
    pub tied: bool,
    /// The decoder's channels are brought to like sizes before they are rounded ([`super::balance`]).
    pub(super) balanced: bool,
    /// So are the head's; of weights packed already, known only where the head is the embedding table, whose
    /// embedded rows are scaled back.
    pub(super) head_scaled: bool,
    /// The tensors that bitsandbytes has quantised in the file, where it has; `false` for what the
    /// kernels cannot take as it is.
    pub(super) quantised: Option<Arc<HashMap<String, bool>>>,
}

/// What becomes of a tensor before it is packed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Treatment<'a> {
    /// Nothing: it is floats, and packing rounds them.
    Plain,
    /// bitsandbytes' arithmetic is applied to it.
    Quantise(&'a BitsAndBytesConfig, BitsAndBytesKind),
    /// It is quantised already.
    Quantised,
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
    /// Everything in one type of floats.
    pub(super) fn dense_only(dtype: Dtype) -> Self {
        Self {
            dtype,
            quantization: None,
            tied: false,
            balanced: false,
            head_scaled: false,
            quantised: None,
        }
    }

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
        if let Some(Quantization::BitsAndBytes(wanted)) = &options.quantization {
            wanted.kind()?;
        }
        if let Some(stored) = &config.quantization_config {
            return Self::stored(stored, checkpoint, options, tied);
        }
        let Some(packed) = config.packed else {
            let auto = || match &options.quantization {
                // What Transformers forces where no type is given.
                Some(Quantization::BitsAndBytes(_)) => Dtype::F16,
                Some(Quantization::Q8 | Quantization::Q4) => Dtype::Bf16,
                None => checkpoint.stored_dtype(),
            };
            let packs = matches!(
                options.quantization,
                Some(Quantization::Q8 | Quantization::Q4)
            );
            let balanced = packs && !checkpoint.is_synthetic();
            return Ok(Self {
                dtype: options.dtype.unwrap_or_else(auto),
                quantization: options.quantization.clone(),
                tied,
                balanced,
                head_scaled: balanced && options.quantization == Some(Quantization::Q4),
                quantised: None,
            });
        };
        let stored = Quantization::from(packed.quantization);
        if let Some(wanted) = options.quantization.as_ref().filter(|q| **q != stored) {
            return Err(quantised_already(stored.name(), wanted.name()));
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
            quantization: Some(stored),
            tied,
            balanced: false,
            head_scaled: checkpoint.contains(TABLE_SCALES),
            quantised: None,
        })
    }

    /// The formats of a checkpoint that bitsandbytes has quantised as `config` says. Asking for the same
    /// again says how to compute.
    fn stored(
        config: &BitsAndBytesConfig,
        checkpoint: &Checkpoint,
        options: &LoadOptions<'_>,
        tied: bool,
    ) -> Result<Self> {
        let kind = config.kind()?;
        let mut used = config.clone();
        match &options.quantization {
            None => {}
            Some(Quantization::BitsAndBytes(wanted)) if wanted.kind()? == kind => {
                used.bnb_4bit_compute_dtype = wanted.bnb_4bit_compute_dtype;
                used.llm_int8_threshold = wanted.llm_int8_threshold;
            }
            Some(other) => return Err(quantised_already(kind.name(), other.name())),
        }
        let mut quantised = HashMap::new();
        for name in checkpoint.names() {
            let Some((found, whole)) = bitsandbytes::stored_kind(checkpoint, name)? else {
                continue;
            };
            if found != kind {
                return Err(Error::Checkpoint(format!(
                    "config.json says the weights are {}, but the tensor {name} is {}: they are not of \
                     one checkpoint",
                    kind.name(),
                    found.name()
                )));
            }
            quantised.insert(name.to_owned(), whole);
        }
        Ok(Self {
            dtype: options.dtype.unwrap_or_else(|| checkpoint.stored_dtype()),
            quantization: Some(used.into()),
            tied,
            balanced: false,
            head_scaled: false,
            quantised: Some(Arc::new(quantised)),
        })
    }

    /// The format of a matrix of these tensors (canonical names), whose rows have `k` values.
    pub fn of(&self, names: &[&str], k: usize) -> WeightDtype {
        let part = names.first().map_or(Part::Projector, |name| Part::of(name));
        let wanted = match (&self.quantization, part) {
            (Some(Quantization::BitsAndBytes(config)), _) => {
                match names.iter().all(|name| self.packs(name, k)) {
                    true => kernel_format(config),
                    false => None,
                }
            }
            (Some(Quantization::Q8), Part::VisionTower | Part::Decoder)
            | (Some(Quantization::Q4), Part::VisionTower) => Some(WeightDtype::Q8),
            (Some(Quantization::Q4), Part::Decoder | Part::Head) => Some(WeightDtype::Q4),
            (Some(Quantization::Q4), Part::Embeddings) if self.tied => Some(WeightDtype::Q8),
            _ => None,
        };
        let taken = wanted.filter(|wanted| empty_weight(k, *wanted).is_some());
        taken.unwrap_or(self.dense())
    }

    /// What becomes of the tensor `name` (canonical).
    pub(super) fn treatment(&self, name: &str) -> Treatment<'_> {
        let Some(Quantization::BitsAndBytes(config)) = &self.quantization else {
            return Treatment::Plain;
        };
        match (&self.quantised, config.kind()) {
            (Some(quantised), _) if quantised.contains_key(name) => Treatment::Quantised,
            (None, Ok(kind)) if !(self.tied && name == HEAD) && is_replaced(name, config) => {
                Treatment::Quantise(config, kind)
            }
            _ => Treatment::Plain,
        }
    }

    /// True where bitsandbytes' codes of the tensor `name` can be packed as they are.
    fn packs(&self, name: &str, k: usize) -> bool {
        match (self.treatment(name), &self.quantised) {
            (Treatment::Quantised, Some(quantised)) => quantised.get(name) == Some(&true),
            (Treatment::Quantise(_, BitsAndBytesKind::FourBit(_)), _) => k.is_multiple_of(BLOCK),
            (Treatment::Quantise(..), _) => true,
            _ => false,
        }
    }

    /// The format whose arithmetic the products of towers and decoder are done in.
    pub fn computed(&self) -> WeightDtype {
        match &self.quantization {
            None => self.dense(),
            Some(Quantization::Q8 | Quantization::Q4) => WeightDtype::Q8,
            Some(Quantization::BitsAndBytes(config)) => match kernel_format(config) {
                Some(WeightDtype::Bnb4(format)) if format.compute == Compute::Bf16 => {
                    WeightDtype::Bf16
                }
                Some(WeightDtype::Bnb4(_)) => WeightDtype::F32,
                _ => WeightDtype::Q8,
            },
        }
    }

    /// How the vision tower's attention may multiply: as its weights are; bitsandbytes' formats leave
    /// attention in the model's type.
    pub fn vision_attention(&self) -> Precision {
        match (&self.quantization, self.dtype) {
            (Some(Quantization::Q8 | Quantization::Q4), _) => Precision::Int8,
            (None | Some(Quantization::BitsAndBytes(_)), Dtype::F32) => Precision::F32,
            (None | Some(Quantization::BitsAndBytes(_)), Dtype::Bf16 | Dtype::F16) => {
                Precision::Bf16
            }
        }
    }

    /// The operations of a device for a model of these formats; without one, of what `LNV_DEVICE` names,
    /// else of the processor.
    ///
    /// # Errors
    /// The device is not there.
    pub fn ops(&self, device: Option<Device>) -> Result<Ops> {
        let device = match device {
            Some(device) => device,
            None => Device::preferred().map_err(|e| Error::Device(e.to_string()))?,
        };
        Ops::of_type(device, self.dense()).map_err(|e| Error::Device(e.to_string()))
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

/// The head's weight.
const HEAD: &str = "lm_head.weight";

/// The format that the kernels have for a configuration; `None` for one that asks for nothing.
fn kernel_format(config: &BitsAndBytesConfig) -> Option<WeightDtype> {
    Some(match config.kind().ok()? {
        BitsAndBytesKind::FourBit(codes) => WeightDtype::Bnb4(Bnb4 {
            code: bitsandbytes::code(codes),
            compute: match config.bnb_4bit_compute_dtype {
                Dtype::Bf16 => Compute::Bf16,
                Dtype::F32 | Dtype::F16 => Compute::F32,
            },
        }),
        BitsAndBytesKind::Int8 => WeightDtype::Int8(Int8::new(config.llm_int8_threshold)),
    })
}

/// True for the weight of a linear layer that Transformers would replace by a quantised one.
pub(super) fn is_replaced(name: &str, config: &BitsAndBytesConfig) -> bool {
    let module = name.strip_suffix(".weight");
    module.is_some_and(|module| is_linear(module) && !config.skips(&module_path(module)))
}

/// True for a module that is a linear layer.
fn is_linear(module: &str) -> bool {
    let layers = ["vision_tower.encoder.layers.", "language_model.layers."];
    let inside = [".self_attn.", ".mlp."];
    let own = module.rsplit('.').next().unwrap_or(module);
    let in_layer = layers.iter().any(|prefix| module.starts_with(prefix))
        && inside.iter().any(|block| module.contains(block))
        && (own.ends_with("_proj") || own.starts_with("fc"));
    let alone = [
        "lm_head",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        // SigLIP's, which nothing here reads.
        "vision_tower.head.mlp.fc1",
        "vision_tower.head.mlp.fc2",
        "vision_tower.head.attention.out_proj",
    ];
    in_layer || alone.contains(&module)
}

/// The path of a module in Transformers 4.53.3, from its canonical one.
fn module_path(module: &str) -> String {
    if module == "lm_head" {
        return module.to_owned();
    }
    match module.strip_prefix("vision_tower.") {
        Some(rest) => format!("model.vision_tower.vision_model.{rest}"),
        None => format!("model.{module}"),
    }
}

/// The refusal to quantise twice.
pub(super) fn quantised_already(stored: &str, wanted: &str) -> Error {
    Error::Checkpoint(format!(
        "the checkpoint's weights are quantised to {stored} already and cannot become {wanted}: leave \
         out --quantize, or quantise the original checkpoint"
    ))
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
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "language_model.layers.3.mlp.down_proj.weight",
        "language_model.embed_tokens.weight",
        "lm_head.weight",
    ];

    fn formats(quantization: Option<Quantization>, tied: bool) -> [WeightDtype; 6] {
        let formats = Formats {
            quantization,
            tied,
            ..Formats::dense_only(Dtype::Bf16)
        };
        MATRICES.map(|name| formats.of(&[name], 64))
    }

    #[test]
    fn each_matrix_has_its_format() {
        use WeightDtype::{Bf16, Q4, Q8};
        assert_eq!(formats(None, true), [Bf16; 6]);
        let q8 = formats(Some(Quantization::Q8), false);
        assert_eq!(q8, [Bf16, Q8, Bf16, Q8, Bf16, Bf16]);
        let q4 = formats(Some(Quantization::Q4), false);
        assert_eq!(q4, [Bf16, Q8, Bf16, Q4, Bf16, Q4]);
        assert_eq!(formats(Some(Quantization::Q8), true)[4], Bf16);
        assert_eq!(formats(Some(Quantization::Q4), true)[4], Q8);
        let nf4 = WeightDtype::Bnb4(Bnb4 {
            code: lnv_kernels::bnb::Code4::Nf4,
            compute: Compute::F32,
        });
        let bitsandbytes = formats(Some(Quantization::ALL[2].clone()), false);
        assert_eq!(bitsandbytes, [Bf16, nf4, nf4, nf4, Bf16, Bf16]);
        assert_eq!(
            formats(Some(Quantization::ALL[2].clone()), true),
            bitsandbytes
        );
    }

    #[test]
    fn a_matrix_too_deep_for_its_format_stays_dense() {
        let formats = Formats {
            quantization: Some(Quantization::Q8),
            ..Formats::dense_only(Dtype::F16)
        };
        assert_eq!(formats.of(&[MATRICES[3]], 1 << 20), WeightDtype::F16);
    }
    #[test]
    fn a_skipped_part_leaves_a_matrix_dense_and_a_tied_head_is_never_quantised() {
        let formats = |tied| Formats {
            quantization: Some(Quantization::BitsAndBytes(BitsAndBytesConfig {
                llm_int8_skip_modules: Some(vec!["v_proj".into(), "layers.1".into()]),
                ..BitsAndBytesConfig::of(BitsAndBytesKind::Int8)
            })),
            tied,
            ..Formats::dense_only(Dtype::Bf16)
        };
        let int8 = WeightDtype::Int8(Int8::new(6.0));
        let names = |layer: usize, parts: &[&str]| -> Vec<String> {
            let name =
                |part: &&str| format!("language_model.layers.{layer}.self_attn.{part}.weight");
            parts.iter().map(name).collect()
        };
        for (layer, parts, expected) in [
            (0, &["q_proj", "k_proj"][..], int8),
            (0, &["q_proj", "k_proj", "v_proj"], WeightDtype::Bf16),
            (1, &["o_proj"], WeightDtype::Bf16),
            (11, &["o_proj"], int8),
        ] {
            let names = names(layer, parts);
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            assert_eq!(formats(false).of(&names, 96), expected, "{names:?}");
        }
        assert_eq!(formats(false).of(&[HEAD], 96), int8);
        assert_eq!(formats(true).of(&[HEAD], 96), WeightDtype::Bf16);
    }
}
