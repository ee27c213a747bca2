//! The operations on a GPU, or on the emulated one, held against the scalar reference.
//!
//! Runs where `LNV_DEVICE` names a CUDA device and says so where it does not. Every case is a function of
//! the operations that gives values: it is run with the reference and with the GPU in each type, on the same
//! inputs. Those have 8 significant bits, so that they are exact in every type; what is computed in between is
//! rounded to the type of scratch, and the tolerance says how much that may be.

use lnv_kernels::{
    Activation, AttentionShape, Bnb4, Buffer, Code4, Compute, Device, Epilogue, Heads, Int8,
    KV_BLOCK, KvDtype, Ops, PatchGeometry, PoolMode, Precision, Slot, Span, Vector, Weight,
    WeightData, WeightDtype, WeightPart,
};

use crate::{noise, oracle};

/// The GPU's operations in the three types, with the rounding of each; none where there is no GPU.
fn gpus() -> Vec<(Ops, f32)> {
    let device = Device::preferred().expect("LNV_DEVICE names a device");
    if device == Device::Cpu {
        eprintln!("skipped: LNV_DEVICE names no CUDA device");
        return Vec::new();
    }
    let types = [
        (WeightDtype::F32, 2e-6),
        (WeightDtype::Bf16, 1.0 / 128.0),
        (WeightDtype::F16, 1.0 / 1024.0),
    ];
    let open = |(dtype, rounding)| (Ops::of_type(device, dtype).expect("a GPU"), rounding);
    types.map(open).into()
}

/// Runs a case with the reference and with every type, and compares: `roundings` of the type for values of
/// about 1.
#[track_caller]
fn compare(what: &str, roundings: f32, case: impl Fn(&Ops) -> Vec<f32>) {
    let expected = case(&oracle());
    for (ops, rounding) in gpus() {
        let found = case(&ops);
        assert_eq!(found.len(), expected.len(), "{what}");
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let allowed = roundings * rounding * expected.abs().max(1.0);
            let near = (found - expected).abs() <= allowed || (found.is_nan() && expected.is_nan());
            assert!(near, "{what} {ops:?}: {i}: {found} for {expected}");
        }
    }
}

/// A matrix in f32.
fn wide(ops: &Ops, seed: usize, rows: usize, cols: usize) -> Buffer {
    ops.upload(rows, cols, &noise(seed, rows * cols))
}

/// A matrix in the type of scratch.
fn scratch(ops: &Ops, seed: usize, rows: usize, cols: usize) -> Buffer {
    let mut buffer = ops.scratch(rows, cols);
    ops.write_rows(&mut buffer, 0, &noise(seed, rows * cols));
    buffer
}

fn vector(seed: usize, len: usize) -> Vector {
    Vector::new(noise(seed, len))
}

#[test]
fn norms_agree() {
    for (rows, cols) in [
        (1, 1),
        (2, 7),
        (40, 33),
        (3, 100),
        (2, 1025),
        (2, 4096),
        (1, 9000),
    ] {
        compare("rms_norm", 2.0, |ops| {
            let mut out = ops.scratch(rows, cols);
            let x = wide(ops, 1, rows, cols);
            ops.rms_norm(&x, &vector(2, cols), 1e-6, &mut out);
            ops.download(&out)
        });
        compare("layer_norm", 4.0, |ops| {
            let mut out = ops.scratch(rows, cols);
            let x = wide(ops, 1, rows, cols);
            ops.layer_norm(&x, &vector(2, cols), &vector(3, cols), 1e-5, &mut out);
            ops.download(&out)
        });
    }
}

#[test]
fn activations_agree() {
    let acts = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::QuickGelu,
        Activation::Relu,
    ];
    let values: Vec<f32> = (-1200..1200).map(|i| i as f32 / 64.0).collect();
    for act in acts {
        compare("activate", 1.5, |ops| {
            let mut x = ops.upload(24, 100, &values);
            ops.activate(&mut x, act);
            ops.download(&x)
        });
        for half in [50, 7] {
            compare("gated", 2.0, |ops| {
                let x = scratch(ops, 5, 9, 2 * half);
                let mut out = ops.scratch(9, half);
                ops.gated_activation(&x, act, &mut out);
                ops.download(&out)
            });
        }
    }
}

#[test]
fn rows_and_columns_are_put_in_place() {
    for cols in [2, 8, 100] {
        compare("copies", 1.0, |ops| {
            let src = scratch(ops, 1, 3, cols);
            let mut dst = ops.buffer(5, cols);
            ops.copy_rows(&src, &[2, 0], &mut dst, &[1, 3]);
            ops.broadcast_row(&vector(7, cols), &mut dst, &[0]);
            ops.write_rows(&mut dst, 2, &noise(8, cols));
            ops.add_rows(&mut dst, &wide(ops, 9, 2, cols));
            ops.scale_columns(&mut dst, &vector(10, cols));
            let mut wider = ops.buffer(3, cols + 3);
            ops.copy_columns(&src, &mut wider, 2);
            [ops.download(&dst), ops.download(&wider)].concat()
        });
    }
}

#[test]
fn patches_and_pools_agree() {
    let pixels = noise(1, 2 * 3 * 30 * 29);
    let pictures: Vec<&[f32]> = pixels.chunks(3 * 30 * 29).collect();
    compare("patchify", 1.0, |ops| {
        let geometry = PatchGeometry {
            channels: 3,
            height: 30,
            width: 29,
            patch: 7,
        };
        let mut out = ops.scratch(2 * 4 * 4, 3 * 49);
        ops.patchify(&pictures, geometry, &mut out);
        ops.download(&out)
    });
    for mode in [PoolMode::Average, PoolMode::Max] {
        compare("pool", 1.0, |ops| {
            let mut out = ops.scratch(2 * 4, 36);
            ops.pool(&scratch(ops, 3, 2 * 25, 36), 5, 2, mode, &mut out);
            ops.download(&out)
        });
    }
    compare("pool_windows", 1.0, |ops| {
        let mut out = ops.scratch(2 * 4, 4 * 36);
        ops.pool_windows(&scratch(ops, 3, 2 * 25, 36), 5, 2, &mut out);
        ops.download(&out)
    });
}

/// A weight `[n, k]` of noise in a format.
fn weight(ops: &Ops, n: usize, k: usize, dtype: WeightDtype) -> Weight {
    let values: Vec<f32> = noise(n + 7 * k, n * k).iter().map(|v| v / 4.0).collect();
    let part = WeightPart::new(WeightData::F32(bytemuck::cast_slice(&values)), n);
    ops.pack(&[part], k, dtype).expect("sizes fit")
}

/// What the reference computes with the weight's values, and activations that are not rounded.
fn product(
    ops: &Ops,
    shape: (usize, usize, usize),
    dtype: WeightDtype,
    then: Epilogue,
    bias: bool,
) -> Vec<f32> {
    let (rows, n, k) = shape;
    let bias = bias.then(|| vector(4, n));
    let x = scratch(ops, 1, rows, k);
    let mut out = match then {
        Epilogue::Add => wide(ops, 2, rows, n),
        Epilogue::Store(_) => ops.scratch(rows, n),
    };
    let w = as_multiplied(ops, weight(ops, n, k, dtype));
    ops.linear(&x, &w, bias.as_ref(), then, &mut out);
    ops.download(&out)
}

/// The weight for a GPU, and its values as f32 for the reference, which rounds activations for some formats.
fn as_multiplied(ops: &Ops, packed: Weight) -> Weight {
    if ops.is_cuda() {
        return packed;
    }
    let (n, k) = (packed.n(), packed.k());
    let all: Vec<u32> = (0..n as u32).collect();
    let mut values = ops.buffer(n, k);
    ops.gather(&packed, &all, &mut values);
    let values = ops.download(&values);
    let part = WeightPart::new(WeightData::F32(bytemuck::cast_slice(&values)), n);
    ops.pack(&[part], k, WeightDtype::F32).expect("sizes fit")
}

const FORMATS: [WeightDtype; 7] = [
    WeightDtype::F32,
    WeightDtype::Bf16,
    WeightDtype::Q8,
    WeightDtype::Q4,
    WeightDtype::Bnb4(Bnb4 {
        code: Code4::Nf4,
        compute: Compute::Bf16,
    }),
    WeightDtype::Bnb4(Bnb4 {
        code: Code4::Fp4,
        compute: Compute::F32,
    }),
    WeightDtype::F16,
];

#[test]
fn products_agree_for_few_rows_and_many() {
    for dtype in FORMATS
        .into_iter()
        .chain([WeightDtype::Int8(Int8::new(6.0))])
    {
        let shapes: &[(usize, usize, usize)] = match dtype {
            WeightDtype::Bnb4(_) => &[
                (1, 33, 128),
                (2, 96, 192),
                (5, 40, 64),
                (17, 65, 128),
                (70, 130, 192),
            ],
            _ => &[
                (1, 1, 1),
                (1, 40, 72),
                (2, 33, 130),
                (3, 64, 64),
                (9, 31, 67),
                (16, 96, 256),
                (33, 50, 40),
                (150, 131, 200),
            ],
        };
        for shape in shapes {
            for (then, bias) in [
                (Epilogue::Store(None), false),
                (Epilogue::Store(Some(Activation::QuickGelu)), true),
                (Epilogue::Add, true),
                (Epilogue::Add, false),
            ] {
                // Rotated weights and those in T are rounded once more, over a sum of k products.
                let what = format!("{dtype:?} {shape:?} {then:?} {bias}");
                compare(&what, 8.0, |ops| product(ops, *shape, dtype, then, bias));
            }
        }
    }
}

#[test]
fn a_gated_product_agrees() {
    let nf4 = WeightDtype::Bnb4(Bnb4 {
        code: Code4::Nf4,
        compute: Compute::Bf16,
    });
    for dtype in [WeightDtype::F32, WeightDtype::Bf16, nf4] {
        for (rows, f, k) in [(1, 64, 128), (3, 96, 256), (40, 64, 64), (2, 33, 64)] {
            compare(&format!("gated {dtype:?} {rows} {f} {k}"), 8.0, |ops| {
                let x = scratch(ops, 1, rows, k);
                let (mut gate_up, mut out) = (ops.scratch(rows, 2 * f), ops.scratch(rows, f));
                let w = as_multiplied(ops, weight(ops, 2 * f, k, dtype));
                ops.gated_linear(&x, &w, None, Activation::Silu, (&mut gate_up, &mut out));
                ops.download(&out)
            });
        }
    }
}

#[test]
fn rows_of_weights_are_gathered() {
    for dtype in FORMATS {
        let k = if matches!(dtype, WeightDtype::Bnb4(_)) {
            128
        } else {
            70
        };
        compare(&format!("gather {dtype:?}"), 4.0, |ops| {
            let mut out = ops.buffer(3, k);
            ops.gather(&weight(ops, 40, k, dtype), &[39, 0, 7], &mut out);
            ops.download(&out)
        });
    }
}

/// Attention over a paged cache: spans of one query and of many, with shared heads, a window, any head size.
#[test]
fn paged_attention_agrees() {
    let cases = [
        (4, 2, 64, None, KvDtype::Bf16),
        (4, 4, 128, Some(70), KvDtype::Bf16),
        (2, 2, 128, None, KvDtype::Int8),
        (6, 2, 40, None, KvDtype::Bf16),
        (2, 1, 128, None, KvDtype::Int8),
        (4, 1, 64, Some(3), KvDtype::F32),
        (8, 1, 128, None, KvDtype::Bf16),
    ];
    for (heads, kv_heads, head_dim, window, dtype) in cases {
        let heads = Heads {
            heads,
            kv_heads,
            head_dim,
        };
        // (queries, tokens in the cache): a prompt whole, its end, one token, and few.
        for lengths in [
            vec![(1, 1)],
            vec![(130, 130)],
            vec![(1, 200), (70, 150), (1, 65), (3, 64)],
        ] {
            let what = format!("{heads:?} {window:?} {dtype:?} {lengths:?}");
            compare(&what, 6.0, |ops| {
                attend(ops, heads, window, dtype, &lengths)
            });
        }
    }
}

fn attend(
    ops: &Ops,
    heads: Heads,
    window: Option<usize>,
    dtype: KvDtype,
    lengths: &[(usize, usize)],
) -> Vec<f32> {
    let per = 5; // blocks of a sequence
    // On a GPU this type means that of scratch, which the tolerance speaks of.
    let dtype = match dtype {
        KvDtype::Bf16 if !ops.is_cuda() => KvDtype::F32,
        dtype => dtype,
    };
    let mut cache = ops
        .kv_cache(2, heads, per * lengths.len(), dtype)
        .expect("room");
    // Neighbouring tokens of a sequence in blocks that are not neighbours.
    let blocks: Vec<Vec<u32>> = (0..lengths.len())
        .map(|s| {
            (0..per)
                .map(|b| (b * lengths.len() + lengths.len() - 1 - s) as u32)
                .collect()
        })
        .collect();
    let total: usize = lengths.iter().map(|(_, kv)| kv).sum();
    let slots: Vec<Slot> = lengths
        .iter()
        .zip(&blocks)
        .flat_map(|((_, kv), blocks)| {
            (0..*kv).map(|t| Slot {
                block: blocks[t / KV_BLOCK],
                offset: (t % KV_BLOCK) as u32,
            })
        })
        .collect();
    let angles: Vec<f32> = (0..total * heads.head_dim / 2)
        .map(|i| i as f32 * 0.37)
        .collect();
    let half = heads.head_dim / 2;
    let table: Vec<f32> = angles
        .chunks(half)
        .flat_map(|row| {
            row.iter()
                .map(|a| a.cos())
                .chain(row.iter().map(|a| a.sin()))
        })
        .collect();
    let mut all = scratch(ops, 11, total, heads.qkv_cols());
    let cos_sin = ops.upload(total, heads.head_dim, &table);
    ops.rope_write_kv(&mut all, &cos_sin, heads, &mut cache, 1, &slots);
    // The queries: the last of each sequence.
    let (mut rows, mut first) = (Vec::new(), 0);
    let mut spans = Vec::new();
    for ((q, kv), blocks) in lengths.iter().zip(&blocks) {
        spans.push(Span {
            q_start: rows.len(),
            q_len: *q,
            kv_len: *kv,
            blocks,
        });
        rows.extend((first + kv - q..first + kv).map(|row| row as u32));
        first += kv;
    }
    let mut qkv = ops.scratch(rows.len(), heads.qkv_cols());
    let here: Vec<u32> = (0..rows.len() as u32).collect();
    ops.copy_rows(&all, &rows, &mut qkv, &here);
    let shape = AttentionShape {
        heads,
        scale: (heads.head_dim as f32).powf(-0.5),
        window,
    };
    let mut out = ops.scratch(rows.len(), heads.heads * heads.head_dim);
    ops.paged_attention(&qkv, &cache, 1, &spans, &shape, &mut out);
    let mut found = ops.download(&out);
    let weights = ops.paged_attention_eager(&qkv, &cache, 1, &spans, &shape, &mut out);
    found.extend(ops.download(&out));
    found.extend(weights.concat());
    found
}

#[test]
fn full_attention_agrees() {
    for (heads, kv_heads, head_dim, len) in [
        (2, 2, 64, 70),
        (4, 4, 72, 33),
        (2, 1, 128, 65),
        (3, 3, 16, 130),
        (1, 1, 64, 1),
    ] {
        let heads = Heads {
            heads,
            kv_heads,
            head_dim,
        };
        compare(&format!("{heads:?} {len}"), 4.0, |ops| {
            let qkv = scratch(ops, 3, 2 * len, heads.qkv_cols());
            let mut out = ops.scratch(2 * len, heads.heads * heads.head_dim);
            ops.full_attention(&qkv, len, heads, (0.125, Precision::Bf16), &mut out);
            ops.download(&out)
        });
    }
}

#[test]
fn a_cache_grows_and_blocks_are_copied() {
    let heads = Heads {
        heads: 2,
        kv_heads: 2,
        head_dim: 64,
    };
    compare("cache", 6.0, |ops| {
        let mut cache = ops.kv_cache(1, heads, 1, KvDtype::Bf16).expect("room");
        let mut qkv = scratch(ops, 1, 64, heads.qkv_cols());
        let table = ops.upload(64, 64, &[[1.0; 32], [0.0; 32]].concat().repeat(64));
        let slots: Vec<Slot> = (0..64).map(|offset| Slot { block: 0, offset }).collect();
        ops.rope_write_kv(&mut qkv, &table, heads, &mut cache, 0, &slots);
        cache.grow(4).expect("room");
        cache.copy_block(0, 3);
        let mut out = ops.scratch(1, 128);
        let span = Span {
            q_start: 0,
            q_len: 1,
            kv_len: 64,
            blocks: &[3],
        };
        let shape = AttentionShape {
            heads,
            scale: 0.125,
            window: None,
        };
        let mut one = ops.scratch(1, heads.qkv_cols());
        ops.copy_rows(&qkv, &[5], &mut one, &[0]);
        ops.paged_attention(&one, &cache, 0, &[span], &shape, &mut out);
        ops.download(&out)
    });
}

/// More lists of rows than are kept, one of them used all along: it must not be forgotten while it is in use.
#[test]
fn many_lists_of_rows_do_not_get_into_each_others_way() {
    compare("copies", 1.0, |ops| {
        let src = scratch(ops, 1, 3, 8);
        let mut dst = ops.buffer(700, 8);
        for i in 0..699 {
            ops.copy_rows(&src, &[2, 0], &mut dst, &[i, i + 1]);
        }
        ops.download(&dst)
    });
}
