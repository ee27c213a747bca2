//! Products with the weights of bitsandbytes: what a step does.
//!
//! Decision: a step of 4-bit weights is a group of 64. Codes become values in registers, by a look-up
//! (`lookup.rs`), and their products are summed in f32 from zero on; the group's sum, times absmax, is
//! added to the sum of the groups. Two ways to multiply ([`Multiplier`]): pairs of bf16 by the bf16
//! dot product with activations rounded to bf16 ([`Pairs`]), or f32 ([`Wide`]).
//!
//! Up to one tile of rows, codes are looked up in the step. Where several tiles take a panel, its values
//! are written to scratch once for all of them, each group with its absmax behind it, and the tiles
//! read them as they would read a weight in bf16 or f32. The operations on a row's sums are the same and
//! in the same order both ways.
//!
//! LLM.int8() has the step of 8-bit weights; see `weight/int8.rs` for what it does otherwise.

use std::marker::PhantomData;

use crate::buffer::{Buffer, Vector};
use crate::cpu::amx::{AmxBnb4, AmxInt8, InOrder};
use crate::cpu::formats::{Distance, DotBf16, Format, Head, fetch_line};
use crate::cpu::gemm::{TILED, product};
use crate::cpu::int::{AvxVnni, Dot, Vnni, Widened};
use crate::cpu::launch::{Kernel, launch};
use crate::cpu::quantised::Q8;
use crate::cpu::simd::Simd;
use crate::isa::Isa;
use crate::ops::Epilogue;
use crate::weight::bnb::{Code4, INT8_STEP};
use crate::weight::bnb4::{CODES, GROUP, GROUP_BYTES, Numbers};
use crate::weight::q8::Step;
use crate::weight::{Compute, PANEL, Weight, WeightDtype};

/// Values of k that lie in a word.
pub(crate) const WORD: usize = 8;
/// Words of a column in a group.
const WORDS: usize = GROUP / WORD;

/// A product with such weights, as [`crate::cpu::gemm::linear`].
pub(crate) fn linear(
    isa: Isa,
    x: &Buffer,
    w: &Weight,
    finish: (Option<&Vector>, Epilogue),
    out: &mut Buffer,
) {
    let WeightDtype::Bnb4(of) = w.dtype() else {
        if isa == Isa::Amx && x.rows() >= TILED {
            product::<AmxInt8>(isa, x, w, finish, out);
        } else if isa >= Isa::Avx512Vnni {
            product::<Int8<Vnni>>(isa, x, w, finish, out);
        } else if isa == Isa::AvxVnni {
            product::<Int8<AvxVnni>>(isa, x, w, finish, out);
        } else {
            product::<Int8<Widened>>(isa, x, w, finish, out);
        }
        return;
    };
    let pairs = isa == Isa::Avx512Bf16;
    let amx = isa == Isa::Amx;
    let few = amx && x.rows() < TILED;
    match (of.code, of.compute) {
        (Code4::Nf4, Compute::F32) => product::<Bnb4<Wide, Nf4F32>>(isa, x, w, finish, out),
        (Code4::Fp4, Compute::F32) => product::<Bnb4<Wide, Fp4F32>>(isa, x, w, finish, out),
        (Code4::Nf4, _) if few => product::<InOrder<Nf4Bf16>>(isa, x, w, finish, out),
        (Code4::Fp4, _) if few => product::<InOrder<Fp4Bf16>>(isa, x, w, finish, out),
        (Code4::Nf4, _) if amx => product::<AmxBnb4<Nf4Bf16>>(isa, x, w, finish, out),
        (Code4::Fp4, _) if amx => product::<AmxBnb4<Fp4Bf16>>(isa, x, w, finish, out),
        (Code4::Nf4, _) if pairs => product::<Bnb4<Pairs, Nf4Bf16>>(isa, x, w, finish, out),
        (Code4::Fp4, _) if pairs => product::<Bnb4<Pairs, Fp4Bf16>>(isa, x, w, finish, out),
        (Code4::Nf4, _) => product::<Bnb4<Wide, Nf4Bf16>>(isa, x, w, finish, out),
        (Code4::Fp4, _) => product::<Bnb4<Wide, Fp4Bf16>>(isa, x, w, finish, out),
    }
}

/// What codes stand for in products.
pub(crate) trait Values: Copy + Send + Sync + 'static {
    const NUMBERS: Numbers;
    /// The values as bf16, twice.
    const PAIRS: [u16; 32] = {
        let (mut pairs, mut i) = ([0; 32], 0);
        while i < 32 {
            pairs[i] = (Self::NUMBERS.values[i % 16].to_bits() >> 16) as u16;
            i += 1;
        }
        pairs
    };
    /// Whether the values are bf16.
    const HALVES: bool = {
        let (mut halves, mut i) = (true, 0);
        while i < 16 {
            halves &= Self::NUMBERS.values[i].to_bits() << 16 == 0;
            i += 1;
        }
        halves
    };
    /// The values' first bytes, which hold the sign, and their second.
    const BYTES: [[u8; 16]; 2] = {
        let (mut bytes, mut i) = ([[0; 16]; 2], 0);
        while i < 16 {
            let [first, second, ..] = Self::NUMBERS.values[i].to_bits().to_be_bytes();
            bytes[0][i] = first;
            bytes[1][i] = second;
            i += 1;
        }
        bytes
    };
}

macro_rules! values {
    ($($name:ident $code:ident $compute:ident)*) => {$(
        #[derive(Clone, Copy)]
        pub(crate) struct $name;
        impl Values for $name {
            const NUMBERS: Numbers = Numbers::of(Code4::$code, Compute::$compute);
        }
    )*};
}
values!(Nf4F32 Nf4 F32  Nf4Bf16 Nf4 Bf16  Fp4F32 Fp4 F32  Fp4Bf16 Fp4 Bf16);

/// One way to multiply looked-up values.
pub(crate) trait Multiplier: Copy + Send + Sync + 'static {
    /// Values of k in a lane of a looked-up register.
    const LANE_K: usize;
    fn launch<K: Kernel>(isa: Isa, kernel: K);

    /// The registers of values that words hold, in ascending k.
    ///
    /// # Safety
    /// Only inside [`Multiplier::launch`].
    unsafe fn look<S: Simd, T: Values>(s: S, words: S::I) -> [S::I; WORD];

    /// `acc` plus the products of a lane's values and a packed element of activations.
    ///
    /// # Safety
    /// Only inside [`Multiplier::launch`].
    unsafe fn add<S: Simd>(s: S, acc: S::F, w: S::I, a: u32) -> S::F;

    /// # Safety
    /// As [`Format::pack_row`].
    unsafe fn pack_row<S: Simd>(s: S, x: &[f32], elements: usize, out: *mut u32, stride: usize);
}

/// Pairs of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Pairs;

impl Multiplier for Pairs {
    const LANE_K: usize = 2;

    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        DotBf16::launch(isa, kernel);
    }

    #[inline(always)]
    unsafe fn look<S: Simd, T: Values>(s: S, words: S::I) -> [S::I; WORD] {
        // SAFETY: the caller's contract; 64 bytes of a table; the token is Avx512.
        unsafe {
            let table = s.load_i(const { &T::PAIRS }.as_ptr().cast());
            let first = s.look_pairs(table, words);
            let mut values = [first; WORD];
            values[1] = s.look_pairs(table, s.right16::<4>(words));
            values[2] = s.look_pairs(table, s.right16::<8>(words));
            values[3] = s.look_pairs(table, s.right16::<12>(words));
            values
        }
    }

    #[inline(always)]
    unsafe fn add<S: Simd>(s: S, acc: S::F, w: S::I, a: u32) -> S::F {
        // SAFETY: the caller's contract.
        s.floats(unsafe { s.dot_pairs(s.ints(acc), w, a) })
    }

    #[inline(always)]
    unsafe fn pack_row<S: Simd>(s: S, x: &[f32], elements: usize, out: *mut u32, stride: usize) {
        // SAFETY: the caller's contract.
        unsafe { DotBf16::pack_row(s, x, Step::default(), elements, out, stride) };
    }
}

/// f32.
#[derive(Clone, Copy)]
pub(crate) struct Wide;

impl Multiplier for Wide {
    const LANE_K: usize = 1;

    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        launch(isa, kernel);
    }

    #[inline(always)]
    unsafe fn look<S: Simd, T: Values>(s: S, words: S::I) -> [S::I; WORD] {
        if T::HALVES && S::LANES == 8 {
            return look_bytes::<S, T>(s, words);
        }
        let table = s.table(const { &T::NUMBERS.values });
        [
            s.look::<0>(table, words),
            s.look::<16>(table, words),
            s.look::<4>(table, words),
            s.look::<20>(table, words),
            s.look::<8>(table, words),
            s.look::<24>(table, words),
            s.look::<12>(table, words),
            s.look::<28>(table, words),
        ]
    }

    #[inline(always)]
    unsafe fn add<S: Simd>(s: S, acc: S::F, w: S::I, a: u32) -> S::F {
        s.fma(s.splat(f32::from_bits(a)), s.floats(w), acc)
    }

    #[inline(always)]
    unsafe fn pack_row<S: Simd>(_: S, x: &[f32], elements: usize, out: *mut u32, stride: usize) {
        for (e, x) in x.iter().enumerate().take(elements) {
            // SAFETY: the caller's contract.
            unsafe { *out.add(e * stride) = x.to_bits() };
        }
    }
}

/// The values of words, which are bf16, byte by byte: AVX2 permutes bytes of all lanes in one operation, and whole
/// lanes in several.
#[inline(always)]
fn look_bytes<S: Simd, T: Values>(s: S, words: S::I) -> [S::I; WORD] {
    let nibbles = s.splat_i(0x0f0f_0f0f);
    let (first_byte, second) = (s.splat_i(0xff00_ff00_u32 as i32), s.splat_i(0x00ff_00ff));
    let upper = s.splat_i(0xffff_0000_u32 as i32);
    let mut values = [words; WORD];
    for (at, codes) in [words, s.right16::<4>(words)].into_iter().enumerate() {
        let codes = s.and(codes, nibbles);
        let high = s.look_up(const { &T::BYTES[0] }, codes);
        let low = s.look_up(const { &T::BYTES[1] }, codes);
        // The bytes of values 0 and 1 of four lie where the codes' lowest do, those of 4 and 5 above.
        let first = s.add_i(s.left16::<8>(high), s.and(low, second));
        let fifth = s.add_i(s.and(high, first_byte), s.right16::<8>(low));
        for (four, pair) in [first, fifth].into_iter().enumerate() {
            values[4 * four + 2 * at] = s.left(pair, 16);
            values[4 * four + 2 * at + 1] = s.and(pair, upper);
        }
    }
    values
}

/// 4-bit weights, looked up in the step.
#[derive(Clone, Copy)]
pub(crate) struct Bnb4<M, T>(PhantomData<(M, T)>);

impl<M: Multiplier, T: Values> Format for Bnb4<M, T> {
    const COLUMN_BYTES: usize = GROUP_BYTES / PANEL;
    const STEP_K: usize = GROUP;
    const A_PER_STEP: usize = GROUP / M::LANE_K;
    type Unpacked = Unpacked<M>;
    const UNPACKS: bool = true;

    /// A group's sums and the groups' take twice the registers.
    #[inline(always)]
    fn registers(rows: usize, lanes: usize) -> usize {
        match (lanes, rows) {
            (8, 1) => 4,
            (16, 1..=6) | (8, 2..=3) => 2,
            _ => 1,
        }
    }

    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        M::launch(isa, kernel);
    }

    /// The step fetches.
    #[inline(always)]
    fn fetch<S: Simd, const ROWS: usize, const V: usize>(_: *const u8, _: usize, _: Distance) {}

    #[inline(always)]
    unsafe fn pack_row<S: Simd>(
        s: S,
        x: &[f32],
        _: Step,
        elements: usize,
        out: *mut u32,
        stride: usize,
    ) -> i32 {
        // SAFETY: the caller's contract.
        unsafe { M::pack_row(s, x, elements, out, stride) };
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
        let mut sums = [[s.splat(0.0); V]; ROWS];
        let per_word = WORD / M::LANE_K;
        // With 16 registers the values of one word are as many as there is room for.
        let at_once = if S::LANES == 8 { 1 } else { V };
        for word in 0..WORDS {
            for from in (0..V).step_by(at_once) {
                let mut values = [[s.splat_i(0); WORD]; V];
                for (v, values) in values[..at_once].iter_mut().enumerate() {
                    let column = first + (from + v) * S::LANES;
                    // SAFETY: the caller's contract: the codes of the group's columns.
                    *values = unsafe { look_up::<S, M, T>(s, w, word, column, ahead) };
                }
                for part in 0..per_word {
                    for (row, sums) in sums.iter_mut().enumerate() {
                        for (sums, values) in sums[from..from + at_once].iter_mut().zip(&values) {
                            // SAFETY: the caller's contract: ROWS * A_PER_STEP elements at a.
                            unsafe {
                                let a = *a.add((word * per_word + part) * ROWS + row);
                                *sums = M::add(s, *sums, values[part], a);
                            }
                        }
                    }
                }
            }
        }
        // SAFETY: the caller's contract: the absmax of the group's columns.
        unsafe { add_scaled(s, acc, sums, (w, first), ahead) };
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(s: S, sums: S::F, _: *const u8, _: &Head) -> S::F {
        s.mul(sums, s.splat(T::NUMBERS.back))
    }

    #[inline(always)]
    fn unpack<S: Simd>(s: S, w: &[u8], out: &mut [u8]) {
        let groups = out.chunks_exact_mut(PANEL * Unpacked::<M>::COLUMN_BYTES);
        for (w, out) in w.chunks_exact(GROUP_BYTES).zip(groups) {
            let per_word = WORD / M::LANE_K;
            for first in (0..PANEL).step_by(S::LANES) {
                for word in 0..WORDS {
                    // SAFETY: within a group's codes, and within the room for their values; this is
                    // inside launch.
                    unsafe {
                        let words = s.load_i(w.as_ptr().add(4 * (word * PANEL + first)));
                        let values = M::look::<S, T>(s, words);
                        for (part, values) in values.iter().enumerate().take(per_word) {
                            let at = 4 * ((word * per_word + part) * PANEL + first);
                            s.store(out.as_mut_ptr().add(at).cast(), s.floats(*values));
                        }
                    }
                }
            }
            out[4 * Self::A_PER_STEP * PANEL..].copy_from_slice(&w[CODES..]);
        }
    }
}

/// The values of a word of the columns from `column` on, in the group at `w`; what comes later is fetched.
///
/// # Safety
/// The group's codes can be read; only inside [`Multiplier::launch`].
#[inline(always)]
pub(crate) unsafe fn look_up<S: Simd, M: Multiplier, T: Values>(
    s: S,
    w: *const u8,
    word: usize,
    column: usize,
    ahead: Distance,
) -> [S::I; WORD] {
    let at = w.wrapping_add(4 * (word * PANEL + column));
    ahead.fetch_line::<S>(at);
    // SAFETY: the caller's contract.
    unsafe { M::look::<S, T>(s, s.load_i(at)) }
}

/// `acc` plus sums of the group at `w` times the absmax of the columns from `first` on; what comes later is
/// fetched.
///
/// # Safety
/// V registers' absmax can be read.
#[inline(always)]
pub(crate) unsafe fn add_scaled<S: Simd, const ROWS: usize, const V: usize>(
    s: S,
    acc: &mut [[S::F; V]; ROWS],
    sums: [[S::F; V]; ROWS],
    (w, first): (*const u8, usize),
    ahead: Distance,
) {
    let absmax = w.wrapping_add(CODES + 4 * first);
    for v in 0..V {
        ahead.fetch_line::<S>(absmax.wrapping_add(4 * v * S::LANES));
    }
    // SAFETY: the caller's contract.
    unsafe { add_groups(s, acc, sums, absmax) };
}

/// `acc` plus a group's sums times the columns' absmax.
///
/// # Safety
/// V registers of f32 can be read at `absmax`.
#[inline(always)]
unsafe fn add_groups<S: Simd, const ROWS: usize, const V: usize>(
    s: S,
    acc: &mut [[S::F; V]; ROWS],
    sums: [[S::F; V]; ROWS],
    absmax: *const u8,
) {
    for v in 0..V {
        // SAFETY: the caller's contract.
        let absmax = unsafe { s.load(absmax.add(4 * v * S::LANES).cast()) };
        for (acc, sums) in acc.iter_mut().zip(&sums) {
            acc[v] = s.fma(sums[v], absmax, acc[v]);
        }
    }
}

/// How far ahead of the arithmetic unpacked values are fetched from the second-level cache.
const AHEAD: usize = 4 << 10;

/// The values of 4-bit weights in scratch: what [`Bnb4`] unpacks to.
#[derive(Clone, Copy)]
pub(crate) struct Unpacked<M>(PhantomData<M>);

impl<M: Multiplier> Format for Unpacked<M> {
    type Unpacked = Self;
    const COLUMN_BYTES: usize = 4 * (GROUP / M::LANE_K + 1);
    const STEP_K: usize = GROUP;
    const A_PER_STEP: usize = GROUP / M::LANE_K;

    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        M::launch(isa, kernel);
    }

    /// The step fetches.
    #[inline(always)]
    fn fetch<S: Simd, const ROWS: usize, const V: usize>(_: *const u8, _: usize, _: Distance) {}

    #[inline(always)]
    unsafe fn step<S: Simd, const ROWS: usize, const V: usize>(
        s: S,
        acc: &mut [[S::F; V]; ROWS],
        a: *const u32,
        w: *const u8,
        first: usize,
        _: Distance,
    ) {
        let mut sums = [[s.splat(0.0); V]; ROWS];
        for element in 0..Self::A_PER_STEP {
            let mut values = [s.splat_i(0); V];
            for (v, values) in values.iter_mut().enumerate() {
                let at = w.wrapping_add(4 * (element * PANEL + first + v * S::LANES));
                fetch_line(at.wrapping_add(AHEAD));
                // SAFETY: the caller's contract: the values of the group's columns.
                *values = unsafe { s.load_i(at) };
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                for (sums, values) in sums.iter_mut().zip(values) {
                    // SAFETY: the caller's contract: ROWS * A_PER_STEP elements at a.
                    unsafe { *sums = M::add(s, *sums, values, *a.add(element * ROWS + row)) };
                }
            }
        }
        // SAFETY: the caller's contract: the absmax of the group's columns.
        unsafe {
            let absmax = w.add(4 * (Self::A_PER_STEP * PANEL + first));
            add_groups(s, acc, sums, absmax);
        }
    }
}

/// LLM.int8() weights: the step of 8-bit weights, with the scales of bitsandbytes.
#[derive(Clone, Copy)]
pub(crate) struct Int8<D>(PhantomData<D>);

impl<D: Dot> Format for Int8<D> {
    type Unpacked = Self;
    const COLUMN_BYTES: usize = Q8::<D>::COLUMN_BYTES;
    const STEP_K: usize = Q8::<D>::STEP_K;
    const A_PER_STEP: usize = Q8::<D>::A_PER_STEP;
    const TAIL_BYTES: usize = 4 * PANEL;
    const HEADS: bool = true;
    const WIDENS: bool = Q8::<D>::WIDENS;

    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        D::launch(isa, kernel);
    }

    #[inline(always)]
    fn step_of<S: Simd>(s: S, x: &[f32]) -> Step {
        Q8::<D>::step_of(s, x)
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
        // SAFETY: the caller's contract.
        unsafe { Q8::<D>::pack_row(s, x, step, elements, out, stride) }
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
        // SAFETY: the caller's contract.
        unsafe { Q8::<D>::step(s, acc, a, w, first, ahead) };
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(s: S, sums: S::F, tail: *const u8, head: &Head) -> S::F {
        // SAFETY: the caller's contract: SCB of a register's columns.
        let peaks = unsafe { s.load(tail.cast()) };
        let sums = s.add_i(s.ints(sums), s.splat_i(head.correction));
        s.mul(
            s.mul(s.to_float(sums), peaks),
            s.splat(head.scale * INT8_STEP),
        )
    }
}

/// The activations that LLM.int8() does not quantise.
#[derive(Default)]
pub(crate) struct Outliers {
    /// Of which rows, in ascending order, and where they end in `values`. Rows without are not
    /// here.
    rows: Vec<(usize, usize)>,
    /// k and value, row by row in ascending k.
    values: Vec<(usize, f32)>,
}

impl Outliers {
    /// Takes them out of rows that such a weight is multiplied with, if there are any: returns the rows
    /// with zeros in their places.
    pub(crate) fn take(x: &[f32], w: &Weight) -> (Outliers, Option<Vec<f32>>) {
        let mut outliers = Outliers::default();
        let mut kept: Option<Vec<f32>> = None;
        let WeightDtype::Int8(of) = w.dtype() else {
            return (outliers, kept);
        };
        let k = w.k();
        for (row, values) in x.chunks_exact(k.max(1)).enumerate() {
            let found = || {
                values
                    .iter()
                    .enumerate()
                    .filter(|(_, x)| of.leaves_out(**x))
            };
            // The plain fold is what compilers make fast; most rows end here.
            if !values.iter().fold(false, |any, x| any | of.leaves_out(*x)) {
                continue;
            }
            let kept = kept.get_or_insert_with(|| x.to_vec());
            for (place, value) in found() {
                outliers.values.push((place, *value));
                kept[row * k + place] = 0.0;
            }
            outliers.rows.push((row, outliers.values.len()));
        }
        (outliers, kept)
    }

    /// A row's, in ascending k.
    #[inline(always)]
    pub(crate) fn of(&self, row: usize) -> &[(usize, f32)] {
        let Ok(at) = self.rows.binary_search_by_key(&row, |(row, _)| *row) else {
            return &[];
        };
        let start = if at == 0 { 0 } else { self.rows[at - 1].1 };
        &self.values[start..self.rows[at].1]
    }
}

/// `sums` plus a row's outliers times the weights' values, of a register of columns from `first` on of
/// a panel of LLM.int8() weights.
#[inline(always)]
pub(crate) fn add_outliers<S: Simd>(
    s: S,
    mut sums: S::F,
    outliers: &[(usize, f32)],
    panel: &[u8],
    first: usize,
) -> S::F {
    let line = crate::weight::q8::STEP_K * PANEL;
    let (codes, tail) = panel.split_at(panel.len() - 4 * PANEL);
    let peaks = &tail[4 * first..4 * (first + S::LANES)];
    // SAFETY: a register of f32.
    let peaks = unsafe { s.load(peaks.as_ptr().cast()) };
    for (k, value) in outliers {
        let units = &codes[k / 4 * line..][4 * first..4 * (first + S::LANES)];
        // SAFETY: a register of units.
        let units = unsafe { s.load_i(units.as_ptr()) };
        let shift = 8 * (k % 4) as i32;
        let code = s.and(s.right(units, shift), s.splat_i(0xff));
        let code = s.sub(s.to_float(code), s.splat(128.0));
        let weight = s.mul(s.mul(code, peaks), s.splat(INT8_STEP));
        sums = s.fma(s.splat(*value), weight, sums);
    }
    sums
}
