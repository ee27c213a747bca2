//! Products with weights, and rows of weights: which kernel, how it is cut, and what has to be done to activations
//! before.
//!
//! Decision: few rows (decoding) take kernels that read a weight once, in whatever format it is, at the speed
//! of memory. Many rows are cuBLASLt's or our own GEMM's, for which a quantised weight is first written out in T.
//! The work of a product of few rows is dealt out to one thread block for each multiprocessor, as evenly as it can be;
//! k is cut only where the rows would not fit into shared memory.
//!
//! Activations are brought into T, into rows that start at a multiple of 16 bytes, and, for 8-bit weights, rotated:
//! only where they are not like that already.

use std::sync::Arc;

use super::blaslt::Product;
use super::driver::DevicePtr;
use super::memory::Memory;
use super::rows::number;
use super::{Arg, Cuda, DeviceWeight, Half, Kind, View};
use crate::ops::{Activation, Epilogue};
use crate::weight::bnb::{self, Code4};
use crate::weight::bnb4::{Compute, Numbers};
use crate::weight::{PANEL, WeightDtype, q4};

/// Values of k that kernels take at once: rows are padded to a multiple.
const CHUNK: usize = 8;
/// Values of k that slices are made of.
const GROUP: usize = 64;
/// Bytes of the table of pairs that 4-bit codes are looked up in, every other 128 of which are free for rows, and of
/// that of single values in f32.
const PAIRS: usize = 256 * 256;
const SINGLES: usize = 16 * 32 * 4;
/// What it costs to add up parts of several thread blocks, as bytes of a weight that a multiprocessor reads meanwhile:
/// if thread blocks that only take whole panels read less than that more than others, they do.
const SHARING: usize = 32 << 10;
/// Counters of the parts that have come, which are zeros between products.
const COUNTERS: usize = 1 << 16;
/// Rows and outputs of a GEMM's tile, and what it needs of shared memory.
const TILE: usize = 128;
const TILE_BYTES: usize = TILE * (TILE + 8) * 4;

/// What kernels must know of a weight's type.
struct Format {
    /// The part of kernels' names.
    name: &'static str,
    /// Whether k was rotated.
    rotated: bool,
    /// What codes stand for where they are multiplied, and times what that is the weight.
    values: Option<[f32; 16]>,
    back: f32,
    /// What codes stand for where they are written out.
    exact: Option<[f32; 16]>,
}

impl Format {
    fn of(dtype: WeightDtype, half: Half) -> Format {
        let plain = Format {
            name: "floats",
            rotated: false,
            values: None,
            back: 1.0,
            exact: None,
        };
        match dtype {
            WeightDtype::F32 | WeightDtype::Bf16 | WeightDtype::F16 => plain,
            WeightDtype::Q8 => Format {
                name: "bytes",
                rotated: true,
                ..plain
            },
            WeightDtype::Int8(_) => Format {
                name: "bytes",
                back: bnb::INT8_STEP,
                ..plain
            },
            WeightDtype::Q4 => Format {
                name: "levels",
                values: Some(q4::LEVELS),
                exact: Some(q4::LEVELS),
                ..plain
            },
            WeightDtype::Bnb4(of) => {
                // f16 holds FP4's values only times 3, as bf16 does, and NF4's as well as any.
                let compute = match (half, of.code) {
                    (Half::Bf16, _) | (Half::F16, Code4::Fp4) => Compute::Bf16,
                    _ => Compute::F32,
                };
                let Numbers { values, back } = Numbers::of(of.code, compute);
                Format {
                    name: "nibbles",
                    values: Some(values),
                    back,
                    exact: Some(*of.code.table()),
                    ..plain
                }
            }
        }
    }

    fn quantised(&self) -> bool {
        self.name != "floats"
    }

    /// Most rows that are multiplied without writing the weight out.
    fn few(&self, cuda: &Cuda) -> usize {
        match (self.quantised(), cuda.half()) {
            (false, Half::F32) => 16,
            // From there on cuBLASLt is faster.
            (false, _) if cuda.blaslt().is_some() => 8,
            (false, _) => 32,
            (true, Half::F32) => 32,
            // On an H200 32 rows of NF4, 12288 x 4096, take 107 us where one takes 15.
            (true, _) => 16,
        }
    }
}

fn table(cuda: &Arc<Cuda>, values: Option<[f32; 16]>) -> Arg {
    Arg::Ptr(values.map_or(0, |values| cuda.table(&values.map(f32::to_bits))))
}

/// How a kernel for few rows is laid out.
struct Few {
    name: &'static str,
    /// Rows and warps of a thread block, and warps of a team.
    rows: usize,
    warps: usize,
    team: usize,
    /// Bytes of its table.
    table: usize,
}

/// How a product is dealt out.
#[derive(Debug, PartialEq, Eq)]
struct Deal {
    /// The grid: thread blocks of a slice, slices, parts of rows.
    blocks: usize,
    slices: usize,
    depth: usize,
    /// The k of a slice.
    slice: usize,
    /// Whether thread blocks take whole panels.
    whole: bool,
    /// Most panels that a thread block has a part of.
    slots: usize,
    /// Bytes of shared memory.
    shared: usize,
    /// Values of f32 that thread blocks share.
    sums: usize,
}

/// What a product is of.
struct Shape {
    rows: usize,
    n: usize,
    k: usize,
    /// Panels that are multiplied with each other in the end: 2 if gated.
    tile: usize,
    /// Of a value of the weight.
    bits: usize,
}

impl Few {
    fn of(half: Half, rows: usize, format: &Format) -> Few {
        let (name, tile, warps) = match (half, rows) {
            (Half::F32, 1) => ("few1", 1, 16),
            (Half::F32, _) => ("few8", 8, 16),
            (_, ..=8) => ("few8", 8, 32),
            (_, ..=16) => ("few16", 16, 16),
            _ => ("few32", 32, 12),
        };
        Few {
            name,
            rows: tile,
            warps,
            team: match format.quantised() {
                true => 1,
                false if warps % 8 == 0 => 8,
                false => 2,
            },
            table: match (format.values, half) {
                (None, _) => 0,
                (Some(_), Half::F32) => SINGLES,
                (Some(_), _) => PAIRS,
            },
        }
    }

    /// Bytes of the table and of rows of so many groups of k.
    fn staged(&self, half: Half, rows: usize, groups: usize) -> usize {
        let bytes = rows * groups * GROUP * half.bytes();
        if self.table == PAIRS {
            PAIRS + bytes.saturating_sub(PAIRS / 2)
        } else {
            self.table + bytes
        }
    }

    /// `sms` multiprocessors, with so much shared memory for a thread block.
    fn deal(&self, half: Half, shape: &Shape, sms: usize, shared: usize) -> Deal {
        let groups = shape.k.div_ceil(GROUP).max(1);
        let (rows, depth) = (shape.rows.min(self.rows), shape.rows.div_ceil(self.rows));
        let panels = shape.n.div_ceil(PANEL);
        let tiles = panels / shape.tile;
        // Sums of panels that ended in a team, and those of each warp, for which the room of rows serves.
        let slot = self.team * rows * PANEL * 4;
        let open = self.warps * rows * PANEL * 4;
        let most_slots = (shared / 3 / slot).max(2 + shape.tile);
        let room = shared.saturating_sub(most_slots.min(panels) * slot);
        let fits = |groups: &usize| self.staged(half, rows, *groups) <= room;
        let parts = |slices: &usize| groups.div_ceil(*slices);
        let slices = (1..=groups)
            .find(|slices| fits(&parts(slices)))
            .unwrap_or(groups);
        let slice = parts(&slices) * GROUP;
        let slices = shape.k.div_ceil(slice).max(1);

        let blocks = (sms / (slices * depth)).max(1);
        let spread = blocks.min(tiles);
        let more = tiles.div_ceil(spread) * PANEL * shape.tile * shape.k * shape.bits / 8;
        let even = shape.n * shape.k * shape.bits / 8 / blocks;
        let whole = slices == 1 && more.saturating_sub(even) <= SHARING;
        let (blocks, slots) = if whole {
            let blocks = spread.max(tiles.div_ceil((most_slots / shape.tile).max(1)));
            (blocks, tiles.div_ceil(blocks) * shape.tile)
        } else {
            // A run that does not begin with a panel touches two panels more than its length says.
            let blocks = blocks.max(panels.div_ceil(most_slots - 2));
            (blocks, (panels / blocks + 2).min(panels))
        };
        let shares = !whole || slices > 1;
        Deal {
            blocks,
            slices,
            depth,
            slice,
            whole,
            slots,
            shared: self.staged(half, rows, slice / GROUP).max(open) + slots * slot,
            sums: usize::from(shares) * depth * slices * blocks * slots * rows * PANEL,
        }
    }
}

/// Bits of a weight's value, about.
fn bits(dtype: WeightDtype, half: Half) -> usize {
    match dtype {
        WeightDtype::F32 | WeightDtype::Bf16 | WeightDtype::F16 => 8 * half.bytes(),
        WeightDtype::Q8 | WeightDtype::Int8(_) => 8,
        WeightDtype::Q4 | WeightDtype::Bnb4(_) => 4,
    }
}

/// Activations as kernels take them: their address and the values from row to row, and the memory they are in if
/// that was made for them.
struct Prepared {
    ptr: DevicePtr,
    stride: usize,
    _memory: Option<Memory>,
}

/// Brings activations into T, with this many values from row to row, rotated or not.
fn prepare(cuda: &Arc<Cuda>, x: View, stride: usize, rotated: bool) -> Prepared {
    let in_type = x.kind == Kind::Half || cuda.half() == Half::F32;
    if in_type && stride == x.cols && !rotated {
        return Prepared {
            ptr: x.ptr,
            stride,
            _memory: None,
        };
    }
    let memory = cuda.alloc(x.rows * stride * cuda.half().bytes());
    if rotated {
        rotate(cuda, x, stride, (memory.ptr(), Kind::Half));
    } else {
        let args = [
            Arg::Ptr(x.ptr),
            Arg::Int(u32::from(x.kind == Kind::F32)),
            Arg::count(x.cols),
            Arg::count(stride),
            Arg::Ptr(memory.ptr()),
        ];
        let grid = [x.rows, stride.div_ceil(256), 1];
        cuda.launch(&name(cuda, "cast"), grid, 256, 0, &args);
    }
    Prepared {
        ptr: memory.ptr(),
        stride,
        _memory: Some(memory),
    }
}

/// Rotates rows, or rotates them back.
fn rotate(cuda: &Cuda, x: View, stride: usize, (out, kind): (DevicePtr, Kind)) {
    const LARGEST: usize = 512;
    const WARPS: usize = 8;
    let rest = (x.cols % LARGEST).count_ones() as usize;
    // One more writes the padding.
    let blocks = x.cols / LARGEST + rest + usize::from(stride > x.cols);
    let args = [
        Arg::Ptr(x.ptr),
        Arg::Int(u32::from(x.kind == Kind::F32)),
        Arg::count(x.cols),
        Arg::count(stride),
        Arg::Int(u32::from(kind == Kind::Half)),
        Arg::Ptr(out),
    ];
    let grid = [x.rows, blocks.div_ceil(WARPS), 1];
    cuda.launch(&name(cuda, "rotate"), grid, WARPS * 32, 0, &args);
}

fn name(cuda: &Cuda, kernel: &str) -> String {
    format!("{kernel}_{}", cuda.half().suffix())
}

/// What becomes of sums, as kernels take it: bias, function, and where it goes.
struct Then {
    bias: DevicePtr,
    act: Option<Activation>,
    add: bool,
    /// The function of the first half of outputs is multiplied with the second.
    gated: bool,
    out: View,
}

impl Then {
    fn args(&self) -> [Arg; 4] {
        let place = match (self.gated, self.add, self.out.kind) {
            (true, _, _) => 3,
            (false, true, _) => 2,
            (false, false, Kind::F32) => 1,
            (false, false, Kind::Half) => 0,
        };
        [
            Arg::Ptr(self.bias),
            number(self.act),
            Arg::Int(place),
            Arg::Ptr(self.out.ptr),
        ]
    }
}

/// `out = act(x·Wᵀ + bias)` or `out += x·Wᵀ + bias`; `bias` is f32. What is added to is f32.
pub(crate) fn linear(
    cuda: &Arc<Cuda>,
    x: View,
    w: &DeviceWeight,
    bias: Option<DevicePtr>,
    then: Epilogue,
    out: View,
) {
    let (act, add) = match then {
        Epilogue::Store(act) => (act, false),
        Epilogue::Add => (None, true),
    };
    assert!(
        !add || out.kind == Kind::F32 || cuda.half() == Half::F32,
        "a residual that is not f32. This is a bug."
    );
    if x.rows == 0 || w.n == 0 {
        return;
    }
    let then = Then {
        bias: bias.unwrap_or(0),
        act,
        add,
        gated: false,
        out,
    };
    let format = Format::of(w.dtype, cuda.half());
    if takes_few(cuda, x.rows, w, &format) {
        few(cuda, x, w, &format, &then);
    } else {
        many(cuda, x, w, &format, &then);
    }
}

/// Whether a kernel for few rows does this product.
fn takes_few(cuda: &Cuda, rows: usize, w: &DeviceWeight, format: &Format) -> bool {
    let aligned = w.k.is_multiple_of(CHUNK) || format.quantised();
    let counters = rows.div_ceil(CHUNK) * w.n.div_ceil(PANEL);
    aligned && counters <= COUNTERS && rows <= format.few(cuda)
}

/// `out = act(x·Gᵀ) ∘ (x·Uᵀ)`, with `w` = G above U and `out` in T, where one kernel can do that: `false`, and nothing
/// done, where not.
pub(crate) fn gated_linear(
    cuda: &Arc<Cuda>,
    x: View,
    w: &DeviceWeight,
    act: Activation,
    out: View,
) -> bool {
    let format = Format::of(w.dtype, cuda.half());
    let in_type = out.kind == Kind::Half || cuda.half() == Half::F32;
    if !w.n.is_multiple_of(2 * PANEL) || !in_type || !takes_few(cuda, x.rows, w, &format) {
        return false;
    }
    let then = Then {
        bias: 0,
        act: Some(act),
        add: false,
        gated: true,
        out,
    };
    if x.rows > 0 && w.n > 0 {
        few(cuda, x, w, &format, &then);
    }
    true
}

fn few(cuda: &Arc<Cuda>, x: View, w: &DeviceWeight, format: &Format, then: &Then) {
    let half = cuda.half();
    let x_in_type = prepare(cuda, x, w.k.next_multiple_of(CHUNK), format.rotated);
    let kernel = Few::of(half, x.rows, format);
    let shape = Shape {
        rows: x.rows,
        n: w.n,
        k: w.k,
        tile: if then.gated { 2 } else { 1 },
        bits: bits(w.dtype, half),
    };
    let deal = kernel.deal(half, &shape, cuda.sms(), cuda.shared - 1024);
    let sums = (deal.sums > 0).then(|| cuda.alloc(deal.sums * 4));

    let mut args = vec![
        Arg::Ptr(x_in_type.ptr),
        Arg::count(x_in_type.stride),
        Arg::count(x.rows),
        Arg::Ptr(w.ptr),
        Arg::count(w.n),
        Arg::count(w.k),
        Arg::count(deal.slice),
        Arg::Int(u32::from(deal.whole)),
        Arg::count(deal.slots),
        table(cuda, format.values),
        Arg::Float(format.back),
    ];
    args.extend(then.args());
    args.push(Arg::Ptr(sums.as_ref().map_or(0, Memory::ptr)));
    args.push(Arg::Ptr(counters(cuda)));
    let grid = [deal.blocks, deal.slices, deal.depth];
    let full_name = name(cuda, &format!("{}_{}", kernel.name, format.name));
    cuda.launch(&full_name, grid, kernel.warps * 32, deal.shared, &args);
}

/// Where [`COUNTERS`] counters are.
fn counters(cuda: &Arc<Cuda>) -> DevicePtr {
    let make = || {
        let memory = cuda.alloc(COUNTERS * 4);
        cuda.zero(&memory);
        memory
    };
    cuda.counters.get_or_init(make).ptr()
}

fn many(cuda: &Arc<Cuda>, x: View, w: &DeviceWeight, format: &Format, then: &Then) {
    if !format.quantised() {
        let x_in_type = prepare(cuda, x, w.k, false);
        return multiply(cuda, &x_in_type, (w.ptr, w.n), x.rows, then);
    }
    let stride = w.k.next_multiple_of(CHUNK);
    let x_in_type = prepare(cuda, x, stride, format.rotated);
    let rows_of_w = cuda.alloc(w.n * stride * cuda.half().bytes());
    let args = [
        Arg::Ptr(w.ptr),
        Arg::count(w.n),
        Arg::count(w.k),
        Arg::count(stride),
        table(cuda, format.exact),
        Arg::Float(format.back),
        Arg::Ptr(rows_of_w.ptr()),
    ];
    let grid = [stride.div_ceil(8 * 32), w.n.div_ceil(PANEL), 1];
    let kernel = name(cuda, &format!("dequantise_{}", format.name));
    cuda.launch(&kernel, grid, 256, SINGLES, &args);
    multiply(cuda, &x_in_type, (rows_of_w.ptr(), w.n), x.rows, then);
}

/// The product with a row-major weight of T, `[n, stride of x]`.
fn multiply(cuda: &Arc<Cuda>, x: &Prepared, (w, n): (DevicePtr, usize), rows: usize, then: &Then) {
    if by_library(cuda, x, (w, n), rows, then) {
        return;
    }
    let tensor_cores = cuda.half() != Half::F32 && x.stride.is_multiple_of(CHUNK);
    let kernel = if tensor_cores { "gemm" } else { "gemm_plain" };
    let mut args = vec![
        Arg::Ptr(x.ptr),
        Arg::Ptr(w),
        Arg::count(rows),
        Arg::count(n),
        Arg::count(x.stride),
    ];
    args.extend(then.args());
    let grid = [rows.div_ceil(TILE) * n.div_ceil(TILE), 1, 1];
    cuda.launch(&name(cuda, kernel), grid, 256, TILE_BYTES, &args);
}

/// The product by cuBLASLt, and what that leaves to do; `false` if it cannot.
fn by_library(
    cuda: &Arc<Cuda>,
    x: &Prepared,
    (w, n): (DevicePtr, usize),
    rows: usize,
    then: &Then,
) -> bool {
    let Some(library) = cuda.blaslt() else {
        return false;
    };
    let kind = if cuda.half() == Half::F32 {
        Kind::F32
    } else {
        then.out.kind
    };
    let relu = then.act == Some(Activation::Relu);
    // A function that the library lacks comes after the bias, so both come later.
    let whole = then.act.is_none() || relu;
    let narrowed = (whole && then.bias != 0 && kind == Kind::Half)
        .then(|| prepare(cuda, bias_row(then.bias, n), n, false));
    let bias = match &narrowed {
        _ if !whole || then.bias == 0 => None,
        Some(narrowed) => Some(narrowed.ptr),
        None => Some(then.bias),
    };
    let product = Product {
        x: x.ptr,
        w,
        out: then.out.ptr,
        rows,
        n,
        k: x.stride,
        kind,
        add: then.add,
        bias,
        relu: whole && relu,
    };
    if library.multiply(cuda, &product) {
        if !whole {
            finish(cuda, then, kind, rows, n);
        }
        return true;
    }
    // Perhaps without the bias.
    let bare = Product {
        bias: None,
        relu: false,
        ..product
    };
    let wanted_more = bias.is_some() || product.relu;
    if wanted_more && library.multiply(cuda, &bare) {
        finish(cuda, then, kind, rows, n);
        return true;
    }
    false
}

/// A bias as a matrix of one row.
fn bias_row(ptr: DevicePtr, cols: usize) -> View {
    View {
        ptr,
        rows: 1,
        cols,
        kind: Kind::F32,
    }
}

/// Bias and function, in place.
fn finish(cuda: &Cuda, then: &Then, kind: Kind, rows: usize, n: usize) {
    let args = [
        Arg::Ptr(then.out.ptr),
        Arg::Int(u32::from(kind == Kind::Half)),
        Arg::count(n),
        Arg::Ptr(then.bias),
        number(then.act),
    ];
    cuda.launch(&name(cuda, "epilogue"), [rows, 1, 1], 256, 0, &args);
}

/// `out[i] = W[ids[i]]`.
pub(crate) fn gather(cuda: &Arc<Cuda>, w: &DeviceWeight, ids: &[u32], out: View) {
    if ids.is_empty() || w.k == 0 {
        return;
    }
    let format = Format::of(w.dtype, cuda.half());
    let wide = format
        .rotated
        .then(|| cuda.alloc(ids.len() * w.k * size_of::<f32>()));
    let to = match &wide {
        Some(memory) => View {
            ptr: memory.ptr(),
            kind: Kind::F32,
            ..out
        },
        None => out,
    };
    let args = [
        Arg::Ptr(w.ptr),
        Arg::count(w.k),
        table(cuda, format.exact),
        Arg::Float(format.back),
        Arg::Ptr(cuda.table(ids)),
        to.half(),
        Arg::Ptr(to.ptr),
    ];
    let grid = [ids.len(), w.k.div_ceil(256), 1];
    let kernel = name(cuda, &format!("gather_{}", format.name));
    cuda.launch(&kernel, grid, 256, 0, &args);
    if wide.is_some() {
        rotate(cuda, to, w.k, (out.ptr, out.kind));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an H200 has.
    const SMS: usize = 132;
    const SHARED: usize = 226 << 10;

    fn deal(dtype: WeightDtype, rows: usize, n: usize, k: usize, tile: usize) -> Deal {
        let format = Format::of(dtype, Half::Bf16);
        let bits = bits(dtype, Half::Bf16);
        let shape = Shape {
            rows,
            n,
            k,
            tile,
            bits,
        };
        Few::of(Half::Bf16, rows, &format).deal(Half::Bf16, &shape, SMS, SHARED)
    }

    #[test]
    fn all_multiprocessors_have_about_the_same_to_do() {
        // Three panels or two each, one panel each, and parts of panels.
        for (n, k, whole, blocks) in [
            (12288, 4096, true, 132),
            (4096, 4096, true, 128),
            (4096, 11008, true, 128),
            (22016, 4096, false, 132),
            (1024, 8192, false, 132),
        ] {
            let found = deal(WeightDtype::Bf16, 1, n, k, 1);
            assert_eq!(
                (found.whole, found.blocks, found.slices),
                (whole, blocks, 1),
                "{n}x{k}"
            );
        }
    }

    #[test]
    fn what_a_thread_block_keeps_fits() {
        for rows in [1, 2, 5, 8, 9, 16, 17, 32, 96] {
            for (n, k) in [
                (1, 1),
                (33, 70),
                (32064, 4096),
                (4096, 11008),
                (128_256, 8192),
            ] {
                for dtype in [WeightDtype::Bf16, WeightDtype::Q8, WeightDtype::Q4] {
                    for (sms, shared) in [(SMS, SHARED), (58, 98 << 10), (1, 98 << 10)] {
                        let format = Format::of(dtype, Half::Bf16);
                        let shape = Shape {
                            rows,
                            n,
                            k,
                            tile: if n % 64 == 0 { 2 } else { 1 },
                            bits: bits(dtype, Half::Bf16),
                        };
                        let found = Few::of(Half::Bf16, rows, &format).deal(
                            Half::Bf16,
                            &shape,
                            sms,
                            shared,
                        );
                        assert!(
                            found.shared <= shared,
                            "{rows} {n}x{k} {dtype:?}: {found:?}"
                        );
                        assert!(found.slice * found.slices >= k);
                    }
                }
            }
        }
    }

    #[test]
    fn rows_lie_in_the_gaps_of_the_table() {
        let found = deal(WeightDtype::Q4, 1, 4096, 4096, 1);
        assert_eq!(found.shared, PAIRS + PANEL * 4);
    }
}
