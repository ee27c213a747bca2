//! Activation functions on registers, and the gated product.
//!
//! Decision: all of them through one vector exp. The error function is Abramowitz and Stegun's
//! 7.1.26 (absolute error 1.5e-7), used as erfc of |x| so that the negative tail keeps its relative
//! accuracy.

use crate::buffer::Buffer;
use crate::cpu::each_row;
use crate::cpu::launch::{Kernel, launch};
use crate::cpu::simd::Simd;
use crate::isa::Isa;
use crate::ops::Activation;

/// `out = act(gate) * up`, row by row; the shapes fit.
pub(crate) fn gated(isa: Isa, gate_up: &Buffer, act: Activation, out: &mut Buffer) {
    let (gate_up, cols) = (gate_up.host(), out.cols());
    each_row(out.host_mut(), cols, |row, out| {
        let (gate, up) = gate_up[row * 2 * cols..][..2 * cols].split_at(cols);
        launch(isa, Gated { gate, up, act, out });
    });
}

/// `x = act(x)`.
pub(crate) fn activate(isa: Isa, x: &mut Buffer, act: Activation) {
    let cols = x.cols();
    each_row(x.host_mut(), cols, |_, values| {
        launch(isa, Activate { values, act })
    });
}

/// An activation function of a register.
#[inline(always)]
pub(crate) fn activation<S: Simd>(s: S, act: Activation, x: S::F) -> S::F {
    match act {
        Activation::Silu => times_sigmoid(s, x, x),
        Activation::QuickGelu => times_sigmoid(s, x, s.mul(x, s.splat(1.702))),
        Activation::Relu => s.if_less(x, s.splat(0.0), s.splat(0.0), x),
        Activation::Gelu => gelu(s, x),
        Activation::GeluTanh => {
            // x/2 (1 + tanh u) = x sigmoid(2u), with u = sqrt(2/π) (x + 0.044715 x³)
            let cubic = s.fma(s.mul(x, x), s.splat(0.044_715), s.splat(1.0));
            times_sigmoid(s, x, s.mul(s.mul(x, cubic), s.splat(1.595_769)))
        }
    }
}

/// `x / (1 + e^-v)`
#[inline(always)]
fn times_sigmoid<S: Simd>(s: S, x: S::F, v: S::F) -> S::F {
    let negative = s.sub(s.splat(0.0), v);
    s.div(x, s.add(s.splat(1.0), s.exp(negative)))
}

/// `x/2 (1 + erf(x/√2))`: `x - t` for positive x and `-t` for negative, where
/// `t = |x|/2 erfc(|x|/√2)`.
#[inline(always)]
fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    let zero = s.splat(0.0);
    // Beyond 40 the tail is zero; infinity would make it 0 * ∞.
    let size = s.min(s.splat(40.0), s.if_less(x, zero, s.sub(zero, x), x));
    let z = s.mul(size, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = s.div(s.splat(1.0), s.fma(z, s.splat(0.327_591_1), s.splat(1.0)));
    let mut p = s.splat(1.061_405_4);
    for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = s.fma(p, t, s.splat(c));
    }
    let erfc = s.mul(s.mul(p, t), s.exp(s.sub(zero, s.mul(z, z))));
    let tail = s.mul(s.mul(size, s.splat(0.5)), erfc);
    s.if_less(x, zero, s.sub(zero, tail), s.sub(x, tail))
}

/// `values = act(values)`.
struct Activate<'a> {
    values: &'a mut [f32],
    act: Activation,
}

impl Kernel for Activate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (values, len) = (self.values.as_mut_ptr(), self.values.len());
        for i in (0..len).step_by(S::LANES) {
            let n = S::LANES.min(len - i);
            // SAFETY: n values are left from i on.
            unsafe {
                let x = s.load_part(values.add(i), n);
                s.store_part(values.add(i), activation(s, self.act, x), n);
            }
        }
    }
}

/// One row of `out = act(gate) * up`.
struct Gated<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    act: Activation,
    out: &'a mut [f32],
}

impl Kernel for Gated<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let len = self.out.len();
        assert!(self.gate.len() == len && self.up.len() == len);
        let (gate, up, out) = (self.gate.as_ptr(), self.up.as_ptr(), self.out.as_mut_ptr());
        for i in (0..len).step_by(S::LANES) {
            let n = S::LANES.min(len - i);
            // SAFETY: n values are left in each of the three from i on.
            unsafe {
                let value = activation(s, self.act, s.load_part(gate.add(i), n));
                s.store_part(out.add(i), s.mul(value, s.load_part(up.add(i), n)), n);
            }
        }
    }
}
