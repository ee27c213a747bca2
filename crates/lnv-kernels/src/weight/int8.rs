//! LLM.int8() weights of bitsandbytes: 8-bit codes, and the largest magnitude of each output's row.
//!
//! Decision: a weight is `code * SCB / 127`. A panel is laid out as one of `q8.rs` (128 added to each
//! code, 32 f32 at the end), because the same step multiplies it; what stands at the end is SCB, as it
//! came. Activations are not quantised as there: those of a magnitude of [`Int8::threshold`] or more
//! are left out of the row's codes and multiplied as they are, in f32, with the weight's values.
//! bitsandbytes decides that for whole columns of a batch; here each row decides for itself, so that
//! its result depends on no other row. The difference is that of the quantisation of one value.

use super::{Columns, PANEL, WeightData, bnb, float, q8};

/// How LLM.int8() weights are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Int8 {
    /// The bits of an f32, so that types can be compared.
    threshold: u32,
}

impl Int8 {
    /// `llm_int8_threshold`: the magnitude from which on activations are not quantised; 0 for never.
    pub fn new(threshold: f32) -> Int8 {
        Int8 {
            threshold: threshold.to_bits(),
        }
    }

    /// The magnitude from which on activations are not quantised; 0 for never.
    pub fn threshold(self) -> f32 {
        f32::from_bits(self.threshold)
    }

    /// Whether an activation is not quantised.
    pub(crate) fn leaves_out(self, value: f32) -> bool {
        self.threshold() > 0.0 && value.abs() >= self.threshold()
    }
}

/// The largest magnitudes (SCB) of a panel's columns.
pub(crate) fn peaks(panel: &[u8]) -> &[f32] {
    q8::scales(panel)
}

/// The value of k of a column.
pub(crate) fn value(panel: &[u8], column: usize, k: usize) -> f32 {
    q8::code(panel, column, k) as f32 * peaks(panel)[column] * bnb::INT8_STEP
}

/// Column `column` of a panel as f32.
pub(super) fn read_column(panel: &[u8], column: usize, out: &mut [f32]) {
    for (k, out) in out.iter_mut().enumerate() {
        *out = value(panel, column, k);
    }
}

/// Packs a panel: codes as they are, and floats quantised as bitsandbytes does it.
pub(super) fn pack_panel(columns: &Columns<'_>, k: usize, panel: &mut [u8]) {
    let (codes, peaks) = panel.split_at_mut(panel.len() - 4 * PANEL);
    codes.fill(q8::ZERO);
    let peaks: &mut [f32] = bytemuck::cast_slice_mut(peaks);
    peaks.fill(0.0);
    let (mut row, mut row_codes) = (vec![0.0; k], vec![0; k]);
    for (column, data) in columns.iter().enumerate() {
        match data {
            None => {}
            Some(WeightData::Int8 { codes: given, scb }) => {
                peaks[column] = scb.first().copied().unwrap_or(0.0);
                pack_column(given, column, codes);
            }
            Some(data) => {
                float::widen_row(data, &mut row);
                peaks[column] = bnb::quantize_int8_row(&row, &mut row_codes);
                pack_column(&row_codes, column, codes);
            }
        }
    }
}

fn pack_column(given: &[u8], column: usize, codes: &mut [u8]) {
    let places = codes[q8::STEP_K * column..].chunks_mut(q8::STEP_K * PANEL);
    for (given, place) in given.chunks(q8::STEP_K).zip(places) {
        for (given, code) in given.iter().zip(place) {
            *code = given ^ q8::ZERO; // 128 added
        }
    }
}
