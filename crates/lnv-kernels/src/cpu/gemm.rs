//! Matrix products with packed weights, for one row and for thousands.
//!
//! Decision: one loop nest for all sizes. The rows are split evenly into tiles of at most 12 (5
//! or 6 with AVX2); a tile times a panel of 32 columns has all its sums in registers. Up to one tile of
//! rows, each panel is read once, from end to end: one sequential stream a thread, or, where memory gives more
//! to several, a few side by side (`gemm/streams.rs`), at the speed of memory. Above, k is cut into blocks so that a panel's part (64 KB) and the packed activations of
//! a block of rows (768 KB) stay in the second-level cache; sums that wait for the next block of k
//! lie in scratch, tile after tile, and go to the result once, through the epilogue.
//!
//! Every sum is one ascending chain over k, continued from block to block, in whatever tile the row
//! happens to be: the row's bits depend on nothing else. (Sums of bytes are exact in any order.)

mod pack;
mod plan;
mod streams;

use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

pub(crate) use self::pack::PACK;
use self::pack::Pack;
use self::plan::{Plan, part};
use crate::buffer::{Aligned, Buffer, Vector};
use crate::cpu::activation::activation;
use crate::cpu::amx::{AmxBf16, AmxQ4, AmxQ8, Tiles};
use crate::cpu::bnb::{self, Outliers, add_outliers};
use crate::cpu::formats::{Distance, DotBf16, Format, Head, WideBf16, WideF16, WideF32};
use crate::cpu::int::{AvxVnni, Signed, Vnni, Widened};
use crate::cpu::launch::Kernel;
use crate::cpu::quantised::{Q4, Q8};
use crate::cpu::scratch::{Shared, with};
use crate::cpu::simd::Simd;
use crate::isa::Isa;
use crate::ops::Epilogue;
use crate::weight::{PANEL, Weight, WeightDtype};

/// Rows from which the tile registers of AMX multiply bytes; for fewer, which bits do not tell from it, the
/// byte dot product has less to lay out.
pub(crate) const TILED: usize = 4;
/// As [`TILED`], for 4-bit weights, which are laid out too: at 4 rows both take equally long, at 8 these a tenth less.
const TILED_GROUPS: usize = 6;

thread_local! {
    static PACKED: Cell<Option<Aligned<u32>>> = const { Cell::new(None) };
    static HEADS: Cell<Option<Aligned<Head>>> = const { Cell::new(None) };
    static SUMS: Cell<Option<Aligned<f32>>> = const { Cell::new(None) };
    static ROTATED: Cell<Option<Aligned<f32>>> = const { Cell::new(None) };
    static UNPACKED: Cell<Option<Aligned<u8>>> = const { Cell::new(None) };
}

/// `out = act(x·Wᵀ + bias)` or `out += x·Wᵀ + bias`; the shapes fit.
pub(crate) fn linear(
    isa: Isa,
    x: &Buffer,
    w: &Weight,
    finish: (Option<&Vector>, Epilogue),
    out: &mut Buffer,
) {
    let tiled = |least| isa == Isa::Amx && x.rows() >= least;
    match w.dtype() {
        WeightDtype::F32 => product::<WideF32>(isa, x, w, finish, out),
        WeightDtype::F16 => product::<WideF16>(isa, x, w, finish, out),
        WeightDtype::Bf16 if isa == Isa::Amx => product::<AmxBf16>(isa, x, w, finish, out),
        WeightDtype::Bf16 if isa == Isa::Avx512Bf16 => product::<DotBf16>(isa, x, w, finish, out),
        WeightDtype::Bf16 => product::<WideBf16>(isa, x, w, finish, out),
        WeightDtype::Q8 if tiled(TILED) => product::<AmxQ8>(isa, x, w, finish, out),
        WeightDtype::Q4 if tiled(TILED_GROUPS) => product::<AmxQ4>(isa, x, w, finish, out),
        WeightDtype::Q8 if isa >= Isa::Avx512Vnni => product::<Q8<Vnni>>(isa, x, w, finish, out),
        WeightDtype::Q8 if isa == Isa::AvxVnni => product::<Q8<AvxVnni>>(isa, x, w, finish, out),
        WeightDtype::Q8 => product::<Q8<Widened>>(isa, x, w, finish, out),
        WeightDtype::Q4 if isa >= Isa::Avx512Vnni => product::<Q4<Vnni>>(isa, x, w, finish, out),
        WeightDtype::Q4 if isa == Isa::AvxVnni => product::<Q4<AvxVnni>>(isa, x, w, finish, out),
        WeightDtype::Q4 if isa == Isa::Avx2 && x.rows() == 1 => {
            product::<Q4<Signed>>(isa, x, w, finish, out);
        }
        WeightDtype::Q4 => product::<Q4<Widened>>(isa, x, w, finish, out),
        WeightDtype::Bnb4(_) | WeightDtype::Int8(_) => bnb::linear(isa, x, w, finish, out),
    }
}

pub(crate) fn product<F: Format>(
    isa: Isa,
    x: &Buffer,
    w: &Weight,
    (bias, then): (Option<&Vector>, Epilogue),
    out: &mut Buffer,
) {
    if x.rows() == 0 {
        return;
    }
    let plan = &Plan::new::<F>(isa, x.rows(), w.n(), w.k());
    let heads = if F::HEADS { plan.rows } else { 0 };
    let (outliers, kept) = Outliers::take(x.host(), w);
    let x = kept.as_deref().unwrap_or(x.host());
    with(&PACKED, plan.packed_len(), |packed| {
        with(&HEADS, heads, |heads| {
            pack::<F>(isa, plan, x, packed, heads);
            let product = Product {
                plan,
                packed,
                heads,
                outliers: &outliers,
                panels: w.packed_bytes(),
                bias: bias.map(Vector::as_slice),
                then,
                out: Shared::new(out.host_mut()),
            };
            plan.each(plan.row_blocks * plan.panel_groups, |task| {
                with(&SUMS, plan.sums_len(), |sums| {
                    with(&UNPACKED, plan.unpacked_len, |unpacked| {
                        let task = Task::<F> {
                            product: &product,
                            task,
                            sums,
                            unpacked,
                            format: PhantomData,
                        };
                        F::launch(isa, task);
                    });
                });
            });
        });
    });
}

/// Packs the activations, tile by tile.
fn pack<F: Format>(isa: Isa, plan: &Plan, x: &[f32], packed: &mut [u32], heads: &mut [Head]) {
    let (packed, heads) = (Shared::new(packed), Shared::new(heads));
    plan.each(plan.tiles, |tile| {
        let rotated = if F::ROTATES {
            plan.tile(tile).len() * plan.k
        } else {
            0
        };
        with(&ROTATED, rotated, |rotated| {
            let pack = Pack::<F> {
                plan,
                x,
                tile,
                rotated,
                packed,
                heads,
                format: PhantomData,
            };
            F::launch(isa, pack);
        });
    });
}

/// What all tasks of a product share.
struct Product<'a> {
    plan: &'a Plan,
    packed: &'a [u32],
    heads: &'a [Head],
    outliers: &'a Outliers,
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
    /// Room for a panel's block of k, unpacked.
    unpacked: &'a mut [u8],
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
        if plan.streams > 1 {
            return product.stream::<S, F>(s, &group, self.sums);
        }
        let block = plan.rows_of(&tiles);
        let unpacks = F::UNPACKS && (tiles.len() > 1 || F::UNIT > 1);
        let mut registers = (F::UNIT > 1).then(Tiles::new);
        let fetched = Distance::of(plan.isa);
        let mut blocks = plan.order(&group).peekable();
        while let Some((steps, panel)) = blocks.next() {
            let mut w = product.block(panel, &steps);
            let next = blocks
                .peek()
                .map(|(steps, panel)| product.block(*panel, steps));
            if unpacks {
                let len = steps.len() * PANEL * F::Unpacked::COLUMN_BYTES;
                F::unpack(s, w, &mut self.unpacked[..len]);
                w = &self.unpacked[..len];
            }
            for tile in tiles.clone() {
                let rows = plan.tile(tile);
                let at = plan.packed_at(&block, rows.start, &steps);
                let a = &product.packed[at..at + plan.elements(rows.len(), &steps)];
                let waiting = (panel - group.start) * block.len() + rows.start - block.start;
                let at = if plan.waits() { waiting * PANEL } else { 0 };
                let sums = &mut self.sums[at..at + rows.len() * PANEL];
                let ahead = Ahead::of(next, tile - tiles.start, tiles.len());
                let tile = Tile {
                    a,
                    w,
                    steps: steps.len(),
                    result: (steps.end == plan.steps).then(|| product.place(rows.start, panel)),
                    ahead,
                    fetched,
                    alone: tiles.len() == 1,
                };
                let more = steps.start > 0;
                if let Some(registers) = &mut registers {
                    registers.set(rows.len());
                    // SAFETY: they are set up, and this is inside the format's launch.
                    unsafe { F::amx_tile(s, registers, &tile, sums, more) };
                } else if unpacks {
                    any_tile::<F::Unpacked>(plan.isa, &tile, sums, more);
                } else {
                    any_tile::<F>(plan.isa, &tile, sums, more);
                }
                if steps.end == plan.steps && !plan.finishes_rows() {
                    for (row, sums) in rows.clone().zip(sums.chunks_exact(PANEL)) {
                        product
                            .place(row, panel)
                            .fetch::<_MM_HINT_T0>(AHEAD..AHEAD + 1, 0..PANEL);
                        product.finish::<S, F>(s, row, panel, sums);
                    }
                }
            }
        }
        if plan.finishes_rows() {
            for row in block.clone() {
                for panel in group.clone() {
                    let at = ((panel - group.start) * block.len() + row - block.start) * PANEL;
                    product
                        .place(row, panel)
                        .fetch::<_MM_HINT_T0>(1..2, 0..PANEL);
                    product.finish::<S, F>(s, row, panel, &self.sums[at..at + PANEL]);
                }
            }
        }
    }
}

impl Product<'_> {
    /// A panel's block of k, packed.
    #[inline(always)]
    fn block(&self, panel: usize, steps: &Range<usize>) -> &[u8] {
        let start = panel * self.plan.panel_bytes + steps.start * self.plan.step_bytes;
        &self.panels[start..start + steps.len() * self.plan.step_bytes]
    }

    #[inline(always)]
    fn place(&self, row: usize, panel: usize) -> Place {
        let stride = self.plan.n;
        // SAFETY: the row and the panel's first column are inside the result.
        let start = unsafe { self.out.at(row * stride + panel * PANEL) };
        Place {
            start: start.cast_const(),
            stride,
        }
    }

    /// The epilogue: a row's sums in a panel to the result.
    #[inline(always)]
    fn finish<S: Simd, F: Format>(&self, s: S, row: usize, panel: usize, sums: &[f32]) {
        let columns = PANEL.min(self.plan.n - panel * PANEL);
        let tail = (panel + 1) * self.plan.panel_bytes - F::TAIL_BYTES;
        let tail = &self.panels[tail..tail + F::TAIL_BYTES];
        let whole = &self.panels[panel * self.plan.panel_bytes..][..self.plan.panel_bytes];
        let outliers = self.outliers.of(row);
        let head = if F::HEADS {
            self.heads[row]
        } else {
            Head::default()
        };
        for lane in (0..columns).step_by(S::LANES) {
            let at = (row, panel * PANEL + lane);
            // SAFETY: a register of sums and the tail of its columns; a whole register, or the
            // columns that are left of the row, which this task alone writes.
            unsafe {
                let tail = tail.as_ptr().add(lane * (F::TAIL_BYTES / PANEL));
                let mut value = F::finish(s, s.load(sums.as_ptr().add(lane)), tail, &head);
                if !outliers.is_empty() {
                    value = add_outliers(s, value, outliers, whole, lane);
                }
                if lane + S::LANES <= columns {
                    self.store::<S, true>(s, value, at, S::LANES);
                } else {
                    self.store::<S, false>(s, value, at, columns - lane);
                }
            }
        }
    }

    /// A register of products to the result, or its first `live` lanes.
    ///
    /// # Safety
    /// Row and column are inside the result, and so are `live` columns from there on, which are
    /// `LANES` if WHOLE; no other thread writes them.
    #[inline(always)]
    unsafe fn store<S: Simd, const WHOLE: bool>(
        &self,
        s: S,
        mut value: S::F,
        (row, column): (usize, usize),
        live: usize,
    ) {
        // SAFETY: the caller's contract; a bias has as many values as the result columns.
        unsafe {
            if let Some(bias) = self.bias {
                let bias = bias.as_ptr().add(column);
                value = s.add(value, load::<S, WHOLE>(s, bias, live));
            }
            let out = self.out.at(row * self.plan.n + column);
            let value = match self.then {
                Epilogue::Store(None) => value,
                Epilogue::Store(Some(act)) => activation(s, act, value),
                Epilogue::Add => s.add(load::<S, WHOLE>(s, out, live), value),
            };
            if WHOLE {
                s.store(out, value);
            } else {
                s.store_part(out, value, live);
            }
        }
    }
}

/// A register, or its first `live` lanes.
///
/// # Safety
/// `live` values can be read from `p`, which are `LANES` if WHOLE.
#[inline(always)]
unsafe fn load<S: Simd, const WHOLE: bool>(s: S, p: *const f32, live: usize) -> S::F {
    // SAFETY: the caller's contract.
    unsafe {
        if WHOLE {
            s.load(p)
        } else {
            s.load_part(p, live)
        }
    }
}

/// One tile of rows times one panel, over one block of k.
pub(crate) struct Tile<'a> {
    pub(crate) a: &'a [u32],
    pub(crate) w: &'a [u8],
    pub(crate) steps: usize,
    /// Where its sums will go, if they are complete.
    result: Option<Place>,
    /// What is read after this panel.
    pub(crate) ahead: Ahead,
    /// How far ahead the panel is fetched where it comes from memory.
    pub(crate) fetched: Distance,
    /// Whether no other tile reads the panel, so that it comes from memory.
    pub(crate) alone: bool,
}

/// Memory to be fetched meanwhile.
#[derive(Clone, Copy, Default)]
pub(crate) struct Ahead {
    at: usize,
    /// Lines in all, and lines at a time.
    lines: usize,
    part: usize,
}

impl Ahead {
    /// Part `index` of `parts` of these bytes.
    fn of(bytes: Option<&[u8]>, index: usize, parts: usize) -> Ahead {
        let Some(bytes) = bytes else {
            return Ahead::default();
        };
        let lines = part(bytes.len().div_ceil(64), parts, index);
        Ahead {
            at: bytes.as_ptr() as usize + lines.start * 64,
            lines: lines.len(),
            part: 0,
        }
    }

    /// Spread over so many calls of [`Ahead::fetch`].
    #[inline(always)]
    pub(crate) fn over(self, calls: usize) -> Ahead {
        let part = self.lines.div_ceil(calls.max(1));
        Ahead { part, ..self }
    }

    /// Fetches a part into the second-level cache.
    #[inline(always)]
    pub(crate) fn fetch(&mut self) {
        let count = self.part.min(self.lines);
        for line in 0..count {
            let line = std::ptr::without_provenance::<i8>(self.at + line * 64);
            // SAFETY: a prefetch of any address is harmless.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line) };
        }
        self.at += count * 64;
        self.lines -= count;
    }
}

/// A tile's place in the result, to be fetched in time.
struct Place {
    start: *const f32,
    /// Columns of the result.
    stride: usize,
}

impl Place {
    #[inline(always)]
    fn fetch<const HINT: i32>(&self, rows: Range<usize>, columns: Range<usize>) {
        for row in rows {
            for column in columns.clone().step_by(16) {
                let line = self.start.wrapping_add(row * self.stride + column);
                // SAFETY: a prefetch of any address is harmless.
                unsafe { _mm_prefetch::<HINT>(line.cast()) };
            }
        }
    }
}

/// Rows ahead of which the epilogue fetches the result into the first-level cache: where its rows
/// are a power of two apart, few of their lines fit there at a time.
const AHEAD: usize = 3;
/// Values of k before a tile's end at which its part of the result is fetched: late enough not to
/// be pushed out of the first-level cache, early enough to be there.
const FETCH: usize = 512;

/// The tile's sums, new or continued, to `sums` (`[rows, PANEL]`).
fn any_tile<F: Format>(isa: Isa, t: &Tile<'_>, sums: &mut [f32], more: bool) {
    macro_rules! rows {
        ($($rows:literal)*) => {
            match sums.len() / PANEL {
                $($rows => F::launch(isa, OneTile::<F, $rows> { t, sums, more, format: PhantomData }),)*
                rows => unreachable!("a tile of {rows} rows"),
            }
        };
    }
    rows!(1 2 3 4 5 6 7 8 9 10 11 12);
}

/// A tile of ROWS rows: a kernel of its own, so that the compiler gives it all the registers.
struct OneTile<'a, F, const ROWS: usize> {
    t: &'a Tile<'a>,
    sums: &'a mut [f32],
    more: bool,
    format: PhantomData<F>,
}

impl<F: Format, const ROWS: usize> Kernel for OneTile<'_, F, ROWS> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if ROWS > 6 && S::LANES == 8 {
            unreachable!("a tile of {ROWS} rows in registers of 8");
        }
        match F::registers(ROWS, S::LANES) {
            1 => tile::<S, F, ROWS, 1>(s, self.t, self.sums, self.more),
            2 => tile::<S, F, ROWS, 2>(s, self.t, self.sums, self.more),
            _ => tile::<S, F, ROWS, 4>(s, self.t, self.sums, self.more),
        }
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
        let (mut step, mut end) = (0, t.steps);
        if t.result.is_some() {
            end = t.steps.saturating_sub(FETCH / F::STEP_K);
        }
        // Two rounds of one loop: a branch inside it would cost it its registers.
        loop {
            while step < end {
                // SAFETY: the lengths were checked above; a prefetch touches nothing.
                unsafe {
                    let a = t.a.as_ptr().add(step * ROWS * F::A_PER_STEP);
                    let w = t.w.as_ptr().add(step * step_bytes);
                    F::fetch::<S, ROWS, V>(w, first, t.fetched);
                    F::step(s, &mut acc, a, w, first, t.fetched);
                }
                step += 1;
            }
            if end == t.steps {
                break;
            }
            end = t.steps;
            if let Some(result) = &t.result {
                result.fetch::<_MM_HINT_T1>(0..ROWS, first..first + V * S::LANES);
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
