//! What a person asks of the generator, and what comes back.
//!
//! Options carry Transformers' names and defaults. They are resolved once, against the checkpoint's
//! `generation_config.json`, and checked: nonsense is refused before any work is done.

use super::logits::log_softmax;
use crate::config::{GenerationConfig, TextConfig};
use crate::error::{Error, Result};

/// The reference's default for new tokens when neither length is given.
pub const DEFAULT_NEW_TOKENS: usize = 20;

/// Most new tokens that a request may ask for.
pub const MAX_NEW_TOKENS: usize = 1 << 20;

/// Most beams, or sequences returned, a row.
pub const MAX_SEQUENCES: usize = 256;

/// Most stop strings, and the longest in bytes.
pub const MAX_STOP_STRINGS: usize = 64;
const MAX_STOP_BYTES: usize = 4096;

/// Most of the likeliest tokens that are told.
pub const MAX_LOGPROBS: usize = 32;

/// When beam search may end (`early_stopping`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EarlyStopping {
    /// When no running beam can beat the worst finished one at its present length.
    #[default]
    Heuristic,
    /// As soon as enough beams are finished.
    WhenFull,
    /// When no running beam could at any length.
    Never,
}

/// How a token is drawn when not simply the best is taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the scores; below 1 sharpens.
    pub temperature: f32,
    /// Keep the k best; 0 keeps all. Default 50, as in Transformers.
    pub top_k: usize,
    /// Keep the smallest set whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the likeliest; 0 keeps all.
    pub min_p: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 50,
            top_p: 1.0,
            min_p: 0.0,
        }
    }
}

/// What a request says; `None` where it leaves the choice to the checkpoint.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationOptions {
    /// Most new tokens; wins over `max_length`.
    pub max_new_tokens: Option<usize>,
    /// Longest row, prompt and padding included.
    pub max_length: Option<usize>,
    /// No end-of-sequence before this many new tokens.
    pub min_new_tokens: usize,
    /// Draw instead of taking the best.
    pub sampling: Option<Sampling>,
    /// Seed of the draws; equal seeds give equal answers.
    pub seed: u64,
    /// Divides (or multiplies, below zero) the scores of ids already in the row.
    pub repetition_penalty: Option<f32>,
    /// No n-gram of this length twice; 0 for no such rule.
    pub no_repeat_ngram_size: usize,
    /// Beams a row.
    pub num_beams: Option<usize>,
    /// Answers a row.
    pub num_return_sequences: usize,
    /// Exponent of the length in a beam's score.
    pub length_penalty: Option<f32>,
    /// When beam search may end.
    pub early_stopping: EarlyStopping,
    /// End-of-sequence ids instead of the checkpoint's.
    pub eos_token_ids: Option<Vec<u32>>,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Tell how likely each new token was, and so many of the likeliest in its place. Not for beams.
    pub logprobs: Option<usize>,
}

/// Options with every choice made.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Resolved {
    pub max_new_tokens: usize,
    pub min_new_tokens: usize,
    pub sampling: Option<Sampling>,
    pub seed: u64,
    pub repetition_penalty: f32,
    pub no_repeat_ngram_size: usize,
    pub num_beams: usize,
    pub num_return_sequences: usize,
    pub length_penalty: f32,
    pub early_stopping: EarlyStopping,
    pub eos_token_ids: Vec<u32>,
    pub stop: Vec<String>,
    pub logprobs: Option<usize>,
}

impl GenerationOptions {
    /// Fills in what is left open and checks the whole; `columns` is the padded prompt length.
    pub(crate) fn resolve(
        &self,
        defaults: &GenerationConfig,
        text: &TextConfig,
        columns: usize,
    ) -> Result<Resolved> {
        let eos = match &self.eos_token_ids {
            Some(ids) => ids.clone(),
            None if !defaults.eos_token_ids.is_empty() => defaults.eos_token_ids.clone(),
            None => text.eos_token_ids.clone(),
        };
        let resolved = Resolved {
            max_new_tokens: self.new_tokens(defaults, columns)?,
            min_new_tokens: self.min_new_tokens,
            sampling: self.sampling,
            seed: self.seed,
            repetition_penalty: self
                .repetition_penalty
                .or(defaults.repetition_penalty.map(|p| p as f32))
                .unwrap_or(1.0),
            no_repeat_ngram_size: self.no_repeat_ngram_size,
            num_beams: self.num_beams.or(defaults.num_beams).unwrap_or(1),
            num_return_sequences: self.num_return_sequences.max(1),
            length_penalty: self
                .length_penalty
                .or(defaults.length_penalty.map(|p| p as f32))
                .unwrap_or(1.0),
            early_stopping: self.early_stopping,
            eos_token_ids: eos,
            stop: self.stop.clone(),
            logprobs: self.logprobs,
        };
        resolved.check()?;
        Ok(resolved)
    }

    /// `max_new_tokens` wins; then `max_length`, which counts the prompt; then 20.
    fn new_tokens(&self, defaults: &GenerationConfig, columns: usize) -> Result<usize> {
        let chosen = match (self.max_new_tokens, self.max_length) {
            (Some(n), _) => (Some(n), None),
            (None, Some(length)) => (None, Some(length)),
            (None, None) => (defaults.max_new_tokens, defaults.max_length),
        };
        match chosen {
            (Some(0), _) => Err(Error::Input(
                "max_new_tokens is 0; it must be at least 1 for an answer to be written".into(),
            )),
            (Some(n), _) if n > MAX_NEW_TOKENS => Err(Error::Input(format!(
                "max_new_tokens is {n}, more than the {MAX_NEW_TOKENS} that one answer may have"
            ))),
            (Some(n), _) => Ok(n),
            (None, None) => Ok(DEFAULT_NEW_TOKENS),
            (None, Some(length)) if length <= columns => Err(Error::Input(format!(
                "Input length of input_ids is {columns}, but `max_length` is set to {length}: \
                 max_length counts the prompt with all its image and video tokens, so set \
                 max_new_tokens instead"
            ))),
            (None, Some(length)) => Ok(length - columns),
        }
    }
}

impl Resolved {
    fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::Input(what));
        if let Some(s) = self.sampling {
            if !(s.temperature > 0.0 && s.temperature.is_finite()) {
                return refuse(format!(
                    "temperature is {}; it must be above 0 (leave sampling off for greedy)",
                    s.temperature
                ));
            }
            if !(s.top_p > 0.0 && s.top_p <= 1.0) {
                return refuse(format!(
                    "top_p is {}; it must be above 0 and at most 1",
                    s.top_p
                ));
            }
            if !(0.0..=1.0).contains(&s.min_p) {
                return refuse(format!("min_p is {}; it must be from 0 to 1", s.min_p));
            }
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return refuse(format!(
                "repetition_penalty is {}; it must be above 0 (1 for none)",
                self.repetition_penalty
            ));
        }
        if !self.length_penalty.is_finite() {
            return refuse(format!(
                "length_penalty is {}; it must be a finite number (1 is usual)",
                self.length_penalty
            ));
        }
        let (beams, returned) = (self.num_beams, self.num_return_sequences);
        if beams == 0 || beams > MAX_SEQUENCES || returned > MAX_SEQUENCES {
            return refuse(format!(
                "num_beams is {beams} and num_return_sequences {returned}; both must be from 1 to \
                 {MAX_SEQUENCES}"
            ));
        }
        if self.sampling.is_none() && beams == 1 && returned > 1 {
            return refuse(format!(
                "Greedy methods without beam search do not support num_return_sequences other \
                 than 1 (got {returned}): set a temperature, or num_beams"
            ));
        }
        if beams > 1 && returned > beams {
            return refuse(format!(
                "num_return_sequences ({returned}) has to be smaller or equal to num_beams \
                 ({beams})"
            ));
        }
        if let Some(top) = self.logprobs.filter(|top| *top > MAX_LOGPROBS) {
            return refuse(format!(
                "{top} log probabilities a token; {MAX_LOGPROBS} at most"
            ));
        }
        if self.stop.len() > MAX_STOP_STRINGS {
            return refuse(format!(
                "{} stop strings; {MAX_STOP_STRINGS} at most",
                self.stop.len()
            ));
        }
        match self
            .stop
            .iter()
            .find(|s| s.is_empty() || s.len() > MAX_STOP_BYTES)
        {
            None => Ok(()),
            Some(s) => refuse(format!(
                "a stop string has {} bytes; it must have 1 to {MAX_STOP_BYTES}",
                s.len()
            )),
        }
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence id or a stop string.
    Stop,
    /// The token limit.
    Length,
    /// The caller asked to stop.
    Cancelled,
}

impl FinishReason {
    /// The word of the JSON outputs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

/// One finished sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The row of the batch that it answers.
    pub row: usize,
    /// New token ids; an end-of-sequence id is kept, padding is not.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The beam's score: log probability over `length ^ length_penalty`.
    pub score: Option<f32>,
    /// One for each id, where asked for; else empty.
    pub logprobs: Vec<TokenLogprob>,
}

/// How likely a token was, by the scores as the model gave them: before temperature, penalties and
/// constraints.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Its natural log probability.
    pub logprob: f32,
    /// The likeliest tokens, best first, as many as asked for.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprob {
    pub(crate) fn new(mut scores: Vec<f32>, id: u32, top: usize) -> Self {
        log_softmax(&mut scores);
        let mut order: Vec<u32> = (0..scores.len() as u32).collect();
        let by_score = |a: &u32, b: &u32| {
            let (x, y) = (scores[*a as usize], scores[*b as usize]);
            y.total_cmp(&x).then(a.cmp(b))
        };
        let top = top.min(order.len());
        if top > 0 && top < order.len() {
            order.select_nth_unstable_by(top - 1, by_score);
        }
        order.truncate(top);
        order.sort_by(by_score);
        Self {
            id,
            logprob: scores[id as usize],
            top: order.iter().map(|id| (*id, scores[*id as usize])).collect(),
        }
    }
}

/// Seconds spent in each stage.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timings {
    /// Vision tower, pooler, projector, merge.
    pub vision_s: f64,
    /// Prompt through the decoder.
    pub prefill_s: f64,
    /// All decode steps together.
    pub decode_s: f64,
    /// Decode steps.
    pub decode_steps: usize,
}

/// What a call gave: `rows * num_return_sequences` sequences, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The sequences.
    pub completions: Vec<Completion>,
    /// Prompt tokens of each row.
    pub prompt_tokens: Vec<usize>,
    /// Of these, how many were found in the cache.
    pub cached_tokens: usize,
    /// Seconds by stage.
    pub timings: Timings,
}

/// What happens while a call runs; returning `Break` stops it and keeps what is there.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Pictures through the vision tower; told when one begins and when one is known.
    Vision {
        /// So far.
        done: usize,
        /// In all.
        total: usize,
    },
    /// Prompt tokens times layers through the decoder; told when some begin and after each layer.
    Prefill {
        /// So far.
        done: usize,
        /// In all.
        total: usize,
    },
    /// A new token. Beam search gives none: which tokens stay is known at the end.
    Token {
        /// Index of its sequence in [`Generation::completions`].
        sequence: usize,
        /// The id.
        id: u32,
        /// How likely it was, where asked for.
        logprob: Option<TokenLogprob>,
    },
}
