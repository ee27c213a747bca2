//! The speed of each kernel at the 7B model's shapes, as a share of what the machine can do.
//!
//! `cargo run --release -p lnv-kernels --example kernels [filter]`; `LNV_ISA` and `LNV_THREADS`
//! apply. Best of several runs, against probes of the same minute: on a shared machine only ratios
//! of figures of one run mean something. Products and attention also tell what they would reach
//! undisturbed, by the processor time that they took (Linux).

use std::time::Instant;

use lnv_kernels::{
    Activation, AttentionShape, Bnb4, Code4, Compute, Device, Epilogue, Heads, Int8, Isa, KV_BLOCK,
    KernelError, KvCache, KvDtype, Ops, PackedBytes, Precision, Slot, Span, Vector, Weight,
    WeightData, WeightDtype, WeightPart, packed_len, probe,
};

/// Weights of one shape.
const COPIES: usize = 4;
/// Bytes of quantised weights, or of keys and values, that no cache holds.
const UNCACHED: usize = 1 << 30;

struct Bench {
    ops: Ops,
    filter: String,
    bandwidth: f64,
}

fn main() -> Result<(), KernelError> {
    let ops = Ops::new(Device::Cpu)?;
    let filter = std::env::args().nth(1).unwrap_or_default();
    let bandwidth = probe::read_bandwidth_gbs();
    println!(
        "{} on {} threads; reads {bandwidth:.1} GB/s",
        ops.isa(),
        ops.threads()
    );
    let bench = Bench {
        ops,
        filter,
        bandwidth,
    };
    for dtype in [WeightDtype::Bf16, WeightDtype::F32, WeightDtype::F16] {
        bench.products(dtype)?;
    }
    for dtype in [WeightDtype::Q8, WeightDtype::Q4] {
        bench.quantised(dtype, WeightDtype::Q8)?;
    }
    bench.quantised(WeightDtype::Int8(Int8::new(6.0)), WeightDtype::Q8)?;
    for code in [Code4::Nf4, Code4::Fp4] {
        for (compute, peak) in [
            (Compute::Bf16, WeightDtype::Bf16),
            (Compute::F32, WeightDtype::F32),
        ] {
            bench.quantised(WeightDtype::Bnb4(Bnb4 { code, compute }), peak)?;
        }
    }
    bench.attention();
    bench.rows();
    Ok(())
}

impl Bench {
    fn products(&self, dtype: WeightDtype) -> Result<(), KernelError> {
        for (n, k) in [(11008, 4096), (4096, 11008), (12288, 4096)] {
            let name = |rows: usize| format!("linear {dtype:?} {rows}x{k}x{n}");
            let sizes = [1152, 64, 24, 12, 8, 4, 2, 1];
            let wanted: Vec<usize> = sizes
                .into_iter()
                .filter(|rows| name(*rows).contains(&self.filter))
                .collect();
            if wanted.is_empty() {
                continue;
            }
            let peak = probe::peak_gflops(self.ops.isa(), dtype);
            // As many as no cache holds, in turn, as a model's layers come.
            let weights = (0..COPIES).map(|copy| self.weight(n, k, (dtype, copy)));
            let weights: Vec<Weight> = weights.collect::<Result<_, _>>()?;
            let mut turn = weights.iter().cycle();
            for rows in wanted {
                let x = self.ops.upload(rows, k, &noise(rows * k));
                let mut out = self.ops.buffer(rows, n);
                let add = Epilogue::Add;
                let time = best(|| {
                    if let Some(w) = turn.next() {
                        self.ops.linear(&x, w, None, add, &mut out);
                    }
                });
                self.report(
                    &name(rows),
                    (2 * rows * n * k, weights[0].bytes()),
                    peak,
                    time,
                );
            }
        }
        Ok(())
    }

    fn weight(
        &self,
        n: usize,
        k: usize,
        (dtype, copy): (WeightDtype, usize),
    ) -> Result<Weight, KernelError> {
        let bytes: Vec<u8> = noise(n * k)
            .iter()
            .flat_map(|v| v.to_bits().to_le_bytes()[2..].to_vec())
            .collect();
        let (start, cpu) = (Instant::now(), cpu_seconds());
        let weight = self
            .ops
            .pack(&[WeightPart::new(WeightData::Bf16(&bytes), n)], k, dtype);
        let cpu = (cpu_seconds() - cpu) / self.ops.threads() as f64;
        let gigabytes = bytes.len() as f64 / 1e9;
        if copy + 1 < COPIES {
            return weight;
        }
        println!(
            "pack {} {n}x{k}: reads {:.1} GB/s ({:.1} alone)",
            kind(dtype),
            gigabytes / start.elapsed().as_secs_f64(),
            gigabytes / cpu
        );
        weight
    }

    /// Quantised weights: shares of the peak of the type that is multiplied, and of the bandwidth.
    fn quantised(&self, dtype: WeightDtype, multiplied: WeightDtype) -> Result<(), KernelError> {
        let shapes = [
            (4096, 4096),
            (22016, 4096),
            (4096, 11008),
            (32064, 4096),
            (1024, 1024),
            (4096, 1024),
            (1024, 4096),
        ];
        if self.wants(&format!("pack {}", kind(dtype))) {
            self.weight(4096, 4096, (dtype, COPIES - 1))?;
        }
        for (n, k) in shapes {
            let name = |rows: usize| format!("linear {} {rows}x{k}x{n}", kind(dtype));
            let sizes = [1, 2, 4, 8, 16, 32, 577, 1192, 4616];
            let wanted: Vec<usize> = sizes
                .into_iter()
                .filter(|rows| self.wants(&name(*rows)))
                .collect();
            if wanted.is_empty() {
                continue;
            }
            let peak = probe::peak_gflops(self.ops.isa(), multiplied);
            let len = packed_len(n, k, dtype);
            // Real ones: scales that are next to nothing would slow some processors down.
            let first = self.weight(n, k, (dtype, 0))?;
            let packed = first.packed_bytes();
            let weight = |_| Weight::from_packed(n, k, dtype, PackedBytes::copied(packed));
            let weights = (0..UNCACHED.div_ceil(len)).map(weight);
            let weights: Vec<Weight> = weights.collect::<Result<_, _>>()?;
            let mut turn = weights.iter().cycle();
            for rows in wanted {
                let x = self.ops.upload(rows, k, &noise(rows * k));
                let mut out = self.ops.buffer(rows, n);
                let time = best(|| {
                    if let Some(w) = turn.next() {
                        self.ops.linear(&x, w, None, Epilogue::Add, &mut out);
                    }
                });
                self.report(&name(rows), (2 * rows * n * k, len), peak, time);
            }
        }
        Ok(())
    }

    fn attention(&self) {
        let vit = heads(16, 16, 64);
        for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
            let name = format!("full {precision:?} 8x577, 16x64");
            if !self.wants(&name) {
                continue;
            }
            let rows = 8 * 577;
            let qkv = noise(rows * vit.qkv_cols());
            let qkv = self.ops.upload(rows, vit.qkv_cols(), &qkv);
            let (mut out, how) = (self.ops.buffer(rows, 1024), (0.125, precision));
            let time = best(|| self.ops.full_attention(&qkv, 577, vit, how, &mut out));
            let peak = self.attention_peak(precision == Precision::Bf16);
            self.report(&name, (rows * 577 * 4 * 1024, 0), peak, time);
        }
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
            for (heads, q_len, kv_len, window) in [
                (heads(32, 32, 128), 1192, 1192, None),
                (heads(32, 32, 128), 4096, 4096, None),
                (heads(32, 8, 128), 1192, 1192, None),
                (heads(32, 8, 128), 4096, 4096, None),
                (heads(32, 8, 128), 4096, 4096, Some(1024)),
                (heads(32, 8, 64), 1192, 1192, None),
                (heads(32, 32, 128), 1, 1024, None),
                (heads(32, 32, 128), 1, 8192, None),
                (heads(32, 8, 128), 1, 1024, None),
                (heads(32, 8, 128), 1, 8192, None),
                (heads(8, 1, 128), 1, 8192, None),
            ] {
                self.paged((heads, window, dtype), 1, (q_len, kv_len));
            }
            // Eight sequences a step.
            self.paged((heads(32, 32, 128), None, dtype), 8, (1, 256));
        }
    }

    fn paged(
        &self,
        (heads, window, dtype): (Heads, Option<usize>, KvDtype),
        sequences: usize,
        (q_len, kv_len): (usize, usize),
    ) {
        let seen = window.map_or(String::new(), |window| format!(" of {window}"));
        let many = match sequences {
            1 => String::new(),
            many => format!("{many} of "),
        };
        let name = format!(
            "paged {dtype} {many}{q_len}/{kv_len}{seen} {}/{}x{}",
            heads.heads, heads.kv_heads, heads.head_dim
        );
        if !self.wants(&name) {
            return;
        }
        let each = kv_len.div_ceil(KV_BLOCK);
        let tokens = sequences * each * KV_BLOCK;
        // As many layers as no cache holds, in turn, as a model's come.
        let layer = tokens * dtype.bytes_per_token(&heads);
        let layers = if q_len > 1 {
            1
        } else {
            UNCACHED.div_ceil(layer)
        };
        let blocks: Vec<u32> = (0..(sequences * each) as u32).collect();
        let mut cache = KvCache::new(layers, heads, blocks.len(), dtype);
        (0..layers).for_each(|layer| self.fill(&mut cache, layer, heads, tokens));
        let rows = sequences * q_len;
        let qkv = noise(rows * heads.qkv_cols());
        let qkv = self.ops.upload(rows, heads.qkv_cols(), &qkv);
        let mut out = self.ops.buffer(rows, heads.heads * heads.head_dim);
        let span = |(sequence, blocks)| Span {
            q_start: sequence * q_len,
            q_len,
            kv_len,
            blocks,
        };
        let spans: Vec<Span<'_>> = blocks.chunks(each).enumerate().map(span).collect();
        let shape = AttentionShape {
            heads,
            scale: (heads.head_dim as f32).powf(-0.5),
            window,
        };
        let mut turn = (0..layers).cycle();
        let run = || {
            let layer = turn.next().unwrap_or(0);
            self.ops
                .paged_attention(&qkv, &cache, layer, &spans, &shape, &mut out);
        };
        let time = best(run);
        let sees = |i: usize| (kv_len - q_len + i + 1).min(window.unwrap_or(kv_len));
        let pairs = sequences * (0..q_len).map(sees).sum::<usize>();
        let work = (
            pairs * 4 * heads.heads * heads.head_dim,
            sequences * kv_len * dtype.bytes_per_token(&heads),
        );
        let peak = self.attention_peak(dtype != KvDtype::F32);
        self.report(&name, work, peak, time);
    }

    /// The peak of the type that attention multiplies in.
    fn attention_peak(&self, bf16: bool) -> f64 {
        let dtype = if bf16 && self.ops.isa() == Isa::Avx512Bf16 {
            WeightDtype::Bf16
        } else {
            WeightDtype::F32
        };
        probe::peak_gflops(self.ops.isa(), dtype)
    }

    fn fill(&self, cache: &mut KvCache, layer: usize, heads: Heads, tokens: usize) {
        let mut qkv = self
            .ops
            .upload(tokens, heads.qkv_cols(), &noise(tokens * heads.qkv_cols()));
        let angles = self
            .ops
            .upload(tokens, heads.head_dim, &noise(tokens * heads.head_dim));
        let slot = |i| Slot {
            block: (i / KV_BLOCK) as u32,
            offset: (i % KV_BLOCK) as u32,
        };
        let slots: Vec<Slot> = (0..tokens).map(slot).collect();
        self.ops
            .rope_write_kv(&mut qkv, &angles, heads, cache, layer, &slots);
    }

    fn rows(&self) {
        let report = |name: &str, bytes: usize, time: Time| {
            let seconds = time.wall;
            let gbs = bytes as f64 / seconds / 1e9;
            println!("{name:34} {:9.3} ms {gbs:6.1} GB/s", seconds * 1e3);
        };
        let x = self.ops.upload(1190, 4096, &noise(1190 * 4096));
        let weight = Vector::new(noise(4096));
        let mut out = self.ops.buffer(1190, 4096);
        if self.wants("rms_norm 1190x4096") {
            let seconds = best(|| self.ops.rms_norm(&x, &weight, 1e-5, &mut out));
            report("rms_norm 1190x4096", 2 * 1190 * 4096 * 4, seconds);
        }
        if self.wants("layer_norm 1190x4096") {
            let seconds = best(|| self.ops.layer_norm(&x, &weight, &weight, 1e-5, &mut out));
            report("layer_norm 1190x4096", 2 * 1190 * 4096 * 4, seconds);
        }
        if self.wants("gated silu 1190x11008") {
            let gate_up = self.ops.upload(1190, 22016, &noise(1190 * 22016));
            let mut out = self.ops.buffer(1190, 11008);
            let seconds = best(|| {
                self.ops
                    .gated_activation(&gate_up, Activation::Silu, &mut out)
            });
            report("gated silu 1190x11008", 3 * 1190 * 11008 * 4, seconds);
        }
        if self.wants("rope_write_kv 1190, 32x128") {
            let heads = Heads {
                heads: 32,
                kv_heads: 32,
                head_dim: 128,
            };
            let mut cache = KvCache::new(1, heads, 1190_usize.div_ceil(KV_BLOCK), KvDtype::F32);
            let mut qkv = self
                .ops
                .upload(1190, heads.qkv_cols(), &noise(1190 * heads.qkv_cols()));
            let angles = self.ops.upload(1190, 128, &noise(1190 * 128));
            let slot = |i| Slot {
                block: (i / KV_BLOCK) as u32,
                offset: (i % KV_BLOCK) as u32,
            };
            let slots: Vec<Slot> = (0..1190).map(slot).collect();
            let run = || {
                self.ops
                    .rope_write_kv(&mut qkv, &angles, heads, &mut cache, 0, &slots)
            };
            report(
                "rope_write_kv 1190, 32x128",
                1190 * heads.qkv_cols() * 4 * 2,
                best(run),
            );
        }
    }

    fn report(&self, name: &str, (operations, bytes): (usize, usize), peak: f64, time: Time) {
        let gflops = operations as f64 / time.wall / 1e9;
        let alone = operations as f64 / (time.cpu / self.ops.threads() as f64) / 1e9;
        let gbs = bytes as f64 / time.wall / 1e9;
        println!(
            "{name:34} {:9.3} ms {gflops:6.1} GFLOP/s {:3.0} % ({alone:6.1} alone: {:3.0} %) \
             of {peak:.0}, \
             {gbs:5.1} GB/s {:3.0} %",
            time.wall * 1e3,
            100.0 * gflops / peak,
            100.0 * alone / peak,
            100.0 * gbs / self.bandwidth
        );
    }

    fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }
}

/// A type's name, short.
fn kind(dtype: WeightDtype) -> String {
    match dtype {
        WeightDtype::Bnb4(of) => format!("{:?} {:?}", of.code, of.compute),
        WeightDtype::Int8(_) => "Int8".to_string(),
        dtype => format!("{dtype:?}"),
    }
}

fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads {
        heads,
        kv_heads,
        head_dim,
    }
}

/// Seconds: on the clock, and of all threads' processor time.
#[derive(Clone, Copy)]
struct Time {
    wall: f64,
    cpu: f64,
}

/// The best of a second's runs, after one to warm up.
fn best(mut run: impl FnMut()) -> Time {
    run();
    let (begin, mut best) = (
        Instant::now(),
        Time {
            wall: f64::INFINITY,
            cpu: f64::INFINITY,
        },
    );
    while begin.elapsed().as_secs_f64() < 1.0 {
        let (start, cpu) = (Instant::now(), cpu_seconds());
        run();
        best.wall = best.wall.min(start.elapsed().as_secs_f64());
        best.cpu = best.cpu.min(cpu_seconds() - cpu);
    }
    best
}

/// Processor time of all threads so far; no number where the system does not tell.
fn cpu_seconds() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else {
        return f64::NAN;
    };
    let time = |task: std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    };
    tasks.flatten().filter_map(time).sum::<f64>() / 1e9
}

/// Values between -0.5 and 0.5 that repeat at no power of two.
fn noise(len: usize) -> Vec<f32> {
    let mut state = 0x2545_f491_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).map(next).collect()
}
