//! `BitsAndBytesConfig`: how bitsandbytes quantises, with the fields and defaults of Transformers' class.
//!
//! The same struct is built by users of the library, typed on the command line, read from a checkpoint's
//! `quantization_config` and written there. What the class refuses is refused here; so is what this
//! program does not have, by name: weights kept in half precision for training, other codes, other
//! types to compute in.

use serde_json::{Value, json};

use super::fields::Fields;
use super::model::Dtype;
use crate::error::{Error, Result};

/// The codes of 4-bit weights (`bnb_4bit_quant_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// 4-bit floats.
    Fp4,
    /// Quantiles of the normal distribution.
    Nf4,
}

impl QuantType {
    /// The word of the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp4 => "fp4",
            Self::Nf4 => "nf4",
        }
    }

    /// The type of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Fp4, Self::Nf4]
            .into_iter()
            .find(|t| t.name() == name)
    }
}

/// The type that 4-bit codes are labelled with in a file (`bnb_4bit_quant_storage`); the bytes are the
/// same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantStorage {
    /// Unsigned bytes, the usual.
    Uint8,
    /// Signed bytes.
    Int8,
    /// Half precision.
    Float16,
    /// bfloat16.
    Bfloat16,
    /// 32-bit floats.
    Float32,
    /// 64-bit floats.
    Float64,
}

impl QuantStorage {
    const ALL: [Self; 6] = [
        Self::Uint8,
        Self::Int8,
        Self::Float16,
        Self::Bfloat16,
        Self::Float32,
        Self::Float64,
    ];

    /// The word of the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uint8 => "uint8",
            Self::Int8 => "int8",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Float32 => "float32",
            Self::Float64 => "float64",
        }
    }

    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Self::Uint8 | Self::Int8 => 1,
            Self::Float16 | Self::Bfloat16 => 2,
            Self::Float32 => 4,
            Self::Float64 => 8,
        }
    }
}

/// Which of bitsandbytes' formats a [`BitsAndBytesConfig`] asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BitsAndBytesKind {
    /// `load_in_4bit`.
    FourBit(QuantType),
    /// `load_in_8bit`: LLM.int8().
    Int8,
}

impl BitsAndBytesKind {
    /// The name that the command line uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::FourBit(codes) => codes.name(),
            Self::Int8 => "int8",
        }
    }
}

/// How bitsandbytes quantises.
///
/// Transformers: `BitsAndBytesConfig`. Fields carry its names and defaults.
///
/// ```
/// use llava_next_video::config::{BitsAndBytesConfig, Dtype, QuantType};
/// let config = BitsAndBytesConfig {
///     load_in_4bit: true,
///     bnb_4bit_quant_type: QuantType::Nf4,
///     bnb_4bit_compute_dtype: Dtype::F16,
///     ..BitsAndBytesConfig::default()
/// };
/// assert!(config.kind().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct BitsAndBytesConfig {
    /// LLM.int8(); default false.
    pub load_in_8bit: bool,
    /// FP4 or NF4; default false.
    pub load_in_4bit: bool,
    /// Activations this large are multiplied without being rounded to 8 bits; 0 for none. Default 6.
    pub llm_int8_threshold: f32,
    /// Modules that stay as they are, for 4-bit weights too: a module's own name, its path, or the path
    /// of what it is in. `None` for the head.
    pub llm_int8_skip_modules: Option<Vec<String>>,
    /// About devices, which this program does not split a model over: without effect. Default false.
    pub llm_int8_enable_fp32_cpu_offload: bool,
    /// For training: refused. Default false.
    pub llm_int8_has_fp16_weight: bool,
    /// The type that products with 4-bit weights are done in; products of f16 are done in f32. Default
    /// f32.
    pub bnb_4bit_compute_dtype: Dtype,
    /// The codes of 4-bit weights; default FP4.
    pub bnb_4bit_quant_type: QuantType,
    /// Keep the blocks' scales in 8 bits ("nested", double quantisation); default false.
    pub bnb_4bit_use_double_quant: bool,
    /// The type that 4-bit codes are labelled with in a file; default uint8.
    pub bnb_4bit_quant_storage: QuantStorage,
}

impl BitsAndBytesConfig {
    /// The class defaults, which ask for nothing.
    pub const DEFAULT: Self = Self {
        load_in_8bit: false,
        load_in_4bit: false,
        llm_int8_threshold: 6.0,
        llm_int8_skip_modules: None,
        llm_int8_enable_fp32_cpu_offload: false,
        llm_int8_has_fp16_weight: false,
        bnb_4bit_compute_dtype: Dtype::F32,
        bnb_4bit_quant_type: QuantType::Fp4,
        bnb_4bit_use_double_quant: false,
        bnb_4bit_quant_storage: QuantStorage::Uint8,
    };

    /// The defaults, asking for one format.
    pub const fn of(kind: BitsAndBytesKind) -> Self {
        match kind {
            BitsAndBytesKind::FourBit(codes) => Self {
                load_in_4bit: true,
                bnb_4bit_quant_type: codes,
                ..Self::DEFAULT
            },
            BitsAndBytesKind::Int8 => Self {
                load_in_8bit: true,
                ..Self::DEFAULT
            },
        }
    }

    /// The format that is asked for.
    ///
    /// # Errors
    /// Both or none are asked for; weights in half precision beside the 8-bit ones; a threshold below 0.
    pub fn kind(&self) -> Result<BitsAndBytesKind> {
        let refused = |what: &str| Err(Error::Config(format!("BitsAndBytesConfig: {what}")));
        if self.llm_int8_has_fp16_weight {
            return refused(
                "llm_int8_has_fp16_weight is true, which is for training and not supported: leave it \
                 false",
            );
        }
        if self.llm_int8_threshold.is_nan() || self.llm_int8_threshold < 0.0 {
            return refused(&format!(
                "llm_int8_threshold is {}; it must be 0 or above",
                self.llm_int8_threshold
            ));
        }
        match (self.load_in_4bit, self.load_in_8bit) {
            (true, true) => refused(
                "load_in_4bit and load_in_8bit are both true, but only one can be used at the same \
                 time",
            ),
            (false, false) => {
                refused("neither load_in_4bit nor load_in_8bit is true: set the one that is meant")
            }
            (true, false) => Ok(BitsAndBytesKind::FourBit(self.bnb_4bit_quant_type)),
            (false, true) => Ok(BitsAndBytesKind::Int8),
        }
    }

    /// True for a module that [`Self::llm_int8_skip_modules`] names; `path` is its path in Transformers
    /// 4.53.3, `model.language_model.layers.0.self_attn.q_proj` for example.
    pub fn skips(&self, path: &str) -> bool {
        let own = path.rsplit('.').next().unwrap_or(path);
        let Some(list) = &self.llm_int8_skip_modules else {
            return own == "lm_head";
        };
        list.iter().any(|entry| {
            let inside = path.match_indices(entry.as_str());
            let inside = || inside.map(|(at, _)| &path[at + entry.len()..]);
            entry == own || entry == path || inside().any(|rest| rest.starts_with('.'))
        })
    }

    /// Reads `quantization_config` of the method "bitsandbytes".
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self> {
        let defaults = Self::DEFAULT;
        // Written twice by some versions; older ones wrote the second only.
        let flag = |key: &str| fields.flag(key, fields.flag(&format!("_{key}"), false)?);
        let config = Self {
            load_in_8bit: flag("load_in_8bit")?,
            load_in_4bit: flag("load_in_4bit")?,
            llm_int8_threshold: fields
                .number("llm_int8_threshold", f64::from(defaults.llm_int8_threshold))?
                as f32,
            llm_int8_skip_modules: read_modules(fields)?,
            llm_int8_enable_fp32_cpu_offload: fields
                .flag("llm_int8_enable_fp32_cpu_offload", false)?,
            llm_int8_has_fp16_weight: fields.flag("llm_int8_has_fp16_weight", false)?,
            bnb_4bit_compute_dtype: read_compute(fields)?,
            bnb_4bit_quant_type: read_type(fields, defaults.bnb_4bit_quant_type)?,
            bnb_4bit_use_double_quant: fields.flag("bnb_4bit_use_double_quant", false)?,
            bnb_4bit_quant_storage: read_storage(fields, defaults.bnb_4bit_quant_storage)?,
        };
        config
            .kind()
            .map_err(|cause| Error::Config(format!("{}: {cause}", fields.file)))?;
        Ok(config)
    }

    /// The `quantization_config` that Transformers writes for it.
    pub fn to_json(&self) -> Value {
        json!({
            "_load_in_4bit": self.load_in_4bit,
            "_load_in_8bit": self.load_in_8bit,
            "bnb_4bit_compute_dtype": torch_name(self.bnb_4bit_compute_dtype),
            "bnb_4bit_quant_storage": self.bnb_4bit_quant_storage.name(),
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type.name(),
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "llm_int8_enable_fp32_cpu_offload": self.llm_int8_enable_fp32_cpu_offload,
            "llm_int8_has_fp16_weight": self.llm_int8_has_fp16_weight,
            "llm_int8_skip_modules": self.llm_int8_skip_modules,
            "llm_int8_threshold": self.llm_int8_threshold,
            "load_in_4bit": self.load_in_4bit,
            "load_in_8bit": self.load_in_8bit,
            "quant_method": "bitsandbytes",
        })
    }
}

impl Default for BitsAndBytesConfig {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// The name that PyTorch has for a type.
pub(crate) fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "float32",
        Dtype::Bf16 => "bfloat16",
        Dtype::F16 => "float16",
    }
}

/// The type of this name in PyTorch.
pub(crate) fn from_torch_name(name: &str) -> Option<Dtype> {
    let all = [Dtype::F32, Dtype::Bf16, Dtype::F16];
    all.into_iter().find(|dtype| torch_name(*dtype) == name)
}

fn read_modules(fields: &Fields<'_>) -> Result<Option<Vec<String>>> {
    const KEY: &str = "llm_int8_skip_modules";
    let Some(value) = fields.get(KEY) else {
        return Ok(None);
    };
    let name = |entry: &Value| entry.as_str().map(str::to_owned);
    let names = value
        .as_array()
        .and_then(|list| list.iter().map(name).collect());
    names
        .map(Some)
        .ok_or_else(|| fields.wrong(KEY, value, "a list of module names"))
}

fn read_compute(fields: &Fields<'_>) -> Result<Dtype> {
    const KEY: &str = "bnb_4bit_compute_dtype";
    let Some(name) = fields.text(KEY)? else {
        return Ok(Dtype::F32);
    };
    from_torch_name(name).ok_or_else(|| {
        let what = format!("is {name:?}; supported are \"float32\", \"bfloat16\" and \"float16\"");
        fields.complain(KEY, &what)
    })
}

fn read_type(fields: &Fields<'_>, default: QuantType) -> Result<QuantType> {
    const KEY: &str = "bnb_4bit_quant_type";
    let Some(name) = fields.text(KEY)? else {
        return Ok(default);
    };
    QuantType::from_name(name)
        .ok_or_else(|| fields.complain(KEY, &format!("is {name:?}; it must be \"fp4\" or \"nf4\"")))
}

fn read_storage(fields: &Fields<'_>, default: QuantStorage) -> Result<QuantStorage> {
    const KEY: &str = "bnb_4bit_quant_storage";
    let Some(name) = fields.text(KEY)? else {
        return Ok(default);
    };
    let known = QuantStorage::ALL;
    let found = known.into_iter().find(|storage| storage.name() == name);
    found.ok_or_else(|| {
        let names = known.map(QuantStorage::name).join(", ");
        fields.complain(KEY, &format!("is {name:?}; it must be one of {names}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_skipped_as_in_transformers() {
        let q_proj = "model.language_model.layers.1.self_attn.q_proj";
        let defaults = BitsAndBytesConfig::default();
        assert!(defaults.skips("lm_head") && !defaults.skips(q_proj));
        let rows = [
            ("q_proj", true),
            (q_proj, true),
            ("layers.1", true),
            ("model.language_model", true),
            ("self_attn.q_proj", false),
            ("layers.1.self", false),
            ("lm_head", false),
            // As there: every path has a dot after nothing.
            ("", true),
        ];
        for (entry, skipped) in rows {
            let config = BitsAndBytesConfig {
                llm_int8_skip_modules: Some(vec![entry.into()]),
                ..BitsAndBytesConfig::default()
            };
            assert_eq!(config.skips(q_proj), skipped, "{entry:?}");
            assert_eq!(config.skips("lm_head"), entry == "lm_head");
        }
    }

    #[test]
    fn what_is_written_reads_the_same_and_a_missing_key_is_the_default() {
        let read =
            |json: &Value| BitsAndBytesConfig::read(&Fields::new("f", json).expect("object"));
        let config = BitsAndBytesConfig {
            llm_int8_threshold: 2.5,
            llm_int8_skip_modules: Some(vec!["a".into(), "b.c".into()]),
            bnb_4bit_compute_dtype: Dtype::Bf16,
            bnb_4bit_use_double_quant: true,
            bnb_4bit_quant_storage: QuantStorage::Float32,
            ..BitsAndBytesConfig::of(BitsAndBytesKind::FourBit(QuantType::Nf4))
        };
        assert_eq!(read(&config.to_json()).expect("valid"), config);
        let int8 = BitsAndBytesConfig::of(BitsAndBytesKind::Int8);
        assert_eq!(read(&json!({"_load_in_8bit": true})).expect("valid"), int8);
    }

    #[test]
    fn what_the_class_refuses_or_this_program_lacks_is_refused_by_name() {
        let rows = [
            (
                json!({"load_in_8bit": true, "load_in_4bit": true}),
                "both true",
            ),
            (json!({}), "neither"),
            (
                json!({"load_in_8bit": true, "llm_int8_has_fp16_weight": true}),
                "llm_int8_has_fp16_weight",
            ),
            (
                json!({"load_in_8bit": true, "llm_int8_threshold": -1}),
                "llm_int8_threshold is -1",
            ),
            (json!({"load_in_8bit": 1}), "load_in_8bit is 1"),
            (
                json!({"load_in_4bit": true, "bnb_4bit_quant_type": "af4"}),
                "bnb_4bit_quant_type is \"af4\"",
            ),
            (
                json!({"load_in_4bit": true, "bnb_4bit_compute_dtype": "float64"}),
                "\"float64\"",
            ),
            (
                json!({"load_in_4bit": true, "bnb_4bit_quant_storage": "int4"}),
                "\"int4\"",
            ),
            (
                json!({"load_in_4bit": true, "llm_int8_skip_modules": "lm_head"}),
                "a list",
            ),
        ];
        for (json, words) in rows {
            let fields = Fields::new("config.json", &json).expect("object");
            let error = BitsAndBytesConfig::read(&fields)
                .expect_err("refused")
                .to_string();
            assert!(
                error.contains(words) && error.contains("config.json"),
                "{error}"
            );
        }
    }
}
