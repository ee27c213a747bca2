//! The loops that probes time: the multipliers alone, and reading alone.
//!
//! Decision: arithmetic is measured in registers, in as many independent sums as a product's largest
//! tile has, so that neither loads nor latency can be the limit. Reading is measured in several
//! patterns, of which the best counts: one stream a thread is the fastest where the memory is near,
//! several where a core waits for each line so long that it can't ask for enough of them in one.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
use std::marker::PhantomData;

use crate::cpu::amx;
use crate::cpu::launch::{Kernel, launch, launch_avx_vnni, launch_bf16_dot, launch_vnni};
use crate::cpu::simd::Simd;
use crate::isa::Isa;

/// Which multiplier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Multiplier {
    /// Of f32, one product in a lane.
    Fma,
    /// The bf16 dot product, two products in a lane.
    DotBf16,
    /// The byte dot product, four products in a lane.
    DotBytes,
    /// Of pairs of 16-bit integers, to which bytes are widened, and the addition that follows.
    Pairs,
    /// Tile registers of bytes.
    TileBytes,
    /// Tile registers of bf16.
    TileBf16,
}

/// Bytes of a register's lanes, of the widest.
const REGISTER: usize = 64;

/// Values that mean something to every multiplier, and add up slowly.
#[repr(align(64))]
struct Factors([u8; 2 * REGISTER]);

/// Runs the multiplier over and over; returns how many operations that were (a multiplication and an
/// addition are two), and something that depends on them.
///
/// # Panics
/// The processor lacks the instruction set.
pub(crate) fn multiply(isa: Isa, multiplier: Multiplier, times: usize) -> (usize, f32) {
    let factors = std::hint::black_box(Factors([0x3c; 2 * REGISTER]));
    let mut done = (0, 0.0);
    match multiplier {
        Multiplier::Fma => launch(isa, Chains::<Fma>::new(&factors, times, &mut done)),
        Multiplier::DotBf16 => launch_bf16_dot(Chains::<DotBf16>::new(&factors, times, &mut done)),
        Multiplier::DotBytes if isa == Isa::AvxVnni => {
            launch_avx_vnni(Chains::<DotBytes>::new(&factors, times, &mut done));
        }
        Multiplier::DotBytes => launch_vnni(Chains::<DotBytes>::new(&factors, times, &mut done)),
        Multiplier::Pairs => launch(isa, Chains::<Pairs>::new(&factors, times, &mut done)),
        Multiplier::TileBytes => done.0 = amx::spin::<amx::SignedUnsigned>(times),
        Multiplier::TileBf16 => done.0 = amx::spin::<amx::Bf16>(times),
    }
    done
}

/// One multiplication of registers.
trait Multiply {
    /// Products in a lane.
    const PRODUCTS: usize;

    /// # Safety
    /// Only inside the multiplier's launch.
    unsafe fn step<S: Simd>(s: S, sum: S::F, factors: &Loaded<'_, S>) -> S::F;
}

/// The factors in registers: loaded once, for else a compiler may load them for each multiplication.
struct Loaded<'a, S: Simd> {
    a: S::I,
    w: S::I,
    from: &'a Factors,
}

struct Fma;

impl Multiply for Fma {
    const PRODUCTS: usize = 1;

    #[inline(always)]
    unsafe fn step<S: Simd>(s: S, sum: S::F, factors: &Loaded<'_, S>) -> S::F {
        s.fma(s.floats(factors.a), s.floats(factors.w), sum)
    }
}

struct DotBf16;

impl Multiply for DotBf16 {
    const PRODUCTS: usize = 2;

    #[inline(always)]
    unsafe fn step<S: Simd>(s: S, sum: S::F, factors: &Loaded<'_, S>) -> S::F {
        let (a, w) = factors.from.0.split_at(REGISTER);
        // SAFETY: the caller's contract; both halves have the bytes of the widest register.
        unsafe { s.dot_bf16(sum, a.as_ptr().cast(), w.as_ptr()) }
    }
}

struct DotBytes;

impl Multiply for DotBytes {
    const PRODUCTS: usize = 4;

    #[inline(always)]
    unsafe fn step<S: Simd>(s: S, sum: S::F, factors: &Loaded<'_, S>) -> S::F {
        // SAFETY: the caller's contract.
        s.floats(unsafe { s.dot_bytes(s.ints(sum), factors.w, factors.a) })
    }
}

struct Pairs;

impl Multiply for Pairs {
    const PRODUCTS: usize = 2;

    #[inline(always)]
    unsafe fn step<S: Simd>(s: S, sum: S::F, factors: &Loaded<'_, S>) -> S::F {
        // What is multiplied is the sum: else the compiler would multiply once and add over and over.
        s.floats(s.add_i(factors.a, s.multiply_pairs(s.ints(sum), factors.w)))
    }
}

/// Independent sums, to each of which the multiplier adds in turn.
struct Chains<'a, M> {
    factors: &'a Factors,
    times: usize,
    done: &'a mut (usize, f32),
    multiplier: PhantomData<M>,
}

impl<'a, M> Chains<'a, M> {
    fn new(factors: &'a Factors, times: usize, done: &'a mut (usize, f32)) -> Self {
        Self {
            factors,
            times,
            done,
            multiplier: PhantomData,
        }
    }
}

impl<M: Multiply> Kernel for Chains<'_, M> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::LANES == 16 {
            self.sums::<S, 24>(s);
        } else {
            self.sums::<S, 12>(s);
        }
    }
}

impl<M: Multiply> Chains<'_, M> {
    #[inline(always)]
    fn sums<S: Simd, const SUMS: usize>(self, s: S) {
        let (a, w) = self.factors.0.split_at(REGISTER);
        // SAFETY: both halves have the bytes of the widest register.
        let (a, w) = unsafe { (s.load_i(a.as_ptr()), s.load_i(w.as_ptr())) };
        let from = self.factors;
        let loaded = Loaded { a, w, from };
        let mut sums = [s.splat(0.0); SUMS];
        for _ in 0..self.times {
            for sum in &mut sums {
                // SAFETY: `multiply` launches.
                *sum = unsafe { M::step(s, *sum, &loaded) };
            }
        }
        let mut all = s.splat(0.0);
        for sum in sums {
            all = s.add(all, sum);
        }
        let operations = 2 * self.times * SUMS * S::LANES * M::PRODUCTS;
        *self.done = (operations, s.sum(all));
    }
}

/// Bytes that [`read`] takes from a stream before it goes to the next.
const STRIDE: usize = 256;

/// Reads everything, as so many streams side by side, each fetched `ahead` bytes before it is read if
/// that is not 0; returns something that depends on all of it. What is beyond a multiple of
/// `streams * STRIDE` bytes is left out.
pub(crate) fn read(isa: Isa, data: &[u64], streams: usize, ahead: usize) -> i32 {
    let mut sum = 0;
    let read = Read {
        data,
        streams,
        ahead,
        sum: &mut sum,
    };
    launch(isa, read);
    sum
}

struct Read<'a> {
    data: &'a [u64],
    streams: usize,
    ahead: usize,
    sum: &'a mut i32,
}

impl Kernel for Read<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let stream = size_of_val(self.data) / self.streams / STRIDE * STRIDE;
        let start = self.data.as_ptr().cast::<u8>();
        let mut sums = [s.splat_i(0); STRIDE / 32];
        for at in (0..stream).step_by(STRIDE) {
            for number in 0..self.streams {
                let from = start.wrapping_add(number * stream + at);
                if self.ahead > 0 {
                    for line in (0..STRIDE).step_by(64) {
                        let line = from.wrapping_add(self.ahead + line);
                        // SAFETY: a prefetch of any address is harmless.
                        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
                    }
                }
                for (index, sum) in sums.iter_mut().enumerate().take(STRIDE / 4 / S::LANES) {
                    // SAFETY: STRIDE bytes from `from` on are inside the stream, and so inside data.
                    *sum = s.add_i(*sum, unsafe { s.load_i(from.add(4 * S::LANES * index)) });
                }
            }
        }
        let mut all = s.splat_i(0);
        for sum in sums {
            all = s.add_i(all, sum);
        }
        *self.sum = s.sum_i(all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fast() -> impl Iterator<Item = Isa> {
        Isa::available()
            .into_iter()
            .filter(|isa| *isa != Isa::Scalar)
    }

    /// 0x3c3c3c3c as f32, as two bf16 and as four bytes: sums of squares that one can reckon.
    #[test]
    fn multipliers_multiply_as_often_as_they_say() {
        let bf16 = f64::from(f32::from_bits(0x3c3c_0000));
        for isa in fast() {
            let (operations, sum) = multiply(isa, Multiplier::Fma, 100);
            let square = f64::from(f32::from_bits(0x3c3c_3c3c)).powi(2);
            let expected = operations as f64 / 2.0 * square;
            assert!((f64::from(sum) / expected - 1.0).abs() < 1e-4, "{isa}");
        }
        if Isa::Avx2.is_available() {
            let (operations, _) = multiply(Isa::Avx2, Multiplier::Pairs, 100);
            assert_eq!(operations, 2 * 100 * 12 * 8 * 2);
        }
        if Isa::AvxVnni.is_available() {
            let (operations, _) = multiply(Isa::AvxVnni, Multiplier::DotBytes, 100);
            assert_eq!(operations, 2 * 100 * 12 * 8 * 4);
        }
        if Isa::Avx512Bf16.is_available() {
            let (operations, sum) = multiply(Isa::Avx512Bf16, Multiplier::DotBf16, 100);
            let expected = operations as f64 / 2.0 * bf16 * bf16;
            assert!((f64::from(sum) / expected - 1.0).abs() < 1e-4);
        }
        if Isa::Avx512Vnni.is_available() {
            let (operations, _) = multiply(Isa::Avx512Vnni, Multiplier::DotBytes, 100);
            assert_eq!(operations, 2 * 100 * 24 * 16 * 4);
        }
        if Isa::Amx.is_available() {
            let of = |multiplier| multiply(Isa::Amx, multiplier, 100).0;
            assert_eq!(of(Multiplier::TileBytes), 2 * 400 * 16 * 16 * 64);
            assert_eq!(of(Multiplier::TileBf16), 2 * 400 * 16 * 16 * 32);
        }
    }

    #[test]
    fn every_pattern_reads_everything_once() {
        let data: Vec<u64> = (0..4096).collect();
        let expected: i32 = (0..4096).sum();
        for isa in fast() {
            for (streams, ahead) in [(1, 0), (1, 4096), (2, 2048), (4, 0)] {
                assert_eq!(
                    read(isa, &data, streams, ahead),
                    expected,
                    "{isa} {streams}"
                );
            }
        }
    }
}
