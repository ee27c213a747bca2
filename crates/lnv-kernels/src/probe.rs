//! What the machine can do at best: the denominators of every speed that is quoted.
//!
//! Decision: measured by the loop that a kernel would run if nothing but arithmetic (or nothing but
//! reading) cost time, on all threads at once, best of several, because a shared machine only ever
//! disturbs downwards.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::buffer::Aligned;
use crate::isa::Isa;
use crate::ops::Ops;
use crate::weight::WeightDtype;

/// How long a probe tries: longer than another program keeps a core.
const DURATION: Duration = Duration::from_millis(500);

/// The arithmetic peak of all threads for this weight format, in GFLOP/s (a multiplication and an
/// addition are two): the matrix product's own register tile over operands in the first-level
/// cache.
///
/// # Panics
/// The processor lacks the instruction set.
pub fn peak_gflops(isa: Isa, dtype: WeightDtype) -> f64 {
    Ops::with_isa(isa);
    let threads = rayon::current_num_threads();
    let mut operations = 0;
    let seconds = best(|| {
        let run = |_| spin(isa, dtype, SPINS);
        operations = (0..threads).into_par_iter().map(run).sum::<usize>();
    });
    operations as f64 / seconds / 1e9
}

/// Tiles of one measurement: about a millisecond, so that some tries go undisturbed.
const SPINS: usize = 2_000;

fn spin(isa: Isa, dtype: WeightDtype, times: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if isa != Isa::Scalar {
        let spun = crate::cpu::gemm::spin(isa, dtype, times);
        black_box(spun.sum);
        return spun.operations;
    }
    let _ = (isa, dtype);
    let (mut sums, factors) = ([0.0f32; 32], black_box([0.5f32; 32]));
    for _ in 0..times {
        sums.iter_mut()
            .zip(&factors)
            .for_each(|(sum, factor)| *sum += *factor * *factor);
        black_box(&mut sums);
    }
    2 * sums.len() * times
}

/// The bandwidth at which all threads together read memory, in GB/s (10⁹ bytes). Goes through 1 GiB
/// in parts of 64 MiB: by the time a part comes round again, no cache holds it.
pub fn read_bandwidth_gbs() -> f64 {
    let mut data = Aligned::<u64>::zeroed(1 << 27);
    data.as_mut_slice().fill(1); // pages that were only read are one and the same
    let threads = rayon::current_num_threads();
    let mut parts = data.as_slice().chunks(1 << 23).cycle();
    let seconds = best(|| {
        let part = parts.next().unwrap_or_default();
        let streams = part
            .par_chunks(part.len().div_ceil(threads))
            .with_max_len(1);
        black_box(streams.map(sum).reduce(|| 0, u64::wrapping_add));
    });
    (8 << 23) as f64 / seconds / 1e9
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

#[cfg(target_arch = "x86_64")]
fn sum(part: &[u64]) -> u64 {
    crate::cpu::sum_ahead(part)
}

#[cfg(not(target_arch = "x86_64"))]
fn sum(part: &[u64]) -> u64 {
    part.iter().fold(0, |sum, value| sum.wrapping_add(*value))
}
