//! What is fetched into the caches while something else is worked on.
//!
//! Decision: rows of q, k and v and of the result are a few lines each, a long way apart, which no
//! processor sees coming. Whoever walks through a tile fetches some of the next one's at each step, so that
//! few requests are under way at a time. Addresses need not be anybody's: fetching touches nothing.

use crate::cpu::dot::{Dot, LANES};

/// Rows of memory to be fetched while others are worked on, a row a step.
#[derive(Clone, Copy)]
pub(super) struct Fetch {
    pub(super) at: *const f32,
    /// Values from row to row, and values of a row.
    pub(super) stride: usize,
    pub(super) len: usize,
    pub(super) rows: usize,
    /// Values of the next row that have been fetched.
    pub(super) done: usize,
}

impl Fetch {
    /// Where the next line is, if there is one.
    #[inline(always)]
    pub(super) fn line(&mut self) -> Option<*const u32> {
        if self.rows == 0 {
            return None;
        }
        let line = self.at.wrapping_add(self.done).cast();
        self.done += LANES;
        if self.done >= self.len {
            self.done = 0;
            self.at = self.at.wrapping_add(self.stride);
            self.rows -= 1;
        }
        Some(line)
    }

    /// Fetches the next row, if there is one.
    #[inline(always)]
    pub(super) fn step(&mut self, dot: Dot) {
        if self.rows > 0 {
            for i in (0..self.len).step_by(LANES) {
                dot.prefetch(self.at.wrapping_add(i).cast());
            }
            self.at = self.at.wrapping_add(self.stride);
            self.rows -= 1;
        }
    }

    /// The same for a row that will be written.
    #[inline(always)]
    pub(super) fn step_to_write(&mut self, dot: Dot) {
        if self.rows > 0 {
            for i in (0..self.len).step_by(LANES) {
                dot.prefetch_to_write(self.at.wrapping_add(i).cast());
            }
            self.at = self.at.wrapping_add(self.stride);
            self.rows -= 1;
        }
    }
}
