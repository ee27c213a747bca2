//! Operations on whole rows: norms, activations, copies.

use super::{Activation, Ops, require, require_below};
use crate::buffer::{Buffer, Vector};
#[cfg(target_arch = "x86_64")]
use crate::cpu;
use crate::reference;

impl Ops {
    /// `out = x / sqrt(mean(x²) + eps) * weight`, row by row. x and out `[rows, n]`, weight `[n]`.
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn rms_norm(&self, x: &Buffer, weight: &Vector, eps: f32, out: &mut Buffer) {
        require("rms_norm", "values of weight", weight.len(), x.cols());
        require_same("rms_norm", x, out);
        on_cuda!(self, cuda => cuda.rms_norm(x.view(), weight.on(cuda), eps, out.view()));
        fast!(self, cpu::norm::rms_norm(self.isa, x, weight, eps, out));
        reference::rms_norm(x, weight, eps, out);
    }

    /// `out = (x - mean) / sqrt(variance + eps) * weight + bias`, row by row. x and out `[rows,
    /// n]`, weight and bias `[n]`.
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn layer_norm(
        &self,
        x: &Buffer,
        weight: &Vector,
        bias: &Vector,
        eps: f32,
        out: &mut Buffer,
    ) {
        require("layer_norm", "values of weight", weight.len(), x.cols());
        require("layer_norm", "values of bias", bias.len(), x.cols());
        require_same("layer_norm", x, out);
        on_cuda!(self, cuda => {
            let parameters = (weight.on(cuda), bias.on(cuda));
            cuda.layer_norm(x.view(), parameters, eps, out.view())
        });
        fast!(
            self,
            cpu::norm::layer_norm(self.isa, x, (weight, bias), eps, out)
        );
        reference::layer_norm(x, weight, bias, eps, out);
    }

    /// `out = act(gate) * up`. gate_up `[rows, 2f]`: gate | up; out `[rows, f]`.
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn gated_activation(&self, gate_up: &Buffer, act: Activation, out: &mut Buffer) {
        require(
            "gated_activation",
            "columns of gate_up",
            gate_up.cols(),
            2 * out.cols(),
        );
        require(
            "gated_activation",
            "rows of out",
            out.rows(),
            gate_up.rows(),
        );
        on_cuda!(self, cuda => cuda.gated_activation(gate_up.view(), act, out.view()));
        fast!(self, cpu::activation::gated(self.isa, gate_up, act, out));
        reference::gated_activation(gate_up, act, out);
    }

    /// `x = act(x)`, value by value.
    pub fn activate(&self, x: &mut Buffer, act: Activation) {
        on_cuda!(self, cuda => cuda.activate(x.view(), act));
        fast!(self, cpu::activation::activate(self.isa, x, act));
        reference::activate(x, act);
    }

    /// `dst[dst_rows[i]] = src[src_rows[i]]`, in order. Both have the same columns.
    ///
    /// # Panics
    /// The shapes do not fit, or a row is beyond its matrix.
    pub fn copy_rows(&self, src: &Buffer, src_rows: &[u32], dst: &mut Buffer, dst_rows: &[u32]) {
        require("copy_rows", "columns of dst", dst.cols(), src.cols());
        require(
            "copy_rows",
            "destination rows",
            dst_rows.len(),
            src_rows.len(),
        );
        require_below("copy_rows", "source row", src_rows, src.rows());
        require_below("copy_rows", "destination row", dst_rows, dst.rows());
        on_cuda!(self, cuda => cuda.copy_rows(src.view(), src_rows, dst.view(), dst_rows));
        reference::copy_rows(src, src_rows, dst, dst_rows);
    }

    /// Copies all columns of src `[rows, c]` into dst `[rows, ..]`, from column `dst_col` on.
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn copy_columns(&self, src: &Buffer, dst: &mut Buffer, dst_col: usize) {
        require("copy_columns", "rows of dst", dst.rows(), src.rows());
        let (end, cols) = (dst_col + src.cols(), dst.cols());
        assert!(
            end <= cols,
            "copy_columns: up to column {end} of {cols}. This is a bug."
        );
        on_cuda!(self, cuda => cuda.copy_columns(src.view(), dst.view(), dst_col));
        reference::copy_columns(src, dst, dst_col);
    }

    /// `x[i] += table[i % table.rows()]`: position embeddings of a batch. Both have the same
    /// columns.
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn add_rows(&self, x: &mut Buffer, table: &Buffer) {
        require("add_rows", "columns of table", table.cols(), x.cols());
        assert!(
            table.rows() > 0,
            "add_rows: a table without rows. This is a bug."
        );
        on_cuda!(self, cuda => cuda.add_rows(x.view(), table.view()));
        reference::add_rows(x, table);
    }

    /// `x[i][j] *= scales[j]`. x `[rows, n]`, scales `[n]`.
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn scale_columns(&self, x: &mut Buffer, scales: &Vector) {
        require("scale_columns", "values of scales", scales.len(), x.cols());
        on_cuda!(self, cuda => cuda.scale_columns(x.view(), scales.on(cuda)));
        reference::scale_columns(x, scales);
    }

    /// `dst[dst_rows[i]] = row`. row `[n]`, dst `[.., n]`.
    ///
    /// # Panics
    /// The shapes do not fit, or a row is beyond dst.
    pub fn broadcast_row(&self, row: &Vector, dst: &mut Buffer, dst_rows: &[u32]) {
        require("broadcast_row", "values of row", row.len(), dst.cols());
        require_below("broadcast_row", "row", dst_rows, dst.rows());
        on_cuda!(self, cuda => cuda.broadcast_row(row.on(cuda), dst.view(), dst_rows));
        reference::broadcast_row(row, dst, dst_rows);
    }
}

#[track_caller]
fn require_same(op: &str, x: &Buffer, out: &Buffer) {
    require(op, "columns of out", out.cols(), x.cols());
    require(op, "rows of out", out.rows(), x.rows());
}
