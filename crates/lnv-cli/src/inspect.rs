//! `lnv inspect`: what a checkpoint is and what loading it would take; headers only, no weights.

use anyhow::Result;
use llava_next_video::config::{GenerationConfig, LlavaNextVideoConfig, Quantization};
use llava_next_video::engine::context_length;
use llava_next_video::model::{
    Checkpoint, Formats, LlavaNextVideoModel, LoadOptions, Part, PlannedWeight, default_kv_dtype,
    kv_bytes_per_token,
};
use lnv_kernels::WeightDtype;
use lnv_kernels::bnb::Code4;
use serde_json::json;

use crate::args::{Format, InspectArgs};
use crate::model::{DEFAULT_FRAMES, RunOptions};
use crate::output::size;
use crate::{checkpoint, output};

/// Runs the command.
pub fn run(args: &InspectArgs) -> Result<()> {
    let options = RunOptions::new(&args.model.run)?;
    let files = checkpoint::open(args.model.model.as_deref())?;
    let config = LlavaNextVideoConfig::read(&files)?;
    let weights = Checkpoint::open(&files)?;
    let generation = GenerationConfig::read(&files)?;
    let options = options.load_options(&config, DEFAULT_FRAMES);
    let facts = Facts::new(&files.name(), (&config, &weights), &options)?;
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
    formats: Formats,
    parts: Vec<PartBytes>,
    choices: Vec<(Quantization, usize)>,
    kv_bytes_per_token: usize,
    dtypes: Vec<(String, usize)>,
    shards: usize,
    tensors: usize,
    unread: Vec<String>,
}

/// One part's weights in one format.
struct PartBytes {
    part: Part,
    format: &'static str,
    bytes: usize,
}

impl Facts {
    fn new(
        name: &str,
        (config, weights): (&LlavaNextVideoConfig, &Checkpoint),
        options: &LoadOptions<'_>,
    ) -> Result<Self> {
        let tensors = weights.tensors();
        let formats = Formats::choose(config, weights, options)?;
        let plan = LlavaNextVideoModel::plan(config, &formats)?;
        let text = &config.text_config;
        let kv_dtype = options.kv_cache_dtype;
        let kv_dtype = kv_dtype.unwrap_or_else(|| default_kv_dtype(formats.dtype));
        let mut dtypes: Vec<(String, usize)> = Vec::new();
        for tensor in &tensors {
            match dtypes.iter_mut().find(|(dtype, _)| *dtype == tensor.dtype) {
                Some((_, bytes)) => *bytes += tensor.bytes,
                None => dtypes.push((tensor.dtype.clone(), tensor.bytes)),
            }
        }
        let read = |name: &str| is_read(name, config);
        let elements = |shape: &[usize]| shape.iter().product::<usize>();
        Ok(Self {
            name: name.to_owned(),
            parameters: match is_quantised(config) {
                // The tensors' shapes are those of bytes.
                true => plan.iter().map(|weight| elements(&weight.shape)).sum(),
                false => tensors.iter().map(|t| elements(&t.shape)).sum(),
            },
            file_bytes: tensors.iter().map(|t| t.bytes).sum(),
            used_bytes: total(&plan),
            parts: parts(&plan, &formats),
            choices: choices(config, weights)?,
            formats,
            kv_bytes_per_token: kv_bytes_per_token(text, kv_dtype),
            dtypes,
            shards: weights.shards(),
            unread: tensors
                .iter()
                .filter(|t| !read(&t.name))
                .map(|t| t.name.clone())
                .collect(),
            tensors: tensors.len(),
        })
    }

    fn json(&self, c: &LlavaNextVideoConfig, g: &GenerationConfig) -> serde_json::Value {
        let (v, t) = (&c.vision_config, &c.text_config);
        json!({
            "name": self.name,
            "architecture": "LlavaNextVideoForConditionalGeneration",
            "parameters": self.parameters,
            "file_bytes": self.file_bytes,
            "loaded_bytes": self.used_bytes,
            "dtype": self.formats.dtype.name(),
            "quantize": self.formats.quantization.as_ref().map(|q| q.name()),
            "formats": self.parts.iter().map(|p| json!({
                "part": part_name(p.part), "format": p.format, "bytes": p.bytes,
            })).collect::<Vec<_>>(),
            "quantized_bytes": self.choices.iter()
                .map(|(q, bytes)| (q.name().to_owned(), json!(bytes)))
                .collect::<serde_json::Map<_, _>>(),
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
                    "{} of weights{}, {} a token of context",
                    size(self.used_bytes),
                    match &self.formats.quantization {
                        Some(_) => "",
                        None => " in the stored type",
                    },
                    size(self.kv_bytes_per_token)
                ),
            ),
            ("formats", joined(self.parts.iter().map(PartBytes::text))),
            (
                "--quantize",
                match self.choices.is_empty() {
                    true => "the weights are quantised already".into(),
                    false => joined(
                        self.choices
                            .iter()
                            .map(|(q, bytes)| format!("{} {}", q.name(), size(*bytes))),
                    ),
                },
            ),
            ("not read", format!("{} tensors", self.unread.len())),
        ];
        lines
            .iter()
            .map(|(key, value)| format!("{key:<11}{value}\n"))
            .collect()
    }
}

impl PartBytes {
    fn text(&self) -> String {
        format!(
            "{} {} {}",
            part_name(self.part),
            self.format,
            size(self.bytes)
        )
    }
}

fn part_name(part: Part) -> &'static str {
    match part {
        Part::VisionTower => "vision tower",
        Part::Projector => "projector",
        Part::Decoder => "decoder",
        Part::Embeddings => "embeddings",
        Part::Head => "head",
    }
}

fn joined(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(", ")
}

fn total(plan: &[PlannedWeight]) -> usize {
    plan.iter().map(|weight| weight.bytes).sum()
}

/// The matrices' bytes by part and format.
fn parts(plan: &[PlannedWeight], formats: &Formats) -> Vec<PartBytes> {
    let mut parts: Vec<PartBytes> = Vec::new();
    for weight in plan {
        let part = Part::of(&weight.name);
        let format = weight.format.unwrap_or(formats.dense());
        let format = format_name(format);
        match parts
            .iter_mut()
            .find(|p| p.part == part && p.format == format)
        {
            Some(found) => found.bytes += weight.bytes,
            None => parts.push(PartBytes {
                part,
                format,
                bytes: weight.bytes,
            }),
        }
    }
    // Norms and biases, which are always kept as they are, say nothing.
    parts.retain(|p| p.bytes * 200 > total(plan));
    parts
}

fn format_name(format: WeightDtype) -> &'static str {
    match format {
        WeightDtype::F32 => "f32",
        WeightDtype::Bf16 => "bf16",
        WeightDtype::F16 => "f16",
        WeightDtype::Q8 => "q8",
        WeightDtype::Q4 => "q4",
        WeightDtype::Bnb4(format) => match format.code {
            Code4::Nf4 => "nf4",
            Code4::Fp4 => "fp4",
        },
        WeightDtype::Int8(_) => "int8",
    }
}

/// True for a checkpoint whose weights are quantised in its files.
fn is_quantised(config: &LlavaNextVideoConfig) -> bool {
    config.packed.is_some() || config.quantization_config.is_some()
}

/// Bytes of the weights with each `--quantize`; none where they are quantised already.
fn choices(
    config: &LlavaNextVideoConfig,
    weights: &Checkpoint,
) -> Result<Vec<(Quantization, usize)>> {
    if is_quantised(config) {
        return Ok(Vec::new());
    }
    let mut choices = Vec::new();
    for quantization in Quantization::ALL {
        let options = LoadOptions {
            quantization: Some(quantization.clone()),
            ..LoadOptions::default()
        };
        let formats = Formats::choose(config, weights, &options)?;
        choices.push((
            quantization,
            total(&LlavaNextVideoModel::plan(config, &formats)?),
        ));
    }
    Ok(choices)
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
