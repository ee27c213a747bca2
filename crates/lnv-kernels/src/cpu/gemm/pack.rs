//! Activations on their way into a product: rotated, rounded or quantised as the format wants them, and
//! laid out as its tiles read them.

use std::marker::PhantomData;

use super::plan::Plan;
use crate::cpu::amx::PIECE;
use crate::cpu::formats::{Format, Head};
use crate::cpu::launch::Kernel;
use crate::cpu::rotate::rotate_row;
use crate::cpu::scratch::Shared;
use crate::cpu::simd::Simd;
use crate::weight::q8::Step;

/// Values of k of a tile's rows that are packed before the next ones.
pub(crate) const PACK: usize = 256;
/// The most elements that so many values become.
const ELEMENTS: usize = PACK;
/// Rows of the largest tile of any format.
const MOST_ROWS: usize = 32;

/// Packs the activations of one tile.
pub(super) struct Pack<'a, F> {
    pub(super) plan: &'a Plan,
    pub(super) x: &'a [f32],
    pub(super) tile: usize,
    /// Room for the tile's rows after their rotation, if there is one.
    pub(super) rotated: &'a mut [f32],
    pub(super) packed: Shared<u32>,
    pub(super) heads: Shared<Head>,
    pub(super) format: PhantomData<F>,
}

impl<F: Format> Kernel for Pack<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let plan = self.plan;
        let (rows, block) = (plan.tile(self.tile), plan.block_of(self.tile));
        let mut values = &self.x[rows.start * plan.k..rows.end * plan.k];
        if F::ROTATES {
            self.rotated.copy_from_slice(values);
            for row in self.rotated.chunks_exact_mut(plan.k.max(1)) {
                rotate_row(s, row);
            }
            values = self.rotated;
        }
        let x = |row: usize| &values[(row - rows.start) * plan.k..][..plan.k];
        let mut quantised = [(Step::default(), 0i32); MOST_ROWS];
        if F::HEADS {
            for (row, (step, _)) in rows.clone().zip(&mut quantised) {
                *step = F::step_of(s, x(row));
            }
        }
        for steps in plan.step_blocks() {
            let at = plan.packed_at(&block, rows.start, &steps);
            // Few steps of all rows at a time, so that a line is written while it is near.
            for first in steps.clone().step_by(PACK / F::STEP_K) {
                let part = first..steps.end.min(first + PACK / F::STEP_K);
                let columns = part.start * F::STEP_K..plan.k.min(part.end * F::STEP_K);
                let elements = part.len() * F::A_PER_STEP;
                let at = at + (part.start - steps.start) * F::A_PER_STEP * rows.len();
                for (index, row) in rows.clone().enumerate() {
                    let (step, correction) = &mut quantised[index];
                    let x = &x(row)[columns.clone()];
                    // SAFETY: the tile's elements of this block of k start at packed_at, as many as
                    // elements * rows, which is inside packed_len and no other tile's.
                    let lacking = unsafe {
                        let out = self.packed.at(at);
                        if F::UNIT > 1 {
                            units::<S, F>(s, x, *step, elements, out, (index, rows.len()))
                        } else {
                            F::pack_row(s, x, *step, elements, out.add(index), rows.len())
                        }
                    };
                    *correction = correction.wrapping_add(lacking);
                }
            }
        }
        if F::HEADS {
            for (row, (step, correction)) in rows.zip(quantised) {
                let scale = step.scale;
                // SAFETY: there is a head for each row, and this row is no other tile's.
                unsafe { *self.heads.at(row) = Head { scale, correction } };
            }
        }
    }
}

/// Packs `x`, part of a row, as the tile registers of AMX take it: unit by unit, in them pieces of 64
/// bytes, each of all rows, then what is left of the unit, element by element. This is row `row` of
/// `rows`. The last unit is filled up with zeros.
///
/// # Safety
/// `elements` elements, rounded up to whole units, of `rows` rows can be written to `out`.
#[inline(always)]
unsafe fn units<S: Simd, F: Format>(
    s: S,
    x: &[f32],
    step: Step,
    elements: usize,
    out: *mut u32,
    (row, rows): (usize, usize),
) -> i32 {
    let mut packed = [0; ELEMENTS];
    let packed = &mut packed[..elements.next_multiple_of(F::UNIT)];
    // SAFETY: as many elements as `packed` has, or fewer.
    let lacking = unsafe { F::pack_row(s, x, step, elements, packed.as_mut_ptr(), 1) };
    for (index, unit) in packed.chunks_exact(F::UNIT).enumerate() {
        let (pieces, rest) = unit.as_chunks::<PIECE>();
        // SAFETY: the caller's contract.
        unsafe {
            let out = out.add(index * F::UNIT * rows);
            for (index, piece) in pieces.iter().enumerate() {
                let out = out.add((index * rows + row) * PIECE);
                out.cast::<[u32; PIECE]>().write_unaligned(*piece);
            }
            for (index, element) in rest.iter().enumerate() {
                out.add((PIECE * pieces.len() + index) * rows + row)
                    .write(*element);
            }
        }
    }
    lacking
}
