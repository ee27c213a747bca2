//! The number formats of bitsandbytes: floats to codes and back, bit for bit as its CPU backend does
//! it (checked against 0.50.2).
//!
//! Decision: plain functions over slices, for checkpoints that come quantised and for those that are
//! written. Three formats: 4-bit codes of a table with one absmax for each block of values (NF4, FP4),
//! the same with the absmax itself in 8 bits ("double quantisation"), and LLM.int8() rows. Each
//! follows the original operation by operation, oddities included, because a code that differs is a
//! different weight: full blocks are multiplied by `1 / absmax`, a last short one is divided; a value
//! on the midpoint of two codes takes the lower; FP4 gives the smallest positive values the code 8,
//! which stands for zero; NaN takes the highest code. The 8-bit code is looked up after rounding to
//! one of 65536 places, so that zero itself becomes 1.5e-5.
//!
//! One thing is not theirs: the mean that double quantisation subtracts is summed in f64, where theirs
//! depends on the number of threads, so that its last bit may differ. It is stored beside the codes.

use std::sync::OnceLock;

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// A table of 16 values that 4-bit codes stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code4 {
    /// Quantiles of the normal distribution.
    Nf4,
    /// Floats of 4 bits: sign, two bits of exponent, one of mantissa.
    Fp4,
}

/// The values of NF4's codes.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The values of FP4's codes; code 8 stands for zero as code 0 does.
pub const FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    0.5,
    2.0 / 12.0,
    0.25,
    0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -0.5,
    -2.0 / 12.0,
    -0.25,
];

/// FP4's codes in the order of their values, zero twice.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

impl Code4 {
    /// The values of the codes.
    pub fn table(self) -> &'static [f32; 16] {
        match self {
            Code4::Nf4 => &NF4,
            Code4::Fp4 => &FP4,
        }
    }

    /// The code of the value of this rank.
    fn ranked(self, rank: usize) -> u8 {
        match self {
            Code4::Nf4 => rank as u8,
            Code4::Fp4 => FP4_ORDER[rank],
        }
    }

    /// The midpoints between neighbouring values.
    fn bounds(self) -> [f32; 15] {
        let value = |rank: usize| self.table()[usize::from(self.ranked(rank))];
        std::array::from_fn(|rank| (value(rank) + value(rank + 1)) / 2.0)
    }
}

/// What a block without a magnitude is divided by, at least.
const TINY: f32 = 1e-38;
/// Values of a block of an absmax in 8 bits.
pub const NESTED_BLOCK: usize = 256;

/// 4-bit codes, two in a byte (the first in the high half), and the largest magnitude of each block
/// of values. An odd number of values is filled up with a zero.
///
/// # Panics
/// The block is odd or 0: a bug of the caller.
pub fn quantize_4bit(values: &[f32], block: usize, code: Code4) -> (Vec<u8>, Vec<f32>) {
    assert!(block > 0 && block.is_multiple_of(2), "a block of {block}");
    let bounds = code.bounds();
    let mut codes = vec![0; values.len().div_ceil(2)];
    let mut absmax = vec![0.0; values.len().div_ceil(block)];
    let blocks = codes
        .par_chunks_mut(block / 2)
        .zip(values.par_chunks(block))
        .zip(&mut absmax);
    blocks
        .with_min_len(64)
        .for_each(|((codes, values), absmax)| {
            let largest = magnitude(values);
            let floor = if largest < TINY { TINY } else { largest };
            let whole = values.len() == block;
            *absmax = if whole { largest } else { floor };
            let inverse = 1.0 / floor;
            for (codes, values) in codes.chunks_mut(CHUNK / 2).zip(values.chunks(CHUNK)) {
                let mut scaled = [0.0; CHUNK];
                for (scaled, value) in scaled.iter_mut().zip(values) {
                    *scaled = if whole {
                        value * inverse
                    } else {
                        value / floor
                    };
                }
                let ranks = ranks(&bounds, &scaled);
                for (byte, pair) in codes.iter_mut().zip(ranks.chunks_exact(2)) {
                    let nibble = |rank: u32| code.ranked(rank as usize);
                    *byte = nibble(pair[0]) << 4 | nibble(pair[1]);
                }
            }
        });
    (codes, absmax)
}

/// Values whose ranks are found at a time, without branches, so that compilers use registers.
const CHUNK: usize = 64;

/// The ranks of the nearest values of a table with these midpoints; the highest for NaN. (Values need
/// no clamp to -1 to 1: beyond the last midpoints nothing changes.)
fn ranks(bounds: &[f32; 15], values: &[f32; CHUNK]) -> [u32; CHUNK] {
    let mut ranks = [0; CHUNK];
    let values = values.map(|v| if v.is_nan() { f32::INFINITY } else { v });
    for bound in bounds {
        for (rank, value) in ranks.iter_mut().zip(&values) {
            *rank += u32::from(value > bound);
        }
    }
    ranks
}

/// The largest magnitude, NaN above all.
fn magnitude(values: &[f32]) -> f32 {
    let bits = values.iter().map(|value| value.to_bits() & 0x7fff_ffff);
    f32::from_bits(bits.max().unwrap_or(0))
}

/// The first `n` values of 4-bit codes: code times absmax.
///
/// # Panics
/// There are fewer than `n` codes, or fewer than one absmax for each block: a bug of the caller.
pub fn dequantize_4bit(
    codes: &[u8],
    absmax: &[f32],
    block: usize,
    code: Code4,
    n: usize,
) -> Vec<f32> {
    assert!(block > 0 && block.is_multiple_of(2), "a block of {block}");
    assert!(
        codes.len() >= n.div_ceil(2),
        "{} bytes for {n} codes",
        codes.len()
    );
    assert!(
        absmax.len() >= n.div_ceil(block),
        "{} absmax for {n} codes",
        absmax.len()
    );
    let (table, mut values) = (code.table(), vec![0.0; n]);
    let blocks = values
        .par_chunks_mut(block)
        .zip(codes.par_chunks(block / 2))
        .zip(absmax);
    blocks
        .with_min_len(64)
        .for_each(|((values, codes), absmax)| {
            for (pair, byte) in values.chunks_mut(2).zip(codes) {
                for (value, code) in pair.iter_mut().zip([byte >> 4, byte & 15]) {
                    *value = table[usize::from(code)] * absmax;
                }
            }
        });
    values
}

/// The absmax of 4-bit weights in 8 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Nested {
    /// A code for each absmax.
    pub codes: Vec<u8>,
    /// The largest magnitude of each [`NESTED_BLOCK`] of them, less the offset.
    pub absmax: Vec<f32>,
    /// What the codes stand for.
    pub map: [f32; 256],
    /// Their mean.
    pub offset: f32,
}

/// Double quantisation of the absmax of 4-bit weights.
pub fn quantize_absmax(absmax: &[f32]) -> Nested {
    let sum: f64 = absmax.iter().map(|value| f64::from(*value)).sum();
    let offset = (sum / absmax.len().max(1) as f64) as f32;
    let (mut codes, mut peaks) = (Vec::with_capacity(absmax.len()), Vec::new());
    for block in absmax.chunks(NESTED_BLOCK) {
        let values = block.iter().map(|value| value - offset);
        let peak = values.clone().fold(0.0, |peak: f32, v| peak.max(v.abs())); // passes over NaN
        peaks.push(peak);
        let inverse = 1.0 / peak;
        codes.extend(values.map(|value| {
            if peak == 0.0 {
                0
            } else {
                nearest_8bit(value * inverse)
            }
        }));
    }
    Nested {
        codes,
        absmax: peaks,
        map: dynamic_map(),
        offset,
    }
}

/// The absmax of 4-bit weights from its 8-bit form.
///
/// # Panics
/// There are fewer peaks than blocks of codes: a bug of the caller.
pub fn dequantize_absmax(
    codes: &[u8],
    absmax: &[f32],
    map: &[f32; 256],
    offset: f32,
    block: usize,
) -> Vec<f32> {
    assert!(
        block > 0 && absmax.len() >= codes.len().div_ceil(block),
        "{} peaks",
        absmax.len()
    );
    let blocks = codes.chunks(block).zip(absmax);
    let values = blocks
        .flat_map(|(codes, peak)| codes.iter().map(move |code| map[usize::from(*code)] * peak));
    values.map(|value| value + offset).collect()
}

/// The 256 values of the 8-bit "dynamic" codes: seven decades, the higher the finer, both signs, zero
/// and 1, in ascending order.
pub fn dynamic_map() -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for (decade, scale) in [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0f32]
        .into_iter()
        .enumerate()
    {
        let steps = 1usize << decade;
        let step = (1.0 - 0.1f32) / steps as f32;
        let bound = |i: usize| {
            if 2 * i < steps + 1 {
                step.mul_add(i as f32, 0.1)
            } else {
                step.mul_add(-((steps - i) as f32), 1.0)
            }
        };
        for i in 0..steps {
            let value = scale * ((bound(i) + bound(i + 1)) / 2.0);
            values.extend([value, -value]);
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
}

/// Places between -1 and 1 of which each has its code.
const PLACES: usize = 1 << 16;

/// The 8-bit code of a value between -1 and 1; 0 for NaN.
fn nearest_8bit(value: f32) -> u8 {
    static CODES: OnceLock<Vec<u8>> = OnceLock::new();
    let codes = CODES.get_or_init(|| {
        let map = dynamic_map();
        let code = |place: usize| {
            let value = place as f32 / (PLACES - 1) as f32 * 2.0 - 1.0;
            let above = map.partition_point(|v| *v < value).clamp(1, 255);
            let closer = map[above] - value < (value - map[above - 1]).abs();
            if closer {
                above as u8
            } else {
                (above - 1) as u8
            }
        };
        (0..PLACES).map(code).collect()
    });
    let place = (value.clamp(-1.0, 1.0) + 1.0) * 0.5 * (PLACES - 1) as f32 + 0.5;
    codes[place as usize]
}

/// LLM.int8(): the codes of rows of `k` values (signed bytes), and the largest magnitude of each row.
/// Values are rounded to f16 first. A row with infinity, NaN or nothing but zeros has codes of zero.
pub fn quantize_int8(values: &[f32], k: usize) -> (Vec<u8>, Vec<f32>) {
    let rows = values.len() / k.max(1);
    let (mut codes, mut scb) = (vec![0; rows * k], vec![0.0; rows]);
    let rows = codes
        .par_chunks_mut(k.max(1))
        .zip(values.par_chunks(k.max(1)))
        .zip(&mut scb);
    rows.for_each(|((codes, values), scb)| *scb = quantize_int8_row(values, codes));
    (codes, scb)
}

/// One row of [`quantize_int8`]; returns the largest magnitude.
pub(crate) fn quantize_int8_row(values: &[f32], codes: &mut [u8]) -> f32 {
    let mut halves = vec![f16::ZERO; values.len()];
    halves.convert_from_f32_slice(values);
    // As integers, magnitudes of f16 are ordered too, NaN above all.
    let largest = halves.iter().map(|half| half.to_bits() & 0x7fff).max();
    let largest = f16::from_bits(largest.unwrap_or(0)).to_f32();
    let codes_per_value = 127.0 / largest;
    let mut chunk = [0.0; CHUNK];
    for (codes, halves) in codes.chunks_mut(CHUNK).zip(halves.chunks(CHUNK)) {
        let values = &mut chunk[..halves.len()];
        halves.convert_to_f32_slice(values);
        for (code, value) in codes.iter_mut().zip(values) {
            // The sum's last bit stands for 1, so its lowest byte is the code, rounded to the
            // nearest, ties to even. That of a NaN that arises here, or was an f16, is 0.
            *code = (*value * codes_per_value + 12_582_912.0).to_bits() as u8;
        }
    }
    largest
}

/// What 1/127 is in bitsandbytes.
pub(crate) const INT8_STEP: f32 = 1.0 / 127.0;

/// The values of LLM.int8() codes of rows of `k`.
///
/// # Panics
/// There are fewer scales than rows: a bug of the caller.
pub fn dequantize_int8(codes: &[u8], scb: &[f32], k: usize) -> Vec<f32> {
    assert!(scb.len() * k >= codes.len(), "{} scales", scb.len());
    let rows = codes.chunks(k.max(1)).zip(scb);
    let values = rows.flat_map(|(codes, scb)| {
        codes
            .iter()
            .map(move |code| f32::from(*code as i8) * scb * INT8_STEP)
    });
    values.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What bitsandbytes 0.50.2 made of the same values, as a hash (FNV-1a) of its bytes.
    fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, step)
    }

    /// The hash of floats, with 7 for NaN and one zero.
    fn hash_floats(values: &[f32]) -> u64 {
        let plain = |v: &f32| if v.is_nan() { 7.0 } else { *v + 0.0 };
        hash(values.iter().flat_map(|v| plain(v).to_le_bytes()))
    }

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(next).collect()
    }

    /// An odd number of values, among them zeros, next to nothing, NaN and infinity.
    fn values() -> Vec<f32> {
        let mut values: Vec<f32> = noise(64 * 500 + 37, 7).iter().map(|v| v * v * v).collect();
        values[64..128].fill(0.0);
        values[128..192].iter_mut().for_each(|v| *v *= 1e-36);
        values[300] = f32::NAN;
        values[400] = f32::INFINITY;
        values[2000..2064].fill(1e-41);
        values
    }

    #[test]
    fn four_bits_are_those_of_bitsandbytes() {
        let values = values();
        let (absmax_64, absmax_128) = (0xb653_3f97_0dfb_e54e, 0x9309_53c0_cefe_a730);
        for (block, code, codes_hash, absmax_hash, back) in [
            (
                64,
                Code4::Nf4,
                0x48b0_23a6_6375_7bf5,
                absmax_64,
                0xb1ab_6e64_18ff_0559,
            ),
            (
                64,
                Code4::Fp4,
                0xad57_76a0_4fb1_af79,
                absmax_64,
                0xf004_1e0e_95be_7324,
            ),
            (
                128,
                Code4::Nf4,
                0x69dd_1048_d14c_3ad2,
                absmax_128,
                0xa00d_9f86_8098_3d0e,
            ),
            (
                128,
                Code4::Fp4,
                0x5daa_c1c5_e79c_57ee,
                absmax_128,
                0xe212_ac63_e3f3_9828,
            ),
        ] {
            let what = format!("{code:?} {block}");
            let (codes, absmax) = quantize_4bit(&values, block, code);
            assert_eq!(hash(codes.iter().copied()), codes_hash, "{what}");
            assert_eq!(hash_floats(&absmax), absmax_hash, "{what}");
            let found = dequantize_4bit(&codes, &absmax, block, code, values.len());
            assert_eq!(hash_floats(&found), back, "{what}");
        }
    }

    #[test]
    fn a_midpoint_takes_the_lower_code_and_the_first_of_a_pair_the_high_half() {
        let midpoint = f32::midpoint(NF4[7], NF4[8]);
        let values = [1.0, midpoint, midpoint.next_up(), -1.0, 0.0, 0.5];
        let mut block = [0.0; 64];
        block[..6].copy_from_slice(&values);
        let (codes, absmax) = quantize_4bit(&block, 64, Code4::Nf4);
        assert_eq!(
            (codes[..4].to_vec(), absmax),
            (vec![0xf7, 0x80, 0x7c, 0x77], vec![1.0])
        );
        block[..6].copy_from_slice(&[1.0, 0.001, -0.001, 0.0, 0.25, -0.6]);
        let (codes, _) = quantize_4bit(&block, 64, Code4::Fp4);
        assert_eq!(codes[..4], [0x38, 0x00, 0x7a, 0x00]);
        let (codes, absmax) = quantize_4bit(&[], 64, Code4::Nf4);
        assert!(codes.is_empty() && absmax.is_empty());
    }

    #[test]
    fn tables_are_those_of_bitsandbytes() {
        assert_eq!(
            NF4[1].to_bits(),
            (-0.696_192_800_998_687_7_f64 as f32).to_bits()
        );
        assert_eq!(FP4[..4], [0.0, 0.005_208_333_5, 0.666_666_7, 1.0]);
        let map = dynamic_map();
        assert_eq!(
            (map[0], map[1], map[254], map[255]),
            (-0.992_968_74, -0.978_906_3, 0.992_968_74, 1.0)
        );
        assert_eq!(hash_floats(&map), 0xd677_f22a_9666_5bc4);
        let middle = [-7.75e-6, -3.25e-6, -5.5e-7, 0.0, 5.5e-7, 3.25e-6, 7.75e-6];
        for (found, expected) in map[124..131].iter().zip(middle) {
            assert!((found - expected).abs() < 1e-12, "{found} for {expected}");
        }
    }

    #[test]
    fn double_quantisation_is_that_of_bitsandbytes() {
        let absmax: Vec<f32> = noise(1000, 3).iter().map(|v| v.abs() * 0.3).collect();
        let nested = quantize_absmax(&absmax);
        assert_eq!(nested.offset.to_bits(), 1_041_827_643);
        assert_eq!(hash(nested.codes.iter().copied()), 0xe5f3_a2f4_ea82_f234);
        assert_eq!(hash_floats(&nested.absmax), 0x2696_05ce_46e2_77a1);
        let Nested {
            codes,
            absmax,
            map,
            offset,
        } = &nested;
        let back = dequantize_absmax(codes, absmax, map, *offset, NESTED_BLOCK);
        assert_eq!(hash_floats(&back), 0xf81c_1a4d_29d0_6ce6);
        let same = quantize_absmax(&[0.25; 3]);
        assert_eq!(
            (same.codes, same.absmax, same.offset),
            (vec![0; 3], vec![0.0], 0.25)
        );
    }

    #[test]
    fn int8_rows_are_those_of_bitsandbytes() {
        let mut values: Vec<f32> = noise(600, 11).iter().map(|v| v * 3.0).collect();
        values[200..300].fill(0.0);
        values[405] = 1e6;
        values[503] = f32::NAN;
        let (codes, scb) = quantize_int8(&values, 100);
        assert_eq!(hash(codes.iter().copied()), 0xeec8_1667_3997_5def);
        assert_eq!(
            scb[..5],
            [2.968_75, 2.996_093_8, 0.0, 2.982_421_9, f32::INFINITY]
        );
        assert!(scb[5].is_nan());
        let back = dequantize_int8(&codes[..400], &scb[..4], 100);
        assert_eq!(hash_floats(&back), 0xbc58_1431_f5f3_36d0);
    }
}
