//! What a GPU can do at best, measured: the denominators of every speed that is quoted.
//!
//! Decision: the peak is that of a large product of this program's type through the fastest way that it
//! has, cuBLASLt where it is there, on data that is not zeros, which would run faster; the bandwidth is that
//! of reading two gigabytes once. Medians, because nothing else runs on the GPU.

use std::sync::Arc;
use std::time::Instant;

use super::{Arg, Cuda, Half};
use crate::ops::{Epilogue, Ops};
use crate::probe::Peak;
use crate::weight::{WeightData, WeightDtype, WeightPart};

/// Rows, columns and depth of the product.
const SIDE: usize = 8192;
/// The same in f32, which is slower.
const SIDE_F32: usize = 2048;
/// Bytes that are read.
const BYTES: usize = 2 << 30;
const RUNS: usize = 9;

/// The arithmetic peak, and 10⁹ bytes a second.
pub(crate) fn limits(ops: &Ops, cuda: &Arc<Cuda>) -> (Peak, f64) {
    let side = if cuda.half() == Half::F32 {
        SIDE_F32
    } else {
        SIDE
    };
    (
        Peak {
            gflops: product(ops, cuda, side),
            instruction: "matrix product",
        },
        bandwidth(cuda),
    )
}

/// The median of the seconds that `work` takes.
fn seconds(cuda: &Cuda, mut work: impl FnMut()) -> f64 {
    let mut once = || {
        cuda.wait();
        let start = Instant::now();
        work();
        cuda.wait();
        start.elapsed().as_secs_f64()
    };
    (0..3).for_each(|_| {
        once();
    });
    let mut times: Vec<f64> = (0..RUNS).map(|_| once()).collect();
    times.sort_by(f64::total_cmp);
    times[RUNS / 2]
}

fn product(ops: &Ops, cuda: &Arc<Cuda>, side: usize) -> f64 {
    let mut state = 1u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let row: Vec<f32> = (0..side * 61).map(|_| noise()).collect();
    let values: Vec<f32> = row.iter().copied().cycle().take(side * side).collect();
    let mut x = ops.scratch(side, side);
    ops.write_rows(&mut x, 0, &values);
    let part = WeightPart::new(WeightData::F32(bytemuck::cast_slice(&values)), side);
    let dtype = match cuda.half() {
        Half::F32 => WeightDtype::F32,
        Half::Bf16 => WeightDtype::Bf16,
        Half::F16 => WeightDtype::F16,
    };
    let Ok(weight) = ops.pack(&[part], side, dtype) else {
        return 0.0;
    };
    let mut out = ops.scratch(side, side);
    let seconds = seconds(cuda, || {
        ops.linear(&x, &weight, None, Epilogue::Store(None), &mut out);
    });
    2.0 * (side as f64).powi(3) / seconds / 1e9
}

fn bandwidth(cuda: &Arc<Cuda>) -> f64 {
    let Ok(memory) = cuda.try_alloc(BYTES) else {
        return 0.0;
    };
    let sink = cuda.alloc(4);
    let args = [
        Arg::Ptr(memory.ptr()),
        Arg::Size(BYTES / 16),
        Arg::Ptr(sink.ptr()),
    ];
    let grid = [cuda.sms() * 16, 1, 1];
    BYTES as f64 / seconds(cuda, || cuda.launch("probe_read", grid, 256, 0, &args)) / 1e9
}
