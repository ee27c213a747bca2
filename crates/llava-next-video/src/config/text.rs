//! The language model's configuration: Llama, Mistral or Qwen2.
//!
//! The three differ in biases, windows and defaults only, so one struct describes them and the decoder
//! reads no model name. A setting that would change the arithmetic and is not supported is refused.

use lnv_kernels::Activation;

use super::fields::Fields;
use super::read_activation;
use super::rope::RopeConfig;
use crate::error::Result;

/// Which decoder family (`text_config.model_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextBackbone {
    /// `llama`: Vicuna, Yi.
    Llama,
    /// `mistral`: one sliding window for all layers.
    Mistral,
    /// `qwen2`: biases on q, k and v; windows from a layer on.
    Qwen2,
}

impl TextBackbone {
    /// The name in `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
        }
    }
}

/// `text_config`.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// Family.
    pub backbone: TextBackbone,
    /// Rows of the embedding table; may exceed the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads (grouped-query attention where fewer).
    pub num_key_value_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Activation of the MLP's gate.
    pub hidden_act: Activation,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of the RMSNorms.
    pub rms_norm_eps: f64,
    /// Rotary embeddings.
    pub rope: RopeConfig,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the output projection of attention.
    pub o_bias: bool,
    /// Biases on the MLP's projections.
    pub mlp_bias: bool,
    /// For each layer, how many positions back a query sees; `None` for all.
    pub windows: Vec<Option<usize>>,
    /// True where the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Begin-of-sequence id.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence ids.
    pub eos_token_ids: Vec<u32>,
    /// Padding id.
    pub pad_token_id: Option<u32>,
}

/// Class defaults that differ between the families.
struct Defaults {
    vocab_size: usize,
    intermediate_size: usize,
    num_key_value_heads: Option<usize>,
    max_position_embeddings: usize,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
}

impl Defaults {
    fn of(backbone: TextBackbone) -> Self {
        let llama = Self {
            vocab_size: 32_000,
            intermediate_size: 11_008,
            num_key_value_heads: None,
            max_position_embeddings: 2048,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
        };
        match backbone {
            TextBackbone::Llama => llama,
            TextBackbone::Mistral => Self {
                intermediate_size: 14_336,
                num_key_value_heads: Some(8),
                max_position_embeddings: 131_072,
                ..llama
            },
            TextBackbone::Qwen2 => Self {
                vocab_size: 151_936,
                intermediate_size: 22_016,
                num_key_value_heads: Some(32),
                max_position_embeddings: 32_768,
                bos_token_id: None,
                eos_token_ids: Vec::new(),
            },
        }
    }
}

impl TextConfig {
    /// Rows of the fused q, k, v projection.
    pub fn qkv_rows(&self) -> usize {
        (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
    }

    pub(crate) fn read(fields: &Fields<'_>) -> Result<Self> {
        let backbone = match fields.text("model_type")? {
            None | Some("llama") => TextBackbone::Llama,
            Some("mistral") => TextBackbone::Mistral,
            Some("qwen2") => TextBackbone::Qwen2,
            Some(other) => {
                return Err(fields.complain(
                    "model_type",
                    &format!("is {other:?}; supported are llama, mistral and qwen2"),
                ));
            }
        };
        let defaults = Defaults::of(backbone);
        let hidden_size = fields.size("hidden_size", 4096, 1..=1 << 17)?;
        let heads = fields.size("num_attention_heads", 32, 1..=1024)?;
        let kv_heads = fields.size(
            "num_key_value_heads",
            defaults.num_key_value_heads.unwrap_or(heads),
            1..=1024,
        )?;
        let head_dim = fields
            .optional_size("head_dim", 2..=1024)?
            .unwrap_or((hidden_size / heads).max(1));
        let layers = fields.size("num_hidden_layers", 32, 1..=1024)?;
        let max_position_embeddings = fields.size(
            "max_position_embeddings",
            defaults.max_position_embeddings,
            1..=1 << 30,
        )?;
        let attention_bias =
            backbone == TextBackbone::Llama && fields.flag("attention_bias", false)?;
        let config = Self {
            backbone,
            vocab_size: fields.size("vocab_size", defaults.vocab_size, 1..=1 << 24)?,
            hidden_size,
            intermediate_size: fields.size(
                "intermediate_size",
                defaults.intermediate_size,
                1..=1 << 19,
            )?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            hidden_act: read_activation(fields, "hidden_act", Activation::Silu)?,
            max_position_embeddings,
            rms_norm_eps: fields.positive("rms_norm_eps", 1e-6)?,
            rope: RopeConfig::read(fields, head_dim, max_position_embeddings)?,
            qkv_bias: attention_bias || backbone == TextBackbone::Qwen2,
            o_bias: attention_bias,
            mlp_bias: backbone == TextBackbone::Llama && fields.flag("mlp_bias", false)?,
            windows: read_windows(fields, backbone, layers)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            bos_token_id: first_id(fields, "bos_token_id", defaults.bos_token_id)?,
            eos_token_ids: match fields.map.contains_key("eos_token_id") {
                true => fields.ids("eos_token_id")?,
                false => defaults.eos_token_ids,
            },
            pad_token_id: first_id(fields, "pad_token_id", None)?,
        };
        config.check(fields)?;
        Ok(config)
    }

    fn check(&self, fields: &Fields<'_>) -> Result<()> {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if heads % kv_heads != 0 {
            return Err(fields.complain(
                "num_key_value_heads",
                &format!("is {kv_heads}, which does not divide the {heads} attention heads"),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(fields.complain(
                "head_dim",
                &format!(
                    "is {}; rotary embeddings need an even number",
                    self.head_dim
                ),
            ));
        }
        Ok(())
    }
}

fn first_id(fields: &Fields<'_>, key: &str, default: Option<u32>) -> Result<Option<u32>> {
    if !fields.map.contains_key(key) {
        return Ok(default);
    }
    Ok(fields.ids(key)?.first().copied())
}

/// Which layers see how far back. A 5.x file lists `layer_types`; a 4.x file has the rule of its class.
fn read_windows(
    fields: &Fields<'_>,
    backbone: TextBackbone,
    layers: usize,
) -> Result<Vec<Option<usize>>> {
    // `sliding_window: null` means none, an absent key means the class default.
    let window = match fields.map.contains_key("sliding_window") {
        true => fields.optional_size("sliding_window", 1..=1 << 30)?,
        false => Some(4096),
    };
    Ok(match backbone {
        TextBackbone::Llama => vec![None; layers],
        TextBackbone::Mistral => vec![window; layers],
        TextBackbone::Qwen2 => {
            let window =
                window.filter(|_| matches!(fields.flag("use_sliding_window", false), Ok(true)));
            let first = fields.size("max_window_layers", 28, 0..=1 << 20)?;
            match fields.get("layer_types").and_then(|v| v.as_array()) {
                Some(types) if types.len() == layers => types
                    .iter()
                    .map(|t| window.filter(|_| t.as_str() == Some("sliding_attention")))
                    .collect(),
                _ => (0..layers).map(|i| window.filter(|_| i >= first)).collect(),
            }
        }
    })
}
