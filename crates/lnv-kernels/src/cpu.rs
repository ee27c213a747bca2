//! The fast kernels of x86-64.
//!
//! Decision: kernels are written once over [`simd::Simd`], a register of f32 lanes, and compiled
//! for each instruction set; only the inner step of a matrix product, which knows the weight's
//! format, is written per instruction set (`formats`). A value of a `Simd` type is the proof that
//! the processor has it, so register arithmetic is safe code and `unsafe` is left for raw memory.

#![allow(unsafe_code)]

pub(crate) mod activation;
pub(crate) mod amx;
pub(crate) mod attention;
mod bnb;
mod byte_attention;
mod dot;
mod dot_attention;
pub(crate) mod eager;
pub(crate) mod formats;
pub(crate) mod gemm;
pub(crate) mod int;
mod launch;
pub(crate) mod limits;
mod lookup;
pub(crate) mod norm;
pub(crate) mod pack;
mod pairs;
pub(crate) mod quantise;
pub(crate) mod quantised;
pub(crate) mod rope;
pub(crate) mod rotate;
pub(crate) mod scratch;
pub(crate) mod simd;
mod small;
mod widen;

use rayon::prelude::*;

/// Whether Intel made the processor.
#[allow(unused_unsafe)] // a later Rust than this crate asks for calls the instruction safe
pub(crate) fn is_intel() -> bool {
    // SAFETY: every x86-64 processor has the instruction.
    let vendor = unsafe { std::arch::x86_64::__cpuid(0) };
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes) == [*b"Genu", *b"ineI", *b"ntel"]
}

/// Values below which waking other threads costs more than it brings.
const SERIAL: usize = 1 << 14;

/// Runs `work` on each row of `out` and its index, in parallel if that pays.
fn each_row(out: &mut [f32], cols: usize, work: impl Fn(usize, &mut [f32]) + Send + Sync) {
    let serial = out.len() <= SERIAL;
    if serial {
        out.chunks_exact_mut(cols)
            .enumerate()
            .for_each(|(index, row)| work(index, row));
    } else {
        out.par_chunks_exact_mut(cols)
            .enumerate()
            .for_each(|(index, row)| work(index, row));
    }
}
