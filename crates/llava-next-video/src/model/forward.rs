//! One forward pass over a batch, as `LlavaNextVideoForConditionalGeneration.forward` gives it: logits,
//! loss, hidden states, attentions. Generation does not come through here; the engine keeps a cache.

use lnv_kernels::Buffer;

use super::batch::{Keep, Taps};
use super::llava_next_video::{EmbeddedRow, LlavaNextVideoModel, blocks_for, whole_rows};
use crate::error::{Error, Result};
use crate::processor::inputs::ModelInputs;

/// The label that counts for nothing.
pub const IGNORE_INDEX: i64 = -100;

/// Which positions get logits (`logits_to_keep`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum LogitsToKeep {
    /// Every position.
    #[default]
    All,
    /// The last so many columns.
    Last(usize),
    /// These columns.
    Columns(Vec<usize>),
}

/// What a pass is to give.
#[derive(Debug, Clone, Default)]
pub struct ForwardOptions {
    /// Give every hidden state.
    pub hidden_states: bool,
    /// Give the attention weights; runs the eager form.
    pub attentions: bool,
    /// Which positions get logits.
    pub logits_to_keep: LogitsToKeep,
}

/// Values with their shape, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Values {
    /// Dimensions.
    pub shape: Vec<usize>,
    /// The values.
    pub data: Vec<f32>,
}

/// What a pass gave (`LlavaNextVideoCausalLMOutputWithPast`). Positions that the mask hides hold zeros.
#[derive(Debug, Clone)]
pub struct ForwardOutput {
    /// Mean cross-entropy of the shifted labels; `None` without labels, NaN where all are ignored.
    pub loss: Option<f32>,
    /// `[B, kept columns, vocab]`.
    pub logits: Values,
    /// `layers + 1` times `[B, S, D]`, where asked for; the last is after the final norm.
    pub hidden_states: Vec<Values>,
    /// For each layer `[B, heads, S, S]`, where asked for.
    pub attentions: Vec<Values>,
    /// `[image tokens, D]`.
    pub image_hidden_states: Option<Values>,
    /// `[video tokens, D]`.
    pub video_hidden_states: Option<Values>,
}

impl LlavaNextVideoModel {
    /// Runs a batch through the whole model once.
    ///
    /// # Errors
    /// The inputs do not fit the model or one another; labels together with `logits_to_keep`.
    pub fn forward(
        &self,
        inputs: &ModelInputs,
        labels: Option<&[Vec<i64>]>,
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        let columns = inputs.input_ids.first().map_or(0, Vec::len);
        let kept = kept_columns(&options.logits_to_keep, columns)?;
        check_labels(
            labels,
            inputs,
            kept.len(),
            self.config().text_config.vocab_size,
        )?;
        let embedded = self.embed(inputs, &mut |_, _| Ok(()))?;
        let (blocks, count) = blocks_for(&embedded.rows);
        let mut cache = self.language_model().new_cache(count);
        let batch = whole_rows(&embedded.rows, columns, &blocks);
        let keep = narrowest(&embedded.rows, columns, &options.logits_to_keep);
        let taps = Taps {
            hidden_states: options.hidden_states,
            attentions: options.attentions,
        };
        let out = self.decode(
            embedded.embeds,
            &batch,
            &mut cache,
            (keep, taps),
            &mut |_| Ok(()),
        )?;

        let grid = Grid {
            rows: &embedded.rows,
            columns,
        };
        let logits = self
            .language_model()
            .logits(self.ops(), &out.last_hidden_state);
        let logits = grid.spread_kept(&self.ops().download(&logits), logits.cols(), keep, &kept);
        let loss = labels.map(|labels| cross_entropy(&logits, labels, &embedded.rows));
        let values = |b: &Buffer| Values {
            shape: vec![b.rows(), b.cols()],
            data: self.ops().download(b),
        };
        let spread = |b: &Buffer| grid.spread(&self.ops().download(b), b.cols());
        let heads = self.config().text_config.num_attention_heads;
        Ok(ForwardOutput {
            loss,
            logits,
            hidden_states: out.hidden_states.iter().map(spread).collect(),
            attentions: out
                .attentions
                .iter()
                .map(|a| grid.spread_attention(a, heads))
                .collect(),
            image_hidden_states: embedded.image_features.as_ref().map(values),
            video_hidden_states: embedded.video_features.as_ref().map(values),
        })
    }
}

fn kept_columns(keep: &LogitsToKeep, columns: usize) -> Result<Vec<usize>> {
    match keep {
        LogitsToKeep::All | LogitsToKeep::Last(0) => Ok((0..columns).collect()),
        LogitsToKeep::Last(n) => Ok((columns.saturating_sub(*n)..columns).collect()),
        LogitsToKeep::Columns(list) => match list.iter().find(|c| **c >= columns) {
            None => Ok(list.clone()),
            Some(c) => Err(Error::Input(format!(
                "logits are asked for at column {c}, but the batch has {columns} columns"
            ))),
        },
    }
}

/// The fewest rows that the last layer must go on with.
fn narrowest(rows: &[EmbeddedRow], columns: usize, keep: &LogitsToKeep) -> Keep {
    let LogitsToKeep::Last(n) = *keep else {
        return Keep::All;
    };
    // The last columns are the last tokens only where no row ends in padding or has gaps.
    let dense = |row: &EmbeddedRow| {
        row.columns
            .first()
            .is_some_and(|c| *c as usize + row.ids.len() == columns)
    };
    if n > 0 && rows.iter().all(dense) {
        Keep::Last(n)
    } else {
        Keep::All
    }
}

fn check_labels(
    labels: Option<&[Vec<i64>]>,
    inputs: &ModelInputs,
    kept: usize,
    vocabulary: usize,
) -> Result<()> {
    let Some(labels) = labels else { return Ok(()) };
    let columns = inputs.input_ids.first().map_or(0, Vec::len);
    let same =
        labels.len() == inputs.input_ids.len() && labels.iter().all(|row| row.len() == columns);
    if !same {
        return Err(Error::Input(format!(
            "labels must have the shape of input_ids, {} x {columns}",
            inputs.input_ids.len()
        )));
    }
    if kept != columns {
        return Err(Error::Input(
            "a loss needs the logits of every position: leave logits_to_keep out, or the labels"
                .into(),
        ));
    }
    let bad = |label: &&i64| **label != IGNORE_INDEX && !(0..vocabulary as i64).contains(*label);
    match labels.iter().flatten().find(bad) {
        None => Ok(()),
        Some(label) => Err(Error::Input(format!(
            "label {label} is neither a token id below {vocabulary} nor {IGNORE_INDEX} (ignored)"
        ))),
    }
}

/// The padded places of a batch.
struct Grid<'a> {
    rows: &'a [EmbeddedRow],
    columns: usize,
}

impl Grid<'_> {
    /// Unpadded rows `[tokens, width]` to `[B, S, width]`.
    fn spread(&self, data: &[f32], width: usize) -> Values {
        let all: Vec<usize> = (0..self.columns).collect();
        self.spread_kept(data, width, Keep::All, &all)
    }

    /// The kept tokens' rows to `[B, wanted columns, width]`.
    fn spread_kept(&self, data: &[f32], width: usize, keep: Keep, wanted: &[usize]) -> Values {
        let mut out = vec![0.0; self.rows.len() * wanted.len() * width];
        let mut first = 0;
        for (b, row) in self.rows.iter().enumerate() {
            let kept = keep.rows(row.ids.len());
            for (w, column) in wanted.iter().enumerate() {
                let Ok(token) = row.columns.binary_search(&(*column as u32)) else {
                    continue;
                };
                let source = (first + token - kept.start) * width;
                let target = (b * wanted.len() + w) * width;
                out[target..target + width].copy_from_slice(&data[source..source + width]);
            }
            first += kept.len();
        }
        Values {
            shape: vec![self.rows.len(), wanted.len(), width],
            data: out,
        }
    }

    /// `[heads, len, len]` of each row to `[B, heads, S, S]`.
    fn spread_attention(&self, weights: &[Vec<f32>], heads: usize) -> Values {
        let s = self.columns;
        let mut out = vec![0.0; self.rows.len() * heads * s * s];
        for (b, (row, own)) in self.rows.iter().zip(weights).enumerate() {
            let len = row.ids.len();
            for head in 0..heads {
                for (i, q) in row.columns.iter().enumerate() {
                    let target = ((b * heads + head) * s + *q as usize) * s;
                    for (j, k) in row.columns.iter().enumerate() {
                        out[target + *k as usize] = own[(head * len + i) * len + j];
                    }
                }
            }
        }
        Values {
            shape: vec![self.rows.len(), heads, s, s],
            data: out,
        }
    }
}

/// Mean of `-log softmax(logits[t])[label[t + 1]]` over the labels that count.
///
/// A label whose predicting position is padding is left out: its logits mean nothing.
fn cross_entropy(logits: &Values, labels: &[Vec<i64>], rows: &[EmbeddedRow]) -> f32 {
    let [_, columns, vocabulary] = logits.shape[..] else {
        return f32::NAN;
    };
    let (mut sum, mut count) = (0.0f64, 0usize);
    for (b, (row, labels)) in rows.iter().zip(labels).enumerate() {
        for column in &row.columns {
            let t = *column as usize;
            let Some(label) = labels.get(t + 1).filter(|l| **l != IGNORE_INDEX) else {
                continue;
            };
            let scores = &logits.data[(b * columns + t) * vocabulary..][..vocabulary];
            let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
            let total: f64 = scores.iter().map(|s| (*s as f64 - top).exp()).sum();
            sum += total.ln() + top - scores[*label as usize] as f64;
            count += 1;
        }
    }
    (sum / count as f64) as f32
}
