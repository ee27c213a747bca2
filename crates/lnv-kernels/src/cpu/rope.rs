//! The rotary embedding of one token's query and key heads.

use crate::cpu::simd::{Kernel, Simd};

/// Rotates every head of `heads` (`[heads, d]`) by the angles of `cos_sin` (`cos | sin`, d values).
pub(crate) struct Rotate<'a> {
    pub(crate) heads: &'a mut [f32],
    pub(crate) cos_sin: &'a [f32],
}

impl Kernel for Rotate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let d = self.cos_sin.len();
        let half = d / 2;
        let (cos, sin) = (self.cos_sin.as_ptr(), self.cos_sin[half..].as_ptr());
        for head in self.heads.chunks_exact_mut(d) {
            let (low, high) = head.split_at_mut(half);
            let (low, high) = (low.as_mut_ptr(), high.as_mut_ptr());
            for i in (0..half).step_by(S::LANES) {
                let n = S::LANES.min(half - i);
                // SAFETY: n values are left in each half of the head and of the angles from i on.
                unsafe {
                    let (x, y) = (s.load_part(low.add(i), n), s.load_part(high.add(i), n));
                    let (c, z) = (s.load_part(cos.add(i), n), s.load_part(sin.add(i), n));
                    s.store_part(low.add(i), s.fnma(y, z, s.mul(x, c)), n);
                    s.store_part(high.add(i), s.fma(x, z, s.mul(y, c)), n);
                }
            }
        }
    }
}
