//! Products with quantised weights: what a step does, and how activations become bytes.
//!
//! Decision: the loop nest is that of every other format. Rows for 8-bit weights
//! are rotated (`weight/rotate.rs`) before they are quantised. 8-bit sums stay integers from the first
//! block of k to the last, as the bits of the waiting sums; scales come with the epilogue. The 128
//! that is added to each weight code adds 128 times the sum of the row's codes, which the row's head
//! takes off again. A step of 4-bit weights is a group of 64: its integer sums live in registers,
//! start at -128 times the sum of the row's codes in the group (packed beside the codes), and are
//! added, times the group's scales, to the f32 sums. One tile of rows looks levels up in registers; where
//! there are more, a panel's block is looked up once for all of them, into the nearest caches.

use std::marker::PhantomData;

use crate::cpu::formats::{Distance, Format, Head};
use crate::cpu::int::Dot;
use crate::cpu::launch::Kernel;
use crate::cpu::simd::Simd;
use crate::isa::Isa;
use crate::weight::q8::Step;
use crate::weight::{PANEL, q4, q8};

/// 8-bit weights.
#[derive(Clone, Copy)]
pub(crate) struct Q8<D>(PhantomData<D>);

impl<D: Dot> Format for Q8<D> {
    type Unpacked = Self;
    const COLUMN_BYTES: usize = q8::STEP_K;
    const STEP_K: usize = q8::STEP_K;
    const A_PER_STEP: usize = D::PARTS;
    const TAIL_BYTES: usize = 4 * PANEL;
    const HEADS: bool = true;
    const ROTATES: bool = true;
    const WIDENS: bool = D::PARTS > 1;

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
            let count = (elements - first).min(CHUNK / 4 * D::PARTS);
            // SAFETY: elements first..first + count are below `elements`.
            unsafe { codes.store_parts::<S, D>(s, count, out.add(first * stride), stride) };
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
        _: Distance,
    ) {
        for part in 0..D::PARTS {
            let mut columns = [s.splat_i(0); V];
            for (v, columns) in columns.iter_mut().enumerate() {
                // SAFETY: the caller's contract: V registers of columns at w, from first on.
                let bytes = unsafe { s.load_i(w.add(4 * (first + v * S::LANES))) };
                *columns = D::columns(s, bytes, part);
            }
            for (row, acc) in acc.iter_mut().enumerate() {
                for (acc, columns) in acc.iter_mut().zip(columns) {
                    // SAFETY: the caller's contract: ROWS elements of each part at a; only inside launch.
                    let sums = unsafe {
                        let element = *a.add(part * ROWS + row);
                        D::dot(s, s.ints(*acc), columns, element)
                    };
                    *acc = s.floats(sums);
                }
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

/// 4-bit weights. A packed row has, for each group, its 16 elements of codes, what the group's integer
/// sums start with, and what a code of 1 stands for.
#[derive(Clone, Copy)]
pub(crate) struct Q4<D>(PhantomData<D>);

/// Elements of a group's codes in a packed row.
const fn group_elements<D: Dot>() -> usize {
    q4::GROUP / 4 * D::PARTS
}

impl<D: Dot> Format for Q4<D> {
    const COLUMN_BYTES: usize = q4::GROUP_BYTES / PANEL;
    const STEP_K: usize = q4::GROUP;
    const A_PER_STEP: usize = group_elements::<D>() + 2;
    type Unpacked = Q4Bytes<D>;
    const UNPACKS: bool = true;

    /// Integer and f32 sums take twice the registers.
    #[inline(always)]
    fn registers(rows: usize, lanes: usize) -> usize {
        match (lanes, rows) {
            (16, _) => 2,
            (8, 1) => 4,
            (8, 2) => 2,
            _ => 1,
        }
    }

    #[inline(always)]
    fn fetch<S: Simd, const ROWS: usize, const V: usize>(
        w: *const u8,
        first: usize,
        ahead: Distance,
    ) {
        if spreads(ROWS) {
            return;
        }
        if V * S::LANES == PANEL {
            for line in (0..q4::GROUP_BYTES).step_by(64) {
                ahead.fetch_line::<S>(w.wrapping_add(line));
            }
            return;
        }
        for eight in 0..q4::GROUP / 8 {
            ahead.fetch_line::<S>(w.wrapping_add(4 * (eight * PANEL + first)));
        }
        ahead.fetch_line::<S>(w.wrapping_add(q4::CODES));
    }

    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        D::launch(isa, kernel);
    }

    #[inline(always)]
    unsafe fn pack_row<S: Simd>(
        s: S,
        x: &[f32],
        _: Step,
        elements: usize,
        out: *mut u32,
        stride: usize,
    ) -> i32 {
        let mut codes = Codes::default();
        let groups = (0..elements).step_by(Self::A_PER_STEP);
        for (x, first) in x.chunks(q4::GROUP).zip(groups) {
            let step = step_of(s, x);
            let sum = codes.fill(s, x, step);
            let zero = if D::SIGNED { 0 } else { i32::from(q4::ZERO) };
            let start = codes_sum(s, sum, 1).wrapping_mul(-zero);
            let count = group_elements::<D>();
            // SAFETY: first is below `elements`, which is a multiple of a group's.
            unsafe {
                codes.store_parts::<S, D>(s, count, out.add(first * stride), stride);
                *out.add((first + count) * stride) = start as u32;
                *out.add((first + count + 1) * stride) = step.scale.to_bits();
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
        ahead: Distance,
    ) {
        // SAFETY: the caller's contract: ROWS * A_PER_STEP elements at a.
        let mut sums = unsafe { group_starts::<S, D, ROWS, V>(s, a) };
        for eight in 0..q4::GROUP / 8 {
            let (mut low, mut high) = ([s.splat_i(0); V], [s.splat_i(0); V]);
            for (v, (low, high)) in low.iter_mut().zip(&mut high).enumerate() {
                // SAFETY: the caller's contract: the codes of the group's columns.
                let codes = unsafe { s.load_i(w.add(4 * (eight * PANEL + first + v * S::LANES))) };
                (*low, *high) = look_up(s, table_of(D::SIGNED), codes);
            }
            // First all low levels, so that a sum is not needed again at once.
            for (four, columns) in [low, high].iter().enumerate() {
                // SAFETY: the caller's contract: the elements of the group; only inside launch.
                unsafe {
                    let a = a.add((2 * eight + four) * D::PARTS * ROWS);
                    add_four::<S, D, ROWS, V>(s, &mut sums, a, columns);
                }
                for v in 0..V {
                    let line = w.wrapping_add(4 * (eight * PANEL + first + v * S::LANES));
                    match (spreads(ROWS), four) {
                        (true, 0) => ahead.fetch_near(line),
                        (true, _) => ahead.fetch_far::<S>(line),
                        _ => {}
                    }
                }
            }
        }
        if spreads(ROWS) {
            ahead.fetch_line::<S>(w.wrapping_add(q4::CODES));
        }
        for v in 0..V {
            // SAFETY: the caller's contract: the scales of the group's columns.
            let scales = unsafe { s.load_f16(w.add(q4::CODES + 2 * (first + v * S::LANES))) };
            // SAFETY: the caller's contract: ROWS * A_PER_STEP elements at a.
            unsafe { add_group::<S, D, ROWS, V>(s, acc, &sums, (a, scales), v) };
        }
    }

    #[inline(always)]
    fn unpack<S: Simd>(s: S, w: &[u8], out: &mut [u8]) {
        Self::unpack_as::<S, false>(s, w, out);
    }
}

/// Whether a step of so many rows of 4-bit weights fetches line by line, between its products, and not all
/// lines before them: with two rows a tenth of the time, with four a fifteenth. With one row there is too little
/// between the lines, and it costs 5 %.
const fn spreads(rows: usize) -> bool {
    rows > 1
}

impl<D: Dot> Q4<D> {
    /// [`Format::unpack`], by request to signed bytes: without the 128 that is added to each level.
    #[inline(always)]
    pub(crate) fn unpack_as<S: Simd, const SIGNED: bool>(s: S, w: &[u8], out: &mut [u8]) {
        let table = table_of(SIGNED);
        let groups = out.chunks_exact_mut(BYTES_GROUP);
        for (w, out) in w.chunks_exact(q4::GROUP_BYTES).zip(groups) {
            for eight in 0..q4::GROUP / 8 {
                for at in (0..PANEL).step_by(S::LANES) {
                    // SAFETY: within a group's codes; a register's bytes are read, and written twice.
                    unsafe {
                        let codes = s.load_i(w.as_ptr().add(4 * (eight * PANEL + at)));
                        let (low, high) = look_up(s, table, codes);
                        let out = out.as_mut_ptr().add(4 * (2 * eight * PANEL + at));
                        s.store(out.cast(), s.floats(low));
                        s.store(out.add(4 * PANEL).cast(), s.floats(high));
                    }
                }
            }
            for at in (0..PANEL).step_by(S::LANES) {
                // SAFETY: within a group's scales, as they are and as f32.
                unsafe {
                    let scales = s.load_f16(w.as_ptr().add(q4::CODES + 2 * at));
                    let out = out.as_mut_ptr().add(q4::GROUP * PANEL + 4 * at);
                    s.store(out.cast(), scales);
                }
            }
        }
    }
}

/// The levels, as signed bytes or as unsigned.
#[inline(always)]
const fn table_of(signed: bool) -> &'static [u8; 16] {
    if signed { &SIGNED_BYTES } else { &q4::BYTES }
}

/// The levels of a register of codes: of four values of k, and of the next four.
#[inline(always)]
fn look_up<S: Simd>(s: S, table: &[u8; 16], codes: S::I) -> (S::I, S::I) {
    let mask = s.splat_i(0x0f0f_0f0f);
    let low = s.look_up(table, s.and(codes, mask));
    let high = s.look_up(table, s.and(s.right16::<4>(codes), mask));
    (low, high)
}

/// The levels as signed bytes.
const SIGNED_BYTES: [u8; 16] = {
    let mut bytes = q4::BYTES;
    let mut code = 0;
    while code < 16 {
        bytes[code] ^= q4::ZERO;
        code += 1;
    }
    bytes
};

/// Adds the products of four values of k to the integer sums of a group.
///
/// # Safety
/// The elements of ROWS rows can be read at `a`; only inside [`Dot::launch`].
#[inline(always)]
unsafe fn add_four<S: Simd, D: Dot, const ROWS: usize, const V: usize>(
    s: S,
    sums: &mut [[S::I; V]; ROWS],
    a: *const u32,
    bytes: &[S::I; V],
) {
    for part in 0..D::PARTS {
        let mut columns = *bytes;
        for columns in &mut columns {
            *columns = D::columns(s, *columns, part);
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            for (sums, columns) in sums.iter_mut().zip(columns) {
                // SAFETY: the caller's contract.
                *sums = unsafe { D::dot(s, *sums, columns, *a.add(part * ROWS + row)) };
            }
        }
    }
}

/// What the integer sums of a group start with.
///
/// # Safety
/// `ROWS` elements can be read behind a group's codes at `a`.
#[inline(always)]
unsafe fn group_starts<S: Simd, D: Dot, const ROWS: usize, const V: usize>(
    s: S,
    a: *const u32,
) -> [[S::I; V]; ROWS] {
    let mut sums = [[s.splat_i(0); V]; ROWS];
    for (row, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's contract.
        let start = unsafe { *a.add(group_elements::<D>() * ROWS + row) };
        *sums = [s.splat_i(start as i32); V];
    }
    sums
}

/// Adds a group's integer sums of register `v` of columns, which have these scales, to the sums.
///
/// # Safety
/// A group's elements of ROWS rows can be read at `a`.
#[inline(always)]
unsafe fn add_group<S: Simd, D: Dot, const ROWS: usize, const V: usize>(
    s: S,
    acc: &mut [[S::F; V]; ROWS],
    sums: &[[S::I; V]; ROWS],
    (a, scales): (*const u32, S::F),
    v: usize,
) {
    for (row, (acc, sums)) in acc.iter_mut().zip(sums).enumerate() {
        // SAFETY: the caller's contract.
        let step = f32::from_bits(unsafe { *a.add((group_elements::<D>() + 1) * ROWS + row) });
        acc[v] = s.fma(s.to_float(sums[v]), s.mul(scales, s.splat(step)), acc[v]);
    }
}

/// Bytes of a group of an unpacked panel: a byte each, then the scales as f32.
const BYTES_GROUP: usize = (q4::GROUP + 4) * PANEL;

/// [`Q4`] with its levels looked up, which many tiles of rows share. The arithmetic is the same.
#[derive(Clone, Copy)]
pub(crate) struct Q4Bytes<D>(PhantomData<D>);

impl<D: Dot> Format for Q4Bytes<D> {
    const COLUMN_BYTES: usize = BYTES_GROUP / PANEL;
    const STEP_K: usize = q4::GROUP;
    const A_PER_STEP: usize = group_elements::<D>() + 2;
    type Unpacked = Self;

    #[inline(always)]
    fn registers(rows: usize, lanes: usize) -> usize {
        Q4::<D>::registers(rows, lanes)
    }

    /// Nothing: it has just been written.
    #[inline(always)]
    fn fetch<S: Simd, const ROWS: usize, const V: usize>(_: *const u8, _: usize, _: Distance) {}

    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        D::launch(isa, kernel);
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
        // SAFETY: the caller's contract: ROWS * A_PER_STEP elements at a.
        let mut sums = unsafe { group_starts::<S, D, ROWS, V>(s, a) };
        for four in 0..q4::GROUP / 4 {
            let mut columns = [s.splat_i(0); V];
            for (v, columns) in columns.iter_mut().enumerate() {
                // SAFETY: the caller's contract: the bytes of the group's columns.
                *columns = unsafe { s.load_i(w.add(4 * (four * PANEL + first + v * S::LANES))) };
            }
            // SAFETY: the caller's contract: the elements of the group; only inside launch.
            unsafe {
                let a = a.add(four * D::PARTS * ROWS);
                add_four::<S, D, ROWS, V>(s, &mut sums, a, &columns);
            }
        }
        for v in 0..V {
            // SAFETY: the caller's contract: the scales of the group's columns.
            let scales = unsafe {
                let at = q4::GROUP * PANEL + 4 * (first + v * S::LANES);
                s.load(w.add(at).cast())
            };
            // SAFETY: the caller's contract: ROWS * A_PER_STEP elements at a.
            unsafe { add_group::<S, D, ROWS, V>(s, acc, &sums, (a, scales), v) };
        }
    }
}

/// How a row becomes codes: [`Step::of`].
#[inline(always)]
pub(crate) fn step_of<S: Simd>(s: S, x: &[f32]) -> Step {
    let mut peaks = s.splat_i(0);
    let mut chunks = x.chunks_exact(CHUNK);
    for chunk in &mut chunks {
        peaks = largest_magnitudes(s, chunk, peaks);
    }
    let mut last = [0.0; CHUNK];
    last[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    peaks = largest_magnitudes(s, &last, peaks);
    Step::of_peak(f32::from_bits(s.largest_i(peaks) as u32))
}

/// The larger of lanes of magnitudes and those of a chunk, compared as integers, so that NaN is
/// above all.
#[inline(always)]
pub(crate) fn largest_magnitudes<S: Simd>(s: S, chunk: &[f32], peaks: S::I) -> S::I {
    let magnitude = s.splat_i(0x7fff_ffff);
    let (mut even, mut odd) = (peaks, s.splat_i(0));
    for pair in chunk.chunks_exact(2 * S::LANES) {
        // SAFETY: two registers' values.
        let values = unsafe { [s.load(pair.as_ptr()), s.load(pair.as_ptr().add(S::LANES))] };
        even = s.max_i(even, s.and(s.ints(values[0]), magnitude));
        odd = s.max_i(odd, s.and(s.ints(values[1]), magnitude));
    }
    s.max_i(even, odd)
}

/// Values that are quantised at a time.
pub(crate) const CHUNK: usize = q4::GROUP;
/// Added to a code, a float whose last bit stands for 1: rounds the code as [`Step::code`] does and
/// leaves it in the lowest bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// The codes of some values of a row.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(crate) struct Codes([u32; CHUNK / 4]);

impl Codes {
    /// The codes of x, zeros beyond its end. Returns lanes of which [`codes_sum`] makes their sum.
    #[inline(always)]
    pub(crate) fn fill<S: Simd>(&mut self, s: S, x: &[f32], step: Step) -> S::I {
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

    /// Adds 128 to each code, as 8-bit weights are stored.
    #[inline(always)]
    pub(crate) fn add_zero(&mut self) {
        for element in &mut self.0 {
            *element ^= u32::from_ne_bytes([q8::ZERO; 4]);
        }
    }

    /// Writes the first elements to `out`, `out + stride` and so on.
    ///
    /// # Safety
    /// So many can be written there.
    #[inline(always)]
    pub(crate) unsafe fn store(&self, elements: usize, out: *mut u32, stride: usize) {
        if stride == 1 && elements == CHUNK / 4 {
            // SAFETY: the caller's contract.
            unsafe { out.cast::<Self>().write_unaligned(*self) };
            return;
        }
        for (e, element) in self.0.iter().enumerate().take(elements) {
            // Volatile, for else the compiler makes scatters of these, which take three times as
            // long.
            // SAFETY: the caller's contract.
            unsafe { out.add(e * stride).write_volatile(*element) };
        }
    }

    /// [`Codes::store`] of the elements that `D` multiplies, whole fours of k.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn store_parts<S: Simd, D: Dot>(
        &self,
        s: S,
        elements: usize,
        out: *mut u32,
        stride: usize,
    ) {
        for part in 0..D::PARTS {
            let mut codes = *self;
            for at in (0..CHUNK / 4).step_by(S::LANES) {
                let codes = codes.0[at..at + S::LANES].as_mut_ptr();
                // SAFETY: a register's values, read and written.
                unsafe {
                    let elements = D::elements(s, s.load_i(codes.cast()), part);
                    s.store(codes.cast(), s.floats(elements));
                }
            }
            // SAFETY: the caller's contract: every PARTS-th element, from this part's first on.
            unsafe {
                let out = out.add(part * stride);
                codes.store(elements / D::PARTS, out, D::PARTS * stride);
            }
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
