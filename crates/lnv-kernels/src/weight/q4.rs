//! 4-bit weights: one of 16 levels each, and one scale for 64 values of k of an output.
//!
//! Decision: a weight is `level * scale`. The [`LEVELS`] are those of NF4 (QLoRA, arXiv 2305.14314) as
//! 8-bit integers: they suit weights, of which most are small, better than even steps do, and the byte
//! dot product takes them as they come out of a table of 16 bytes. They are not symmetric, so the f16
//! scale may have either sign. That makes 4.25 bits a weight, never widened in memory. A panel is a row
//! of groups, each the 32 columns' codes of 64 values of k and then their 32 scales. In a byte lie the
//! codes of k (low) and k + 4 (high), so that a mask, and a shift and a mask, give what the table
//! takes. k is padded to a multiple of 64 with values of zero.
//!
//! Weights are not rotated as 8-bit ones are (`rotate.rs`): on SmolLM2-135M that has a divergence of 0.29
//! where this has 0.21 and NF4 0.25. Perhaps because channels in which activations are large tend to
//! have small weights, which these levels round finely and a rotation mixes with the rest. Activations have
//! a step for each group instead.
//!
//! The scale is searched, not computed from the largest value: of [`PEAKS`], places where the group's
//! largest value may fall, it is the one whose codes leave the least squared error with the scale that
//! suits these codes best. The search is written in additions and multiplications in ascending k, so
//! that every instruction set finds the same bits.
//!
//! A group that holds NaN or infinity gets the scale NaN: its outputs are NaN, as they would be.

use half::f16;

use super::{Columns, PANEL, float};

/// Values of k that share a scale.
pub(crate) const GROUP: usize = 64;
/// Bytes of a group of a panel's codes.
pub(crate) const CODES: usize = GROUP / 2 * PANEL;
/// Bytes of a group of a panel: codes and scales.
pub(crate) const GROUP_BYTES: usize = CODES + 2 * PANEL;
/// What is added to a level, so that it is an unsigned byte.
pub(crate) const ZERO: u8 = 128;

/// The levels of the 16 codes: NF4's, times 127.
pub(crate) const LEVELS: [f32; 16] = [
    -127.0, -88.0, -67.0, -50.0, -36.0, -23.0, -12.0, 0.0, 10.0, 20.0, 31.0, 43.0, 56.0, 71.0,
    92.0, 127.0,
];
/// Where one level ends and the next begins.
pub(crate) const BOUNDS: [f32; 15] = {
    let mut bounds = [0.0; 15];
    let mut code = 0;
    while code < 15 {
        bounds[code] = (LEVELS[code] + LEVELS[code + 1]) / 2.0;
        code += 1;
    }
    bounds
};
/// The levels as unsigned bytes, [`ZERO`] added.
pub(crate) const BYTES: [u8; 16] = {
    let mut bytes = [0; 16];
    let mut code = 0;
    while code < 16 {
        bytes[code] = (LEVELS[code] + ZERO as f32) as u8;
        code += 1;
    }
    bytes
};

/// Where a group's largest magnitude may fall, as a level: beyond the last one the finer steps win more
/// than the clipped end costs.
pub(crate) const PEAKS: [f32; 8] = [127.0, 137.0, 148.0, 162.0, -127.0, -137.0, -148.0, -162.0];

/// Bytes of a panel.
pub(crate) fn panel_len(k: usize) -> usize {
    k.div_ceil(GROUP).saturating_mul(GROUP_BYTES)
}

/// The scale of a group (as it lies in a panel) of a column.
pub(crate) fn scale(group: &[u8], column: usize) -> f32 {
    let at = CODES + 2 * column;
    f16::from_le_bytes([group[at], group[at + 1]]).to_f32()
}

/// The level of value k (below [`GROUP`]) of a column.
pub(crate) fn level(group: &[u8], column: usize, k: usize) -> i32 {
    let (at, shift) = place(column, k);
    i32::from(BYTES[usize::from(group[at] >> shift & 15)]) - i32::from(ZERO)
}

/// The byte of a code, and the shift in it.
fn place(column: usize, k: usize) -> (usize, usize) {
    ((k / 8 * PANEL + column) * 4 + k % 4, k / 4 % 2 * 4)
}

/// Column `column` of a panel as f32.
pub(super) fn read_column(panel: &[u8], column: usize, out: &mut [f32]) {
    for (out, group) in out.chunks_mut(GROUP).zip(panel.chunks_exact(GROUP_BYTES)) {
        let scale = scale(group, column);
        for (k, out) in out.iter_mut().enumerate() {
            *out = level(group, column, k) as f32 * scale;
        }
    }
}

/// Quantises a panel.
pub(super) fn pack_panel(columns: &Columns<'_>, k: usize, panel: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::quantise::q4_panel(columns, k, panel) {
        return;
    }
    pack_slowly(columns, k, panel);
}

/// The slow twin of [`pack_panel`].
pub(crate) fn pack_slowly(columns: &Columns<'_>, k: usize, panel: &mut [u8]) {
    let mut row = vec![0.0; k.next_multiple_of(GROUP)];
    for (column, data) in columns.iter().enumerate() {
        let Some(data) = data else {
            row.fill(0.0);
            pack_column(&row, column, panel);
            continue;
        };
        float::widen_row(data, &mut row[..k]);
        pack_column(&row, column, panel);
    }
}

fn pack_column(row: &[f32], column: usize, panel: &mut [u8]) {
    let groups = panel.chunks_exact_mut(GROUP_BYTES);
    for (values, group) in row.chunks_exact(GROUP).zip(groups) {
        let scale = search(values);
        let at = CODES + 2 * column;
        group[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        let inverse = inverse(scale.to_f32());
        for (k, value) in values.iter().enumerate() {
            let (at, shift) = place(column, k);
            let code = nearest(*value, inverse) as u8;
            group[at] = group[at] & !(15 << shift) | code << shift;
        }
    }
}

/// Levels per value; 0 where there is no scale.
pub(crate) fn inverse(scale: f32) -> f32 {
    if scale == 0.0 || scale.is_nan() {
        0.0
    } else {
        1.0 / scale
    }
}

/// The code of a value; 0 for NaN.
fn nearest(value: f32, inverse: f32) -> usize {
    let scaled = value * inverse;
    BOUNDS.iter().filter(|bound| **bound < scaled).count()
}

/// The scale of a group's values.
fn search(values: &[f32]) -> f16 {
    let mut peak = 0.0f32;
    for value in values {
        if !value.is_finite() {
            return f16::NAN;
        }
        peak = peak.max(value.abs());
    }
    if peak == 0.0 {
        return f16::ZERO;
    }
    let (mut best, mut scale) = (0.0, 0.0);
    for place in PEAKS {
        let (dot, norm) = fit(values, place / peak);
        let removed = dot * dot / norm;
        if removed > best {
            (best, scale) = (removed, dot / norm);
        }
    }
    let (dot, norm) = fit(values, inverse(scale));
    let refined = dot / norm;
    f16::from_f32(if refined.is_finite() { refined } else { scale })
}

/// For the levels of the values: values times levels, and levels times levels. The best scale for
/// these levels is their quotient.
fn fit(values: &[f32], inverse: f32) -> (f32, f32) {
    let (mut dot, mut norm) = (0.0, 0.0);
    for value in values {
        let level = LEVELS[nearest(*value, inverse)];
        dot += value * level;
        norm += level * level;
    }
    (dot, norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_ascend_and_zero_is_one_of_them() {
        assert!(LEVELS.is_sorted() && BOUNDS.is_sorted());
        assert_eq!((BYTES[0], BYTES[7], BYTES[15]), (1, ZERO, 255));
        assert_eq!((nearest(0.0, 1.0), nearest(-1e9, 1.0)), (7, 0));
        assert_eq!((nearest(4.9, 1.0), nearest(5.1, 1.0)), (7, 8));
    }
}
