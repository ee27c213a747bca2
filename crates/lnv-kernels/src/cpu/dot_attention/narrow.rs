//! A few queries of one head: lanes are keys, then columns of the values.
//!
//! Decision: with few queries the cache is what costs, and it is read once, from end to end: a block's
//! keys times up to four queries at a time, 64 sums a query; then the probabilities, row by row; then
//! its values. What lies ahead is fetched meanwhile.
//!
//! Scores, probabilities, sums and outputs are the same chains of the same instructions as in
//! [`wide`](super::wide), so a row has the same bits here as there.

use std::ops::Range;

use super::blocks::Blocks;
use super::{GROUP, Job, LIMIT, ONES, State, pack, power};
use crate::cpu::dot::{Dot, DotKernel, F, I, LANES};
use crate::kv_cache::{KV_BLOCK, Record};

/// The most query rows.
pub(super) const ROWS: usize = 8;
/// Rows that have their sums in registers.
const TOGETHER: usize = 4;
/// Registers that hold a row's scores with a block.
const KEYS: usize = KV_BLOCK / LANES;
/// How far ahead of the arithmetic a record is fetched, in units of 32 bits.
const AHEAD: usize = 2 << 10;

/// The attention of some rows, at most [`ROWS`], over the keys `seen`.
pub(super) struct Narrow<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) blocks: &'a Blocks<'a>,
    pub(super) rows: Range<usize>,
    pub(super) seen: Range<usize>,
    pub(super) scratch: &'a mut [u32],
    pub(super) state: State<'a>,
}

/// What a tile needs of a thread's scratch.
pub(super) fn scratch_len(form: Record) -> usize {
    ROWS * (stride(form) + KV_BLOCK + KV_BLOCK / 2) + form.columns() + form.len()
}

/// Pairs of a query: whole registers.
fn stride(form: Record) -> usize {
    form.pairs().next_multiple_of(LANES)
}

impl DotKernel for Narrow<'_> {
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
        let mut tile = Tile {
            job: self.job,
            rows: self.rows,
            q: take(ROWS * stride(form)),
            scores: take(ROWS * KV_BLOCK).cast(),
            p: take(ROWS * KV_BLOCK / 2),
            odd: take(form.columns()),
            max: self.state.max.as_mut_ptr(),
            sum: self.state.sum.as_mut_ptr(),
            o: self.state.o.as_mut_ptr(),
        };
        let room = take(form.len());
        let last = (self.seen.end - 1) / KV_BLOCK;
        // SAFETY: the lengths above are those that Tile reckons with; blocks that are seen exist.
        unsafe {
            tile.begin(dot);
            for block in self.seen.start / KV_BLOCK..=last {
                let record = self.blocks.record(dot, block, room);
                let ahead = Ahead::of(self.blocks, block, (record, form.len()));
                tile.block(dot, block * KV_BLOCK, &self.seen, &ahead);
            }
        }
    }
}

/// What is read now and what after that, as far as it lies in memory.
pub(super) struct Ahead {
    pub(super) record: *const u32,
    next: *const u32,
    len: usize,
    /// Whether that is to be fetched here.
    pub(super) worth: bool,
}

impl Ahead {
    /// Of a block, whose record lies there and has so many values.
    pub(super) fn of(
        blocks: &Blocks<'_>,
        block: usize,
        (record, len): (*const u32, usize),
    ) -> Ahead {
        Ahead {
            record,
            next: blocks.ahead(block),
            len,
            worth: blocks.in_place(),
        }
    }

    /// Fetches what lies [`AHEAD`] of place `at` of the record, `len` in length.
    #[inline(always)]
    pub(super) fn fetch(&self, dot: Dot, at: usize, len: usize) {
        let at = at + AHEAD;
        let from = if at < self.len {
            self.record.wrapping_add(at)
        } else {
            self.next.wrapping_add(at - self.len)
        };
        for line in (0..len).step_by(LANES) {
            dot.prefetch(from.wrapping_add(line));
        }
    }
}

/// Addresses of what a tile works on.
struct Tile<'a> {
    job: &'a Job<'a>,
    rows: Range<usize>,
    /// `[rows][stride]`: the queries, scaled.
    q: *mut u32,
    /// `[rows][KV_BLOCK]`
    scores: *mut f32,
    /// `[rows][KV_BLOCK / 2]`: probabilities of the block.
    p: *mut u32,
    /// `[columns]`: a pair of values of which only the first key is seen.
    odd: *mut u32,
    /// Each row's reference point and sum.
    max: *mut f32,
    sum: *mut f32,
    /// `[rows][columns]`
    o: *mut f32,
}

// SAFETY of all that follows: Narrow::run checked the lengths. Rows are below rows.len() <= ROWS, keys
// and pairs inside their block, columns below form.columns().
impl Tile<'_> {
    #[inline(always)]
    unsafe fn begin(&mut self, dot: Dot) {
        let form = self.job.form;
        for (i, row) in self.rows.clone().enumerate() {
            let query = self.job.query(row).as_ptr();
            // SAFETY: see above.
            unsafe {
                let out = self.q.add(i * stride(form));
                pack::row(dot, query, form.dim, self.job.factor, out);
                *self.max.add(i) = f32::NEG_INFINITY;
                *self.sum.add(i) = 0.0;
                self.o
                    .add(i * form.columns())
                    .write_bytes(0, form.columns());
            }
        }
    }

    /// All rows with a block, whose first key is `start`.
    #[inline(always)]
    unsafe fn block(&mut self, dot: Dot, start: usize, seen: &Range<usize>, ahead: &Ahead) {
        let form = self.job.form;
        let seen = seen.start.saturating_sub(start)..(seen.end - start).min(KV_BLOCK);
        // SAFETY: see above.
        unsafe {
            for (first, count) in fours(self.rows.len()) {
                match count {
                    1 => self.score::<1>(dot, first, ahead),
                    2 => self.score::<2>(dot, first, ahead),
                    3 => self.score::<3>(dot, first, ahead),
                    _ => self.score::<4>(dot, first, ahead),
                }
            }
            for i in 0..self.rows.len() {
                self.weigh(dot, i, start, ahead);
            }
            let (pairs, values) = (seen.start / 2..seen.end / 2, form.keys_len());
            let fetch = Some(ahead).filter(|ahead| ahead.worth);
            self.multiply_all(dot, pairs, (ahead.record.add(values), fetch));
            if seen.end % 2 == 1 {
                // The second of the pair is not seen, and may be no number.
                let pair = seen.end / 2;
                let values = ahead.record.add(values + pair * form.columns());
                for column in 0..form.columns() {
                    *self.odd.add(column) = *values.add(column) & 0xffff;
                }
                let back = self.odd.wrapping_sub(pair * form.columns());
                self.multiply_all(dot, pair..pair + 1, (back, None));
            }
        }
    }

    /// The scores of R rows from `first` on with all keys of the block.
    #[inline(always)]
    unsafe fn score<const R: usize>(&mut self, dot: Dot, first: usize, ahead: &Ahead) {
        let stride = stride(self.job.form);
        let mut acc = [[dot.splat(0.0); KEYS]; R];
        // SAFETY: see above.
        unsafe {
            let q = self.q.add(first * stride);
            for pair in 0..self.job.form.pairs() {
                if first == 0 && ahead.worth {
                    ahead.fetch(dot, pair * KV_BLOCK, KV_BLOCK);
                }
                let at = ahead.record.add(pair * KV_BLOCK);
                let mut keys = [dot.splat_bits(0); KEYS];
                for (v, keys) in keys.iter_mut().enumerate() {
                    *keys = dot.load_bits(at.add(v * LANES));
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let query = dot.splat_bits(*q.add(i * stride + pair));
                    for (acc, keys) in acc.iter_mut().zip(keys) {
                        *acc = dot.dot(*acc, keys, query);
                    }
                }
            }
            for (i, acc) in acc.iter().enumerate() {
                for (v, acc) in acc.iter().enumerate() {
                    let scores = self.scores.add((first + i) * KV_BLOCK + v * LANES);
                    dot.store(scores, *acc);
                }
            }
        }
    }

    /// Scores of row `i` to probabilities.
    #[inline(always)]
    unsafe fn weigh(&mut self, dot: Dot, i: usize, start: usize, ahead: &Ahead) {
        let sees = self.job.visible(self.rows.start + i);
        let from = sees.start.saturating_sub(start).min(KV_BLOCK);
        let to = sees.end.saturating_sub(start).clamp(from, KV_BLOCK);
        let seen = mask(to) & !mask(from);
        // SAFETY: see above.
        unsafe {
            let (scores, p) = (self.scores.add(i * KV_BLOCK), self.p.add(i * KV_BLOCK / 2));
            let max = dot.splat(*self.max.add(i));
            let mut top = dot.splat_bits(0);
            for v in (0..KEYS).step_by(2) {
                let mut powers = [dot.splat_bits(0); 2];
                for (half, powers) in powers.iter_mut().enumerate() {
                    let lane = (v + half) * LANES;
                    let power = power(dot, dot.load(scores.add(lane)), max);
                    *powers = dot.keep_bits((seen >> lane) as u16, power);
                }
                let bits = dot.join_upper(powers[0], powers[1]);
                dot.store_bits(p.add(v * LANES / 2), bits);
                top = dot.max_words(top, bits);
            }
            if dot.any_word_above(top, LIMIT) {
                self.careful(dot, i, seen, ahead);
            }
        }
    }

    /// The same group by group, with a new reference point where one is needed.
    #[inline(always)]
    unsafe fn careful(&mut self, dot: Dot, i: usize, seen: u64, ahead: &Ahead) {
        let form = self.job.form;
        // SAFETY: see above.
        unsafe {
            let (scores, p) = (self.scores.add(i * KV_BLOCK), self.p.add(i * KV_BLOCK / 2));
            // Pairs before this one have been multiplied, and count as zero in what follows.
            let mut waiting = 0;
            for group in (0..KV_BLOCK).step_by(GROUP) {
                let seen = (seen >> group) as u16 & 0xff;
                let score = dot.load_part(scores.add(group), GROUP);
                let before = *self.max.add(i);
                let mut bits = group_weights(dot, score, before, seen);
                if dot.any_word_above(bits, LIMIT) {
                    let hidden = dot.splat(f32::NEG_INFINITY);
                    let largest = dot.largest(dot.choose(seen, score, hidden));
                    let max = largest.floor();
                    if *self.sum.add(i) > 0.0 || waiting < group / 2 {
                        let values = ahead.record.add(form.keys_len());
                        self.multiply(dot, (i, 1), waiting..group / 2, (values, None));
                        self.scale(dot, i, before - max);
                    }
                    p.write_bytes(0, group / 2);
                    waiting = group / 2;
                    *self.max.add(i) = max;
                    bits = group_weights(dot, score, max, seen);
                }
                dot.store_part(p.add(group / 2).cast(), dot.floats(bits), GROUP / 2);
            }
        }
    }

    /// Multiplies what was summed of row `i` by a power of two.
    #[inline(always)]
    unsafe fn scale(&mut self, dot: Dot, i: usize, power: f32) {
        let columns = self.job.form.columns();
        let factor = dot.scale(dot.splat(1.0), dot.splat(power));
        // SAFETY: see above.
        unsafe {
            let sum = self.sum.add(i);
            dot.store_part(sum, dot.mul(dot.load_part(sum, 1), factor), 1);
            for column in (0..columns).step_by(LANES) {
                let o = self.o.add(i * columns + column);
                dot.store(o, dot.mul(dot.load(o), factor));
            }
        }
    }

    /// Adds the values of some pairs to the outputs of all rows.
    #[inline(always)]
    unsafe fn multiply_all(
        &mut self,
        dot: Dot,
        pairs: Range<usize>,
        (values, ahead): (*const u32, Option<&Ahead>),
    ) {
        for (first, count) in fours(self.rows.len()) {
            let ahead = ahead.filter(|_| first == 0);
            // SAFETY: see above.
            unsafe { self.multiply(dot, (first, count), pairs.clone(), (values, ahead)) };
        }
    }

    /// The same for up to four rows from `first` on.
    #[inline(always)]
    unsafe fn multiply(
        &mut self,
        dot: Dot,
        (first, count): (usize, usize),
        pairs: Range<usize>,
        (values, mut ahead): (*const u32, Option<&Ahead>),
    ) {
        let columns = self.job.form.columns();
        let mut column = 0;
        while column < columns {
            let wide = if count <= 2 && columns - column >= 8 * LANES {
                8
            } else if columns - column >= 4 * LANES {
                4
            } else {
                1
            };
            let job = (first, column, pairs.clone());
            // SAFETY: see above.
            unsafe {
                match (count, wide) {
                    (1, 8) => self.columns::<1, 8>(dot, job, values, ahead),
                    (2, 8) => self.columns::<2, 8>(dot, job, values, ahead),
                    (1, 4) => self.columns::<1, 4>(dot, job, values, ahead),
                    (2, 4) => self.columns::<2, 4>(dot, job, values, ahead),
                    (3, 4) => self.columns::<3, 4>(dot, job, values, ahead),
                    (4, 4) => self.columns::<4, 4>(dot, job, values, ahead),
                    (1, _) => self.columns::<1, 1>(dot, job, values, ahead),
                    (2, _) => self.columns::<2, 1>(dot, job, values, ahead),
                    (3, _) => self.columns::<3, 1>(dot, job, values, ahead),
                    _ => self.columns::<4, 1>(dot, job, values, ahead),
                }
            }
            column += wide * LANES;
            ahead = None;
        }
    }

    /// V registers of columns from `column` on, of R rows from `first` on; with the first columns, the
    /// sums of the probabilities.
    #[inline(always)]
    unsafe fn columns<const R: usize, const V: usize>(
        &mut self,
        dot: Dot,
        (first, column, pairs): (usize, usize, Range<usize>),
        values: *const u32,
        ahead: Option<&Ahead>,
    ) {
        let columns = self.job.form.columns();
        // SAFETY: see above.
        unsafe {
            let o = self.o.add(first * columns + column);
            let p = self.p.add(first * KV_BLOCK / 2);
            let mut acc = [[dot.splat(0.0); V]; R];
            let mut sums = [dot.splat(0.0); R];
            for (i, acc) in acc.iter_mut().enumerate() {
                sums[i] = dot.splat(*self.sum.add(first + i));
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = dot.load(o.add(i * columns + v * LANES));
                }
            }
            for pair in pairs {
                if let Some(ahead) = ahead {
                    let at = self.job.form.keys_len() + pair * columns;
                    ahead.fetch(dot, at, columns);
                }
                let at = values.wrapping_add(pair * columns + column);
                let mut value = [dot.splat_bits(0); V];
                for (v, value) in value.iter_mut().enumerate() {
                    *value = dot.load_bits(at.add(v * LANES));
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let weight = dot.splat_bits(*p.add(i * KV_BLOCK / 2 + pair));
                    if column == 0 {
                        sums[i] = dot.dot(sums[i], weight, dot.splat_bits(ONES));
                    }
                    for (acc, value) in acc.iter_mut().zip(value) {
                        *acc = dot.dot(*acc, value, weight);
                    }
                }
            }
            for (i, acc) in acc.iter().enumerate() {
                if column == 0 {
                    dot.store_part(self.sum.add(first + i), sums[i], 1);
                }
                for (v, acc) in acc.iter().enumerate() {
                    dot.store(o.add(i * columns + v * LANES), *acc);
                }
            }
        }
    }
}

/// A group's probabilities, side by side; zero where a key is not seen.
#[inline(always)]
fn group_weights(dot: Dot, score: F, max: f32, seen: u16) -> I {
    let power = dot.keep_bits(seen, power(dot, score, dot.splat(max)));
    dot.join_upper(power, dot.splat_bits(0))
}

/// `0..rows` in parts of at most four: first row and count.
#[inline(always)]
fn fours(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let parts = rows.div_ceil(TOGETHER);
    (0..parts).map(move |part| {
        let (start, end) = (part * rows / parts, (part + 1) * rows / parts);
        (start, end - start)
    })
}

/// The mask of the first `n` of 64 keys.
#[inline(always)]
fn mask(n: usize) -> u64 {
    if n == KV_BLOCK {
        u64::MAX
    } else {
        (1 << n) - 1
    }
}
