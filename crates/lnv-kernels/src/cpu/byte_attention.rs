//! Attention of a segment with itself by the byte dot product, for towers whose weights have 8 bits.
//!
//! Decision: queries and keys are rounded to 8-bit integers row by row, as the activations of an 8-bit
//! product are, and so are values; probabilities, times the step of their value's row, become 16-bit
//! integers, a high and a low byte, so that small ones in a long row do not vanish. Sums of products are
//! exact; the softmax is in f32 over whole rows, because a tower's rows are short (577 keys): nothing
//! is rescaled. On a processor whose bf16 dot product is slow this takes half the time of f32; where it
//! is fast, or where there is AMX, `dot_attention.rs` is as quick and more exact, and runs instead.
//!
//! A row depends on its segment only. The slow twin is `reference/bytes.rs`.

use std::cell::Cell;

use rayon::prelude::*;

use crate::buffer::{Aligned, Buffer};
use crate::cpu::formats::Format;
use crate::cpu::int::Vnni;
use crate::cpu::launch::{Kernel, launch_vnni};
use crate::cpu::quantised::{Q8, ROUND, step_of};
use crate::cpu::scratch::{Shared, with};
use crate::cpu::simd::Simd;
use crate::kv_cache::Heads;

/// Query rows of a tile.
const ROWS: usize = 12;
/// Keys of a block: two registers, so that the tile's sums fill the others but for the operands.
const BLOCK: usize = 32;
/// Registers of columns whose sums are in registers.
const WIDE: usize = 2;
/// The largest probability as an integer.
const MOST: f32 = 65_535.0;

thread_local! {
    static WORDS: Cell<Option<Aligned<u32>>> = const { Cell::new(None) };
    static FLOATS: Cell<Option<Aligned<f32>>> = const { Cell::new(None) };
}

/// Attention of each segment of `len` rows with itself; the shapes fit, and the processor has VNNI.
pub(crate) fn full_attention(
    qkv: &Buffer,
    (len, heads, scale): (usize, Heads, f32),
    out: &mut Buffer,
) {
    let sizes = Sizes::new(len, heads.head_dim);
    let (rows, cols) = (qkv.rows(), qkv.cols());
    let (qkv, out) = (qkv.host(), Shared::new(out.host_mut()));
    (0..rows / len * heads.kv_heads)
        .into_par_iter()
        .with_max_len(1)
        .for_each(|index| {
            with(&WORDS, sizes.words(), |words| {
                with(&FLOATS, sizes.floats(), |floats| {
                    let (segment, kv_head) = (index / heads.kv_heads, index % heads.kv_heads);
                    launch_vnni(Head {
                        sizes,
                        heads,
                        scale,
                        rows: &qkv[segment * len * cols..(segment + 1) * len * cols],
                        kv_head,
                        scratch: Scratch::new(&sizes, words, floats),
                        first_row: segment * len,
                        out,
                    });
                });
            });
        });
}

#[derive(Clone, Copy)]
struct Sizes {
    len: usize,
    d: usize,
    /// Keys, up to whole blocks.
    keys: usize,
    /// Elements of four values of a head's row.
    steps: usize,
    /// Columns of values, up to whole registers.
    columns: usize,
}

impl Sizes {
    fn new(len: usize, d: usize) -> Sizes {
        Sizes {
            len,
            d,
            keys: len.next_multiple_of(BLOCK),
            steps: d.div_ceil(4),
            columns: d.next_multiple_of(16),
        }
    }

    fn fours(&self) -> usize {
        self.keys / 4
    }

    fn words(&self) -> usize {
        let four_rows = self.columns;
        self.keys * self.steps
            + self.fours() * self.columns
            + four_rows
            + ROWS * self.steps
            + 2 * ROWS * self.fours()
    }

    fn floats(&self) -> usize {
        2 * self.keys + ROWS * self.keys + ROWS * self.columns
    }
}

struct Scratch<'a> {
    /// Blocks of keys: for each four values of a row, the block's keys, 128 added.
    keys: &'a mut [u32],
    /// For each four keys, their codes of each column.
    values: &'a mut [u32],
    /// The codes of four rows of values.
    four: &'a mut [u32],
    /// For each four values, the tile's rows.
    queries: &'a mut [u32],
    /// Bytes of probabilities, `[ROWS, keys]`.
    high: &'a mut [u32],
    low: &'a mut [u32],
    key_steps: &'a mut [f32],
    value_steps: &'a mut [f32],
    /// `[ROWS, keys]`
    scores: &'a mut [f32],
    /// `[ROWS, columns]`
    sums: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn new(sizes: &Sizes, words: &'a mut [u32], floats: &'a mut [f32]) -> Scratch<'a> {
        let (keys, words) = words.split_at_mut(sizes.keys * sizes.steps);
        let (values, words) = words.split_at_mut(sizes.fours() * sizes.columns);
        let (four, words) = words.split_at_mut(sizes.columns);
        let (queries, words) = words.split_at_mut(ROWS * sizes.steps);
        let (high, low) = words.split_at_mut(ROWS * sizes.fours());
        let (key_steps, floats) = floats.split_at_mut(sizes.keys);
        let (value_steps, floats) = floats.split_at_mut(sizes.keys);
        let (scores, sums) = floats.split_at_mut(ROWS * sizes.keys);
        Scratch {
            keys,
            values,
            four,
            queries,
            high,
            low,
            key_steps,
            value_steps,
            scores,
            sums,
        }
    }
}

/// A segment's key/value head, with the query heads that read it.
struct Head<'a> {
    sizes: Sizes,
    heads: Heads,
    scale: f32,
    /// The segment's rows of q, k and v.
    rows: &'a [f32],
    kv_head: usize,
    scratch: Scratch<'a>,
    /// The segment's first row of the result.
    first_row: usize,
    out: Shared<f32>,
}

/// What a tile's rows carry from one step to the next.
struct Tile {
    /// What integer sums start with.
    starts: [i32; ROWS],
    /// What a score of 1 stands for.
    steps: [f32; ROWS],
    /// The sums of the probabilities.
    totals: [f32; ROWS],
}

impl Kernel for Head<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        self.pack_keys(s);
        let largest = self.pack_values(s);
        let shared = self.heads.queries_per_kv();
        for head in self.kv_head * shared..(self.kv_head + 1) * shared {
            for first in (0..self.sizes.len).step_by(ROWS) {
                let rows = ROWS.min(self.sizes.len - first);
                let mut tile = self.pack_queries(s, head, first, rows);
                self.score(s, &tile);
                self.softmax(s, largest, &mut tile);
                self.multiply(s);
                self.store(s, (head, first, rows), largest, &tile);
            }
        }
    }
}

impl<'a> Head<'a> {
    /// Part `part` (of a head's columns) of a row.
    #[inline(always)]
    fn row(&self, row: usize, part: usize) -> &'a [f32] {
        let cols = self.heads.qkv_cols();
        &self.rows[row * cols + part * self.sizes.d..][..self.sizes.d]
    }

    #[inline(always)]
    fn pack_keys<S: Simd>(&mut self, s: S) {
        let Sizes { len, steps, .. } = self.sizes;
        self.scratch.keys[len / BLOCK * BLOCK * steps..].fill(0);
        self.scratch.key_steps.fill(0.0);
        for key in 0..len {
            let x = self.row(key, self.heads.heads + self.kv_head);
            let step = step_of(s, x);
            let at = key / BLOCK * BLOCK * steps + key % BLOCK;
            // SAFETY: the last element, at + (steps - 1) * BLOCK, is in the key's block.
            unsafe {
                let out = self.scratch.keys.as_mut_ptr().add(at);
                Q8::<Vnni>::pack_row(s, x, step, steps, out, BLOCK);
            }
            self.scratch.key_steps[key] = step.scale;
        }
        for codes in self.scratch.keys.iter_mut() {
            *codes ^= 0x8080_8080;
        }
    }

    /// Returns the largest step of a row of values; NaN if one is.
    #[inline(always)]
    fn pack_values<S: Simd>(&mut self, s: S) -> f32 {
        let Sizes {
            len,
            steps,
            columns,
            ..
        } = self.sizes;
        self.scratch.value_steps.fill(0.0);
        let (mut largest, each) = (0.0f32, columns / 4);
        let part = self.heads.heads + self.heads.kv_heads + self.kv_head;
        for four in 0..self.sizes.fours() {
            self.scratch.four.fill(0);
            for row in 4 * four..len.min(4 * four + 4) {
                let x = self.row(row, part);
                let step = step_of(s, x);
                // SAFETY: `steps` elements fit into a quarter of the four rows' room.
                unsafe {
                    let out = self.scratch.four.as_mut_ptr().add(row % 4 * each);
                    Q8::<Vnni>::pack_row(s, x, step, steps, out, 1);
                }
                self.scratch.value_steps[row] = step.scale;
                if step.scale > largest || step.scale.is_nan() {
                    largest = step.scale;
                }
            }
            let codes: &[u8] = bytemuck::cast_slice(self.scratch.four);
            let out = &mut self.scratch.values[four * columns..(four + 1) * columns];
            for (column, out) in out.iter_mut().enumerate() {
                let code = |row: usize| codes[row * columns + column];
                *out = u32::from_le_bytes([code(0), code(1), code(2), code(3)]);
            }
        }
        largest
    }

    #[inline(always)]
    fn pack_queries<S: Simd>(&mut self, s: S, head: usize, first: usize, rows: usize) -> Tile {
        let mut tile = Tile {
            starts: [0; ROWS],
            steps: [0.0; ROWS],
            totals: [0.0; ROWS],
        };
        self.scratch.queries.fill(0);
        for row in 0..rows {
            let x = self.row(first + row, head);
            let step = step_of(s, x);
            // SAFETY: the last element, row + (steps - 1) * ROWS, is in the tile.
            tile.starts[row] = unsafe {
                let out = self.scratch.queries.as_mut_ptr().add(row);
                Q8::<Vnni>::pack_row(s, x, step, self.sizes.steps, out, ROWS)
            };
            tile.steps[row] = step.scale * self.scale;
        }
        tile
    }

    /// Scores of the tile's rows, those of keys beyond the last -∞.
    #[inline(always)]
    fn score<S: Simd>(&mut self, s: S, tile: &Tile) {
        let Sizes {
            len, keys, steps, ..
        } = self.sizes;
        for first in (0..keys).step_by(BLOCK) {
            let mut acc = tile.starts.map(|start| [s.splat_i(start); WIDE]);
            let a = &self.scratch.queries;
            let b = &self.scratch.keys[first * steps..(first + BLOCK) * steps];
            // SAFETY: `steps` steps of ROWS queries and of BLOCK keys; inside launch_vnni.
            unsafe {
                let (a, b) = ((a.as_ptr(), 1, ROWS), (b.as_ptr(), BLOCK));
                products::<S, WIDE, false>(s, &mut acc, a, b, steps);
            }
            for (row, acc) in acc.iter().enumerate() {
                let step = s.splat(tile.steps[row]);
                for (v, acc) in acc.iter().enumerate() {
                    let at = first + v * S::LANES;
                    let live = len.saturating_sub(at).min(S::LANES);
                    // SAFETY: a register's keys.
                    unsafe {
                        let key_steps = s.load(self.scratch.key_steps.as_ptr().add(at));
                        let mut score = s.mul(s.mul(s.to_float(*acc), step), key_steps);
                        if live < S::LANES {
                            score = s.keep(score, 0, live, s.splat(f32::NEG_INFINITY));
                        }
                        s.store(self.scratch.scores.as_mut_ptr().add(row * keys + at), score);
                    }
                }
            }
        }
    }

    /// Scores to bytes of probabilities, and their sums.
    #[inline(always)]
    fn softmax<S: Simd>(&mut self, s: S, largest: f32, tile: &mut Tile) {
        let keys = self.sizes.keys;
        let unit = s.splat(inverse(largest));
        let round = s.splat(ROUND);
        let (high, low) = (
            bytemuck::cast_slice_mut::<u32, u8>(self.scratch.high),
            bytemuck::cast_slice_mut::<u32, u8>(self.scratch.low),
        );
        for (row, scores) in self.scratch.scores.chunks_exact(keys).enumerate() {
            let mut max = s.splat(f32::NEG_INFINITY);
            for part in scores.chunks_exact(S::LANES) {
                // SAFETY: a register's scores.
                max = s.max(unsafe { s.load(part.as_ptr()) }, max);
            }
            let max = s.splat(s.largest(max));
            let mut total = s.splat(0.0);
            for at in (0..keys).step_by(S::LANES) {
                // SAFETY: a register's scores and steps, and as many bytes of each kind.
                unsafe {
                    let probability = s.exp(s.sub(s.load(scores.as_ptr().add(at)), max));
                    total = s.add(total, probability);
                    let step = s.load(self.scratch.value_steps.as_ptr().add(at));
                    let whole = s.mul(s.mul(probability, step), unit);
                    let bits = s.ints(s.add(whole, round));
                    let place = row * keys + at;
                    s.store_low_bytes(high.as_mut_ptr().add(place), s.right16::<8>(bits));
                    s.store_low_bytes(low.as_mut_ptr().add(place), bits);
                }
            }
            tile.totals[row] = s.sum(total);
        }
    }

    /// Probabilities times values, in units of the largest step / [`MOST`].
    #[inline(always)]
    fn multiply<S: Simd>(&mut self, s: S) {
        let (columns, lanes) = (self.sizes.columns, S::LANES);
        let mut column = 0;
        while column + WIDE * lanes <= columns {
            self.multiply_part::<S, WIDE>(s, column);
            column += WIDE * lanes;
        }
        while column < columns {
            self.multiply_part::<S, 1>(s, column);
            column += lanes;
        }
    }

    #[inline(always)]
    fn multiply_part<S: Simd, const V: usize>(&mut self, s: S, column: usize) {
        let (fours, columns) = (self.sizes.fours(), self.sizes.columns);
        let b = (self.scratch.values[column..].as_ptr(), columns);
        for (pass, bytes) in [&self.scratch.high, &self.scratch.low]
            .into_iter()
            .enumerate()
        {
            let mut acc = [[s.splat_i(0); V]; ROWS];
            // SAFETY: `fours` elements of ROWS rows and of the columns' values; inside launch_vnni.
            unsafe { products::<S, V, true>(s, &mut acc, (bytes.as_ptr(), fours, 1), b, fours) };
            for (row, acc) in acc.iter().enumerate() {
                for (v, acc) in acc.iter().enumerate() {
                    let at = row * columns + column + v * S::LANES;
                    // SAFETY: a register's columns.
                    unsafe {
                        let place = self.scratch.sums.as_mut_ptr().add(at);
                        let sum = s.to_float(*acc);
                        let sum = match pass {
                            0 => sum,
                            _ => s.fma(s.load(place), s.splat(256.0), sum),
                        };
                        s.store(place, sum);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn store<S: Simd>(
        &self,
        s: S,
        (head, first, rows): (usize, usize, usize),
        largest: f32,
        tile: &Tile,
    ) {
        let Sizes { d, columns, .. } = self.sizes;
        for row in 0..rows {
            let at = (self.first_row + first + row) * self.heads.heads * d + head * d;
            let factor = s.splat(largest / MOST / tile.totals[row]);
            for column in (0..d).step_by(S::LANES) {
                // SAFETY: a register's columns, of which those that the head has are written to its
                // part of the result, which is nobody else's.
                unsafe {
                    let sums = s.load(self.scratch.sums.as_ptr().add(row * columns + column));
                    let live = S::LANES.min(d - column);
                    s.store_part(self.out.at(at + column), s.mul(sums, factor), live);
                }
            }
        }
    }
}

/// Integers per probability times step.
fn inverse(largest: f32) -> f32 {
    let inverse = MOST / largest;
    if inverse == f32::INFINITY {
        0.0
    } else {
        inverse
    }
}

/// Adds the products of ROWS rows and V registers of columns over `steps` elements of four bytes: a's
/// rows and steps are so far apart, b's steps so far. The unsigned side is a's if `LEFT`, else b's.
///
/// # Safety
/// All elements can be read; inside `launch_vnni` only.
#[inline(always)]
unsafe fn products<S: Simd, const V: usize, const LEFT: bool>(
    s: S,
    acc: &mut [[S::I; V]; ROWS],
    (a, a_row, a_step): (*const u32, usize, usize),
    (b, b_step): (*const u32, usize),
    steps: usize,
) {
    for step in 0..steps {
        let mut columns = [s.splat_i(0); V];
        for (v, columns) in columns.iter_mut().enumerate() {
            // SAFETY: the caller's contract.
            *columns = unsafe { s.load_i(b.add(step * b_step + v * S::LANES).cast()) };
        }
        for (row, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the caller's contract.
            let left = s.splat_i(unsafe { *a.add(row * a_row + step * a_step) } as i32);
            for (acc, columns) in acc.iter_mut().zip(columns) {
                // SAFETY: the caller's contract.
                *acc = unsafe {
                    match LEFT {
                        true => s.dot_bytes(*acc, left, columns),
                        false => s.dot_bytes(*acc, columns, left),
                    }
                };
            }
        }
    }
}
