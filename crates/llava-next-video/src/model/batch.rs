//! The contract of one forward pass: which tokens of which sequences, where their keys and values go,
//! and what is to be read from the result.
//!
//! Rows are ragged: a sequence brings its tokens and no padding, so a batch costs what its tokens cost
//! and a row's result cannot depend on its neighbours' lengths.

use std::ops::Range;

use lnv_kernels::{Buffer, KV_BLOCK, Slot, Span};

/// The new tokens of one sequence.
#[derive(Debug, Clone)]
pub struct BatchSpan<'a> {
    /// Position of each new token, for the rotary embedding.
    pub positions: Vec<u32>,
    /// Longest position of the whole sequence plus one: what dynamic rotary scaling looks at.
    pub rope_length: usize,
    /// Tokens in the cache once this pass has written its own.
    pub kv_len: usize,
    /// The cache blocks of the sequence, in order, enough for `kv_len` tokens.
    pub blocks: &'a [u32],
}

impl BatchSpan<'_> {
    /// New tokens.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// True without new tokens.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Where each new token's key and value go.
    fn slots(&self) -> impl Iterator<Item = Slot> + '_ {
        (self.kv_len - self.len()..self.kv_len).map(|position| Slot {
            block: self.blocks[position / KV_BLOCK],
            offset: (position % KV_BLOCK) as u32,
        })
    }
}

/// All sequences of a pass; their tokens follow one another in the rows of the input.
#[derive(Debug, Clone, Default)]
pub struct Batch<'a> {
    /// The sequences.
    pub spans: Vec<BatchSpan<'a>>,
}

impl Batch<'_> {
    /// New tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.spans.iter().map(BatchSpan::len).sum()
    }

    /// Cache places of all tokens.
    pub fn slots(&self) -> Vec<Slot> {
        self.spans.iter().flat_map(BatchSpan::slots).collect()
    }

    /// The kernels' view of the last `keep` tokens of each sequence, and their rows in the input.
    pub fn kernel_spans(&self, keep: Keep) -> (Vec<Span<'_>>, Vec<u32>) {
        let (mut spans, mut rows) = (Vec::new(), Vec::new());
        let mut first = 0;
        for span in &self.spans {
            let kept = keep.rows(span.len());
            spans.push(Span {
                q_start: first + kept.start,
                q_len: kept.len(),
                kv_len: span.kv_len,
                blocks: span.blocks,
            });
            rows.extend(kept.map(|i| (first + i) as u32));
            first += span.len();
        }
        (spans, rows)
    }
}

/// Of which tokens the final hidden state is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Every token.
    All,
    /// The last so many of each sequence (`logits_to_keep`); the last layer skips the others.
    Last(usize),
}

impl Keep {
    /// The kept part of `len` tokens.
    pub fn rows(self, len: usize) -> Range<usize> {
        match self {
            Keep::All => 0..len,
            Keep::Last(n) => len.saturating_sub(n)..len,
        }
    }
}

/// What else to bring out of a pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taps {
    /// The input of every layer and the final normalised state (`output_hidden_states`).
    pub hidden_states: bool,
    /// The attention weights of every layer (`output_attentions`); runs the eager form.
    pub attentions: bool,
}

/// The result of a pass through the decoder.
#[derive(Debug)]
pub struct DecoderOutput {
    /// Final states after the norm, `[kept rows, D]`.
    pub last_hidden_state: Buffer,
    /// `layers + 1` states of all rows, `[tokens, D]`, where asked for.
    pub hidden_states: Vec<Buffer>,
    /// For each layer, for each sequence, `[heads, q_len, kv_len]`, where asked for.
    pub attentions: Vec<Vec<Vec<f32>>>,
}
