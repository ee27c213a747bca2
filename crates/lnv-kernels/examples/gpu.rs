//! Times the operations of a GPU at the 7B's sizes: `cargo run --release -p lnv-kernels --features cuda
//! --example gpu [PART]`, where PART is a part of the names to be timed.
//!
//! Each line: what, microseconds, and the share of the GPU's limits measured in the same run: of its read
//! bandwidth for few rows, of its largest matrix product for many. Weights take turns, so that none stays in
//! a cache from one call to the next.

use std::time::Instant;

use lnv_kernels::{
    Activation, AttentionShape, Bnb4, Code4, Compute, Device, Epilogue, Heads, KV_BLOCK,
    KernelError, KvDtype, Ops, Precision, Slot, Span, Vector, Weight, WeightData, WeightDtype,
    WeightPart, probe,
};

/// The shapes of the 7B: outputs, inputs.
const SHAPES: [(&str, usize, usize); 5] = [
    ("qkv", 12288, 4096),
    ("o", 4096, 4096),
    ("gate_up", 22016, 4096),
    ("down", 4096, 11008),
    ("head", 32064, 4096),
];
/// Those of the tower.
const TOWER: [(&str, usize, usize); 4] = [
    ("v_qkv", 3072, 1024),
    ("v_out", 1024, 1024),
    ("v_fc1", 4096, 1024),
    ("v_fc2", 1024, 4096),
];
/// The 7B's heads.
const HEADS: Heads = Heads {
    heads: 32,
    kv_heads: 32,
    head_dim: 128,
};
/// Bytes of weights that take turns: more than a GPU's caches.
const TURNS: usize = 256 << 20;

struct Bench {
    ops: Ops,
    only: String,
    flops: f64,
    bytes_s: f64,
}

impl Bench {
    /// Times `work`, which is given the number of its turn.
    fn line(&self, name: &str, (flops, bytes): (f64, f64), mut work: impl FnMut(usize)) {
        if !name.contains(&self.only) {
            return;
        }
        (0..3).for_each(&mut work);
        let mut times = Vec::new();
        for _ in 0..7 {
            self.ops.wait();
            let start = Instant::now();
            (0..10).for_each(&mut work);
            self.ops.wait();
            times.push(start.elapsed().as_secs_f64() / 10.0);
        }
        times.sort_by(f64::total_cmp);
        let s = times[times.len() / 2];
        let (of_flops, of_bytes) = (flops / s / self.flops, bytes / s / self.bytes_s);
        println!(
            "{name:<34} {:>9.1} us  {:>7.1} TFLOP/s {:>5.1} %  {:>7.1} GB/s {:>5.1} %",
            s * 1e6,
            flops / s / 1e12,
            100.0 * of_flops,
            bytes / s / 1e9,
            100.0 * of_bytes
        );
    }

    fn weights(&self, n: usize, k: usize, dtype: WeightDtype) -> Result<Vec<Weight>, KernelError> {
        let values: Vec<u16> = noise(n * k / 64 + 1)
            .iter()
            .map(|v| (v.to_bits() >> 16) as u16)
            .cycle()
            .take(n * k)
            .collect();
        let part = WeightPart::new(WeightData::Bf16(bytemuck::cast_slice(&values)), n);
        let first = self.ops.pack(&[part], k, dtype)?;
        let mut all = vec![];
        while all.len() * first.bytes() < TURNS {
            all.push(self.ops.duplicate(&first)?);
        }
        Ok(all)
    }

    fn linears(
        &self,
        shapes: &[(&str, usize, usize)],
        rows: &[usize],
        dtype: WeightDtype,
        format: &str,
    ) -> Result<(), KernelError> {
        for (name, n, k) in shapes {
            if !format!("{format} {name}").contains(&self.only) && !self.only.contains(format) {
                continue;
            }
            let weights = self.weights(*n, *k, dtype)?;
            for rows in rows {
                let mut x = self.ops.scratch(*rows, *k);
                let values: Vec<f32> = repeated(4 * k, rows * k);
                self.ops.write_rows(&mut x, 0, &values);
                let mut out = self.ops.scratch(*rows, *n);
                let bytes = weights[0].bytes() as f64 + (rows * (n + k) * 2) as f64;
                let flops = 2.0 * (rows * n * k) as f64;
                self.line(&format!("{format} {name} {rows}"), (flops, bytes), |turn| {
                    let w = &weights[turn % weights.len()];
                    self.ops
                        .linear(&x, w, None, Epilogue::Store(None), &mut out);
                });
                let mut residual = self.ops.buffer(*rows, *n);
                self.line(
                    &format!("{format} {name} {rows} add"),
                    (flops, bytes),
                    |turn| {
                        let w = &weights[turn % weights.len()];
                        self.ops.linear(&x, w, None, Epilogue::Add, &mut residual);
                    },
                );
            }
        }
        Ok(())
    }

    fn rows(&self, rows: usize) {
        let ops = &self.ops;
        let wide = |cols: usize| {
            let values: Vec<f32> = repeated(4 * cols, rows * cols);
            ops.upload(rows, cols, &values)
        };
        let (x, weight) = (wide(4096), Vector::new(noise(4096)));
        let mut out = ops.scratch(rows, 4096);
        let bytes = (rows * 4096 * 6) as f64;
        self.line(&format!("rms_norm {rows}"), (0.0, bytes), |_| {
            ops.rms_norm(&x, &weight, 1e-5, &mut out);
        });
        let mut gate_up = ops.scratch(rows, 22016);
        let values: Vec<f32> = repeated(4 * 22016, rows * 22016);
        ops.write_rows(&mut gate_up, 0, &values);
        let mut inner = ops.scratch(rows, 11008);
        let bytes = (rows * 11008 * 6) as f64;
        self.line(&format!("gated {rows}"), (0.0, bytes), |_| {
            ops.gated_activation(&gate_up, Activation::Silu, &mut inner);
        });
        let (x, weight, bias) = (
            wide(1024),
            Vector::new(noise(1024)),
            Vector::new(noise(1024)),
        );
        let mut out = ops.scratch(rows, 1024);
        let bytes = (rows * 1024 * 6) as f64;
        self.line(&format!("layer_norm {rows}"), (0.0, bytes), |_| {
            ops.layer_norm(&x, &weight, &bias, 1e-5, &mut out);
        });
    }

    /// Attention of `sequences` sequences of `kv` tokens, of which the last `q` ask.
    fn attention(
        &self,
        (sequences, q, kv): (usize, usize, usize),
        dtype: KvDtype,
    ) -> Result<(), KernelError> {
        let name = format!("attention {sequences}x{q} of {kv} {dtype}");
        if !name.contains(&self.only) {
            return Ok(());
        }
        let ops = &self.ops;
        let heads = HEADS;
        let per = kv.div_ceil(KV_BLOCK);
        let mut cache = ops.kv_cache(1, heads, per * sequences, dtype)?;
        let blocks: Vec<u32> = (0..(per * sequences) as u32).collect();
        let fill = |rows: usize| {
            let cols = heads.qkv_cols();
            let values: Vec<f32> = repeated(4 * cols, rows * cols);
            let mut qkv = ops.scratch(rows, cols);
            ops.write_rows(&mut qkv, 0, &values);
            qkv
        };
        let table: Vec<f32> = [[1.0; 64], [0.0; 64]].concat().repeat(kv);
        let cos_sin = ops.upload(kv, 128, &table);
        let mut all = fill(kv);
        for blocks in blocks.chunks(per) {
            let slots: Vec<Slot> = (0..kv)
                .map(|t| Slot {
                    block: blocks[t / KV_BLOCK],
                    offset: (t % KV_BLOCK) as u32,
                })
                .collect();
            ops.rope_write_kv(&mut all, &cos_sin, heads, &mut cache, 0, &slots);
        }
        let qkv = fill(sequences * q);
        let spans: Vec<Span<'_>> = blocks
            .chunks(per)
            .enumerate()
            .map(|(i, blocks)| Span {
                q_start: i * q,
                q_len: q,
                kv_len: kv,
                blocks,
            })
            .collect();
        let shape = AttentionShape {
            heads,
            scale: 0.088,
            window: None,
        };
        let mut out = ops.scratch(sequences * q, 4096);
        let seen: f64 = (0..q).map(|i| (kv - q + i + 1) as f64).sum();
        let flops = 4.0 * 4096.0 * seen * sequences as f64;
        let bytes = (sequences * kv * dtype.bytes_per_token(&heads)) as f64;
        self.line(&name, (flops, bytes), |_| {
            ops.paged_attention(&qkv, &cache, 0, &spans, &shape, &mut out);
        });
        if q == kv || sequences > 1 {
            return Ok(());
        }
        let mut one = fill(1);
        let angles = ops.upload(1, 128, &table[..128]);
        self.line("rope_write_kv 1", (0.0, 0.0), |_| {
            let slot = [Slot {
                block: 0,
                offset: 0,
            }];
            ops.rope_write_kv(&mut one, &angles, heads, &mut cache, 0, &slot);
        });
        Ok(())
    }

    /// What one token costs in a decoder's layers: as a model runs them, 32 times.
    fn layers(&self, dtype: WeightDtype, format: &str, kv: usize) -> Result<(), KernelError> {
        let name = format!("layers {format} of {kv}");
        if !name.contains(&self.only) {
            return Ok(());
        }
        let ops = &self.ops;
        let heads = HEADS;
        let weights: Vec<Vec<Weight>> = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
            .into_iter()
            .map(|(n, k)| self.weights(n, k, dtype))
            .collect::<Result<_, _>>()?;
        let blocks: Vec<u32> = (0..kv.div_ceil(KV_BLOCK) as u32).collect();
        let mut cache = ops.kv_cache(32, heads, blocks.len(), KvDtype::Bf16)?;
        let span = Span {
            q_start: 0,
            q_len: 1,
            kv_len: kv,
            blocks: &blocks,
        };
        let slot = [Slot {
            block: *blocks.last().unwrap_or(&0),
            offset: 0,
        }];
        let shape = AttentionShape {
            heads,
            scale: 0.088,
            window: None,
        };
        let norm = Vector::new(vec![1.0; 4096]);
        let mut x = ops.upload(1, 4096, &noise(4096));
        let angles = ops.upload(1, 128, &[[1.0; 64], [0.0; 64]].concat());
        let (mut normed, mut qkv) = (ops.scratch(1, 4096), ops.scratch(1, 12288));
        let (mut attended, mut gate_up) = (ops.scratch(1, 4096), ops.scratch(1, 22016));
        let mut inner = ops.scratch(1, 11008);
        let mut pass = || {
            let begun = Instant::now();
            for layer in 0..32 {
                let w = |i: usize| &weights[i][layer % weights[i].len()];
                ops.rms_norm(&x, &norm, 1e-5, &mut normed);
                ops.linear(&normed, w(0), None, Epilogue::Store(None), &mut qkv);
                ops.rope_write_kv(&mut qkv, &angles, heads, &mut cache, layer, &slot);
                ops.paged_attention(&qkv, &cache, layer, &[span], &shape, &mut attended);
                ops.linear(&attended, w(1), None, Epilogue::Add, &mut x);
                ops.rms_norm(&x, &norm, 1e-5, &mut normed);
                let buffers = (&mut gate_up, &mut inner);
                ops.gated_linear(&normed, w(2), None, Activation::Silu, buffers);
                ops.linear(&inner, w(3), None, Epilogue::Add, &mut x);
            }
            let issued = begun.elapsed().as_secs_f64();
            ops.wait();
            (begun.elapsed().as_secs_f64(), issued)
        };
        let mut times: Vec<(f64, f64)> = (0..12).map(|_| pass()).collect();
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (all, issued) = times[6];
        println!(
            "{name:<34} {:>9.1} us, begun after {:.1} us",
            all * 1e6,
            issued * 1e6
        );
        Ok(())
    }

    fn pictures(&self, n: usize) {
        let heads = Heads {
            heads: 16,
            kv_heads: 16,
            head_dim: 64,
        };
        let rows = n * 577;
        let values: Vec<f32> = repeated(3072 * 7, rows * 3072);
        let mut qkv = self.ops.scratch(rows, 3072);
        self.ops.write_rows(&mut qkv, 0, &values);
        let mut out = self.ops.scratch(rows, 1024);
        let flops = 4.0 * 1024.0 * 577.0 * rows as f64;
        self.line(
            &format!("pictures {n}"),
            (flops, (rows * 4096 * 2) as f64),
            |_| {
                let how = (0.125, Precision::Bf16);
                self.ops.full_attention(&qkv, 577, heads, how, &mut out);
            },
        );
    }
}

/// `noise(period)` over and over, `len` values.
fn repeated(period: usize, len: usize) -> Vec<f32> {
    noise(period).into_iter().cycle().take(len).collect()
}

fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * 0.1
    };
    (0..len).map(next).collect()
}

fn main() -> Result<(), KernelError> {
    let ops = Ops::of_type(Device::Cuda(0), WeightDtype::Bf16)?;
    let (peak, gbs) = probe::limits(&ops, WeightDtype::Bf16);
    println!(
        "{}: {:.0} TFLOP/s, {gbs:.0} GB/s",
        ops.device_name(),
        peak.gflops / 1e3
    );
    let bench = Bench {
        ops,
        only: std::env::args().nth(1).unwrap_or_default(),
        flops: peak.gflops * 1e9,
        bytes_s: gbs * 1e9,
    };
    let nf4 = WeightDtype::Bnb4(Bnb4 {
        code: Code4::Nf4,
        compute: Compute::Bf16,
    });
    bench.layers(WeightDtype::Bf16, "bf16", 1024)?;
    bench.layers(WeightDtype::Bf16, "bf16", 4700)?;
    bench.layers(nf4, "nf4", 1024)?;
    bench.layers(WeightDtype::Q8, "q8", 1024)?;
    bench.rows(1);
    bench.rows(4668);
    bench.attention((1, 1, 1024), KvDtype::Bf16)?;
    bench.attention((1, 1, 4700), KvDtype::Bf16)?;
    bench.attention((8, 1, 1024), KvDtype::Bf16)?;
    bench.attention((32, 1, 1024), KvDtype::Bf16)?;
    bench.attention((32, 1, 4096), KvDtype::Bf16)?;
    bench.attention((32, 1, 4096), KvDtype::Int8)?;
    bench.attention((1, 2048, 4668), KvDtype::Bf16)?;
    bench.attention((1, 4668, 4668), KvDtype::Bf16)?;
    bench.pictures(1);
    bench.pictures(32);
    bench.linears(&TOWER, &[577, 18464], WeightDtype::Bf16, "bf16")?;
    bench.linears(
        &SHAPES,
        &[1, 2, 4, 8, 16, 32, 64, 512, 2048, 4668],
        WeightDtype::Bf16,
        "bf16",
    )?;
    for (format, dtype) in [
        ("nf4", nf4),
        ("q4", WeightDtype::Q4),
        ("q8", WeightDtype::Q8),
    ] {
        bench.linears(&SHAPES, &[1, 2, 8, 32, 2048], dtype, format)?;
    }
    Ok(())
}
