//! What a matrix product does with one step of a panel, for each weight format.
//!
//! Decision: a step is what the narrowest unit of the packed format holds: one k of f32 and f16, a
//! pair of k of bf16. Everywhere but in `DotBf16` the weight is widened in registers and multiplied in
//! f32 with unrounded activations; `DotBf16` rounds the activations to bf16 while packing them, which
//! is what every bf16 implementation of the model does, and uses the bf16 dot product.

use crate::cpu::simd::{Kernel, Simd, launch, launch_bf16_dot};
use crate::isa::Isa;

/// One weight format on one kind of multiplier.
pub(crate) trait Format: Copy + Send + Sync + 'static {
    /// Bytes of one column in a step.
    const COLUMN_BYTES: usize;
    /// Values of k in a step.
    const STEP_K: usize;
    /// 32-bit elements of a packed activation row in a step.
    const A_PER_STEP: usize;

    /// Runs a kernel that uses this format.
    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        launch(isa, kernel);
    }

    /// Packs `x`, part of a row, as `elements` elements: element e goes to `out[e * stride]`. What is
    /// beyond x (an odd k) becomes zero.
    ///
    /// # Safety
    /// `out[0..=(elements - 1) * stride]` can be written.
    #[inline(always)]
    unsafe fn pack_row(x: &[f32], elements: usize, out: *mut u32, stride: usize) {
        for e in 0..elements {
            let value = if e < x.len() { x[e] } else { 0.0 };
            // SAFETY: e < elements.
            unsafe { *out.add(e * stride) = value.to_bits() };
        }
    }

    /// Adds the products of one step: `ROWS` packed activation rows at `a` times two registers of
    /// columns at `w`.
    ///
    /// # Safety
    /// `ROWS * A_PER_STEP` elements can be read at `a` and `2 * LANES * COLUMN_BYTES` bytes at `w`;
    /// `DotBf16` only inside [`Format::launch`].
    unsafe fn step<S: Simd, const ROWS: usize>(
        s: S,
        acc: &mut [[S::F; 2]; ROWS],
        a: *const u32,
        w: *const u8,
    );
}

/// f32 weights.
#[derive(Clone, Copy)]
pub(crate) struct WideF32;

impl Format for WideF32 {
    const COLUMN_BYTES: usize = 4;
    const STEP_K: usize = 1;
    const A_PER_STEP: usize = 1;

    #[inline(always)]
    unsafe fn step<S: Simd, const ROWS: usize>(
        s: S,
        acc: &mut [[S::F; 2]; ROWS],
        a: *const u32,
        w: *const u8,
    ) {
        // SAFETY: the caller's contract: two registers of f32 at w.
        let w = unsafe { [s.load(w.cast()), s.load(w.cast::<f32>().add(S::LANES))] };
        // SAFETY: the caller's contract: ROWS elements at a.
        unsafe { multiply(s, acc, a, w) };
    }
}

/// f16 weights, widened.
#[derive(Clone, Copy)]
pub(crate) struct WideF16;

impl Format for WideF16 {
    const COLUMN_BYTES: usize = 2;
    const STEP_K: usize = 1;
    const A_PER_STEP: usize = 1;

    #[inline(always)]
    unsafe fn step<S: Simd, const ROWS: usize>(
        s: S,
        acc: &mut [[S::F; 2]; ROWS],
        a: *const u32,
        w: *const u8,
    ) {
        // SAFETY: the caller's contract: two registers' worth of f16 at w.
        let w = unsafe { [s.load_f16(w), s.load_f16(w.add(2 * S::LANES))] };
        // SAFETY: the caller's contract: ROWS elements at a.
        unsafe { multiply(s, acc, a, w) };
    }
}

/// bf16 weights, widened: the pair's first values, then their second, as the chain over k demands.
#[derive(Clone, Copy)]
pub(crate) struct WideBf16;

impl Format for WideBf16 {
    const COLUMN_BYTES: usize = 4;
    const STEP_K: usize = 2;
    const A_PER_STEP: usize = 2;

    #[inline(always)]
    unsafe fn step<S: Simd, const ROWS: usize>(
        s: S,
        acc: &mut [[S::F; 2]; ROWS],
        a: *const u32,
        w: *const u8,
    ) {
        // SAFETY: the caller's contract: two registers of pairs at w.
        let pairs = unsafe { [s.load_bf16_pairs(w), s.load_bf16_pairs(w.add(4 * S::LANES))] };
        // SAFETY: the caller's contract: ROWS first values at a, then ROWS second ones.
        unsafe {
            multiply(s, acc, a, [pairs[0].0, pairs[1].0]);
            multiply(s, acc, a.add(ROWS), [pairs[0].1, pairs[1].1]);
        }
    }
}

/// bf16 weights times activations rounded to bf16.
#[derive(Clone, Copy)]
pub(crate) struct DotBf16;

impl Format for DotBf16 {
    const COLUMN_BYTES: usize = 4;
    const STEP_K: usize = 2;
    const A_PER_STEP: usize = 1;

    fn launch<K: Kernel>(_: Isa, kernel: K) {
        launch_bf16_dot(kernel);
    }

    #[inline(always)]
    unsafe fn pack_row(x: &[f32], elements: usize, out: *mut u32, stride: usize) {
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
    }

    #[inline(always)]
    unsafe fn step<S: Simd, const ROWS: usize>(
        s: S,
        acc: &mut [[S::F; 2]; ROWS],
        a: *const u32,
        w: *const u8,
    ) {
        for (row, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the caller's contract: ROWS pairs at a, two registers of pairs at w, and the
            // processor was asked by launch_bf16_dot.
            unsafe {
                acc[0] = s.dot_bf16(acc[0], a.add(row), w);
                acc[1] = s.dot_bf16(acc[1], a.add(row), w.add(4 * S::LANES));
            }
        }
    }
}

/// The bits of x with the lower half to be dropped: rounded to bf16, ties to even.
#[inline(always)]
fn round_bf16(x: f32) -> u32 {
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
unsafe fn multiply<S: Simd, const ROWS: usize>(
    s: S,
    acc: &mut [[S::F; 2]; ROWS],
    a: *const u32,
    w: [S::F; 2],
) {
    for (row, acc) in acc.iter_mut().enumerate() {
        // SAFETY: row < ROWS.
        let a = s.splat(f32::from_bits(unsafe { *a.add(row) }));
        acc[0] = s.fma(a, w[0], acc[0]);
        acc[1] = s.fma(a, w[1], acc[1]);
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
