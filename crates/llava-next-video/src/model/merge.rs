//! Merging: feature rows take the places of their placeholders among the token embeddings.
//!
//! The reference compares only the totals of a batch; here every image and video is also checked
//! against its own run of placeholders, so features cannot land in a neighbour's place unnoticed.

use crate::error::{Error, Result};

/// The placeholder positions of one kind of media.
#[derive(Debug, Clone, Copy)]
pub struct Placeholders {
    /// The token id that stands for a feature row.
    pub token_id: u32,
    /// What to call it: `Image` or `Video`.
    pub modality: &'static str,
}

/// Positions in `ids` (all rows one after another) that hold the placeholder.
pub fn placeholder_positions(ids: &[u32], token_id: u32) -> Vec<u32> {
    ids.iter()
        .enumerate()
        .filter(|(_, id)| **id == token_id)
        .map(|(i, _)| i as u32)
        .collect()
}

/// Checks that `positions` are as many as the features of all media, and that no medium is torn over
/// two rows. `row_of` gives the row of a position.
///
/// # Errors
/// The counts differ ("Image features and image tokens do not match", as in Transformers).
pub fn check_counts(
    kind: Placeholders,
    positions: &[u32],
    lengths: &[usize],
    row_of: &dyn Fn(u32) -> usize,
) -> Result<()> {
    let modality = kind.modality;
    let features: usize = lengths.iter().sum();
    let lower = modality.to_lowercase();
    if positions.len() != features {
        return Err(Error::Input(format!(
            "{modality} features and {lower} tokens do not match: tokens: {}, features {features}; \
             give one {lower} for each <{lower}> of the prompt, processed with the same settings",
            positions.len()
        )));
    }
    let mut first = 0;
    for (i, length) in lengths.iter().enumerate() {
        let own = &positions[first..first + length];
        if let (Some(a), Some(b)) = (own.first(), own.last())
            && row_of(*a) != row_of(*b)
        {
            return Err(Error::Input(format!(
                "{modality} features and {lower} tokens do not match: the {length} features of \
                     {lower} {} would be torn over rows {} and {} of the batch",
                i + 1,
                row_of(*a) + 1,
                row_of(*b) + 1
            )));
        }
        first += length;
    }
    Ok(())
}
