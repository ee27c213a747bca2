//! `lnv inspect`: what a checkpoint is and what loading it would take; headers only, no weights.

use anyhow::Result;
use llava_next_video::config::{GenerationConfig, LlavaNextVideoConfig};
use llava_next_video::engine::context_length;
use llava_next_video::model::{Checkpoint, default_kv_dtype, kv_bytes_per_token};
use serde_json::json;

use crate::args::{Format, InspectArgs};
use crate::{checkpoint, output};

/// Runs the command.
pub fn run(args: &InspectArgs) -> Result<()> {
    let files = checkpoint::open(args.model.as_deref())?;
    let config = LlavaNextVideoConfig::read(&files)?;
    let weights = Checkpoint::open(&files)?;
    let generation = GenerationConfig::read(&files)?;
    let facts = Facts::new(&files.name(), &config, &weights);
    match args.format {
        Format::Json => output::line(&facts.json(&config, &generation).to_string()),
        Format::Text => output::write(&facts.text(&config, &generation)),
    }
}

/// Numbers worked out from the headers.
struct Facts {
    name: String,
    parameters: usize,
    file_bytes: usize,
    used_bytes: usize,
    kv_bytes_per_token: usize,
    dtypes: Vec<(String, usize)>,
    shards: usize,
    tensors: usize,
    unread: Vec<String>,
}

impl Facts {
    fn new(name: &str, config: &LlavaNextVideoConfig, weights: &Checkpoint) -> Self {
        let tensors = weights.tensors();
        let text = &config.text_config;
        let kv_dtype = default_kv_dtype(weights.stored_dtype());
        let mut dtypes: Vec<(String, usize)> = Vec::new();
        for tensor in &tensors {
            match dtypes.iter_mut().find(|(dtype, _)| *dtype == tensor.dtype) {
                Some((_, bytes)) => *bytes += tensor.bytes,
                None => dtypes.push((tensor.dtype.clone(), tensor.bytes)),
            }
        }
        let read = |name: &str| is_read(name, config);
        let elements = |shape: &[usize]| shape.iter().product::<usize>();
        Self {
            name: name.to_owned(),
            parameters: tensors.iter().map(|t| elements(&t.shape)).sum(),
            file_bytes: tensors.iter().map(|t| t.bytes).sum(),
            used_bytes: tensors
                .iter()
                .filter(|t| read(&t.name))
                .map(|t| t.bytes)
                .sum(),
            kv_bytes_per_token: kv_bytes_per_token(text, kv_dtype),
            dtypes,
            shards: weights.shards(),
            unread: tensors
                .iter()
                .filter(|t| !read(&t.name))
                .map(|t| t.name.clone())
                .collect(),
            tensors: tensors.len(),
        }
    }

    fn json(&self, c: &LlavaNextVideoConfig, g: &GenerationConfig) -> serde_json::Value {
        let (v, t) = (&c.vision_config, &c.text_config);
        json!({
            "name": self.name,
            "architecture": "LlavaNextVideoForConditionalGeneration",
            "parameters": self.parameters,
            "file_bytes": self.file_bytes,
            "loaded_bytes": self.used_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "dtypes": self.dtypes.iter().map(|(d, b)| json!({"dtype": d, "bytes": b}))
                .collect::<Vec<_>>(),
            "shards": self.shards,
            "tensors": self.tensors,
            "tensors_not_read": self.unread,
            "vision": {
                "layers": v.num_hidden_layers, "layers_run": layers_run(c),
                "hidden_size": v.hidden_size, "image_size": v.image_size,
                "patch_size": v.patch_size, "feature_layer": c.vision_feature_layer,
            },
            "text": {
                "backbone": t.backbone.name(), "layers": t.num_hidden_layers,
                "hidden_size": t.hidden_size, "intermediate_size": t.intermediate_size,
                "heads": t.num_attention_heads, "kv_heads": t.num_key_value_heads,
                "head_dim": t.head_dim, "vocab_size": t.vocab_size,
                "context": context(c), "rope": format!("{:?}", t.rope.scaling),
            },
            "tokens_per_frame": c.tokens_per_frame(),
            "image_token_id": c.image_token_index,
            "video_token_id": c.video_token_index,
            "eos_token_ids": if g.eos_token_ids.is_empty() { &t.eos_token_ids }
                else { &g.eos_token_ids },
        })
    }

    fn text(&self, c: &LlavaNextVideoConfig, g: &GenerationConfig) -> String {
        let (v, t) = (&c.vision_config, &c.text_config);
        let eos = if g.eos_token_ids.is_empty() {
            &t.eos_token_ids
        } else {
            &g.eos_token_ids
        };
        let stored: Vec<String> = self
            .dtypes
            .iter()
            .map(|(d, b)| format!("{d} {}", size(*b)))
            .collect();
        let lines = [
            ("checkpoint", self.name.clone()),
            (
                "model",
                format!(
                    "LLaVA-NeXT-Video, {:.2} M parameters",
                    self.parameters as f64 / 1e6
                ),
            ),
            (
                "weights",
                format!(
                    "{} in {} file(s), {} tensors ({})",
                    size(self.file_bytes),
                    self.shards,
                    self.tensors,
                    stored.join(", ")
                ),
            ),
            (
                "vision",
                format!(
                    "{:?}, {} of {} layers run, width {}, {} px in patches of {}",
                    v.kind,
                    layers_run(c),
                    v.num_hidden_layers,
                    v.hidden_size,
                    v.image_size,
                    v.patch_size
                ),
            ),
            (
                "text",
                format!(
                    "{}, {} layers, width {}, {} heads ({} for keys), vocabulary {}",
                    t.backbone.name(),
                    t.num_hidden_layers,
                    t.hidden_size,
                    t.num_attention_heads,
                    t.num_key_value_heads,
                    t.vocab_size
                ),
            ),
            (
                "context",
                format!("{} tokens, rope {:?}", context(c), t.rope.scaling),
            ),
            (
                "media",
                format!("{} tokens a frame of video", c.tokens_per_frame()),
            ),
            ("ends at", format!("token ids {eos:?}")),
            (
                "memory",
                format!(
                    "{} of weights in the stored type, {} a token of context",
                    size(self.used_bytes),
                    size(self.kv_bytes_per_token)
                ),
            ),
            ("not read", format!("{} tensors", self.unread.len())),
        ];
        lines
            .iter()
            .map(|(key, value)| format!("{key:<11}{value}\n"))
            .collect()
    }
}

fn layers_run(c: &LlavaNextVideoConfig) -> usize {
    c.vision_feature_indices().into_iter().max().unwrap_or(0)
}

fn context(c: &LlavaNextVideoConfig) -> String {
    match context_length(&c.text_config) {
        usize::MAX => "any number of".into(),
        n => n.to_string(),
    }
}

/// True for a tensor that loading would read.
fn is_read(name: &str, c: &LlavaNextVideoConfig) -> bool {
    if let Some(rest) = name.strip_prefix("vision_tower.encoder.layers.") {
        let layer = rest.split('.').next().and_then(|n| n.parse::<usize>().ok());
        return layer.is_some_and(|layer| layer < layers_run(c));
    }
    let unread = [
        "vision_tower.post_layernorm.",
        "vision_tower.head.",
        "position_ids",
        "inv_freq",
    ];
    let tied_head = c.text_config.tie_word_embeddings && name.starts_with("lm_head.");
    !tied_head && !unread.iter().any(|part| name.contains(part))
}

/// Bytes for people.
fn size(bytes: usize) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} bytes"),
        10_000..=9_999_999 => format!("{:.1} kB", bytes as f64 / 1e3),
        10_000_000..=9_999_999_999 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
