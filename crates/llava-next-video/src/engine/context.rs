//! How long a prompt may be.

use crate::config::{RopeScaling, TextConfig};
use crate::error::{Error, Result};
use crate::model::EmbeddedRow;

/// How many tokens the rotary embedding was made for.
pub fn context_length(text: &TextConfig) -> usize {
    let max = text.max_position_embeddings;
    match &text.rope.scaling {
        RopeScaling::Linear { factor } => (max as f64 * factor.max(1.0)) as usize,
        // Grows with the sequence.
        RopeScaling::Dynamic { .. } => usize::MAX,
        RopeScaling::Yarn(yarn) if yarn.original_max_position_embeddings == max as f64 => {
            (max as f64 * yarn.factor.max(1.0)) as usize
        }
        _ => max,
    }
}

pub(crate) fn check_context(rows: &[EmbeddedRow], text: &TextConfig) -> Result<()> {
    let fits = context_length(text);
    match rows.iter().map(|row| row.ids.len()).max() {
        Some(longest) if longest >= fits => Err(Error::Input(format!(
            "the prompt has {longest} tokens, but the model's context holds {fits} and at least one \
             must be left for the answer: use fewer frames (--num-frames) or images, ask shorter, \
             or stretch the context with --rope-scaling linear:{}",
            (longest / text.max_position_embeddings.max(1) + 1).max(2)
        ))),
        _ => Ok(()),
    }
}
