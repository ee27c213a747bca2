//! Products of a few rows with a block of the cache that lies in pairs and is widened on the way.
//!
//! Decision: a pair of rows of the block is loaded once, widened in registers and multiplied with as many rows as
//! there are registers for; nothing of it is written. Up to [`ROWS`] rows this beats widening the block to memory
//! first, which is what more rows share. Each sum is the chain of [`small_product`](super::small::small_product), so
//! the bits are those too.

use crate::cpu::formats::fetch_line;
use crate::cpu::simd::Simd;

/// The most rows.
pub(crate) const ROWS: usize = 6;
/// Rows whose values of a pair have room in registers beside their sums.
const FEW: usize = 3;
/// How far ahead the block is fetched, in bytes.
const AHEAD: usize = 1 << 10;

/// The rows of a block, two at a time.
pub(crate) trait Pairs: Copy {
    /// Bytes of a column of a pair.
    const BYTES: usize;

    /// Where column `column` of a pair lies.
    fn place(self, pair: usize, column: usize) -> *const u8;

    /// Rows `2 * pair` and `2 * pair + 1` of a register of columns from `column` on, widened.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load<S: Simd>(self, s: S, pair: usize, column: usize) -> (S::F, S::F);
}

/// `a` `[rows, depth]`, each row at its stride, times `b` `[depth, cols]`.
pub(crate) struct Product<'a, P> {
    pub(crate) a: &'a [f32],
    pub(crate) a_stride: usize,
    pub(crate) b: P,
    pub(crate) depth: usize,
    pub(crate) cols: usize,
}

/// `c = a·b`, or `c[row] = c[row] * keep[row] + a·b`, for c `[rows, cols]`.
///
/// # Safety
/// Half of `depth`, rounded up, pairs of b can be read, with whole registers of columns.
#[inline(always)]
pub(crate) unsafe fn pairs_product<S: Simd, P: Pairs>(
    s: S,
    p: &Product<'_, P>,
    rows: usize,
    keep: Option<&[f32]>,
    c: &mut [f32],
) {
    assert!(c.len() == rows * p.cols && keep.is_none_or(|keep| keep.len() == rows));
    assert!(p.depth > 0 && p.a.len() >= (rows - 1) * p.a_stride + p.depth);
    let narrow = S::LANES == 8;
    // SAFETY: the caller's contract.
    unsafe {
        match rows {
            1 if narrow => all_columns::<S, P, 1, 8>(s, p, keep, c),
            1 => all_columns::<S, P, 1, 4>(s, p, keep, c),
            2 => all_columns::<S, P, 2, 4>(s, p, keep, c),
            FEW => all_columns::<S, P, FEW, 2>(s, p, keep, c),
            4 => all_columns::<S, P, 4, 2>(s, p, keep, c),
            5 => all_columns::<S, P, 5, 2>(s, p, keep, c),
            ROWS => all_columns::<S, P, ROWS, 2>(s, p, keep, c),
            rows => unreachable!("{rows} rows at once"),
        }
    }
}

/// R rows.
///
/// # Safety
/// As [`pairs_product`].
#[inline(always)]
unsafe fn all_columns<S: Simd, P: Pairs, const R: usize, const V: usize>(
    s: S,
    p: &Product<'_, P>,
    keep: Option<&[f32]>,
    c: &mut [f32],
) {
    let mut column = 0;
    // SAFETY: the caller's contract; columns below cols.
    unsafe {
        while column + V * S::LANES <= p.cols {
            columns::<S, P, R, V>(s, p, (column, S::LANES), keep, c);
            column += V * S::LANES;
        }
        while column < p.cols {
            let live = S::LANES.min(p.cols - column);
            columns::<S, P, R, 1>(s, p, (column, live), keep, c);
            column += S::LANES;
        }
    }
}

/// V registers of columns of R rows, from column `first` on; the last register has `live` columns.
///
/// # Safety
/// As [`pairs_product`], which checked a and c.
#[inline(always)]
unsafe fn columns<S: Simd, P: Pairs, const R: usize, const V: usize>(
    s: S,
    p: &Product<'_, P>,
    (first, live): (usize, usize),
    keep: Option<&[f32]>,
    c: &mut [f32],
) {
    let mut acc = [[s.splat(0.0); V]; R];
    let part = |v: usize| if v + 1 == V { live } else { S::LANES };
    if let Some(keep) = keep {
        for (row, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the columns are inside c's rows.
                let c = unsafe {
                    s.load_part(c.as_ptr().add(row * p.cols + first + v * S::LANES), part(v))
                };
                *acc = s.mul(c, s.splat(keep[row]));
            }
        }
    }
    // The values of a few rows stay in registers, or else those of the block.
    let at_once = if R <= FEW { 1 } else { V };
    for pair in 0..p.depth / 2 {
        for line in (0..V * S::LANES * P::BYTES).step_by(64) {
            fetch_line(p.b.place(pair, first).wrapping_add(AHEAD + line));
        }
        for from in (0..V).step_by(at_once) {
            let (mut even, mut odd) = ([s.splat(0.0); V], [s.splat(0.0); V]);
            for v in 0..at_once {
                let column = first + (from + v) * S::LANES;
                // SAFETY: the caller's contract.
                (even[v], odd[v]) = unsafe { p.b.load(s, pair, column) };
            }
            for (row, acc) in acc.iter_mut().enumerate() {
                // SAFETY: 2 * pair + 1 < depth.
                let [x, y] = unsafe {
                    let a = p.a.as_ptr().add(row * p.a_stride + 2 * pair);
                    *a.cast::<[f32; 2]>()
                };
                for (v, acc) in acc[from..from + at_once].iter_mut().enumerate() {
                    *acc = s.fma(s.splat(x), even[v], *acc);
                }
                for (v, acc) in acc[from..from + at_once].iter_mut().enumerate() {
                    *acc = s.fma(s.splat(y), odd[v], *acc);
                }
            }
        }
    }
    if p.depth % 2 == 1 {
        for v in 0..V {
            // SAFETY: the caller's contract.
            let (even, _) = unsafe { p.b.load(s, p.depth / 2, first + v * S::LANES) };
            for (row, acc) in acc.iter_mut().enumerate() {
                acc[v] = s.fma(s.splat(p.a[row * p.a_stride + p.depth - 1]), even, acc[v]);
            }
        }
    }
    for (row, acc) in acc.iter().enumerate() {
        for (v, acc) in acc.iter().enumerate() {
            // SAFETY: the columns are inside c's rows.
            unsafe {
                let c = c.as_mut_ptr().add(row * p.cols + first + v * S::LANES);
                s.store_part(c, *acc, part(v));
            }
        }
    }
}
