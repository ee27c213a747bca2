//! Attention in bf16: by the dot product of vector registers or by the tile registers of AMX.
//!
//! Decision: queries, keys, values and probabilities are rounded to bf16, as every bf16 implementation
//! of the model rounds them; scores, sums and outputs are f32. A score includes the scale and log₂ e, so
//! that a probability is a power of two; its exponent counts from the row's *reference point*, a whole
//! number. Moving that point, when a score climbs more than 2¹⁶ above it, scales what was summed by a
//! power of two, which rounds nothing. The sum is of the rounded probabilities, by the same instruction
//! that multiplies the values.
//!
//! A row goes through groups of keys (8, with AMX 32) counted from the start of its sequence; every sum is
//! one ascending chain over pairs of keys (with AMX over groups). A key that the row does not see has
//! the probability zero exactly. With 1024 keys a *segment* ends: the next one starts with new sums, and
//! segments are added up in ascending order, whether one thread went through all of them or several
//! threads took some each. So a row's bits depend neither on chunking nor on batching nor on the
//! number of threads.

mod amx;
mod blocks;
mod fetch;
mod few;
mod narrow;
mod pack;
mod wide;

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use self::blocks::Blocks;
use self::fetch::Fetch;
use crate::buffer::{Aligned, Buffer};
use crate::cpu::attention::Mask;
use crate::cpu::dot::{Dot, DotKernel, F, I, LANES};
use crate::cpu::scratch::{Shared, with};
use crate::isa::Isa;
use crate::kv_cache::{Heads, KV_BLOCK, KvDtype, LayerCache, Record};
use crate::ops::{AttentionShape, Span};

/// Keys that are looked at together, without AMX.
const GROUP: usize = 8;
/// The largest probability against a reference point, as the bits of a bf16: 2¹⁶.
const LIMIT: u16 = 0x4780;
/// 1 and 1 as a pair of bf16.
const ONES: u32 = 0x3f80_3f80;
/// Keys of a segment.
const SEGMENT: usize = 1024;
/// Rows before the end of a picture's head from which on keys of the next one are fetched.
const NEAR: usize = 160;
/// Multiplications below which waking other threads costs more than it brings.
const SERIAL: usize = 1 << 18;
/// Tiles a thread below which segments are taken apart, so that no thread waits long for the last.
const TILES_A_THREAD: usize = 2;

thread_local! {
    static TILE: Cell<Option<Aligned<u32>>> = const { Cell::new(None) };
    static OFFSETS: Cell<Option<Aligned<u32>>> = const { Cell::new(None) };
    static STATE: Cell<Option<Aligned<f32>>> = const { Cell::new(None) };
    static APART: Cell<Option<Aligned<f32>>> = const { Cell::new(None) };
    static PACKED: Cell<Option<Aligned<u32>>> = const { Cell::new(None) };
}

/// The bits of `2^(score - max)` for a whole `max`, of which the upper half is rounded to bf16: within
/// 0.51 of its last place, and zero below 2⁻¹²⁶.
#[inline(always)]
fn power(dot: Dot, score: F, max: F) -> I {
    // The least relative error of a cubic between 0 and 1: 7.5e-5. The last coefficient has half a bf16
    // of [1, 2) added, so that cutting off the lower half rounds.
    const HALF: f32 = 1.0 / 256.0;
    let whole = dot.floor(score);
    let part = dot.sub(score, whole);
    let p = dot.fma(dot.splat(0.078_024_52), part, dot.splat(0.226_067_16));
    let p = dot.fma(p, part, dot.splat(0.695_833_54));
    let p = dot.fma(p, part, dot.splat(0.999_925_2 + HALF));
    dot.bits(dot.scale(p, dot.sub(whole, max)))
}

/// What a call reads and writes for one key/value head of one sequence; rows are the sequence's queries,
/// for each the heads that share the key/value head.
struct Job<'a> {
    qkv: &'a [f32],
    cols: usize,
    heads: Heads,
    shared: usize,
    /// The scores' factor, log₂ e included.
    factor: f32,
    out: Shared<f32>,
    /// Row of the matrices at which the sequence's queries start.
    start: usize,
    kv_head: usize,
    mask: Mask,
    /// The records that blocks come in.
    form: Record,
    by: By,
}

/// What multiplies.
#[derive(Clone, Copy)]
enum By {
    /// The dot product of vector registers.
    Dot,
    /// Tile registers.
    Amx,
}

impl By {
    fn new(isa: Isa) -> By {
        if isa == Isa::Amx { By::Amx } else { By::Dot }
    }

    /// Query rows of the largest tile.
    fn rows(self) -> usize {
        match self {
            By::Dot => wide::ROWS,
            By::Amx => amx::ROWS,
        }
    }

    /// What a tile needs of a thread's scratch.
    fn scratch_len(self, form: Record) -> usize {
        match self {
            By::Dot => wide::scratch_len(form).max(narrow::scratch_len(form)),
            By::Amx => amx::scratch_len(form).max(few::scratch_len(form)),
        }
    }
}

impl Job<'_> {
    fn head(&self, row: usize) -> usize {
        self.kv_head * self.shared + row % self.shared
    }

    fn query(&self, row: usize) -> &[f32] {
        let d = self.heads.head_dim;
        let at = (self.start + row / self.shared) * self.cols + self.head(row) * d;
        &self.qkv[at..at + d]
    }

    /// The keys that a row sees.
    fn visible(&self, row: usize) -> Range<usize> {
        self.mask.visible(row / self.shared)
    }

    /// The keys that one of the rows sees.
    fn seen(&self, rows: &Range<usize>) -> Range<usize> {
        self.visible(rows.start).start..self.visible(rows.end - 1).end
    }

    /// Where a row's part of the result starts.
    fn result_at(&self, row: usize) -> usize {
        let d = self.heads.head_dim;
        ((self.start + row / self.shared) * self.heads.heads + self.head(row)) * d
    }

    /// The rows' part of the result, to be fetched.
    fn result(&self, rows: &Range<usize>) -> Fetch {
        let d = self.heads.head_dim;
        let queries = rows.start / self.shared..rows.end.div_ceil(self.shared);
        Fetch {
            // SAFETY: the first head of the first row.
            at: unsafe { self.out.at(self.result_at(queries.start * self.shared)) },
            stride: self.heads.heads * d,
            len: self.shared * d,
            rows: queries.len(),
            done: 0,
        }
    }

    /// Rows of queries, to be fetched; they need not exist.
    fn queries(&self, rows: &Range<usize>) -> Fetch {
        let d = self.heads.head_dim;
        let queries = rows.start / self.shared..rows.end.div_ceil(self.shared);
        let at = (self.start + queries.start) * self.cols + self.kv_head * self.shared * d;
        Fetch {
            at: self.qkv.as_ptr().wrapping_add(at),
            stride: self.cols,
            len: self.shared * d,
            rows: queries.len(),
            done: 0,
        }
    }

    /// The keys that all of the rows see.
    fn common(&self, rows: &Range<usize>) -> Range<usize> {
        self.visible(rows.end - 1).start..self.visible(rows.start).end
    }
}

/// What is known of some rows after some keys.
struct State<'a> {
    /// Each row's reference point, a whole number; -∞ before its first key.
    max: &'a mut [f32],
    /// The sum of its probabilities against that.
    sum: &'a mut [f32],
    /// `[rows, columns]`: its outputs, not yet divided by the sum.
    o: &'a mut [f32],
}

impl State<'_> {
    fn len(rows: usize, columns: usize) -> usize {
        rows * (columns + 2)
    }

    fn new(scratch: &mut [f32], rows: usize) -> State<'_> {
        let (max, scratch) = scratch.split_at_mut(rows);
        let (sum, o) = scratch.split_at_mut(rows);
        State { max, sum, o }
    }

    fn fits(&self, rows: usize, columns: usize) -> bool {
        self.max.len() >= rows && self.sum.len() >= rows && self.o.len() >= rows * columns
    }

    /// Rows that have seen nothing.
    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.o.fill(0.0);
    }

    /// The same once more.
    fn again(&mut self) -> State<'_> {
        State {
            max: self.max,
            sum: self.sum,
            o: self.o,
        }
    }
}

/// Attention of each segment of `len` rows with itself; the shapes fit.
pub(crate) fn full_attention(
    isa: Isa,
    qkv: &Buffer,
    (len, heads, scale): (usize, Heads, f32),
    out: &mut Buffer,
) {
    let form = Record::new(KvDtype::Bf16, heads.head_dim);
    let (rows, blocks) = (len * heads.queries_per_kv(), len.div_ceil(KV_BLOCK));
    let call = Call::new(qkv, (heads, scale, form), By::new(isa), out);
    let count = qkv.rows() / len * heads.kv_heads;
    let work = |index: usize| {
        let (start, kv_head) = (index / heads.kv_heads * len, index % heads.kv_heads);
        let job = call.job(start, kv_head, Mask::All(len));
        with(&PACKED, blocks * form.len(), |records| {
            Dot::launch(PackSegment {
                job: &job,
                len,
                records,
            });
            let blocks = Blocks::Packed(records, form);
            let mut fetch = call.fetch(index + 1, len);
            for first in (0..rows).step_by(job.by.rows()) {
                let tile = first..rows.min(first + job.by.rows());
                let fetch = match job.by {
                    By::Dot => &mut fetch[..],
                    // What is fetched too early has left the cache again when it is wanted.
                    By::Amx if rows - first > NEAR => &mut [],
                    By::Amx => &mut fetch[1..2],
                };
                job.tile(&blocks, tile, usize::MAX, fetch);
            }
        });
    };
    each(count, rows * len * count * heads.head_dim, work);
}

/// Causal attention over a cache of bf16 or int8; the shapes fit.
pub(crate) fn paged_attention(
    isa: Isa,
    qkv: &Buffer,
    cache: &LayerCache,
    (spans, shape): (&[Span<'_>], &AttentionShape),
    out: &mut Buffer,
) {
    let heads = shape.heads;
    let form = Record::new(KvDtype::Bf16, heads.head_dim);
    let call = Call::new(qkv, (heads, shape.scale, form), By::new(isa), out);
    with(&OFFSETS, spans.len() + 1, |offsets| {
        let (mut tiles, mut work, mut longest) = (0, 0, 0);
        for (span, offset) in spans.iter().zip(offsets.iter_mut()) {
            *offset = tiles as u32;
            tiles += (span.q_len * call.shared).div_ceil(call.by.rows());
            work += span.q_len * span.kv_len * heads.heads * heads.head_dim;
            longest = longest.max(span.kv_len);
        }
        let plan = Plan {
            call: &call,
            cache,
            spans,
            window: shape.window,
            offsets: &offsets[..spans.len()],
            tiles,
        };
        let count = tiles * heads.kv_heads;
        let few = count < TILES_A_THREAD * rayon::current_num_threads();
        if few && longest > SEGMENT && work > SERIAL {
            plan.apart(longest.div_ceil(SEGMENT));
        } else {
            each(count, work, |index| plan.tile(index));
        }
    });
}

/// Runs `work` for each index, in parallel if so many multiplications pay that.
fn each(count: usize, multiplications: usize, work: impl Fn(usize) + Send + Sync) {
    if count <= 1 || multiplications <= SERIAL {
        (0..count).for_each(work);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(work);
    }
}

/// What is the same for all heads and sequences.
struct Call<'a> {
    qkv: &'a [f32],
    cols: usize,
    heads: Heads,
    shared: usize,
    factor: f32,
    form: Record,
    by: By,
    out: Shared<f32>,
}

impl<'a> Call<'a> {
    fn new(
        qkv: &'a Buffer,
        (heads, scale, form): (Heads, f32, Record),
        by: By,
        out: &mut Buffer,
    ) -> Call<'a> {
        Call {
            qkv: qkv.host(),
            cols: qkv.cols(),
            heads,
            shared: heads.queries_per_kv(),
            factor: scale * std::f32::consts::LOG2_E,
            form,
            by,
            out: Shared::new(out.host_mut()),
        }
    }

    fn job(&self, start: usize, kv_head: usize, mask: Mask) -> Job<'a> {
        Job {
            qkv: self.qkv,
            cols: self.cols,
            heads: self.heads,
            shared: self.shared,
            factor: self.factor,
            out: self.out,
            start,
            kv_head,
            mask,
            form: self.form,
            by: self.by,
        }
    }

    /// The queries, keys and values of job `index`, of segments of `len` rows; none if there is no such
    /// job.
    fn fetch(&self, index: usize, len: usize) -> [Fetch; 3] {
        let Heads {
            heads,
            kv_heads,
            head_dim: d,
        } = self.heads;
        let (first, kv_head) = (index / kv_heads * len, index % kv_heads);
        let exists = first * self.cols < self.qkv.len();
        let part = |head: usize, width: usize| Fetch {
            at: self.qkv.as_ptr().wrapping_add(first * self.cols + head * d),
            stride: self.cols,
            len: width * d,
            rows: if exists { len } else { 0 },
            done: 0,
        };
        [
            part(kv_head * self.shared, self.shared),
            part(heads + kv_head, 1),
            part(heads + kv_heads + kv_head, 1),
        ]
    }
}

/// The tiles of all sequences: `[kv_heads][tiles]`, those of a sequence one after the other.
struct Plan<'a> {
    call: &'a Call<'a>,
    cache: &'a LayerCache,
    spans: &'a [Span<'a>],
    window: Option<usize>,
    /// The first tile of each sequence.
    offsets: &'a [u32],
    tiles: usize,
}

impl Plan<'_> {
    /// The job, blocks and rows of a tile.
    fn part(&self, index: usize) -> (Job<'_>, Blocks<'_>, Range<usize>) {
        let (kv_head, tile) = (index / self.tiles, index % self.tiles);
        let after = |offset: &u32| *offset as usize <= tile;
        // Of sequences without a tile, which begin where the next one does, the last.
        let place = self.offsets.partition_point(after) - 1;
        let (span, first) = (&self.spans[place], self.offsets[place] as usize);
        let mask = Mask::Causal {
            before: span.kv_len - span.q_len,
            window: self.window,
        };
        let most = self.call.by.rows();
        let rows = (tile - first) * most;
        let rows = rows..(span.q_len * self.call.shared).min(rows + most);
        let blocks = &span.blocks[..span.kv_len.div_ceil(KV_BLOCK)];
        (
            self.call.job(span.q_start, kv_head, mask),
            Blocks::Paged(self.cache, kv_head, blocks),
            rows,
        )
    }

    fn tile(&self, index: usize) {
        let (job, blocks, rows) = self.part(index);
        job.tile(&blocks, rows, SEGMENT, &mut []);
    }

    /// All tiles, `segments` at most for each, each segment by itself.
    fn apart(&self, segments: usize) {
        let columns = self.call.form.columns();
        let most = self.call.by.rows();
        let len = State::len(most, columns);
        let count = self.tiles * self.call.heads.kv_heads;
        with(&APART, count * segments * len, |states| {
            let place = Shared::new(states);
            each(count * segments, usize::MAX, |index| {
                let (job, blocks, rows) = self.part(index / segments);
                let part = segment(&job.seen(&rows), index % segments, SEGMENT);
                // SAFETY: this piece of the states is this index's alone.
                let state = unsafe { std::slice::from_raw_parts_mut(place.at(index * len), len) };
                let mut state = State::new(state, most);
                if part.is_empty() {
                    state.clear();
                } else {
                    job.attend(&blocks, rows, part, state, &mut []);
                }
            });
            each(count, usize::MAX, |index| {
                let (job, _, rows) = self.part(index);
                // SAFETY: the pieces of this tile's segments.
                let states = unsafe {
                    let first = place.at(index * segments * len);
                    std::slice::from_raw_parts_mut(first, segments * len)
                };
                let mut parts = states.chunks_exact_mut(len);
                let Some(total) = parts.next() else { return };
                let mut total = State::new(total, most);
                for part in parts {
                    let (rows, part) = (rows.len(), State::new(part, most));
                    Dot::launch(Merge {
                        rows,
                        columns,
                        total: total.again(),
                        part,
                    });
                }
                job.finish(rows, total);
            });
        });
    }
}

/// What of `seen` is in segment `index`.
fn segment(seen: &Range<usize>, index: usize, len: usize) -> Range<usize> {
    let start = index.saturating_mul(len);
    seen.start.max(start)..seen.end.min(start.saturating_add(len))
}

impl Job<'_> {
    /// The attention of some rows, at most [`By::rows`], with segments of so many keys.
    fn tile(&self, blocks: &Blocks<'_>, rows: Range<usize>, len: usize, fetch: &mut [Fetch]) {
        let columns = self.form.columns();
        let most = self.by.rows();
        let state_len = State::len(most, columns);
        with(&STATE, 2 * state_len, |states| {
            let (total, part) = states.split_at_mut(state_len);
            let mut total = State::new(total, most);
            let mut part = State::new(part, most);
            let seen = self.seen(&rows);
            let first = seen.start / len;
            let keys = segment(&seen, first, len);
            self.attend(blocks, rows.clone(), keys, total.again(), fetch);
            for index in first + 1..seen.end.div_ceil(len) {
                let keys = segment(&seen, index, len);
                self.attend(blocks, rows.clone(), keys, part.again(), fetch);
                Dot::launch(Merge {
                    rows: rows.len(),
                    columns,
                    total: total.again(),
                    part: part.again(),
                });
            }
            self.finish(rows, total);
        });
    }

    /// Some rows with some keys.
    fn attend(
        &self,
        blocks: &Blocks<'_>,
        rows: Range<usize>,
        seen: Range<usize>,
        state: State<'_>,
        fetch: &mut [Fetch],
    ) {
        with(&TILE, self.by.scratch_len(self.form), |scratch| {
            macro_rules! wide {
                ($v:literal) => {
                    Dot::launch(wide::Wide::<$v> {
                        job: self,
                        blocks,
                        rows,
                        seen,
                        scratch,
                        state,
                        fetch,
                    })
                };
            }
            if matches!(self.by, By::Amx) && few::suits(self.form, rows.len()) {
                return Dot::launch(few::Few {
                    job: self,
                    blocks,
                    rows,
                    seen,
                    scratch,
                    state,
                });
            }
            if matches!(self.by, By::Amx) {
                return Dot::launch(amx::Tiled {
                    job: self,
                    blocks,
                    rows,
                    seen,
                    scratch,
                    state,
                    fetch,
                });
            }
            if rows.len() <= narrow::ROWS {
                return Dot::launch(narrow::Narrow {
                    job: self,
                    blocks,
                    rows,
                    seen,
                    scratch,
                    state,
                });
            }
            match rows.len().div_ceil(LANES) {
                1 => wide!(1),
                2 => wide!(2),
                _ => wide!(3),
            }
        });
    }

    /// Divides by the sums and writes the rows' part of the result.
    fn finish(&self, rows: Range<usize>, state: State<'_>) {
        Dot::launch(Finish {
            job: self,
            rows,
            state,
        });
    }
}

/// Adds a later segment's state of some rows to that of the earlier ones.
struct Merge<'a> {
    rows: usize,
    columns: usize,
    total: State<'a>,
    part: State<'a>,
}

impl DotKernel for Merge<'_> {
    #[inline(always)]
    fn run(self, dot: Dot) {
        let Merge {
            rows,
            columns,
            total,
            part,
        } = self;
        assert!(total.fits(rows, columns) && part.fits(rows, columns));
        for row in 0..rows {
            let (before, after) = (total.max[row], part.max[row]);
            // A row that sees nothing of a segment takes nothing from it.
            if after == f32::NEG_INFINITY {
                continue;
            }
            let max = if before > after { before } else { after };
            let one = dot.splat(1.0);
            let old = dot.scale(one, dot.splat(before - max));
            let new = dot.scale(one, dot.splat(after - max));
            total.max[row] = max;
            let sum = dot.mul(dot.splat(total.sum[row]), old);
            let sum = dot.fma(dot.splat(part.sum[row]), new, sum);
            // SAFETY: one value; then whole registers of the row's columns.
            unsafe {
                dot.store_part(&mut total.sum[row], sum, 1);
                for column in (0..columns).step_by(LANES) {
                    let o = total.o.as_mut_ptr().add(row * columns + column);
                    let more = dot.load(part.o.as_ptr().add(row * columns + column));
                    dot.store(o, dot.fma(more, new, dot.mul(dot.load(o), old)));
                }
            }
        }
    }
}

/// Packs the keys and values of a job without a cache.
struct PackSegment<'a> {
    job: &'a Job<'a>,
    len: usize,
    records: &'a mut [u32],
}

impl DotKernel for PackSegment<'_> {
    #[inline(always)]
    fn run(self, dot: Dot) {
        let (job, form) = (self.job, self.job.form);
        let Heads {
            heads,
            kv_heads,
            head_dim: d,
        } = job.heads;
        let rows = &job.qkv[job.start * job.cols..(job.start + self.len) * job.cols];
        let keys = rows[(heads + job.kv_head) * d..].as_ptr();
        let values = rows[(heads + kv_heads + job.kv_head) * d..].as_ptr();
        assert!(self.records.len() >= self.len.div_ceil(KV_BLOCK) * form.len());
        // SAFETY: `len` rows of qkv from the segment's first on; the records are as many as needed.
        unsafe {
            let from = (keys, values, job.cols, self.len);
            pack::records(dot, form, from, self.records.as_mut_ptr());
        }
    }
}

/// Divides by the sums and writes the rows' part of the result.
struct Finish<'a> {
    job: &'a Job<'a>,
    rows: Range<usize>,
    state: State<'a>,
}

impl DotKernel for Finish<'_> {
    #[inline(always)]
    fn run(self, dot: Dot) {
        let (job, columns) = (self.job, self.job.form.columns());
        let d = job.heads.head_dim;
        assert!(self.state.fits(self.rows.len(), columns));
        for (i, row) in self.rows.enumerate() {
            let at = job.result_at(row);
            let factor = dot.div(dot.splat(1.0), dot.splat(self.state.sum[i]));
            let zero = dot.splat(0.0);
            for column in (0..d).step_by(LANES) {
                // SAFETY: a register of the row's outputs; as many values as the head has left in its
                // part of the result, which this task alone writes.
                unsafe {
                    let o = dot.load(self.state.o.as_ptr().add(i * columns + column));
                    let out = job.out.at(at + column);
                    // A sum that vanished may be a negative zero, with some tiles and not with others.
                    dot.store_part(out, dot.fma(o, factor, zero), LANES.min(d - column));
                }
            }
        }
    }
}
