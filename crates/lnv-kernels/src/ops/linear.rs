//! Products with weights, and rows out of weights.

use super::{Activation, Ops, require, require_below};
use crate::buffer::{Buffer, Vector};
#[cfg(target_arch = "x86_64")]
use crate::cpu;
use crate::reference;
use crate::weight::Weight;

/// What becomes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = act(x·Wᵀ + bias)`.
    Store(Option<Activation>),
    /// `out += x·Wᵀ + bias`: the residual.
    Add,
}

impl Ops {
    /// `out = act(x·Wᵀ + bias)` or `out += x·Wᵀ + bias`, for x `[rows, k]`, W `[n, k]`, bias `[n]`,
    /// out `[rows, n]`.
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn linear(
        &self,
        x: &Buffer,
        w: &Weight,
        bias: Option<&Vector>,
        then: Epilogue,
        out: &mut Buffer,
    ) {
        require("linear", "columns of x", x.cols(), w.k());
        require("linear", "columns of out", out.cols(), w.n());
        require("linear", "rows of out", out.rows(), x.rows());
        if let Some(bias) = bias {
            require("linear", "values of bias", bias.len(), w.n());
        }
        fast!(self, cpu::gemm::linear(self.isa, x, w, (bias, then), out));
        reference::linear(x, w, bias, then, out);
    }

    /// `out[i] = W[ids[i]]`, as f32: token embeddings. W `[n, k]`, out `[ids, k]`.
    ///
    /// # Panics
    /// The shapes do not fit, or an id is beyond W.
    pub fn gather(&self, table: &Weight, ids: &[u32], out: &mut Buffer) {
        require("gather", "columns of out", out.cols(), table.k());
        require("gather", "rows of out", out.rows(), ids.len());
        require_below("gather", "id", ids, table.n());
        reference::gather(table, ids, out);
    }
}
