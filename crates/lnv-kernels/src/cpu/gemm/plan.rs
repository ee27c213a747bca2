//! How a matrix product is cut: rows into tiles and blocks of tiles, k into blocks, panels into groups.
//!
//! Decision: computed once for a product, from its shape and the format's constants; the loops only ask.

use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::formats::Format;
use crate::isa::Isa;
use crate::weight::PANEL;

/// Multiplications below which waking other threads costs more than it brings.
const SERIAL: usize = 1 << 16;

/// Elements behind the packed activations that a kernel may read, and pays no heed to.
const SPARE: usize = 16;

/// How a product is cut.
pub(super) struct Plan {
    pub(super) isa: Isa,
    pub(super) rows: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Steps over all of k, and in a block of k.
    pub(super) steps: usize,
    pub(super) block_steps: usize,
    /// Steps whose elements of a row may lie together: a row has a multiple of so many.
    unit_steps: usize,
    /// Packed elements of a row in a step.
    pub(super) a_per_step: usize,
    /// Bytes of a panel's columns in a step, and of a panel.
    pub(super) step_bytes: usize,
    pub(super) panel_bytes: usize,
    /// Bytes of a panel's block of k, unpacked; 0 if nothing is unpacked.
    pub(super) unpacked_len: usize,
    pub(super) tile_rows: usize,
    /// Whether all tiles but the last have as many rows as they can, and not rather equally many: it takes
    /// time to set tile registers up for others.
    whole_tiles: bool,
    pub(super) tiles: usize,
    /// Panels that a thread reads side by side.
    pub(super) streams: usize,
    pub(super) row_blocks: usize,
    pub(super) panels: usize,
    pub(super) panel_groups: usize,
    serial: bool,
}

impl Plan {
    pub(super) fn new<F: Format>(isa: Isa, rows: usize, n: usize, k: usize) -> Plan {
        let tile_rows = F::tile_rows(isa);
        let tiles = rows.div_ceil(tile_rows);
        let steps = k.div_ceil(F::STEP_K);
        let panels = n.div_ceil(PANEL);
        let threads = rayon::current_num_threads();
        let (mut block_steps, mut row_blocks) = (steps.max(1), 1);
        if tiles > 1 || F::UNIT > 1 {
            let unit = F::UNIT_STEPS;
            let most = F::PANEL_BLOCK / (PANEL * F::Unpacked::COLUMN_BYTES);
            block_steps = steps.div_ceil(steps.div_ceil(most).max(1)).max(1);
            block_steps = block_steps.next_multiple_of(unit);
            let tile_bytes = block_steps * F::A_PER_STEP * 4 * tile_rows;
            row_blocks = tiles.div_ceil((F::ROWS_BLOCK / tile_bytes).max(1));
        }
        let wanted = (4 * threads).div_ceil(row_blocks);
        let least = if tiles > 1 && (steps > block_steps || F::UNIT > 1) {
            panels.div_ceil(F::PANEL_GROUP)
        } else {
            1
        };
        let panel_groups = wanted.max(least).min(panels);
        let serial = threads == 1 || rows * n * k <= SERIAL;
        let step_bytes = PANEL * F::COLUMN_BYTES;
        let unpacked_len = if F::UNPACKS && (tiles > 1 || F::UNIT > 1) {
            block_steps * PANEL * F::Unpacked::COLUMN_BYTES
        } else {
            0
        };
        let streams = if tiles > 1 { 1 } else { F::streams(isa, rows) };
        Plan {
            streams,
            unpacked_len,
            isa,
            rows,
            n,
            k,
            steps,
            block_steps,
            unit_steps: F::UNIT_STEPS,
            a_per_step: F::A_PER_STEP,
            step_bytes,
            panel_bytes: steps * step_bytes + F::TAIL_BYTES,
            tile_rows,
            whole_tiles: F::UNIT > 1,
            tiles,
            row_blocks,
            panels,
            panel_groups,
            serial,
        }
    }

    /// Runs `work` for each index, in parallel if that pays.
    pub(super) fn each(&self, count: usize, work: impl Fn(usize) + Send + Sync) {
        if self.serial || count == 1 {
            (0..count).for_each(work);
        } else {
            (0..count).into_par_iter().with_max_len(1).for_each(work);
        }
    }

    pub(super) fn packed_len(&self) -> usize {
        self.elements(self.rows, &(0..self.steps)) + SPARE
    }

    /// Packed elements of so many rows in these steps.
    pub(super) fn elements(&self, rows: usize, steps: &Range<usize>) -> usize {
        rows * steps.len().next_multiple_of(self.unit_steps) * self.a_per_step
    }

    /// Sums of a task that wait: of one tile in each stream, if k is not cut.
    pub(super) fn sums_len(&self) -> usize {
        let panels = self.panels.div_ceil(self.panel_groups);
        let rows = match self.whole_tiles {
            true => self.tile_rows.min(self.rows),
            false => self.rows.div_ceil(self.tiles),
        };
        let rows = rows * self.tiles.div_ceil(self.row_blocks);
        if self.waits() {
            panels * rows * PANEL
        } else {
            self.streams * rows.min(self.tile_rows) * PANEL
        }
    }

    /// Whether sums wait for the next block of k while other panels have their turn. With one tile of rows
    /// a panel is finished before the next.
    pub(super) fn waits(&self) -> bool {
        self.tiles > 1 && (self.block_steps < self.steps || self.whole_tiles)
    }

    /// Whether results are finished a group of panels at a time, row by row, and not tile by tile: where a
    /// product takes little longer than its result's way to memory, that goes in longer stretches.
    pub(super) fn finishes_rows(&self) -> bool {
        self.whole_tiles && self.tiles > 1
    }

    /// The rows of a tile.
    pub(super) fn tile(&self, tile: usize) -> Range<usize> {
        if self.whole_tiles {
            let start = tile * self.tile_rows;
            return start..self.rows.min(start + self.tile_rows);
        }
        tile * self.rows / self.tiles..(tile + 1) * self.rows / self.tiles
    }

    /// The tiles of a block of rows.
    pub(super) fn tiles_of(&self, block: usize) -> Range<usize> {
        part(self.tiles, self.row_blocks, block)
    }

    /// The rows of the block that a tile is in.
    pub(super) fn block_of(&self, tile: usize) -> Range<usize> {
        let inside = |block: &usize| self.tiles_of(*block).contains(&tile);
        let tiles = self.tiles_of((0..self.row_blocks).find(inside).unwrap_or(0));
        self.rows_of(&tiles)
    }

    pub(super) fn rows_of(&self, tiles: &Range<usize>) -> Range<usize> {
        self.tile(tiles.start).start..self.tile(tiles.end - 1).end
    }

    /// The blocks of k, as steps.
    pub(super) fn step_blocks(&self) -> impl Iterator<Item = Range<usize>> {
        (0..self.steps.div_ceil(self.block_steps)).map(|index| self.step_block(index))
    }

    /// The blocks of k and the panels of a group in the order in which they are worked on: all panels a
    /// block of k, or, where sums need not wait, all of a panel.
    pub(super) fn order(
        &self,
        group: &Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, usize)> {
        let (blocks, panels) = (self.steps.div_ceil(self.block_steps), group.len());
        let (group, waits) = (group.clone(), self.waits());
        (0..blocks * panels).map(move |index| {
            if waits {
                (
                    self.step_block(index / panels),
                    group.start + index % panels,
                )
            } else {
                (
                    self.step_block(index % blocks),
                    group.start + index / blocks,
                )
            }
        })
    }

    /// Block `index` of k, as steps.
    fn step_block(&self, index: usize) -> Range<usize> {
        let start = index * self.block_steps;
        start..self.steps.min(start + self.block_steps)
    }

    /// Where a tile's packed elements of a block of k start: blocks of rows, in them blocks of k,
    /// in them tiles, in them steps, in them the tile's rows side by side.
    pub(super) fn packed_at(
        &self,
        block: &Range<usize>,
        first_row: usize,
        steps: &Range<usize>,
    ) -> usize {
        // All blocks of k but the last are whole units.
        self.elements(block.start, &(0..self.steps))
            + self.elements(block.len(), &(0..steps.start))
            + self.elements(first_row - block.start, steps)
    }
}

/// Part `index` of `0..len` cut into `parts`.
pub(super) fn part(len: usize, parts: usize, index: usize) -> Range<usize> {
    index * len / parts..(index + 1) * len / parts
}
