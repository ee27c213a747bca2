//! What the machine can do at best: the denominators of every speed that is quoted.
//!
//! Decision: measured by a loop in which nothing but arithmetic (or nothing but reading) costs time,
//! on all threads at once, best of several, because a shared machine only ever disturbs downwards.
//! Where there are two ways to multiply, the faster is the peak, whichever the kernels take: the bf16
//! dot product has twice the rate of the f32 multiplier on one maker's processors, half on another's.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::buffer::Aligned;
use crate::isa::Isa;
use crate::ops::Ops;
use crate::weight::WeightDtype;

/// How long a way to multiply, or a pattern of reading, is tried, over and over: longer than another
/// program keeps a core.
const DURATION: Duration = Duration::from_millis(500);

/// The arithmetic peak of all threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peak {
    /// 10⁹ operations a second; a multiplication and an addition are two.
    pub gflops: f64,
    /// What multiplies: the instruction's name.
    pub instruction: &'static str,
}

/// The limits of the device of `ops` for weights of this format: its arithmetic peak, and 10⁹ bytes a
/// second that it reads.
pub fn limits(ops: &Ops, dtype: WeightDtype) -> (Peak, f64) {
    #[cfg(feature = "cuda")]
    if let Some(cuda) = ops.cuda() {
        return crate::cuda::probe::limits(ops, cuda);
    }
    (peak(ops.isa(), dtype), read_bandwidth_gbs())
}

/// The arithmetic peak of all threads for weights of this format.
///
/// # Panics
/// The processor lacks the instruction set.
pub fn peak(isa: Isa, dtype: WeightDtype) -> Peak {
    Ops::with_isa(isa);
    let measured = ways(isa, dtype).iter().map(|way| way.measure(isa));
    let faster = |a: Peak, b: Peak| if b.gflops > a.gflops { b } else { a };
    measured.reduce(faster).unwrap_or(Peak {
        gflops: 0.0,
        instruction: "nothing",
    })
}

/// [`Peak::gflops`] alone.
///
/// # Panics
/// The processor lacks the instruction set.
pub fn peak_gflops(isa: Isa, dtype: WeightDtype) -> f64 {
    peak(isa, dtype).gflops
}

/// A way to multiply.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// f32.
    Fma,
    /// The bf16 dot product.
    DotBf16,
    /// The byte dot product.
    DotBytes,
    /// Tile registers of bytes.
    TileBytes,
    /// Tile registers of bf16.
    TileBf16,
    /// Bytes by way of 16-bit products: a multiplication and an addition.
    Pairs,
}

/// The ways to multiply weights of a format, and activations as exact as that format needs them.
fn ways(isa: Isa, dtype: WeightDtype) -> &'static [Way] {
    match dtype {
        WeightDtype::F32 | WeightDtype::F16 => &[Way::Fma],
        WeightDtype::Bf16 if isa == Isa::Amx => &[Way::TileBf16],
        WeightDtype::Bf16 if isa == Isa::Avx512Bf16 => &[Way::DotBf16, Way::Fma],
        WeightDtype::Bf16 => &[Way::Fma],
        _ if isa == Isa::Amx => &[Way::TileBytes],
        _ if isa == Isa::AvxVnni || isa >= Isa::Avx512Vnni => &[Way::DotBytes],
        _ if isa == Isa::Scalar => &[Way::Fma],
        _ => &[Way::Pairs],
    }
}

impl Way {
    /// The sum of every thread's best rate while all of them multiply: handing out work costs nothing,
    /// and a thread that is held up holds no other up.
    fn measure(self, isa: Isa) -> Peak {
        let rate = |_: rayon::BroadcastContext<'_>| {
            let mut operations = 0;
            let seconds = best(|| operations = self.multiply(isa));
            operations as f64 / seconds
        };
        let rates = rayon::broadcast(rate);
        Peak {
            gflops: rates.iter().sum::<f64>() / 1e9,
            instruction: self.instruction(isa),
        }
    }

    fn instruction(self, isa: Isa) -> &'static str {
        match self {
            _ if isa == Isa::Scalar => "plain Rust",
            Way::Fma => "vfmadd231ps",
            Way::DotBf16 => "vdpbf16ps",
            Way::DotBytes => "vpdpbusd",
            Way::TileBytes => "tdpbsud",
            Way::TileBf16 => "tdpbf16ps",
            Way::Pairs => "vpmaddwd",
        }
    }

    /// Multiplies for about a millisecond, so that some tries go undisturbed; returns the operations.
    #[cfg(target_arch = "x86_64")]
    fn multiply(self, isa: Isa) -> usize {
        use crate::cpu::limits::{Multiplier, multiply};
        const TIMES: usize = 200_000;

        let (operations, sum) = match self {
            _ if isa == Isa::Scalar => return multiply_plainly(),
            Way::Fma => multiply(isa, Multiplier::Fma, TIMES),
            Way::DotBf16 => multiply(isa, Multiplier::DotBf16, TIMES / 2),
            Way::DotBytes => multiply(isa, Multiplier::DotBytes, TIMES),
            Way::TileBytes => multiply(isa, Multiplier::TileBytes, TIMES / 10),
            Way::TileBf16 => multiply(isa, Multiplier::TileBf16, TIMES / 10),
            Way::Pairs => multiply(isa, Multiplier::Pairs, TIMES),
        };
        black_box(sum);
        operations
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn multiply(self, _: Isa) -> usize {
        multiply_plainly()
    }
}

fn multiply_plainly() -> usize {
    const TIMES: usize = 2_000;
    let (mut sums, factors) = ([0.0f32; 32], black_box([0.5f32; 32]));
    for _ in 0..TIMES {
        sums.iter_mut()
            .zip(&factors)
            .for_each(|(sum, factor)| *sum += *factor * *factor);
        black_box(&mut sums);
    }
    2 * sums.len() * TIMES
}

/// Patterns of reading: streams of a thread, and how many bytes ahead each is fetched.
const PATTERNS: [(usize, usize); 5] = [(1, 4096), (1, 1024), (2, 1024), (2, 2048), (4, 0)];

/// The bandwidth at which all threads together read memory, in GB/s (10⁹ bytes), in the best of
/// several patterns. Goes through 1 GiB in parts of 256 MiB: by the time a part comes round again,
/// no cache holds it. Threads take a part's pieces as they get to them.
pub fn read_bandwidth_gbs() -> f64 {
    const PART: usize = 1 << 25;
    const PIECE: usize = PART / 16;
    let mut data = Aligned::<u64>::zeroed(4 * PART);
    data.as_mut_slice().fill(1); // pages that were only read are one and the same
    let mut parts = data.as_slice().chunks(PART).cycle();
    let mut seconds = f64::INFINITY;
    for (streams, ahead) in PATTERNS {
        seconds = seconds.min(best(|| {
            let pieces = parts.next().unwrap_or_default().par_chunks(PIECE);
            let sums = pieces
                .with_max_len(1)
                .map(|piece| read(piece, streams, ahead));
            black_box(sums.reduce(|| 0, i32::wrapping_add));
        }));
    }
    (8 * PART) as f64 / seconds / 1e9
}

fn best(mut run: impl FnMut()) -> f64 {
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed() < DURATION {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// Reads all of it; returns something that depends on it.
fn read(part: &[u64], streams: usize, ahead: usize) -> i32 {
    #[cfg(target_arch = "x86_64")]
    if let Some(isa) = Isa::available().last().filter(|isa| **isa != Isa::Scalar) {
        return crate::cpu::limits::read(*isa, part, streams, ahead);
    }
    let _ = (streams, ahead);
    part.iter()
        .fold(0, |sum, value| sum.wrapping_add(*value as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_faster_way_to_multiply_is_the_peak() {
        for isa in Isa::available() {
            for dtype in [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::Q8] {
                let peak = peak(isa, dtype);
                assert!(peak.gflops > 0.0 && peak.gflops.is_finite(), "{isa}");
                let mut ways = ways(isa, dtype).iter().map(|way| way.instruction(isa));
                assert!(ways.any(|name| name == peak.instruction), "{isa}");
            }
        }
    }
}
