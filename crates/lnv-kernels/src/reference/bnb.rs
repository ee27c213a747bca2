//! The slow twins of products with the weights of bitsandbytes, which define them.

use crate::weight::bnb4::{self, Bnb4, Numbers};
use crate::weight::int8::{self, Int8};
use crate::weight::{PANEL, bnb, q8};

/// A row times a panel of 4-bit weights: for each group the sum of products with the numbers of the
/// codes, times absmax, added up in ascending order, then times what makes weights of the numbers.
pub(super) fn bnb4_product(x: &[f32], panel: &[u8], of: Bnb4) -> [f32; PANEL] {
    let Numbers { values, back } = Numbers::of(of.code, of.compute);
    std::array::from_fn(|column| {
        let groups = x
            .chunks(bnb4::GROUP)
            .zip(panel.chunks_exact(bnb4::GROUP_BYTES));
        let mut total = 0.0;
        for (x, group) in groups {
            let products = x
                .iter()
                .enumerate()
                .map(|(k, x)| x * values[bnb4::code(group, column, k)]);
            total += products.sum::<f32>() * bnb4::absmax(group, column);
        }
        total * back
    })
}

/// A row times a panel of LLM.int8() weights: the activations that are not left out as 8-bit integers,
/// times SCB, times the row's largest magnitude / 127²; the others as they are times the weights'
/// values, in ascending order.
pub(super) fn int8_product(x: &[f32], panel: &[u8], of: Int8) -> [f32; PANEL] {
    let kept: Vec<f32> = x
        .iter()
        .map(|x| if of.leaves_out(*x) { 0.0 } else { *x })
        .collect();
    let step = q8::Step::of(&kept);
    let peaks = int8::peaks(panel);
    std::array::from_fn(|column| {
        let products = kept.iter().enumerate();
        let sum: i32 = products
            .map(|(k, x)| i32::from(step.code(*x)) * q8::code(panel, column, k))
            .sum();
        let mut total = sum as f32 * peaks[column] * (step.scale * bnb::INT8_STEP);
        for (k, x) in x.iter().enumerate().filter(|(_, x)| of.leaves_out(**x)) {
            total = x.mul_add(int8::value(panel, column, k), total);
        }
        total
    })
}
