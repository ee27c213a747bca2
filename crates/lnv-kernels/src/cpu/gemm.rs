//! Matrix products with packed weights, for one row and for thousands.
//!
//! Decision: one loop nest for all sizes. The rows are split evenly into tiles of at most 12 (6
//! with AVX2); a tile times a panel of 32 columns has all its sums in registers. Up to one tile of
//! rows, each panel is read once, from end to end: one sequential stream a thread, at the speed of
//! memory. Above, k is cut into blocks so that a panel's part (64 KB) and the packed activations of
//! a block of rows (768 KB) stay in the second-level cache; sums that wait for the next block of k
//! lie in scratch, tile after tile, and go to the result once, through the epilogue.
//!
//! Every sum is one ascending chain over k, continued from block to block, in whatever tile the row
//! happens to be: the row's bits depend on nothing else.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use crate::buffer::{Aligned, Buffer, Vector};
use crate::cpu::activation::activation;
use crate::cpu::formats::{DotBf16, Format, WideBf16, WideF16, WideF32};
use crate::cpu::scratch::{Shared, with};
use crate::cpu::simd::{Kernel, Simd};
use crate::isa::Isa;
use crate::ops::Epilogue;
use crate::weight::{PANEL, Weight, WeightDtype};

/// Bytes of a panel between two changes of tile: half the second-level cache stays for nothing
/// else.
const PANEL_BLOCK: usize = 64 << 10;
/// Bytes of packed activations that stay in the second-level cache.
const ROWS_BLOCK: usize = 768 << 10;
/// Panels whose waiting sums a task keeps.
const PANEL_GROUP: usize = 16;
/// How far ahead of the arithmetic a panel is fetched, in bytes.
const PREFETCH: usize = 8 << 10;
/// Multiplications below which waking other threads costs more than it brings.
const SERIAL: usize = 1 << 16;

thread_local! {
    static PACKED: Cell<Option<Aligned<u32>>> = const { Cell::new(None) };
    static SUMS: Cell<Option<Aligned<f32>>> = const { Cell::new(None) };
}

/// `out = act(x·Wᵀ + bias)` or `out += x·Wᵀ + bias`; the shapes fit.
pub(crate) fn linear(
    isa: Isa,
    x: &Buffer,
    w: &Weight,
    finish: (Option<&Vector>, Epilogue),
    out: &mut Buffer,
) {
    match w.dtype() {
        WeightDtype::F32 => product::<WideF32>(isa, x, w, finish, out),
        WeightDtype::F16 => product::<WideF16>(isa, x, w, finish, out),
        WeightDtype::Bf16 if isa == Isa::Avx512Bf16 => product::<DotBf16>(isa, x, w, finish, out),
        WeightDtype::Bf16 => product::<WideBf16>(isa, x, w, finish, out),
        WeightDtype::Q8 | WeightDtype::Q4 => {
            crate::reference::linear(x, w, finish.0, finish.1, out);
        }
    }
}

fn product<F: Format>(
    isa: Isa,
    x: &Buffer,
    w: &Weight,
    (bias, then): (Option<&Vector>, Epilogue),
    out: &mut Buffer,
) {
    if x.rows() == 0 {
        return;
    }
    let plan = Plan::new::<F>(isa, x.rows(), w.n(), w.k());
    with(&PACKED, plan.packed_len(), |packed| {
        let place = Shared::new(packed);
        plan.each(plan.tiles, |tile| {
            let plan = &plan;
            F::launch(
                isa,
                Pack::<F> {
                    plan,
                    x: x.host(),
                    tile,
                    packed: place,
                    format: PhantomData,
                },
            );
        });
        let out = Shared::new(out.host_mut());
        let bias = bias.map(Vector::as_slice);
        let product = Product {
            plan: &plan,
            packed,
            panels: w.packed_bytes(),
            bias,
            then,
            out,
        };
        plan.each(plan.row_blocks * plan.panel_groups, |task| {
            with(&SUMS, plan.sums_len(), |sums| {
                F::launch(
                    isa,
                    Task::<F> {
                        product: &product,
                        task,
                        sums,
                        format: PhantomData,
                    },
                );
            });
        });
    });
}

/// How a product is cut.
struct Plan {
    rows: usize,
    n: usize,
    k: usize,
    /// Steps over all of k, and in a block of k.
    steps: usize,
    block_steps: usize,
    /// Packed elements of a row in a step.
    a_per_step: usize,
    tiles: usize,
    row_blocks: usize,
    panels: usize,
    panel_groups: usize,
    serial: bool,
}

impl Plan {
    fn new<F: Format>(isa: Isa, rows: usize, n: usize, k: usize) -> Plan {
        let tile_rows = tile_rows(isa);
        let tiles = rows.div_ceil(tile_rows);
        let steps = k.div_ceil(F::STEP_K);
        let panels = n.div_ceil(PANEL);
        let threads = rayon::current_num_threads();
        let (mut block_steps, mut row_blocks) = (steps.max(1), 1);
        if tiles > 1 {
            block_steps = block_steps.min(PANEL_BLOCK / (PANEL * F::COLUMN_BYTES));
            let tile_bytes = block_steps * F::A_PER_STEP * 4 * tile_rows;
            row_blocks = tiles.div_ceil((ROWS_BLOCK / tile_bytes).max(1));
        }
        let wanted = (4 * threads).div_ceil(row_blocks);
        let least = if steps > block_steps {
            panels.div_ceil(PANEL_GROUP)
        } else {
            1
        };
        let panel_groups = wanted.max(least).min(panels);
        let serial = threads == 1 || rows * n * k <= SERIAL;
        let a_per_step = F::A_PER_STEP;
        Plan {
            rows,
            n,
            k,
            steps,
            block_steps,
            a_per_step,
            tiles,
            row_blocks,
            panels,
            panel_groups,
            serial,
        }
    }

    /// Runs `work` for each index, in parallel if that pays.
    fn each(&self, count: usize, work: impl Fn(usize) + Send + Sync) {
        if self.serial || count == 1 {
            (0..count).for_each(work);
        } else {
            (0..count).into_par_iter().with_max_len(1).for_each(work);
        }
    }

    fn packed_len(&self) -> usize {
        self.rows * self.steps * self.a_per_step
    }

    /// Sums of a task that wait: of one tile, if k is not cut.
    fn sums_len(&self) -> usize {
        let panels = self.panels.div_ceil(self.panel_groups);
        let rows = self.rows.div_ceil(self.tiles) * self.tiles.div_ceil(self.row_blocks);
        if self.block_steps < self.steps {
            panels * rows * PANEL
        } else {
            rows.min(12) * PANEL
        }
    }

    /// The rows of a tile.
    fn tile(&self, tile: usize) -> Range<usize> {
        tile * self.rows / self.tiles..(tile + 1) * self.rows / self.tiles
    }

    /// The tiles of a block of rows.
    fn tiles_of(&self, block: usize) -> Range<usize> {
        part(self.tiles, self.row_blocks, block)
    }

    /// The rows of the block that a tile is in.
    fn block_of(&self, tile: usize) -> Range<usize> {
        let inside = |block: &usize| self.tiles_of(*block).contains(&tile);
        let tiles = self.tiles_of((0..self.row_blocks).find(inside).unwrap_or(0));
        self.rows_of(&tiles)
    }

    fn rows_of(&self, tiles: &Range<usize>) -> Range<usize> {
        self.tile(tiles.start).start..self.tile(tiles.end - 1).end
    }

    /// The blocks of k, as steps.
    fn step_blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (steps, block) = (self.steps, self.block_steps);
        (0..steps)
            .step_by(block)
            .map(move |start| start..steps.min(start + block))
    }

    /// Where a tile's packed elements of a block of k start: blocks of rows, in them blocks of k,
    /// in them tiles, in them steps, in them the tile's rows side by side.
    fn packed_at(&self, block: &Range<usize>, first_row: usize, steps: &Range<usize>) -> usize {
        let before = block.start * self.steps + block.len() * steps.start;
        (before + (first_row - block.start) * steps.len()) * self.a_per_step
    }
}

/// Rows of the largest tile: its sums fill the registers but for the operands.
fn tile_rows(isa: Isa) -> usize {
    if isa == Isa::Avx2 { 6 } else { 12 }
}

/// Part `index` of `0..len` cut into `parts`.
fn part(len: usize, parts: usize, index: usize) -> Range<usize> {
    index * len / parts..(index + 1) * len / parts
}

/// Packs the activations of one tile.
struct Pack<'a, F> {
    plan: &'a Plan,
    x: &'a [f32],
    tile: usize,
    packed: Shared<u32>,
    format: PhantomData<F>,
}

impl<F: Format> Kernel for Pack<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Pack {
            plan,
            x,
            tile,
            packed,
            ..
        } = self;
        let (rows, block) = (plan.tile(tile), plan.block_of(tile));
        for steps in plan.step_blocks() {
            let at = plan.packed_at(&block, rows.start, &steps);
            let columns = steps.start * F::STEP_K..plan.k.min(steps.end * F::STEP_K);
            let elements = steps.len() * F::A_PER_STEP;
            for row in rows.clone() {
                let values = &x[row * plan.k..][columns.clone()];
                // SAFETY: the tile's elements of this block of k are at..at + elements * rows,
                // which is inside packed_len and no other tile's.
                unsafe {
                    F::pack_row(
                        values,
                        elements,
                        packed.at(at + row - rows.start),
                        rows.len(),
                    );
                }
            }
        }
    }
}

/// What all tasks of a product share.
struct Product<'a> {
    plan: &'a Plan,
    packed: &'a [u32],
    panels: &'a [u8],
    bias: Option<&'a [f32]>,
    then: Epilogue,
    out: Shared<f32>,
}

/// A block of rows times a group of panels.
struct Task<'a, F> {
    product: &'a Product<'a>,
    task: usize,
    sums: &'a mut [f32],
    format: PhantomData<F>,
}

impl<F: Format> Kernel for Task<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (product, plan) = (self.product, self.product.plan);
        let tiles = plan.tiles_of(self.task / plan.panel_groups);
        let group = part(
            plan.panels,
            plan.panel_groups,
            self.task % plan.panel_groups,
        );
        let block = plan.rows_of(&tiles);
        let waits = plan.block_steps < plan.steps;
        for steps in plan.step_blocks() {
            for panel in group.clone() {
                let w = (panel * plan.steps + steps.start) * PANEL * F::COLUMN_BYTES;
                let w = &product.panels[w..w + steps.len() * PANEL * F::COLUMN_BYTES];
                for tile in tiles.clone() {
                    let rows = plan.tile(tile);
                    let at = plan.packed_at(&block, rows.start, &steps);
                    let a = &product.packed[at..at + steps.len() * F::A_PER_STEP * rows.len()];
                    let waiting = (panel - group.start) * block.len() + rows.start - block.start;
                    let at = if waits { waiting * PANEL } else { 0 };
                    let sums = &mut self.sums[at..at + rows.len() * PANEL];
                    any_tile::<S, F>(
                        s,
                        &Tile {
                            a,
                            w,
                            steps: steps.len(),
                        },
                        sums,
                        steps.start > 0,
                    );
                    if steps.end == plan.steps {
                        product.finish(s, rows, panel, sums);
                    }
                }
            }
        }
    }
}

impl Product<'_> {
    /// The epilogue: a tile's sums to the result.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, rows: Range<usize>, panel: usize, sums: &[f32]) {
        let n = self.plan.n;
        for (row, sums) in rows.zip(sums.chunks_exact(PANEL)) {
            for lane in (0..PANEL).step_by(S::LANES) {
                let column = panel * PANEL + lane;
                let live = S::LANES.min(n.saturating_sub(column));
                if live == 0 {
                    break;
                }
                // SAFETY: a register of sums; `live` values of the bias and of row `row` of the
                // result, which this task alone writes in these columns.
                unsafe {
                    let mut value = s.load(sums.as_ptr().add(lane));
                    if let Some(bias) = self.bias {
                        value = s.add(value, s.load_part(bias.as_ptr().add(column), live));
                    }
                    let out = self.out.at(row * n + column);
                    let value = match self.then {
                        Epilogue::Store(None) => value,
                        Epilogue::Store(Some(act)) => activation(s, act, value),
                        Epilogue::Add => s.add(s.load_part(out, live), value),
                    };
                    s.store_part(out, value, live);
                }
            }
        }
    }
}

/// One tile of rows times one panel, over one block of k.
struct Tile<'a> {
    a: &'a [u32],
    w: &'a [u8],
    steps: usize,
}

/// The tile's sums, new or continued, to `sums` (`[rows, PANEL]`).
#[inline(always)]
fn any_tile<S: Simd, F: Format>(s: S, t: &Tile<'_>, sums: &mut [f32], more: bool) {
    // With registers of 8, few rows take a whole panel at once, so that it is read once.
    match (sums.len() / PANEL, S::LANES) {
        (1, 8) => tile::<S, F, 1, 4>(s, t, sums, more),
        (2, 8) => tile::<S, F, 2, 4>(s, t, sums, more),
        (3, 8) => tile::<S, F, 3, 4>(s, t, sums, more),
        (4, 8) => tile::<S, F, 4, 2>(s, t, sums, more),
        (5, 8) => tile::<S, F, 5, 2>(s, t, sums, more),
        (6, 8) => tile::<S, F, 6, 2>(s, t, sums, more),
        (1, 16) => tile::<S, F, 1, 2>(s, t, sums, more),
        (2, 16) => tile::<S, F, 2, 2>(s, t, sums, more),
        (3, 16) => tile::<S, F, 3, 2>(s, t, sums, more),
        (4, 16) => tile::<S, F, 4, 2>(s, t, sums, more),
        (5, 16) => tile::<S, F, 5, 2>(s, t, sums, more),
        (6, 16) => tile::<S, F, 6, 2>(s, t, sums, more),
        (7, 16) => tile::<S, F, 7, 2>(s, t, sums, more),
        (8, 16) => tile::<S, F, 8, 2>(s, t, sums, more),
        (9, 16) => tile::<S, F, 9, 2>(s, t, sums, more),
        (10, 16) => tile::<S, F, 10, 2>(s, t, sums, more),
        (11, 16) => tile::<S, F, 11, 2>(s, t, sums, more),
        (12, 16) => tile::<S, F, 12, 2>(s, t, sums, more),
        (rows, lanes) => unreachable!("a tile of {rows} rows in registers of {lanes}"),
    }
}

/// ROWS rows, V registers of columns at a time.
#[inline(always)]
fn tile<S: Simd, F: Format, const ROWS: usize, const V: usize>(
    s: S,
    t: &Tile<'_>,
    sums: &mut [f32],
    more: bool,
) {
    let step_bytes = PANEL * F::COLUMN_BYTES;
    assert!(t.a.len() == t.steps * ROWS * F::A_PER_STEP && t.w.len() == t.steps * step_bytes);
    assert!(sums.len() == ROWS * PANEL);
    for first in (0..PANEL).step_by(V * S::LANES) {
        let mut acc = [[s.splat(0.0); V]; ROWS];
        let sums = sums[first..].as_mut_ptr();
        if more {
            for (row, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: sums has ROWS rows of PANEL values, and first + V * LANES <= PANEL.
                    *acc = unsafe { s.load(sums.add(row * PANEL + v * S::LANES)) };
                }
            }
        }
        for step in 0..t.steps {
            // SAFETY: the lengths were checked above; a prefetch touches nothing.
            unsafe {
                let w =
                    t.w.as_ptr()
                        .add(step * step_bytes + first * F::COLUMN_BYTES);
                for line in (0..V * S::LANES * F::COLUMN_BYTES).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(PREFETCH + line).cast());
                }
                F::step(
                    s,
                    &mut acc,
                    t.a.as_ptr().add(step * ROWS * F::A_PER_STEP),
                    w,
                );
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

/// The largest tile over a panel that stays in the first-level cache, `times` times: the arithmetic
/// peak.
pub(crate) fn spin(isa: Isa, dtype: WeightDtype, times: usize) -> Spun {
    match dtype {
        WeightDtype::F32 => Spin::<WideF32>::run_on(isa, times),
        WeightDtype::F16 => Spin::<WideF16>::run_on(isa, times),
        WeightDtype::Bf16 if isa == Isa::Avx512Bf16 => Spin::<DotBf16>::run_on(isa, times),
        WeightDtype::Bf16 => Spin::<WideBf16>::run_on(isa, times),
        WeightDtype::Q8 | WeightDtype::Q4 => Spun {
            operations: 0,
            sum: 0.0,
        },
    }
}

/// What a spin did.
pub(crate) struct Spun {
    pub(crate) operations: usize,
    pub(crate) sum: f32,
}

struct Spin<'a, F> {
    tile: Tile<'a>,
    times: usize,
    sums: &'a mut [f32],
    format: PhantomData<F>,
}

impl<F: Format> Spin<'_, F> {
    fn run_on(isa: Isa, times: usize) -> Spun {
        let (steps, rows) = (64, tile_rows(isa));
        let (a, w) = (
            vec![0; steps * rows * F::A_PER_STEP],
            vec![0; steps * PANEL * F::COLUMN_BYTES],
        );
        let mut sums = vec![0.0; rows * PANEL];
        let tile = Tile {
            a: &a,
            w: &w,
            steps,
        };
        F::launch(
            isa,
            Spin::<F> {
                tile,
                times,
                sums: &mut sums,
                format: PhantomData,
            },
        );
        let operations = 2 * times * rows * PANEL * steps * F::STEP_K;
        Spun {
            operations,
            sum: sums.iter().sum(),
        }
    }
}

impl<F: Format> Kernel for Spin<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for _ in 0..self.times {
            any_tile::<S, F>(s, std::hint::black_box(&self.tile), self.sums, true);
        }
    }
}
