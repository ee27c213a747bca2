//! Operations of the vision tower's ends: patches in, pooled features out. Memory-bound and small
//! beside the tower, so every instruction set runs the reference loops.

use super::{Ops, require};
use crate::buffer::Buffer;
use crate::reference;

/// How images are cut into patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PatchGeometry {
    /// Channels of an image.
    pub channels: usize,
    /// Rows of pixels.
    pub height: usize,
    /// Columns of pixels.
    pub width: usize,
    /// Side of a square patch, in pixels.
    pub patch: usize,
}

/// What becomes of a window of features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PoolMode {
    /// Their mean.
    Average,
    /// Their maximum.
    Max,
}

impl Ops {
    /// Cuts n pictures, `[channels, height, width]` each, into rows of patches: out
    /// `[n * (height/patch) * (width/patch), channels * patch * patch]`, row-major over the grid,
    /// columns in the order (channel, py, px), which is the order of a convolution's weight. Pixels
    /// beyond the last whole patch are dropped.
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn patchify(&self, pictures: &[&[f32]], geometry: PatchGeometry, out: &mut Buffer) {
        let PatchGeometry {
            channels,
            height,
            width,
            patch,
        } = geometry;
        assert!(
            patch > 0,
            "patchify: patches without pixels. This is a bug."
        );
        for picture in pictures {
            require(
                "patchify",
                "pixels",
                picture.len(),
                channels * height * width,
            );
        }
        require(
            "patchify",
            "rows of out",
            out.rows(),
            pictures.len() * (height / patch) * (width / patch),
        );
        require(
            "patchify",
            "columns of out",
            out.cols(),
            channels * patch * patch,
        );
        on_cuda!(self, cuda => cuda.patchify(pictures, &geometry, out.view()));
        reference::patchify(pictures, &geometry, out);
    }

    /// Pools windows of `stride * stride` positions of square grids: x `[n * side * side, c]`, out
    /// `[n * (side/stride)², c]`. An odd last row and column are dropped.
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn pool(&self, x: &Buffer, side: usize, stride: usize, mode: PoolMode, out: &mut Buffer) {
        require("pool", "columns of out", out.cols(), x.cols());
        check_windows("pool", x, side, stride, out);
        on_cuda!(self, cuda => cuda.pool(x.view(), side, stride, mode, out.view()));
        reference::pool(x, side, stride, mode, out);
    }

    /// Writes each window's positions side by side, the input of a pooling convolution: x `[n *
    /// side * side, c]`, out `[n * (side/stride)², stride * stride * c]`, columns in the order (wy,
    /// wx, c).
    ///
    /// # Panics
    /// The shapes do not fit.
    pub fn pool_windows(&self, x: &Buffer, side: usize, stride: usize, out: &mut Buffer) {
        require(
            "pool_windows",
            "columns of out",
            out.cols(),
            stride * stride * x.cols(),
        );
        check_windows("pool_windows", x, side, stride, out);
        on_cuda!(self, cuda => cuda.pool_windows(x.view(), side, stride, out.view()));
        reference::pool_windows(x, side, stride, out);
    }
}

#[track_caller]
fn check_windows(op: &str, x: &Buffer, side: usize, stride: usize, out: &Buffer) {
    assert!(
        stride > 0 && stride <= side && x.rows().is_multiple_of(side * side),
        "{op}: {} rows as grids of side {side} with stride {stride}. This is a bug.",
        x.rows()
    );
    let images = x.rows() / (side * side);
    require(
        op,
        "rows of out",
        out.rows(),
        images * (side / stride).pow(2),
    );
}
