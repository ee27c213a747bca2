//! One forward pass over a batch, as `LlavaNextVideoForConditionalGeneration.forward` gives it: logits,
//! loss, hidden states, attentions, with the cache of earlier passes where the caller keeps one.
//! Generation does not come through here; the engine has a cache of its own.

use lnv_kernels::{Buffer, KV_BLOCK, KvCache};

use super::batch::{Batch, BatchSpan, Keep, Taps};
use super::llava_next_video::{EmbeddedRow, InputsEmbeds, LlavaNextVideoModel, unpad_rows};
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
    /// For each layer `[B, heads, S, S]` (with a cache, its columns too), where asked for.
    pub attentions: Vec<Values>,
    /// `[image tokens, D]`.
    pub image_hidden_states: Option<Values>,
    /// `[video tokens, D]`.
    pub video_hidden_states: Option<Values>,
}

/// What a pass reads: ids with media, or embeddings that the caller made.
#[derive(Debug, Clone, Copy)]
pub enum ForwardSource<'a> {
    /// Token ids and media (`input_ids`, `pixel_values`, `pixel_values_videos`).
    Inputs(&'a ModelInputs),
    /// `inputs_embeds` `[B, S, D]` with the mask of its columns.
    Embeds(&'a Values, &'a [Vec<bool>]),
}

/// The arguments of one pass.
#[derive(Debug, Clone, Copy)]
pub struct ForwardInputs<'a> {
    /// What is read.
    pub source: ForwardSource<'a>,
    /// `[B][S]`; without them positions count the columns, those in the cache first.
    pub position_ids: Option<&'a [Vec<u32>]>,
    /// `[B][S]`, [`IGNORE_INDEX`] where no loss is wanted.
    pub labels: Option<&'a [Vec<i64>]>,
}

/// The cache of earlier passes over the same rows (`past_key_values`), to be continued with text or
/// with new media. Made empty by `default()`.
#[derive(Default)]
pub struct PastKeyValues {
    cache: Option<KvCache>,
    blocks: u32,
    columns: usize,
    rows: Vec<RowPast>,
}

/// What the cache holds of one row.
#[derive(Debug, Clone, Default)]
struct RowPast {
    blocks: Vec<u32>,
    /// The column that each cached token had.
    columns: Vec<u32>,
}

impl PastKeyValues {
    /// Columns so far, padding included (`get_seq_length`).
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Makes room for the new tokens of every row and notes their columns.
    fn extend(&mut self, model: &LlavaNextVideoModel, rows: &[EmbeddedRow]) -> Result<()> {
        if self.rows.is_empty() {
            self.rows.resize(rows.len(), RowPast::default());
        }
        if self.rows.len() != rows.len() {
            return Err(Error::Input(format!(
                "the cache holds {} rows, but the batch has {}",
                self.rows.len(),
                rows.len()
            )));
        }
        for (past, row) in self.rows.iter_mut().zip(rows) {
            past.columns
                .extend(row.columns.iter().map(|c| c + self.columns as u32));
            let needed = past.columns.len().div_ceil(KV_BLOCK);
            while past.blocks.len() < needed {
                past.blocks.push(self.blocks);
                self.blocks += 1;
            }
        }
        let blocks = self.blocks as usize;
        match &mut self.cache {
            Some(cache) => cache
                .grow(blocks)
                .map_err(|e| Error::Device(e.to_string()))?,
            None => self.cache = Some(model.language_model().new_cache(model.ops(), blocks)?),
        }
        Ok(())
    }
}

impl LlavaNextVideoModel {
    /// Runs a batch through the whole model once, with a fresh cache.
    ///
    /// # Errors
    /// The inputs do not fit the model or one another; labels together with `logits_to_keep`.
    pub fn forward(
        &self,
        inputs: &ModelInputs,
        labels: Option<&[Vec<i64>]>,
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        let source = ForwardSource::Inputs(inputs);
        let inputs = ForwardInputs {
            source,
            position_ids: None,
            labels,
        };
        self.forward_with(&inputs, options, &mut PastKeyValues::default())
    }

    /// Runs the new columns of a batch, whose earlier columns are in `past`; new media may be among
    /// them. The mask is that of the new columns.
    ///
    /// # Errors
    /// As [`LlavaNextVideoModel::forward`]; a batch of another size than the cache's; positions or
    /// embeddings of another shape. After an error the cache is not to be used again.
    pub fn forward_with(
        &self,
        inputs: &ForwardInputs<'_>,
        options: &ForwardOptions,
        past: &mut PastKeyValues,
    ) -> Result<ForwardOutput> {
        let embedded = match inputs.source {
            ForwardSource::Inputs(inputs) => self.embed(inputs, &mut |_, _| Ok(()))?,
            ForwardSource::Embeds(values, mask) => self.given_embeds(values, mask)?,
        };
        let columns = match inputs.source {
            ForwardSource::Inputs(inputs) => inputs.input_ids.first().map_or(0, Vec::len),
            ForwardSource::Embeds(values, _) => values.shape[1],
        };
        let shape = (embedded.rows.len(), columns);
        let kept = kept_columns(&options.logits_to_keep, columns)?;
        check_labels(
            inputs.labels,
            shape,
            kept.len(),
            self.config().text_config.vocab_size,
        )?;
        let before = past.columns;
        past.extend(self, &embedded.rows)?;
        let Some(mut cache) = past.cache.take() else {
            return Err(Error::Input(
                "the cache is of an earlier pass that failed".into(),
            ));
        };
        let batch = spans(&embedded.rows, past, shape, inputs.position_ids)?;
        let keep = narrowest(&embedded.rows, columns, &options.logits_to_keep);
        let taps = Taps {
            hidden_states: options.hidden_states,
            attentions: options.attentions,
        };
        let read = (keep, taps);
        let out = self.decode(embedded.embeds, &batch, &mut cache, read, &mut |_| Ok(()))?;
        past.cache = Some(cache);
        past.columns = before + columns;

        let grid = Grid {
            rows: &embedded.rows,
            columns,
        };
        let logits = self
            .language_model()
            .logits(self.ops(), &out.last_hidden_state);
        let logits = grid.spread_kept(&self.ops().download(&logits), logits.cols(), keep, &kept);
        let loss = inputs
            .labels
            .map(|labels| cross_entropy(&logits, labels, &embedded.rows));
        let values = |b: &Buffer| Values {
            shape: vec![b.rows(), b.cols()],
            data: self.ops().download(b),
        };
        let spread = |b: &Buffer| grid.spread(&self.ops().download(b), b.cols());
        let heads = self.config().text_config.num_attention_heads;
        let weights = |a: &Vec<Vec<f32>>| grid.spread_attention(a, heads, past);
        Ok(ForwardOutput {
            loss,
            logits,
            hidden_states: out.hidden_states.iter().map(spread).collect(),
            attentions: out.attentions.iter().map(weights).collect(),
            image_hidden_states: embedded.image_features.as_ref().map(values),
            video_hidden_states: embedded.video_features.as_ref().map(values),
        })
    }

    /// The embeddings of ids, `[B, S, D]`, before any media are merged (`get_input_embeddings`).
    ///
    /// # Errors
    /// Rows of different lengths, or an id outside the vocabulary.
    pub fn embed_ids(&self, input_ids: &[Vec<u32>]) -> Result<Values> {
        let columns = input_ids.first().map_or(0, Vec::len);
        if input_ids.iter().any(|row| row.len() != columns) {
            return Err(Error::Input(
                "the rows of ids have different lengths".into(),
            ));
        }
        let ids = input_ids.concat();
        self.check_ids(&ids)?;
        let embeds = self.language_model().embed(self.ops(), &ids);
        let shape = vec![input_ids.len(), columns, embeds.cols()];
        Ok(Values {
            shape,
            data: self.ops().download(&embeds),
        })
    }

    /// Embeddings that the caller made, without what the mask hides.
    fn given_embeds(&self, values: &Values, mask: &[Vec<bool>]) -> Result<InputsEmbeds> {
        let width = self.config().text_config.hidden_size;
        let fits = matches!(values.shape[..], [b, s, d] if d == width
            && b == mask.len()
            && mask.iter().all(|row| row.len() == s)
            && values.data.len() == b * s * d);
        if !fits {
            return Err(Error::Input(format!(
                "inputs_embeds of shape {:?} do not fit: [batch, columns, {width}] is needed, with \
                 a mask for each column",
                values.shape
            )));
        }
        // The ids are only counted from here on.
        let ids: Vec<Vec<u32>> = mask.iter().map(|row| vec![0; row.len()]).collect();
        let rows = unpad_rows(&ids, mask)?;
        let columns = values.shape[1];
        let shown = rows.iter().enumerate().flat_map(|(b, row)| {
            row.columns
                .iter()
                .map(move |c| (b * columns + *c as usize) * width)
        });
        let data: Vec<f32> = shown
            .flat_map(|at| values.data[at..at + width].iter().copied())
            .collect();
        let embeds = self.ops().upload(data.len() / width, width, &data);
        Ok(InputsEmbeds {
            embeds,
            rows,
            image_features: None,
            video_features: None,
        })
    }
}

/// The new tokens of every row, behind what the cache holds.
fn spans<'a>(
    rows: &[EmbeddedRow],
    past: &'a PastKeyValues,
    (count, columns): (usize, usize),
    position_ids: Option<&[Vec<u32>]>,
) -> Result<Batch<'a>> {
    if let Some(ids) = position_ids
        && (ids.len() != count || ids.iter().any(|row| row.len() != columns))
    {
        return Err(Error::Input(format!(
            "position_ids must have the shape of the new columns, {count} x {columns}"
        )));
    }
    let position = |row: usize, column: u32| match position_ids {
        Some(ids) => ids[row][column as usize],
        None => past.columns as u32 + column,
    };
    let longest = match position_ids {
        Some(ids) => ids.iter().flatten().max().map_or(0, |p| *p as usize + 1),
        None => past.columns + columns,
    };
    let span = |(b, row): (usize, &EmbeddedRow)| BatchSpan {
        positions: row.columns.iter().map(|c| position(b, *c)).collect(),
        rope_length: longest,
        kv_len: past.rows[b].columns.len(),
        blocks: &past.rows[b].blocks,
    };
    Ok(Batch {
        spans: rows.iter().enumerate().map(span).collect(),
    })
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
    (rows, columns): (usize, usize),
    kept: usize,
    vocabulary: usize,
) -> Result<()> {
    let Some(labels) = labels else { return Ok(()) };
    if labels.len() != rows || labels.iter().any(|row| row.len() != columns) {
        return Err(Error::Input(format!(
            "labels must have the shape of input_ids, {rows} x {columns}"
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

    /// `[heads, new, cached]` of each row to `[B, heads, S, all columns]`.
    fn spread_attention(&self, weights: &[Vec<f32>], heads: usize, past: &PastKeyValues) -> Values {
        let (s, keys) = (self.columns, past.columns);
        let mut out = vec![0.0; self.rows.len() * heads * s * keys];
        for (b, (row, own)) in self.rows.iter().zip(weights).enumerate() {
            let (new, cached) = (row.columns.len(), &past.rows[b].columns);
            for head in 0..heads {
                for (i, q) in row.columns.iter().enumerate() {
                    let target = ((b * heads + head) * s + *q as usize) * keys;
                    for (j, k) in cached.iter().enumerate() {
                        out[target + *k as usize] = own[(head * new + i) * cached.len() + j];
                    }
                }
            }
        }
        Values {
            shape: vec![self.rows.len(), heads, s, keys],
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
