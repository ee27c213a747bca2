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
        on_cuda!(self, cuda => {
            let (w, bias) = (w.device(), bias.map(|bias| bias.on(cuda)));
            crate::cuda::linear::linear(cuda, x.view(), &w, bias, then, out.view())
        });
        fast!(self, cpu::gemm::linear(self.isa, x, w, (bias, then), out));
        reference::linear(x, w, bias, then, out);
    }

    /// `out = act(x·Gᵀ + g) * (x·Uᵀ + u)` for W = G above U, `[2f, k]`, with their bias, `[2f]`: the first half of a
    /// gated MLP. x `[rows, k]`, out `[rows, f]`; gate_up `[rows, 2f]` is scratch, which need not be
    /// written.
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn gated_linear(
        &self,
        x: &Buffer,
        w: &Weight,
        bias: Option<&Vector>,
        act: Activation,
        (gate_up, out): (&mut Buffer, &mut Buffer),
    ) {
        require("gated_linear", "columns of out", 2 * out.cols(), w.n());
        require("gated_linear", "columns of x", x.cols(), w.k());
        require("gated_linear", "rows of out", out.rows(), x.rows());
        #[cfg(feature = "cuda")]
        if let (Some(cuda), None) = (&self.cuda, bias) {
            let (w, views) = (w.device(), (x.view(), out.view()));
            if crate::cuda::linear::gated_linear(cuda, views.0, &w, act, views.1) {
                return;
            }
        }
        self.linear(x, w, bias, Epilogue::Store(None), gate_up);
        self.gated_activation(gate_up, act, out);
    }

    /// `out[i] = W[ids[i]]`, as f32: token embeddings. W `[n, k]`, out `[ids, k]`.
    ///
    /// # Panics
    /// The shapes do not fit, or an id is beyond W.
    pub fn gather(&self, table: &Weight, ids: &[u32], out: &mut Buffer) {
        require("gather", "columns of out", out.cols(), table.k());
        require("gather", "rows of out", out.rows(), ids.len());
        require_below("gather", "id", ids, table.n());
        on_cuda!(self, cuda => crate::cuda::linear::gather(cuda, &table.device(), ids, out.view()));
        reference::gather(table, ids, out);
    }
}
