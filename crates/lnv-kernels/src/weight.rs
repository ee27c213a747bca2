//! Packed weights.
//!
//! Decision: one resident copy of each weight, repacked once while loading into panels of
//! [`PANEL`] = 32 output columns (two AVX-512 registers). For each k, a panel holds the 32 columns'
//! values side by side, so that every kernel, from one row to a thousand, reads the weight as one
//! sequential stream. bf16 holds the columns' values of k and k+1 as neighbours, which is what the
//! bf16 dot product takes, and what widens to two f32 registers with a shift and a mask.
//! The last panel is padded with zero columns, and an odd k of bf16 with a zero row.
//!
//! Refused: keeping a second, row-major copy. A row (an embedding) is gathered out of its panel.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::KernelError;
use crate::buffer::Aligned;

/// Output columns in a panel.
pub(crate) const PANEL: usize = 32;

/// How a weight is stored in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// 32-bit floats.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
}

/// Little-endian values as they lie in a checkpoint, at any alignment.
#[derive(Debug, Clone, Copy)]
pub enum WeightData<'a> {
    /// 32-bit floats.
    F32(&'a [u8]),
    /// bfloat16.
    Bf16(&'a [u8]),
    /// IEEE half precision.
    F16(&'a [u8]),
}

impl<'a> WeightData<'a> {
    fn bytes(&self) -> &'a [u8] {
        match self {
            WeightData::F32(bytes) | WeightData::Bf16(bytes) | WeightData::F16(bytes) => bytes,
        }
    }

    fn dtype(&self) -> WeightDtype {
        match self {
            WeightData::F32(_) => WeightDtype::F32,
            WeightData::Bf16(_) => WeightDtype::Bf16,
            WeightData::F16(_) => WeightDtype::F16,
        }
    }

    fn value_size(&self) -> usize {
        match self {
            WeightData::F32(_) => 4,
            WeightData::Bf16(_) | WeightData::F16(_) => 2,
        }
    }

    fn row(&self, row: usize, k: usize) -> WeightData<'a> {
        let size = self.value_size() * k;
        let range = row * size..(row + 1) * size;
        match self {
            WeightData::F32(bytes) => WeightData::F32(&bytes[range]),
            WeightData::Bf16(bytes) => WeightData::Bf16(&bytes[range]),
            WeightData::F16(bytes) => WeightData::F16(&bytes[range]),
        }
    }
}

/// Some of a weight's rows: `[n, k]`, row-major.
#[derive(Debug, Clone, Copy)]
pub struct WeightPart<'a> {
    /// The values.
    pub data: WeightData<'a>,
    /// Number of rows.
    pub n: usize,
}

pub(crate) enum Panels {
    F32(Aligned<f32>),
    Bf16(Aligned<u16>),
    F16(Aligned<u16>),
}

/// A weight matrix `[n, k]` (n outputs, k inputs), packed by [`crate::Ops::pack`].
pub struct Weight {
    n: usize,
    k: usize,
    panels: Panels,
}

impl Weight {
    /// Number of outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Number of inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How it is stored.
    pub fn dtype(&self) -> WeightDtype {
        match self.panels {
            Panels::F32(_) => WeightDtype::F32,
            Panels::Bf16(_) => WeightDtype::Bf16,
            Panels::F16(_) => WeightDtype::F16,
        }
    }

    /// Resident bytes, padding included.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(data) => data.bytes(),
            Panels::Bf16(data) | Panels::F16(data) => data.bytes(),
        }
    }

    pub(crate) fn panels(&self) -> &Panels {
        &self.panels
    }

    /// Rows of a panel: k, made even for bf16.
    pub(crate) fn padded_k(&self) -> usize {
        padded_k(self.dtype(), self.k)
    }

    /// Writes row `n` of the matrix, widened to f32, to `out` (`[k]`).
    pub(crate) fn read_row(&self, n: usize, out: &mut [f32]) {
        let column = n % PANEL;
        let panel_len = self.padded_k() * PANEL;
        let range = n / PANEL * panel_len..(n / PANEL + 1) * panel_len;
        match &self.panels {
            Panels::F32(data) => {
                let panel = data.as_slice()[range].chunks_exact(PANEL);
                out.iter_mut()
                    .zip(panel)
                    .for_each(|(o, values)| *o = values[column]);
            }
            Panels::F16(data) => {
                let panel = data.as_slice()[range].chunks_exact(PANEL);
                let wide = |values: &[u16]| f16::from_bits(values[column]).to_f32();
                out.iter_mut()
                    .zip(panel)
                    .for_each(|(o, values)| *o = wide(values));
            }
            Panels::Bf16(data) => {
                let panel = data.as_slice()[range].chunks_exact(2 * PANEL);
                for (pair, values) in out.chunks_mut(2).zip(panel) {
                    for (parity, o) in pair.iter_mut().enumerate() {
                        *o = bf16::from_bits(values[2 * column + parity]).to_f32();
                    }
                }
            }
        }
    }

    /// Packs the parts, concatenated along n.
    pub(crate) fn pack(
        parts: &[WeightPart<'_>],
        k: usize,
        dtype: WeightDtype,
    ) -> Result<Weight, KernelError> {
        for part in parts {
            let expected = part.n * k * part.data.value_size();
            let found = part.data.bytes().len();
            if found != expected {
                return Err(KernelError::WeightSize {
                    rows: part.n,
                    k,
                    expected,
                    found,
                });
            }
        }
        let n = parts.iter().map(|part| part.n).sum();
        let len = usize::div_ceil(n, PANEL) * PANEL * padded_k(dtype, k);
        let source = Source { parts, k };
        let panels = match dtype {
            WeightDtype::F32 => Panels::F32(source.fill(dtype, len, pack_f32)),
            WeightDtype::Bf16 => Panels::Bf16(source.fill(dtype, len, pack_bf16)),
            WeightDtype::F16 => Panels::F16(source.fill(dtype, len, pack_f16)),
        };
        Ok(Weight { n, k, panels })
    }
}

impl std::fmt::Debug for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weight[{}, {}; {:?}]", self.n, self.k, self.dtype())
    }
}

fn padded_k(dtype: WeightDtype, k: usize) -> usize {
    if dtype == WeightDtype::Bf16 {
        k.next_multiple_of(2)
    } else {
        k
    }
}

/// The rows of a panel's columns; `None` beyond the last column.
type Columns<'a> = [Option<WeightData<'a>>; PANEL];

struct Source<'a> {
    parts: &'a [WeightPart<'a>],
    k: usize,
}

impl<'a> Source<'a> {
    fn row(&self, mut n: usize) -> Option<WeightData<'a>> {
        for part in self.parts {
            if n < part.n {
                return Some(part.data.row(n, self.k));
            }
            n -= part.n;
        }
        None
    }

    fn fill<T>(&self, dtype: WeightDtype, len: usize, pack: PackPanel<T>) -> Aligned<T>
    where
        T: Send + bytemuck::Pod,
    {
        let mut packed = Aligned::zeroed(len);
        let panel_len = padded_k(dtype, self.k) * PANEL;
        let panels = packed
            .as_mut_slice()
            .par_chunks_mut(panel_len.max(1))
            .enumerate();
        panels.for_each(|(index, panel)| {
            let columns: Columns<'_> = std::array::from_fn(|c| self.row(index * PANEL + c));
            let done = pack_fast(&columns, dtype, bytemuck::cast_slice_mut(panel));
            for block in (done..self.k).step_by(K_BLOCK) {
                pack(&columns, block..self.k.min(block + K_BLOCK), panel);
            }
        });
        packed
    }
}

/// Packs as much of k as the fast way can, and returns how much.
#[cfg(target_arch = "x86_64")]
fn pack_fast(columns: &Columns<'_>, dtype: WeightDtype, panel: &mut [u8]) -> usize {
    use crate::cpu::pack::{pack_units, pack_widened};

    let from = columns[0].map(|data| data.dtype());
    if columns
        .iter()
        .any(|data| data.map(|data| data.dtype()) != from)
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

/// Values of k packed at once: enough of each row for the memory's prefetcher, and a panel's part of
/// them stays in the nearest caches.
const K_BLOCK: usize = 128;

type PackPanel<T> = fn(&Columns<'_>, Range<usize>, &mut [T]);

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

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, k: usize) -> Vec<f32> {
        (0..n * k)
            .map(|i| ((i * 37 % 1001) as f32 - 500.0) / 64.0)
            .collect()
    }

    fn round_trip(weight: &Weight, expected: &[f32]) {
        let mut row = vec![0.0; weight.k()];
        for n in 0..weight.n() {
            weight.read_row(n, &mut row);
            assert_eq!(
                row,
                expected[n * weight.k()..(n + 1) * weight.k()],
                "row {n}"
            );
        }
    }

    #[test]
    fn rows_come_back_from_every_format_in_every_format() {
        for (n, k) in [(1, 1), (5, 7), (32, 32), (33, 65), (70, 34), (64, 163)] {
            let source = values(n, k);
            let to_bf16 = |v: &f32| bf16::from_f32(*v);
            let to_f16 = |v: &f32| f16::from_f32(*v);
            let wide: Vec<u8> = source.iter().flat_map(|v| v.to_le_bytes()).collect();
            let brain: Vec<u8> = source
                .iter()
                .flat_map(|v| to_bf16(v).to_le_bytes())
                .collect();
            let half: Vec<u8> = source
                .iter()
                .flat_map(|v| to_f16(v).to_le_bytes())
                .collect();
            let brain_values: Vec<f32> = source.iter().map(|v| to_bf16(v).to_f32()).collect();
            for (data, exact) in [
                (WeightData::F32(&wide), &source),
                (WeightData::Bf16(&brain), &brain_values),
                (WeightData::F16(&half), &source),
            ] {
                let part = [WeightPart { data, n }];
                for dtype in [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::F16] {
                    let weight = Weight::pack(&part, k, dtype).expect("sizes fit");
                    assert_eq!((weight.n(), weight.k(), weight.dtype()), (n, k, dtype));
                    let bf16_exact = dtype == WeightDtype::Bf16;
                    round_trip(&weight, if bf16_exact { &brain_values } else { exact });
                }
            }
        }
    }

    #[test]
    fn parts_are_concatenated_across_panels_at_any_alignment() {
        let (k, sizes) = (3, [10, 30, 1]);
        let source = values(41, k);
        let mut bytes = vec![0];
        bytes.extend(source.iter().flat_map(|v| v.to_le_bytes()));
        let mut start = 1;
        let parts = sizes.map(|n| {
            let data = WeightData::F32(&bytes[start..start + n * k * 4]);
            start += n * k * 4;
            WeightPart { data, n }
        });
        round_trip(
            &Weight::pack(&parts, k, WeightDtype::F32).expect("sizes fit"),
            &source,
        );
    }

    #[test]
    fn wrong_sizes_are_told() {
        let part = [WeightPart {
            data: WeightData::Bf16(&[0; 11]),
            n: 2,
        }];
        let error = Weight::pack(&part, 3, WeightDtype::Bf16).expect_err("wrong");
        assert!(
            error
                .to_string()
                .contains("takes 12 bytes, but there are 11"),
            "{error}"
        );
    }
}
