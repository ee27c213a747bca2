//! Many queries of one head: a lane for each.
//!
//! Decision: a tile holds up to 48 query rows as the lanes of three registers, and both products run
//! with the cache's side broadcast: 8 keys times 48 queries, then 8 columns of the values times 48
//! queries, 24 sums in registers each. So softmax needs nothing across lanes, queries are rounded up to
//! 16 and keys to 8, no more, and a key costs no shuffling.
//!
//! A group of 8 keys goes from its scores to its probabilities in registers, on the bet that none is
//! above [`LIMIT`] against its row's reference point. Where one is, or where not every row sees every
//! key, the group takes the careful way through memory. Probabilities of a few blocks wait as pairs of
//! bf16 until they multiply those blocks' values in one pass.

use std::ops::Range;

use super::blocks::Blocks;
use super::fetch::Fetch;
use super::{GROUP, Job, LIMIT, ONES, State, pack, power};
use crate::cpu::dot::{Dot, DotKernel, F, I, LANES};
use crate::kv_cache::{KV_BLOCK, Record};

/// Query rows of the largest tile.
pub(super) const ROWS: usize = 3 * LANES;
/// Blocks whose probabilities wait.
const WAITING: usize = 4;

/// The attention of some rows, at most `16 V`, over the keys `seen`.
pub(super) struct Wide<'a, const V: usize> {
    pub(super) job: &'a Job<'a>,
    pub(super) blocks: &'a Blocks<'a>,
    pub(super) rows: Range<usize>,
    pub(super) seen: Range<usize>,
    pub(super) scratch: &'a mut [u32],
    pub(super) state: State<'a>,
    /// What will be wanted after this tile.
    pub(super) fetch: &'a mut [Fetch],
}

/// What a tile needs of a thread's scratch.
pub(super) fn scratch_len(form: Record) -> usize {
    let odd = form.columns();
    let tile = form.pairs() + WAITING * KV_BLOCK / 2 + form.columns() + GROUP + 2;
    tile * ROWS + odd + WAITING * form.len()
}

impl<const V: usize> DotKernel for Wide<'_, V> {
    #[inline(always)]
    fn run(self, dot: Dot) {
        let form = self.job.form;
        assert!(self.scratch.len() >= scratch_len(form) && self.rows.len() <= V * LANES);
        assert!(self.state.fits(V * LANES, form.columns()));
        let common = self.job.common(&self.rows);
        let mut tile = Tile::<V> {
            job: self.job,
            blocks: self.blocks,
            rows: self.rows,
            common,
            place: Place::new(self.scratch, form, self.state),
            waiting: Waiting::new(),
        };
        // SAFETY: the lengths above are those that Place and Tile reckon with.
        unsafe {
            tile.load_queries(dot);
            tile.attend(dot, self.seen, self.fetch);
            tile.store_outputs(dot);
        }
    }
}

struct Tile<'a, const V: usize> {
    job: &'a Job<'a>,
    blocks: &'a Blocks<'a>,
    rows: Range<usize>,
    /// Keys that every row sees.
    common: Range<usize>,
    place: Place,
    waiting: Waiting,
}

/// Addresses of what a tile works on, lanes being its rows.
#[derive(Clone, Copy)]
struct Place {
    /// `[pairs][lanes]`: the queries, scaled.
    q: *mut u32,
    /// `[pairs of keys][lanes]`: probabilities that wait.
    p: *mut u32,
    /// `[columns][lanes]`: the outputs, not yet divided by the sum.
    o: *mut f32,
    /// `[GROUP][lanes]`: the scores of a careful group.
    scores: *mut f32,
    /// The first key that each row sees, and the first beyond.
    from: *mut u32,
    to: *mut u32,
    /// `[columns]`: a pair of values of which only the first key is seen.
    odd: *mut u32,
    /// `[WAITING]` records.
    records: *mut u32,
    /// Each row's reference point and sum.
    max: *mut f32,
    sum: *mut f32,
    /// `[lanes][columns]`: the outputs in the end.
    out: *mut f32,
}

impl Place {
    fn new(scratch: &mut [u32], form: Record, state: State<'_>) -> Place {
        let mut rest = scratch;
        let mut take = |len: usize| {
            let (part, more) = std::mem::take(&mut rest).split_at_mut(len);
            rest = more;
            part.as_mut_ptr()
        };
        Place {
            q: take(form.pairs() * ROWS),
            p: take(WAITING * KV_BLOCK / 2 * ROWS),
            o: take(form.columns() * ROWS).cast(),
            scores: take(GROUP * ROWS).cast(),
            from: take(ROWS),
            to: take(ROWS),
            odd: take(form.columns()),
            records: take(WAITING * form.len()),
            max: state.max.as_mut_ptr(),
            sum: state.sum.as_mut_ptr(),
            out: state.o.as_mut_ptr(),
        }
    }
}

/// Values whose probabilities wait, in the order of the keys.
struct Waiting {
    /// Where pairs of values start, and how many.
    parts: [(*const u32, usize); WAITING + 1],
    len: usize,
    pairs: usize,
    /// Whether the outputs are still to be begun.
    fresh: bool,
}

impl Waiting {
    fn new() -> Waiting {
        Waiting {
            parts: [(std::ptr::null(), 0); WAITING + 1],
            len: 0,
            pairs: 0,
            fresh: true,
        }
    }

    fn open(&mut self, values: *const u32) {
        self.parts[self.len] = (values, 0);
        self.len += 1;
    }

    fn extend(&mut self, pairs: usize) {
        self.parts[self.len - 1].1 += pairs;
        self.pairs += pairs;
    }
}

// SAFETY of all that follows: Wide::run checked the lengths. Lanes are below 16 V <= ROWS, groups inside
// their block, columns below form.columns(), waiting pairs at most WAITING * KV_BLOCK / 2.
impl<const V: usize> Tile<'_, V> {
    const WIDTH: usize = V * LANES;

    /// Queries to lanes, and what each sees. Lanes without a row repeat the last one.
    #[inline(always)]
    unsafe fn load_queries(&mut self, dot: Dot) {
        let (form, place) = (self.job.form, self.place);
        let row = |lane: usize| (self.rows.start + lane).min(self.rows.end - 1);
        for lane in 0..Self::WIDTH {
            let sees = self.job.visible(row(lane));
            // SAFETY: see above.
            unsafe {
                place.from.add(lane).write(sees.start as u32);
                place.to.add(lane).write(sees.end as u32);
                place.max.add(lane).write(f32::NEG_INFINITY);
                place.sum.add(lane).write(0.0);
            }
        }
        for first in (0..Self::WIDTH).step_by(LANES) {
            let rows = std::array::from_fn(|i| self.job.query(row(first + i)).as_ptr());
            // SAFETY: rows of form.dim values; the rest see above.
            unsafe {
                let out = (place.q.add(first), Self::WIDTH);
                pack::lanes(dot, rows, form.dim, self.job.factor, out);
            }
        }
    }

    #[inline(always)]
    unsafe fn attend(&mut self, dot: Dot, seen: Range<usize>, fetch: &mut [Fetch]) {
        let form = self.job.form;
        let mut result = self.job.result(&self.rows);
        let last = (seen.end - 1) / KV_BLOCK;
        let mut room = 0;
        for block in seen.start / KV_BLOCK..=last {
            let (start, end) = (block * KV_BLOCK, seen.end.min((block + 1) * KV_BLOCK));
            let first = seen.start.max(start) / GROUP * GROUP;
            // SAFETY: see above.
            unsafe {
                let record = self.place.records.add(room * form.len());
                let keys = self.blocks.record(dot, block, record);
                let values = keys.add(form.keys_len());
                let values_of = |key: usize| values.add((key - start) / 2 * form.columns());
                self.waiting.open(values_of(first));
                for key in (first..end).step_by(GROUP) {
                    let at = keys.add(key - start);
                    result.step_to_write(dot);
                    fetch.iter_mut().for_each(|fetch| fetch.step(dot));
                    let all_see = self.common.start <= key && key + GROUP <= self.common.end;
                    if !(all_see && self.bet(dot, at)) {
                        self.careful(dot, at, key, values_of(key));
                    }
                    self.waiting.extend((end - key).min(GROUP) / 2);
                }
                if end % 2 == 1 {
                    self.half_pair(values_of(end));
                }
                room += 1;
                if room == WAITING || block == last {
                    self.multiply(dot);
                    room = 0;
                }
            }
        }
    }

    /// Puts a pair of values, of which the second key is not seen, in line without that one: it may
    /// be no number.
    #[inline(always)]
    unsafe fn half_pair(&mut self, values: *const u32) {
        for column in 0..self.job.form.columns() {
            // SAFETY: see above.
            unsafe {
                let first = *values.add(column) & 0xffff;
                self.place.odd.add(column).write(first);
            }
        }
        self.waiting.open(self.place.odd);
        self.waiting.extend(1);
    }

    /// The scores of a group's keys with all rows.
    #[inline(always)]
    unsafe fn scores(&self, dot: Dot, keys: *const u32) -> [[F; V]; GROUP] {
        let mut acc = [[dot.splat(0.0); V]; GROUP];
        for pair in 0..self.job.form.pairs() {
            // SAFETY: see above.
            unsafe {
                let q = self.place.q.add(pair * Self::WIDTH);
                let mut queries = [dot.splat_bits(0); V];
                for (v, queries) in queries.iter_mut().enumerate() {
                    *queries = dot.load_bits(q.add(v * LANES));
                }
                let keys = keys.add(pair * KV_BLOCK);
                for (key, acc) in acc.iter_mut().enumerate() {
                    let key = dot.splat_bits(*keys.add(key));
                    for (acc, queries) in acc.iter_mut().zip(queries) {
                        *acc = dot.dot(*acc, key, queries);
                    }
                }
            }
        }
        acc
    }

    /// The probabilities of a group that all rows see, and their sums; false, and nothing done, if one
    /// is too large.
    #[inline(always)]
    unsafe fn bet(&mut self, dot: Dot, keys: *const u32) -> bool {
        // SAFETY: see above.
        unsafe {
            let scores = self.scores(dot, keys);
            let p = self.place.p.add(self.waiting.pairs * Self::WIDTH);
            let (mut top, mut sums) = (dot.splat_bits(0), [dot.splat(0.0); V]);
            for v in 0..V {
                let max = dot.load(self.place.max.add(v * LANES));
                let mut sum = dot.load(self.place.sum.add(v * LANES));
                for pair in 0..GROUP / 2 {
                    let first = power(dot, scores[2 * pair][v], max);
                    let second = power(dot, scores[2 * pair + 1][v], max);
                    let bits = dot.pair_upper(first, second);
                    dot.store_bits(p.add(pair * Self::WIDTH + v * LANES), bits);
                    sum = dot.dot(sum, bits, dot.splat_bits(ONES));
                    top = dot.max_words(top, bits);
                }
                sums[v] = sum;
            }
            if dot.any_word_above(top, LIMIT) {
                return false;
            }
            for (v, sum) in sums.iter().enumerate() {
                dot.store(self.place.sum.add(v * LANES), *sum);
            }
            true
        }
    }

    /// The same for any group, `key` being its first key and `values` its values. Rows with a
    /// probability that is too large get a new reference point.
    #[inline(always)]
    unsafe fn careful(&mut self, dot: Dot, keys: *const u32, key: usize, values: *const u32) {
        // SAFETY: see above.
        unsafe {
            let scores = self.scores(dot, keys);
            for (i, scores) in scores.iter().enumerate() {
                for (v, scores) in scores.iter().enumerate() {
                    let at = self.place.scores.add(i * Self::WIDTH + v * LANES);
                    dot.store(at, *scores);
                }
            }
            let (mut moved, mut summed) = ([0; V], false);
            for (v, moved) in moved.iter_mut().enumerate() {
                let (top, _) = self.masked(dot, v, key);
                *moved = dot.words_above(top, LIMIT);
                let sum = dot.load(self.place.sum.add(v * LANES));
                summed |= *moved & dot.above(sum, dot.splat(0.0)) != 0;
            }
            if summed {
                // What waits was reckoned against the old reference points.
                self.multiply(dot);
                self.waiting.open(values);
            }
            for (v, moved) in moved.into_iter().enumerate() {
                if moved != 0 {
                    self.move_reference(dot, v, key, (moved, summed));
                }
                let (_, sum) = self.masked(dot, v, key);
                dot.store(self.place.sum.add(v * LANES), sum);
            }
        }
    }

    /// Scores of register `v` and key `i` of a careful group, and the rows that see it.
    #[inline(always)]
    unsafe fn seen(&self, dot: Dot, v: usize, key: usize, i: usize) -> (F, u16) {
        // SAFETY: see above.
        unsafe {
            let from = dot.load_bits(self.place.from.add(v * LANES));
            let to = dot.load_bits(self.place.to.add(v * LANES));
            let scores = self.place.scores.add(i * Self::WIDTH + v * LANES);
            let seen = dot.within((key + i) as u32, from, to);
            (dot.load(scores), seen)
        }
    }

    /// The probabilities of register `v` of a careful group; the largest in each row, and the new sum.
    #[inline(always)]
    unsafe fn masked(&self, dot: Dot, v: usize, key: usize) -> (I, F) {
        // SAFETY: see above.
        unsafe {
            let p = self.place.p.add(self.waiting.pairs * Self::WIDTH);
            let max = dot.load(self.place.max.add(v * LANES));
            let mut sum = dot.load(self.place.sum.add(v * LANES));
            let mut top = dot.splat_bits(0);
            for pair in 0..GROUP / 2 {
                let mut powers = [dot.splat_bits(0); 2];
                for (i, powers) in powers.iter_mut().enumerate() {
                    let (scores, seen) = self.seen(dot, v, key, 2 * pair + i);
                    *powers = dot.keep_bits(seen, power(dot, scores, max));
                }
                let bits = dot.pair_upper(powers[0], powers[1]);
                dot.store_bits(p.add(pair * Self::WIDTH + v * LANES), bits);
                sum = dot.dot(sum, bits, dot.splat_bits(ONES));
                top = dot.max_words(top, bits);
            }
            (top, sum)
        }
    }

    /// Moves the reference points of the rows `moved` of register `v` to their largest scores in this
    /// group; what was summed so far is scaled, where there is any.
    #[inline(always)]
    unsafe fn move_reference(
        &mut self,
        dot: Dot,
        v: usize,
        key: usize,
        (moved, summed): (u16, bool),
    ) {
        // SAFETY: see above.
        unsafe {
            let hidden = dot.splat(f32::NEG_INFINITY);
            let mut largest = hidden;
            for i in 0..GROUP {
                let (scores, seen) = self.seen(dot, v, key, i);
                largest = dot.max(largest, dot.choose(seen, scores, hidden));
            }
            let at = self.place.max.add(v * LANES);
            let before = dot.load(at);
            let max = dot.choose(moved, dot.floor(largest), before);
            dot.store(at, max);
            if !summed {
                return;
            }
            let one = dot.splat(1.0);
            let factor = dot.choose(moved, dot.scale(one, dot.sub(before, max)), one);
            let sum = self.place.sum.add(v * LANES);
            dot.store(sum, dot.mul(dot.load(sum), factor));
            for column in 0..self.job.form.columns() {
                let o = self.place.o.add(column * Self::WIDTH + v * LANES);
                dot.store(o, dot.mul(dot.load(o), factor));
            }
        }
    }

    /// Adds what waits to the outputs.
    #[inline(always)]
    unsafe fn multiply(&mut self, dot: Dot) {
        let form = self.job.form;
        for column in (0..form.dim).step_by(GROUP) {
            let mut acc = [[dot.splat(0.0); V]; GROUP];
            // SAFETY: see above.
            unsafe {
                let o = self.place.o.add(column * Self::WIDTH);
                if !self.waiting.fresh {
                    for (i, acc) in acc.iter_mut().enumerate() {
                        for (v, acc) in acc.iter_mut().enumerate() {
                            *acc = dot.load(o.add(i * Self::WIDTH + v * LANES));
                        }
                    }
                }
                let mut p = self.place.p.cast_const();
                for (values, pairs) in &self.waiting.parts[..self.waiting.len] {
                    let mut values = values.add(column);
                    for _ in 0..*pairs {
                        let mut waiting = [dot.splat_bits(0); V];
                        for (v, waiting) in waiting.iter_mut().enumerate() {
                            *waiting = dot.load_bits(p.add(v * LANES));
                        }
                        for (i, acc) in acc.iter_mut().enumerate() {
                            let value = dot.splat_bits(*values.add(i));
                            for (acc, waiting) in acc.iter_mut().zip(waiting) {
                                *acc = dot.dot(*acc, value, waiting);
                            }
                        }
                        p = p.add(Self::WIDTH);
                        values = values.wrapping_add(form.columns());
                    }
                }
                for (i, acc) in acc.iter().enumerate() {
                    for (v, acc) in acc.iter().enumerate() {
                        dot.store(o.add(i * Self::WIDTH + v * LANES), *acc);
                    }
                }
            }
        }
        self.waiting = Waiting {
            fresh: false,
            ..Waiting::new()
        };
    }

    /// The outputs to the state, a row for each lane.
    #[inline(always)]
    unsafe fn store_outputs(&self, dot: Dot) {
        let columns = self.job.form.columns();
        for first in (0..Self::WIDTH).step_by(LANES) {
            for column in (0..columns).step_by(LANES) {
                let mut square = [dot.splat_bits(0); LANES];
                for (i, square) in square.iter_mut().enumerate() {
                    // SAFETY: see above.
                    let o = unsafe { self.place.o.add((column + i) * Self::WIDTH + first) };
                    // SAFETY: as above.
                    *square = unsafe { dot.load_bits(o.cast_const().cast()) };
                }
                dot.transpose(&mut square);
                for (i, square) in square.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe {
                        let out = self.place.out.add((first + i) * columns + column);
                        dot.store(out, dot.floats(*square));
                    }
                }
            }
        }
    }
}
