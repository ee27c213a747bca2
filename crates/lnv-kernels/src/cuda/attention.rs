//! Rotary embedding and attention: which kernel for which queries, its grid and its tables.
//!
//! Decision: the spans of a call go to four kernels. One query of a sequence is decoded, its blocks of
//! the cache shared out over the GPU, by one kernel where each head of queries has keys of its own and by
//! another where several share them; many queries are a prompt's and go to the tensor cores in tiles; what
//! none of them is for (f32, other head sizes) goes to a general one. What a kernel must know of the
//! spans is one table, uploaded once for all layers of a pass, because they have the same.
//!
//! A prompt over a cache of another type than T first has its blocks copied as T: that costs one pass
//! over the cache, which is nothing beside the products of many queries with it.
//!
//! Refused: odd heads, and heads of more than 256 values.

use std::sync::Arc;

use super::memory::Memory;
use super::{ARRIVALS, Arg, Cuda, DeviceLayer, Half, Kind, View};
use crate::kv_cache::{Heads, KV_BLOCK, KvDtype, Slot};
use crate::ops::{AttentionShape, Span};

/// Threads of every block here.
const THREADS: usize = 128;
/// Values of a head that the general kernels have room for.
const MOST_DIM: usize = 256;
/// Query heads that a block of the decoding kernel takes.
const GROUP: usize = 8;
/// Shares of a sequence that can be merged.
const MOST_SPLITS: usize = 128;
/// Blocks of the decoding kernel that run at once on a multiprocessor, and of that for single heads.
const DECODE_BLOCKS: usize = 3;
const SINGLE_BLOCKS: usize = 4;
/// Warps of a block.
const WARPS: usize = THREADS / 32;

/// The kernels' number of a cache's type.
fn kind_of(cache: &DeviceLayer) -> Arg {
    Arg::Int(match cache.kind {
        KvDtype::Bf16 => 0,
        KvDtype::F32 => 1,
        KvDtype::Int8 => 2,
    })
}

/// # Panics
/// The matrix has not the type of scratch, or the heads are no kernel's.
#[track_caller]
fn check(cuda: &Cuda, op: &str, matrices: &[View], heads: Heads) {
    let wide = |view: &View| view.kind == Kind::F32 && cuda.half() != Half::F32;
    assert!(
        !matrices.iter().any(wide),
        "{op}: a matrix in f32 where scratch is {:?}. This is a bug.",
        cuda.half()
    );
    assert!(
        heads.head_dim <= MOST_DIM && heads.head_dim.is_multiple_of(2),
        "{op}: heads of {} values; the GPU's kernels take even sizes up to {MOST_DIM}",
        heads.head_dim
    );
}

/// Launches `kernel`, of T, in blocks of [`THREADS`].
fn launch(cuda: &Cuda, kernel: &str, grid: [usize; 3], shared: usize, args: &[Arg]) {
    let name = format!("{kernel}_{}", cuda.half().suffix());
    cuda.launch(&name, grid, THREADS, shared, args);
}

/// Heads as kernels take them that are made for one size of head.
fn counts(heads: Heads) -> [Arg; 2] {
    [Arg::count(heads.heads), Arg::count(heads.kv_heads)]
}

/// Rotates q and k in place, and writes k and v to the cache.
pub(crate) fn rope_write_kv(
    cuda: &Arc<Cuda>,
    qkv: View,
    cos_sin: View,
    heads: Heads,
    cache: &DeviceLayer,
    slots: &[Slot],
) {
    check(cuda, "rope_write_kv", &[qkv], heads);
    assert!(
        cos_sin.kind == Kind::F32,
        "rope_write_kv: cosines in {:?}. This is a bug.",
        cuda.half()
    );
    let slots: Vec<u32> = slots
        .iter()
        .flat_map(|slot| [slot.block, slot.offset])
        .collect();
    let all = heads.heads + 2 * heads.kv_heads;
    let [q_heads, kv_heads] = counts(heads);
    let args = [
        Arg::Ptr(qkv.ptr),
        Arg::Ptr(cos_sin.ptr),
        Arg::Ptr(cache.ptr),
        Arg::Ptr(cuda.table(&slots)),
        q_heads,
        kv_heads,
        Arg::count(heads.head_dim),
        kind_of(cache),
    ];
    let grid = [qkv.rows, all.div_ceil(THREADS / 32), 1];
    launch(cuda, "rope_write_kv", grid, 0, &args);
}

/// A kernel that takes spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Single,
    Decode,
    Prefill,
    General,
}

impl Way {
    fn of(cuda: &Cuda, cache: &DeviceLayer, span: &Span<'_>, shape: &AttentionShape) -> Way {
        let known = matches!(cache.head_dim, 64 | 128) && shape.scale > 0.0;
        let fits = known && cuda.half() != Half::F32;
        match span.q_len {
            _ if !fits => Way::General,
            1 if cache.kind == KvDtype::F32 => Way::General,
            1 if shape.heads.queries_per_kv() == 1 => Way::Single,
            1 => Way::Decode,
            _ => Way::Prefill,
        }
    }
}

/// Blocks of the cache that hold a span's tokens.
fn blocks_of<'a>(span: &Span<'a>) -> &'a [u32] {
    &span.blocks[..span.kv_len.div_ceil(KV_BLOCK)]
}

/// What all kernels of a call are given.
struct Call<'a> {
    cuda: &'a Arc<Cuda>,
    qkv: View,
    out: View,
    cache: &'a DeviceLayer,
    shape: &'a AttentionShape,
}

/// Spans and their blocks as a table: an entry of four numbers for each span, then all blocks.
fn entries(spans: &[&Span<'_>]) -> Vec<u32> {
    let mut first_block = 0;
    let mut numbers = Vec::new();
    for span in spans {
        let entry = [span.q_start, span.q_len, span.kv_len, first_block];
        numbers.extend(entry.map(|n| n as u32));
        first_block += blocks_of(span).len();
    }
    numbers.extend(spans.iter().flat_map(|span| blocks_of(span)));
    numbers
}

/// Causal attention of each span's queries over its blocks.
pub(crate) fn paged_attention(
    cuda: &Arc<Cuda>,
    qkv: View,
    cache: &DeviceLayer,
    spans: &[Span<'_>],
    shape: &AttentionShape,
    out: View,
) {
    check(cuda, "paged_attention", &[qkv, out], shape.heads);
    let call = Call {
        cuda,
        qkv,
        out,
        cache,
        shape,
    };
    let of = |way: Way| -> Vec<&Span<'_>> {
        let some = spans.iter().filter(|span| span.q_len > 0);
        some.filter(|span| Way::of(cuda, cache, span, shape) == way)
            .collect()
    };
    call.single(&of(Way::Single));
    call.decode(&of(Way::Decode));
    call.prefill(&of(Way::Prefill));
    call.general(&of(Way::General));
}

impl Call<'_> {
    fn window(&self) -> Arg {
        let window = self.shape.window.unwrap_or(usize::MAX);
        Arg::count(window.min(i32::MAX as usize))
    }

    /// Where the entries of so many spans are, and their blocks.
    fn table(&self, numbers: &[u32], spans: usize) -> [Arg; 2] {
        let table = self.cuda.table(numbers);
        [Arg::Ptr(table), Arg::Ptr(table + 16 * spans as u64)]
    }

    /// One query of each, whose heads share nothing.
    fn single(&self, spans: &[&Span<'_>]) {
        if spans.is_empty() {
            return;
        }
        let Heads {
            heads, head_dim, ..
        } = self.shape.heads;
        let of = match self.cache.kind {
            KvDtype::Int8 => "_int8",
            _ => "",
        };
        let lists = spans.len() * heads;
        let splits = if lists > ARRIVALS {
            1
        } else {
            // Of either type a warp takes 16 keys of 128 values at a time.
            self.splits(spans, lists, SINGLE_BLOCKS, 2048 / head_dim, WARPS)
        };
        // Nothing is left where nothing is split.
        let partial = if splits == 1 { 0 } else { lists * splits };
        let stats = self.cuda.alloc(partial * 2 * size_of::<f32>());
        let sums = self.cuda.alloc(partial * head_dim * size_of::<f32>());
        let [table, blocks] = self.table(&entries(spans), spans.len());
        let args = [
            Arg::Ptr(self.qkv.ptr),
            Arg::Ptr(self.cache.ptr),
            table,
            blocks,
            Arg::Ptr(stats.ptr()),
            Arg::Ptr(sums.ptr()),
            Arg::Ptr(self.cuda.arrivals()),
            Arg::Ptr(self.out.ptr),
            Arg::count(heads),
            Arg::Float(self.shape.scale),
            self.window(),
        ];
        let kernel = format!("single_attention_{head_dim}{of}");
        launch(self.cuda, &kernel, [splits, heads, spans.len()], 0, &args);
    }

    /// One query of each.
    fn decode(&self, spans: &[&Span<'_>]) {
        if spans.is_empty() {
            return;
        }
        let heads = self.shape.heads;
        let groups = heads.kv_heads * heads.queries_per_kv().div_ceil(GROUP);
        let lists = groups * spans.len();
        let splits = self.splits(spans, lists, DECODE_BLOCKS, KV_BLOCK, 1);
        let partial = spans.len() * heads.heads * splits;
        let stats = self.cuda.alloc(partial * 2 * size_of::<f32>());
        let sums = self.cuda.alloc(partial * heads.head_dim * size_of::<f32>());
        let [table, blocks] = self.table(&entries(spans), spans.len());
        let [q_heads, kv_heads] = counts(heads);
        let args = [
            Arg::Ptr(self.qkv.ptr),
            Arg::Ptr(self.cache.ptr),
            table,
            blocks,
            Arg::Ptr(stats.ptr()),
            Arg::Ptr(sums.ptr()),
            Arg::Ptr(self.out.ptr),
            q_heads,
            kv_heads,
            Arg::Float(self.shape.scale),
            self.window(),
        ];
        let of = if self.cache.kind == KvDtype::Int8 {
            "_int8"
        } else {
            ""
        };
        let kernel = format!("decode_attention_{}{of}", heads.head_dim);
        let grid = [splits, groups, spans.len()];
        let shared = decode_shared(heads.head_dim, self.cache.kind);
        launch(self.cuda, &kernel, grid, shared, &args);
        if splits > 1 {
            let args = [
                Arg::Ptr(stats.ptr()),
                Arg::Ptr(sums.ptr()),
                table,
                Arg::Ptr(self.out.ptr),
                q_heads,
                Arg::count(heads.head_dim),
                Arg::count(splits),
            ];
            let grid = [heads.heads, spans.len(), 1];
            launch(self.cuda, "combine_attention", grid, 0, &args);
        }
    }

    /// Into how many shares `lists` lists of keys are split that are as long as the longest sequence: so that
    /// the last block ends soonest. A multiprocessor runs `room` blocks at once, each of which takes in turn
    /// `keys` keys for each of `warps`.
    fn splits(
        &self,
        spans: &[&Span<'_>],
        lists: usize,
        room: usize,
        keys: usize,
        warps: usize,
    ) -> usize {
        let window = self.shape.window.unwrap_or(usize::MAX);
        let seen = |span: &&Span<'_>| {
            let first = span.kv_len.saturating_sub(window) / keys;
            span.kv_len.div_ceil(keys) - first
        };
        let turns = spans.iter().map(seen).max().unwrap_or(1).div_ceil(warps);
        let end = |splits: usize| {
            let waves = (lists * splits).div_ceil(room * self.cuda.sms());
            let share = turns.div_ceil(splits);
            // A block takes a turn's time to begin and to end; some take an eighth longer than others.
            8 * waves * (share + 1) + share
        };
        (1..=turns.clamp(1, MOST_SPLITS))
            .min_by_key(|splits| end(*splits))
            .unwrap_or(1)
    }

    /// Tiles of many queries.
    fn prefill(&self, spans: &[&Span<'_>]) {
        if spans.is_empty() {
            return;
        }
        let heads = self.shape.heads;
        let rows = self.tile_rows(spans);
        let mut numbers = entries(spans);
        let blocks_at = 4 * spans.len();
        let blocks_count = numbers.len() - blocks_at;
        // Of a copied cache, blocks are numbered as they were copied.
        let copied = self.cache.kind != KvDtype::Bf16;
        if copied {
            numbers.extend(0..blocks_count as u32);
        }
        let work_at = numbers.len();
        numbers.extend(self.tiles(spans, rows).into_iter().flatten());
        let tiles = (numbers.len() - work_at) / 2;
        let table = self.cuda.table(&numbers);
        let place = |at: usize| table + 4 * at as u64;

        let copy = copied.then(|| self.copy(place(blocks_at), blocks_count));
        let (cache, blocks) = match &copy {
            Some(copy) => (copy.ptr(), place(blocks_at + blocks_count)),
            None => (self.cache.ptr, place(blocks_at)),
        };
        let [q_heads, kv_heads] = counts(heads);
        let args = [
            Arg::Ptr(self.qkv.ptr),
            Arg::Ptr(cache),
            Arg::Ptr(table),
            Arg::Ptr(blocks),
            Arg::Ptr(place(work_at)),
            Arg::Ptr(self.out.ptr),
            q_heads,
            kv_heads,
            Arg::Float(self.shape.scale),
            self.window(),
        ];
        let kernel = format!("prefill_attention_{}_of_{rows}", heads.head_dim);
        let shared = flash_shared(heads.head_dim, rows);
        launch(self.cuda, &kernel, [heads.heads, tiles, 1], shared, &args);
    }

    /// Queries in a tile: 128 where their tiles fill the GPU, and where two blocks of them find room on a
    /// multiprocessor, which those of 8.6 and 8.9 have too little shared memory for.
    fn tile_rows(&self, spans: &[&Span<'_>]) -> usize {
        let heads = self.shape.heads;
        if heads.head_dim == 64 {
            return 128;
        }
        let tiles: usize = spans.iter().map(|span| span.q_len.div_ceil(128)).sum();
        let small = matches!(self.cuda.capability(), (8, 6 | 7 | 9) | (12, _));
        if small || tiles * heads.heads < 2 * self.cuda.sms() {
            64
        } else {
            128
        }
    }

    /// Pairs of a span and the first query of a tile, those with the most keys first: they end last.
    fn tiles(&self, spans: &[&Span<'_>], rows: usize) -> Vec<[u32; 2]> {
        let window = self.shape.window.unwrap_or(usize::MAX);
        let mut tiles = Vec::new();
        for (index, span) in spans.iter().enumerate() {
            for first in (0..span.q_len).step_by(rows) {
                let position = span.kv_len - span.q_len + first;
                let end = (position + rows).min(span.kv_len);
                let keys = end - (position + 1).saturating_sub(window);
                tiles.push((keys.div_ceil(KV_BLOCK), [index as u32, first as u32]));
            }
        }
        tiles.sort_by_key(|(keys, _)| std::cmp::Reverse(*keys));
        tiles.into_iter().map(|(_, tile)| tile).collect()
    }

    /// The blocks of a table as a cache of T.
    fn copy(&self, blocks: u64, count: usize) -> Memory {
        let Heads {
            kv_heads, head_dim, ..
        } = self.shape.heads;
        let record = 2 * KV_BLOCK * head_dim * self.cuda.half().bytes();
        let copy = self.cuda.alloc(count * kv_heads * record);
        let args = [
            Arg::Ptr(self.cache.ptr),
            Arg::Ptr(blocks),
            Arg::Ptr(copy.ptr()),
            Arg::count(kv_heads),
            Arg::count(head_dim),
            kind_of(self.cache),
        ];
        launch(self.cuda, "cache_as", [count, kv_heads, 1], 0, &args);
        copy
    }

    /// A block for each query and head.
    fn general(&self, spans: &[&Span<'_>]) {
        let Some(longest) = spans.iter().map(|span| span.q_len).max() else {
            return;
        };
        let heads = self.shape.heads;
        let [table, blocks] = self.table(&entries(spans), spans.len());
        let [q_heads, kv_heads] = counts(heads);
        let args = [
            Arg::Ptr(self.qkv.ptr),
            Arg::Ptr(self.cache.ptr),
            table,
            blocks,
            Arg::Ptr(self.out.ptr),
            q_heads,
            kv_heads,
            Arg::count(heads.head_dim),
            Arg::Float(self.shape.scale),
            self.window(),
            kind_of(self.cache),
        ];
        let grid = [longest, heads.heads, spans.len()];
        launch(self.cuda, "paged_attention_any", grid, 0, &args);
    }

    /// One span's softmax weights.
    fn eager(&self, table: [Arg; 2], index: usize, span: &Span<'_>) -> Vec<f32> {
        let heads = self.shape.heads;
        let mut found = vec![0.0; heads.heads * span.q_len * span.kv_len];
        if found.is_empty() {
            return found;
        }
        let weights = self.cuda.alloc(size_of_val(found.as_slice()));
        let [q_heads, kv_heads] = counts(heads);
        let args = [
            Arg::Ptr(self.qkv.ptr),
            Arg::Ptr(self.cache.ptr),
            table[0],
            Arg::count(index),
            table[1],
            Arg::Ptr(self.out.ptr),
            Arg::Ptr(weights.ptr()),
            q_heads,
            kv_heads,
            Arg::count(heads.head_dim),
            Arg::Float(self.shape.scale),
            self.window(),
            kind_of(self.cache),
        ];
        let grid = [span.q_len, heads.heads, 1];
        launch(self.cuda, "paged_attention_eager", grid, 0, &args);
        self.cuda
            .read(&weights, 0, bytemuck::cast_slice_mut(&mut found));
        found
    }
}

/// The same with whole softmax rows, which are returned: for each span `[heads, q_len, kv_len]`.
pub(crate) fn paged_attention_eager(
    cuda: &Arc<Cuda>,
    qkv: View,
    cache: &DeviceLayer,
    spans: &[Span<'_>],
    shape: &AttentionShape,
    out: View,
) -> Vec<Vec<f32>> {
    check(cuda, "paged_attention_eager", &[qkv, out], shape.heads);
    let call = Call {
        cuda,
        qkv,
        out,
        cache,
        shape,
    };
    let all: Vec<&Span<'_>> = spans.iter().collect();
    let numbers = entries(&all);
    spans
        .iter()
        .enumerate()
        .map(|(index, span)| call.eager(call.table(&numbers, spans.len()), index, span))
        .collect()
}

/// Bytes of shared memory of the kernels in flash_attention.cu: rows of whole 16 values and 8 more, 64 of
/// keys and 64 of values, and the queries', which 64 of them borrow from the values.
fn flash_shared(head_dim: usize, rows: usize) -> usize {
    let queries = if rows == 64 { 0 } else { rows };
    (queries + 2 * KV_BLOCK) * (head_dim.next_multiple_of(16) + 8) * size_of::<u16>()
}

/// The same in decode_attention.cu (`DecodeShared`): for each of four warps two stages of 16 keys and values,
/// as pieces of 16 bytes for each lane, with int8's scales; and the queries. Sums take less.
fn decode_shared(head_dim: usize, kind: KvDtype) -> usize {
    let (pieces, scales) = match kind {
        KvDtype::Int8 => (2 * head_dim / 64 + 4, 128),
        _ => (2 * head_dim / 32 + 4 * head_dim / 64, 16),
    };
    8 * (pieces * 512 + scales) + 16 * head_dim + 16
}

/// Attention of each segment of `len` rows with itself.
pub(crate) fn full_attention(
    cuda: &Arc<Cuda>,
    qkv: View,
    len: usize,
    heads: Heads,
    scale: f32,
    out: View,
) {
    check(cuda, "full_attention", &[qkv, out], heads);
    let segments = qkv.rows / len;
    let [q_heads, kv_heads] = counts(heads);
    let mut args = vec![
        Arg::Ptr(qkv.ptr),
        Arg::Ptr(out.ptr),
        Arg::count(len),
        q_heads,
        kv_heads,
    ];
    if cuda.half() != Half::F32 && matches!(heads.head_dim, 64 | 72) && scale > 0.0 {
        args.push(Arg::Float(scale));
        let kernel = format!("full_attention_{}", heads.head_dim);
        let grid = [len.div_ceil(128), heads.heads, segments];
        let shared = flash_shared(heads.head_dim, 128);
        launch(cuda, &kernel, grid, shared, &args);
    } else {
        args.extend([Arg::count(heads.head_dim), Arg::Float(scale)]);
        let grid = [len, heads.heads, segments];
        launch(cuda, "full_attention_any", grid, 0, &args);
    }
}
