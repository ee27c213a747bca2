//! Values out of a table of 16, by codes of 4 bits in a register.
//!
//! Decision: a permutation of a register is the look-up, and looks at no bits but a code's, so that a
//! shift is all that comes before it: with AVX-512 of 16 f32 by lanes of 32 bits, and of 16 bf16, held
//! twice, by lanes of 16 bits. AVX2 permutes 8 f32, twice, and takes one of both by the code's highest
//! bit.

use std::arch::x86_64::*;

use crate::cpu::int::Ints;
use crate::cpu::simd::{Avx2, Avx512};

/// Calls intrinsics of the token's instruction set.
macro_rules! with_features {
    ($intrinsic:expr) => {
        // SAFETY: a value of the token's type exists, so the processor has the instructions; what
        // memory is touched is in the contract of the calling method.
        unsafe { $intrinsic }
    };
}

/// Look-ups of a register; registers of f32 go by their bits.
pub(crate) trait Lookup: Ints {
    /// 16 f32.
    type Table: Copy;

    /// Lanes to the right, zeros coming in.
    fn right(self, a: Self::I, bits: i32) -> Self::I;
    fn table(self, values: &'static [f32; 16]) -> Self::Table;
    /// In each lane, the value of the code at bit `AT`.
    fn look<const AT: u32>(self, table: Self::Table, codes: Self::I) -> Self::I;
    /// In each half of a lane, the bf16 value of the code in its lowest bits. The table holds the
    /// values twice.
    ///
    /// # Safety
    /// The token is [`Avx512`].
    unsafe fn look_pairs(self, table: Self::I, codes: Self::I) -> Self::I;
    /// In each lane of f32, `acc` plus the products of the pairs of bf16 in `w` and `a`.
    ///
    /// # Safety
    /// The processor has the bf16 dot product, and the token is [`Avx512`].
    unsafe fn dot_pairs(self, acc: Self::I, w: Self::I, a: u32) -> Self::I;
}

impl Lookup for Avx2 {
    type Table = [__m256; 2];

    #[inline(always)]
    fn right(self, a: __m256i, bits: i32) -> __m256i {
        with_features!(_mm256_srl_epi32(a, _mm_cvtsi32_si128(bits)))
    }
    #[inline(always)]
    fn table(self, values: &'static [f32; 16]) -> [__m256; 2] {
        with_features!([
            _mm256_loadu_ps(values.as_ptr()),
            _mm256_loadu_ps(values.as_ptr().add(8)),
        ])
    }
    #[inline(always)]
    fn look<const AT: u32>(self, [low, high]: [__m256; 2], codes: __m256i) -> __m256i {
        with_features!({
            let place = _mm256_srl_epi32(codes, _mm_cvtsi32_si128(AT as i32));
            // The highest bit of the code to that of the lane, which is what the choice goes by.
            let upper = _mm256_sll_epi32(codes, _mm_cvtsi32_si128(28 - AT as i32));
            let low = _mm256_permutevar8x32_ps(low, place);
            let high = _mm256_permutevar8x32_ps(high, place);
            _mm256_castps_si256(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(upper)))
        })
    }
    #[inline(always)]
    unsafe fn look_pairs(self, _: __m256i, _: __m256i) -> __m256i {
        unreachable!("AVX2 has no permutation of 16-bit lanes")
    }
    #[inline(always)]
    unsafe fn dot_pairs(self, _: __m256i, _: __m256i, _: u32) -> __m256i {
        unreachable!("AVX2 has no bf16 dot product")
    }
}

impl Lookup for Avx512 {
    type Table = __m512i;

    #[inline(always)]
    fn right(self, a: __m512i, bits: i32) -> __m512i {
        with_features!(_mm512_srl_epi32(a, _mm_cvtsi32_si128(bits)))
    }
    #[inline(always)]
    fn table(self, values: &'static [f32; 16]) -> __m512i {
        with_features!(_mm512_loadu_si512(values.as_ptr().cast()))
    }
    #[inline(always)]
    fn look<const AT: u32>(self, table: __m512i, codes: __m512i) -> __m512i {
        with_features!(_mm512_permutexvar_epi32(
            _mm512_srli_epi32::<AT>(codes),
            table
        ))
    }
    #[inline(always)]
    unsafe fn look_pairs(self, table: __m512i, codes: __m512i) -> __m512i {
        with_features!(_mm512_permutexvar_epi16(codes, table))
    }
    #[inline(always)]
    unsafe fn dot_pairs(self, acc: __m512i, w: __m512i, a: u32) -> __m512i {
        with_features!({
            // Only the bits matter: a register of bf16 has the layout of a register of integers.
            let a = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a as i32));
            let w = std::mem::transmute::<__m512i, __m512bh>(w);
            _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(acc), w, a))
        })
    }
}
