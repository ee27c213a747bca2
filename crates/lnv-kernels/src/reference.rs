//! The slow twin of every operation: one obvious scalar function each, the oracle of the tests and
//! the whole of the scalar instruction set.
//!
//! Decision: plain loops in the order in which a person would write them down, over the same
//! buffers, packed weights and cache as the fast kernels; no threads, no `mul_add` (a libm call
//! without FMA). Only attention differs in kind from its fast twins: whole softmax rows here,
//! blocks there. Shapes were checked by [`crate::Ops`].

mod bnb;
pub(crate) mod bytes;
mod quantised;

use half::{bf16, f16};

use crate::buffer::{Buffer, Vector};
use crate::kv_cache::{Heads, KV_BLOCK, LayerCache, Slot};
use crate::ops::{Activation, AttentionShape, Epilogue, PatchGeometry, PoolMode, Span};
use crate::weight::{PANEL, Weight, WeightDtype};

/// `out = act(x·Wᵀ + bias)` or `out += x·Wᵀ + bias`.
pub(crate) fn linear(
    x: &Buffer,
    w: &Weight,
    bias: Option<&Vector>,
    then: Epilogue,
    out: &mut Buffer,
) {
    let cols = out.cols();
    let rows = x
        .host()
        .chunks_exact(w.k())
        .zip(out.host_mut().chunks_exact_mut(cols));
    for (x, out) in rows {
        for (panel, out) in out.chunks_mut(PANEL).enumerate() {
            let sums = panel_product(x, w, panel);
            for (column, (out, mut value)) in out.iter_mut().zip(sums).enumerate() {
                if let Some(bias) = bias {
                    value += bias.as_slice()[panel * PANEL + column];
                }
                *out = match then {
                    Epilogue::Store(None) => value,
                    Epilogue::Store(Some(act)) => activation(act, value),
                    Epilogue::Add => *out + value,
                };
            }
        }
    }
}

/// One row times a panel: 32 sums over k, of floats each one ascending chain.
fn panel_product(x: &[f32], w: &Weight, panel: usize) -> [f32; PANEL] {
    let mut sums = [0.0; PANEL];
    let values = w.panel(panel);
    match w.dtype() {
        WeightDtype::F32 => {
            let values: &[f32] = bytemuck::cast_slice(values);
            for (x, values) in x.iter().zip(values.chunks_exact(PANEL)) {
                sums.iter_mut()
                    .zip(values)
                    .for_each(|(sum, value)| *sum += x * value);
            }
        }
        WeightDtype::F16 => {
            let values: &[f16] = bytemuck::cast_slice(values);
            for (x, values) in x.iter().zip(values.chunks_exact(PANEL)) {
                sums.iter_mut()
                    .zip(values)
                    .for_each(|(sum, value)| *sum += x * value.to_f32());
            }
        }
        WeightDtype::Bf16 => {
            let values: &[bf16] = bytemuck::cast_slice(values);
            for (x, values) in x.chunks(2).zip(values.chunks_exact(2 * PANEL)) {
                for (parity, x) in x.iter().enumerate() {
                    let values = values[parity..].iter().step_by(2);
                    sums.iter_mut()
                        .zip(values)
                        .for_each(|(sum, value)| *sum += x * value.to_f32());
                }
            }
        }
        WeightDtype::Q8 => return quantised::q8_product(x, values),
        WeightDtype::Q4 => return quantised::q4_product(x, values),
        WeightDtype::Bnb4(of) => return bnb::bnb4_product(x, values, of),
        WeightDtype::Int8(of) => return bnb::int8_product(x, values, of),
    }
    sums
}

/// `out[i] = W[ids[i]]`, as f32.
pub(crate) fn gather(table: &Weight, ids: &[u32], out: &mut Buffer) {
    let cols = out.cols();
    for (id, out) in ids.iter().zip(out.host_mut().chunks_exact_mut(cols)) {
        table.read_row(*id as usize, out);
    }
}

/// `x / sqrt(mean(x²) + eps) * weight`, row by row.
pub(crate) fn rms_norm(x: &Buffer, weight: &Vector, eps: f32, out: &mut Buffer) {
    let cols = x.cols();
    for (x, out) in x
        .host()
        .chunks_exact(cols)
        .zip(out.host_mut().chunks_exact_mut(cols))
    {
        let square: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
        let scale = (1.0 / (square / cols as f64 + f64::from(eps)).sqrt()) as f32;
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight.as_slice()) {
            *out = x * scale * weight;
        }
    }
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias`, row by row.
pub(crate) fn layer_norm(x: &Buffer, weight: &Vector, bias: &Vector, eps: f32, out: &mut Buffer) {
    let cols = x.cols();
    for (x, out) in x
        .host()
        .chunks_exact(cols)
        .zip(out.host_mut().chunks_exact_mut(cols))
    {
        let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / cols as f64;
        let square: f64 = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum();
        let scale = 1.0 / (square / cols as f64 + f64::from(eps)).sqrt();
        let parameters = weight.as_slice().iter().zip(bias.as_slice());
        for ((out, x), (weight, bias)) in out.iter_mut().zip(x).zip(parameters) {
            *out = ((f64::from(*x) - mean) * scale) as f32 * weight + bias;
        }
    }
}

/// `out = act(gate) * up`.
pub(crate) fn gated_activation(gate_up: &Buffer, act: Activation, out: &mut Buffer) {
    let f = out.cols();
    let rows = gate_up
        .host()
        .chunks_exact(2 * f)
        .zip(out.host_mut().chunks_exact_mut(f));
    for (gate_up, out) in rows {
        let (gate, up) = gate_up.split_at(f);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = activation(act, *gate) * up;
        }
    }
}

/// `x = act(x)`.
pub(crate) fn activate(x: &mut Buffer, act: Activation) {
    x.host_mut()
        .iter_mut()
        .for_each(|x| *x = activation(act, *x));
}

/// An activation function of one value.
pub(crate) fn activation(act: Activation, x: f32) -> f32 {
    let sigmoid = |v: f32| 1.0 / (1.0 + (-v).exp());
    match act {
        Activation::Silu => x * sigmoid(x),
        Activation::QuickGelu => x * sigmoid(1.702 * x),
        Activation::Relu => x.max(0.0),
        Activation::Gelu => {
            let x = f64::from(x);
            (0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
        }
        Activation::GeluTanh => {
            let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
    }
}

/// The error function: its Taylor series below 4.5, where f64 bears the cancellation; 1 beyond.
fn erf(x: f64) -> f64 {
    if x.is_nan() || x.abs() >= 4.5 {
        return if x.is_nan() { x } else { x.signum() };
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-17 {
        n += 1.0;
        term *= -x * x / n;
        sum += term / (2.0 * n + 1.0);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

/// `dst[dst_rows[i]] = src[src_rows[i]]`.
pub(crate) fn copy_rows(src: &Buffer, src_rows: &[u32], dst: &mut Buffer, dst_rows: &[u32]) {
    let cols = src.cols();
    for (from, to) in src_rows.iter().zip(dst_rows) {
        let (from, to) = (*from as usize * cols, *to as usize * cols);
        dst.host_mut()[to..to + cols].copy_from_slice(&src.host()[from..from + cols]);
    }
}

/// All columns of `src` into `dst`, from column `dst_col` on.
pub(crate) fn copy_columns(src: &Buffer, dst: &mut Buffer, dst_col: usize) {
    let (cols, dst_cols) = (src.cols(), dst.cols());
    let rows = src
        .host()
        .chunks_exact(cols)
        .zip(dst.host_mut().chunks_exact_mut(dst_cols));
    for (src, dst) in rows {
        dst[dst_col..dst_col + cols].copy_from_slice(src);
    }
}

/// `x[i] += table[i % table.rows()]`.
pub(crate) fn add_rows(x: &mut Buffer, table: &Buffer) {
    let cols = x.cols();
    let rows = x
        .host_mut()
        .chunks_exact_mut(cols)
        .zip(table.host().chunks_exact(cols).cycle());
    for (x, row) in rows {
        x.iter_mut().zip(row).for_each(|(x, value)| *x += value);
    }
}

/// `x[i][j] *= scales[j]`.
pub(crate) fn scale_columns(x: &mut Buffer, scales: &Vector) {
    let cols = x.cols().max(1);
    for row in x.host_mut().chunks_exact_mut(cols) {
        row.iter_mut()
            .zip(scales.as_slice())
            .for_each(|(x, scale)| *x *= scale);
    }
}

/// `dst[dst_rows[i]] = row`.
pub(crate) fn broadcast_row(row: &Vector, dst: &mut Buffer, dst_rows: &[u32]) {
    let cols = dst.cols();
    for to in dst_rows {
        let to = *to as usize * cols;
        dst.host_mut()[to..to + cols].copy_from_slice(row.as_slice());
    }
}

/// Cuts pictures `[c, h, w]` into rows of patches, columns in the order (c, py, px).
pub(crate) fn patchify(pictures: &[&[f32]], geometry: &PatchGeometry, out: &mut Buffer) {
    let PatchGeometry {
        height,
        width,
        patch,
        ..
    } = *geometry;
    let (grid_h, grid_w) = (height / patch, width / patch);
    let cols = out.cols();
    for (index, out) in out.host_mut().chunks_exact_mut(cols).enumerate() {
        let (image, place) = (index / (grid_h * grid_w), index % (grid_h * grid_w));
        let (top, left) = (place / grid_w * patch, place % grid_w * patch);
        for (line, out) in out.chunks_exact_mut(patch).enumerate() {
            let (channel, py) = (line / patch, line % patch);
            let start = (channel * height + top + py) * width + left;
            out.copy_from_slice(&pictures[image][start..start + patch]);
        }
    }
}

/// Pools windows of `stride` x `stride` positions of square grids.
pub(crate) fn pool(x: &Buffer, side: usize, stride: usize, mode: PoolMode, out: &mut Buffer) {
    let cols = x.cols();
    for (index, out) in out.host_mut().chunks_exact_mut(cols).enumerate() {
        out.fill(if mode == PoolMode::Max {
            f32::NEG_INFINITY
        } else {
            0.0
        });
        for row in window_rows(index, side, stride) {
            let row = &x.host()[row * cols..(row + 1) * cols];
            for (out, value) in out.iter_mut().zip(row) {
                *out = match mode {
                    PoolMode::Average => *out + value,
                    // NaN must stay NaN.
                    PoolMode::Max if *value > *out || value.is_nan() => *value,
                    PoolMode::Max => *out,
                };
            }
        }
        if mode == PoolMode::Average {
            out.iter_mut()
                .for_each(|value| *value /= (stride * stride) as f32);
        }
    }
}

/// Writes each window's rows side by side, columns in the order (wy, wx, c).
pub(crate) fn pool_windows(x: &Buffer, side: usize, stride: usize, out: &mut Buffer) {
    let (cols, wide) = (x.cols(), out.cols());
    for (index, out) in out.host_mut().chunks_exact_mut(wide).enumerate() {
        for (out, row) in out
            .chunks_exact_mut(cols)
            .zip(window_rows(index, side, stride))
        {
            out.copy_from_slice(&x.host()[row * cols..(row + 1) * cols]);
        }
    }
}

/// The rows of x in window `index`, where every `side * side` rows are a grid.
fn window_rows(index: usize, side: usize, stride: usize) -> impl Iterator<Item = usize> {
    let pooled = side / stride;
    let (image, place) = (index / (pooled * pooled), index % (pooled * pooled));
    let first = image * side * side + place / pooled * stride * side + place % pooled * stride;
    (0..stride * stride).map(move |i| first + i / stride * side + i % stride)
}

/// Rotates q and k of every row, then writes k and v to the cache.
pub(crate) fn rope_write_kv(
    qkv: &mut Buffer,
    cos_sin: &Buffer,
    heads: Heads,
    cache: &mut LayerCache,
    slots: &[Slot],
) {
    let Heads {
        heads: q_heads,
        kv_heads,
        head_dim,
    } = heads;
    let cols = qkv.cols();
    let rows = qkv.host_mut().chunks_exact_mut(cols);
    for ((row, angles), slot) in rows.zip(cos_sin.host().chunks_exact(head_dim)).zip(slots) {
        let (rotated, values) = row.split_at_mut((q_heads + kv_heads) * head_dim);
        rotated
            .chunks_exact_mut(head_dim)
            .for_each(|head| rotate(head, angles));
        let keys = rotated[q_heads * head_dim..].chunks_exact(head_dim);
        for (kv_head, (key, value)) in keys.zip(values.chunks_exact(head_dim)).enumerate() {
            let form = cache.record;
            let record = cache.record_mut(slot.block, kv_head);
            form.write(record, slot.offset as usize, key, value);
        }
    }
}

/// `x * cos + rot(x) * sin` with `rot(x) = [-x[d/2..], x[..d/2]]`; angles: `cos | sin`.
fn rotate(head: &mut [f32], angles: &[f32]) {
    let half = head.len() / 2;
    let (low, high) = head.split_at_mut(half);
    let (cos, sin) = angles.split_at(half);
    for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}

/// Causal attention over the cache; returns each span's softmax rows `[heads, q_len, kv_len]`.
pub(crate) fn paged_attention(
    qkv: &Buffer,
    cache: &LayerCache,
    spans: &[Span<'_>],
    shape: &AttentionShape,
    out: &mut Buffer,
) -> Vec<Vec<f32>> {
    let Heads {
        heads, head_dim, ..
    } = shape.heads;
    let (cols, out_cols, shared) = (qkv.cols(), out.cols(), shape.heads.queries_per_kv());
    let mut all = Vec::with_capacity(spans.len());
    for span in spans {
        let mut weights = vec![0.0; heads * span.q_len * span.kv_len];
        for (index, row) in weights.chunks_exact_mut(span.kv_len.max(1)).enumerate() {
            let (head, i) = (index / span.q_len, index % span.q_len);
            let q = (span.q_start + i) * cols + head * head_dim;
            let visible = visible_keys(span, i, shape.window);
            let (form, kv_head) = (cache.record, head / shared);
            let record = |j: usize| cache.record(span.blocks[j / KV_BLOCK], kv_head);
            softmax(&mut row[visible.clone()], shape.scale, |j| {
                let j = visible.start + j;
                let key = (0..head_dim).map(|i| form.key(record(j), j % KV_BLOCK, i));
                dot(&qkv.host()[q..q + head_dim], key)
            });
            let start = (span.q_start + i) * out_cols + head * head_dim;
            let out = &mut out.host_mut()[start..start + head_dim];
            out.fill(0.0);
            for j in visible {
                let value = (0..head_dim).map(|i| form.value(record(j), j % KV_BLOCK, i));
                add_scaled(out, row[j], value);
            }
        }
        all.push(weights);
    }
    all
}

/// The keys that query `i` of a span sees.
pub(crate) fn visible_keys(
    span: &Span<'_>,
    i: usize,
    window: Option<usize>,
) -> std::ops::Range<usize> {
    let end = span.kv_len - span.q_len + i + 1;
    end.saturating_sub(window.unwrap_or(end))..end
}

/// Attention of each segment of `len` rows with itself.
pub(crate) fn full_attention(qkv: &Buffer, len: usize, heads: Heads, scale: f32, out: &mut Buffer) {
    let (cols, out_cols, d) = (qkv.cols(), out.cols(), heads.head_dim);
    let (keys_at, shared) = (heads.heads * d, heads.queries_per_kv());
    let values_at = keys_at + heads.kv_heads * d;
    let mut weights = vec![0.0; len];
    for (row, out) in out.host_mut().chunks_exact_mut(out_cols).enumerate() {
        let segment = &qkv.host()[row / len * len * cols..(row / len + 1) * len * cols];
        for (head, out) in out.chunks_exact_mut(d).enumerate() {
            let q = &segment[row % len * cols + head * d..][..d];
            let kv_head = head / shared * d;
            softmax(&mut weights, scale, |j| {
                dot(
                    q,
                    segment[j * cols + keys_at + kv_head..][..d].iter().copied(),
                )
            });
            out.fill(0.0);
            for (j, weight) in weights.iter().enumerate() {
                let value = &segment[j * cols + values_at + kv_head..][..d];
                add_scaled(out, *weight, value.iter().copied());
            }
        }
    }
}

/// Softmax of `score(j) * scale` over the row.
fn softmax(row: &mut [f32], scale: f32, score: impl Fn(usize) -> f32) {
    row.iter_mut()
        .enumerate()
        .for_each(|(j, value)| *value = score(j) * scale);
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut()
        .for_each(|value| *value = (*value - max).exp());
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|value| *value /= sum);
}

fn dot(a: &[f32], b: impl Iterator<Item = f32>) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(out: &mut [f32], scale: f32, row: impl Iterator<Item = f32>) {
    out.iter_mut()
        .zip(row)
        .for_each(|(out, value)| *out += scale * value);
}
