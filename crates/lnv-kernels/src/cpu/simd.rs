//! A register of f32 lanes.
//!
//! Decision: a trait whose values are tokens ([`Avx2`], [`Avx512`]) that exist only after the
//! processor was asked, with methods that inline into the caller, which is a kernel
//! ([`launch`](crate::cpu::launch)). Hot loops use no closures: a closure that is not inlined would be compiled
//! without the features.

use std::arch::x86_64::*;

use crate::cpu::int::Ints;
use crate::cpu::lookup::Lookup;

/// Calls intrinsics of the token's instruction set.
macro_rules! with_features {
    ($intrinsic:expr) => {
        // SAFETY: a value of the token's type exists, so the processor has the instructions; what
        // memory is touched is in the contract of the calling method.
        unsafe { $intrinsic }
    };
}

/// A register of `LANES` f32. Every method is one or a few instructions.
pub(crate) trait Simd: Ints + Lookup + Copy + Send + Sync + 'static {
    /// The register.
    type F: Copy;
    /// Values in a register.
    const LANES: usize;

    fn splat(self, x: f32) -> Self::F;
    /// # Safety
    /// `LANES` values can be read from `p`.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// # Safety
    /// `LANES` values can be written to `p`.
    unsafe fn store(self, p: *mut f32, v: Self::F);
    /// The first `n` lanes (at most `LANES`) from memory, zero in the others.
    ///
    /// # Safety
    /// `n` values can be read from `p`.
    unsafe fn load_part(self, p: *const f32, n: usize) -> Self::F;
    /// The first `n` lanes (at most `LANES`) to memory.
    ///
    /// # Safety
    /// `n` values can be written to `p`.
    unsafe fn store_part(self, p: *mut f32, v: Self::F, n: usize);

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a > b ? a : b`: a NaN in either gives `b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? a : b`: a NaN in either gives `b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `c - a * b`, rounded once.
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// `a * 2^n` for integers n from -126 to 127.
    fn scale(self, a: Self::F, n: Self::F) -> Self::F;
    /// `a < b ? yes : no`, `no` for a NaN.
    fn if_less(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// Lanes `from..to` of `a`, `fill` in the others.
    fn keep(self, a: Self::F, from: usize, to: usize, fill: Self::F) -> Self::F;
    /// The lanes `STRIDE` (1, 2, 4, or 8 of 16) to the right and to the left have changed places.
    fn partners<const STRIDE: usize>(self, a: Self::F) -> Self::F;
    /// The sum of all lanes, always in the same order.
    fn sum(self, a: Self::F) -> f32;
    /// The maximum of all lanes.
    fn largest(self, a: Self::F) -> f32;

    /// `|a|`.
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        self.floats(self.and(self.ints(a), self.splat_i(0x7fff_ffff)))
    }
    /// The same bits as integers.
    fn ints(self, a: Self::F) -> Self::I;
    /// The same bits as floats.
    fn floats(self, a: Self::I) -> Self::F;
    /// The integers' values, rounded to nearest.
    fn to_float(self, a: Self::I) -> Self::F;

    /// `LANES` half-precision values, widened.
    ///
    /// # Safety
    /// `2 * LANES` bytes can be read from `p`.
    unsafe fn load_f16(self, p: *const u8) -> Self::F;
    /// `LANES` pairs of bf16, widened: the pairs' first values, and their second.
    ///
    /// # Safety
    /// `4 * LANES` bytes can be read from `p`.
    unsafe fn load_bf16_pairs(self, p: *const u8) -> (Self::F, Self::F);
    /// `acc + a[0] * w[0] + a[1] * w[1]` for the pair of bf16 at `a` and a register of pairs at
    /// `w`.
    ///
    /// # Safety
    /// The processor has the bf16 dot product, the token is [`Avx512`], and the pair and `4 *
    /// LANES` bytes can be read.
    unsafe fn dot_bf16(self, acc: Self::F, a: *const u32, w: *const u8) -> Self::F;

    /// `e^x`, relative error below 2e-7; exactly 1 for 0, exactly 0 below -87.3, huge but finite
    /// above 88, NaN for NaN. Cephes' polynomial after reduction by multiples of ln 2.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        let clamped = self.min(self.splat(88.0), self.max(self.splat(-87.3), x));
        let n = self.round(self.mul(clamped, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fnma(n, self.splat(0.693_359_4), clamped);
        let r = self.fnma(n, self.splat(-2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [
            1.398_2e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ] {
            p = self.fma(p, r, self.splat(c));
        }
        let p = self.fma(p, self.mul(r, r), r);
        let e = self.scale(self.add(p, self.splat(1.0)), n);
        self.if_less(x, self.splat(-87.3), self.splat(0.0), e)
    }
}

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor has them.
    pub(crate) unsafe fn new() -> Avx2 {
        Avx2(())
    }

    #[inline(always)]
    fn mask(self, n: usize) -> __m256i {
        with_features!({
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lane)
        })
    }
}

impl Simd for Avx2 {
    type F = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        with_features!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        with_features!(_mm256_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        with_features!(_mm256_storeu_ps(p, v))
    }
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, n: usize) -> __m256 {
        with_features!(_mm256_maskload_ps(p, self.mask(n)))
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, v: __m256, n: usize) {
        // A masked store is a short program on AMD's processors.
        if n == Self::LANES {
            with_features!(_mm256_storeu_ps(p, v))
        } else {
            with_features!(_mm256_maskstore_ps(p, self.mask(n), v))
        }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        with_features!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        with_features!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        with_features!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        with_features!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        with_features!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        with_features!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        with_features!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn fnma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        with_features!(_mm256_fnmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        with_features!(_mm256_round_ps::<
            { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
        >(a))
    }
    #[inline(always)]
    fn scale(self, a: __m256, n: __m256) -> __m256 {
        with_features!({
            let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
            let power = _mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f80_0000));
            _mm256_mul_ps(a, _mm256_castsi256_ps(power))
        })
    }
    #[inline(always)]
    fn if_less(self, a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
        with_features!(_mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)))
    }
    #[inline(always)]
    fn keep(self, a: __m256, from: usize, to: usize, fill: __m256) -> __m256 {
        with_features!({
            let inside = _mm256_andnot_si256(self.mask(from), self.mask(to));
            _mm256_blendv_ps(fill, a, _mm256_castsi256_ps(inside))
        })
    }
    #[inline(always)]
    fn partners<const STRIDE: usize>(self, a: __m256) -> __m256 {
        with_features!(match STRIDE {
            1 => _mm256_permute_ps::<0b10_11_00_01>(a),
            2 => _mm256_permute_ps::<0b01_00_11_10>(a),
            4 => _mm256_permute2f128_ps::<1>(a, a),
            _ => unreachable!("a stride of {STRIDE}"),
        })
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        with_features!({
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn largest(self, a: __m256) -> f32 {
        with_features!({
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn ints(self, a: __m256) -> __m256i {
        with_features!(_mm256_castps_si256(a))
    }
    #[inline(always)]
    fn floats(self, a: __m256i) -> __m256 {
        with_features!(_mm256_castsi256_ps(a))
    }
    #[inline(always)]
    fn to_float(self, a: __m256i) -> __m256 {
        with_features!(_mm256_cvtepi32_ps(a))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m256 {
        with_features!(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u8) -> (__m256, __m256) {
        with_features!({
            let pairs = _mm256_loadu_si256(p.cast());
            let second = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            let first = _mm256_slli_epi32::<16>(pairs);
            (_mm256_castsi256_ps(first), _mm256_castsi256_ps(second))
        })
    }
    #[inline(always)]
    unsafe fn dot_bf16(self, _: __m256, _: *const u32, _: *const u8) -> __m256 {
        unreachable!("AVX2 has no bf16 dot product")
    }
}

/// Proof of AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The processor has them.
    pub(crate) unsafe fn new() -> Avx512 {
        Avx512(())
    }

    #[inline(always)]
    fn mask(self, n: usize) -> __mmask16 {
        ((1u32 << n) - 1) as __mmask16
    }
}

impl Simd for Avx512 {
    type F = __m512;
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        with_features!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        with_features!(_mm512_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        with_features!(_mm512_storeu_ps(p, v))
    }
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, n: usize) -> __m512 {
        with_features!(_mm512_maskz_loadu_ps(self.mask(n), p))
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, v: __m512, n: usize) {
        with_features!(_mm512_mask_storeu_ps(p, self.mask(n), v))
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        with_features!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        with_features!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        with_features!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        with_features!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        with_features!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        with_features!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        with_features!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn fnma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        with_features!(_mm512_fnmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        with_features!(_mm512_roundscale_ps::<
            { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
        >(a))
    }
    #[inline(always)]
    fn scale(self, a: __m512, n: __m512) -> __m512 {
        with_features!(_mm512_scalef_ps(a, n))
    }
    #[inline(always)]
    fn if_less(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        with_features!(_mm512_mask_mov_ps(
            no,
            _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b),
            yes
        ))
    }
    #[inline(always)]
    fn keep(self, a: __m512, from: usize, to: usize, fill: __m512) -> __m512 {
        let inside = self.mask(to) & !self.mask(from);
        with_features!(_mm512_mask_mov_ps(fill, inside, a))
    }
    #[inline(always)]
    fn partners<const STRIDE: usize>(self, a: __m512) -> __m512 {
        with_features!(match STRIDE {
            1 => _mm512_permute_ps::<0b10_11_00_01>(a),
            2 => _mm512_permute_ps::<0b01_00_11_10>(a),
            4 => _mm512_shuffle_f32x4::<0b10_11_00_01>(a, a),
            8 => _mm512_shuffle_f32x4::<0b01_00_11_10>(a, a),
            _ => unreachable!("a stride of {STRIDE}"),
        })
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        with_features!(_mm512_reduce_add_ps(a))
    }
    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        with_features!(_mm512_reduce_max_ps(a))
    }
    #[inline(always)]
    fn ints(self, a: __m512) -> __m512i {
        with_features!(_mm512_castps_si512(a))
    }
    #[inline(always)]
    fn floats(self, a: __m512i) -> __m512 {
        with_features!(_mm512_castsi512_ps(a))
    }
    #[inline(always)]
    fn to_float(self, a: __m512i) -> __m512 {
        with_features!(_mm512_cvtepi32_ps(a))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m512 {
        with_features!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u8) -> (__m512, __m512) {
        with_features!({
            let pairs = _mm512_loadu_si512(p.cast());
            let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            let first = _mm512_slli_epi32::<16>(pairs);
            (_mm512_castsi512_ps(first), _mm512_castsi512_ps(second))
        })
    }
    #[inline(always)]
    unsafe fn dot_bf16(self, acc: __m512, a: *const u32, w: *const u8) -> __m512 {
        with_features!({
            // Only the bits matter: a register of bf16 has the layout of a register of integers.
            let a: __m512bh = std::mem::transmute(_mm512_set1_epi32(*a as i32));
            let w: __m512bh = std::mem::transmute(_mm512_loadu_si512(w.cast()));
            _mm512_dpbf16_ps(acc, a, w)
        })
    }
}
