//! The slow twins of products with quantised weights, which define them.
//!
//! Decision: the row of activations is rounded to 8-bit integers with one scale, its largest
//! magnitude / 127; products of integers are summed in integers, exactly; scales come last. A row
//! that holds NaN or infinity gives NaN in all columns; a row of zeros gives zeros.

use crate::weight::{PANEL, q4, q8};

/// A row times a panel of 8-bit weights: `sum * scale of the column * scale of the row`.
pub(super) fn q8_product(x: &[f32], panel: &[u8]) -> [f32; PANEL] {
    let (step, codes) = quantise(x);
    let scales = q8::scales(panel);
    std::array::from_fn(|column| {
        let products = codes.iter().enumerate();
        let sum: i32 = products
            .map(|(k, code)| code * q8::code(panel, column, k))
            .sum();
        sum as f32 * scales[column] * step.scale
    })
}

/// A row times a panel of 4-bit weights: the groups' `sum * scale` added up in ascending order, then
/// times the scale of the row.
pub(super) fn q4_product(x: &[f32], panel: &[u8]) -> [f32; PANEL] {
    let (step, codes) = quantise(x);
    std::array::from_fn(|column| {
        let groups = codes
            .chunks(q4::GROUP)
            .zip(panel.chunks_exact(q4::GROUP_BYTES));
        let mut total = 0.0;
        for (codes, group) in groups {
            let products = codes.iter().enumerate();
            let sum: i32 = products
                .map(|(k, code)| code * q4::code(group, column, k))
                .sum();
            total += sum as f32 * q4::scale(group, column);
        }
        total * step.scale
    })
}

fn quantise(x: &[f32]) -> (q8::Step, Vec<i32>) {
    let step = q8::Step::of(x);
    let codes = x.iter().map(|value| i32::from(step.code(*value)));
    (step, codes.collect())
}
