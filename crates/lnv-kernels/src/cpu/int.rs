//! A register of 32-bit integers, and the dot product of bytes.
//!
//! Decision: quantised weights are unsigned bytes in a register, activations signed bytes in memory,
//! four to a lane, because that is what the byte dot product multiplies, that of AVX-512 ([`Vnni`]) and that of
//! AVX2 ([`AvxVnni`]). Processors without it widen to 16 bits ([`Widened`]): products of unsigned and signed bytes
//! in 16 bits (`maddubs`) saturate at sums that occur. Those of signed bytes do not, once the sign has moved from one factor
//! to the other; with one row, where nothing is shared between rows, that takes fewer operations
//! ([`Signed`]). All are exact, so sums are equal on all processors.

use std::arch::x86_64::*;

use crate::cpu::launch::{Kernel, launch, launch_avx_vnni, launch_avx2, launch_vnni};
use crate::cpu::simd::{Avx2, Avx512, Simd};
use crate::isa::Isa;

/// Calls intrinsics of the token's instruction set.
macro_rules! with_features {
    ($intrinsic:expr) => {
        // SAFETY: a value of the token's type exists, so the processor has the instructions; what
        // memory is touched is in the contract of the calling method.
        unsafe { $intrinsic }
    };
}

/// The integer side of a [`Simd`] token: a register of as many 32-bit integers as it has floats.
pub(crate) trait Ints: Copy {
    /// The register.
    type I: Copy;

    fn splat_i(self, x: i32) -> Self::I;
    /// # Safety
    /// A register's bytes can be read from `p`.
    unsafe fn load_i(self, p: *const u8) -> Self::I;
    /// A pair of signed bytes for each lane: the pairs' first, and their second.
    ///
    /// # Safety
    /// Two bytes for each lane can be read from `p`.
    unsafe fn load_byte_pairs(self, p: *const u8) -> (Self::I, Self::I);
    /// The lowest byte of each lane, side by side, to `p`.
    ///
    /// # Safety
    /// A byte for each lane can be written to `p`.
    unsafe fn store_low_bytes(self, p: *mut u8, a: Self::I);
    /// The sum of all lanes; wraps.
    fn sum_i(self, a: Self::I) -> i32;
    /// The larger of two signed integers.
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// The largest lane.
    fn largest_i(self, a: Self::I) -> i32;
    /// Sums that wrap.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    /// Lanes to the left.
    fn left(self, a: Self::I, bits: i32) -> Self::I;
    /// Lanes of 16 bits to the left.
    fn left16<const BITS: i32>(self, a: Self::I) -> Self::I;
    /// Lanes of 16 bits to the right, zeros coming in.
    fn right16<const BITS: u32>(self, a: Self::I) -> Self::I;
    /// Lanes of 16 bits to the right, the sign coming in.
    fn signed_right16<const BITS: u32>(self, a: Self::I) -> Self::I;
    /// In each byte, the byte of `table` that the byte of `index` names: its lowest four bits, the
    /// others being zero.
    fn look_up(self, table: &[u8; 16], index: Self::I) -> Self::I;
    /// In each lane, the sum of the products of its two signed 16-bit halves.
    fn multiply_pairs(self, a: Self::I, b: Self::I) -> Self::I;
    /// In each lane, the sum of the products of its four signed bytes, of which none is -128.
    ///
    /// # Safety
    /// The token is [`Avx2`].
    unsafe fn multiply_fours(self, w: Self::I, a: Self::I) -> Self::I;
    /// In each lane, `acc` plus the sum of the products of w's four unsigned and a's four signed
    /// bytes.
    ///
    /// # Safety
    /// The processor has AVX-512 VNNI and the token is [`Avx512`], or AVX-VNNI and [`Avx2`].
    unsafe fn dot_bytes(self, acc: Self::I, w: Self::I, a: Self::I) -> Self::I;
}

impl Ints for Avx2 {
    type I = __m256i;

    #[inline(always)]
    fn splat_i(self, x: i32) -> __m256i {
        with_features!(_mm256_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const u8) -> __m256i {
        with_features!(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_byte_pairs(self, p: *const u8) -> (__m256i, __m256i) {
        with_features!({
            let pairs = _mm256_cvtepi16_epi32(_mm_loadu_si128(p.cast()));
            let first = _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(pairs));
            (first, _mm256_srai_epi32::<8>(pairs))
        })
    }
    #[inline(always)]
    unsafe fn store_low_bytes(self, p: *mut u8, a: __m256i) {
        with_features!({
            let lowest = _mm256_set1_epi32(0x0c08_0400);
            let fours = _mm256_shuffle_epi8(a, lowest);
            p.cast::<i32>()
                .write_unaligned(_mm256_extract_epi32::<0>(fours));
            p.cast::<i32>()
                .add(1)
                .write_unaligned(_mm256_extract_epi32::<4>(fours));
        });
    }
    #[inline(always)]
    fn sum_i(self, a: __m256i) -> i32 {
        with_features!({
            let four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
            _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
        })
    }
    #[inline(always)]
    fn max_i(self, a: __m256i, b: __m256i) -> __m256i {
        with_features!(_mm256_max_epi32(a, b))
    }
    #[inline(always)]
    fn largest_i(self, a: __m256i) -> i32 {
        with_features!({
            let four = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
            _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32::<1>(two)))
        })
    }
    #[inline(always)]
    fn add_i(self, a: __m256i, b: __m256i) -> __m256i {
        with_features!(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn and(self, a: __m256i, b: __m256i) -> __m256i {
        with_features!(_mm256_and_si256(a, b))
    }
    #[inline(always)]
    fn left(self, a: __m256i, bits: i32) -> __m256i {
        with_features!(_mm256_sll_epi32(a, _mm_cvtsi32_si128(bits)))
    }
    #[inline(always)]
    fn left16<const BITS: i32>(self, a: __m256i) -> __m256i {
        with_features!(_mm256_sll_epi16(a, _mm_cvtsi32_si128(BITS)))
    }
    #[inline(always)]
    fn right16<const BITS: u32>(self, a: __m256i) -> __m256i {
        with_features!(_mm256_srl_epi16(a, _mm_cvtsi32_si128(BITS as i32)))
    }
    #[inline(always)]
    fn signed_right16<const BITS: u32>(self, a: __m256i) -> __m256i {
        with_features!(_mm256_sra_epi16(a, _mm_cvtsi32_si128(BITS as i32)))
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], index: __m256i) -> __m256i {
        with_features!({
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, index)
        })
    }
    #[inline(always)]
    fn multiply_pairs(self, a: __m256i, b: __m256i) -> __m256i {
        with_features!(_mm256_madd_epi16(a, b))
    }
    #[inline(always)]
    unsafe fn multiply_fours(self, w: __m256i, a: __m256i) -> __m256i {
        with_features!({
            // Two products are 2 * 127 * 127 at most, which 16 bits hold.
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a));
            _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
        })
    }
    #[inline(always)]
    unsafe fn dot_bytes(self, acc: __m256i, w: __m256i, a: __m256i) -> __m256i {
        with_features!(_mm256_dpbusd_avx_epi32(acc, w, a))
    }
}

impl Ints for Avx512 {
    type I = __m512i;

    #[inline(always)]
    fn splat_i(self, x: i32) -> __m512i {
        with_features!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const u8) -> __m512i {
        with_features!(_mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_byte_pairs(self, p: *const u8) -> (__m512i, __m512i) {
        with_features!({
            let pairs = _mm512_cvtepi16_epi32(_mm256_loadu_si256(p.cast()));
            let first = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(pairs));
            (first, _mm512_srai_epi32::<8>(pairs))
        })
    }
    #[inline(always)]
    unsafe fn store_low_bytes(self, p: *mut u8, a: __m512i) {
        with_features!(_mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(a)));
    }
    #[inline(always)]
    fn sum_i(self, a: __m512i) -> i32 {
        with_features!(_mm512_reduce_add_epi32(a))
    }
    #[inline(always)]
    fn max_i(self, a: __m512i, b: __m512i) -> __m512i {
        with_features!(_mm512_max_epi32(a, b))
    }
    #[inline(always)]
    fn largest_i(self, a: __m512i) -> i32 {
        with_features!(_mm512_reduce_max_epi32(a))
    }
    #[inline(always)]
    fn add_i(self, a: __m512i, b: __m512i) -> __m512i {
        with_features!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        with_features!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn left(self, a: __m512i, bits: i32) -> __m512i {
        with_features!(_mm512_sll_epi32(a, _mm_cvtsi32_si128(bits)))
    }
    #[inline(always)]
    fn left16<const BITS: i32>(self, a: __m512i) -> __m512i {
        with_features!(_mm512_sll_epi16(a, _mm_cvtsi32_si128(BITS)))
    }
    #[inline(always)]
    fn right16<const BITS: u32>(self, a: __m512i) -> __m512i {
        with_features!(_mm512_srli_epi16::<BITS>(a))
    }
    #[inline(always)]
    fn signed_right16<const BITS: u32>(self, a: __m512i) -> __m512i {
        with_features!(_mm512_srai_epi16::<BITS>(a))
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], index: __m512i) -> __m512i {
        with_features!({
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, index)
        })
    }
    #[inline(always)]
    fn multiply_pairs(self, a: __m512i, b: __m512i) -> __m512i {
        with_features!(_mm512_madd_epi16(a, b))
    }
    #[inline(always)]
    unsafe fn multiply_fours(self, _: __m512i, _: __m512i) -> __m512i {
        unreachable!("AVX-512 has no instruction that moves signs")
    }
    #[inline(always)]
    unsafe fn dot_bytes(self, acc: __m512i, w: __m512i, a: __m512i) -> __m512i {
        with_features!(_mm512_dpbusd_epi32(acc, w, a))
    }
}

/// One way to multiply bytes.
///
/// Four values of k of a register of columns are multiplied in `PARTS` goes, each with an element of 32 bits
/// of a row's activations.
pub(crate) trait Dot: Copy + Send + Sync + 'static {
    /// Elements of a row in four values of k.
    const PARTS: usize;
    /// Whether weights are multiplied as signed bytes.
    const SIGNED: bool = false;

    /// Runs a kernel that multiplies this way.
    fn launch<K: Kernel>(isa: Isa, kernel: K);

    /// What part `part` of four bytes a lane is multiplied as; of one part, as it is.
    #[inline(always)]
    fn columns<S: Simd>(_: S, w: S::I, _part: usize) -> S::I {
        w
    }

    /// Part `part` of a row's elements, of four signed bytes a lane; of one part, as it is.
    #[inline(always)]
    fn elements<S: Simd>(_: S, a: S::I, _part: usize) -> S::I {
        a
    }

    /// In each lane, `acc` plus the products of a part's columns and an element. Sums wrap.
    ///
    /// # Safety
    /// Only inside [`Dot::launch`].
    unsafe fn dot<S: Simd>(s: S, acc: S::I, columns: S::I, element: u32) -> S::I;
}

/// AVX-512 VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Vnni;

impl Dot for Vnni {
    const PARTS: usize = 1;

    fn launch<K: Kernel>(_: Isa, kernel: K) {
        launch_vnni(kernel);
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, acc: S::I, columns: S::I, element: u32) -> S::I {
        // SAFETY: launch_vnni asked the processor, and runs kernels with the token Avx512.
        unsafe { s.dot_bytes(acc, columns, s.splat_i(element as i32)) }
    }
}

/// AVX-VNNI: the same in registers of 8.
#[derive(Clone, Copy)]
pub(crate) struct AvxVnni;

impl Dot for AvxVnni {
    const PARTS: usize = 1;

    fn launch<K: Kernel>(_: Isa, kernel: K) {
        launch_avx_vnni(kernel);
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, acc: S::I, columns: S::I, element: u32) -> S::I {
        // SAFETY: launch_avx_vnni asked the processor, and runs kernels with the token Avx2.
        unsafe { s.dot_bytes(acc, columns, s.splat_i(element as i32)) }
    }
}

/// Products of 16-bit integers: of the first and third byte, then of the second and fourth. Activations are
/// widened once, when they are packed.
#[derive(Clone, Copy)]
pub(crate) struct Widened;

impl Dot for Widened {
    const PARTS: usize = 2;

    fn launch<K: Kernel>(isa: Isa, kernel: K) {
        launch(isa, kernel);
    }

    #[inline(always)]
    fn columns<S: Simd>(s: S, w: S::I, part: usize) -> S::I {
        match part {
            0 => s.and(w, s.splat_i(0x00ff_00ff)),
            _ => s.right16::<8>(w),
        }
    }

    #[inline(always)]
    fn elements<S: Simd>(s: S, a: S::I, part: usize) -> S::I {
        match part {
            0 => s.signed_right16::<8>(s.left16::<8>(a)),
            _ => s.signed_right16::<8>(a),
        }
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, acc: S::I, columns: S::I, element: u32) -> S::I {
        s.add_i(acc, s.multiply_pairs(columns, s.splat_i(element as i32)))
    }
}

/// Products of signed bytes with AVX2.
#[derive(Clone, Copy)]
pub(crate) struct Signed;

impl Dot for Signed {
    const PARTS: usize = 1;
    const SIGNED: bool = true;

    fn launch<K: Kernel>(_: Isa, kernel: K) {
        launch_avx2(kernel);
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, acc: S::I, columns: S::I, element: u32) -> S::I {
        // SAFETY: launch runs kernels with the token Avx2.
        s.add_i(acc, unsafe {
            s.multiply_fours(columns, s.splat_i(element as i32))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::bnb::Int8;
    use crate::cpu::formats::Format;
    use crate::cpu::gemm::product;
    use crate::cpu::quantised::{Q4, Q8};
    use crate::ops::{Epilogue, Ops};
    use crate::weight::{self, WeightData, WeightDtype, WeightPart};

    /// [`AvxVnni`] out of AVX2's instructions, so that what is around the instruction is tested without it too.
    #[derive(Clone, Copy)]
    struct Emulated;

    impl Dot for Emulated {
        const PARTS: usize = 1;

        fn launch<K: Kernel>(_: Isa, kernel: K) {
            launch_avx2(kernel);
        }

        unsafe fn dot<S: Simd>(s: S, acc: S::I, columns: S::I, element: u32) -> S::I {
            let element = s.splat_i(element as i32);
            (0..Widened::PARTS).fold(acc, |acc, part| {
                let columns = Widened::columns(s, columns, part);
                let element = Widened::elements(s, element, part);
                s.add_i(acc, s.multiply_pairs(columns, element))
            })
        }
    }

    /// The bits of a product of so many rows, by a format and by what AVX2 multiplies these weights with. The latter
    /// is named too: by way of [`Ops`], all kernels of all formats would be compiled into the unit tests.
    fn products<F: Format, Avx2: Format>(
        dtype: WeightDtype,
        (rows, n, k): (usize, usize, usize),
    ) -> [Vec<u32>; 2] {
        let value = |i: usize| ((i * 7919 + i / 13) % 1999) as f32 / 999.5 - 1.0;
        let values: Vec<f32> = (0..n * k).map(value).collect();
        let data = WeightData::F32(bytemuck::cast_slice(&values));
        let ops = Ops::with_isa(Isa::Avx2);
        let w = ops
            .pack(&[WeightPart::new(data, n)], k, dtype)
            .expect("fits");
        // Some columns are outliers of LLM.int8().
        let x = |i: usize| value(i * 31 + 7) * if i % k % 50 == 3 { 9.0 } else { 1.5 };
        let x = ops.upload(rows, k, &(0..rows * k).map(x).collect::<Vec<_>>());
        let (mut own, mut expected) = (ops.buffer(rows, n), ops.buffer(rows, n));
        let epilogue = || (None, Epilogue::Store(None));
        product::<F>(Isa::AvxVnni, &x, &w, epilogue(), &mut own);
        product::<Avx2>(Isa::Avx2, &x, &w, epilogue(), &mut expected);
        [own, expected].map(|out| ops.download(&out).iter().map(|v| v.to_bits()).collect())
    }

    #[test]
    fn registers_of_8_with_the_byte_dot_product_have_the_bits_of_avx2() {
        if !Isa::Avx2.is_available() {
            return;
        }
        let rows = (1..=13).chain([29, 40]);
        for shape in rows.flat_map(|rows| [(rows, 33, 77), (rows, 96, 576), (rows, 5, 1)]) {
            let [own, expected] = products::<Q8<Emulated>, Q8<Widened>>(WeightDtype::Q8, shape);
            assert_eq!(own, expected, "q8 {shape:?}");
            let [own, expected] = products::<Q4<Emulated>, Q4<Widened>>(WeightDtype::Q4, shape);
            assert_eq!(own, expected, "q4 {shape:?}");
            let int8 = WeightDtype::Int8(weight::Int8::new(6.0));
            let [own, expected] = products::<Int8<Emulated>, Int8<Widened>>(int8, shape);
            assert_eq!(own, expected, "int8 {shape:?}");
        }
    }
}
