//! `generation_config.json`: what a checkpoint wants by default when text is generated.

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
        })
    }
}
