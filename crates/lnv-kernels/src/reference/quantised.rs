//! The slow twins of products with quantised weights, which define them.
//!
//! Decision: activations are rounded to 8-bit integers with one scale, the largest magnitude / 127: with
//! 8-bit weights a row, which was rotated before, with 4-bit ones each 64 values of k; products of integers are summed in integers, exactly; scales come last. A row
//! that holds NaN or infinity gives NaN in all columns; a row of zeros gives zeros.

use crate::weight::rotate::rotate_slowly;
use crate::weight::{PANEL, q4, q8};

/// A row times a panel of 8-bit weights: `sum * scale of the column * scale of the row`.
pub(super) fn q8_product(x: &[f32], panel: &[u8]) -> [f32; PANEL] {
    let mut rotated = x.to_vec();
    rotate_slowly(&mut rotated);
    let (step, codes) = quantise(&rotated);
    let scales = q8::scales(panel);
    std::array::from_fn(|column| {
        let products = codes.iter().enumerate();
        let sum: i32 = products
            .map(|(k, code)| code * q8::code(panel, column, k))
            .sum();
        sum as f32 * scales[column] * step.scale
    })
}

/// A row times a panel of 4-bit weights: the groups' `sum * (scale of the column * scale of the row's
/// group)` added up in ascending order.
pub(super) fn q4_product(x: &[f32], panel: &[u8]) -> [f32; PANEL] {
    let quantised: Vec<_> = x.chunks(q4::GROUP).map(quantise).collect();
    std::array::from_fn(|column| {
        let groups = quantised.iter().zip(panel.chunks_exact(q4::GROUP_BYTES));
        let mut total = 0.0;
        for ((step, codes), group) in groups {
            let products = codes.iter().enumerate();
            let sum: i32 = products
                .map(|(k, code)| code * q4::level(group, column, k))
                .sum();
            total += sum as f32 * (q4::scale(group, column) * step.scale);
        }
        total
    })
}

fn quantise(x: &[f32]) -> (q8::Step, Vec<i32>) {
    let step = q8::Step::of(x);
    let codes = x.iter().map(|value| i32::from(step.code(*value)));
    (step, codes.collect())
}
