//! Every implementation that the machine has, held against the scalar reference on odd shapes, and
//! the guarantee that a row's bits do not depend on the rest of a call.

#![allow(clippy::unwrap_used)]

mod attention;
mod bnb;
#[cfg(feature = "cuda")]
mod cuda;
mod linear;
mod quantised;
mod rows;

use lnv_kernels::{Buffer, Isa, Ops, Vector};

/// The scalar reference.
fn oracle() -> Ops {
    Ops::with_isa(Isa::Scalar)
}

/// All implementations, the reference included.
fn all() -> Vec<Ops> {
    Isa::available().into_iter().map(Ops::with_isa).collect()
}

/// Outputs and values of k of a small product in which each thread has a few panels for each of four streams, not
/// equally many; for up to 8 threads.
fn side_by_side() -> (usize, usize) {
    (32 * (20 * oracle().threads().min(8) + 7) - 5, 70)
}

/// Values between -1 and 1 with 8 significant bits: exact in bf16 and f16.
fn noise(seed: usize, len: usize) -> Vec<f32> {
    let mut state = seed as u32 ^ 0x2545_f491;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as f32 / 128.0 - 1.0
    };
    (0..len).map(next).collect()
}

fn matrix(seed: usize, rows: usize, cols: usize) -> Buffer {
    oracle().upload(rows, cols, &noise(seed, rows * cols))
}

fn vector(seed: usize, len: usize) -> Vector {
    Vector::new(noise(seed, len))
}

/// Fails unless all values agree up to `tolerance` times the larger of 1 and the expected value.
#[track_caller]
fn assert_close(found: &Buffer, expected: &Buffer, tolerance: f32, what: &str) {
    let (found, expected) = (oracle().download(found), oracle().download(expected));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let allowed = tolerance * expected.abs().max(1.0);
        assert!(
            (found - expected).abs() <= allowed,
            "{what}: {i}: {found} for {expected}"
        );
    }
}

/// Fails unless all values have the same bits.
#[track_caller]
fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|v| v.to_bits()).collect() };
    assert_eq!(bits(found), bits(expected), "{what}");
}
