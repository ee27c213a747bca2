//! 4-bit weights: one code each, and one scale for 64 values of k of an output.
//!
//! Decision: a weight is `code * scale` with codes from -8 to 7, stored with 8 added, and an f16
//! scale of either sign: 4.25 bits a weight, never widened. A panel is a row of groups, each the 32
//! columns' codes of 64 values of k and then their 32 scales. In a byte lie the codes of k (low) and
//! k + 4 (high), so that a mask, and a shift and a mask, give what the byte dot product takes. k is
//! padded to a multiple of 64 with codes of zero.
//!
//! The scale is searched, not computed from the largest value: of [`PEAKS`], places on the grid
//! where the group's largest value may fall, the one whose codes leave the least squared error with
//! the scale that suits these codes best. The search is written in additions and multiplications in
//! ascending k, so that every instruction set finds the same bits.
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
/// What is added to a code.
pub(crate) const ZERO: u8 = 8;

/// Where on the grid a group's largest value may fall, its sign included: mostly just beyond -8,
/// where the clipped end costs less than the finer grid saves. The whole ones find the scale of
/// weights that lie on a grid already. On normal data the error is within 0.1 % of that of 400
/// places.
pub(crate) const PEAKS: [f32; 15] = [
    -8.0, 7.0, 6.0, 5.0, 4.0, 7.5, -7.5, -7.75, -8.2, -8.4, -8.6, -8.8, -9.0, -9.3, -9.6,
];

/// Bytes of a panel.
pub(crate) fn panel_len(k: usize) -> usize {
    k.div_ceil(GROUP).saturating_mul(GROUP_BYTES)
}

/// The scale of a group (as it lies in a panel) of a column.
pub(crate) fn scale(group: &[u8], column: usize) -> f32 {
    let at = CODES + 2 * column;
    f16::from_le_bytes([group[at], group[at + 1]]).to_f32()
}

/// The code of value k (below [`GROUP`]) of a column.
pub(crate) fn code(group: &[u8], column: usize, k: usize) -> i32 {
    let (at, shift) = place(column, k);
    i32::from(group[at] >> shift & 15) - i32::from(ZERO)
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
            *out = code(group, column, k) as f32 * scale;
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
            let code = (nearest(*value, inverse) as i32 + i32::from(ZERO)) as u8;
            group[at] = group[at] & !(15 << shift) | code << shift;
        }
    }
}

/// Codes per value; 0 where there is no scale.
pub(crate) fn inverse(scale: f32) -> f32 {
    if scale == 0.0 || scale.is_nan() {
        0.0
    } else {
        1.0 / scale
    }
}

/// The code of a value, as a float; -8 for NaN.
fn nearest(value: f32, inverse: f32) -> f32 {
    let code = (value * inverse).round_ties_even();
    if code.is_nan() {
        -8.0
    } else {
        code.clamp(-8.0, 7.0)
    }
}

/// The scale of a group's values.
fn search(values: &[f32]) -> f16 {
    let mut peak = 0.0f32;
    for value in values {
        if !value.is_finite() {
            return f16::NAN;
        }
        if value.abs() > peak.abs() {
            peak = *value;
        }
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

/// For the codes of the values: values times codes, and codes times codes. The best scale for these
/// codes is their quotient.
fn fit(values: &[f32], inverse: f32) -> (f32, f32) {
    let (mut dot, mut norm) = (0.0, 0.0);
    for value in values {
        let code = nearest(*value, inverse);
        dot += value * code;
        norm += code * code;
    }
    (dot, norm)
}
