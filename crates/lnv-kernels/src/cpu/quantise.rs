//! Quantising weights while a model loads.
//!
//! Decision: 64 values of k of a panel's 32 columns at a time. 4-bit groups are turned so that a
//! lane is a column: sums over k stay in their lanes, and codes end up where the panel wants them.
//! The arithmetic is that of `weight/q8.rs` and `weight/q4.rs`, operation by operation (no fused
//! multiplication where it would round once instead of twice), so the bytes are the same on every
//! instruction set.

use std::ops::Range;

use half::f16;

use crate::cpu::launch::{Kernel, launch};
use crate::cpu::quantised::{CHUNK, Codes, largest_magnitudes};
use crate::cpu::simd::Simd;
use crate::isa::Isa;
use crate::weight::q8::Step;
use crate::weight::{Columns, PANEL, WeightData, q4, q8};

/// Quantises a panel to 8 bits, if the processor has what it takes.
pub(crate) fn q8_panel(columns: &Columns<'_>, k: usize, panel: &mut [u8]) -> bool {
    let Some(isa) = Isa::widest() else {
        return false;
    };
    launch(isa, Q8Panel { columns, k, panel });
    true
}

/// Quantises a panel to 4 bits, if the processor has what it takes.
pub(crate) fn q4_panel(columns: &Columns<'_>, k: usize, panel: &mut [u8]) -> bool {
    let Some(isa) = Isa::widest() else {
        return false;
    };
    launch(isa, Q4Panel { columns, k, panel });
    true
}

struct Q8Panel<'a> {
    columns: &'a Columns<'a>,
    k: usize,
    panel: &'a mut [u8],
}

impl Kernel for Q8Panel<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert_eq!(self.panel.len(), q8::panel_len(self.k));
        let mut steps = [Step::default(); PANEL];
        for (step, data) in steps.iter_mut().zip(self.columns) {
            if let Some(data) = data {
                *step = row_step(s, data, self.k);
            }
        }
        let (codes, scales) = self.panel.split_at_mut(self.panel.len() - 4 * PANEL);
        let scales: &mut [f32] = bytemuck::cast_slice_mut(scales);
        for (scale, step) in scales.iter_mut().zip(&steps) {
            *scale = step.scale;
        }
        let codes: &mut [u32] = bytemuck::cast_slice_mut(codes);
        let mut line = [0.0; CHUNK];
        for (start, codes) in (0..self.k)
            .step_by(CHUNK)
            .zip(codes.chunks_mut(CHUNK / 4 * PANEL))
        {
            for (column, (data, step)) in self.columns.iter().zip(&steps).enumerate() {
                let mut chunk = Codes::default();
                if let Some(data) = data.filter(|_| !step.scale.is_nan()) {
                    widen(s, &data, start..self.k.min(start + CHUNK), &mut line);
                    chunk.fill(s, &line, *step);
                }
                chunk.add_zero();
                // SAFETY: the part has whole lines of PANEL elements, and column is below PANEL.
                unsafe {
                    let out = codes.as_mut_ptr().add(column);
                    chunk.store(codes.len() / PANEL, out, PANEL);
                }
            }
        }
    }
}

/// The step of a row of weights.
#[inline(always)]
fn row_step<S: Simd>(s: S, data: &WeightData<'_>, k: usize) -> Step {
    let (mut line, mut peaks) = ([0.0; CHUNK], s.splat_i(0));
    for start in (0..k).step_by(CHUNK) {
        widen(s, data, start..k.min(start + CHUNK), &mut line);
        peaks = largest_magnitudes(s, &line, peaks);
    }
    Step::of_peak(f32::from_bits(s.largest_i(peaks) as u32))
}

/// Values `range` of a row as f32, zeros beyond its end.
#[inline(always)]
fn widen<S: Simd>(s: S, data: &WeightData<'_>, range: Range<usize>, line: &mut [f32; CHUNK]) {
    let (size, len) = (data.value_size(), range.len());
    let bytes = &data.bytes()[range.start * size..range.end * size];
    if len < CHUNK {
        line.fill(0.0);
    }
    match data {
        WeightData::F32(_) => {
            bytemuck::cast_slice_mut(&mut line[..len]).copy_from_slice(bytes);
        }
        WeightData::Bf16(_) => {
            for (value, bits) in line.iter_mut().zip(bytes.chunks_exact(2)) {
                let bits = u16::from_le_bytes([bits[0], bits[1]]);
                *value = f32::from_bits(u32::from(bits) << 16);
            }
        }
        WeightData::F16(_) if len == CHUNK => {
            for at in (0..CHUNK).step_by(S::LANES) {
                // SAFETY: both have CHUNK values, and at + LANES is at most CHUNK.
                unsafe {
                    let value = s.load_f16(bytes.as_ptr().add(2 * at));
                    s.store(line.as_mut_ptr().add(at), value);
                }
            }
        }
        WeightData::F16(_) => {
            for (value, bits) in line.iter_mut().zip(bytes.chunks_exact(2)) {
                *value = f16::from_le_bytes([bits[0], bits[1]]).to_f32();
            }
        }
        WeightData::Bnb4 { .. } | WeightData::Int8 { .. } => data.not_floats(),
    }
}

struct Q4Panel<'a> {
    columns: &'a Columns<'a>,
    k: usize,
    panel: &'a mut [u8],
}

impl Kernel for Q4Panel<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut block = Block([[0.0; PANEL]; q4::GROUP]);
        let groups = self.panel.chunks_exact_mut(q4::GROUP_BYTES);
        for (start, group) in (0..self.k).step_by(q4::GROUP).zip(groups) {
            block.fill(s, self.columns, start..self.k.min(start + q4::GROUP));
            let mut inverse = [0.0; PANEL];
            for first in (0..PANEL).step_by(S::LANES) {
                block.search(s, first, &mut inverse);
            }
            for (inverse, scale) in inverse
                .iter_mut()
                .zip(group[q4::CODES..].chunks_exact_mut(2))
            {
                let rounded = f16::from_f32(*inverse);
                scale.copy_from_slice(&rounded.to_le_bytes());
                *inverse = q4::inverse(rounded.to_f32());
            }
            for first in (0..PANEL).step_by(S::LANES) {
                block.encode(s, first, &inverse, group);
            }
        }
    }
}

/// A group of a panel: for each k, the columns' values.
#[repr(align(64))]
struct Block([[f32; PANEL]; q4::GROUP]);

impl Block {
    #[inline(always)]
    fn fill<S: Simd>(&mut self, s: S, columns: &Columns<'_>, range: Range<usize>) {
        let mut line = [0.0; CHUNK];
        for (column, data) in columns.iter().enumerate() {
            if let Some(data) = data {
                widen(s, data, range.clone(), &mut line);
            } else {
                line.fill(0.0);
            }
            for (values, value) in self.0.iter_mut().zip(&line) {
                // Volatile, for else the compiler makes scatters of these, which are slower.
                // SAFETY: a place in an array, by its reference.
                unsafe { std::ptr::from_mut(&mut values[column]).write_volatile(*value) };
            }
        }
    }

    /// A register of columns' values of k.
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, k: usize, first: usize) -> S::F {
        let values = &self.0[k][first..first + S::LANES];
        // SAFETY: a register's values.
        unsafe { s.load(values.as_ptr()) }
    }

    /// The scales of a register of columns, before they are rounded: as `q4::search`.
    #[inline(always)]
    fn search<S: Simd>(&self, s: S, first: usize, scales: &mut [f32; PANEL]) {
        let zero = s.splat(0.0);
        let (mut peak, mut finite) = (zero, zero);
        for k in 0..q4::GROUP {
            let value = self.load(s, k, first);
            peak = s.max(s.abs(value), peak);
            finite = s.fma(value, zero, finite); // from then on NaN if the value is not
        }
        let (mut best, mut scale) = (zero, zero);
        for place in q4::PEAKS {
            let (dot, norm) = self.fit(s, first, s.div(s.splat(place), peak));
            let removed = s.div(s.mul(dot, dot), norm);
            scale = s.if_less(best, removed, s.div(dot, norm), scale);
            best = s.if_less(best, removed, removed, best);
        }
        let inverse = s.if_less(zero, s.abs(scale), s.div(s.splat(1.0), scale), zero);
        let (dot, norm) = self.fit(s, first, inverse);
        let refined = s.div(dot, norm);
        let infinity = s.splat(f32::INFINITY);
        scale = s.if_less(s.abs(refined), infinity, refined, scale);
        scale = s.if_less(zero, peak, scale, zero);
        scale = s.if_less(finite, s.splat(1.0), scale, s.splat(f32::NAN));
        let values = &mut scales[first..first + S::LANES];
        // SAFETY: a register's values.
        unsafe { s.store(values.as_mut_ptr(), scale) };
    }

    /// For the levels at these many levels per value: values times levels, and levels times levels.
    #[inline(always)]
    fn fit<S: Simd>(&self, s: S, first: usize, inverse: S::F) -> (S::F, S::F) {
        let (mut dot, mut norm) = (s.splat(0.0), s.splat(0.0));
        for k in 0..q4::GROUP {
            let value = self.load(s, k, first);
            let scaled = s.mul(value, inverse);
            let mut level = s.splat(q4::LEVELS[0]);
            for (bound, next) in q4::BOUNDS.iter().zip(&q4::LEVELS[1..]) {
                level = s.if_less(s.splat(*bound), scaled, s.splat(*next), level);
            }
            dot = s.add(dot, s.mul(value, level));
            norm = s.fma(level, level, norm); // whole numbers: exact, as the slow twin's
        }
        (dot, norm)
    }

    /// The codes of a register of columns, to the group.
    #[inline(always)]
    fn encode<S: Simd>(&self, s: S, first: usize, inverse: &[f32; PANEL], group: &mut [u8]) {
        let group = &mut group[..q4::CODES];
        let columns = &inverse[first..first + S::LANES];
        // SAFETY: a register's values.
        let inverse = unsafe { s.load(columns.as_ptr()) };
        let (zero, one) = (s.splat(0.0), s.splat(1.0));
        // Leaves a whole number in the lowest bits.
        let round = s.splat(12_582_912.0);
        let (lowest, lines) = (s.splat_i(15), group.chunks_exact_mut(4 * PANEL));
        for (eight, line) in lines.enumerate() {
            let mut codes = s.splat_i(0);
            for k in 0..8 {
                let scaled = s.mul(self.load(s, 8 * eight + k, first), inverse);
                let mut code = zero;
                for bound in q4::BOUNDS {
                    code = s.if_less(s.splat(bound), scaled, s.add(code, one), code);
                }
                let code = s.ints(s.add(code, round));
                let shift = k % 4 * 8 + k / 4 * 4;
                codes = s.add_i(codes, s.left(s.and(code, lowest), shift as i32));
            }
            let line = &mut line[4 * first..4 * (first + S::LANES)];
            // SAFETY: a register's bytes.
            unsafe { s.store(line.as_mut_ptr().cast(), s.floats(codes)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::buffer::Aligned;

    /// Values of several magnitudes, and some that cannot be quantised.
    fn values(len: usize) -> Vec<f32> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let value = |i: usize, v: f32| match i {
            5000 => f32::NAN,
            7000 => f32::INFINITY,
            100..=400 => 0.0,
            401..=600 => 1e-42,
            _ => v * v * v * [1.0, 1e-6, 3e4, 1e-30][i / 997 % 4],
        };
        (0..len).map(|i| value(i, next())).collect()
    }

    /// A panel with something in it.
    fn panel(len: usize) -> Aligned<u8> {
        let mut panel = Aligned::zeroed(len);
        panel.as_mut_slice().fill(9);
        panel
    }

    fn columns<'a>(data: WeightData<'a>, n: usize, k: usize) -> Columns<'a> {
        std::array::from_fn(|c| (c < n).then(|| data.row(c, k)))
    }

    #[test]
    fn panels_have_the_bytes_of_the_slow_twins_everywhere() {
        for (n, k) in [(32, 512), (32, 64), (31, 331), (1, 1), (7, 127), (32, 1000)] {
            let source = values(n * k);
            let wide: Vec<u8> = source.iter().flat_map(|v| v.to_le_bytes()).collect();
            let brain = source.iter().map(|v| bf16::from_f32(*v));
            let brain: Vec<u8> = brain.flat_map(|v| v.to_le_bytes()).collect();
            let half = source.iter().map(|v| f16::from_f32(*v));
            let half: Vec<u8> = half.flat_map(|v| v.to_le_bytes()).collect();
            for data in [
                WeightData::F32(&wide),
                WeightData::Bf16(&brain),
                WeightData::F16(&half),
            ] {
                let columns = columns(data, n, k);
                let (mut slow8, mut slow4) = (panel(q8::panel_len(k)), panel(q4::panel_len(k)));
                q8::pack_slowly(&columns, k, slow8.as_mut_slice());
                q4::pack_slowly(&columns, k, slow4.as_mut_slice());
                for isa in Isa::available()
                    .into_iter()
                    .filter(|isa| *isa != Isa::Scalar)
                {
                    let (mut fast8, mut fast4) = (panel(q8::panel_len(k)), panel(q4::panel_len(k)));
                    let columns = &columns;
                    let panel = fast8.as_mut_slice();
                    launch(isa, Q8Panel { columns, k, panel });
                    let panel = fast4.as_mut_slice();
                    launch(isa, Q4Panel { columns, k, panel });
                    let same = [
                        fast8.as_slice() == slow8.as_slice(),
                        fast4.as_slice() == slow4.as_slice(),
                    ];
                    assert_eq!(same, [true; 2], "{isa} {:?} {n}x{k}", data.dtype());
                }
            }
        }
    }
}
