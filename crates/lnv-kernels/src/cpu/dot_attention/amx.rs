//! The queries of one head by the tile registers of AMX, be they one or many.
//!
//! Decision: a tile holds up to 32 query rows, the left factors of two registers. It goes through chunks
//! of 32 keys counted from the start of the sequence: a product makes the chunk's scores, row by row,
//! and vector registers make them the probabilities of one left factor. A group of chunks later they
//! multiply their values, 32 columns a chunk, so that work of both kinds is near to each other; a product
//! with the value 1 sums them. A cache's keys and values are right factors where they lie. Up to four
//! rows go another way to the same bits ([`few`](super::few)).
//!
//! A sum is one chain over chunks (or over 32 values along the head), each the product of
//! [`Kind::Bf16`](crate::cpu::amx::Kind), whatever the other rows are. That no probability of a chunk is
//! above [`LIMIT`] is a bet; where one is, as in a row's first chunk, the chunk takes the careful way.
//!
//! Values that no row sees may be no number, even times zero: the last chunk's are copied without them.
//! Of a head that is no multiple of 32, the last product takes the last 32 values again, times zero where
//! they had their turn; a head below 32 is copied.

use std::ops::Range;

use super::blocks::Blocks;
use super::fetch::Fetch;
use super::few::{reference, seen_of, weights};
use super::{Job, LIMIT, ONES, State, pack};
use crate::cpu::amx::{
    self, Bf16, ROW_BYTES, Tiles, add_product, load, multiply, store, store_sums, zero_sums,
};
use crate::cpu::dot::{Dot, DotKernel, I, LANES};
use crate::kv_cache::{KV_BLOCK, Record};

/// Query rows of the largest tile.
pub(super) const ROWS: usize = 2 * amx::ROWS;
/// Keys that are looked at together: as many as a left factor has values in a row.
pub(super) const CHUNK: usize = 2 * LANES;
/// Pairs in a row of a left factor; rows of a right one.
pub(super) const PAIRS: usize = LANES;
/// The most chunks of a group.
const GROUP: usize = 4;
/// Blocks that are in use at a time: those of two groups, and the next.
const RECORDS: usize = 2 * GROUP * CHUNK / KV_BLOCK + 2;
/// Bytes of a register.
const HALF: usize = amx::ROWS * ROW_BYTES;
/// Bytes between two rows of keys.
const KEY_STRIDE: usize = 4 * KV_BLOCK;
/// How far ahead of the arithmetic a record is fetched, in units of 32 bits.
const AHEAD: usize = 4 << 10;

/// The attention of some rows, at most [`ROWS`], over the keys `seen`.
pub(super) struct Tiled<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) blocks: &'a Blocks<'a>,
    pub(super) rows: Range<usize>,
    pub(super) seen: Range<usize>,
    pub(super) scratch: &'a mut [u32],
    pub(super) state: State<'a>,
    /// What will be wanted after this tile.
    pub(super) fetch: &'a mut [Fetch],
}

/// Left factors of a query.
fn steps(form: Record) -> usize {
    form.pairs().div_ceil(PAIRS)
}

/// What a tile needs of a thread's scratch.
pub(super) fn scratch_len(form: Record) -> usize {
    let products = (steps(form) + 2 * GROUP + 1) * ROWS * PAIRS + ROWS * CHUNK;
    let factors = PAIRS * (LANES + KV_BLOCK + form.columns());
    let outputs = ROWS * form.columns();
    products + factors + outputs + steps(form) * PAIRS + RECORDS * form.len()
}

impl DotKernel for Tiled<'_> {
    #[inline(always)]
    fn run(self, dot: Dot) {
        let form = self.job.form;
        assert!(self.scratch.len() >= scratch_len(form) && self.rows.len() <= ROWS);
        assert!(self.state.fits(self.rows.len(), form.columns()));
        let mut rest = self.scratch;
        let mut take = |len: usize| {
            let (part, more) = std::mem::take(&mut rest).split_at_mut(len);
            rest = more;
            part.as_mut_ptr()
        };
        let units = form.columns().div_ceil(2 * LANES);
        let mut tiles = Tiles::new();
        tiles.set(self.rows.len());
        let few = self.rows.len() <= amx::ROWS;
        let (mut from, mut to) = ([0; ROWS], [0; ROWS]);
        for (i, row) in self.rows.clone().enumerate() {
            let sees = self.job.visible(row);
            (from[i], to[i]) = (sees.start, sees.end);
        }
        let next = self.rows.end..self.rows.end + self.rows.len() / ROWS * ROWS;
        let mut ahead = Ahead {
            result: self.job.result(&self.rows),
            queries: self.job.queries(&next),
            others: self.fetch,
        };
        let mut tile = Tile {
            from,
            to,
            job: self.job,
            blocks: self.blocks,
            common: self.job.common(&self.rows),
            rows: self.rows,
            seen: self.seen,
            tiles,
            q: take(steps(form) * ROWS * PAIRS),
            p: take(2 * GROUP * ROWS * PAIRS),
            sums: take(ROWS * LANES).cast(),
            scores: take(ROWS * CHUNK).cast(),
            ones: take(PAIRS * LANES),
            short: take(PAIRS * KV_BLOCK),
            last: take(PAIRS * form.columns()),
            row: take(steps(form) * PAIRS),
            records: take(RECORDS * form.len()),
            max: self.state.max.as_mut_ptr(),
            sum: self.state.sum.as_mut_ptr(),
            o: take(ROWS * form.columns()).cast(),
            result: self.state.o.as_mut_ptr(),
            streams: few && self.blocks.in_place(),
            block: None,
            record: std::ptr::null(),
            keys: std::ptr::null(),
            chunk: Chunk {
                keys: std::ptr::null(),
                values: std::ptr::null(),
            },
            units,
            len: units.clamp(2, GROUP),
            filling: Group::new(0),
            filled: Group::new(1),
        };
        // SAFETY: the lengths above are those that Tile reckons with; blocks that are seen exist.
        unsafe {
            tile.begin(dot);
            tile.attend(dot, &mut ahead);
            tile.end(dot);
        }
    }
}

/// Where a chunk's right factors are.
#[derive(Clone, Copy)]
struct Chunk {
    keys: *const u32,
    values: *const u32,
}

/// Some chunks one after the other.
struct Group {
    /// Which half of the probabilities' place is theirs.
    place: usize,
    /// Their values, and how many they are.
    values: [*const u32; GROUP],
    count: usize,
    /// Units of columns that have been multiplied.
    done: usize,
}

impl Group {
    fn new(place: usize) -> Group {
        Group {
            place,
            values: [std::ptr::null(); GROUP],
            count: 0,
            done: 0,
        }
    }
}

/// What will be wanted, fetched bit by bit.
struct Ahead<'a> {
    /// The tile's part of the result.
    result: Fetch,
    /// The next tile's queries.
    queries: Fetch,
    others: &'a mut [Fetch],
}

impl Ahead<'_> {
    /// Fetches a line of each kind.
    #[inline(always)]
    fn step(&mut self, dot: Dot) {
        if let Some(line) = self.result.line() {
            dot.prefetch_to_write(line);
        }
        if let Some(line) = self.queries.line() {
            dot.prefetch(line);
            return;
        }
        for other in self.others.iter_mut() {
            if let Some(line) = other.line() {
                dot.prefetch(line);
                break;
            }
        }
    }
}

/// Addresses of what a tile works on.
struct Tile<'a> {
    job: &'a Job<'a>,
    blocks: &'a Blocks<'a>,
    rows: Range<usize>,
    /// Keys that some row sees, and that every row sees.
    seen: Range<usize>,
    common: Range<usize>,
    /// The first key that each row sees, and the first beyond.
    from: [usize; ROWS],
    to: [usize; ROWS],
    tiles: Tiles,
    /// `[steps][rows][PAIRS]`: the queries, scaled.
    q: *mut u32,
    /// `[2][GROUP][rows][PAIRS]`: probabilities.
    p: *mut u32,
    /// `[rows][LANES]`: their sums, the same in each lane.
    sums: *mut f32,
    /// `[rows][CHUNK]`: the scores of a chunk.
    scores: *mut f32,
    /// A right factor of ones.
    ones: *mut u32,
    /// `[PAIRS][KV_BLOCK]`: keys that are shorter than a left factor's row, with zeros.
    short: *mut u32,
    /// `[PAIRS][columns]`: values of the last chunk, without those that no row sees.
    last: *mut u32,
    /// `[steps][PAIRS]`: a query as pairs.
    row: *mut u32,
    /// `[RECORDS]` records.
    records: *mut u32,
    /// Each row's reference point and sum.
    max: *mut f32,
    sum: *mut f32,
    /// `[rows][columns]`: the outputs in the end.
    result: *mut f32,
    /// `[columns / LANES][ROWS][LANES]`: the outputs, not yet divided by the sum.
    o: *mut f32,
    /// Whether the cache comes from memory, so that fetching it early pays.
    streams: bool,
    /// The block in hand, its record and its keys, which are copied where they are short.
    block: Option<usize>,
    record: *const u32,
    keys: *const u32,
    /// The chunk in hand.
    chunk: Chunk,
    /// Units of 32 columns, and how many chunks make a group.
    units: usize,
    len: usize,
    /// The chunks whose probabilities are being made, and those before them, whose values are being
    /// multiplied.
    filling: Group,
    filled: Group,
}

// SAFETY of all that follows: Tiled::run checked the lengths. Rows are below rows.len() <= ROWS, keys
// and pairs inside their block, columns below form.columns(), and the tile registers are set for the rows.
impl Tile<'_> {
    #[inline(always)]
    unsafe fn begin(&mut self, dot: Dot) {
        let (form, rows) = (self.job.form, self.rows.len());
        let (steps, pairs) = (steps(form), form.pairs());
        // Pairs that the last step takes and the one before had.
        let again = (steps * PAIRS - pairs) * usize::from(steps > 1);
        // SAFETY: see above.
        unsafe {
            for (i, row) in self.rows.clone().enumerate() {
                let query = self.job.query(row).as_ptr();
                pack::row(dot, query, form.dim, self.job.factor, self.row);
                for step in 0..steps {
                    let out = self.q.add((step * rows + i) * PAIRS);
                    if step + 1 < steps {
                        dot.store_bits(out, dot.load_bits(self.row.add(step * PAIRS)));
                    } else {
                        let left = PAIRS - again;
                        let from = self.row.add(step * PAIRS).cast::<f32>();
                        let last = dot.load_part(from, left);
                        dot.store_bits(out, dot.splat_bits(0));
                        dot.store_part(out.add(again).cast(), last, left);
                    }
                }
                self.max.add(i).write(f32::NEG_INFINITY);
            }
            self.o.write_bytes(0, ROWS * form.columns());
            self.sums.write_bytes(0, rows * LANES);
            for pair in 0..PAIRS {
                dot.store_bits(self.ones.add(pair * LANES), dot.splat_bits(ONES));
            }
        }
    }

    #[inline(always)]
    unsafe fn attend(&mut self, dot: Dot, ahead: &mut Ahead<'_>) {
        let (first, end) = (self.seen.start / CHUNK, self.seen.end.div_ceil(CHUNK));
        let units = self.units.div_ceil(self.len);
        // SAFETY: see above.
        unsafe {
            self.open(dot, first);
            self.score();
            self.store_scores();
            for chunk in first..end {
                // The next scores are on their way while these are looked at, and are stored only then:
                // loads do not wait for stores that may be theirs.
                let values = self.chunk.values;
                if chunk + 1 < end {
                    self.open(dot, chunk + 1);
                    self.score();
                }
                let begun = chunk > first;
                if self.weigh(dot, chunk, (begun, values), ahead) && chunk + 1 < end {
                    self.score();
                }
                self.store_scores();
                for _ in 0..units {
                    self.multiply();
                }
                if self.filling.count == self.len {
                    self.next_group();
                }
            }
            self.next_group();
            self.next_group();
        }
    }

    /// Sums and outputs to where they belong.
    #[inline(always)]
    unsafe fn end(&mut self, dot: Dot) {
        let columns = self.job.form.columns();
        for row in 0..self.rows.len() {
            // SAFETY: see above.
            unsafe {
                self.sum.add(row).write(*self.sums.add(row * LANES));
                for column in (0..columns).step_by(LANES) {
                    let o = dot.load(self.outputs(column).add(row * LANES));
                    dot.store(self.result.add(row * columns + column), o);
                }
            }
        }
    }

    /// The outputs of 16 columns.
    #[inline(always)]
    unsafe fn outputs(&self, column: usize) -> *mut f32 {
        // SAFETY: see above.
        unsafe { self.o.add(column * ROWS) }
    }

    /// Makes a chunk the one to be multiplied.
    #[inline(always)]
    unsafe fn open(&mut self, dot: Dot, chunk: usize) {
        let form = self.job.form;
        let (block, half) = (chunk * CHUNK / KV_BLOCK, chunk * CHUNK % KV_BLOCK);
        // SAFETY: see above.
        unsafe {
            if self.block != Some(block) {
                let room = self.records.add(block % RECORDS * form.len());
                let record = self.blocks.record(dot, block, room);
                self.block = Some(block);
                (self.record, self.keys) = (record, record);
                if form.pairs() < PAIRS {
                    let len = form.keys_len();
                    self.short.copy_from_nonoverlapping(record, len);
                    self.short.add(len).write_bytes(0, PAIRS * KV_BLOCK - len);
                    self.keys = self.short;
                }
            }
            self.chunk = Chunk {
                keys: self.keys.add(half),
                values: self.record.add(form.keys_len() + half / 2 * form.columns()),
            };
            if self.streams {
                self.fetch(dot, self.blocks.ahead(block), half);
            }
        }
    }

    /// The scores of all rows with the chunk's keys, in registers of sums.
    #[inline(always)]
    unsafe fn score(&mut self) {
        let (form, rows) = (self.job.form, self.rows.len());
        // SAFETY: see above.
        unsafe {
            zero_sums();
            for step in 0..steps(form) {
                let last = form.pairs().saturating_sub(PAIRS);
                let keys = self.chunk.keys.add((step * PAIRS).min(last) * KV_BLOCK);
                let q = self.q.add(step * rows * PAIRS);
                add_product::<Bf16>(&self.tiles, q.cast(), (keys.cast(), KEY_STRIDE));
            }
        }
    }

    /// The same to memory.
    #[inline(always)]
    unsafe fn store_scores(&mut self) {
        // SAFETY: see above.
        unsafe { store_sums(&self.tiles, self.scores, CHUNK) };
    }

    /// Fetches what lies [`AHEAD`] of a chunk, half a record; `next` is where the next one lies.
    #[inline(always)]
    fn fetch(&self, dot: Dot, next: *const u32, half: usize) {
        let len = self.job.form.len();
        let start = half / CHUNK * (len / 2) + AHEAD;
        for at in (start..start + len / 2).step_by(LANES) {
            dot.prefetch(if at < len {
                self.record.wrapping_add(at)
            } else {
                next.wrapping_add(at - len)
            });
        }
    }

    /// A chunk's scores to probabilities, which wait from then on; whether the registers of sums were
    /// used. `begun`: whether there were chunks before.
    #[inline(always)]
    unsafe fn weigh(
        &mut self,
        dot: Dot,
        chunk: usize,
        (begun, values): (bool, *const u32),
        ahead: &mut Ahead<'_>,
    ) -> bool {
        let (start, end) = (chunk * CHUNK, (chunk + 1) * CHUNK);
        // SAFETY: see above.
        unsafe {
            let all_see = self.common.start <= start && end <= self.common.end;
            let won = begun
                && if all_see {
                    self.bet::<false>(dot, chunk, ahead)
                } else {
                    self.bet::<true>(dot, chunk, ahead)
                };
            let used = !won && self.careful(dot, chunk);
            self.filling.values[self.filling.count] = if end <= self.seen.end {
                values
            } else {
                self.seen_values(values, self.seen.end - start);
                self.last
            };
            self.filling.count += 1;
            used
        }
    }

    /// Where the probabilities of the next chunk of a group go.
    #[inline(always)]
    unsafe fn place(&self, group: &Group, chunk: usize) -> *mut u32 {
        // SAFETY: see above.
        unsafe {
            let place = self.p.add(group.place * GROUP * ROWS * PAIRS);
            place.add(chunk * self.rows.len() * PAIRS)
        }
    }

    /// Copies the values of the first `count` keys of a chunk, zero for the others.
    #[inline(always)]
    unsafe fn seen_values(&mut self, values: *const u32, count: usize) {
        let columns = self.job.form.columns();
        let whole = count / 2 * columns;
        // SAFETY: see above.
        unsafe {
            self.last.copy_from_nonoverlapping(values, whole);
            self.last.add(whole).write_bytes(0, PAIRS * columns - whole);
            if count % 2 == 1 {
                for at in whole..whole + columns {
                    self.last.add(at).write(*values.add(at) & 0xffff);
                }
            }
        }
    }

    /// The probabilities of a chunk, of which some rows do not see all if it is MASKED; false if one is
    /// too large.
    #[inline(always)]
    unsafe fn bet<const MASKED: bool>(
        &mut self,
        dot: Dot,
        chunk: usize,
        ahead: &mut Ahead<'_>,
    ) -> bool {
        let mut top = dot.splat_bits(0);
        // SAFETY: see above.
        unsafe {
            let p = self.place(&self.filling, self.filling.count);
            for i in 0..self.rows.len() {
                ahead.step(dot);
                let bits = self.weights::<MASKED>(dot, chunk, i);
                dot.store_bits(p.add(i * PAIRS), bits);
                top = dot.max_words(top, bits);
            }
        }
        !dot.any_word_above(top, LIMIT)
    }

    /// The same for any chunk. Rows with a probability that is too large get a new reference point;
    /// true if what waited had to be multiplied for that.
    #[inline(always)]
    unsafe fn careful(&mut self, dot: Dot, chunk: usize) -> bool {
        let (mut moved, mut summed) = ([0.0; ROWS], false);
        // SAFETY: see above.
        unsafe {
            for (i, moved) in moved.iter_mut().enumerate().take(self.rows.len()) {
                // Without a reference point there is nothing yet that was reckoned against it.
                let before = *self.max.add(i);
                let fresh = before == f32::NEG_INFINITY;
                if fresh || dot.any_word_above(self.weights::<true>(dot, chunk, i), LIMIT) {
                    let scores = self.scores.add(i * CHUNK);
                    let max = reference(dot, scores, self.sees(chunk, i));
                    self.max.add(i).write(max);
                    if !fresh {
                        *moved = before - max;
                        summed = true;
                    }
                }
            }
            if summed {
                self.next_group();
                self.next_group();
                for (i, moved) in moved.into_iter().enumerate().take(self.rows.len()) {
                    if moved != 0.0 {
                        self.scale(dot, i, moved);
                    }
                }
            }
            let p = self.place(&self.filling, self.filling.count);
            for i in 0..self.rows.len() {
                dot.store_bits(p.add(i * PAIRS), self.weights::<true>(dot, chunk, i));
            }
        }
        summed
    }

    /// Which of a chunk's keys row `i` sees, a bit each.
    #[inline(always)]
    fn sees(&self, chunk: usize, i: usize) -> u32 {
        seen_of(chunk, &(self.from[i]..self.to[i]))
    }

    /// The probabilities of row `i`; if MASKED, zero for keys that it does not see.
    #[inline(always)]
    unsafe fn weights<const MASKED: bool>(&self, dot: Dot, chunk: usize, i: usize) -> I {
        let seen = MASKED.then(|| self.sees(chunk, i));
        // SAFETY: see above.
        unsafe { weights(dot, self.scores.add(i * CHUNK), *self.max.add(i), seen) }
    }

    /// Multiplies what was summed of row `i` by a power of two.
    #[inline(always)]
    unsafe fn scale(&mut self, dot: Dot, i: usize, power: f32) {
        let columns = self.job.form.columns();
        let factor = dot.scale(dot.splat(1.0), dot.splat(power));
        // SAFETY: see above.
        unsafe {
            let sums = self.sums.add(i * LANES);
            dot.store(sums, dot.mul(dot.load(sums), factor));
            for column in (0..columns).step_by(LANES) {
                let o = self.outputs(column).add(i * LANES);
                dot.store(o, dot.mul(dot.load(o), factor));
            }
        }
    }

    /// Multiplies what is left of the group that is filled, and lets it be followed by the one that was
    /// being filled.
    #[inline(always)]
    unsafe fn next_group(&mut self) {
        for _ in self.filled.done..self.units {
            // SAFETY: see above.
            unsafe { self.multiply() };
        }
        std::mem::swap(&mut self.filled, &mut self.filling);
        self.filled.done = 0;
        self.filling.count = 0;
    }

    /// Adds the filled group's values to the next 32 columns of the outputs, if there are some left;
    /// with the last ones, its probabilities to their sums.
    #[inline(always)]
    unsafe fn multiply(&mut self) {
        let (columns, column) = (self.job.form.columns(), self.filled.done * 2 * LANES);
        if self.filled.count == 0 || column >= columns {
            return;
        }
        self.filled.done += 1;
        let stride = 4 * columns;
        // SAFETY: see above.
        unsafe {
            let o = self.outputs(column);
            if column + LANES < columns {
                let (first, second) = (o.cast::<u8>(), self.outputs(column + LANES).cast::<u8>());
                let two = self.tiles.two();
                load::<0>(first, ROW_BYTES);
                load::<1>(second, ROW_BYTES);
                if two {
                    load::<2>(first.add(HALF), ROW_BYTES);
                    load::<3>(second.add(HALF), ROW_BYTES);
                }
                for (i, values) in self.filled.values[..self.filled.count].iter().enumerate() {
                    let p = self.place(&self.filled, i).cast();
                    add_product::<Bf16>(&self.tiles, p, (values.add(column).cast(), stride));
                }
                store::<0>(first, ROW_BYTES);
                store::<1>(second, ROW_BYTES);
                if two {
                    store::<2>(first.add(HALF), ROW_BYTES);
                    store::<3>(second.add(HALF), ROW_BYTES);
                }
            } else {
                self.multiply_one(o, Some(column));
            }
            if self.filled.done == self.units {
                self.multiply_one(self.sums, None);
            }
        }
    }

    /// The same for 16 columns, or times one.
    #[inline(always)]
    unsafe fn multiply_one(&self, o: *mut f32, column: Option<usize>) {
        let second = o.wrapping_byte_add(HALF);
        let two = self.tiles.two();
        // SAFETY: see above; the second registers have rows only if there are more than 16.
        unsafe {
            load::<0>(o.cast(), ROW_BYTES);
            if two {
                load::<2>(second.cast(), ROW_BYTES);
            }
            for (i, values) in self.filled.values[..self.filled.count].iter().enumerate() {
                let p = self.place(&self.filled, i);
                match column {
                    Some(column) => {
                        load::<4>(values.add(column).cast(), 4 * self.job.form.columns());
                    }
                    None => load::<4>(self.ones.cast(), ROW_BYTES),
                }
                load::<6>(p.cast(), ROW_BYTES);
                multiply::<Bf16, 0, 6, 4>();
                if two {
                    load::<7>(p.add(amx::ROWS * PAIRS).cast(), ROW_BYTES);
                    multiply::<Bf16, 2, 7, 4>();
                }
            }
            store::<0>(o.cast(), ROW_BYTES);
            if two {
                store::<2>(second.cast(), ROW_BYTES);
            }
        }
    }
}
