//! The slow twin of attention by the byte dot product, which defines it.

use crate::buffer::Buffer;
use crate::kv_cache::Heads;
use crate::weight::q8::Step;

/// Probabilities are whole numbers up to this.
const MOST: f32 = 65_535.0;

/// Attention of each segment of `len` rows with itself: queries, keys and values rounded to 8-bit
/// integers row by row, probabilities times the step of their row of values to 16-bit ones.
pub(crate) fn full_attention(qkv: &Buffer, len: usize, heads: Heads, scale: f32, out: &mut Buffer) {
    let (cols, out_cols, d) = (qkv.cols(), out.cols(), heads.head_dim);
    let codes = |row: usize, part: usize| {
        let x = &qkv.host()[row * cols + part * d..][..d];
        let step = Step::of(x);
        let codes: Vec<i64> = x.iter().map(|v| i64::from(step.code(*v))).collect();
        (step.scale, codes)
    };
    let mut result = vec![0.0; out.rows() * out_cols];
    for segment in 0..qkv.rows() / len {
        let rows = segment * len..(segment + 1) * len;
        for head in 0..heads.heads {
            let kv_head = head / heads.queries_per_kv();
            let keys: Vec<_> = rows
                .clone()
                .map(|row| codes(row, heads.heads + kv_head))
                .collect();
            let values: Vec<_> = rows
                .clone()
                .map(|row| codes(row, heads.heads + heads.kv_heads + kv_head))
                .collect();
            let larger = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
            let largest = values.iter().map(|value| value.0).fold(0.0, larger);
            let unit = if (MOST / largest).is_infinite() {
                0.0
            } else {
                MOST / largest
            };
            for row in rows.clone() {
                let (step, query) = codes(row, head);
                let score = |(key_step, key): &(f32, Vec<i64>)| {
                    let sum: i64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                    sum as f32 * (step * scale) * key_step
                };
                let scores: Vec<f32> = keys.iter().map(score).collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
                let total: f32 = weights.iter().sum();
                for column in 0..d {
                    let products = weights.iter().zip(&values).map(|(weight, (step, value))| {
                        (weight * step * unit).round_ties_even() as i64 * value[column]
                    });
                    let sum: i64 = products.sum();
                    result[row * out_cols + head * d + column] =
                        sum as f32 * (largest / MOST / total);
                }
            }
        }
    }
    out.host_mut().copy_from_slice(&result);
}
