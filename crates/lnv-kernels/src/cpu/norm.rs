//! The norms, one row at a time.
//!
//! Decision: four running sums, combined in a fixed order, in f32: a row's result does not depend
//! on the others. The mean is subtracted before squaring (two passes over a row that is in the
//! cache), as the one-pass formula cancels.

use crate::buffer::{Buffer, Vector};
use crate::cpu::each_row;
use crate::cpu::launch::{Kernel, launch};
use crate::cpu::simd::Simd;
use crate::isa::Isa;

/// `out = x / sqrt(mean(x²) + eps) * weight`, row by row; the shapes fit.
pub(crate) fn rms_norm(isa: Isa, x: &Buffer, weight: &Vector, eps: f32, out: &mut Buffer) {
    let (x, cols, weight) = (x.host(), x.cols(), weight.as_slice());
    each_row(out.host_mut(), cols, |row, out| {
        launch(
            isa,
            RmsNorm {
                x: &x[row * cols..][..cols],
                weight,
                eps,
                out,
            },
        );
    });
}

/// `out = (x - mean) / sqrt(variance + eps) * weight + bias`, row by row; the shapes fit.
pub(crate) fn layer_norm(
    isa: Isa,
    x: &Buffer,
    (weight, bias): (&Vector, &Vector),
    eps: f32,
    out: &mut Buffer,
) {
    let (x, cols, weight, bias) = (x.host(), x.cols(), weight.as_slice(), bias.as_slice());
    each_row(out.host_mut(), cols, |row, out| {
        launch(
            isa,
            LayerNorm {
                x: &x[row * cols..][..cols],
                weight,
                bias,
                eps,
                out,
            },
        );
    });
}

/// `out = x / sqrt(mean(x²) + eps) * weight`.
struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let len = self.x.len();
        assert!(self.weight.len() == len && self.out.len() == len);
        let square = sum_of_squares(s, self.x, 0.0);
        let scale = s.splat(1.0 / (square / len as f32 + self.eps).sqrt());
        let (x, weight, out) = (self.x.as_ptr(), self.weight.as_ptr(), self.out.as_mut_ptr());
        for i in (0..len).step_by(S::LANES) {
            let n = S::LANES.min(len - i);
            // SAFETY: n values are left in each of the three from i on.
            unsafe {
                let normed = s.mul(s.load_part(x.add(i), n), scale);
                s.store_part(out.add(i), s.mul(normed, s.load_part(weight.add(i), n)), n);
            }
        }
    }
}

/// `out = (x - mean) / sqrt(variance + eps) * weight + bias`.
struct LayerNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for LayerNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let len = self.x.len();
        assert!(self.weight.len() == len && self.bias.len() == len && self.out.len() == len);
        let mean = sum(s, self.x) / len as f32;
        let square = sum_of_squares(s, self.x, mean);
        let scale = s.splat(1.0 / (square / len as f32 + self.eps).sqrt());
        let (x, weight, bias) = (self.x.as_ptr(), self.weight.as_ptr(), self.bias.as_ptr());
        let out = self.out.as_mut_ptr();
        for i in (0..len).step_by(S::LANES) {
            let n = S::LANES.min(len - i);
            // SAFETY: n values are left in each of the four from i on.
            unsafe {
                let centred = s.sub(s.load_part(x.add(i), n), s.splat(mean));
                let weight = s.load_part(weight.add(i), n);
                let bias = s.load_part(bias.add(i), n);
                s.store_part(out.add(i), s.fma(s.mul(centred, scale), weight, bias), n);
            }
        }
    }
}

#[inline(always)]
fn sum<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    for (block, i) in (0..x.len()).step_by(S::LANES).enumerate() {
        // SAFETY: that many values are left from i on.
        let x = unsafe { s.load_part(x.as_ptr().add(i), S::LANES.min(x.len() - i)) };
        sums[block % 4] = s.add(sums[block % 4], x);
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

#[inline(always)]
fn sum_of_squares<S: Simd>(s: S, x: &[f32], mean: f32) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    for (block, i) in (0..x.len()).step_by(S::LANES).enumerate() {
        let n = S::LANES.min(x.len() - i);
        // SAFETY: n values are left from i on.
        let x = unsafe { s.load_part(x.as_ptr().add(i), n) };
        let centred = s.keep(s.sub(x, s.splat(mean)), 0, n, s.splat(0.0));
        sums[block % 4] = s.fma(centred, centred, sums[block % 4]);
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}
