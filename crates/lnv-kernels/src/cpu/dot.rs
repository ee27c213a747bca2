//! A register for the kernels that are written for the bf16 dot product alone.
//!
//! Decision: [`Simd`](crate::cpu::simd::Simd) is what all instruction sets have in common. Attention in
//! bf16 wants more of AVX-512 (lane masks, permutations of words, powers of two by exponent), and no
//! other instruction set runs it, so it is written over this one token, whose methods inline as those
//! of `Simd` do.

use std::arch::x86_64::*;

use crate::isa::Isa;

/// 16 lanes of f32.
pub(crate) type F = __m512;
/// 16 lanes of 32 bits: integers, or pairs of bf16.
pub(crate) type I = __m512i;

/// Lanes of a register.
pub(crate) const LANES: usize = 16;

/// Calls intrinsics.
macro_rules! with_features {
    ($intrinsic:expr) => {
        // SAFETY: a value of `Dot` exists, so the processor has the instructions; what memory is
        // touched is in the contract of the calling method.
        unsafe { $intrinsic }
    };
}

/// Work for [`Dot::launch`]. `run` must be `#[inline(always)]`.
pub(crate) trait DotKernel {
    /// Does the work.
    fn run(self, dot: Dot);
}

/// Proof of AVX-512 with the bf16 dot product.
#[derive(Clone, Copy)]
pub(crate) struct Dot(());

impl Dot {
    /// Runs a kernel in a function that has the target features.
    ///
    /// # Panics
    /// The processor lacks them.
    pub(crate) fn launch<K: DotKernel>(kernel: K) {
        #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn inner<K: DotKernel>(dot: Dot, kernel: K) {
            kernel.run(dot);
        }
        assert!(
            Isa::Avx512Bf16.is_available(),
            "this processor lacks avx512bf16. This is a bug."
        );
        let dot = Dot(());
        with_features!(inner(dot, kernel));
    }

    #[inline(always)]
    pub(crate) fn splat(self, x: f32) -> F {
        with_features!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    pub(crate) fn splat_bits(self, x: u32) -> I {
        with_features!(_mm512_set1_epi32(x as i32))
    }
    /// # Safety
    /// 16 values can be read.
    #[inline(always)]
    pub(crate) unsafe fn load(self, p: *const f32) -> F {
        with_features!(_mm512_loadu_ps(p))
    }
    /// # Safety
    /// 16 values can be written.
    #[inline(always)]
    pub(crate) unsafe fn store(self, p: *mut f32, v: F) {
        with_features!(_mm512_storeu_ps(p, v))
    }
    /// The first `n` lanes (at most 16) from memory, zero in the others.
    ///
    /// # Safety
    /// `n` values can be read.
    #[inline(always)]
    pub(crate) unsafe fn load_part(self, p: *const f32, n: usize) -> F {
        with_features!(_mm512_maskz_loadu_ps(first(n), p))
    }
    /// The first `n` lanes (at most 16) to memory.
    ///
    /// # Safety
    /// `n` values can be written.
    #[inline(always)]
    pub(crate) unsafe fn store_part(self, p: *mut f32, v: F, n: usize) {
        with_features!(_mm512_mask_storeu_ps(p, first(n), v))
    }
    /// # Safety
    /// 16 values can be read.
    #[inline(always)]
    pub(crate) unsafe fn load_bits(self, p: *const u32) -> I {
        with_features!(_mm512_loadu_si512(p.cast()))
    }
    /// # Safety
    /// 16 values can be written.
    #[inline(always)]
    pub(crate) unsafe fn store_bits(self, p: *mut u32, v: I) {
        with_features!(_mm512_storeu_si512(p.cast(), v))
    }
    /// 16 8-bit integers as f32.
    ///
    /// # Safety
    /// 16 bytes can be read.
    #[inline(always)]
    pub(crate) unsafe fn load_codes(self, p: *const i8) -> F {
        with_features!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(
            p.cast()
        ))))
    }
    /// 8 values, each in two neighbouring lanes.
    ///
    /// # Safety
    /// 8 values can be read.
    #[inline(always)]
    pub(crate) unsafe fn load_twice(self, p: *const f32) -> F {
        with_features!({
            let values = _mm512_cvtepu32_epi64(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_or_si512(values, _mm512_slli_epi64::<32>(values)))
        })
    }
    /// Two values, alternating.
    ///
    /// # Safety
    /// Two values can be read.
    #[inline(always)]
    pub(crate) unsafe fn load_two(self, p: *const f32) -> F {
        with_features!(_mm512_castpd_ps(_mm512_set1_pd(
            p.cast::<f64>().read_unaligned()
        )))
    }
    #[inline(always)]
    pub(crate) fn add(self, a: F, b: F) -> F {
        with_features!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    pub(crate) fn sub(self, a: F, b: F) -> F {
        with_features!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    pub(crate) fn mul(self, a: F, b: F) -> F {
        with_features!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    pub(crate) fn div(self, a: F, b: F) -> F {
        with_features!(_mm512_div_ps(a, b))
    }
    /// `a * b + c`, rounded once.
    #[inline(always)]
    pub(crate) fn fma(self, a: F, b: F, c: F) -> F {
        with_features!(_mm512_fmadd_ps(a, b, c))
    }
    /// `a > b ? a : b`: a NaN in either gives `b`.
    #[inline(always)]
    pub(crate) fn max(self, a: F, b: F) -> F {
        with_features!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    pub(crate) fn floor(self, a: F) -> F {
        with_features!(_mm512_roundscale_ps::<
            { _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC },
        >(a))
    }
    /// `a - floor(a)`; zero for an infinite `a`.
    #[inline(always)]
    pub(crate) fn fraction(self, a: F) -> F {
        with_features!(_mm512_reduce_ps::<
            { _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC },
        >(a))
    }
    /// `a * 2^floor(n)` for n of any size.
    #[inline(always)]
    pub(crate) fn scale(self, a: F, n: F) -> F {
        with_features!(_mm512_scalef_ps(a, n))
    }
    /// `acc + a[1] * b[1] + a[0] * b[0]` for the pairs in each lane.
    #[inline(always)]
    pub(crate) fn dot(self, acc: F, a: I, b: I) -> F {
        with_features!({
            // Only the bits matter: a register of bf16 has the layout of a register of integers.
            let a = std::mem::transmute::<__m512i, __m512bh>(a);
            let b = std::mem::transmute::<__m512i, __m512bh>(b);
            _mm512_dpbf16_ps(acc, a, b)
        })
    }
    /// The first bf16 of the pair in each lane, and the second.
    #[inline(always)]
    pub(crate) fn halves(self, pairs: I) -> [F; 2] {
        with_features!([
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x1_0000))),
        ])
    }
    /// `first`, then `second`, as 32 bf16 side by side: nearest, ties to even.
    #[inline(always)]
    pub(crate) fn round(self, first: F, second: F) -> I {
        // Only the bits matter, as above.
        with_features!(std::mem::transmute::<__m512bh, __m512i>(
            _mm512_cvtne2ps_pbh(second, first)
        ))
    }
    /// The upper halves of each lane of `first` and `second` as a pair.
    #[inline(always)]
    pub(crate) fn pair_upper(self, first: I, second: I) -> I {
        with_features!(_mm512_mask_blend_epi16(
            0xaaaa_aaaa,
            _mm512_srli_epi32::<16>(first),
            second
        ))
    }
    /// The upper halves of `first`'s lanes, then of `second`'s, side by side.
    #[inline(always)]
    pub(crate) fn join_upper(self, first: I, second: I) -> I {
        with_features!({
            const ODD: [u16; 32] = {
                let mut words = [0; 32];
                let mut i = 0;
                while i < 32 {
                    words[i] = 2 * i as u16 + 1;
                    i += 1;
                }
                words
            };
            let odd = _mm512_loadu_si512(ODD.as_ptr().cast());
            _mm512_permutex2var_epi16(first, odd, second)
        })
    }
    /// Words 0 and 16, 1 and 17, ... as pairs.
    #[inline(always)]
    pub(crate) fn interleave(self, halves: I) -> I {
        with_features!({
            const ORDER: [u16; 32] = {
                let mut words = [0; 32];
                let mut i = 0;
                while i < 32 {
                    words[i] = i as u16 / 2 + 16 * (i as u16 % 2);
                    i += 1;
                }
                words
            };
            let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
            _mm512_permutexvar_epi16(order, halves)
        })
    }
    /// The larger of the 16-bit words, unsigned.
    #[inline(always)]
    pub(crate) fn max_words(self, a: I, b: I) -> I {
        with_features!(_mm512_max_epu16(a, b))
    }
    /// Whether a 16-bit word of `a` is above `limit`, unsigned.
    #[inline(always)]
    pub(crate) fn any_word_above(self, a: I, limit: u16) -> bool {
        with_features!(_mm512_cmpgt_epu16_mask(a, _mm512_set1_epi16(limit as i16)) != 0)
    }
    /// The lanes in which a 16-bit word of `a` is above `limit`, unsigned.
    #[inline(always)]
    pub(crate) fn words_above(self, a: I, limit: u16) -> u16 {
        with_features!({
            let above = _mm512_cmpgt_epu16_mask(a, _mm512_set1_epi16(limit as i16));
            _mm512_movepi32_mask(_mm512_maskz_set1_epi16(above | above << 1, -1))
        })
    }
    /// Lanes of `a` in the mask, zero in the others.
    #[inline(always)]
    pub(crate) fn keep_bits(self, mask: u16, a: I) -> I {
        with_features!(_mm512_maskz_mov_epi32(mask, a))
    }
    /// Lanes of `yes` in the mask, of `no` in the others.
    #[inline(always)]
    pub(crate) fn choose(self, mask: u16, yes: F, no: F) -> F {
        with_features!(_mm512_mask_mov_ps(no, mask, yes))
    }
    /// The lanes in which `from <= x < to`.
    #[inline(always)]
    pub(crate) fn within(self, x: u32, from: I, to: I) -> u16 {
        with_features!({
            let x = _mm512_set1_epi32(x as i32);
            _mm512_cmple_epu32_mask(from, x) & _mm512_cmplt_epu32_mask(x, to)
        })
    }
    /// The maximum of all lanes.
    #[inline(always)]
    pub(crate) fn largest(self, a: F) -> f32 {
        with_features!(_mm512_reduce_max_ps(a))
    }
    /// Fetches a line into the second-level cache. Touches nothing, so any address will do.
    #[inline(always)]
    pub(crate) fn prefetch(self, p: *const u32) {
        with_features!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }
    /// Fetches a line that will be written. Touches nothing, so any address will do.
    #[inline(always)]
    pub(crate) fn prefetch_to_write(self, p: *const u32) {
        with_features!(_mm_prefetch::<_MM_HINT_ET0>(p.cast()))
    }
    /// The lanes in which `a > b`.
    #[inline(always)]
    pub(crate) fn above(self, a: F, b: F) -> u16 {
        with_features!(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b))
    }
    #[inline(always)]
    pub(crate) fn bits(self, a: F) -> I {
        with_features!(_mm512_castps_si512(a))
    }
    #[inline(always)]
    pub(crate) fn floats(self, a: I) -> F {
        with_features!(_mm512_castsi512_ps(a))
    }

    /// Rows to columns, 16 by 16.
    #[inline(always)]
    pub(crate) fn transpose(self, r: &mut [I; LANES]) {
        with_features!({
            // Pairs of rows, then fours, then the quarters of the registers.
            let mut t = *r;
            for i in (0..LANES).step_by(2) {
                t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
                t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
            }
            for i in (0..LANES).step_by(4) {
                r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
                r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
                r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
                r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
            }
            for i in 0..4 {
                t[i] = _mm512_shuffle_i32x4::<0x88>(r[i], r[i + 4]);
                t[i + 4] = _mm512_shuffle_i32x4::<0xdd>(r[i], r[i + 4]);
                t[i + 8] = _mm512_shuffle_i32x4::<0x88>(r[i + 8], r[i + 12]);
                t[i + 12] = _mm512_shuffle_i32x4::<0xdd>(r[i + 8], r[i + 12]);
            }
            for i in 0..4 {
                r[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[i + 8]);
                r[i + 4] = _mm512_shuffle_i32x4::<0x88>(t[i + 4], t[i + 12]);
                r[i + 8] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[i + 8]);
                r[i + 12] = _mm512_shuffle_i32x4::<0xdd>(t[i + 4], t[i + 12]);
            }
        });
    }
}

/// The mask of the first `n` lanes.
#[inline(always)]
fn first(n: usize) -> u16 {
    ((1u32 << n) - 1) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Turn<'a>(&'a mut [u32]);

    impl DotKernel for Turn<'_> {
        #[inline(always)]
        fn run(self, dot: Dot) {
            let at = |i: usize| &self.0[i * LANES..][..LANES];
            // SAFETY: 16 values each.
            let mut rows = std::array::from_fn(|i| unsafe { dot.load_bits(at(i).as_ptr()) });
            dot.transpose(&mut rows);
            for (row, out) in rows.iter().zip(self.0.chunks_exact_mut(LANES)) {
                // SAFETY: as above.
                unsafe { dot.store_bits(out.as_mut_ptr(), *row) };
            }
        }
    }

    #[test]
    fn rows_become_columns() {
        if !Isa::Avx512Bf16.is_available() {
            return;
        }
        let mut values: Vec<u32> = (0..256).collect();
        Dot::launch(Turn(&mut values));
        for (i, value) in values.iter().enumerate() {
            assert_eq!(*value as usize, i % LANES * LANES + i / LANES);
        }
    }
}
