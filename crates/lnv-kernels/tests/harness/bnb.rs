//! Weights of bitsandbytes: packing, rows, products.

use lnv_kernels::{
    Activation, Bnb4, Code4, Compute, Epilogue, Int8, PackedBytes, Vector, Weight, WeightData,
    WeightDtype, WeightPart, bnb, packed_len,
};

use crate::{all, assert_close, assert_same, matrix, noise, oracle, side_by_side, vector};

const fn bnb4(code: Code4, compute: Compute) -> WeightDtype {
    WeightDtype::Bnb4(Bnb4 { code, compute })
}

const FOUR: [WeightDtype; 4] = [
    bnb4(Code4::Nf4, Compute::F32),
    bnb4(Code4::Nf4, Compute::Bf16),
    bnb4(Code4::Fp4, Compute::F32),
    bnb4(Code4::Fp4, Compute::Bf16),
];

fn dtypes() -> [WeightDtype; 6] {
    let [a, b, c, d] = FOUR;
    let int8 = |threshold| WeightDtype::Int8(Int8::new(threshold));
    [a, b, c, d, int8(6.0), int8(0.0)]
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn pack(values: &[f32], k: usize, dtype: WeightDtype) -> Weight {
    let (bytes, n) = (bytes(values), values.len() / k);
    let data = WeightData::F32(&bytes);
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

/// Rows whose values are within -1 and 1, but for every seventh row, which has a few large ones.
fn rows_with_outliers(rows: usize, k: usize) -> Vec<f32> {
    let mut values = noise(rows + 7, rows * k);
    for row in values.chunks_mut(k).skip(2).step_by(7) {
        for (i, large) in [(0, 6.0), (k / 2, -40.0), (k - 1, 300.5)] {
            row[i] = large;
        }
    }
    values
}

#[test]
fn codes_and_floats_pack_to_the_same_bytes_and_back_to_the_values() {
    for (n, k) in [(1, 64), (33, 192), (70, 576)] {
        let values = noise(n + k, n * k);
        let float_bytes = bytes(&values);
        let floats = WeightData::F32(&float_bytes);
        for dtype in dtypes() {
            let what = format!("{dtype:?} {n}x{k}");
            let (codes, scales, expected) = match dtype {
                WeightDtype::Bnb4(Bnb4 { code, .. }) => {
                    let (codes, absmax) = bnb::quantize_4bit(&values, 64, code);
                    let dense = bnb::dequantize_4bit(&codes, &absmax, 64, code, n * k);
                    (codes, absmax, dense)
                }
                _ => {
                    let (codes, scb) = bnb::quantize_int8(&values, k);
                    let dense = bnb::dequantize_int8(&codes, &scb, k);
                    (codes, scb, dense)
                }
            };
            let (codes, scales) = (&codes[..], &scales[..]);
            let data = match dtype {
                WeightDtype::Int8(_) => WeightData::Int8 { codes, scb: scales },
                _ => WeightData::Bnb4 {
                    codes,
                    absmax: scales,
                },
            };
            let parts = [WeightPart::new(data, n), WeightPart::new(floats, n)];
            let given = oracle().pack(&parts[..1], k, dtype).unwrap();
            let made = oracle().pack(&parts[1..], k, dtype).unwrap();
            assert_eq!(given.packed_bytes(), made.packed_bytes(), "{what}");
            assert_eq!(given.bytes(), packed_len(n, k, dtype), "{what}");
            assert_same(&dense(&given), &expected, &what);
            let both = oracle().pack(&parts, k, dtype).unwrap();
            assert_same(&dense(&both)[n * k..], &expected, &what);
            let copy = PackedBytes::copied(both.packed_bytes());
            let again = Weight::from_packed(2 * n, k, dtype, copy).unwrap();
            assert_same(&dense(&again), &dense(&both), &what);
            let wrong = match data {
                WeightData::Int8 { codes, .. } => WeightData::Int8 { codes, scb: &[] },
                _ => WeightData::Bnb4 { codes, absmax: &[] },
            };
            let wrong = [WeightPart::new(wrong, n)];
            let error = oracle().pack(&wrong, k, dtype).unwrap_err();
            assert!(error.to_string().contains("bytes"), "{error}");
        }
    }
}

/// The reference itself, against the definition on the dense matrix.
#[test]
fn the_reference_is_the_definition() {
    let (rows, n, k) = (9, 37, 192);
    let mut x: Vec<f32> = noise(1, rows * k)
        .iter()
        .map(|v| (v * 126.0).round())
        .collect();
    x.iter_mut().step_by(k).for_each(|first| *first = 127.0);
    for dtype in dtypes() {
        let packed = weight(n, k, dtype);
        let (w, ops) = (dense(&packed), oracle());
        let mut out = ops.buffer(rows, n);
        let x_rows = ops.upload(rows, k, &x);
        ops.linear(&x_rows, &packed, None, Epilogue::Store(None), &mut out);
        let expected = (0..rows * n).map(|i| {
            let (row, column) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
            let products = row.iter().zip(column);
            products
                .map(|(x, w)| f64::from(*x) * f64::from(*w))
                .sum::<f64>() as f32
        });
        let expected: Vec<f32> = expected.collect();
        let found = ops.download(&out);
        let largest = expected.iter().fold(0.0f32, |a, v| a.max(v.abs()));
        let allowed = match dtype {
            // NF4's values are rounded to bf16, activations below the threshold to 8 bits.
            dtype if dtype == FOUR[1] => 2e-3,
            WeightDtype::Int8(of) if of.threshold() > 0.0 => 2e-3,
            _ => 1e-6,
        } * largest;
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() <= allowed,
                "{dtype:?}: {found} for {expected}"
            );
        }
    }
}

/// Activations beyond the threshold are exact, and the others keep their small step.
#[test]
fn outliers_are_not_quantised() {
    let (n, k) = (40, 256);
    let packed = weight(n, k, WeightDtype::Int8(Int8::new(6.0)));
    let w = dense(&packed);
    let mut x = noise(4, k);
    x[17] = 1000.0;
    x[200] = -6.0;
    for ops in all() {
        let mut out = ops.buffer(1, n);
        ops.linear(
            &ops.upload(1, k, &x),
            &packed,
            None,
            Epilogue::Store(None),
            &mut out,
        );
        for (found, column) in ops.download(&out).iter().zip(w.chunks(k)) {
            let expected: f64 = x
                .iter()
                .zip(column)
                .map(|(x, w)| f64::from(*x) * f64::from(*w))
                .sum();
            let error = (f64::from(*found) - expected).abs();
            assert!(error < 0.2, "{}: {found} for {expected}", ops.isa());
        }
    }
}

#[test]
fn every_format_and_size_agrees() {
    for (n, k) in [
        (1, 64),
        (31, 128),
        (33, 64),
        (70, 576),
        (96, 1536),
        (40, 3008),
    ] {
        for dtype in dtypes() {
            for rows in [1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 17, 25, 40] {
                compare(rows, n, k, dtype);
            }
        }
    }
}

/// Blocks of rows, of k and groups of panels, all at once.
#[test]
fn large_sizes_agree() {
    for dtype in dtypes() {
        compare(700, 300, 4672, dtype);
    }
}

/// Rows of LLM.int8() that are no multiple of anything.
#[test]
fn odd_rows_of_int8_agree() {
    for (n, k) in [(1, 1), (31, 7), (70, 129), (40, 3001)] {
        for rows in [1, 3, 13, 30] {
            compare(rows, n, k, WeightDtype::Int8(Int8::new(6.0)));
        }
    }
}

/// 8-bit products have the same bits everywhere; 4-bit ones differ by the rounding of a sum.
fn compare(rows: usize, n: usize, k: usize, dtype: WeightDtype) {
    let bias = vector(5, n);
    let is_int8 = matches!(dtype, WeightDtype::Int8(_));
    let x = if is_int8 {
        oracle().upload(rows, k, &rows_with_outliers(rows, k))
    } else {
        matrix(rows, rows, k)
    };
    let mut expected = matrix(9, rows, n);
    let packed = weight(n, k, dtype);
    oracle().linear(&x, &packed, Some(&bias), Epilogue::Add, &mut expected);
    for ops in all() {
        let what = format!("{} {dtype:?} {rows}x{k}x{n}", ops.isa());
        let mut out = matrix(9, rows, n);
        ops.linear(&x, &packed, Some(&bias), Epilogue::Add, &mut out);
        if is_int8 {
            assert_same(&ops.download(&out), &ops.download(&expected), &what);
        } else {
            let tolerance = 3e-7 * (k as f32).sqrt().max(8.0);
            assert_close(&out, &expected, tolerance, &what);
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    for (n, k) in [(45, 64), (64, 4544), (side_by_side().0, 128)] {
        for (ops, dtype) in all()
            .iter()
            .flat_map(|ops| dtypes().map(|dtype| (ops, dtype)))
        {
            let packed = weight(n, k, dtype);
            let values: Vec<f32> = rows_with_outliers(40, k).iter().map(|v| v * 1.1).collect();
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

/// A row of zeros gives the bias, a row with NaN or infinity no number, and neither touches the
/// others.
#[test]
fn rows_that_are_no_numbers_stay_among_themselves() {
    let (rows, n, k) = (14, 35, 192);
    let mut values = noise(8, rows * k);
    values[..k].fill(0.0);
    values[2 * k + 130] = f32::NAN;
    values[3 * k] = f32::INFINITY;
    values[4 * k + 70] = f32::NEG_INFINITY;
    let bias = noise(4, n);
    for (ops, dtype) in all()
        .iter()
        .flat_map(|ops| dtypes().map(|dtype| (ops, dtype)))
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
        assert!(
            found[2 * n..3 * n].iter().all(|v| v.is_nan()),
            "{what}: NaN"
        );
        let infinite = &found[3 * n..5 * n];
        assert!(
            infinite.iter().all(|v| !v.is_finite()),
            "{what}: {infinite:?}"
        );
        assert!(found[5 * n..].iter().all(|v| v.is_finite()), "{what}");
        assert!(found[n..2 * n].iter().all(|v| v.is_finite()), "{what}");
    }
}

#[test]
fn depths_that_do_not_divide_are_refused() {
    let packed = PackedBytes::copied(&[]);
    let error = Weight::from_packed(0, 96, FOUR[0], packed.clone()).unwrap_err();
    assert!(error.to_string().contains("no multiple of 64"), "{error}");
    let int8 = WeightDtype::Int8(Int8::new(6.0));
    let error = Weight::from_packed(0, 131_073, int8, packed).unwrap_err();
    assert!(error.to_string().contains("131073"), "{error}");
}
