//! Norms, activations, copies, patches and pooling.

use lnv_kernels::{Activation, Buffer, Ops, PatchGeometry, PoolMode, Vector};

use crate::{all, assert_close, assert_same, matrix, noise, oracle, vector};

/// Runs an operation with every implementation on a zeroed result and compares.
fn compare(rows: usize, cols: usize, tolerance: f32, run: impl Fn(&Ops, &mut Buffer)) {
    let mut expected = oracle().buffer(rows, cols);
    run(&oracle(), &mut expected);
    for ops in all() {
        let mut out = ops.buffer(rows, cols);
        run(&ops, &mut out);
        assert_close(
            &out,
            &expected,
            tolerance,
            &format!("{} {rows}x{cols}", ops.isa()),
        );
    }
}

#[test]
fn norms_agree() {
    for cols in [1, 7, 16, 33, 100, 1025] {
        for rows in [1, 2, 40] {
            let (x, weight, bias) = (matrix(1, rows, cols), vector(2, cols), vector(3, cols));
            compare(rows, cols, 2e-6, |ops, out| {
                ops.rms_norm(&x, &weight, 1e-6, out)
            });
            compare(rows, cols, 2e-6, |ops, out| {
                ops.layer_norm(&x, &weight, &bias, 1e-5, out)
            });
        }
    }
}

/// A row far from zero: the variance must not cancel.
#[test]
fn a_large_mean_keeps_the_variance() {
    let values: Vec<f32> = noise(4, 1000).iter().map(|v| 1000.0 + v).collect();
    let x = oracle().upload(1, 1000, &values);
    let (weight, bias) = (Vector::new(vec![1.0; 1000]), Vector::new(vec![0.0; 1000]));
    compare(1, 1000, 1e-4, |ops, out| {
        ops.layer_norm(&x, &weight, &bias, 1e-5, out)
    });
}

#[test]
fn activations_agree_over_their_range() {
    let values: Vec<f32> = (-12_000..12_000).map(|i| i as f32 / 97.0).collect();
    let acts = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::QuickGelu,
        Activation::Relu,
    ];
    for act in acts {
        compare(24, 1000, 1e-6, |ops, out| {
            *out = ops.upload(24, 1000, &values);
            ops.activate(out, act);
        });
        let x = oracle().upload(24, 1000, &values);
        compare(24, 500, 1e-6, |ops, out| ops.gated_activation(&x, act, out));
    }
}

#[test]
fn activations_keep_what_is_not_finite() {
    for ops in all() {
        for act in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
            let mut x = ops.upload(1, 3, &[f32::NAN, f32::INFINITY, 3e38]);
            ops.activate(&mut x, act);
            let found = ops.download(&x);
            assert!(found[0].is_nan(), "{} {act:?} {found:?}", ops.isa());
            assert_eq!(found[1..], [f32::INFINITY, 3e38], "{} {act:?}", ops.isa());
        }
    }
}

#[test]
fn copies_put_rows_and_columns_in_place() {
    for ops in all() {
        let src = ops.upload(3, 2, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let mut dst = ops.buffer(4, 2);
        ops.copy_rows(&src, &[2, 0], &mut dst, &[1, 3]);
        assert_same(
            &ops.download(&dst),
            &[0.0, 0.0, 5.0, 6.0, 0.0, 0.0, 1.0, 2.0],
            "copy_rows",
        );
        ops.broadcast_row(&Vector::new(vec![7.0, 8.0]), &mut dst, &[0]);
        assert_same(&ops.download_rows(&dst, 0..1), &[7.0, 8.0], "broadcast_row");
        ops.write_rows(&mut dst, 2, &[9.0, 9.0]);
        ops.add_rows(&mut dst, &ops.upload(2, 2, &[1.0, 1.0, 0.0, 2.0]));
        let expected = [8.0, 9.0, 5.0, 8.0, 10.0, 10.0, 1.0, 4.0];
        assert_same(&ops.download(&dst), &expected, "add_rows");
        ops.scale_columns(&mut dst, &Vector::new(vec![0.5, 2.0]));
        let expected = [4.0, 18.0, 2.5, 16.0, 5.0, 20.0, 0.5, 8.0];
        assert_same(&ops.download(&dst), &expected, "scale_columns");
        let mut wide = ops.buffer(3, 5);
        ops.copy_columns(&src, &mut wide, 2);
        assert_same(
            &ops.download_rows(&wide, 1..2),
            &[0.0, 0.0, 3.0, 4.0, 0.0],
            "copy_columns",
        );
    }
}

#[test]
fn patches_lie_in_the_order_of_a_convolution() {
    let (channels, height, width, patch) = (2, 5, 4, 2);
    let pixels: Vec<f32> = (0..2 * channels * height * width)
        .map(|i| i as f32)
        .collect();
    for ops in all() {
        let mut out = ops.buffer(2 * 2 * 2, channels * patch * patch);
        ops.patchify(
            &pixels.chunks(channels * height * width).collect::<Vec<_>>(),
            PatchGeometry {
                channels,
                height,
                width,
                patch,
            },
            &mut out,
        );
        // Second image, bottom right patch: its first pixel is at (2, 2) of each channel.
        let at = |c: usize, y: usize, x: usize| pixels[((2 + c) * height + y) * width + x];
        let expected: Vec<f32> = (0..8)
            .map(|i| at(i / 4, 2 + i / 2 % 2, 2 + i % 2))
            .collect();
        assert_same(&ops.download_rows(&out, 7..8), &expected, "patchify");
    }
}

#[test]
fn pooling_drops_the_odd_row_and_column() {
    let grid: Vec<f32> = (0..25).map(|i| i as f32).collect();
    for ops in all() {
        let x = ops.upload(25, 1, &grid);
        let mut out = ops.buffer(4, 1);
        ops.pool(&x, 5, 2, PoolMode::Average, &mut out);
        assert_same(&ops.download(&out), &[3.0, 5.0, 13.0, 15.0], "average");
        ops.pool(&x, 5, 2, PoolMode::Max, &mut out);
        assert_same(&ops.download(&out), &[6.0, 8.0, 16.0, 18.0], "max");
        let mut windows = ops.buffer(4, 4);
        ops.pool_windows(&x, 5, 2, &mut windows);
        assert_same(
            &ops.download_rows(&windows, 3..4),
            &[12.0, 13.0, 17.0, 18.0],
            "windows",
        );
    }
}

#[test]
#[should_panic(expected = "This is a bug")]
fn shapes_that_do_not_fit_are_a_bug() {
    oracle().rms_norm(
        &matrix(1, 2, 3),
        &vector(1, 4),
        1e-5,
        &mut oracle().buffer(2, 3),
    );
}
