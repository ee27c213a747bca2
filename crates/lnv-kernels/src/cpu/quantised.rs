//! Products with quantised weights: what a step does, and how activations become bytes.
//!
//! Decision: the loop nest is that of every other format. 8-bit sums stay integers from the first
//! block of k to the last, as the bits of the waiting sums; scales come with the epilogue. The 128
//! that is added to each weight code adds 128 times the sum of the row's codes, which the row's head
//! takes off again. A step of 4-bit weights is a group of 64: its integer sums live in registers,
//! start at -8 times the sum of the row's codes in the group (packed beside the codes), and are
//! added, times the group's scales, to the f32 sums.

use std::marker::PhantomData;

use crate::cpu::formats::{Format, Head, fetch_line};
use crate::cpu::int::Dot;
use crate::cpu::simd::{Kernel, Simd};
use crate::isa::Isa;
use crate::weight::q8::Step;
use crate::weight::{PANEL, q4, q8};

/// 8-bit weights.
#[derive(Clone, Copy)]
pub(crate) struct Q8<D>(PhantomData<D>);

impl<D: Dot> Format for Q8<D> {
    const COLUMN_BYTES: usize = q8::STEP_K;
    const STEP_K: usize = q8::STEP_K;
    const A_PER_STEP: usize = 1;
    const TAIL_BYTES: usize = 4 * PANEL;
    const HEADS: bool = true;

    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        D::launch(isa, kernel);
    }

    #[inline(always)]
    fn step_of<S: Simd>(s: S, x: &[f32]) -> Step {
        step_of(s, x)
    }

    #[inline(always)]
    unsafe fn pack_row<S: Simd>(
        s: S,
        x: &[f32],
        step: Step,
        elements: usize,
        out: *mut u32,
        stride: usize,
    ) -> i32 {
        let (mut codes, mut sum, mut first) = (Codes::default(), s.splat_i(0), 0);
        for x in x.chunks(CHUNK) {
            sum = s.add_i(sum, codes.fill(s, x, step));
            let count = (elements - first).min(CHUNK / 4);
            // SAFETY: elements first..first + count are below `elements`.
            unsafe { codes.store(count, out.add(first * stride), stride) };
            first += count;
        }
        let sum = codes_sum(s, sum, x.len().div_ceil(CHUNK));
        sum.wrapping_mul(-i32::from(q8::ZERO))
    }

    #[inline(always)]
    unsafe fn step<S: Simd, const ROWS: usize, const V: usize>(
        s: S,
        acc: &mut [[S::F; V]; ROWS],
        a: *const u32,
        w: *const u8,
        first: usize,
    ) {
        let mut columns = [s.splat_i(0); V];
        for (v, columns) in columns.iter_mut().enumerate() {
            // SAFETY: the caller's contract: V registers of columns at w, from first on.
            *columns = unsafe { s.load_i(w.add(4 * (first + v * S::LANES))) };
        }
        for (row, acc) in acc.iter_mut().enumerate() {
            for (acc, columns) in acc.iter_mut().zip(columns) {
                // SAFETY: the caller's contract: ROWS elements at a; only inside launch.
                let sums = unsafe { D::dot(s, s.ints(*acc), columns, *a.add(row)) };
                *acc = s.floats(sums);
            }
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(s: S, sums: S::F, tail: *const u8, head: &Head) -> S::F {
        // SAFETY: the caller's contract: the scales of a register's columns.
        let scales = unsafe { s.load(tail.cast()) };
        let sums = s.add_i(s.ints(sums), s.splat_i(head.correction));
        s.mul(s.mul(s.to_float(sums), scales), s.splat(head.scale))
    }
}

/// 4-bit weights. A packed row has, for each group, its 16 elements of codes and then what the
/// group's integer sums start with.
#[derive(Clone, Copy)]
pub(crate) struct Q4<D>(PhantomData<D>);

impl<D: Dot> Format for Q4<D> {
    const COLUMN_BYTES: usize = q4::GROUP_BYTES / PANEL;
    const STEP_K: usize = q4::GROUP;
    const A_PER_STEP: usize = q4::GROUP / 4 + 1;
    const HEADS: bool = true;

    /// Integer and f32 sums take twice the registers.
    #[inline(always)]
    fn registers(rows: usize, lanes: usize) -> usize {
        match (lanes, rows) {
            (16, 1..=6) => 2,
            (8, 1) => 4,
            (8, 2) => 2,
            _ => 1,
        }
    }

    #[inline(always)]
    fn fetch<S: Simd, const V: usize>(w: *const u8, first: usize) {
        if V * S::LANES == PANEL {
            for line in (0..q4::GROUP_BYTES).step_by(64) {
                fetch_line(w.wrapping_add(line));
            }
            return;
        }
        for eight in 0..q4::GROUP / 8 {
            fetch_line(w.wrapping_add(4 * (eight * PANEL + first)));
        }
        fetch_line(w.wrapping_add(q4::CODES));
    }

    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        D::launch(isa, kernel);
    }

    #[inline(always)]
    fn step_of<S: Simd>(s: S, x: &[f32]) -> Step {
        step_of(s, x)
    }

    #[inline(always)]
    unsafe fn pack_row<S: Simd>(
        s: S,
        x: &[f32],
        step: Step,
        elements: usize,
        out: *mut u32,
        stride: usize,
    ) -> i32 {
        let mut codes = Codes::default();
        let groups = (0..elements).step_by(Self::A_PER_STEP);
        for (x, first) in x.chunks(q4::GROUP).zip(groups) {
            let sum = codes.fill(s, x, step);
            let start = codes_sum(s, sum, 1).wrapping_mul(-i32::from(q4::ZERO));
            // SAFETY: first is below `elements`, which is a multiple of a group's.
            unsafe {
                codes.store(q4::GROUP / 4, out.add(first * stride), stride);
                *out.add((first + q4::GROUP / 4) * stride) = start as u32;
            }
        }
        0
    }

    #[inline(always)]
    unsafe fn step<S: Simd, const ROWS: usize, const V: usize>(
        s: S,
        acc: &mut [[S::F; V]; ROWS],
        a: *const u32,
        w: *const u8,
        first: usize,
    ) {
        let mask = s.splat_i(0x0f0f_0f0f);
        let mut sums = [[mask; V]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's contract: ROWS * A_PER_STEP elements at a.
            let start = unsafe { *a.add(q4::GROUP / 4 * ROWS + row) };
            *sums = [s.splat_i(start as i32); V];
        }
        for eight in 0..q4::GROUP / 8 {
            let (mut low, mut high) = ([mask; V], [mask; V]);
            for (v, (low, high)) in low.iter_mut().zip(&mut high).enumerate() {
                // SAFETY: the caller's contract: the codes of the group's columns.
                let codes = unsafe { s.load_i(w.add(4 * (eight * PANEL + first + v * S::LANES))) };
                *low = s.and(codes, mask);
                *high = s.and(s.right16::<4>(codes), mask);
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                for (v, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: the caller's contract, as above; only inside launch.
                    unsafe {
                        let a = a.add(2 * eight * ROWS + row);
                        *sums = D::dot(s, *sums, low[v], *a);
                        *sums = D::dot(s, *sums, high[v], *a.add(ROWS));
                    }
                }
            }
        }
        for v in 0..V {
            // SAFETY: the caller's contract: the scales of the group's columns.
            let scales = unsafe { s.load_f16(w.add(q4::CODES + 2 * (first + v * S::LANES))) };
            for (acc, sums) in acc.iter_mut().zip(&sums) {
                acc[v] = s.fma(s.to_float(sums[v]), scales, acc[v]);
            }
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(s: S, sums: S::F, _: *const u8, head: &Head) -> S::F {
        s.mul(sums, s.splat(head.scale))
    }
}

/// How a row becomes codes: [`Step::of`].
#[inline(always)]
fn step_of<S: Simd>(s: S, x: &[f32]) -> Step {
    // Magnitudes compared as integers, so that NaN is above all.
    let magnitude = s.splat_i(0x7fff_ffff);
    let mut peaks = [s.splat_i(0); 4];
    for chunk in x.chunks(4 * S::LANES) {
        for (index, peak) in peaks.iter_mut().enumerate() {
            let start = (index * S::LANES).min(chunk.len());
            let live = S::LANES.min(chunk.len() - start);
            // SAFETY: `live` values from start on are inside the chunk.
            let values = unsafe { s.load_part(chunk.as_ptr().add(start), live) };
            *peak = s.max_i(*peak, s.and(s.ints(values), magnitude));
        }
    }
    let [a, b, c, d] = peaks;
    let peak = s.largest_i(s.max_i(s.max_i(a, b), s.max_i(c, d)));
    Step::of_peak(f32::from_bits(peak as u32))
}

/// Values that are quantised at a time.
const CHUNK: usize = q4::GROUP;
/// Added to a code, a float whose last bit stands for 1: rounds the code as [`Step::code`] does and
/// leaves it in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// The codes of some values of a row.
#[derive(Default)]
struct Codes([u32; CHUNK / 4]);

impl Codes {
    /// The codes of x, zeros beyond its end. Returns lanes of which [`codes_sum`] makes their sum.
    #[inline(always)]
    fn fill<S: Simd>(&mut self, s: S, x: &[f32], step: Step) -> S::I {
        let mut padded = [0.0; CHUNK];
        let x: &[f32; CHUNK] = if let Some(x) = x.first_chunk() {
            x
        } else {
            padded[..x.len()].copy_from_slice(x);
            &padded
        };
        let (inverse, round) = (s.splat(step.inverse), s.splat(ROUND));
        let mut sum = s.splat_i(0);
        for at in (0..CHUNK).step_by(S::LANES) {
            // SAFETY: both have CHUNK values, of which a register is read, and a byte each written.
            unsafe {
                let value = s.mul(s.load(x.as_ptr().add(at)), inverse);
                let code = s.ints(s.add(value, round));
                sum = s.add_i(sum, code);
                s.store_low_bytes(self.0.as_mut_ptr().cast::<u8>().add(at), code);
            }
        }
        sum
    }

    /// Writes the first elements to `out`, `out + stride` and so on.
    ///
    /// # Safety
    /// So many can be written there.
    #[inline(always)]
    unsafe fn store(&self, elements: usize, out: *mut u32, stride: usize) {
        for (e, element) in self.0.iter().enumerate().take(elements) {
            // Volatile, for else the compiler makes scatters of these, which take three times as
            // long.
            // SAFETY: the caller's contract.
            unsafe { out.add(e * stride).write_volatile(*element) };
        }
    }
}

/// The sum of the codes of so many chunks from the sum of their lanes.
#[inline(always)]
fn codes_sum<S: Simd>(s: S, lanes: S::I, chunks: usize) -> i32 {
    let rounds = (chunks * CHUNK) as i32;
    let all = rounds.wrapping_mul(ROUND.to_bits() as i32);
    s.sum_i(lanes).wrapping_sub(all)
}
