//! 8-bit weights: one code and, for each output, one scale.
//!
//! Decision: a weight is `code * scale` with codes from -127 to 127 and an f32 scale of the largest
//! magnitude of its row / 127. Four values of k of a column lie side by side, as the byte dot
//! product takes them, stored with 128 added, because that instruction multiplies unsigned bytes
//! (weights) with signed ones (activations). The 32 scales stand at the panel's end. k is padded to
//! a multiple of 4 with codes of zero.
//!
//! A row that holds NaN or infinity gets the scale NaN: its outputs are NaN, as they would be.

use super::{Columns, PANEL, float};

/// Values of k that lie side by side.
pub(crate) const STEP_K: usize = 4;
/// What is added to a code.
pub(crate) const ZERO: u8 = 128;
/// Largest k: sums of products of bytes stay below 2^31.
pub(super) const MAX_K: usize = 1 << 17;
/// Bytes of the scales of a panel.
const SCALES: usize = 4 * PANEL;

/// Bytes of a panel.
pub(super) fn panel_len(k: usize) -> usize {
    let steps = k.div_ceil(STEP_K);
    steps.saturating_mul(STEP_K * PANEL).saturating_add(SCALES)
}

/// The scales of a panel's columns.
pub(crate) fn scales(panel: &[u8]) -> &[f32] {
    bytemuck::cast_slice(&panel[panel.len() - SCALES..])
}

/// The code of value k of a column.
pub(crate) fn code(panel: &[u8], column: usize, k: usize) -> i32 {
    i32::from(panel[place(column, k)]) - i32::from(ZERO)
}

fn place(column: usize, k: usize) -> usize {
    (k / STEP_K * PANEL + column) * STEP_K + k % STEP_K
}

/// Column `column` of a panel as f32.
pub(super) fn read_column(panel: &[u8], column: usize, out: &mut [f32]) {
    let scale = scales(panel)[column];
    for (k, out) in out.iter_mut().enumerate() {
        *out = code(panel, column, k) as f32 * scale;
    }
}

/// Quantises a panel.
pub(super) fn pack_panel(columns: &Columns<'_>, k: usize, panel: &mut [u8]) {
    let (codes, scales) = panel.split_at_mut(panel.len() - SCALES);
    let scales: &mut [f32] = bytemuck::cast_slice_mut(scales);
    codes.fill(ZERO);
    let mut row = vec![0.0; k];
    for (column, data) in columns.iter().enumerate() {
        let Some(data) = data else { continue };
        float::widen_row(data, &mut row);
        let step = Step::of(&row);
        scales[column] = step.scale;
        for (k, value) in row.iter().enumerate() {
            codes[place(column, k)] = ZERO.wrapping_add_signed(step.code(*value));
        }
    }
}

/// How a row of values becomes bytes: weights once, activations in every call.
#[derive(Debug, Clone, Copy, Default, bytemuck::Zeroable)]
pub(crate) struct Step {
    /// What a code of 1 stands for: the row's largest magnitude / 127. NaN if the row holds NaN or
    /// infinity, 0 if its values are too small to divide by (below 4e-37).
    pub(crate) scale: f32,
    /// Codes per value.
    pub(crate) inverse: f32,
}

impl Step {
    /// The step of a row.
    pub(crate) fn of(row: &[f32]) -> Step {
        let magnitude = |value: &f32| value.to_bits() & 0x7fff_ffff; // ordered, NaN above all
        Step::of_peak(f32::from_bits(row.iter().map(magnitude).max().unwrap_or(0)))
    }

    /// The step of a row of this largest magnitude.
    #[inline(always)]
    pub(crate) fn of_peak(peak: f32) -> Step {
        let inverse = 127.0 / peak;
        if !peak.is_finite() {
            Step {
                scale: f32::NAN,
                inverse: 0.0,
            }
        } else if !inverse.is_finite() {
            Step {
                scale: 0.0,
                inverse: 0.0,
            }
        } else {
            Step {
                scale: peak / 127.0,
                inverse,
            }
        }
    }

    /// The code of a value of the row: rounded to the nearest, ties to even; 0 if the scale is NaN.
    pub(crate) fn code(self, value: f32) -> i8 {
        (value * self.inverse).round_ties_even() as i8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_reaches_the_peak_and_refuses_nothing() {
        let step = Step::of(&[0.5, -2.0, 1.0]);
        assert_eq!(step.scale, 2.0 / 127.0);
        assert_eq!(
            [0.5, -2.0, 1.0, 0.0].map(|v| step.code(v)),
            [32, -127, 64, 0]
        );
        for row in [[0.0, -0.0], [1e-38, -4e-39]] {
            let step = Step::of(&row);
            assert_eq!((step.scale, step.code(row[0])), (0.0, 0));
        }
        for row in [[1.0, f32::NAN], [f32::NEG_INFINITY, 0.0]] {
            let step = Step::of(&row);
            assert!(step.scale.is_nan());
            assert_eq!(row.map(|v| step.code(v)), [0, 0]);
        }
        let step = Step::of(&[f32::MAX, f32::MIN]);
        assert_eq!([step.code(f32::MAX), step.code(f32::MIN)], [127, -127]);
    }
}
