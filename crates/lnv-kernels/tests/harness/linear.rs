//! Products with weights.

use lnv_kernels::{Activation, Epilogue, Ops, Weight, WeightData, WeightDtype, WeightPart};

use crate::{all, assert_close, assert_same, matrix, noise, oracle, side_by_side, vector};

const DTYPES: [WeightDtype; 3] = [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::F16];

fn weight(ops: &Ops, n: usize, k: usize, dtype: WeightDtype) -> Weight {
    let bytes: Vec<u8> = noise(n * 31 + k, n * k)
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    ops.pack(&[WeightPart::new(WeightData::F32(&bytes), n)], k, dtype)
        .unwrap()
}

/// The reference itself, against the definition on the dense matrix.
#[test]
fn the_reference_is_the_definition() {
    let (rows, n, k) = (3, 37, 19);
    let (x, w, bias) = (noise(1, rows * k), noise(n * 31 + k, n * k), noise(2, n));
    for dtype in DTYPES {
        let ops = oracle();
        let mut out = ops.upload(rows, n, &noise(3, rows * n));
        let packed = weight(&ops, n, k, dtype);
        ops.linear(
            &matrix(1, rows, k),
            &packed,
            Some(&vector(2, n)),
            Epilogue::Add,
            &mut out,
        );
        let before = noise(3, rows * n);
        let expected = (0..rows * n).map(|i| {
            let (row, column) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
            let sum: f64 = row.iter().zip(column).map(|(x, w)| f64::from(x * w)).sum();
            (sum + f64::from(bias[i % n]) + f64::from(before[i])) as f32
        });
        let expected = ops.upload(rows, n, &expected.collect::<Vec<f32>>());
        assert_close(&out, &expected, 1e-6, &format!("{dtype:?}"));
    }
}

#[test]
fn every_format_and_size_agrees() {
    for (n, k) in [
        (1, 1),
        (31, 7),
        (33, 64),
        (70, 129),
        (96, 1100),
        (40, 3001),
        side_by_side(),
    ] {
        for dtype in DTYPES {
            for rows in [1, 2, 3, 5, 6, 7, 11, 12, 13, 25, 40] {
                compare(rows, n, k, dtype);
            }
        }
    }
}

/// Blocks of rows, of k and groups of panels, all at once.
#[test]
fn large_sizes_agree() {
    for dtype in DTYPES {
        compare(500, 600, 2100, dtype);
    }
}

fn compare(rows: usize, n: usize, k: usize, dtype: WeightDtype) {
    let (x, bias) = (matrix(rows, rows, k), vector(5, n));
    let mut expected = matrix(9, rows, n);
    let tolerance = 1e-6 * (k as f32).sqrt().max(4.0);
    let packed = weight(&oracle(), n, k, dtype);
    oracle().linear(&x, &packed, Some(&bias), Epilogue::Add, &mut expected);
    for ops in all() {
        let what = format!("{} {dtype:?} {rows}x{k}x{n}", ops.isa());
        let mut out = matrix(9, rows, n);
        ops.linear(&x, &packed, Some(&bias), Epilogue::Add, &mut out);
        assert_close(&out, &expected, tolerance, &what);
    }
}

#[test]
fn epilogues_agree() {
    let (rows, n, k) = (14, 45, 66);
    let acts = [
        None,
        Some(Activation::Silu),
        Some(Activation::Gelu),
        Some(Activation::GeluTanh),
        Some(Activation::QuickGelu),
        Some(Activation::Relu),
    ];
    let packed = weight(&oracle(), n, k, WeightDtype::F32);
    for act in acts {
        for bias in [None, Some(vector(4, n))] {
            let mut expected = matrix(9, rows, n);
            let (x, then) = (matrix(6, rows, k), Epilogue::Store(act));
            oracle().linear(&x, &packed, bias.as_ref(), then, &mut expected);
            for ops in all() {
                let mut out = matrix(8, rows, n);
                ops.linear(&x, &packed, bias.as_ref(), then, &mut out);
                assert_close(&out, &expected, 4e-6, &format!("{} {act:?}", ops.isa()));
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    for (n, k) in [(45, 67), (64, 2500), side_by_side()] {
        for (ops, dtype) in all()
            .iter()
            .flat_map(|ops| DTYPES.map(|dtype| (ops, dtype)))
        {
            let packed = weight(ops, n, k, dtype);
            let values: Vec<f32> = noise(3, 40 * k).iter().map(|v| v * 0.7).collect();
            let mut singles = Vec::new();
            for row in values.chunks(k) {
                let mut out = ops.buffer(1, n);
                let then = Epilogue::Store(Some(Activation::Silu));
                ops.linear(&ops.upload(1, k, row), &packed, None, then, &mut out);
                singles.extend(ops.download(&out));
            }
            for rows in 1..=40 {
                let mut out = ops.buffer(rows, n);
                let x = ops.upload(rows, k, &values[..rows * k]);
                let then = Epilogue::Store(Some(Activation::Silu));
                ops.linear(&x, &packed, None, then, &mut out);
                let what = format!("{} {dtype:?} {rows}x{k}x{n}", ops.isa());
                assert_same(&ops.download(&out), &singles[..rows * n], &what);
            }
        }
    }
}

#[test]
fn gathered_rows_are_the_weight() {
    let (n, k) = (70, 33);
    let dense = noise(n * 31 + k, n * k);
    let ids = [69, 0, 31, 32, 32];
    for (ops, dtype) in all()
        .iter()
        .flat_map(|ops| DTYPES.map(|dtype| (ops, dtype)))
    {
        let mut out = ops.buffer(ids.len(), k);
        ops.gather(&weight(ops, n, k, dtype), &ids, &mut out);
        let expected: Vec<f32> = ids
            .iter()
            .flat_map(|id| dense[*id as usize * k..][..k].to_vec())
            .collect();
        assert_same(
            &ops.download(&out),
            &expected,
            &format!("{} {dtype:?}", ops.isa()),
        );
    }
}
