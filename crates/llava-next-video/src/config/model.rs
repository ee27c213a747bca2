//! `LlavaNextVideoConfig`: the top of `config.json`.

use lnv_kernels::Activation;

use super::bitsandbytes::BitsAndBytesConfig;
use super::fields::{Fields, whole};
use super::files::CheckpointFiles;
use super::quantization::{PackedFormat, Stored, read_stored};
use super::read_activation;
use super::text::TextConfig;
use super::vision::VisionConfig;
use crate::error::{Error, Result};
use crate::media::ImageSize;

/// The name of the file.
const FILE: &str = "config.json";

/// Which of the vision tower's tokens go on (`vision_feature_select_strategy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SelectStrategy {
    /// Drop the class token.
    Default,
    /// Keep every token; for towers without a class token.
    Full,
}

impl SelectStrategy {
    /// The word of the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Full => "full",
        }
    }
}

/// How a video's features are pooled (`spatial_pool_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpatialPoolMode {
    /// Mean of each window.
    Average,
    /// Maximum of each window.
    Max,
    /// A learned convolution.
    Conv,
}

/// How weights are stored (`torch_dtype` in 4.x, `dtype` in 5.x).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Dtype {
    /// The name that the command line and the JSON outputs use.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// Everything `config.json` says about the model, defaults filled in.
///
/// Transformers: `LlavaNextVideoConfig`. Fields carry its names.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaNextVideoConfig {
    /// The vision tower.
    pub vision_config: VisionConfig,
    /// The language model.
    pub text_config: TextConfig,
    /// Placeholder id of images (`image_token_id`); default 32001.
    pub image_token_index: u32,
    /// Placeholder id of videos (`video_token_id`); default 32000.
    pub video_token_index: u32,
    /// Activation between the projector's layers; default gelu (erf).
    pub projector_hidden_act: Activation,
    /// Biases in the projector; default true.
    pub multimodal_projector_bias: bool,
    /// Which tokens of the tower are kept; default `default`.
    pub vision_feature_select_strategy: SelectStrategy,
    /// Which hidden states of the tower are taken and concatenated; default `[-2]`.
    pub vision_feature_layer: Vec<i64>,
    /// Resolutions that AnyRes may choose; order decides ties.
    pub image_grid_pinpoints: Vec<ImageSize>,
    /// Pooling of videos; default average.
    pub spatial_pool_mode: SpatialPoolMode,
    /// Side and step of the pooling window; default 2.
    pub spatial_pool_stride: usize,
    /// Channels that a convolutional pooler gives; the tower's width where absent.
    pub spatial_pool_out_channels: Option<usize>,
    /// Informational; default 576.
    pub image_seq_length: usize,
    /// Informational; default 288.
    pub video_seq_length: usize,
    /// Padding id of the whole model.
    pub pad_token_id: Option<u32>,
    /// How the weights were stored, where the file says so.
    pub dtype: Option<Dtype>,
    /// What the checkpoint holds where `lnv quantize` wrote it (`quantization_config`).
    pub packed: Option<PackedFormat>,
    /// How its weights are quantised where bitsandbytes did it (`quantization_config`).
    pub quantization_config: Option<BitsAndBytesConfig>,
}

impl LlavaNextVideoConfig {
    /// Reads `config.json` of a checkpoint.
    ///
    /// # Errors
    /// The file is missing or malformed, or asks for something that is not supported, named.
    pub fn read(files: &CheckpointFiles) -> Result<Self> {
        let Some(json) = files.read_json(FILE)? else {
            return Err(Error::Config(format!(
                "{} has no config.json: give the directory of a LLaVA-NeXT-Video checkpoint in \
                 Hugging Face layout",
                files.name()
            )));
        };
        Self::from_json(&files.display(FILE), &json)
    }

    /// Reads the configuration from parsed JSON; `file` is its name in messages.
    ///
    /// # Errors
    /// As [`LlavaNextVideoConfig::read`].
    pub fn from_json(file: &str, json: &serde_json::Value) -> Result<Self> {
        let fields = Fields::new(file, json)?;
        check_model_type(&fields)?;
        let vision_config = match fields.object("vision_config", "vision_config")? {
            Some(vision) => VisionConfig::read(&vision)?,
            None => VisionConfig::when_absent(),
        };
        let empty = serde_json::Map::new();
        let text = fields
            .object("text_config", "text_config")?
            .unwrap_or(Fields {
                file,
                path: "text_config",
                map: &empty,
            });
        let ids = 0..=u32::MAX as usize;
        let id = |modern: &str, legacy: &str, default: usize| -> Result<u32> {
            let key = if fields.get(legacy).is_some() {
                legacy
            } else {
                modern
            };
            Ok(fields.size(key, default, ids.clone())? as u32)
        };
        let (packed, quantization_config) = match read_stored(&fields)? {
            None => (None, None),
            Some(Stored::Packed(format)) => (Some(format), None),
            Some(Stored::BitsAndBytes(config)) => (None, Some(config)),
        };
        let config = Self {
            text_config: TextConfig::read(&text)?,
            image_token_index: id("image_token_id", "image_token_index", 32_001)?,
            video_token_index: id("video_token_id", "video_token_index", 32_000)?,
            projector_hidden_act: read_activation(
                &fields,
                "projector_hidden_act",
                Activation::Gelu,
            )?,
            multimodal_projector_bias: fields.flag("multimodal_projector_bias", true)?,
            vision_feature_select_strategy: read_strategy(&fields)?,
            vision_feature_layer: read_feature_layer(&fields)?,
            image_grid_pinpoints: read_pinpoints(&fields)?,
            spatial_pool_mode: read_pool_mode(&fields)?,
            spatial_pool_stride: fields.size("spatial_pool_stride", 2, 1..=4096)?,
            spatial_pool_out_channels: fields
                .optional_size("spatial_pool_out_channels", 1..=1 << 16)?,
            image_seq_length: fields.size("image_seq_length", 576, 0..=1 << 30)?,
            video_seq_length: fields.size("video_seq_length", 288, 0..=1 << 30)?,
            pad_token_id: fields.ids("pad_token_id")?.first().copied(),
            dtype: read_dtype(&fields)?.or(read_dtype(&text)?),
            packed,
            quantization_config,
            vision_config,
        };
        config.check(&fields)?;
        Ok(config)
    }

    /// Indices into the tower's hidden states (0 is before the encoder), in the order taken.
    pub fn vision_feature_indices(&self) -> Vec<usize> {
        let states = self.vision_config.num_hidden_layers as i64 + 1;
        let at = |layer: i64| {
            if layer < 0 {
                (layer + states) as usize
            } else {
                layer as usize
            }
        };
        self.vision_feature_layer
            .iter()
            .map(|layer| at(*layer))
            .collect()
    }

    /// Tokens of one pooled video frame.
    pub fn tokens_per_frame(&self) -> usize {
        (self.vision_config.patches_per_side() / self.spatial_pool_stride).pow(2)
    }

    /// Channels that the pooler hands to the projector.
    pub fn projector_inputs(&self) -> usize {
        self.vision_config.hidden_size * self.vision_feature_layer.len()
    }

    /// What cannot run, whatever the weights; said when loading rather than in the middle of a pass.
    fn check(&self, fields: &Fields<'_>) -> Result<()> {
        let layers = self.vision_config.num_hidden_layers as i64;
        for layer in &self.vision_feature_layer {
            if !(-layers - 1..=layers).contains(layer) {
                return Err(fields.complain(
                    "vision_feature_layer",
                    &format!("names layer {layer}, but the vision tower has {layers} layers"),
                ));
            }
        }
        if self.vision_feature_select_strategy == SelectStrategy::Full
            && self.vision_config.has_class_token()
        {
            return Err(fields.complain(
                "vision_feature_select_strategy",
                "is \"full\", which keeps CLIP's class token, and no grid of patches can hold it: \
                 use \"default\"",
            ));
        }
        let side = self.vision_config.patches_per_side();
        if self.spatial_pool_stride > side {
            return Err(fields.complain(
                "spatial_pool_stride",
                &format!(
                    "is {}, larger than the {side} patches along a frame's side",
                    self.spatial_pool_stride
                ),
            ));
        }
        self.check_conv_pooler(fields)
    }

    fn check_conv_pooler(&self, fields: &Fields<'_>) -> Result<()> {
        if self.spatial_pool_mode != SpatialPoolMode::Conv {
            return Ok(());
        }
        if self.vision_feature_layer.len() > 1 {
            return Err(fields.complain(
                "spatial_pool_mode",
                "is \"conv\", which works with a single vision_feature_layer only",
            ));
        }
        let out = self
            .spatial_pool_out_channels
            .unwrap_or(self.vision_config.hidden_size);
        if out != self.projector_inputs() {
            return Err(fields.complain(
                "spatial_pool_out_channels",
                &format!(
                    "is {out}, but the projector takes {} channels: they must be equal with \
                     spatial_pool_mode \"conv\"",
                    self.projector_inputs()
                ),
            ));
        }
        Ok(())
    }
}

fn check_model_type(fields: &Fields<'_>) -> Result<()> {
    match fields.text("model_type")? {
        // Research checkpoints name their own class and are told by their keys.
        None | Some("llava_next_video") => Ok(()),
        Some(other) => Err(fields.complain(
            "model_type",
            &format!("is {other:?}; this program runs llava_next_video checkpoints"),
        )),
    }
}

fn read_strategy(fields: &Fields<'_>) -> Result<SelectStrategy> {
    match fields.text("vision_feature_select_strategy")? {
        None | Some("default") => Ok(SelectStrategy::Default),
        Some("full") => Ok(SelectStrategy::Full),
        Some(other) => Err(fields.complain(
            "vision_feature_select_strategy",
            &format!("is {other:?}; it must be \"default\" or \"full\""),
        )),
    }
}

fn read_pool_mode(fields: &Fields<'_>) -> Result<SpatialPoolMode> {
    match fields.text("spatial_pool_mode")? {
        None | Some("average") => Ok(SpatialPoolMode::Average),
        Some("max") => Ok(SpatialPoolMode::Max),
        Some("conv") => Ok(SpatialPoolMode::Conv),
        Some(other) => Err(fields.complain(
            "spatial_pool_mode",
            &format!("is {other:?}; it must be \"average\", \"max\" or \"conv\""),
        )),
    }
}

fn read_feature_layer(fields: &Fields<'_>) -> Result<Vec<i64>> {
    const KEY: &str = "vision_feature_layer";
    let Some(value) = fields.get(KEY) else {
        return Ok(vec![-2]);
    };
    let layers: Option<Vec<i64>> = match value {
        serde_json::Value::Array(list) => list.iter().map(|v| v.as_i64()).collect(),
        other => other.as_i64().map(|layer| vec![layer]),
    };
    match layers {
        Some(layers) if !layers.is_empty() && layers.len() <= 64 => Ok(layers),
        _ => Err(fields.wrong(KEY, value, "a layer number or a list of them")),
    }
}

fn read_pinpoints(fields: &Fields<'_>) -> Result<Vec<ImageSize>> {
    const KEY: &str = "image_grid_pinpoints";
    let Some(value) = fields.get(KEY) else {
        return Ok(default_pinpoints());
    };
    let pair = |v: &serde_json::Value| match v.as_array().map(Vec::as_slice) {
        Some([h, w]) => Some(ImageSize::new(whole(h)?, whole(w)?))
            .filter(|s| (1..=1 << 16).contains(&s.height) && (1..=1 << 16).contains(&s.width)),
        _ => None,
    };
    let list = value
        .as_array()
        .and_then(|l| l.iter().map(pair).collect::<Option<Vec<_>>>());
    match list {
        Some(list) if !list.is_empty() && list.len() <= 1024 => Ok(list),
        _ => Err(fields.wrong(KEY, value, "a list of [height, width] pairs")),
    }
}

/// The class default of `image_grid_pinpoints`, in its effective order.
pub fn default_pinpoints() -> Vec<ImageSize> {
    [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
        .map(|(height, width)| ImageSize { height, width })
        .to_vec()
}

fn read_dtype(fields: &Fields<'_>) -> Result<Option<Dtype>> {
    for key in ["dtype", "torch_dtype"] {
        let Some(text) = fields.text(key)? else {
            continue;
        };
        return match text.strip_prefix("torch.").unwrap_or(text) {
            "float32" => Ok(Some(Dtype::F32)),
            "bfloat16" => Ok(Some(Dtype::Bf16)),
            "float16" => Ok(Some(Dtype::F16)),
            "auto" => Ok(None),
            other => Err(fields.complain(
                key,
                &format!("is {other:?}; supported are float32, bfloat16 and float16"),
            )),
        };
    }
    Ok(None)
}
