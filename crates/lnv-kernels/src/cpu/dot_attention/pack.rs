//! Rows of f32 into the pairs of bf16 that the dot product takes.
//!
//! Decision: 16 rows at a time become columns by a transposition in registers; values of two
//! neighbouring keys become pairs by a permutation. All that is rounded here is rounded by the
//! processor's own instruction: nearest, ties to even, subnormals to zero.

use crate::cpu::dot::{Dot, I, LANES};
use crate::kv_cache::{KV_BLOCK, Record};

/// How many rows ahead of those that are packed are fetched.
const AHEAD: usize = 2 * LANES;

/// 16 rows of `d` values, times `factor`, as columns: pair `i` of row `r` goes to
/// `out[i * stride + r]`.
///
/// # Safety
/// `d` values can be read from each row, and `out` has `(d + 1) / 2` rows of 16.
#[inline(always)]
pub(super) unsafe fn lanes(
    dot: Dot,
    rows: [*const f32; LANES],
    d: usize,
    factor: f32,
    (out, stride): (*mut u32, usize),
) {
    let factor = dot.splat(factor);
    for column in (0..d).step_by(2 * LANES) {
        let left = d - column;
        let mut pairs = [dot.splat_bits(0); LANES];
        for (pairs, row) in pairs.iter_mut().zip(rows) {
            // SAFETY: `left` values are left in the row.
            *pairs = unsafe { two(dot, row.add(column), left, factor) };
        }
        dot.transpose(&mut pairs);
        for (i, pairs) in pairs.iter().enumerate().take(left.div_ceil(2)) {
            // SAFETY: row column / 2 + i of out is one of (d + 1) / 2.
            unsafe { dot.store_bits(out.add((column / 2 + i) * stride), *pairs) };
        }
    }
}

/// A row of `d` values, times `factor`, as pairs.
///
/// # Safety
/// `d` values can be read from the row, and `(d + 1) / 2` rounded up to 16 written to `out`.
#[inline(always)]
pub(super) unsafe fn row(dot: Dot, row: *const f32, d: usize, factor: f32, out: *mut u32) {
    for column in (0..d).step_by(2 * LANES) {
        // SAFETY: d - column values are left in the row, and a register's room in out.
        unsafe {
            let pairs = two(dot, row.add(column), d - column, dot.splat(factor));
            dot.store_bits(out.add(column / 2), pairs);
        }
    }
}

/// The next 32 values, or as many as there are, times `factor`.
///
/// # Safety
/// `left` values can be read.
#[inline(always)]
unsafe fn two(dot: Dot, row: *const f32, left: usize, factor: crate::cpu::dot::F) -> I {
    // SAFETY: the caller's contract; the second address is only used if there are values.
    unsafe {
        let first = dot.load_part(row, left.min(LANES));
        let second = dot.load_part(
            row.wrapping_add(LANES),
            left.saturating_sub(LANES).min(LANES),
        );
        dot.round(dot.mul(first, factor), dot.mul(second, factor))
    }
}

/// The values of two neighbouring keys as pairs; without a second key, its are zero.
///
/// # Safety
/// `d` values can be read from each, and `d` rounded up to 16 written to `out`.
#[inline(always)]
pub(super) unsafe fn values(
    dot: Dot,
    first: *const f32,
    second: Option<*const f32>,
    d: usize,
    out: *mut u32,
) {
    for column in (0..d).step_by(LANES) {
        let n = LANES.min(d - column);
        // SAFETY: n values are left in each row, and a register's room in out.
        unsafe {
            let a = dot.load_part(first.add(column), n);
            let b = match second {
                Some(second) => dot.load_part(second.add(column), n),
                None => dot.splat(0.0),
            };
            dot.store_bits(out.add(column), dot.interleave(dot.round(a, b)));
        }
    }
}

/// Keys and values of `count` rows, which are `stride` values apart, as records of bf16, block after
/// block. What the last block has beyond them is unspecified but for the values' last pair.
///
/// # Safety
/// `count` rows can be read at `keys` and at `values`, and `count` rounded up to a block written to
/// `out`.
#[inline(always)]
pub(super) unsafe fn records(
    dot: Dot,
    form: Record,
    (keys, values_at, stride, count): (*const f32, *const f32, usize, usize),
    out: *mut u32,
) {
    for token in (0..count).step_by(LANES) {
        let (block, offset) = (token / KV_BLOCK, token % KV_BLOCK);
        for row in token + AHEAD..token + AHEAD + LANES {
            for column in (0..form.dim).step_by(LANES) {
                let at = row * stride + column;
                dot.prefetch(keys.wrapping_add(at).cast());
                dot.prefetch(values_at.wrapping_add(at).cast());
            }
        }
        // SAFETY: the rows are below count, the lanes and pairs inside block `block`.
        unsafe {
            let record = out.add(block * form.len());
            let rows = std::array::from_fn(|i| keys.add((token + i).min(count - 1) * stride));
            lanes(dot, rows, form.dim, 1.0, (record.add(offset), KV_BLOCK));
            let place = record.add(form.keys_len());
            for first in (token..count.min(token + LANES)).step_by(2) {
                let second = (first + 1 < count).then(|| values_at.add((first + 1) * stride));
                let pair = first % KV_BLOCK / 2 * form.columns();
                let first = values_at.add(first * stride);
                values(dot, first, second, form.dim, place.add(pair));
            }
        }
    }
}
