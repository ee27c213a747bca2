//! Quantised weights: products, rows, packed bytes, and how well the scales are found.

use std::sync::Arc;

use lnv_kernels::{
    Activation, Epilogue, PackedBytes, Vector, Weight, WeightData, WeightDtype, WeightPart,
    packed_len,
};

use crate::{all, assert_close, assert_same, matrix, noise, oracle, side_by_side, vector};

const DTYPES: [WeightDtype; 2] = [WeightDtype::Q8, WeightDtype::Q4];

fn pack(values: &[f32], k: usize, dtype: WeightDtype) -> Weight {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let (data, n) = (WeightData::F32(&bytes), values.len() / k);
    oracle()
        .pack(&[WeightPart::new(data, n)], k, dtype)
        .unwrap()
}

fn weight(n: usize, k: usize, dtype: WeightDtype) -> Weight {
    pack(&noise(n * 31 + k, n * k), k, dtype)
}

/// The weight's values after quantisation.
fn dense(weight: &Weight) -> Vec<f32> {
    let ids: Vec<u32> = (0..weight.n() as u32).collect();
    let mut out = oracle().buffer(weight.n(), weight.k());
    oracle().gather(weight, &ids, &mut out);
    oracle().download(&out)
}

/// A row times the matrix that 8-bit weights and their activations are rotated by: in blocks of at
/// most 512, entry (i, j) is 1 or -1 by the parity of the bits that i and j share.
fn rotated(row: &[f32]) -> Vec<f32> {
    let (mut out, mut start) = (Vec::new(), 0);
    while start < row.len() {
        let size = 1 << (row.len() - start).ilog2().min(9);
        let block = &row[start..start + size];
        out.extend((0..size).map(|i| {
            let signed = |(j, v): (usize, &f32)| {
                if (i & j).count_ones() % 2 == 0 {
                    *v
                } else {
                    -v
                }
            };
            let sum: f32 = block.iter().enumerate().map(signed).sum();
            sum / (size as f32).sqrt()
        }));
        start += size;
    }
    out
}

/// The reference itself, against the definition on the dense matrix, for activations that are whole
/// numbers up to 127 where they are quantised, and so are not rounded.
#[test]
fn the_reference_is_the_definition() {
    let (rows, n, k) = (3, 37, 150);
    let mut x: Vec<f32> = noise(1, rows * k)
        .iter()
        .map(|v| (v * 126.0).round())
        .collect();
    for row in x.chunks_mut(k) {
        row.iter_mut().step_by(64).for_each(|first| *first = 127.0);
    }
    let whole = x;
    for dtype in DTYPES {
        let x: Vec<f32> = match dtype {
            WeightDtype::Q8 => whole.chunks(k).flat_map(rotated).collect(),
            _ => whole.clone(),
        };
        let packed = weight(n, k, dtype);
        let (w, bias, before) = (dense(&packed), noise(2, n), noise(3, rows * n));
        let ops = oracle();
        let mut out = ops.upload(rows, n, &before);
        let x_rows = ops.upload(rows, k, &x);
        let bias_vector = Vector::new(bias.clone());
        ops.linear(
            &x_rows,
            &packed,
            Some(&bias_vector),
            Epilogue::Add,
            &mut out,
        );
        let expected = (0..rows * n).map(|i| {
            let (row, column) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
            let products = row.iter().zip(column);
            let sum: f64 = products.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            (sum + f64::from(bias[i % n]) + f64::from(before[i])) as f32
        });
        let expected = ops.upload(rows, n, &expected.collect::<Vec<f32>>());
        // Scales are applied in f32, and 8-bit weights were rotated back in f32.
        let tolerance = if dtype == WeightDtype::Q8 { 2e-4 } else { 2e-5 };
        assert_close(&out, &expected, tolerance, &format!("{dtype:?}"));
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
            for rows in [1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 17, 25, 40] {
                compare(rows, n, k, dtype);
            }
        }
    }
}

/// Blocks of rows, of k and groups of panels, all at once.
#[test]
fn large_sizes_agree() {
    for dtype in DTYPES {
        compare(700, 300, 4700, dtype);
    }
}

/// 8-bit products have the same bits everywhere; 4-bit ones differ by the rounding of a sum.
fn compare(rows: usize, n: usize, k: usize, dtype: WeightDtype) {
    let (x, bias) = (matrix(rows, rows, k), vector(5, n));
    let mut expected = matrix(9, rows, n);
    let packed = weight(n, k, dtype);
    oracle().linear(&x, &packed, Some(&bias), Epilogue::Add, &mut expected);
    for ops in all() {
        let what = format!("{} {dtype:?} {rows}x{k}x{n}", ops.isa());
        let mut out = matrix(9, rows, n);
        ops.linear(&x, &packed, Some(&bias), Epilogue::Add, &mut out);
        if dtype == WeightDtype::Q8 {
            assert_same(&ops.download(&out), &ops.download(&expected), &what);
        } else {
            let tolerance = 2e-7 * (k as f32).sqrt().max(8.0);
            assert_close(&out, &expected, tolerance, &what);
        }
    }
}

/// Codes and activations at the ends of their ranges: sums that saturate would be wrong.
#[test]
fn extreme_values_are_exact() {
    let (rows, n, k) = (13, 40, 4100);
    for dtype in DTYPES {
        for (x_sign, w_sign) in [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)] {
            let packed = pack(&vec![w_sign; n * k], k, dtype);
            for ops in all() {
                let x = ops.upload(rows, k, &vec![x_sign * 127.0; rows * k]);
                let mut out = ops.buffer(rows, n);
                ops.linear(&x, &packed, None, Epilogue::Store(None), &mut out);
                let expected = x_sign * w_sign * 127.0 * k as f32;
                let what = format!("{} {dtype:?} {x_sign} {w_sign}", ops.isa());
                let expected = ops.upload(rows, n, &vec![expected; rows * n]);
                assert_close(&out, &expected, 1e-3, &what);
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    for (n, k) in [(45, 67), (64, 4500), side_by_side()] {
        for (ops, dtype) in all()
            .iter()
            .flat_map(|ops| DTYPES.map(|dtype| (ops, dtype)))
        {
            let packed = weight(n, k, dtype);
            let values: Vec<f32> = noise(3, 40 * k).iter().map(|v| v * 0.7).collect();
            let then = Epilogue::Store(Some(Activation::Silu));
            let mut singles = Vec::new();
            for row in values.chunks(k) {
                let mut out = ops.buffer(1, n);
                ops.linear(&ops.upload(1, k, row), &packed, None, then, &mut out);
                singles.extend(ops.download(&out));
            }
            for rows in 1..=40 {
                let mut out = ops.buffer(rows, n);
                let x = ops.upload(rows, k, &values[..rows * k]);
                ops.linear(&x, &packed, None, then, &mut out);
                let what = format!("{} {dtype:?} {rows}x{k}x{n}", ops.isa());
                assert_same(&ops.download(&out), &singles[..rows * n], &what);
            }
        }
    }
}

/// A row of zeros gives the bias, a row with NaN or infinity NaN, and neither touches the others.
#[test]
fn rows_that_cannot_be_quantised_stay_among_themselves() {
    let (rows, n, k) = (14, 35, 131);
    let mut values = noise(8, rows * k);
    values[..k].fill(0.0);
    values[k..2 * k].fill(1e-41);
    values[2 * k + 130] = f32::NAN;
    values[3 * k] = f32::INFINITY;
    values[4 * k + 70] = f32::NEG_INFINITY;
    let bias = noise(4, n);
    for (ops, dtype) in all()
        .iter()
        .flat_map(|ops| DTYPES.map(|dtype| (ops, dtype)))
    {
        let what = format!("{} {dtype:?}", ops.isa());
        let packed = weight(n, k, dtype);
        let mut out = ops.buffer(rows, n);
        let x = ops.upload(rows, k, &values);
        let bias_vector = Vector::new(bias.clone());
        ops.linear(
            &x,
            &packed,
            Some(&bias_vector),
            Epilogue::Store(None),
            &mut out,
        );
        let found = ops.download(&out);
        assert_eq!(found[..n], bias, "{what}: zeros");
        assert_eq!(found[n..2 * n], bias, "{what}: next to nothing");
        let special = &found[2 * n..5 * n];
        assert!(special.iter().all(|v| v.is_nan()), "{what}: {special:?}");
        assert!(found[5 * n..].iter().all(|v| v.is_finite()), "{what}");
    }
}

#[test]
fn weights_that_are_not_finite_give_nan_where_they_are_used() {
    let (n, k) = (34, 200);
    for (dtype, row_is_nan) in [(WeightDtype::Q8, true), (WeightDtype::Q4, false)] {
        let mut values = noise(8, n * k);
        values[3 * k + 70] = f32::NAN;
        values[33 * k + 199] = f32::INFINITY;
        let rows = dense(&pack(&values, k, dtype));
        let nan = |row: usize, column: usize| rows[row * k + column].is_nan();
        assert_eq!(
            (nan(3, 0), nan(33, 0)),
            (row_is_nan, row_is_nan),
            "{dtype:?}"
        );
        assert!(nan(3, 70) && nan(33, 199), "{dtype:?}");
        assert!(
            (0..n * k).all(|i| i / k % 30 == 3 || !nan(i / k, i % k)),
            "{dtype:?}"
        );
    }
}

/// A file that is mapped: bytes that someone else keeps.
struct Mapped(PackedBytes);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

#[test]
fn packed_bytes_come_back_from_shared_memory() {
    let (n, k) = (70, 203);
    for dtype in DTYPES {
        let (first, second) = (weight(n, k, dtype), weight(n + 1, k, dtype));
        let (start, len) = (first.bytes(), second.bytes());
        assert_eq!((start % 64, len), (0, packed_len(n + 1, k, dtype)));
        let file = [first.packed_bytes(), second.packed_bytes()].concat();
        let owner = Arc::new(Mapped(PackedBytes::copied(&file)));
        let bytes = PackedBytes::shared(owner, start..start + len).unwrap();
        let again = Weight::from_packed(n + 1, k, dtype, bytes.clone()).unwrap();
        assert_same(&dense(&again), &dense(&second), &format!("{dtype:?}"));
        let x = matrix(3, 9, k);
        for ops in all() {
            let (mut out, mut out_again) = (ops.buffer(9, n + 1), ops.buffer(9, n + 1));
            ops.linear(&x, &second, None, Epilogue::Store(None), &mut out);
            ops.linear(&x, &again, None, Epilogue::Store(None), &mut out_again);
            assert_same(
                &ops.download(&out),
                &ops.download(&out_again),
                &format!("{} {dtype:?}", ops.isa()),
            );
        }
        assert!(Weight::from_packed(n + 40, k, dtype, bytes).is_err());
    }
}

#[test]
fn weights_too_deep_for_integer_sums_are_refused() {
    let packed = PackedBytes::copied(&[]);
    let error = Weight::from_packed(0, 131_073, WeightDtype::Q8, packed).unwrap_err();
    assert!(error.to_string().contains("131073"), "{error}");
}

/// Values of a normal distribution.
fn normal(len: usize) -> Vec<f32> {
    let sums = noise(17, 12 * len);
    sums.chunks(12)
        .map(|twelve| twelve.iter().sum::<f32>() / 2.0)
        .collect()
}

fn squared_error(values: &[f32], found: &[f32]) -> f64 {
    let differences = values.iter().zip(found).map(|(a, b)| f64::from(a - b));
    differences.map(|d| d * d).sum()
}

/// Squared error of 4-bit codes with the scale that puts the group's largest value (signed) at
/// `place` on the grid.
fn plain_error(values: &[f32], place: f32) -> f64 {
    let mut found = Vec::new();
    for group in values.chunks(64) {
        let larger = |a: f32, b: &f32| if b.abs() > a.abs() { *b } else { a };
        let scale = group.iter().fold(0.0, larger) / place;
        let code = |v: &f32| (v / scale).round_ties_even().clamp(-8.0, 7.0) * scale;
        found.extend(group.iter().map(code));
    }
    squared_error(values, &found)
}

/// On normal data, 4-bit codes leave less of the squared error than even steps do, with the largest
/// value at -8 or rounded symmetrically (at 7).
#[test]
fn searched_scales_beat_plain_rounding() {
    let (n, k) = (64, 1024);
    let values = normal(n * k);
    let searched = squared_error(&values, &dense(&pack(&values, k, WeightDtype::Q4)));
    for (place, most) in [(-8.0, 0.91), (7.0, 0.72)] {
        let ratio = searched / plain_error(&values, place);
        assert!(ratio < most, "{ratio} of the error of scales by {place}");
    }
}

/// What is a whole number of steps where it is quantised comes back as it was.
#[test]
fn weights_on_a_grid_come_back_exactly() {
    let (n, k, scale) = (33, 192, 15.0 / 4096.0);
    let levels = [
        -127.0, -88.0, -67.0, -50.0, -36.0, -23.0, -12.0, 0.0, 10.0, 20.0, 31.0, 43.0, 56.0, 71.0,
        92.0, 127.0,
    ];
    let noise = noise(5, n * k);
    let worst = |values: &[f32], dtype| {
        let found = dense(&pack(values, k, dtype));
        let differences = values.iter().zip(&found).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, f32::max) / scale
    };
    let on_grid = |to: &dyn Fn(f32) -> f32| -> Vec<f32> {
        let value = |(i, v): (usize, &f32)| if i % 64 == 5 { 127.0 } else { to(*v) };
        noise
            .iter()
            .enumerate()
            .map(value)
            .map(|v| v * scale)
            .collect()
    };
    let whole = on_grid(&|v| (v * 127.0).round());
    let whole: Vec<f32> = whole.chunks(k).flat_map(rotated).collect();
    assert!(worst(&whole, WeightDtype::Q8) <= 2e-4);
    let level = |v: f32| levels[((v + 1.0) * 8.0) as usize % 16];
    for sign in [1.0, -1.0] {
        let values: Vec<f32> = on_grid(&level).iter().map(|v| v * sign).collect();
        assert_eq!(worst(&values, WeightDtype::Q4), 0.0);
    }
}
