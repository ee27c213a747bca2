//! Operations on whole rows, and those of the vision tower's ends: which kernel, how many threads.
//!
//! Decision: a block for each row, or a thread for each value or four where rows do not matter. Shapes
//! were checked by the public operation.

use std::sync::Arc;

use super::memory::Memory;
use super::{Arg, Cuda, Kind, View};
use crate::ops::{Activation, PatchGeometry, PoolMode};

/// The kernels' number of a function.
pub(crate) fn number(act: Option<Activation>) -> Arg {
    Arg::Int(match act {
        Some(Activation::Silu) => 0,
        Some(Activation::Gelu) => 1,
        Some(Activation::GeluTanh) => 2,
        Some(Activation::QuickGelu) => 3,
        Some(Activation::Relu) => 4,
        None => 5,
    })
}

/// Threads for a row of so many values, four a thread.
fn threads(cols: usize) -> usize {
    cols.div_ceil(4).next_multiple_of(32).clamp(32, 1024)
}

impl Cuda {
    fn rows_kernel(&self, kernel: &str, grid: usize, block: usize, args: &[Arg]) {
        let name = format!("{kernel}_{}", self.half().suffix());
        self.launch(&name, [grid, 1, 1], block, 0, args);
    }

    pub(crate) fn rms_norm(&self, x: View, weight: u64, eps: f32, out: View) {
        let args = [
            Arg::Ptr(x.ptr),
            x.half(),
            Arg::Ptr(weight),
            Arg::Float(eps),
            Arg::Ptr(out.ptr),
            out.half(),
            Arg::count(x.cols),
        ];
        self.rows_kernel("rms_norm", x.rows, threads(x.cols), &args);
    }

    pub(crate) fn layer_norm(&self, x: View, (weight, bias): (u64, u64), eps: f32, out: View) {
        let args = [
            Arg::Ptr(x.ptr),
            x.half(),
            Arg::Ptr(weight),
            Arg::Ptr(bias),
            Arg::Float(eps),
            Arg::Ptr(out.ptr),
            out.half(),
            Arg::count(x.cols),
        ];
        self.rows_kernel("layer_norm", x.rows, threads(x.cols), &args);
    }

    pub(crate) fn gated_activation(&self, gate_up: View, act: Activation, out: View) {
        let count = out.rows * out.cols;
        let each = if out.cols.is_multiple_of(4) { 4 } else { 1 };
        let args = [
            Arg::Ptr(gate_up.ptr),
            gate_up.half(),
            number(Some(act)),
            Arg::Ptr(out.ptr),
            out.half(),
            Arg::count(out.cols),
            Arg::Size(count),
        ];
        self.rows_kernel("gated", (count / each).div_ceil(256), 256, &args);
    }

    pub(crate) fn activate(&self, x: View, act: Activation) {
        let count = x.rows * x.cols;
        let args = [
            Arg::Ptr(x.ptr),
            x.half(),
            number(Some(act)),
            Arg::Size(count),
        ];
        self.rows_kernel("activate", count.div_ceil(256), 256, &args);
    }

    /// `to[to_rows[i]] = from[from_rows[i]]`.
    pub(crate) fn copy_rows(
        self: &Arc<Cuda>,
        from: View,
        from_rows: &[u32],
        to: View,
        to_rows: &[u32],
    ) {
        let tables = (self.table(from_rows), self.table(to_rows));
        self.move_rows(from, tables, to, 0, from_rows.len());
    }

    /// All rows, into the columns from `column` on.
    pub(crate) fn copy_columns(&self, from: View, to: View, column: usize) {
        self.move_rows(from, (0, 0), to, column, from.rows);
    }

    fn move_rows(&self, from: View, tables: (u64, u64), to: View, column: usize, rows: usize) {
        let args = [
            Arg::Ptr(from.ptr),
            from.half(),
            Arg::Ptr(tables.0),
            Arg::count(from.cols),
            Arg::Ptr(to.ptr),
            to.half(),
            Arg::Ptr(tables.1),
            Arg::count(to.cols),
            Arg::count(column),
        ];
        self.rows_kernel("copy_rows", rows, threads(from.cols), &args);
    }

    pub(crate) fn add_rows(&self, x: View, table: View) {
        let args = [
            Arg::Ptr(x.ptr),
            x.half(),
            Arg::Ptr(table.ptr),
            table.half(),
            Arg::count(table.rows),
            Arg::count(x.cols),
        ];
        self.rows_kernel("add_rows", x.rows, threads(x.cols), &args);
    }

    pub(crate) fn scale_columns(&self, x: View, scales: u64) {
        let args = [
            Arg::Ptr(x.ptr),
            x.half(),
            Arg::Ptr(scales),
            Arg::count(x.cols),
        ];
        self.rows_kernel("scale_columns", x.rows, threads(x.cols), &args);
    }

    pub(crate) fn broadcast_row(self: &Arc<Cuda>, row: u64, to: View, to_rows: &[u32]) {
        let args = [
            Arg::Ptr(row),
            Arg::Ptr(to.ptr),
            to.half(),
            Arg::Ptr(self.table(to_rows)),
            Arg::count(to.cols),
        ];
        self.rows_kernel("broadcast_row", to_rows.len(), threads(to.cols), &args);
    }

    /// The pictures' pixels go through memory that is passed on at once.
    pub(crate) fn patchify(
        self: &Arc<Cuda>,
        pictures: &[&[f32]],
        geometry: &PatchGeometry,
        out: View,
    ) {
        let bytes = pictures.iter().map(|picture| size_of_val(*picture)).sum();
        let pixels: Memory = self.alloc(bytes);
        let mut at = 0;
        for picture in pictures {
            self.write(&pixels, at, bytemuck::cast_slice(picture));
            at += size_of_val(*picture);
        }
        let args = [
            Arg::Ptr(pixels.ptr()),
            Arg::count(geometry.channels),
            Arg::count(geometry.height),
            Arg::count(geometry.width),
            Arg::count(geometry.patch),
            Arg::Ptr(out.ptr),
            out.half(),
        ];
        self.rows_kernel("patchify", out.rows, 256, &args);
    }

    pub(crate) fn pool(&self, x: View, side: usize, stride: usize, mode: PoolMode, out: View) {
        let args = [
            Arg::Ptr(x.ptr),
            x.half(),
            Arg::count(x.cols),
            Arg::count(side),
            Arg::count(stride),
            Arg::Int(u32::from(mode == PoolMode::Max)),
            Arg::Ptr(out.ptr),
            out.half(),
        ];
        self.rows_kernel("pool", out.rows, 256, &args);
    }

    pub(crate) fn pool_windows(&self, x: View, side: usize, stride: usize, out: View) {
        let args = [
            Arg::Ptr(x.ptr),
            x.half(),
            Arg::count(x.cols),
            Arg::count(side),
            Arg::count(stride),
            Arg::Ptr(out.ptr),
            out.half(),
        ];
        self.rows_kernel("pool_windows", out.rows, 256, &args);
    }

    /// Bytes of a value of a matrix.
    pub(crate) fn bytes_of(&self, kind: Kind) -> usize {
        match kind {
            Kind::F32 => 4,
            Kind::Half => self.half().bytes(),
        }
    }
}
