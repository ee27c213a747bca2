//! The rotation of `weight/rotate.rs` in registers.
//!
//! Decision: levels wider than a register go through the nearest cache, where a block of 2 KB stays;
//! narrower ones and the scale are done in one visit. The additions are those of the slow twin: a sign is applied by a fused
//! multiplication with 1 or -1, which rounds nothing.

use crate::cpu::launch::{Kernel, launch};
use crate::cpu::simd::Simd;
use crate::isa::Isa;
use crate::weight::rotate::{blocks, rotate_block, scale};

/// Rotates a row, if the processor has what it takes. The bits are those of the slow twin.
pub(crate) fn rotate(row: &mut [f32]) -> bool {
    struct Rotate<'a>(&'a mut [f32]);
    impl Kernel for Rotate<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            rotate_row(s, self.0);
        }
    }
    let Some(isa) = Isa::widest() else {
        return false;
    };
    launch(isa, Rotate(row));
    true
}

/// Rotates a row.
#[inline(always)]
pub(crate) fn rotate_row<S: Simd>(s: S, row: &mut [f32]) {
    for block in blocks(row.len()) {
        let block = &mut row[block];
        if block.len() < S::LANES {
            rotate_block(block);
        } else {
            wide_levels(s, block);
            narrow_levels(s, block);
        }
    }
}

/// The levels whose partners are in two registers: two levels at a time, so that a value is read and
/// written half as often.
#[inline(always)]
fn wide_levels<S: Simd>(s: S, block: &mut [f32]) {
    let (len, start) = (block.len(), block.as_mut_ptr());
    let mut stride = len / 2;
    while stride >= 2 * S::LANES {
        let quarter = stride / 2;
        let mut at = 0;
        while at < len {
            for lane in (at..at + quarter).step_by(S::LANES) {
                // SAFETY: four quarters of 2 * stride values from `at` on, which are inside the block;
                // a register of each.
                unsafe {
                    // No loop and no array: the compiler would leave calls in their place.
                    let first = start.add(lane);
                    let (second, third) = (first.add(quarter), first.add(2 * quarter));
                    let fourth = first.add(3 * quarter);
                    let (a, b) = (s.load(first), s.load(second));
                    let (c, d) = (s.load(third), s.load(fourth));
                    let (a, c) = (s.add(a, c), s.sub(a, c));
                    let (b, d) = (s.add(b, d), s.sub(b, d));
                    s.store(first, s.add(a, b));
                    s.store(second, s.sub(a, b));
                    s.store(third, s.add(c, d));
                    s.store(fourth, s.sub(c, d));
                }
            }
            at += 2 * stride;
        }
        stride = quarter / 2;
    }
    if stride >= S::LANES {
        let mut at = 0;
        while at < len {
            // SAFETY: the stride is a register, and two of them are inside the block.
            unsafe {
                let (low, high) = (start.add(at), start.add(at + stride));
                let (a, b) = (s.load(low), s.load(high));
                s.store(low, s.add(a, b));
                s.store(high, s.sub(a, b));
            }
            at += 2 * stride;
        }
    }
}

/// The levels whose partners are in one register, and the scale.
#[inline(always)]
fn narrow_levels<S: Simd>(s: S, block: &mut [f32]) {
    let factor = s.splat(scale(block.len()));
    // SAFETY: each row of signs is as long as the widest register.
    let signs = SIGNS
        .each_ref()
        .map(|signs| unsafe { s.load(signs.as_ptr()) });
    for part in block.chunks_exact_mut(S::LANES) {
        // SAFETY: a register's values.
        let mut a = unsafe { s.load(part.as_ptr()) };
        if S::LANES == 16 {
            a = s.fma(a, signs[3], s.partners::<8>(a));
        }
        a = s.fma(a, signs[2], s.partners::<4>(a));
        a = s.fma(a, signs[1], s.partners::<2>(a));
        a = s.fma(a, signs[0], s.partners::<1>(a));
        // SAFETY: as above.
        unsafe { s.store(part.as_mut_ptr(), s.mul(a, factor)) };
    }
}

/// For strides 1, 2, 4 and 8: -1 in the lanes that are subtracted.
static SIGNS: [[f32; 16]; 4] = {
    let mut signs = [[1.0; 16]; 4];
    let mut level = 0;
    while level < 4 {
        let mut lane = 0;
        while lane < 16 {
            if lane >> level & 1 == 1 {
                signs[level][lane] = -1.0;
            }
            lane += 1;
        }
        level += 1;
    }
    signs
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::rotate::rotate_slowly;

    #[test]
    fn a_row_has_the_bits_of_the_slow_twin_everywhere() {
        struct Rotate<'a>(&'a mut [f32]);
        impl Kernel for Rotate<'_> {
            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                rotate_row(s, self.0);
            }
        }
        for k in [1, 7, 8, 16, 31, 64, 150, 576, 1100, 4096] {
            let row: Vec<f32> = (0..k).map(|i| ((i * 7919 % 1009) as f32).sin()).collect();
            let mut expected = row.clone();
            rotate_slowly(&mut expected);
            for isa in Isa::available() {
                if isa == Isa::Scalar {
                    continue;
                }
                let mut found = row.clone();
                launch(isa, Rotate(&mut found));
                let same = found
                    .iter()
                    .zip(&expected)
                    .all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{isa} {k}");
            }
        }
    }
}
