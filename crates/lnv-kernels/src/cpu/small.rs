//! Products of a few rows with a block that is used once or a few times: nothing is packed.
//!
//! Decision: six rows times four registers of columns (two with AVX2) have their sums in registers;
//! rows are split evenly. Each sum is one ascending chain, whatever the tile.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

use crate::cpu::simd::Simd;

/// `a` `[rows, depth]` times `b` `[depth, cols]` to c `[rows, cols]`, each row at its stride.
pub(crate) struct Small<'a> {
    pub(crate) a: &'a [f32],
    pub(crate) a_stride: usize,
    pub(crate) b: &'a [f32],
    pub(crate) b_stride: usize,
    pub(crate) depth: usize,
    pub(crate) cols: usize,
    pub(crate) c_stride: usize,
    /// What is read next: fetched while the first rows are multiplied.
    pub(crate) next: &'a [f32],
}

/// Rows whose sums are in registers at once.
const ROWS: usize = 6;

/// `c = a·b`, or `c[row] = c[row] * keep[row] + a·b`.
#[inline(always)]
pub(crate) fn small_product<S: Simd>(
    s: S,
    p: &Small<'_>,
    rows: usize,
    keep: Option<&[f32]>,
    c: &mut [f32],
) {
    assert!(c.len() == rows * p.c_stride && keep.is_none_or(|keep| keep.len() == rows));
    assert!(p.depth > 0 && p.a.len() >= (rows - 1) * p.a_stride + p.depth);
    assert!(
        p.cols <= p.c_stride
            && p.cols <= p.b_stride
            && p.b.len() >= (p.depth - 1) * p.b_stride + p.cols
    );
    let groups = rows.div_ceil(ROWS);
    for group in 0..groups {
        let (start, end) = (group * rows / groups, (group + 1) * rows / groups);
        let next = if group == 0 { p.next } else { &[] };
        let p = Small {
            a: &p.a[start * p.a_stride..],
            next,
            ..*p
        };
        let keep = keep.map(|keep| &keep[start..end]);
        let c = &mut c[start * p.c_stride..end * p.c_stride];
        match end - start {
            1 => row_group::<S, 1>(s, &p, keep, c),
            2 => row_group::<S, 2>(s, &p, keep, c),
            3 => row_group::<S, 3>(s, &p, keep, c),
            4 => row_group::<S, 4>(s, &p, keep, c),
            5 => row_group::<S, 5>(s, &p, keep, c),
            _ => row_group::<S, 6>(s, &p, keep, c),
        }
    }
}

/// All columns of some rows.
#[inline(always)]
fn row_group<S: Simd, const R: usize>(s: S, p: &Small<'_>, keep: Option<&[f32]>, c: &mut [f32]) {
    let wide = if S::LANES == 16 {
        4 * S::LANES
    } else {
        2 * S::LANES
    };
    let mut column = 0;
    while column + wide <= p.cols {
        if S::LANES == 16 {
            columns::<S, R, 4>(s, p, (column, S::LANES), keep, c);
        } else {
            columns::<S, R, 2>(s, p, (column, S::LANES), keep, c);
        }
        column += wide;
    }
    while column < p.cols {
        columns::<S, R, 1>(s, p, (column, S::LANES.min(p.cols - column)), keep, c);
        column += S::LANES;
    }
}

/// V registers of columns of R rows, from column `first` on; the last register has `live` columns.
#[inline(always)]
fn columns<S: Simd, const R: usize, const V: usize>(
    s: S,
    p: &Small<'_>,
    (first, live): (usize, usize),
    keep: Option<&[f32]>,
    c: &mut [f32],
) {
    let mut acc = [[s.splat(0.0); V]; R];
    let part = |v: usize| if v + 1 == V { live } else { S::LANES };
    if let Some(keep) = keep {
        for (row, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                // SAFETY: row_group keeps the columns inside c's rows.
                let c = unsafe { c.as_ptr().add(row * p.c_stride + first + v * S::LANES) };
                // SAFETY: as above.
                *acc = s.mul(unsafe { s.load_part(c, part(v)) }, s.splat(keep[row]));
            }
        }
    }
    let ahead = !p.next.is_empty();
    for step in 0..p.depth {
        if ahead {
            // As many bytes as this step reads: by the end of b, as many of what is next.
            let at = first * p.depth + step * V * S::LANES;
            prefetch(p.next.as_ptr().wrapping_add(at), V * S::LANES);
        }
        // SAFETY: small_product checked a and b against depth, strides and columns.
        let (a, b) = unsafe {
            (
                p.a.as_ptr().add(step),
                p.b.as_ptr().add(step * p.b_stride + first),
            )
        };
        let mut row_of_b = [s.splat(0.0); V];
        for (v, b_part) in row_of_b.iter_mut().enumerate() {
            // SAFETY: as above.
            *b_part = unsafe {
                let b = b.add(v * S::LANES);
                if V == 1 {
                    s.load_part(b, live)
                } else {
                    s.load(b)
                }
            };
        }
        for (row, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as above.
            let a = s.splat(unsafe { *a.add(row * p.a_stride) });
            for (acc, b) in acc.iter_mut().zip(row_of_b) {
                *acc = s.fma(a, b, *acc);
            }
        }
    }
    for (row, acc) in acc.iter().enumerate() {
        for (v, acc) in acc.iter().enumerate() {
            // SAFETY: row_group keeps the columns inside c's rows.
            unsafe {
                let c = c.as_mut_ptr().add(row * p.c_stride + first + v * S::LANES);
                s.store_part(c, *acc, part(v));
            }
        }
    }
}

/// Fetches the lines of so many values into the second-level cache. Touches nothing.
#[inline(always)]
fn prefetch(at: *const f32, values: usize) {
    for line in (0..values).step_by(16) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(line).cast()) };
    }
}
