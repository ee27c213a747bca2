//! One query of a head or a few where there is AMX: its arithmetic by vector registers.
//!
//! Decision: with few queries the cache is what costs, and tile registers, whose loads take every fourth or eighth
//! line, read it from memory at 20 GB/s where two threads can have 27 (two cores of a Xeon). So these rows go through
//! a block from end to end as in [`narrow`](super::narrow), but in the order of [`amx`](super::amx): chunks of 32 keys, and of
//! every 32 products one chain of the even ones and one of the odd, each rounded at every step, added to each other and then
//! to the sum, as the instruction does it. A row has the same bits here as there.
//!
//! The instruction takes subnormal factors for zero, and so does this. It also cuts subnormal sums of products, which
//! this keeps: a row of which nothing but such sums is left would differ.
//!
//! Refuses heads that are no multiple of 32: the last product of those overlaps the one before.

use std::ops::Range;

use super::amx::{CHUNK, PAIRS};
use super::blocks::Blocks;
use super::narrow::Ahead;
use super::{Job, LIMIT, State, pack};
use crate::cpu::dot::{Dot, DotKernel, F, I, LANES};
use crate::kv_cache::{KV_BLOCK, Record};

/// The most query rows. With eight the arithmetic takes longer than the cache, and twice as long as by tile registers.
pub(super) const ROWS: usize = 4;

/// The attention of some rows, at most [`ROWS`], over the keys `seen`.
pub(super) struct Few<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) blocks: &'a Blocks<'a>,
    pub(super) rows: Range<usize>,
    pub(super) seen: Range<usize>,
    pub(super) scratch: &'a mut [u32],
    pub(super) state: State<'a>,
}

/// Whether so many rows go this way.
pub(super) fn suits(form: Record, rows: usize) -> bool {
    rows <= ROWS && form.dim.is_multiple_of(CHUNK)
}

/// What a tile needs of a thread's scratch.
pub(super) fn scratch_len(form: Record) -> usize {
    ROWS * (2 * form.pairs() + KV_BLOCK + CHUNK) + form.len()
}

impl DotKernel for Few<'_> {
    #[inline(always)]
    fn run(self, dot: Dot) {
        let form = self.job.form;
        assert!(self.scratch.len() >= scratch_len(form) && suits(form, self.rows.len()));
        assert!(self.state.fits(self.rows.len(), form.columns()));
        let mut rest = self.scratch;
        let mut take = |len: usize| {
            let (part, more) = std::mem::take(&mut rest).split_at_mut(len);
            rest = more;
            part.as_mut_ptr()
        };
        let mut tile = Tile {
            common: self.job.common(&self.rows),
            job: self.job,
            rows: self.rows,
            first: self.seen.start / CHUNK,
            seen: self.seen,
            q: take(ROWS * 2 * form.pairs()).cast(),
            scores: take(ROWS * KV_BLOCK).cast(),
            p: take(ROWS * CHUNK).cast(),
            max: self.state.max.as_mut_ptr(),
            sum: self.state.sum.as_mut_ptr(),
            o: self.state.o.as_mut_ptr(),
        };
        let room = take(form.len());
        let last = (tile.seen.end - 1) / KV_BLOCK;
        // SAFETY: the lengths above are those that Tile reckons with; blocks that are seen exist.
        unsafe {
            tile.begin(dot);
            for block in tile.seen.start / KV_BLOCK..=last {
                let record = self.blocks.record(dot, block, room);
                let ahead = Ahead::of(self.blocks, block, (record, form.len()));
                tile.block(dot, block * KV_BLOCK, &ahead);
            }
        }
    }
}

/// Addresses of what a tile works on.
struct Tile<'a> {
    job: &'a Job<'a>,
    rows: Range<usize>,
    /// Keys that some row sees, that every row sees, and the chunk of the first.
    seen: Range<usize>,
    common: Range<usize>,
    first: usize,
    /// `[rows][pairs][2]`: the queries, scaled, and rounded to bf16.
    q: *mut f32,
    /// `[rows][KV_BLOCK]`
    scores: *mut f32,
    /// `[rows][2][PAIRS]`: probabilities of a chunk's even keys, and of its odd ones.
    p: *mut f32,
    /// Each row's reference point and sum.
    max: *mut f32,
    sum: *mut f32,
    /// `[rows][columns]`
    o: *mut f32,
}

// SAFETY of all that follows: Few::run checked the lengths. Rows are below rows.len() <= ROWS, keys and
// pairs inside their block, columns below form.columns().
impl Tile<'_> {
    #[inline(always)]
    unsafe fn begin(&mut self, dot: Dot) {
        let form = self.job.form;
        let (pairs, columns) = (form.pairs(), form.columns());
        for (i, row) in self.rows.clone().enumerate() {
            let query = self.job.query(row).as_ptr();
            // SAFETY: see above; pairs are whole registers. They are spread from the last one on, since
            // they lie in the first half of where they go.
            unsafe {
                let q = self.q.add(i * 2 * pairs);
                pack::row(dot, query, form.dim, self.job.factor, q.cast());
                for pair in (0..pairs).rev() {
                    let [even, odd] = halves(*q.cast::<u32>().add(pair));
                    q.add(2 * pair).write(even);
                    q.add(2 * pair + 1).write(odd);
                }
                self.max.add(i).write(f32::NEG_INFINITY);
                self.sum.add(i).write(0.0);
                self.o.add(i * columns).write_bytes(0, columns);
            }
        }
    }

    /// All rows with a block, whose first key is `start`.
    #[inline(always)]
    unsafe fn block(&mut self, dot: Dot, start: usize, ahead: &Ahead) {
        // SAFETY: see above.
        unsafe {
            match self.rows.len() {
                1 => self.score::<1, 4>(dot, 0, ahead),
                2 => self.score_halves::<2>(dot, ahead),
                3 => self.score_halves::<3>(dot, ahead),
                _ => self.score_halves::<4>(dot, ahead),
            }
            let end = self.seen.end.min(start + KV_BLOCK);
            for chunk in (start / CHUNK).max(self.first)..end.div_ceil(CHUNK) {
                let key = chunk * CHUNK - start;
                self.weigh(dot, chunk, key);
                let seen = (self.seen.end - chunk * CHUNK).min(CHUNK);
                match self.rows.len() {
                    1 => self.multiply::<1, 8>(dot, (key, seen), ahead),
                    2 => self.multiply::<2, 4>(dot, (key, seen), ahead),
                    3 => self.multiply::<3, 2>(dot, (key, seen), ahead),
                    _ => self.multiply::<4, 2>(dot, (key, seen), ahead),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn score_halves<const R: usize>(&mut self, dot: Dot, ahead: &Ahead) {
        // SAFETY: see above.
        unsafe {
            self.score::<R, 2>(dot, 0, ahead);
            self.score::<R, 2>(dot, 2 * LANES, ahead);
        }
    }

    /// The scores of all R rows with V registers of the block's keys, from `first` on.
    #[inline(always)]
    unsafe fn score<const R: usize, const V: usize>(
        &mut self,
        dot: Dot,
        first: usize,
        ahead: &Ahead,
    ) {
        let pairs = self.job.form.pairs();
        let mut scores = [[dot.splat(0.0); V]; R];
        // SAFETY: see above.
        unsafe {
            for product in (0..pairs).step_by(PAIRS) {
                let mut chains = [[[dot.splat(0.0); 2]; V]; R];
                for pair in product..product + PAIRS {
                    if first == 0 && ahead.worth {
                        ahead.fetch(dot, pair * KV_BLOCK, KV_BLOCK);
                    }
                    let at = ahead.record.add(pair * KV_BLOCK + first);
                    let mut keys = [[dot.splat(0.0); 2]; V];
                    for (v, keys) in keys.iter_mut().enumerate() {
                        *keys = dot.halves(dot.load_bits(at.add(v * LANES)));
                    }
                    for (i, chains) in chains.iter_mut().enumerate() {
                        let q = self.q.add(2 * (i * pairs + pair));
                        let q = [dot.splat(*q), dot.splat(*q.add(1))];
                        for (chains, keys) in chains.iter_mut().zip(keys) {
                            *chains = step(dot, *chains, q, keys);
                        }
                    }
                }
                for (scores, chains) in scores.iter_mut().zip(chains) {
                    for (scores, [even, odd]) in scores.iter_mut().zip(chains) {
                        *scores = dot.add(*scores, dot.add(even, odd));
                    }
                }
            }
            for (i, scores) in scores.iter().enumerate() {
                for (v, scores) in scores.iter().enumerate() {
                    let at = self.scores.add(i * KV_BLOCK + first + v * LANES);
                    dot.store(at, *scores);
                }
            }
        }
    }

    /// Scores of a chunk to probabilities, and those to the rows' sums.
    #[inline(always)]
    unsafe fn weigh(&mut self, dot: Dot, chunk: usize, key: usize) {
        let (start, end) = (chunk * CHUNK, (chunk + 1) * CHUNK);
        let all_see = self.common.start <= start && end <= self.common.end;
        for i in 0..self.rows.len() {
            // SAFETY: see above.
            unsafe {
                let seen = seen_of(chunk, &self.job.visible(self.rows.start + i));
                let scores = self.scores.add(i * KV_BLOCK + key);
                let some = (!all_see).then_some(seen);
                let mut bits = weights(dot, scores, *self.max.add(i), some);
                if chunk == self.first || dot.any_word_above(bits, LIMIT) {
                    self.move_reference(dot, i, reference(dot, scores, seen));
                    bits = weights(dot, scores, *self.max.add(i), some);
                }
                let p = self.p.add(i * CHUNK);
                let least = dot.splat(f32::MIN_POSITIVE);
                for (half, p_half) in dot.halves(bits).into_iter().enumerate() {
                    // NaN stays.
                    let subnormal = dot.above(least, p_half);
                    let normal = dot.choose(subnormal, dot.splat(0.0), p_half);
                    dot.store(p.add(half * PAIRS), normal);
                }
                let (mut even, mut odd) = (0.0, 0.0);
                for pair in 0..PAIRS {
                    even += *p.add(pair);
                    odd += *p.add(PAIRS + pair);
                }
                *self.sum.add(i) += even + odd;
            }
        }
    }

    /// Moves the reference point of row `i`; what was summed so far is scaled.
    #[inline(always)]
    unsafe fn move_reference(&mut self, dot: Dot, i: usize, max: f32) {
        let columns = self.job.form.columns();
        // SAFETY: see above.
        unsafe {
            let before = *self.max.add(i);
            self.max.add(i).write(max);
            if before == f32::NEG_INFINITY || before == max {
                return;
            }
            let factor = dot.scale(dot.splat(1.0), dot.splat(before - max));
            let sum = self.sum.add(i);
            dot.store_part(sum, dot.mul(dot.load_part(sum, 1), factor), 1);
            for column in (0..columns).step_by(LANES) {
                let o = self.o.add(i * columns + column);
                dot.store(o, dot.mul(dot.load(o), factor));
            }
        }
    }

    /// Adds the values of a chunk, of which `seen` keys are seen, to the outputs of all R rows: V registers
    /// of columns at a time, as long as there are so many.
    #[inline(always)]
    unsafe fn multiply<const R: usize, const V: usize>(
        &mut self,
        dot: Dot,
        chunk: (usize, usize),
        ahead: &Ahead,
    ) {
        let columns = self.job.form.columns();
        let whole = columns / (V * LANES) * (V * LANES);
        // SAFETY: see above; columns are a multiple of two registers.
        unsafe {
            for column in (0..whole).step_by(V * LANES) {
                self.columns::<R, V>(dot, column, chunk, ahead);
            }
            for column in (whole..columns).step_by(2 * LANES) {
                self.columns::<R, 2>(dot, column, chunk, ahead);
            }
        }
    }

    #[inline(always)]
    unsafe fn columns<const R: usize, const V: usize>(
        &mut self,
        dot: Dot,
        column: usize,
        (key, seen): (usize, usize),
        ahead: &Ahead,
    ) {
        let columns = self.job.form.columns();
        let values_at = self.job.form.keys_len() + key / 2 * columns;
        let mut chains = [[[dot.splat(0.0); 2]; V]; R];
        // SAFETY: see above.
        unsafe {
            for pair in 0..seen / 2 {
                let at = values_at + pair * columns;
                if column == 0 && ahead.worth {
                    ahead.fetch(dot, at, columns);
                }
                let mut values = [[dot.splat(0.0); 2]; V];
                for (v, values) in values.iter_mut().enumerate() {
                    let at = ahead.record.add(at + column + v * LANES);
                    *values = dot.halves(dot.load_bits(at));
                }
                for (i, chains) in chains.iter_mut().enumerate() {
                    let p = self.p.add(i * CHUNK + pair);
                    let p = [dot.splat(*p), dot.splat(*p.add(PAIRS))];
                    for (chains, values) in chains.iter_mut().zip(values) {
                        *chains = step(dot, *chains, p, values);
                    }
                }
            }
            if seen % 2 == 1 {
                // The second of the pair is not seen, and may be no number.
                let pair = seen / 2;
                for (i, chains) in chains.iter_mut().enumerate() {
                    let p = dot.splat(*self.p.add(i * CHUNK + pair));
                    for (v, chains) in chains.iter_mut().enumerate() {
                        let at = values_at + pair * columns + column + v * LANES;
                        let [value, _] = dot.halves(dot.load_bits(ahead.record.add(at)));
                        chains[0] = dot.fma(p, value, chains[0]);
                    }
                }
            }
            for (i, chains) in chains.iter().enumerate() {
                for (v, [even, odd]) in chains.iter().enumerate() {
                    let o = self.o.add(i * columns + column + v * LANES);
                    dot.store(o, dot.add(dot.load(o), dot.add(*even, *odd)));
                }
            }
        }
    }
}

/// A step of the even and of the odd chain.
#[inline(always)]
fn step(dot: Dot, chains: [F; 2], a: [F; 2], b: [F; 2]) -> [F; 2] {
    [
        dot.fma(a[0], b[0], chains[0]),
        dot.fma(a[1], b[1], chains[1]),
    ]
}

/// Both of a pair of bf16.
fn halves(pair: u32) -> [f32; 2] {
    [pair << 16, pair & 0xffff_0000].map(f32::from_bits)
}

/// Which keys of a chunk are among those that a row `sees`, a bit each.
#[inline(always)]
pub(super) fn seen_of(chunk: usize, sees: &Range<usize>) -> u32 {
    let from = sees.start.saturating_sub(chunk * CHUNK).min(CHUNK);
    let to = sees.end.saturating_sub(chunk * CHUNK).min(CHUNK);
    ((1_u64 << to) - (1 << from.min(to))) as u32
}

/// The probabilities of a chunk's scores against the reference point `max`; zero for keys that are not `seen`,
/// where some are not.
///
/// # Safety
/// The scores of a chunk can be read.
#[inline(always)]
pub(super) unsafe fn weights(dot: Dot, scores: *const f32, max: f32, seen: Option<u32>) -> I {
    let max = dot.splat(max);
    // SAFETY: the caller's contract.
    let (first, second) = unsafe { (dot.load(scores), dot.load(scores.add(LANES))) };
    let mut first = power(dot, first, max);
    let mut second = power(dot, second, max);
    if let Some(seen) = seen {
        first = dot.keep_bits(seen as u16, first);
        second = dot.keep_bits((seen >> LANES) as u16, second);
    }
    dot.join_upper(first, second)
}

/// The reference point by a chunk's scores: the largest of those that are `seen`, as a whole number.
///
/// # Safety
/// The scores of a chunk can be read.
#[inline(always)]
pub(super) unsafe fn reference(dot: Dot, scores: *const f32, seen: u32) -> f32 {
    let hidden = dot.splat(f32::NEG_INFINITY);
    // SAFETY: the caller's contract.
    let (first, second) = unsafe { (dot.load(scores), dot.load(scores.add(LANES))) };
    let first = dot.choose(seen as u16, first, hidden);
    let second = dot.choose((seen >> LANES) as u16, second, hidden);
    dot.largest(dot.max(first, second)).floor()
}

/// The bits of `2^(score - max)` for a whole `max`, of which the upper half is rounded to bf16: within
/// 0.51 of its last place, and zero below 2⁻¹²⁶.
#[inline(always)]
fn power(dot: Dot, score: F, max: F) -> I {
    // As super::power, but that the difference is taken first, which spares an instruction: it is
    // rounded where it is large, to far less than a bf16's last place.
    const HALF: f32 = 1.0 / 256.0;
    let x = dot.sub(score, max);
    let part = dot.fraction(x);
    let p = dot.fma(dot.splat(0.078_024_52), part, dot.splat(0.226_067_16));
    let p = dot.fma(p, part, dot.splat(0.695_833_54));
    let p = dot.fma(p, part, dot.splat(0.999_925_2 + HALF));
    dot.bits(dot.scale(p, x))
}
