//! `generation_config.json`: what a checkpoint wants by default when text is generated.

use serde_json::Value;

use super::fields::Fields;
use super::files::CheckpointFiles;
use crate::error::Result;

/// The fields that the generator reads; absent ones are `None` so that a request can tell "unset".
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationConfig {
    /// Sample instead of taking the most likely token.
    pub do_sample: Option<bool>,
    /// Softmax temperature.
    pub temperature: Option<f64>,
    /// Keep the k most likely tokens.
    pub top_k: Option<usize>,
    /// Keep the smallest set of this probability.
    pub top_p: Option<f64>,
    /// Drop tokens less likely than this share of the likeliest.
    pub min_p: Option<f64>,
    /// Divides the scores of tokens already seen.
    pub repetition_penalty: Option<f64>,
    /// Beams.
    pub num_beams: Option<usize>,
    /// Exponent of the length in a beam's score.
    pub length_penalty: Option<f64>,
    /// Longest sequence, prompt included.
    pub max_length: Option<usize>,
    /// Most new tokens.
    pub max_new_tokens: Option<usize>,
    /// Begin-of-sequence id.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence ids.
    pub eos_token_ids: Vec<u32>,
    /// Padding id.
    pub pad_token_id: Option<u32>,
    /// Settings that Transformers would heed and this program does not, as `key = value`.
    pub not_applied: Vec<String>,
}

/// What Transformers would heed and this program does not, each with the value that changes nothing
/// (besides null and an empty list).
const NOT_APPLIED: [(&str, f64); 26] = [
    ("num_beam_groups", 1.0),
    ("diversity_penalty", 0.0),
    ("penalty_alpha", 0.0),
    ("dola_layers", 0.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("max_time", 0.0),
    ("num_return_sequences", 1.0),
    ("guidance_scale", 1.0),
    ("bad_words_ids", 0.0),
    ("force_words_ids", 0.0),
    ("constraints", 0.0),
    ("forced_bos_token_id", -1.0),
    ("forced_eos_token_id", -1.0),
    ("suppress_tokens", 0.0),
    ("begin_suppress_tokens", 0.0),
    ("sequence_bias", 0.0),
    ("exponential_decay_length_penalty", 0.0),
    ("stop_strings", 0.0),
    ("watermarking_config", 0.0),
];

/// The settings of [`NOT_APPLIED`] that would change an answer.
fn not_applied(fields: &Fields) -> Vec<String> {
    let matters = |value: &Value, neutral: f64| match value {
        Value::Null => false,
        Value::Number(n) => n.as_f64() != Some(neutral),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Bool(_) | Value::String(_) => true,
    };
    let set = NOT_APPLIED.iter().filter_map(|(key, neutral)| {
        let value = fields.get(key)?;
        matters(value, *neutral).then(|| format!("{key} = {value}"))
    });
    set.collect()
}

impl GenerationConfig {
    /// Reads `generation_config.json`; all unset where the checkpoint has none.
    ///
    /// # Errors
    /// Malformed JSON, or a value of the wrong type.
    pub fn read(files: &CheckpointFiles) -> Result<Self> {
        const FILE: &str = "generation_config.json";
        let Some(json) = files.read_json(FILE)? else {
            return Ok(Self::default());
        };
        let name = files.display(FILE);
        let fields = Fields::new(&name, &json)?;
        Ok(Self {
            do_sample: fields
                .get("do_sample")
                .map(|_| fields.flag("do_sample", false))
                .transpose()?,
            temperature: fields.optional_number("temperature")?,
            top_k: fields.optional_size("top_k", 0..=1 << 24)?,
            top_p: fields.optional_number("top_p")?,
            min_p: fields.optional_number("min_p")?,
            repetition_penalty: fields.optional_number("repetition_penalty")?,
            num_beams: fields.optional_size("num_beams", 1..=1024)?,
            length_penalty: fields.optional_number("length_penalty")?,
            max_length: fields.optional_size("max_length", 1..=1 << 30)?,
            max_new_tokens: fields.optional_size("max_new_tokens", 1..=1 << 30)?,
            bos_token_id: fields.ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.ids("eos_token_id")?,
            pad_token_id: fields.ids("pad_token_id")?.first().copied(),
            not_applied: not_applied(&fields),
        })
    }
}
