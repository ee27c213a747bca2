//! 4-bit weights of bitsandbytes: a code each, and one absmax for 64 values of k of an output.
//!
//! Decision: a weight is `table[code] * absmax`, never widened in memory: 4.5 bits. A panel is a row of
//! groups, each the 32 columns' codes of 64 values of k and then their 32 absmax in f32, as they came.
//! Eight values of k of a column are one word of 32 bits whose lower half holds the codes of k, k + 2,
//! k + 4 and k + 6 from the lowest bits on, and whose upper half those of k + 1 and so on: a shift of
//! 16-bit lanes brings the codes of a pair of neighbours to the lowest bits of both halves, a shift of
//! 32-bit lanes one code, and a permutation of registers that looks at no other bits makes values of
//! them. k is a multiple of 64.
//!
//! What products multiply with is `values[code]`, times absmax and [`Numbers::back`] once per group
//! and once per output. In f32 the values are the table. In bf16 they are the table times a factor,
//! rounded: 3 for FP4, whose values all become exact, and for NF4 the factor of a million that
//! leaves the least error, 3.3e-4 (root mean square; the whole range is 2). Rounding the weights
//! themselves, `bf16(table[code] * absmax)` as Transformers does, leaves 5e-4.

use super::bnb::{Code4, FP4, NF4};
use super::{Columns, PANEL, WeightData, bnb, float};

/// Values of k that share an absmax.
pub(crate) const GROUP: usize = 64;
/// Bytes of a group of a panel's codes.
pub(crate) const CODES: usize = GROUP / 2 * PANEL;
/// Bytes of a group of a panel: codes and absmax.
pub(crate) const GROUP_BYTES: usize = CODES + 4 * PANEL;

/// How 4-bit weights of bitsandbytes are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bnb4 {
    /// What the codes stand for.
    pub code: Code4,
    /// The type that products are done in.
    pub compute: Compute,
}

/// `bnb_4bit_compute_dtype`; f16 is done in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compute {
    /// The table's values as they are; activations are not rounded.
    F32,
    /// The table's values as bf16; activations are rounded to bf16 where the processor has its dot
    /// product.
    Bf16,
}

/// What stands for the codes in a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Numbers {
    pub(crate) values: [f32; 16],
    /// What the values are times the table's, the other way round.
    pub(crate) back: f32,
}

impl Numbers {
    pub(crate) const fn of(code: Code4, compute: Compute) -> Numbers {
        let (table, factor) = match code {
            Code4::Nf4 => (NF4, 1.437_006),
            Code4::Fp4 => (FP4, 3.0),
        };
        if matches!(compute, Compute::F32) {
            return Numbers {
                values: table,
                back: 1.0,
            };
        }
        let (mut values, mut code) = (table, 0);
        while code < 16 {
            let bits = (table[code] * factor).to_bits();
            values[code] = f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000);
            code += 1;
        }
        Numbers {
            values,
            back: 1.0 / factor,
        }
    }
}

/// Bytes of a panel.
pub(crate) fn panel_len(k: usize) -> usize {
    k.div_ceil(GROUP).saturating_mul(GROUP_BYTES)
}

/// The absmax of a group (as it lies in a panel) of a column.
pub(crate) fn absmax(group: &[u8], column: usize) -> f32 {
    let at = CODES + 4 * column;
    f32::from_le_bytes([group[at], group[at + 1], group[at + 2], group[at + 3]])
}

/// The code of value k (below [`GROUP`]) of a column.
pub(crate) fn code(group: &[u8], column: usize, k: usize) -> usize {
    let place = k % 2 * 4 + k % 8 / 2; // of the eight
    let byte = group[(k / 8 * PANEL + column) * 4 + place / 2];
    usize::from(byte >> (place % 2 * 4) & 15)
}

/// Column `column` of a panel as f32.
pub(super) fn read_column(of: Bnb4, panel: &[u8], column: usize, out: &mut [f32]) {
    let table = of.code.table();
    for (out, group) in out.chunks_mut(GROUP).zip(panel.chunks_exact(GROUP_BYTES)) {
        let absmax = absmax(group, column);
        for (k, out) in out.iter_mut().enumerate() {
            *out = table[code(group, column, k)] * absmax;
        }
    }
}

/// Packs a panel: codes as they are, and floats quantised as bitsandbytes does it.
pub(super) fn pack_panel(of: Bnb4, columns: &Columns<'_>, k: usize, panel: &mut [u8]) {
    let mut row = vec![0.0; k];
    for (column, data) in columns.iter().enumerate() {
        match data {
            None => {}
            Some(WeightData::Bnb4 { codes, absmax }) => pack_column(codes, absmax, column, panel),
            Some(data) => {
                float::widen_row(data, &mut row);
                let (codes, absmax) = bnb::quantize_4bit(&row, GROUP, of.code);
                pack_column(&codes, &absmax, column, panel);
            }
        }
    }
}

fn pack_column(codes: &[u8], absmax: &[f32], column: usize, panel: &mut [u8]) {
    let groups = codes.chunks_exact(GROUP / 2).zip(absmax);
    for ((codes, absmax), group) in groups.zip(panel.chunks_exact_mut(GROUP_BYTES)) {
        let (words, scales) = group.split_at_mut(CODES);
        scales[4 * column..4 * column + 4].copy_from_slice(&absmax.to_le_bytes());
        let words = words[4 * column..].chunks_mut(4 * PANEL);
        for (codes, word) in codes.chunks_exact(4).zip(words) {
            let codes = u32::from_le_bytes([codes[0], codes[1], codes[2], codes[3]]);
            let eight = join(codes >> 4) | join(codes) << 16;
            word[..4].copy_from_slice(&eight.to_le_bytes());
        }
    }
}

/// The lower halves of four bytes, side by side.
fn join(bytes: u32) -> u32 {
    let fours = bytes & 0x0f0f_0f0f;
    let eights = (fours | fours >> 4) & 0x00ff_00ff;
    (eights | eights >> 8) & 0xffff
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn codes_of_a_column_lie_where_they_are_looked_for() {
        let codes: Vec<u8> = (0..64).map(|i| (i * 37 + 11) as u8).collect();
        let absmax_of = [0.5, -3.25];
        let mut panel = vec![0; panel_len(128)];
        pack_column(&codes, &absmax_of, 7, &mut panel);
        for (index, byte) in codes.iter().enumerate() {
            let (group, k) = (index / 32, index % 32 * 2);
            let group_bytes = &panel[group * GROUP_BYTES..(group + 1) * GROUP_BYTES];
            assert_eq!(absmax(group_bytes, 7), absmax_of[group]);
            let pair = [code(group_bytes, 7, k), code(group_bytes, 7, k + 1)];
            assert_eq!(
                pair,
                [usize::from(byte >> 4), usize::from(byte & 15)],
                "{index}"
            );
            let word = (k / 8 * PANEL + 7) * 4;
            let word = u32::from_le_bytes(group_bytes[word..word + 4].try_into().expect("four"));
            let halves = word >> (k % 8 / 2 * 4);
            assert_eq!([halves as usize & 15, halves as usize >> 16 & 15], pair);
        }
    }

    #[test]
    fn numbers_in_bf16_are_close_to_the_table() {
        for (code, most, square) in [(Code4::Nf4, 0.001_93, 3.4e-4), (Code4::Fp4, 1e-7, 1e-7)] {
            let Numbers { values, back } = Numbers::of(code, Compute::Bf16);
            let mut sum = 0.0;
            for (value, exact) in values.iter().zip(code.table()) {
                assert_eq!(bf16::from_f32(*value).to_f32(), *value);
                let error = (value * back - exact).abs();
                assert!(error <= most * exact.abs(), "{code:?}: {value} for {exact}");
                sum += error * error;
            }
            assert!((sum / 15.0f32).sqrt() < square, "{code:?}: {sum}");
            let exact = Numbers::of(code, Compute::F32);
            assert_eq!((exact.values, exact.back), (*code.table(), 1.0));
        }
    }
}
