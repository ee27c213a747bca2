//! Packing of weights whose values need no arithmetic: a transposition of 32-bit units.
//!
//! Decision: 16 x 16 units at a time in AVX-512 registers, written past the caches. Packing reads
//! every weight once while a model loads, so it is bound by memory, and scalar code reaches a quarter
//! of that (2.6 against 11 GB/s a thread on Zen 4). Units are f32, pairs of bf16, or bf16 widened on
//! the way. Everything else, and what is left of k, stays with the scalar code of `weight.rs`.

use std::arch::x86_64::*;

use crate::isa::Isa;
use crate::weight::PANEL;

/// Values in a register, and rows and columns of a transposition.
const UNITS: usize = 16;

/// Packs rows of 32-bit units (f32, or pairs of bf16), as far as whole registers go; returns how many
/// units of each row. The rows have the same length; unit u of row r goes to `panel[u * PANEL + r]`.
pub(crate) fn pack_units(rows: &[&[u8]; PANEL], panel: &mut [u8]) -> usize {
    pack::<false>(rows, panel)
}

/// The same for bf16 values that become f32.
pub(crate) fn pack_widened(rows: &[&[u8]; PANEL], panel: &mut [u8]) -> usize {
    pack::<true>(rows, panel)
}

fn pack<const WIDEN: bool>(rows: &[&[u8]; PANEL], panel: &mut [u8]) -> usize {
    if !Isa::Avx512.is_available() {
        return 0;
    }
    let unit = if WIDEN { 2 } else { 4 };
    let units = rows[0].len() / unit / UNITS * UNITS;
    assert!(rows.iter().all(|row| row.len() == rows[0].len()));
    assert!(panel.len() >= units * PANEL * 4 && panel.as_ptr().align_offset(64) == 0);
    // SAFETY: the processor was asked.
    unsafe { pack_avx512::<WIDEN>(rows, units, panel) };
    units
}

/// # Panics
/// Never: `pack` checked the lengths and the alignment.
#[target_feature(enable = "avx512f")]
fn pack_avx512<const WIDEN: bool>(rows: &[&[u8]; PANEL], units: usize, panel: &mut [u8]) {
    for first in (0..units).step_by(UNITS) {
        for half in [0, UNITS] {
            let mut block = [_mm512_setzero_si512(); UNITS];
            for (register, row) in block.iter_mut().zip(&rows[half..]) {
                // SAFETY: units first..first + UNITS are inside the row.
                *register = unsafe { load::<WIDEN>(row, first) };
            }
            transpose(&mut block);
            for (unit, register) in block.into_iter().enumerate() {
                let at = ((first + unit) * PANEL + half) * 4;
                // SAFETY: inside the panel, and aligned: the panel is, and `at` is a multiple of 64.
                unsafe { _mm512_stream_si512(panel.as_mut_ptr().add(at).cast(), register) };
            }
        }
    }
    // Streamed stores are not ordered by the locks that hand the panel to other threads.
    _mm_sfence();
}

/// Sixteen units of a row.
///
/// # Safety
/// Units `first..first + UNITS` are inside the row.
#[target_feature(enable = "avx512f")]
unsafe fn load<const WIDEN: bool>(row: &[u8], first: usize) -> __m512i {
    if WIDEN {
        // SAFETY: the caller's contract.
        let values = unsafe { _mm256_loadu_si256(row.as_ptr().add(first * 2).cast()) };
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(values))
    } else {
        // SAFETY: the caller's contract.
        unsafe { _mm512_loadu_si512(row.as_ptr().add(first * 4).cast()) }
    }
}

/// Transposes 16 x 16 units.
#[target_feature(enable = "avx512f")]
fn transpose(rows: &mut [__m512i; UNITS]) {
    let mut pairs = *rows;
    for i in (0..UNITS).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Lane l of quads[4 g + j]: rows 4 g to 4 g + 3 of column 4 l + j.
    let mut quads = pairs;
    for i in (0..UNITS).step_by(4) {
        quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for j in 0..4 {
        let even_low = _mm512_shuffle_i32x4::<0x88>(quads[j], quads[4 + j]);
        let odd_low = _mm512_shuffle_i32x4::<0xdd>(quads[j], quads[4 + j]);
        let even_high = _mm512_shuffle_i32x4::<0x88>(quads[8 + j], quads[12 + j]);
        let odd_high = _mm512_shuffle_i32x4::<0xdd>(quads[8 + j], quads[12 + j]);
        rows[j] = _mm512_shuffle_i32x4::<0x88>(even_low, even_high);
        rows[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd_low, odd_high);
        rows[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even_low, even_high);
        rows[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd_low, odd_high);
    }
}
