//! Panels of floats: the values as they are, or rounded to the type that was asked for.
//!
//! Decision: for each k, a panel holds the 32 columns' values side by side. bf16 holds the columns'
//! values of k and k+1 as neighbours, which is what the bf16 dot product takes, and what widens to
//! two f32 registers with a shift and a mask. An odd k of bf16 is padded with a zero row.

use std::ops::Range;

use half::{bf16, f16};

use super::{Columns, PANEL, WeightData, WeightDtype};

/// Packs a panel of one of the float types.
pub(super) fn pack_panel(dtype: WeightDtype, columns: &Columns<'_>, k: usize, panel: &mut [u8]) {
    let done = pack_fast(columns, dtype, panel);
    for block in (done..k).step_by(K_BLOCK) {
        let block = block..k.min(block + K_BLOCK);
        match dtype {
            WeightDtype::F32 => pack_f32(columns, block, bytemuck::cast_slice_mut(panel)),
            WeightDtype::F16 => pack_f16(columns, block, bytemuck::cast_slice_mut(panel)),
            _ => pack_bf16(columns, block, bytemuck::cast_slice_mut(panel)),
        }
    }
}

/// Column `column` of a panel of one of the float types, widened to f32.
pub(super) fn read_column(dtype: WeightDtype, panel: &[u8], column: usize, out: &mut [f32]) {
    match dtype {
        WeightDtype::F32 => {
            let values: &[f32] = bytemuck::cast_slice(panel);
            let lines = values.chunks_exact(PANEL);
            out.iter_mut()
                .zip(lines)
                .for_each(|(o, line)| *o = line[column]);
        }
        WeightDtype::F16 => {
            let values: &[f16] = bytemuck::cast_slice(panel);
            let lines = values.chunks_exact(PANEL);
            out.iter_mut()
                .zip(lines)
                .for_each(|(o, line)| *o = line[column].to_f32());
        }
        _ => {
            let values: &[bf16] = bytemuck::cast_slice(panel);
            for (pair, line) in out.chunks_mut(2).zip(values.chunks_exact(2 * PANEL)) {
                for (parity, o) in pair.iter_mut().enumerate() {
                    *o = line[2 * column + parity].to_f32();
                }
            }
        }
    }
}

/// Packs as much of k as the fast way can, and returns how much.
#[cfg(target_arch = "x86_64")]
fn pack_fast(columns: &Columns<'_>, dtype: WeightDtype, panel: &mut [u8]) -> usize {
    use crate::cpu::pack::{pack_units, pack_widened};

    let from = columns[0].and_then(|data| data.dtype());
    if columns
        .iter()
        .any(|data| data.and_then(|data| data.dtype()) != from)
    {
        return 0;
    }
    let rows = columns.map(|data| data.map_or(&[][..], |data| data.bytes()));
    match (from, dtype) {
        (Some(WeightDtype::F32), WeightDtype::F32) => pack_units(&rows, panel),
        (Some(WeightDtype::Bf16), WeightDtype::Bf16) => 2 * pack_units(&rows, panel),
        (Some(WeightDtype::Bf16), WeightDtype::F32) => pack_widened(&rows, panel),
        _ => 0,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn pack_fast(_: &Columns<'_>, _: WeightDtype, _: &mut [u8]) -> usize {
    0
}

/// Values of k packed at once: enough of each row for the memory's prefetcher, and a panel's part
/// of them stays in the nearest caches.
const K_BLOCK: usize = 128;

fn pack_f32(columns: &Columns<'_>, range: Range<usize>, panel: &mut [f32]) {
    let panel = &mut panel[range.start * PANEL..range.end * PANEL];
    let mut line = [0.0; K_BLOCK];
    for (c, data) in columns.iter().enumerate() {
        let Some(data) = data else { continue };
        widen(data, &range, &mut line);
        panel[c..]
            .iter_mut()
            .step_by(PANEL)
            .zip(line)
            .for_each(|(o, value)| *o = value);
    }
}

fn pack_f16(columns: &Columns<'_>, range: Range<usize>, panel: &mut [u16]) {
    let panel = &mut panel[range.start * PANEL..range.end * PANEL];
    let mut line = [0; K_BLOCK];
    for (c, data) in columns.iter().enumerate() {
        let Some(data) = data else { continue };
        match data {
            WeightData::F16(bytes) => copy_bits(bytes, &range, &mut line),
            data => narrow(data, &range, &mut line, |value| {
                f16::from_f32(value).to_bits()
            }),
        }
        panel[c..]
            .iter_mut()
            .step_by(PANEL)
            .zip(line)
            .for_each(|(o, bits)| *o = bits);
    }
}

fn pack_bf16(columns: &Columns<'_>, range: Range<usize>, panel: &mut [u16]) {
    let panel = &mut panel[range.start * PANEL..range.end.next_multiple_of(2) * PANEL];
    for (c, data) in columns.iter().enumerate() {
        let mut line = [0; K_BLOCK]; // zero beyond an odd k
        let Some(data) = data else { continue };
        match data {
            WeightData::Bf16(bytes) => copy_bits(bytes, &range, &mut line),
            data => narrow(data, &range, &mut line, |value| {
                bf16::from_f32(value).to_bits()
            }),
        }
        for (out, pair) in panel.chunks_exact_mut(2 * PANEL).zip(line.chunks_exact(2)) {
            out[2 * c..2 * c + 2].copy_from_slice(pair);
        }
    }
}

/// A row as f32.
pub(super) fn widen_row(data: &WeightData<'_>, row: &mut [f32]) {
    let k = row.len();
    let mut line = [0.0; K_BLOCK];
    for (block, row) in row.chunks_mut(K_BLOCK).enumerate() {
        let start = block * K_BLOCK;
        widen(data, &(start..k.min(start + K_BLOCK)), &mut line);
        row.copy_from_slice(&line[..row.len()]);
    }
}

/// Values `range` of a row as f32.
fn widen(data: &WeightData<'_>, range: &Range<usize>, line: &mut [f32; K_BLOCK]) {
    let size = data.value_size();
    let bytes = &data.bytes()[range.start * size..range.end * size];
    let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    let values = line.iter_mut().zip(bytes.chunks_exact(size));
    match data {
        WeightData::F32(_) => {
            values.for_each(|(o, b)| *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        }
        WeightData::Bf16(_) => values.for_each(|(o, b)| *o = bf16::from_bits(half(b)).to_f32()),
        WeightData::F16(_) => values.for_each(|(o, b)| *o = f16::from_bits(half(b)).to_f32()),
        WeightData::Bnb4 { .. } | WeightData::Int8 { .. } => data.not_floats(),
    }
}

/// Values `range` of a row in a 16-bit format.
fn narrow(
    data: &WeightData<'_>,
    range: &Range<usize>,
    line: &mut [u16; K_BLOCK],
    to_bits: impl Fn(f32) -> u16,
) {
    let mut wide = [0.0; K_BLOCK];
    widen(data, range, &mut wide);
    line.iter_mut()
        .zip(wide)
        .take(range.len())
        .for_each(|(o, value)| *o = to_bits(value));
}

/// Values `range` of a row that has the 16-bit format already.
fn copy_bits(bytes: &[u8], range: &Range<usize>, line: &mut [u16; K_BLOCK]) {
    let bytes = &bytes[range.start * 2..range.end * 2];
    let values = line.iter_mut().zip(bytes.chunks_exact(2));
    values.for_each(|(o, b)| *o = u16::from_le_bytes([b[0], b[1]]));
}
