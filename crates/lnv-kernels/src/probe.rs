//! What the machine can do at best: the denominators of every speed that is quoted.
//!
//! Decision: measured by the loop that a kernel would run if nothing but arithmetic (or nothing but
//! reading) cost time, on all threads at once, best of several, because a shared machine only ever
//! disturbs downwards.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use crate::isa::Isa;
use crate::weight::WeightDtype;

const TRIES: usize = 5;

/// The arithmetic peak of all threads for this weight format, in GFLOP/s (a multiplication and an
/// addition are two).
pub fn peak_gflops(isa: Isa, dtype: WeightDtype) -> f64 {
    let _ = (isa, dtype);
    let steps = 1 << 20;
    let run = |_| {
        let (mut sums, factors) = ([0.0f32; 64], black_box([0.5f32; 64]));
        for _ in 0..steps {
            sums.iter_mut()
                .zip(&factors)
                .for_each(|(sum, factor)| *sum = *sum * factor + factor);
        }
        black_box(sums);
    };
    let threads = rayon::current_num_threads();
    let seconds = best(|| (0..threads).into_par_iter().for_each(run));
    (threads * steps * 64 * 2) as f64 / seconds / 1e9
}

/// The bandwidth at which all threads together read memory, in GB/s (10⁹ bytes). Reads 1 GiB, far more
/// than any cache holds; a machine that cannot spare it gets a page fault's price, not an error.
pub fn read_bandwidth_gbs() -> f64 {
    let data: Vec<u64> = vec![1; 1 << 27];
    let part = data.len() / rayon::current_num_threads();
    let sum = |part: &[u64]| part.iter().fold(0u64, |sum, v| sum.wrapping_add(*v));
    let seconds = best(|| {
        black_box(
            data.par_chunks(part)
                .map(sum)
                .reduce(|| 0, u64::wrapping_add),
        );
    });
    size_of_val(&data[..]) as f64 / seconds / 1e9
}

fn best(run: impl Fn()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..TRIES).map(time).fold(f64::INFINITY, f64::min)
}
