//! Products with the tile registers of AMX: what a tile of up to 32 rows times a panel is, for each
//! weight format.
//!
//! Decision: the loop nest and the packed weights are those of every other instruction set; a panel's
//! step is already what a row of a right factor takes. Packed activations lie in pieces of 64 bytes,
//! the rows of a tile side by side, so that a left factor is one stretch of memory. A block of k of
//! one panel (16 KB) stays in the first-level cache while the tiles of rows pass by.
//!
//! Where sums are of whole rows (8-bit weights, bf16) they stay in tile registers over a block of k.
//! Where each group of 64 has scales of its own, a group's sums go through memory to f32 sums in vector
//! registers, 16 rows by 16 columns at a time. Sums of bytes are exact, and all else is the arithmetic of
//! the formats without AMX, which run few rows: both give a row the same bits. bf16 has sums of its own
//! order ([`super::Kind::Bf16`]), for one row as for many.

use std::arch::x86_64::{__m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_storeu_si512};
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::{
    Bf16, Multiply, PIECE, ROW_BYTES, ROWS, Signed, SignedUnsigned, Tiles, add_product, load,
    load_sums, multiply, store, store_sums, zero, zero_sums,
};
use crate::cpu::bnb::{self, Bnb4, Int8, Pairs, Values, WORD, Wide};
use crate::cpu::formats::{Distance, DotBf16, Format, Head, fetch_line, round_bf16};
use crate::cpu::gemm::{Ahead, PACK, Tile};
use crate::cpu::int::Vnni;
use crate::cpu::launch::Kernel;
use crate::cpu::quantised::{Q4, Q4Bytes, Q8};
use crate::cpu::simd::Simd;
use crate::isa::Isa;
use crate::weight::PANEL;
use crate::weight::bnb4::GROUP;
use crate::weight::q8::Step;

/// Bytes between two rows of a right factor.
const STRIDE: usize = 4 * PANEL;
/// How far ahead of its products a panel that one tile of rows reads is fetched. Further ahead into the
/// second-level cache, as vector registers want it, brings nothing here.
const FETCHED: usize = 2 << 10;
/// Bytes of a right factor of a panel's columns.
const FACTOR: usize = ROWS * STRIDE;

/// What formats for AMX share with the format of the same weights without it.
macro_rules! as_without {
    ($plain:ty) => {
        as_without!($plain, as_is, $plain);
    };
    ($plain:ty, $prepare:ident, $packer:ty) => {
        const COLUMN_BYTES: usize = <$plain>::COLUMN_BYTES;
        const STEP_K: usize = <$plain>::STEP_K;
        const TAIL_BYTES: usize = <$plain>::TAIL_BYTES;
        const HEADS: bool = <$plain>::HEADS;
        const ROTATES: bool = <$plain>::ROTATES;

        fn tile_rows(_: Isa) -> usize {
            2 * ROWS
        }

        fn launch<K: Kernel>(isa: Isa, kernel: K) {
            <$plain>::launch(isa, kernel);
        }

        #[inline(always)]
        fn step_of<S: Simd>(s: S, x: &[f32]) -> Step {
            <$plain>::step_of(s, x)
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
            let mut room = [0.0; PACK];
            let x = $prepare(x, &mut room);
            // SAFETY: the caller's contract.
            unsafe { <$packer>::pack_row(s, x, step, elements, out, stride) }
        }

        #[inline(always)]
        unsafe fn step<S: Simd, const R: usize, const V: usize>(
            _: S,
            _: &mut [[S::F; V]; R],
            _: *const u32,
            _: *const u8,
            _: usize,
            _: Distance,
        ) {
            unreachable!("a step of a format for AMX. This is a bug.");
        }

        #[inline(always)]
        unsafe fn finish<S: Simd>(s: S, sums: S::F, tail: *const u8, head: &Head) -> S::F {
            // SAFETY: the caller's contract.
            unsafe { <$plain>::finish(s, sums, tail, head) }
        }
    };
}

fn as_is<'a>(x: &'a [f32], _: &mut [f32; PACK]) -> &'a [f32] {
    x
}

/// Activations that are not next to nothing, and zeros. Times the values of 4-bit weights these are far
/// from subnormal, and so are all their sums: what AMX reads as zero does not come up, and [`InOrder`]
/// has its bits.
#[inline(always)]
fn flushed<'a>(x: &[f32], room: &'a mut [f32; PACK]) -> &'a [f32] {
    const LEAST: f32 = 1e-27;
    let room = &mut room[..x.len()];
    for (out, x) in room.iter_mut().zip(x) {
        // NaN stays.
        *out = if x.abs() < LEAST { 0.0 } else { *x };
    }
    room
}

/// A format whose sums are of whole rows.
macro_rules! whole_rows {
    ($(#[$about:meta])* $name:ident $plain:ty, $packer:ty, $multiply:ty) => {
        $(#[$about])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name;

        impl Format for $name {
            as_without!($plain, as_is, $packer);
            const A_PER_STEP: usize = 1;
            const UNIT: usize = PIECE;
            type Unpacked = Self;

            #[inline(always)]
            unsafe fn amx_tile<S: Simd>(_: S, tiles: &Tiles, t: &Tile<'_>, sums: &mut [f32], more: bool) {
                // SAFETY: the caller's contract.
                unsafe { whole_rows::<$multiply>(tiles, t, sums, more) };
            }
        }
    };
}

whole_rows!(
    /// 8-bit weights.
    AmxQ8 Q8<Vnni>, Q8<Vnni>, SignedUnsigned
);
whole_rows!(
    /// LLM.int8() weights.
    AmxInt8 Int8<Vnni>, Int8<Vnni>, SignedUnsigned
);
whole_rows!(
    /// bf16 weights times activations rounded to bf16.
    AmxBf16 DotBf16, Rounded, Bf16
);

/// How activations become bf16: by the instruction for it.
struct Rounded;

impl Rounded {
    /// [`Format::pack_row`] of [`DotBf16`], for elements that lie side by side.
    ///
    /// # Safety
    /// As there; only inside its launch.
    #[inline(always)]
    unsafe fn pack_row<S: Simd>(
        _: S,
        x: &[f32],
        _: Step,
        elements: usize,
        out: *mut u32,
        stride: usize,
    ) -> i32 {
        assert!(stride == 1 && x.len() <= 2 * elements);
        let (pieces, rest) = x.as_chunks::<{ 2 * PIECE }>();
        // SAFETY: the caller's contract: a piece of elements for each piece of x, and some for the rest,
        // which is filled up with zeros. This is inside launch, so there is the instruction.
        unsafe {
            for (index, piece) in pieces.iter().enumerate() {
                round(piece, out.add(index * PIECE).cast());
            }
            if !rest.is_empty() {
                let (mut whole, mut room) = ([0.0; 2 * PIECE], [0u32; PIECE]);
                whole[..rest.len()].copy_from_slice(rest);
                round(&whole, room.as_mut_ptr().cast());
                let at = pieces.len() * PIECE;
                std::ptr::copy_nonoverlapping(room.as_ptr(), out.add(at), PIECE.min(elements - at));
            }
        }
        0
    }
}

/// Rounds 32 values to bf16, ties to even, subnormal ones to zero.
///
/// # Safety
/// The processor has the instruction; 32 values can be written to `out`.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn round(x: &[f32; 2 * PIECE], out: *mut __m512i) {
    // SAFETY: the caller's contract; two registers' values.
    unsafe {
        let (low, high) = (
            _mm512_loadu_ps(x.as_ptr()),
            _mm512_loadu_ps(x.as_ptr().add(PIECE)),
        );
        let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
        _mm512_storeu_si512(out, rounded);
    }
}

/// The tile's sums over a block of k, new or continued.
///
/// # Safety
/// As [`Format::amx_tile`].
#[inline(always)]
unsafe fn whole_rows<M: Multiply>(tiles: &Tiles, t: &Tile<'_>, sums: &mut [f32], more: bool) {
    let (rows, whole) = (tiles.rows(), t.steps / PIECE);
    assert!(sums.len() == rows * PANEL && t.w.len() == t.steps * STRIDE);
    assert!(t.a.len() >= t.steps.div_ceil(PIECE) * rows * PIECE);
    let mut ahead = t.ahead.over(whole);
    // SAFETY: the lengths were just checked; `rows` rows are set up.
    unsafe {
        if more {
            load_sums(tiles, sums.as_ptr(), PANEL);
        } else {
            zero_sums();
        }
        for unit in 0..whole {
            let a = t.a.as_ptr().add(unit * rows * PIECE).cast();
            let w = t.w.as_ptr().add(unit * FACTOR);
            if t.alone {
                for line in (0..FACTOR).step_by(64) {
                    fetch_line(w.wrapping_add(FETCHED + line));
                }
            } else {
                ahead.fetch();
            }
            add_product::<M>(tiles, a, (w, STRIDE));
        }
        if whole * PIECE < t.steps {
            let mut last = [0; FACTOR];
            let rest = &t.w[whole * FACTOR..];
            last[..rest.len()].copy_from_slice(rest);
            let a = t.a.as_ptr().add(whole * rows * PIECE).cast();
            add_product::<M>(tiles, a, (last.as_ptr(), STRIDE));
        }
        store_sums(tiles, sums.as_mut_ptr(), PANEL);
    }
}

/// A format that has scales for each group of 64.
trait Grouped: Format {
    type Multiply: Multiply;
    /// Right factors in a group.
    const FACTORS: usize;

    /// `acc` plus a register of a group's sums in one row. `scales`: those of the columns; `step`: the
    /// last that the row has in its unit.
    fn add<S: Simd>(s: S, acc: S::F, sums: S::F, scales: S::F, step: f32) -> S::F;
}

/// 4-bit weights.
#[derive(Clone, Copy)]
pub(crate) struct AmxQ4;

impl Format for AmxQ4 {
    as_without!(Q4<Vnni>);
    const A_PER_STEP: usize = Q4::<Vnni>::A_PER_STEP;
    const UNIT: usize = Self::A_PER_STEP;
    type Unpacked = Q4Bytes<Vnni>;
    const UNPACKS: bool = true;
    // Eight groups: with their codes, their rows' and the waiting sums these stay in the first-level cache.
    const PANEL_BLOCK: usize = 18 << 10;

    #[inline(always)]
    fn unpack<S: Simd>(s: S, w: &[u8], out: &mut [u8]) {
        Q4::<Vnni>::unpack_as::<S, true>(s, w, out);
    }

    #[inline(always)]
    unsafe fn amx_tile<S: Simd>(s: S, tiles: &Tiles, t: &Tile<'_>, sums: &mut [f32], more: bool) {
        // SAFETY: the caller's contract.
        unsafe { grouped::<S, Self>(s, tiles, t, sums, more) };
    }
}

impl Grouped for AmxQ4 {
    type Multiply = Signed;
    const FACTORS: usize = 1;

    #[inline(always)]
    fn add<S: Simd>(s: S, acc: S::F, sums: S::F, scales: S::F, step: f32) -> S::F {
        let scales = s.mul(scales, s.splat(step));
        s.fma(s.to_float(s.ints(sums)), scales, acc)
    }
}

/// 4-bit weights of bitsandbytes, multiplied as bf16.
#[derive(Clone, Copy)]
pub(crate) struct AmxBnb4<T>(PhantomData<T>);

impl<T: Values> Format for AmxBnb4<T> {
    as_without!(Bnb4<Pairs, T>, flushed, Rounded);
    const A_PER_STEP: usize = Bnb4::<Pairs, T>::A_PER_STEP;
    const UNIT: usize = Self::A_PER_STEP;
    type Unpacked = <Bnb4<Pairs, T> as Format>::Unpacked;
    const UNPACKS: bool = true;
    // Four groups: as with [`AmxQ4`], they stay in the first-level cache.
    const PANEL_BLOCK: usize = 18 << 10;

    #[inline(always)]
    fn unpack<S: Simd>(s: S, w: &[u8], out: &mut [u8]) {
        Bnb4::<Pairs, T>::unpack(s, w, out);
    }

    #[inline(always)]
    unsafe fn amx_tile<S: Simd>(s: S, tiles: &Tiles, t: &Tile<'_>, sums: &mut [f32], more: bool) {
        // SAFETY: the caller's contract.
        unsafe { grouped::<S, Self>(s, tiles, t, sums, more) };
    }
}

impl<T: Values> Grouped for AmxBnb4<T> {
    type Multiply = Bf16;
    const FACTORS: usize = 2;

    #[inline(always)]
    fn add<S: Simd>(s: S, acc: S::F, sums: S::F, scales: S::F, _: f32) -> S::F {
        s.fma(sums, scales, acc)
    }
}

/// The same for a few rows, by vector registers: the sums of [`super::Kind::Bf16`] in f32.
#[derive(Clone, Copy)]
pub(crate) struct InOrder<T>(PhantomData<T>);

/// Values of k of a product of tile registers.
const PRODUCT_K: usize = 32;

impl<T: Values> Format for InOrder<T> {
    const COLUMN_BYTES: usize = Bnb4::<Wide, T>::COLUMN_BYTES;
    const STEP_K: usize = Bnb4::<Wide, T>::STEP_K;
    const A_PER_STEP: usize = Bnb4::<Wide, T>::A_PER_STEP;
    type Unpacked = Self;

    /// Even, odd and a group's sums, and those of the groups, take four times the registers.
    #[inline(always)]
    fn registers(rows: usize, _: usize) -> usize {
        if rows == 1 { 2 } else { 1 }
    }

    /// The step fetches.
    #[inline(always)]
    fn fetch<S: Simd, const ROWS: usize, const V: usize>(_: *const u8, _: usize, _: Distance) {}

    #[inline(always)]
    unsafe fn pack_row<S: Simd>(
        _: S,
        x: &[f32],
        _: Step,
        elements: usize,
        out: *mut u32,
        stride: usize,
    ) -> i32 {
        let mut room = [0.0; PACK];
        for (e, x) in flushed(x, &mut room).iter().enumerate().take(elements) {
            // SAFETY: the caller's contract.
            unsafe { *out.add(e * stride) = round_bf16(*x) & 0xffff_0000 };
        }
        0
    }

    #[inline(always)]
    unsafe fn step<S: Simd, const R: usize, const V: usize>(
        s: S,
        acc: &mut [[S::F; V]; R],
        a: *const u32,
        w: *const u8,
        first: usize,
        ahead: Distance,
    ) {
        let mut sums = [[s.splat(0.0); V]; R];
        for product in 0..GROUP / PRODUCT_K {
            let mut chains = [[[s.splat(0.0); V]; R]; 2];
            for word in 0..PRODUCT_K / WORD {
                let word = product * (PRODUCT_K / WORD) + word;
                let mut values = [[s.splat_i(0); WORD]; V];
                for (v, values) in values.iter_mut().enumerate() {
                    // SAFETY: the caller's contract: the codes of the group's columns.
                    *values = unsafe {
                        bnb::look_up::<S, Wide, T>(s, w, word, first + v * S::LANES, ahead)
                    };
                }
                for part in 0..WORD {
                    for (row, sums) in chains[part % 2].iter_mut().enumerate() {
                        // SAFETY: the caller's contract: R * A_PER_STEP elements at a.
                        let a = unsafe { *a.add((word * WORD + part) * R + row) };
                        let a = s.splat(f32::from_bits(a));
                        for (sums, values) in sums.iter_mut().zip(&values) {
                            *sums = s.fma(a, s.floats(values[part]), *sums);
                        }
                    }
                }
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                for (v, sums) in sums.iter_mut().enumerate() {
                    *sums = s.add(*sums, s.add(chains[0][row][v], chains[1][row][v]));
                }
            }
        }
        // SAFETY: the caller's contract: the absmax of the group's columns.
        unsafe { bnb::add_scaled(s, acc, sums, (w, first), ahead) };
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(s: S, sums: S::F, tail: *const u8, head: &Head) -> S::F {
        // SAFETY: the caller's contract.
        unsafe { Bnb4::<Wide, T>::finish(s, sums, tail, head) }
    }
}

/// The tile's sums over a block of k, new or continued: 16 rows by 16 columns at a time.
///
/// # Safety
/// As [`Format::amx_tile`]; only with registers of 16 lanes.
#[inline(always)]
unsafe fn grouped<S: Simd, G: Grouped>(
    s: S,
    tiles: &Tiles,
    t: &Tile<'_>,
    sums: &mut [f32],
    more: bool,
) {
    let rows = tiles.rows();
    let group = G::FACTORS * FACTOR + 4 * PANEL;
    assert!(S::LANES == ROWS && sums.len() == rows * PANEL);
    assert!(t.a.len() >= t.steps * rows * G::UNIT && t.w.len() == t.steps * group);
    let mut ahead = t.ahead.over(2 * rows.div_ceil(ROWS) * t.steps);
    for first in (0..rows).step_by(ROWS) {
        for column in [0, ROWS] {
            let place = (first, column);
            // SAFETY: the lengths were checked, and the place is in the tile.
            unsafe {
                if rows - first <= ROWS / 2 {
                    grouped_register::<S, G, { ROWS / 2 }>(
                        s, t, sums, more, rows, place, &mut ahead,
                    );
                } else {
                    grouped_register::<S, G, ROWS>(s, t, sums, more, rows, place, &mut ahead);
                }
            }
        }
    }
}

/// [`grouped`] for the sums of one register, those from row `first` and `column` on, of which at most MOST
/// rows are live: what is not costs time in vector registers.
///
/// # Safety
/// As there; the place is in the tile.
#[inline(always)]
unsafe fn grouped_register<S: Simd, G: Grouped, const MOST: usize>(
    s: S,
    t: &Tile<'_>,
    sums: &mut [f32],
    more: bool,
    rows: usize,
    (first, column): (usize, usize),
    ahead: &mut Ahead,
) {
    let live = MOST.min(rows - first);
    let (unit, group) = (rows * G::UNIT, G::FACTORS * FACTOR + 4 * PANEL);
    // Not zeroed as a whole, which would take a twentieth of the time: only what no register is stored to.
    let mut waiting = MaybeUninit::<Waiting>::uninit();
    // SAFETY: only its address is taken.
    let waiting: *mut f32 = unsafe { (&raw mut (*waiting.as_mut_ptr()).0).cast() };
    for turn in 0..TURNS {
        // SAFETY: inside its turn's rows.
        unsafe {
            let behind = waiting.add((turn * ROWS + live) * ROWS);
            behind.write_bytes(0, (MOST - live) * ROWS);
        }
    }
    let mut steps = Steps([0.0; ROWS]);
    let late = usize::from(!t.alone);
    let mut acc = [s.splat(0.0); MOST];
    let place = sums[first * PANEL + column..].as_mut_ptr();
    if more {
        for (row, acc) in acc.iter_mut().enumerate() {
            // Not `take(live)`: a loop of unknown length would keep the sums in memory.
            if row < live {
                // SAFETY: a live row of sums.
                *acc = unsafe { s.load(place.add(row * PANEL)) };
            }
        }
    }
    for step in 0..t.steps + BEHIND {
        let turn = |step: usize| waiting.wrapping_add(step % TURNS * ROWS * ROWS);
        // SAFETY: the caller's contract; a left factor's rows that are not live are not in its register, and
        // have the step zero.
        unsafe {
            if step < t.steps {
                ahead.fetch();
                let a = t.a.as_ptr().add(step * unit + first * PIECE);
                let w = t.w.as_ptr().add(step * group + 4 * column);
                match (first == 0, step % 2) {
                    (true, 0) => product::<G, 0, 6, 4>(a, rows, w),
                    (true, _) => product::<G, 1, 6, 5>(a, rows, w),
                    (false, 0) => product::<G, 2, 7, 4>(a, rows, w),
                    (false, _) => product::<G, 3, 7, 5>(a, rows, w),
                }
            }
            // A product later, when it is there: a store that has to wait holds up what follows. With one
            // tile of rows, whose panel comes from memory, that brings nothing.
            if step >= late && step < t.steps + late {
                let out = turn(step - late).cast();
                match (first == 0, (step - late) % 2) {
                    (true, 0) => store::<0>(out, ROW_BYTES),
                    (true, _) => store::<1>(out, ROW_BYTES),
                    (false, 0) => store::<2>(out, ROW_BYTES),
                    (false, _) => store::<3>(out, ROW_BYTES),
                }
            }
            if step >= BEHIND {
                let step = step - BEHIND;
                let row_steps = t.a.as_ptr().add(step * unit + (G::UNIT - 1) * rows + first);
                s.store(steps.0.as_mut_ptr(), s.load_part(row_steps.cast(), live));
                // Read again one by one: the compiler would rather shuffle a register of them, which takes
                // the port that the sums need.
                let steps = std::hint::black_box(steps.0.as_ptr());
                let scales = t.w.as_ptr().add((step + 1) * group - 4 * (PANEL - column));
                let scales = s.load(scales.cast());
                for (row, acc) in acc.iter_mut().enumerate() {
                    let sums = s.load(turn(step).add(row * ROWS));
                    *acc = G::add(s, *acc, sums, scales, *steps.add(row));
                }
            }
        }
    }
    for (row, acc) in acc.iter().enumerate() {
        if row < live {
            // SAFETY: a live row of sums.
            unsafe { s.store(place.add(row * PANEL), *acc) };
        }
    }
}

/// Groups by which sums follow their products, so that these are there.
const BEHIND: usize = 3;
/// Groups whose sums wait.
const TURNS: usize = 4;

/// Sums of some groups on their way from tile registers to others.
#[repr(align(64))]
struct Waiting([[f32; ROWS * ROWS]; TURNS]);

/// The steps of the rows of a register.
#[repr(align(64))]
struct Steps([f32; ROWS]);

/// A group's product, in sums C, by left factor A.
///
/// # Safety
/// As [`add_product`].
#[inline(always)]
unsafe fn product<G: Grouped, const C: u8, const A: u8, const B: u8>(
    a: *const u32,
    rows: usize,
    w: *const u8,
) {
    // SAFETY: the caller's contract.
    unsafe {
        zero::<C>();
        for factor in 0..G::FACTORS {
            load::<A>(a.add(factor * rows * PIECE).cast(), ROW_BYTES);
            load::<B>(w.add(factor * FACTOR), STRIDE);
            multiply::<G::Multiply, C, A, B>();
        }
    }
}
