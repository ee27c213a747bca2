//! The rotation of k that weights and activations go through before they are rounded to integers.
//!
//! Decision: a few channels of a language model are many times larger than the rest, so that one
//! step for a whole row of activations leaves the others few codes: on SmolLM2-135M, 8-bit activations
//! alone cost 3 % of perplexity. A Hadamard matrix in blocks of k spreads such a channel over its
//! block. It is orthogonal, so `(W·H)·(H·x) = W·x`, and it needs additions only (QuaRot,
//! arXiv 2404.00456, does the same with whole rows). Weights are rotated once, while they are
//! packed, and activations in every call.
//!
//! A row is cut into blocks of 512 and, at its end, smaller powers of two. Each is its own inverse.
//! The levels run from the widest stride to the narrowest, so that every instruction set finds the same
//! bits.

use std::ops::Range;

/// Values of the largest block.
const LARGEST: usize = 512;

/// The blocks of a row of `k` values.
pub(crate) fn blocks(k: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let left = k - start;
        let size = 1 << left.checked_ilog2()?.min(LARGEST.ilog2());
        start += size;
        Some(start - size..start)
    })
}

/// What makes a block of `size` values an orthogonal one.
pub(crate) fn scale(size: usize) -> f32 {
    1.0 / (size as f32).sqrt()
}

/// Rotates a row, or rotates it back.
pub(crate) fn rotate(row: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::rotate::rotate(row) {
        return;
    }
    rotate_slowly(row);
}

/// The slow twin of [`rotate`].
pub(crate) fn rotate_slowly(row: &mut [f32]) {
    for block in blocks(row.len()) {
        rotate_block(&mut row[block]);
    }
}

/// Rotates one block.
pub(crate) fn rotate_block(block: &mut [f32]) {
    let mut stride = block.len() / 2;
    while stride > 0 {
        for pair in block.chunks_exact_mut(2 * stride) {
            let (low, high) = pair.split_at_mut(stride);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        stride /= 2;
    }
    let scale = scale(block.len());
    block.iter_mut().for_each(|value| *value *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_into_powers_of_two() {
        let cut = |k| blocks(k).collect::<Vec<_>>();
        assert_eq!(cut(0), []);
        assert_eq!(cut(7), [0..4, 4..6, 6..7]);
        assert_eq!(cut(576), [0..512, 512..576]);
        assert_eq!(cut(1536), [0..512, 512..1024, 1024..1536]);
    }

    #[test]
    fn a_rotation_keeps_products_and_is_its_own_inverse() {
        let row: Vec<f32> = (0..150).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
        let other: Vec<f32> = (0..150).map(|i| (i * 13 % 29) as f32).collect();
        let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let (mut a, mut b) = (row.clone(), other.clone());
        rotate_slowly(&mut a);
        rotate_slowly(&mut b);
        assert!((dot(&a, &b) - dot(&row, &other)).abs() < 0.02);
        rotate_slowly(&mut a);
        let back = a.iter().zip(&row).all(|(a, row)| (a - row).abs() < 1e-4);
        assert!(back, "{a:?}");
    }

    /// One channel that stands out is spread over its block.
    #[test]
    fn an_outlier_is_spread() {
        let mut row = vec![0.0; 512];
        row[77] = 512.0;
        rotate_slowly(&mut row);
        let flat = row.iter().all(|v| (v.abs() - 512.0f32.sqrt()).abs() < 1e-3);
        assert!(flat);
    }
}
