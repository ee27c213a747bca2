//! Channels brought to like sizes before the decoder's weights are rounded to 8 or 4 bits.
//!
//! Decision: what a product `W x` loses when both are rounded grows with the largest channels of `x` and the
//! largest columns of `W`. `W·s` and `x/s` give the same product, and with `s` a power of `rms(x) / rms(W)` for
//! each channel the loss is smaller. `x/s` costs nothing at run time: the norm before the product takes it, or the
//! rows of the matrix that the channel comes from (SmoothQuant, arXiv 2211.10438, and AWQ, arXiv 2306.00978, do it
//! so). Scales are powers of two, so weights and norms stay exact in bf16 and the model is the same one.
//!
//! | product | its channels are taken back by |
//! | --- | --- |
//! | q, k, v | `input_layernorm` |
//! | o | the rows of v (its bias too), alike for all heads that share a key's head |
//! | gate, up | `post_attention_layernorm` |
//! | down | the rows of up (its bias too) |
//! | head | the last norm; where the embedding table is the head, [`TABLE_SCALES`] |
//!
//! How large the channels of `x` are is measured: one short text goes through the float layers, each right
//! before it is packed, so that no two are in memory and the file is read once. The text is fixed, as are its
//! tokens where a checkpoint has no tokenizer; a checkpoint quantises to the same bytes always. The first token has
//! channels a thousand times larger than the others: measured without it, 8 bits lose more than with no scales at
//! all; counted as one of so few, 4 bits lose more than they must.
//!
//! Refused: bitsandbytes' formats, whose codes must be those of bitsandbytes; the vision tower, where it
//! was not tried; checkpoints of random weights, whose channels are alike.

use lnv_kernels::{
    Buffer, Device, KV_BLOCK, KernelError, KvCache, KvDtype, Ops, PartScales, Weight, WeightData,
};
use rayon::prelude::*;

use super::batch::{Batch, BatchSpan, Keep};
use super::formats::Formats;
use super::language_model::{DecoderLayer, Pass, Scratch, cos_sin, heads};
use super::layers::RmsNorm;
use super::loader::{Loader, Loading};
use super::weights::{Checkpoint, widen};
use crate::config::{Dtype, TextConfig};
use crate::error::{Error, Result};
use crate::processor::tokenizer::Tokenizer;

/// What rows of a table that is embedding and head at once are multiplied by when they are embedded.
pub(super) const TABLE_SCALES: &str = "language_model.embed_tokens.scales";

/// Tokens that are looked at.
const TOKENS: usize = 192;

/// How much the first token counts: as in a text of four times as many tokens. Its channels are so large
/// that it would decide alone, and 4 bits would lose more.
const FIRST: f64 = 0.25;

/// Ordinary prose, a prompt, numbers, a list, something like code: what a model is used for.
const TEXT: &str = "A chat between a person and an assistant who answers with care. USER: What happens in this video? \
ASSISTANT: A small child in reading glasses sits on a bed and turns the pages of a book, one after another. \
At 9:30 on 12 March 2019 two dogs ran across the street (about 40 m); \"Where are they going?\" asked the man \
in the red coat.\n1. Open `a.txt`.\n2. Print the result = read(path).\n\
When the rain had stopped, her grandmother opened the window and told us how the village used to be: no cars, a single \
shop, and a river so clear that you could count the stones in it. \"We never locked a door,\" she said. In 1961 the \
company built a bridge of steel and concrete, which cost 2.4 million; since then everything has changed, although the \
old mill, now a museum, still grinds flour on Sundays. USER: Why did she smile? ASSISTANT: Because it reminded her of \
the summers of her childhood, I think, when nobody was in a hurry.";

/// Of the ratio of squares. A quarter is where the loss is least if it is shared by a whole row, as with
/// 8 bits, which hardly feel the difference; with a scale for 64 values there is less to even out.
const EXPONENT: f64 = 0.2;

/// No scale is beyond two to this power, or below one over it.
const LARGEST_POWER: f64 = 12.0;

/// What is added to sizes relative to their mean, so that a channel that is never used gets no scale that is
/// out of all proportion.
const FLOOR: f64 = 1e-4;

/// What a tensor is multiplied by: row by row, column by column.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Scales {
    /// A factor for each row, or each value of a vector.
    pub(super) rows: Option<Vec<f32>>,
    /// A factor for each column.
    pub(super) columns: Option<Vec<f32>>,
}

impl Scales {
    /// As packing takes them.
    pub(super) fn of_part(&self) -> PartScales<'_> {
        PartScales {
            rows: self.rows.as_deref(),
            columns: self.columns.as_deref(),
        }
    }
}

/// The scales of some tensors, by canonical name.
pub(super) type Named = Vec<(String, Scales)>;

/// A text on its way through the float layers of a checkpoint.
pub(super) struct Balance<'a> {
    config: &'a TextConfig,
    checkpoint: &'a Checkpoint,
    formats: Formats,
    ops: Ops,
    positions: Vec<u32>,
    blocks: Vec<u32>,
    cache: KvCache,
    /// The same for all layers.
    cos_sin: Buffer,
    /// The weights of the layer before: memory for the next.
    spare: Vec<Weight>,
    /// The residual stream, `[tokens, D]`.
    x: Buffer,
}

impl<'a> Balance<'a> {
    /// Embeds the text.
    pub(super) fn begin(checkpoint: &'a Checkpoint, config: &'a TextConfig) -> Result<Self> {
        let failed = |e: KernelError| Error::Device(e.to_string());
        let formats = Formats::dense_only(Dtype::Bf16);
        let ops = Ops::of_type(Device::Cpu, formats.dense()).map_err(failed)?;
        let (d, ids) = (config.hidden_size, sample(checkpoint, config.vocab_size));
        let table = checkpoint.tensor(
            "language_model.embed_tokens.weight",
            &[config.vocab_size, d],
        )?;
        let embedded: Vec<f32> = ids
            .iter()
            .flat_map(|id| widen(table.row(*id as usize, d)))
            .collect();
        let blocks: Vec<u32> = (0..ids.len().div_ceil(KV_BLOCK) as u32).collect();
        let cache = ops.kv_cache(1, heads(config), blocks.len(), KvDtype::Bf16);
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        Ok(Self {
            x: ops.upload(ids.len(), d, &embedded),
            cos_sin: cos_sin(&ops, config, &one_span(&positions, &blocks)),
            positions,
            cache: cache.map_err(failed)?,
            blocks,
            spare: Vec::new(),
            ops,
            formats,
            config,
            checkpoint,
        })
    }

    /// Goes through layer `i`, the next one, and says how its tensors are to be scaled.
    pub(super) fn layer(&mut self, i: usize) -> Result<Named> {
        let (config, checkpoint) = (self.config, self.checkpoint);
        let ops = self.ops.clone();
        let loading = Loading::apart(&ops, checkpoint, std::mem::take(&mut self.spare));
        let loader = Loader::new(&self.formats, &loading, None);
        let layer = DecoderLayer::load(&loader, config, i)?;
        let mut scratch = Scratch::new(&self.ops, config, self.positions.len());
        let mut into_qkv = self.ops.scratch(self.x.rows(), self.x.cols());
        layer
            .input_layernorm
            .forward(&self.ops, &self.x, &mut into_qkv);
        let into_qkv = mean_squares(&self.ops, &into_qkv);
        self.pass(&layer, &mut scratch);
        self.spare = layer.into_weights().into();
        let squares = |buffer: &Buffer| mean_squares(&self.ops, buffer);

        let name = |part: &str| format!("language_model.layers.{i}.{part}");
        let columns = |parts: &[(&str, usize)], k: usize| -> Result<Vec<f64>> {
            let mut sum = vec![0.0; k];
            for (part, n) in parts {
                let tensor = checkpoint.tensor(&name(&format!("{part}.weight")), &[*n, k])?;
                add(&mut sum, &column_squares(tensor, *n, k));
            }
            Ok(sum)
        };
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        );
        let shared = |values: &[f64]| over_shared_heads(values, config);
        let of_qkv = [
            ("self_attn.q_proj", q),
            ("self_attn.k_proj", kv),
            ("self_attn.v_proj", kv),
        ];
        let of_mlp = [("mlp.gate_proj", f), ("mlp.up_proj", f)];
        let qkv = scales(&into_qkv, &columns(&of_qkv, d)?);
        let o = scales(
            &shared(&squares(&scratch.attended)),
            &shared(&columns(&[("self_attn.o_proj", d)], q)?),
        );
        let gate_up = scales(&squares(&scratch.normed), &columns(&of_mlp, d)?);
        let down = scales(
            &squares(&scratch.inner),
            &columns(&[("mlp.down_proj", d)], f)?,
        );

        let rows = |scales: &[f32]| Some(inverse(scales));
        let columns = |scales: &[f32]| Some(scales.to_vec());
        let list = [
            ("input_layernorm.weight", rows(&qkv), None),
            ("self_attn.q_proj.weight", None, columns(&qkv)),
            ("self_attn.k_proj.weight", None, columns(&qkv)),
            ("self_attn.v_proj.weight", rows(&o), columns(&qkv)),
            ("self_attn.v_proj.bias", rows(&o), None),
            (
                "self_attn.o_proj.weight",
                None,
                Some(for_all_heads(&o, config)),
            ),
            ("post_attention_layernorm.weight", rows(&gate_up), None),
            ("mlp.gate_proj.weight", None, columns(&gate_up)),
            ("mlp.up_proj.weight", rows(&down), columns(&gate_up)),
            ("mlp.up_proj.bias", rows(&down), None),
            ("mlp.down_proj.weight", None, columns(&down)),
        ];
        let named = list.into_iter();
        Ok(named
            .map(|(part, rows, columns)| (name(part), Scales { rows, columns }))
            .collect())
    }

    /// After the last layer: how the last norm and the head are to be scaled.
    pub(super) fn head(self) -> Result<Named> {
        const NORM: &str = "language_model.norm";
        let (d, v) = (self.config.hidden_size, self.config.vocab_size);
        let loading = Loading::apart(&self.ops, self.checkpoint, Vec::new());
        let loader = Loader::new(&self.formats, &loading, None);
        let norm = RmsNorm::load(&loader, NORM, d, self.config.rms_norm_eps)?;
        let mut normed = self.ops.scratch(self.x.rows(), d);
        norm.forward(&self.ops, &self.x, &mut normed);
        let head = match self.config.tie_word_embeddings {
            true => "language_model.embed_tokens.weight",
            false => "lm_head.weight",
        };
        let tensor = self.checkpoint.tensor(head, &[v, d])?;
        let scales = scales(
            &mean_squares(&self.ops, &normed),
            &column_squares(tensor, v, d),
        );
        let rows = |rows| Scales {
            rows: Some(rows),
            columns: None,
        };
        let mut list = vec![(format!("{NORM}.weight"), rows(inverse(&scales)))];
        if self.config.tie_word_embeddings {
            list.push((TABLE_SCALES.to_owned(), rows(inverse(&scales))));
        }
        let columns = Scales {
            rows: None,
            columns: Some(scales),
        };
        list.push((head.to_owned(), columns));
        Ok(list)
    }

    fn pass(&mut self, layer: &DecoderLayer, scratch: &mut Scratch) {
        let batch = one_span(&self.positions, &self.blocks);
        let slots = batch.slots();
        let pass = Pass {
            ops: &self.ops,
            config: self.config,
            batch: &batch,
            slots: &slots,
            cos_sin: &self.cos_sin,
            eager: false,
        };
        let x = std::mem::replace(&mut self.x, self.ops.buffer(0, 0));
        (self.x, _) = layer.forward(&pass, x, (&mut self.cache, 0), Keep::All, scratch);
    }
}

/// The whole text at once.
fn one_span<'b>(positions: &[u32], blocks: &'b [u32]) -> Batch<'b> {
    let span = BatchSpan {
        positions: positions.to_vec(),
        rope_length: positions.len(),
        kv_len: positions.len(),
        blocks,
    };
    Batch { spans: vec![span] }
}

/// The tokens of the text; where a checkpoint has no tokenizer, tokens spread over its vocabulary.
fn sample(checkpoint: &Checkpoint, vocab_size: usize) -> Vec<u32> {
    let known = |id: &u32| (*id as usize) < vocab_size;
    let encoded = Tokenizer::from_files(checkpoint.files())
        .and_then(|tokenizer| tokenizer.encode(TEXT, true))
        .unwrap_or_default();
    let ids: Vec<u32> = encoded.into_iter().filter(known).take(TOKENS).collect();
    if ids.len() == TOKENS {
        return ids;
    }
    // A golden ratio's steps: evenly spread, and never the same twice.
    let step = |i: usize| (i as f64 * 0.618_033_988_749_895).fract();
    (0..TOKENS)
        .map(|i| (step(i) * vocab_size as f64) as u32)
        .collect()
}

/// The sum of the squares of each column of a matrix.
fn column_squares(data: WeightData<'_>, n: usize, k: usize) -> Vec<f64> {
    /// Rows that a thread takes at once.
    const ROWS: usize = 64;
    let chunk = |chunk: usize| {
        let (first, mut sum) = (chunk * ROWS, vec![0.0_f32; k]);
        for row in first..n.min(first + ROWS) {
            let row = widen(data.row(row, k));
            sum.iter_mut().zip(&row).for_each(|(s, v)| *s += v * v);
        }
        sum
    };
    let chunks: Vec<Vec<f32>> = (0..n.div_ceil(ROWS)).into_par_iter().map(chunk).collect();
    // In one order, so that the last bits do not depend on which thread was done first.
    let mut all = vec![0.0; k];
    for sum in &chunks {
        let wide = sum.iter().map(|s| f64::from(*s));
        all.iter_mut().zip(wide).for_each(|(all, s)| *all += s);
    }
    all
}

/// The mean of the squares of each column of activations.
fn mean_squares(ops: &Ops, x: &Buffer) -> Vec<f64> {
    let weights = std::iter::once(FIRST).chain(std::iter::repeat(1.0));
    let (mut sum, mut all) = (vec![0.0; x.cols()], 0.0);
    for (row, weight) in ops.download(x).chunks_exact(x.cols()).zip(weights) {
        let squares = row.iter().map(|v| weight * f64::from(*v).powi(2));
        sum.iter_mut().zip(squares).for_each(|(sum, v)| *sum += v);
        all += weight;
    }
    sum.iter_mut().for_each(|sum| *sum /= all);
    sum
}

fn add(to: &mut [f64], from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// The scales of channels with these squares of activations and of weights: powers of two.
fn scales(x: &[f64], w: &[f64]) -> Vec<f32> {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let (x_mean, w_mean) = (mean(x), mean(w));
    // A model of zeros, or one that overflows, stays as it is.
    if !(x_mean.is_normal() && w_mean.is_normal()) {
        return vec![1.0; x.len()];
    }
    let power =
        |(x, w): (&f64, &f64)| EXPONENT * ((x / x_mean + FLOOR) / (w / w_mean + FLOOR)).log2();
    let powers: Vec<f64> = x.iter().zip(w).map(power).collect();
    let middle = mean(&powers);
    let rounded = powers.iter().map(|power| {
        (power - middle)
            .round()
            .clamp(-LARGEST_POWER, LARGEST_POWER)
    });
    rounded.map(|power| power.exp2() as f32).collect()
}

fn inverse(scales: &[f32]) -> Vec<f32> {
    scales.iter().map(|scale| 1.0 / scale).collect()
}

/// The means over the heads that share a head of values: from `[heads * d]` to `[kv heads * d]`.
fn over_shared_heads(values: &[f64], config: &TextConfig) -> Vec<f64> {
    let (d, heads) = (config.head_dim, config.num_attention_heads);
    let group = heads / config.num_key_value_heads;
    let mut means = vec![0.0; config.num_key_value_heads * d];
    for (head, values) in values.chunks_exact(d).enumerate() {
        add(&mut means[head / group * d..][..d], values);
    }
    means.iter_mut().for_each(|mean| *mean /= group as f64);
    means
}

/// From `[kv heads * d]` to `[heads * d]`.
fn for_all_heads(scales: &[f32], config: &TextConfig) -> Vec<f32> {
    let group = config.num_attention_heads / config.num_key_value_heads;
    let heads = scales.chunks_exact(config.head_dim);
    heads.flat_map(|head| head.repeat(group)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::super::language_model::LanguageModel;
    use super::*;
    use crate::config::{CheckpointFiles, LlavaNextVideoConfig};
    use crate::model::Taps;

    /// Scores of some tokens by a decoder in f32, with or without scales.
    fn logits(name: &str, balanced: bool) -> Vec<f32> {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden");
        let files = CheckpointFiles::open(&golden.join(name)).unwrap();
        let config = LlavaNextVideoConfig::read(&files).unwrap().text_config;
        let checkpoint = Checkpoint::open(&files).unwrap();
        let formats = Formats {
            tied: config.tie_word_embeddings,
            balanced,
            head_scaled: balanced,
            ..Formats::dense_only(Dtype::F32)
        };
        let ops = Ops::of_type(Device::Cpu, formats.dense()).unwrap();
        let loading = Loading::apart(&ops, &checkpoint, Vec::new());
        let loader = Loader::new(&formats, &loading, None);
        let model = LanguageModel::load(&loader, &config, KvDtype::F32).unwrap();
        let scaled = loading.has_scales();
        assert_eq!(scaled, balanced);
        let ids: Vec<u32> = (3..23).collect();
        let blocks = [0, 1];
        let span = BatchSpan {
            positions: (0..20).collect(),
            rope_length: 20,
            kv_len: 20,
            blocks: &blocks,
        };
        let batch = Batch { spans: vec![span] };
        let mut cache = model.new_cache(&ops, 2).unwrap();
        let x = model.embed(&ops, &ids);
        let read = (Keep::All, Taps::default());
        let out = model.forward(&ops, x, &batch, &mut cache, read, &mut |_| Ok(()));
        ops.download(&model.logits(&ops, &out.unwrap().last_hidden_state))
    }

    /// Heads of their own and shared, biases, a tied table, windows: bit for bit the same model.
    #[test]
    fn scales_do_not_change_a_model() {
        for name in [
            "llama-default",
            "qwen2-windows",
            "bf16-sharded-biases",
            "llama3-rope-conv-pool",
        ] {
            assert_eq!(logits(name, true), logits(name, false), "{name}");
        }
    }

    #[test]
    fn scales_are_powers_of_two_about_one_and_even_sizes_out() {
        let x = [1.0, 4096.0, 1.0, 0.0, 1e-30, 1.0];
        let w = [1.0, 1.0, 256.0, 1.0, 0.0, 1.0];
        let found = scales(&x, &w);
        assert!(found.iter().all(|s| s.log2().fract() == 0.0), "{found:?}");
        assert!(found[1] > found[0] && found[2] < found[0], "{found:?}");
        assert_eq!(found[0], found[5]);
        // A channel that nothing goes through has a scale within reason.
        assert!(
            found.iter().all(|s| (0.01..=100.0).contains(s)),
            "{found:?}"
        );
        for broken in [[0.0; 2], [f64::NAN; 2], [f64::INFINITY; 2]] {
            assert_eq!(scales(&broken, &[1.0, 2.0]), [1.0, 1.0]);
            assert_eq!(scales(&[1.0, 2.0], &broken), [1.0, 1.0]);
        }
    }

    #[test]
    fn columns_are_summed_over_all_rows() {
        let (n, k) = (131, 3);
        let values: Vec<f32> = (0..n * k).map(|i| (i % 7) as f32 - 3.0).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let found = column_squares(WeightData::F32(&bytes), n, k);
        for (column, found) in found.iter().enumerate() {
            let column = values.iter().skip(column).step_by(k);
            let expected: f64 = column.map(|v| f64::from(*v).powi(2)).sum();
            assert_eq!(*found, expected);
        }
    }
}
