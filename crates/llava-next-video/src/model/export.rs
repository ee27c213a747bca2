//! A checkpoint quantised as bitsandbytes does it, in the layout that Transformers writes and reads:
//! `lnv quantize --to nf4|fp4|int8`.
//!
//! Decision: every tensor of the checkpoint goes along, also those that this program does not read (the
//! tower's last layer), under the names that Transformers 4.53.3 saves; later versions read them too.
//! A weight and what lies beside it stay in one file, where Transformers looks for it. Tensors are made,
//! written and let go one by one.

use serde_json::{Value, json};

use super::bitsandbytes::{self, OutputTensor};
use super::formats::{Formats, Treatment};
use super::loader::{converted, round};
use super::weights::{Checkpoint, widen};
use crate::config::{BitsAndBytesConfig, torch_name};
use crate::error::Result;

/// Buffers that old files hold, and that are computed.
const COMPUTED: [&str; 2] = [".position_ids", ".inv_freq"];

/// A tensor of the checkpoint and what it becomes.
pub(super) struct Exported {
    /// Its canonical name.
    name: String,
    shape: Vec<usize>,
    /// What is written for it.
    pub(super) tensors: Vec<OutputTensor>,
}

/// Everything that is written, in the order of canonical names.
pub(super) fn plan(checkpoint: &Checkpoint, formats: &Formats) -> Vec<Exported> {
    let mut list = Vec::new();
    for tensor in checkpoint.tensors() {
        if COMPUTED.iter().any(|end| tensor.name.ends_with(end)) {
            continue;
        }
        let (name, shape) = (tensor.name, tensor.shape);
        let stored = saved_name(&name);
        let tensors = match (formats.treatment(&name), shape.as_slice()) {
            (Treatment::Quantise(config, kind), [n, k]) => {
                bitsandbytes::layout(&stored, [*n, *k], config, kind)
            }
            _ => vec![OutputTensor {
                name: stored,
                dtype: super::save::stored_name(formats.dtype),
                bytes: formats.dtype.size() * shape.iter().product::<usize>(),
                shape: shape.clone(),
            }],
        };
        list.push(Exported {
            name,
            shape,
            tensors,
        });
    }
    list
}

/// Makes each tensor's bytes and hands them on by name.
pub(super) fn write(
    list: &[Exported],
    checkpoint: &Checkpoint,
    formats: &Formats,
    sink: &dyn Fn(&str, &[u8]) -> Result<()>,
) -> Result<()> {
    for (i, exported) in list.iter().enumerate() {
        if let Some(next) = list.get(i + 1) {
            checkpoint.will_need(&next.name);
        }
        let data = checkpoint.tensor(&exported.name, &exported.shape)?;
        let treatment = formats.treatment(&exported.name);
        let bytes = match (treatment, exported.shape.as_slice()) {
            (Treatment::Quantise(config, kind), [n, k]) => {
                // The type of the model comes first, and its rounding.
                let mut values = widen(data);
                round(&mut values, formats.dtype);
                let how = (kind, config.bnb_4bit_use_double_quant, formats.dtype);
                bitsandbytes::serialise(&bitsandbytes::quantise(&values, [*n, *k], how))
            }
            _ => vec![converted(data, formats.dtype, formats.dtype)],
        };
        for (tensor, bytes) in exported.tensors.iter().zip(bytes) {
            debug_assert_eq!(tensor.bytes, bytes.len(), "{}", tensor.name);
            sink(&tensor.name, &bytes)?;
        }
        checkpoint.release(&exported.name);
    }
    Ok(())
}

/// What `config.json` says besides.
pub(super) fn describe(json: &mut Value, config: &BitsAndBytesConfig, formats: &Formats) {
    json["quantization_config"] = config.to_json();
    // As 4.x and 5.x spell it.
    let key = match json.get("dtype").is_some() {
        true => "dtype",
        false => "torch_dtype",
    };
    json[key] = json!(torch_name(formats.dtype));
}

/// The name that Transformers 4.53.3 saves a tensor under, from its canonical one.
fn saved_name(name: &str) -> String {
    let renamed = [
        ("language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("vision_tower.", "vision_tower.vision_model."),
        // 4.53.3 reads it under this name only.
        ("vision_resampler.", "model.vision_resampler."),
    ];
    for (ours, theirs) in renamed {
        if let Some(rest) = name.strip_prefix(ours) {
            return format!("{theirs}{rest}");
        }
    }
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::weights::canonical_name;
    use super::saved_name;

    #[test]
    fn saved_names_are_read_again() {
        for name in [
            "language_model.layers.1.mlp.up_proj.weight",
            "language_model.embed_tokens.weight",
            "lm_head.weight.absmax",
            "vision_tower.encoder.layers.0.mlp.fc1.bias",
            "multi_modal_projector.linear_1.SCB",
            "vision_resampler.pool.weight",
            "image_newline",
        ] {
            assert_eq!(canonical_name(&saved_name(name)), name);
        }
    }
}
