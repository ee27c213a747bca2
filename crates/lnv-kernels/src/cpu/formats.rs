//! What a matrix product does with one step of a panel, for each weight format.
//!
//! Decision: a step is what the narrowest unit of the packed format holds: one k of f32 and f16, a
//! pair of k of bf16. Everywhere but in `DotBf16` the weight is widened in registers and multiplied
//! in f32 with unrounded activations; `DotBf16` rounds the activations to bf16 while packing them,
//! which is what every bf16 implementation of the model does, and uses the bf16 dot product.

use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

use crate::cpu::amx::Tiles;
use crate::cpu::gemm::Tile;
use crate::cpu::launch::{Kernel, launch, launch_bf16_dot};
use crate::cpu::simd::Simd;
use crate::isa::Isa;
use crate::weight::q8::Step;

/// The most panels that a thread reads side by side, and the most rows that are multiplied so.
pub(crate) const STREAMS: usize = 4;
pub(crate) const MOST_STREAMED: usize = 3;

/// One weight format on one kind of multiplier.
pub(crate) trait Format: Copy + Send + Sync + 'static {
    /// Bytes of one column in a step.
    const COLUMN_BYTES: usize;
    /// Values of k in a step.
    const STEP_K: usize;
    /// 32-bit elements of a packed activation row in a step.
    const A_PER_STEP: usize;
    /// Bytes of a panel after its steps, which [`Format::finish`] reads.
    const TAIL_BYTES: usize = 0;
    /// Whether activations are quantised, so that rows have a [`Head`].
    const HEADS: bool = false;
    /// Whether activations are rotated along k.
    const ROTATES: bool = false;
    /// What a panel is unpacked to where several tiles of rows read it, with equal steps and equal
    /// activations; the format itself, if that brings nothing.
    type Unpacked: Format;
    /// Whether there is something to unpack.
    const UNPACKS: bool = false;
    /// Elements of a row that lie together for the tile registers of AMX, which then multiply; else 1.
    const UNIT: usize = 1;
    /// Steps that have so many elements, at least one.
    const UNIT_STEPS: usize = if Self::UNIT > Self::A_PER_STEP {
        Self::UNIT / Self::A_PER_STEP
    } else {
        1
    };
    /// Bytes of a panel between two changes of tile.
    const PANEL_BLOCK: usize = if Self::UNIT > 1 { 16 << 10 } else { 64 << 10 };
    /// Bytes of packed activations that stay in the second-level cache.
    const ROWS_BLOCK: usize = if Self::UNIT > 1 { 192 << 10 } else { 768 << 10 };
    /// Panels whose waiting sums a task keeps.
    const PANEL_GROUP: usize = 16;

    /// Whether a register of weights is widened to two in the step.
    const WIDENS: bool = false;

    /// Rows of the largest tile: its sums fill the registers but for the operands. With AVX2's 16 that is 6,
    /// or 5 where weights are widened: a sixth row's sums would go through memory.
    fn tile_rows(isa: Isa) -> usize {
        match (isa < Isa::Avx512, Self::WIDENS) {
            (true, true) => 5,
            (true, false) => 6,
            _ => 12,
        }
    }

    /// Panels that a thread reads side by side, for so many rows, which are one tile. A Zen 3 reads a fifth to a
    /// third more from four streams than from one, where nothing but memory takes time.
    fn streams(isa: Isa, rows: usize) -> usize {
        if isa < Isa::Avx512 && rows <= MOST_STREAMED {
            STREAMS
        } else {
            1
        }
    }

    /// Runs a kernel that uses this format.
    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        launch(isa, kernel);
    }

    /// Registers of columns that a tile of so many rows takes at a time.
    #[inline(always)]
    fn registers(rows: usize, lanes: usize) -> usize {
        // With registers of 8, few rows take a whole panel at once, so that it is read once.
        if lanes == 8 && rows <= 3 { 4 } else { 2 }
    }

    /// Fetches what [`Format::step`] reads so far beyond `w`, if the step does not do so. Touches nothing.
    #[inline(always)]
    fn fetch<S: Simd, const ROWS: usize, const V: usize>(
        w: *const u8,
        first: usize,
        ahead: Distance,
    ) {
        let start = w.wrapping_add(first * Self::COLUMN_BYTES);
        for line in (0..V * S::LANES * Self::COLUMN_BYTES).step_by(64) {
            ahead.fetch_line::<S>(start.wrapping_add(line));
        }
    }

    /// How the values of a row become codes, if they do.
    #[inline(always)]
    fn step_of<S: Simd>(_: S, _: &[f32]) -> Step {
        Step::default()
    }

    /// Packs `x`, part of a row, as `elements` elements: element e goes to `out[e * stride]`. What
    /// is beyond x (an odd k) becomes zero. Returns what it adds to the head's correction.
    ///
    /// # Safety
    /// `out[0..=(elements - 1) * stride]` can be written.
    #[inline(always)]
    unsafe fn pack_row<S: Simd>(
        _: S,
        x: &[f32],
        _: Step,
        elements: usize,
        out: *mut u32,
        stride: usize,
    ) -> i32 {
        for e in 0..elements {
            let value = if e < x.len() { x[e] } else { 0.0 };
            // SAFETY: e < elements.
            unsafe { *out.add(e * stride) = value.to_bits() };
        }
        0
    }

    /// Adds the products of one step: `ROWS` packed activation rows at `a` times V registers of
    /// columns, from column `first` on, of the panel's step at `w`; `ahead` is how far to fetch beyond what
    /// it reads, if it does.
    ///
    /// # Safety
    /// `ROWS * A_PER_STEP` elements can be read at `a` and `PANEL * COLUMN_BYTES` bytes at `w`;
    /// `first + V * LANES` is at most `PANEL`. Only inside [`Format::launch`].
    unsafe fn step<S: Simd, const ROWS: usize, const V: usize>(
        s: S,
        acc: &mut [[S::F; V]; ROWS],
        a: *const u32,
        w: *const u8,
        first: usize,
        ahead: Distance,
    );

    /// The sums `[rows, PANEL]` of a tile, new or continued, by the tile registers of AMX, if there is a
    /// [`Format::UNIT`].
    ///
    /// # Safety
    /// The registers are set up for the tile's rows. Only inside [`Format::launch`].
    #[inline(always)]
    unsafe fn amx_tile<S: Simd>(_: S, _: &Tiles, _: &Tile<'_>, _sums: &mut [f32], _more: bool) {
        unreachable!("a format without AMX. This is a bug.");
    }

    /// Unpacks the steps at `w` to `out`, if [`Format::UNPACKS`].
    #[inline(always)]
    fn unpack<S: Simd>(_: S, _w: &[u8], _out: &mut [u8]) {}

    /// A register of sums as values: columns of a panel whose tail, from their column on, is at
    /// `tail`, in a row with this head.
    ///
    /// # Safety
    /// The tail of a register's columns can be read.
    #[inline(always)]
    unsafe fn finish<S: Simd>(_: S, sums: S::F, _: *const u8, _: &Head) -> S::F {
        sums
    }
}

/// How far ahead of the arithmetic a panel is fetched, in bytes: into the first-level cache, and, further,
/// into the second.
#[derive(Clone, Copy)]
pub(crate) struct Distance {
    near: usize,
    far: usize,
}

impl Distance {
    /// For a Granite Rapids, here known by AMX. A step of one row takes 5 % less time in 4 bits and 2 to 3 %
    /// in 8 than with 2 KB into the first-level cache alone, and that 5 to 15 % less than with 8 KB.
    pub(crate) const AMX: Self = Self {
        near: 1088,
        far: 4 << 10,
    };
    /// 8 KB served an Emerald Rapids, on which less was not tried. The second fetch finds the line on its way.
    const OTHERS: Self = Self {
        near: 8 << 10,
        far: 8 << 10,
    };

    /// For processors without AVX-512, on a Zen 3, of each of the panels that are read side by side; there is no
    /// second distance.
    const AVX2: Self = Self {
        near: 1 << 10,
        far: 1 << 10,
    };

    pub(crate) fn of(isa: Isa) -> Self {
        match isa {
            Isa::Amx => Self::AMX,
            _ if isa < Isa::Avx512 => Self::AVX2,
            _ => Self::OTHERS,
        }
    }

    /// Fetches the lines that are these distances from this one. Touches nothing.
    #[inline(always)]
    pub(crate) fn fetch_line<S: Simd>(self, line: *const u8) {
        self.fetch_near(line);
        self.fetch_far::<S>(line);
    }

    /// Of these the near one.
    #[inline(always)]
    pub(crate) fn fetch_near(self, line: *const u8) {
        fetch_line(line.wrapping_add(self.near));
    }

    /// And the far one, if there are two.
    #[inline(always)]
    pub(crate) fn fetch_far<S: Simd>(self, line: *const u8) {
        if S::LANES > 8 {
            // SAFETY: a prefetch of any address is harmless.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line.wrapping_add(self.far).cast()) };
        }
    }
}

/// Fetches a line of memory. Touches nothing.
#[inline(always)]
pub(crate) fn fetch_line(line: *const u8) {
    // SAFETY: a prefetch of any address is harmless.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
}

/// What a quantised row of activations carries besides its codes.
#[derive(Debug, Clone, Copy, Default, bytemuck::Zeroable)]
#[repr(C, align(8))]
pub(crate) struct Head {
    /// What a code of 1 stands for.
    pub(crate) scale: f32,
    /// What its integer sums lack.
    pub(crate) correction: i32,
}

/// f32 weights.
#[derive(Clone, Copy)]
pub(crate) struct WideF32;

impl Format for WideF32 {
    type Unpacked = Self;
    const COLUMN_BYTES: usize = 4;
    const STEP_K: usize = 1;
    const A_PER_STEP: usize = 1;

    #[inline(always)]
    unsafe fn step<S: Simd, const ROWS: usize, const V: usize>(
        s: S,
        acc: &mut [[S::F; V]; ROWS],
        a: *const u32,
        w: *const u8,
        first: usize,
        _: Distance,
    ) {
        let mut columns = [s.splat(0.0); V];
        for (v, columns) in columns.iter_mut().enumerate() {
            // SAFETY: the caller's contract: V registers of f32 at w.
            *columns = unsafe { s.load(w.cast::<f32>().add(first + v * S::LANES)) };
        }
        // SAFETY: the caller's contract: ROWS elements at a.
        unsafe { multiply(s, acc, a, columns) };
    }
}

/// f16 weights, widened.
#[derive(Clone, Copy)]
pub(crate) struct WideF16;

impl Format for WideF16 {
    type Unpacked = Self;
    const COLUMN_BYTES: usize = 2;
    const STEP_K: usize = 1;
    const A_PER_STEP: usize = 1;

    #[inline(always)]
    unsafe fn step<S: Simd, const ROWS: usize, const V: usize>(
        s: S,
        acc: &mut [[S::F; V]; ROWS],
        a: *const u32,
        w: *const u8,
        first: usize,
        _: Distance,
    ) {
        let mut columns = [s.splat(0.0); V];
        for (v, columns) in columns.iter_mut().enumerate() {
            // SAFETY: the caller's contract: V registers' worth of f16 at w.
            *columns = unsafe { s.load_f16(w.add(2 * (first + v * S::LANES))) };
        }
        // SAFETY: the caller's contract: ROWS elements at a.
        unsafe { multiply(s, acc, a, columns) };
    }
}

/// bf16 weights, widened: the pair's first values, then their second, as the chain over k demands.
#[derive(Clone, Copy)]
pub(crate) struct WideBf16;

impl Format for WideBf16 {
    type Unpacked = Self;
    const COLUMN_BYTES: usize = 4;
    const STEP_K: usize = 2;
    const A_PER_STEP: usize = 2;
    const WIDENS: bool = true;

    #[inline(always)]
    unsafe fn step<S: Simd, const ROWS: usize, const V: usize>(
        s: S,
        acc: &mut [[S::F; V]; ROWS],
        a: *const u32,
        w: *const u8,
        first: usize,
        _: Distance,
    ) {
        let (mut even, mut odd) = ([s.splat(0.0); V], [s.splat(0.0); V]);
        for (v, (even, odd)) in even.iter_mut().zip(&mut odd).enumerate() {
            // SAFETY: the caller's contract: V registers of pairs at w.
            (*even, *odd) = unsafe { s.load_bf16_pairs(w.add(4 * (first + v * S::LANES))) };
        }
        // SAFETY: the caller's contract: ROWS first values at a, then ROWS second ones.
        unsafe {
            multiply(s, acc, a, even);
            multiply(s, acc, a.add(ROWS), odd);
        }
    }
}

/// bf16 weights times activations rounded to bf16.
#[derive(Clone, Copy)]
pub(crate) struct DotBf16;

impl Format for DotBf16 {
    type Unpacked = Self;
    const COLUMN_BYTES: usize = 4;
    const STEP_K: usize = 2;
    const A_PER_STEP: usize = 1;

    fn launch<K: Kernel>(_: Isa, kernel: K) {
        launch_bf16_dot(kernel);
    }

    #[inline(always)]
    unsafe fn pack_row<S: Simd>(
        _: S,
        x: &[f32],
        _: Step,
        elements: usize,
        out: *mut u32,
        stride: usize,
    ) -> i32 {
        for e in 0..elements {
            let first = round_bf16(x[2 * e]);
            let second = if 2 * e + 1 < x.len() {
                round_bf16(x[2 * e + 1])
            } else {
                0
            };
            // SAFETY: e < elements.
            unsafe { *out.add(e * stride) = first >> 16 | second & 0xffff_0000 };
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
        _: Distance,
    ) {
        for (row, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                let at = 4 * (first + v * S::LANES);
                // SAFETY: the caller's contract: ROWS pairs at a, V registers of pairs at w, and
                // the processor was asked by launch_bf16_dot.
                *acc = unsafe { s.dot_bf16(*acc, a.add(row), w.add(at)) };
            }
        }
    }
}

/// The bits of x with the lower half to be dropped: rounded to bf16, ties to even.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // Rounding could carry a NaN into infinity.
    if x.is_nan() {
        bits | 0x0040_0000
    } else {
        rounded
    }
}

/// `acc[row] += a[row] * w`.
///
/// # Safety
/// `ROWS` values can be read at `a`.
#[inline(always)]
unsafe fn multiply<S: Simd, const ROWS: usize, const V: usize>(
    s: S,
    acc: &mut [[S::F; V]; ROWS],
    a: *const u32,
    w: [S::F; V],
) {
    for (row, acc) in acc.iter_mut().enumerate() {
        // SAFETY: row < ROWS.
        let a = s.splat(f32::from_bits(unsafe { *a.add(row) }));
        for (acc, w) in acc.iter_mut().zip(w) {
            *acc = s.fma(a, w, *acc);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        let specials = [
            0.0,
            -0.0,
            1.0,
            f32::MAX,
            f32::INFINITY,
            -f32::INFINITY,
            f32::MIN_POSITIVE,
        ];
        let many = (0..100_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)));
        for x in many.chain(specials).filter(|x| !x.is_nan()) {
            let bits = (round_bf16(x) >> 16) as u16;
            assert_eq!(bits, bf16::from_f32(x).to_bits(), "{x:e}");
        }
        assert!(bf16::from_bits((round_bf16(f32::NAN) >> 16) as u16).is_nan());
    }
}
