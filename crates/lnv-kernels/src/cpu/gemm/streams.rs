//! One tile of rows times panels that are read side by side.
//!
//! Decision: a thread's panels are cut into as many stretches as there are streams, and a few steps of each stream
//! are multiplied in turn, so that each stretch is read from end to end and the memory sees several of them at a
//! time. Sums wait in scratch meanwhile: a load and a store of them in a few hundred bytes of weights.

use std::marker::PhantomData;
use std::ops::Range;

use super::Product;
use super::plan::part;
use crate::cpu::formats::{Distance, Format, MOST_STREAMED, STREAMS};
use crate::cpu::launch::Kernel;
use crate::cpu::simd::Simd;
use crate::isa::Isa;
use crate::weight::PANEL;

/// Bytes of a stream before the next has its turn, if a step has not more.
const TURN: usize = 256;

impl Product<'_> {
    /// The results of a group of panels.
    #[inline(always)]
    pub(super) fn stream<S: Simd, F: Format>(&self, s: S, group: &Range<usize>, sums: &mut [f32]) {
        let plan = self.plan;
        let streams = plan.streams.min(group.len());
        let stretches = (0..streams).map(|stream| {
            let stretch = part(group.len(), streams, stream);
            group.start + stretch.start..group.start + stretch.end
        });
        for turn in 0..group.len().div_ceil(streams.max(1)) {
            let (mut places, mut panels, mut count) = ([0; STREAMS], [&[][..]; STREAMS], 0);
            for stretch in stretches.clone().filter(|stretch| turn < stretch.len()) {
                places[count] = stretch.start + turn;
                panels[count] = self.block(places[count], &(0..plan.steps));
                count += 1;
            }
            let strips = Strips {
                a: &self.packed[..plan.elements(plan.rows, &(0..plan.steps))],
                panels: &panels[..count],
                steps: plan.steps,
                fetched: Distance::of(plan.isa),
            };
            let sums = &mut sums[..count * plan.rows * PANEL];
            any_strips::<F>(plan.isa, &strips, sums);
            for (panel, sums) in places.iter().zip(sums.chunks_exact(plan.rows * PANEL)) {
                for (row, sums) in sums.chunks_exact(PANEL).enumerate() {
                    self.finish::<S, F>(s, row, *panel, sums);
                }
            }
        }
    }
}

/// A tile of rows times a panel of each stream.
struct Strips<'a> {
    a: &'a [u32],
    panels: &'a [&'a [u8]],
    steps: usize,
    fetched: Distance,
}

/// Their sums, `[panels, rows, PANEL]`.
fn any_strips<F: Format>(isa: Isa, t: &Strips<'_>, sums: &mut [f32]) {
    match sums.len() / PANEL / t.panels.len() {
        1 => F::launch(isa, OfRows::<F, 1>::new(t, sums)),
        2 => F::launch(isa, OfRows::<F, 2>::new(t, sums)),
        MOST_STREAMED => F::launch(isa, OfRows::<F, MOST_STREAMED>::new(t, sums)),
        rows => unreachable!("{rows} rows side by side"),
    }
}

/// Of ROWS rows: a kernel of its own, so that the compiler gives it all the registers.
struct OfRows<'a, F, const ROWS: usize> {
    t: &'a Strips<'a>,
    sums: &'a mut [f32],
    format: PhantomData<F>,
}

impl<'a, F, const ROWS: usize> OfRows<'a, F, ROWS> {
    fn new(t: &'a Strips<'a>, sums: &'a mut [f32]) -> Self {
        let format = PhantomData;
        Self { t, sums, format }
    }
}

impl<F: Format, const ROWS: usize> Kernel for OfRows<'_, F, ROWS> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match F::registers(ROWS, S::LANES) {
            1 => strips::<S, F, ROWS, 1>(s, self.t, self.sums),
            2 => strips::<S, F, ROWS, 2>(s, self.t, self.sums),
            _ => strips::<S, F, ROWS, 4>(s, self.t, self.sums),
        }
    }
}

/// ROWS rows, V registers of columns at a time.
#[inline(always)]
fn strips<S: Simd, F: Format, const ROWS: usize, const V: usize>(
    s: S,
    t: &Strips<'_>,
    sums: &mut [f32],
) {
    let step_bytes = PANEL * F::COLUMN_BYTES;
    let turn = (TURN / step_bytes).max(1);
    assert!(t.a.len() == t.steps * ROWS * F::A_PER_STEP);
    assert!(t.panels.iter().all(|w| w.len() == t.steps * step_bytes));
    assert!(sums.len() == t.panels.len() * ROWS * PANEL);
    sums.fill(0.0);
    for first in (0..PANEL).step_by(V * S::LANES) {
        for start in (0..t.steps).step_by(turn) {
            let end = t.steps.min(start + turn);
            for (w, sums) in t.panels.iter().zip(sums.chunks_exact_mut(ROWS * PANEL)) {
                let sums = sums[first..].as_mut_ptr();
                let mut acc = [[s.splat(0.0); V]; ROWS];
                for (row, acc) in acc.iter_mut().enumerate() {
                    for (v, acc) in acc.iter_mut().enumerate() {
                        // SAFETY: sums has ROWS rows of PANEL values, and first + V * LANES <= PANEL.
                        *acc = unsafe { s.load(sums.add(row * PANEL + v * S::LANES)) };
                    }
                }
                for step in start..end {
                    // SAFETY: the lengths were checked above; a prefetch touches nothing.
                    unsafe {
                        let a = t.a.as_ptr().add(step * ROWS * F::A_PER_STEP);
                        let w = w.as_ptr().add(step * step_bytes);
                        F::fetch::<S, ROWS, V>(w, first, t.fetched);
                        F::step(s, &mut acc, a, w, first, t.fetched);
                    }
                }
                for (row, acc) in acc.iter().enumerate() {
                    for (v, acc) in acc.iter().enumerate() {
                        // SAFETY: as above.
                        unsafe { s.store(sums.add(row * PANEL + v * S::LANES), *acc) };
                    }
                }
            }
        }
    }
}
