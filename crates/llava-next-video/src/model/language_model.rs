//! The decoder: Llama, Mistral and Qwen2 behind one configuration.
//!
//! Every layer is `x += O(attention(rms(x)))`, `x += down(act(gate(rms(x))) * up(rms(x)))`. The residual
//! stream stays in f32 whatever the weights' type, which is never less exact than the reference's bf16.
//! The last layer writes all keys and values but goes on with the rows that somebody reads.

use lnv_kernels::{
    AttentionShape, Buffer, Epilogue, Heads, KvCache, KvDtype, Ops, Slot, Span, Vector, Weight,
};

use rayon::prelude::*;

use super::batch::{Batch, DecoderOutput, Keep, Taps};
use super::layers::{Linear, RmsNorm};
use super::loader::Loader;
use crate::config::{Dtype, TextConfig};
use crate::error::{Error, Result};

/// Called after each layer with the number done; an error stops the pass.
pub type OnLayer<'a> = &'a mut (dyn FnMut(usize) -> Result<()> + Send);

/// Rows of the rotary table that a thread makes at once.
const ROPE_ROWS: usize = 32;

/// `language_model` and `lm_head`.
pub struct LanguageModel {
    config: TextConfig,
    embed_tokens: Weight,
    /// What embedded rows are multiplied by, where the head's channels were brought to like sizes and the
    /// table is the head.
    embed_scales: Option<Vector>,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    /// `None` where the embedding table is the head.
    lm_head: Option<Weight>,
    kv_dtype: KvDtype,
}

pub(super) struct DecoderLayer {
    pub(super) input_layernorm: RmsNorm,
    qkv_proj: Linear,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    gate_up_proj: Linear,
    down_proj: Linear,
    window: Option<usize>,
}

/// Activations of one pass, reused by every layer.
pub(super) struct Scratch {
    pub(super) normed: Buffer,
    qkv: Buffer,
    pub(super) attended: Buffer,
    gate_up: Buffer,
    pub(super) inner: Buffer,
}

impl Scratch {
    pub(super) fn new(ops: &Ops, config: &TextConfig, rows: usize) -> Self {
        Self {
            normed: ops.scratch(rows, config.hidden_size),
            qkv: ops.scratch(rows, config.qkv_rows()),
            attended: ops.scratch(rows, config.num_attention_heads * config.head_dim),
            gate_up: ops.scratch(rows, 2 * config.intermediate_size),
            inner: ops.scratch(rows, config.intermediate_size),
        }
    }
}

/// What one layer needs to know of the pass.
pub(super) struct Pass<'a> {
    pub(super) ops: &'a Ops,
    pub(super) config: &'a TextConfig,
    pub(super) batch: &'a Batch<'a>,
    pub(super) slots: &'a [Slot],
    pub(super) cos_sin: &'a Buffer,
    pub(super) eager: bool,
}

impl LanguageModel {
    /// Loads `language_model.*` and `lm_head`; its caches are to be of type `kv_dtype`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn load(loader: &Loader<'_>, config: &TextConfig, kv_dtype: KvDtype) -> Result<Self> {
        let (v, d) = (config.vocab_size, config.hidden_size);
        let mut balance = loader.balance(config)?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for i in 0..config.num_hidden_layers {
            if let Some(balance) = &mut balance {
                loader.scale(balance.layer(i)?);
            }
            layers.push(DecoderLayer::load(loader, config, i)?);
        }
        if let Some(balance) = balance.filter(|_| loader.formats().head_scaled) {
            loader.scale(balance.head()?);
        }
        let table = [("language_model.embed_tokens.weight".to_owned(), v)];
        // A tied checkpoint may still carry the head; the reference ignores it then.
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(loader.matrix(&[("lm_head.weight".to_owned(), v)], d)?),
        };
        Ok(Self {
            embed_tokens: loader.matrix(&table, d)?,
            embed_scales: loader.table_scales(d)?,
            layers,
            norm: RmsNorm::load(loader, "language_model.norm", d, config.rms_norm_eps)?,
            lm_head,
            kv_dtype,
            config: config.clone(),
        })
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// Bytes kept in memory: `(all, those that a decode step reads)`.
    pub fn bytes(&self) -> (usize, usize) {
        let layers: usize = self.layers.iter().map(DecoderLayer::bytes).sum();
        let head = self.lm_head.as_ref().map_or(0, Weight::bytes);
        let read = layers
            + if head > 0 {
                head
            } else {
                self.embed_tokens.bytes()
            };
        (layers + head + self.embed_tokens.bytes(), read)
    }

    /// A cache without blocks, to be grown.
    pub fn empty_cache(&self, ops: &Ops) -> KvCache {
        ops.empty_kv_cache(self.layers.len(), heads(&self.config), self.kv_dtype)
    }

    /// A cache of `blocks` blocks for this decoder.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new_cache(&self, ops: &Ops, blocks: usize) -> Result<KvCache> {
        ops.kv_cache(
            self.layers.len(),
            heads(&self.config),
            blocks,
            self.kv_dtype,
        )
        .map_err(|e| Error::Device(e.to_string()))
    }

    /// How its caches keep keys and values.
    pub fn kv_dtype(&self) -> KvDtype {
        self.kv_dtype
    }

    /// Rows of the embedding table, `[ids, D]`.
    ///
    /// # Panics
    /// An id is not below `vocab_size`; callers check ids where they come in.
    pub fn embed(&self, ops: &Ops, ids: &[u32]) -> Buffer {
        let mut out = ops.buffer(ids.len(), self.config.hidden_size);
        ops.gather(&self.embed_tokens, ids, &mut out);
        if let Some(scales) = &self.embed_scales {
            ops.scale_columns(&mut out, scales);
        }
        out
    }

    /// Scores of the vocabulary for final states: `[rows, D]` to `[rows, vocab]`.
    pub fn logits(&self, ops: &Ops, last_hidden_state: &Buffer) -> Buffer {
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        let mut out = ops.buffer(last_hidden_state.rows(), head.n());
        ops.linear(
            last_hidden_state,
            head,
            None,
            Epilogue::Store(None),
            &mut out,
        );
        out
    }

    /// Runs the new tokens of `batch`, whose merged embeddings are the rows of `x`.
    ///
    /// # Errors
    /// `on_layer` asks to stop; the cache then holds keys that nobody may use.
    pub fn forward(
        &self,
        ops: &Ops,
        x: Buffer,
        batch: &Batch<'_>,
        cache: &mut KvCache,
        read: (Keep, Taps),
        on_layer: OnLayer<'_>,
    ) -> Result<DecoderOutput> {
        ops.together(|| self.layers(ops, x, batch, cache, read, on_layer))
    }

    fn layers(
        &self,
        ops: &Ops,
        mut x: Buffer,
        batch: &Batch<'_>,
        cache: &mut KvCache,
        (keep, taps): (Keep, Taps),
        on_layer: OnLayer<'_>,
    ) -> Result<DecoderOutput> {
        let slots = batch.slots();
        let cos_sin = cos_sin(ops, &self.config, batch);
        let pass = Pass {
            ops,
            config: &self.config,
            batch,
            slots: &slots,
            cos_sin: &cos_sin,
            eager: taps.attentions,
        };
        let (mut hidden_states, mut attentions) = (Vec::new(), Vec::new());
        let mut scratch = Scratch::new(ops, &self.config, x.rows());
        let last = self.layers.len() - 1;
        for (i, layer) in self.layers.iter().enumerate() {
            if taps.hidden_states {
                hidden_states.push(copy(ops, &x));
            }
            // Every row of the last layer is wanted where its states or weights are looked at.
            let whole = i < last || taps.hidden_states || taps.attentions;
            let keep_here = if whole { Keep::All } else { keep };
            let weights;
            let (cache, scratch) = ((&mut *cache, i), &mut scratch);
            (x, weights) = layer.forward(&pass, x, cache, keep_here, scratch);
            attentions.extend(weights);
            on_layer(i + 1)?;
        }
        let mut normed = ops.scratch(x.rows(), x.cols());
        self.norm.forward(ops, &x, &mut normed);
        if !(taps.hidden_states || taps.attentions) {
            return Ok(DecoderOutput {
                last_hidden_state: normed,
                hidden_states,
                attentions,
            });
        }
        let (_, rows) = batch.kernel_spans(keep);
        let mut kept = ops.buffer(rows.len(), normed.cols());
        ops.copy_rows(&normed, &rows, &mut kept, &numbered(rows.len()));
        if taps.hidden_states {
            hidden_states.push(normed);
        }
        Ok(DecoderOutput {
            last_hidden_state: kept,
            hidden_states,
            attentions,
        })
    }
}

impl DecoderLayer {
    pub(super) fn load(loader: &Loader<'_>, config: &TextConfig, i: usize) -> Result<Self> {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let name = |part: &str| format!("language_model.layers.{i}.{part}");
        let norm = |part: &str| RmsNorm::load(loader, &name(part), d, config.rms_norm_eps);
        let qkv = [
            (name("self_attn.q_proj"), q),
            (name("self_attn.k_proj"), kv),
            (name("self_attn.v_proj"), kv),
        ];
        let gate_up = [(name("mlp.gate_proj"), f), (name("mlp.up_proj"), f)];
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            qkv_proj: Linear::load_fused(loader, &qkv, d, config.qkv_bias)?,
            o_proj: Linear::load(loader, &name("self_attn.o_proj"), d, q, config.o_bias)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            gate_up_proj: Linear::load_fused(loader, &gate_up, d, config.mlp_bias)?,
            down_proj: Linear::load(loader, &name("mlp.down_proj"), d, f, config.mlp_bias)?,
            window: config.windows[i],
        })
    }

    /// Its matrices, for their memory.
    pub(super) fn into_weights(self) -> [Weight; 4] {
        let all = [
            self.qkv_proj,
            self.o_proj,
            self.gate_up_proj,
            self.down_proj,
        ];
        all.map(Linear::into_weight)
    }

    fn bytes(&self) -> usize {
        [
            &self.qkv_proj,
            &self.o_proj,
            &self.gate_up_proj,
            &self.down_proj,
        ]
        .iter()
        .map(|linear| linear.bytes())
        .sum()
    }

    /// One layer over the rows of `x`; returns the kept rows and, eagerly, the attention weights.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        mut x: Buffer,
        (cache, index): (&mut KvCache, usize),
        keep: Keep,
        s: &mut Scratch,
    ) -> (Buffer, Option<Vec<Vec<f32>>>) {
        let (ops, config) = (pass.ops, pass.config);
        self.input_layernorm.forward(ops, &x, &mut s.normed);
        self.qkv_proj
            .forward(ops, &s.normed, Epilogue::Store(None), &mut s.qkv);
        ops.rope_write_kv(
            &mut s.qkv,
            pass.cos_sin,
            heads(config),
            cache,
            index,
            pass.slots,
        );

        let (spans, rows) = pass.batch.kernel_spans(keep);
        let qkv = (&s.qkv, &*cache, index);
        let weights = self.attend(pass, qkv, &spans, &mut s.attended);
        if rows.len() < x.rows() {
            x = pick(ops, &x, &rows);
            let attended = pick(ops, &s.attended, &rows);
            *s = Scratch {
                attended,
                ..Scratch::new(ops, config, rows.len())
            };
        }
        self.o_proj.forward(ops, &s.attended, Epilogue::Add, &mut x);

        self.post_attention_layernorm
            .forward(ops, &x, &mut s.normed);
        let buffers = (&mut s.gate_up, &mut s.inner);
        self.gate_up_proj
            .forward_gated(ops, &s.normed, config.hidden_act, buffers);
        self.down_proj.forward(ops, &s.inner, Epilogue::Add, &mut x);
        (x, weights)
    }

    fn attend(
        &self,
        pass: &Pass<'_>,
        (qkv, cache, index): (&Buffer, &KvCache, usize),
        spans: &[Span<'_>],
        out: &mut Buffer,
    ) -> Option<Vec<Vec<f32>>> {
        let shape = AttentionShape {
            heads: heads(pass.config),
            scale: (pass.config.head_dim as f32).powf(-0.5),
            window: self.window,
        };
        if pass.eager {
            return Some(
                pass.ops
                    .paged_attention_eager(qkv, cache, index, spans, &shape, out),
            );
        }
        pass.ops
            .paged_attention(qkv, cache, index, spans, &shape, out);
        None
    }
}

/// Cosines and sines of every token: `[tokens, d]`, d/2 cosines then d/2 sines.
pub(super) fn cos_sin(ops: &Ops, config: &TextConfig, batch: &Batch<'_>) -> Buffer {
    let d = config.head_dim;
    let mut table = vec![0.0; batch.tokens() * d];
    let mut rest = table.as_mut_slice();
    for span in &batch.spans {
        let rope = config.rope.frequencies(d, span.rope_length);
        let rows;
        (rows, rest) = rest.split_at_mut(span.len() * d);
        let rows = rows.par_chunks_exact_mut(d).zip(&span.positions);
        rows.with_min_len(ROPE_ROWS).for_each(|(row, position)| {
            let (cos, sin) = row.split_at_mut(d / 2);
            for ((cos, sin), f) in cos.iter_mut().zip(sin).zip(&rope.inv_freq) {
                let angle = *position as f32 * f;
                *cos = angle.cos() * rope.attention_scaling;
                *sin = angle.sin() * rope.attention_scaling;
            }
        });
    }
    ops.upload(batch.tokens(), d, &table)
}

/// The heads of the attention.
pub(super) fn heads(config: &TextConfig) -> Heads {
    Heads {
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    }
}

/// The type of the cache where none is asked for: f32 for f32 weights, else bf16.
pub fn default_kv_dtype(dtype: Dtype) -> KvDtype {
    match dtype {
        Dtype::F32 => KvDtype::F32,
        _ => KvDtype::Bf16,
    }
}

/// Bytes of keys and values that all layers keep of a token.
pub fn kv_bytes_per_token(config: &TextConfig, dtype: KvDtype) -> usize {
    config.num_hidden_layers * dtype.bytes_per_token(&heads(config))
}

fn numbered(n: usize) -> Vec<u32> {
    (0..n as u32).collect()
}

/// The rows `rows` of `x`, in a buffer of their own.
pub(crate) fn pick(ops: &Ops, x: &Buffer, rows: &[u32]) -> Buffer {
    let mut out = ops.buffer(rows.len(), x.cols());
    ops.copy_rows(x, rows, &mut out, &numbered(rows.len()));
    out
}

fn copy(ops: &Ops, x: &Buffer) -> Buffer {
    pick(ops, x, &numbered(x.rows()))
}
