//! Packed weights.
//!
//! Decision: one resident copy of each weight, repacked once while loading into panels of
//! [`PANEL`] = 32 output columns (two AVX-512 registers), so that every kernel, from one row to a
//! thousand, reads the weight as one sequential stream. All panels have the same size and hold
//! everything that their columns need (scales too), so a weight is one stream of bytes: it can be
//! written to a file as it is and mapped back ([`Weight::packed_bytes`], [`Weight::from_packed`]).
//! The last panel is padded with zero columns. The order inside a panel is each format's own affair:
//! `float.rs`, `q8.rs`, `q4.rs`, `bnb4.rs`, `int8.rs`.
//!
//! Refused: keeping a second, row-major copy. A row (an embedding) is gathered out of its panel.

pub mod bnb;
pub(crate) mod bnb4;
#[cfg(feature = "cuda")]
mod device;
mod float;
pub(crate) mod int8;
mod packed;
pub(crate) mod q4;
pub(crate) mod q8;
pub(crate) mod rotate;

use std::cell::Cell;

use rayon::prelude::*;

pub use bnb4::{Bnb4, Compute};
pub use int8::Int8;
pub use packed::PackedBytes;

use crate::KernelError;
use crate::buffer::Aligned;

/// Output columns in a panel.
pub(crate) const PANEL: usize = 32;

/// How a weight is stored in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// 32-bit floats.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
    /// 8-bit integers with one f32 scale for each output. Weights and activations are rotated along
    /// k, so that no channel stands out, and activations rounded to 8-bit integers row by row. k at
    /// most 131072.
    Q8,
    /// 16 levels with an f16 scale for every 64 values of k of an output; activations are rounded to
    /// 8-bit integers in groups of 64.
    Q4,
    /// 4-bit codes of bitsandbytes (NF4, FP4) with an f32 absmax for every 64 values of k of an
    /// output. k a multiple of 64.
    Bnb4(Bnb4),
    /// LLM.int8() of bitsandbytes: 8-bit codes with one f32 scale for each output, and activations
    /// rounded to 8-bit integers but for large ones. k at most 131072.
    Int8(Int8),
}

/// Little-endian values as they lie in a checkpoint, floats and codes at any alignment.
#[derive(Debug, Clone, Copy)]
pub enum WeightData<'a> {
    /// 32-bit floats.
    F32(&'a [u8]),
    /// bfloat16.
    Bf16(&'a [u8]),
    /// IEEE half precision.
    F16(&'a [u8]),
    /// 4-bit codes of bitsandbytes, for a weight of the same type.
    Bnb4 {
        /// Two codes in a byte, the first in the high half.
        codes: &'a [u8],
        /// The absmax of each 64 values.
        absmax: &'a [f32],
    },
    /// LLM.int8() codes, for a weight of the same type.
    Int8 {
        /// Signed bytes.
        codes: &'a [u8],
        /// The largest magnitude of each row.
        scb: &'a [f32],
    },
}

impl<'a> WeightData<'a> {
    pub(crate) fn bytes(&self) -> &'a [u8] {
        match self {
            WeightData::F32(bytes) | WeightData::Bf16(bytes) | WeightData::F16(bytes) => bytes,
            WeightData::Bnb4 { codes, .. } | WeightData::Int8 { codes, .. } => codes,
        }
    }

    /// The type of floats; `None` for codes.
    pub(crate) fn dtype(&self) -> Option<WeightDtype> {
        match self {
            WeightData::F32(_) => Some(WeightDtype::F32),
            WeightData::Bf16(_) => Some(WeightDtype::Bf16),
            WeightData::F16(_) => Some(WeightDtype::F16),
            WeightData::Bnb4 { .. } | WeightData::Int8 { .. } => None,
        }
    }

    /// Bytes of a float.
    pub(crate) fn value_size(&self) -> usize {
        match self {
            WeightData::F32(_) => 4,
            WeightData::Bf16(_) | WeightData::F16(_) => 2,
            WeightData::Bnb4 { .. } | WeightData::Int8 { .. } => self.not_floats(),
        }
    }

    /// Bytes of so many values, without scales.
    fn bytes_of(&self, values: usize) -> usize {
        match self {
            WeightData::Bnb4 { .. } => values / 2,
            WeightData::Int8 { .. } => values,
            floats => values * floats.value_size(),
        }
    }

    /// Scales that so many rows need, and that there are.
    fn scales(&self, rows: usize, k: usize) -> (usize, usize) {
        match self {
            WeightData::Bnb4 { absmax, .. } => (rows * (k / bnb4::GROUP), absmax.len()),
            WeightData::Int8 { scb, .. } => (rows, scb.len()),
            _ => (0, 0),
        }
    }

    /// Row `row` of a matrix of rows of `k` values.
    ///
    /// # Panics
    /// There are fewer rows.
    pub fn row(&self, row: usize, k: usize) -> WeightData<'a> {
        let range = self.bytes_of(row * k)..self.bytes_of((row + 1) * k);
        let groups = k / bnb4::GROUP;
        match self {
            WeightData::F32(bytes) => WeightData::F32(&bytes[range]),
            WeightData::Bf16(bytes) => WeightData::Bf16(&bytes[range]),
            WeightData::F16(bytes) => WeightData::F16(&bytes[range]),
            WeightData::Bnb4 { codes, absmax } => WeightData::Bnb4 {
                codes: &codes[range],
                absmax: &absmax[row * groups..(row + 1) * groups],
            },
            WeightData::Int8 { codes, scb } => WeightData::Int8 {
                codes: &codes[range],
                scb: &scb[row..=row],
            },
        }
    }

    /// # Panics
    /// Always: codes were asked for floats.
    pub(crate) fn not_floats(&self) -> ! {
        unreachable!("codes of a weight of another type. This is a bug.")
    }
}

/// Some of a weight's rows: `[n, k]`, row-major.
#[derive(Debug, Clone, Copy)]
pub struct WeightPart<'a> {
    /// The values.
    pub data: WeightData<'a>,
    /// Number of rows.
    pub n: usize,
    /// What floats are multiplied by before they are rounded.
    pub scales: PartScales<'a>,
}

/// Factors of the rows and columns of a part; none is one. They are applied in f32.
#[derive(Debug, Clone, Copy, Default)]
pub struct PartScales<'a> {
    /// A factor for each row, `[n]`.
    pub rows: Option<&'a [f32]>,
    /// A factor for each column, `[k]`.
    pub columns: Option<&'a [f32]>,
}

impl<'a> WeightPart<'a> {
    /// Rows as they are.
    pub fn new(data: WeightData<'a>, n: usize) -> Self {
        let scales = PartScales::default();
        Self { data, n, scales }
    }

    fn row(&self, n: usize, k: usize) -> Row<'a> {
        Row {
            data: self.data.row(n, k),
            scale: self.scales.rows.map(|scales| scales[n]),
            columns: self.scales.columns,
        }
    }

    pub(crate) fn is_scaled(&self) -> bool {
        let PartScales { rows, columns } = self.scales;
        rows.is_some() || columns.is_some()
    }

    /// # Panics
    /// There are not as many scales as rows and columns: a bug of the caller.
    fn check_scales(&self, k: usize) {
        let PartScales { rows, columns } = self.scales;
        let fit = rows.is_none_or(|s| s.len() == self.n) && columns.is_none_or(|s| s.len() == k);
        assert!(fit, "other scales than rows and columns. This is a bug.");
    }

    /// # Panics
    /// The part holds codes of another type than the weight's: a bug of the caller.
    fn check_type(&self, dtype: WeightDtype) {
        let fits = match self.data {
            WeightData::Bnb4 { .. } => matches!(dtype, WeightDtype::Bnb4(_)),
            WeightData::Int8 { .. } => matches!(dtype, WeightDtype::Int8(_)),
            _ => true,
        };
        assert!(fits, "codes of another type than {dtype:?}. This is a bug.");
    }
}

/// A weight matrix `[n, k]` (n outputs, k inputs), packed by [`crate::Ops::pack`]. Cheap to clone:
/// the clones share the bytes.
#[derive(Clone)]
pub struct Weight {
    n: usize,
    k: usize,
    dtype: WeightDtype,
    packed: PackedBytes,
}

impl Weight {
    /// A weight `[n, k]` from the bytes that [`Weight::packed_bytes`] gave for the same n, k and
    /// dtype. They are used as they are, from where they lie.
    ///
    /// # Errors
    /// The number of bytes is not [`packed_len`]; k is larger than the type allows.
    pub fn from_packed(
        n: usize,
        k: usize,
        dtype: WeightDtype,
        packed: PackedBytes,
    ) -> Result<Weight, KernelError> {
        check_depth(k, dtype)?;
        let (expected, found) = (packed_len(n, k, dtype), packed.len());
        if found != expected {
            return Err(KernelError::PackedSize {
                n,
                k,
                expected,
                found,
            });
        }
        Ok(Weight {
            n,
            k,
            dtype,
            packed,
        })
    }

    /// Number of outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Number of inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How it is stored.
    pub fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// Resident bytes: values, scales and padding.
    pub fn bytes(&self) -> usize {
        self.packed.len()
    }

    /// The weight as it lies in memory, panel after panel: what [`Weight::from_packed`] takes. The
    /// order inside is this version's; whoever stores it stores a version beside it.
    ///
    /// # Panics
    /// The weight is on a GPU.
    pub fn packed_bytes(&self) -> &[u8] {
        self.packed.as_slice()
    }

    /// The weight's bytes: as [`Weight::packed_bytes`], or, of one on a GPU, as they lie there (floats
    /// row by row).
    pub fn to_host(&self) -> std::borrow::Cow<'_, [u8]> {
        self.packed.to_host()
    }

    /// Panel `index`.
    pub(crate) fn panel(&self, index: usize) -> &[u8] {
        let len = panel_len(self.k, self.dtype);
        &self.packed_bytes()[index * len..(index + 1) * len]
    }

    /// Writes row `n` of the matrix, widened to f32, to `out` (`[k]`).
    pub(crate) fn read_row(&self, n: usize, out: &mut [f32]) {
        let (panel, column) = (self.panel(n / PANEL), n % PANEL);
        match self.dtype {
            WeightDtype::Q8 => {
                q8::read_column(panel, column, out);
                rotate::rotate(out);
            }
            WeightDtype::Q4 => q4::read_column(panel, column, out),
            WeightDtype::Bnb4(of) => bnb4::read_column(of, panel, column, out),
            WeightDtype::Int8(_) => int8::read_column(panel, column, out),
            dtype => float::read_column(dtype, panel, column, out),
        }
    }

    /// Packs the parts, concatenated along n.
    pub(crate) fn pack(
        parts: &[WeightPart<'_>],
        k: usize,
        dtype: WeightDtype,
    ) -> Result<Weight, KernelError> {
        check_parts(parts, k, dtype)?;
        let n = parts.iter().map(|part| part.n).sum();
        Self::pack_into(Aligned::zeroed(packed_len(n, k, dtype)), parts, k, dtype)
    }

    /// Packs the parts where another weight of the same size and type lay.
    pub(crate) fn pack_over(
        self,
        parts: &[WeightPart<'_>],
        k: usize,
    ) -> Result<Weight, KernelError> {
        let dtype = self.dtype;
        let n = parts.iter().map(|part| part.n).sum();
        match ((self.n, self.k) == (n, k)).then(|| self.packed.into_own()) {
            Some(Some(packed)) => {
                check_parts(parts, k, dtype)?;
                Self::pack_into(packed, parts, k, dtype)
            }
            _ => Self::pack(parts, k, dtype),
        }
    }

    /// Packs the parts into memory of their size, whose padding is zero.
    fn pack_into(
        mut packed: Aligned<u8>,
        parts: &[WeightPart<'_>],
        k: usize,
        dtype: WeightDtype,
    ) -> Result<Weight, KernelError> {
        let n = parts.iter().map(|part| part.n).sum();
        let source = Source { parts, k };
        let wide = dtype == WeightDtype::Q8 || parts.iter().any(WeightPart::is_scaled);
        let panels = packed
            .as_mut_slice()
            .par_chunks_mut(panel_len(k, dtype).max(1))
            .enumerate();
        panels.for_each(|(index, panel)| {
            let rows: [Option<Row<'_>>; PANEL] =
                std::array::from_fn(|c| source.row(index * PANEL + c));
            let mut pack = |columns: &Columns<'_>| match dtype {
                WeightDtype::Q8 => q8::pack_panel(columns, k, panel),
                WeightDtype::Q4 => q4::pack_panel(columns, k, panel),
                WeightDtype::Bnb4(of) => bnb4::pack_panel(of, columns, k, panel),
                WeightDtype::Int8(_) => int8::pack_panel(columns, k, panel),
                dtype => float::pack_panel(dtype, columns, k, panel),
            };
            match wide {
                true => widened(&rows, k, dtype == WeightDtype::Q8, pack),
                false => pack(&rows.map(|row| row.map(|row| row.data))),
            }
        });
        Weight::from_packed(n, k, dtype, PackedBytes::own(packed))
    }
}

impl std::fmt::Debug for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weight[{}, {}; {:?}]", self.n, self.k, self.dtype)
    }
}

/// Bytes that a packed weight `[n, k]` takes; `usize::MAX` if no machine could hold it.
pub fn packed_len(n: usize, k: usize, dtype: WeightDtype) -> usize {
    n.div_ceil(PANEL).saturating_mul(panel_len(k, dtype))
}

/// Whether a weight can be made of the parts.
fn check_parts(parts: &[WeightPart<'_>], k: usize, dtype: WeightDtype) -> Result<(), KernelError> {
    check_depth(k, dtype)?;
    for part in parts {
        part.check_type(dtype);
        part.check_scales(k);
        let (scales, found_scales) = part.data.scales(part.n, k);
        let expected = part.data.bytes_of(part.n * k) + 4 * scales;
        let found = part.data.bytes().len() + 4 * found_scales;
        if found != expected || scales != found_scales {
            return Err(KernelError::WeightSize {
                rows: part.n,
                k,
                expected,
                found,
            });
        }
    }
    Ok(())
}

fn check_depth(k: usize, dtype: WeightDtype) -> Result<(), KernelError> {
    if matches!(dtype, WeightDtype::Bnb4(_)) && !k.is_multiple_of(bnb4::GROUP) {
        return Err(KernelError::WeightGroups {
            k,
            group: bnb4::GROUP,
        });
    }
    if matches!(dtype, WeightDtype::Q8 | WeightDtype::Int8(_)) && k > q8::MAX_K {
        return Err(KernelError::WeightDepth {
            k,
            limit: q8::MAX_K,
        });
    }
    Ok(())
}

/// Bytes of a panel: a multiple of 64.
fn panel_len(k: usize, dtype: WeightDtype) -> usize {
    let column = match dtype {
        WeightDtype::F32 => k.saturating_mul(4),
        WeightDtype::F16 => k.saturating_mul(2),
        WeightDtype::Bf16 => k.saturating_add(k % 2).saturating_mul(2),
        WeightDtype::Q8 | WeightDtype::Int8(_) => return q8::panel_len(k),
        WeightDtype::Q4 => return q4::panel_len(k),
        WeightDtype::Bnb4(_) => return bnb4::panel_len(k),
    };
    column.saturating_mul(PANEL)
}

/// The rows of a panel's columns; `None` beyond the last column.
pub(crate) type Columns<'a> = [Option<WeightData<'a>>; PANEL];

/// Rows widened to f32 and scaled, and, where they are to be, rotated.
fn widened(
    rows: &[Option<Row<'_>>; PANEL],
    k: usize,
    rotates: bool,
    work: impl FnOnce(&Columns<'_>),
) {
    thread_local! {
        static ROWS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    }
    let mut wide = ROWS.take();
    wide.resize(PANEL * k, 0.0);
    for (wide, row) in wide.chunks_exact_mut(k.max(1)).zip(rows) {
        let Some(row) = row else { continue };
        row.widen(wide);
        if rotates {
            rotate::rotate(wide);
        }
    }
    let row = |c: usize| WeightData::F32(bytemuck::cast_slice(&wide[c * k..(c + 1) * k]));
    work(&std::array::from_fn(|c| rows[c].map(|_| row(c))));
    ROWS.set(wide);
}

/// A row of a part.
#[derive(Clone, Copy)]
struct Row<'a> {
    data: WeightData<'a>,
    scale: Option<f32>,
    columns: Option<&'a [f32]>,
}

impl Row<'_> {
    /// Writes the scaled values.
    fn widen(&self, out: &mut [f32]) {
        float::widen_row(&self.data, out);
        if let Some(scales) = self.columns {
            out.iter_mut().zip(scales).for_each(|(v, s)| *v *= s);
        }
        if let Some(scale) = self.scale {
            out.iter_mut().for_each(|v| *v *= scale);
        }
    }
}

struct Source<'a> {
    parts: &'a [WeightPart<'a>],
    k: usize,
}

impl<'a> Source<'a> {
    fn row(&self, mut n: usize) -> Option<Row<'a>> {
        for part in self.parts {
            if n < part.n {
                return Some(part.row(n, self.k));
            }
            n -= part.n;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    fn values(n: usize, k: usize) -> Vec<f32> {
        (0..n * k)
            .map(|i| ((i * 37 % 1001) as f32 - 500.0) / 64.0)
            .collect()
    }

    fn round_trip(weight: &Weight, expected: &[f32]) {
        let mut row = vec![0.0; weight.k()];
        for n in 0..weight.n() {
            weight.read_row(n, &mut row);
            assert_eq!(
                row,
                expected[n * weight.k()..(n + 1) * weight.k()],
                "row {n}"
            );
        }
    }

    #[test]
    fn rows_come_back_from_every_format_in_every_format() {
        for (n, k) in [(1, 1), (5, 7), (32, 32), (33, 65), (70, 34), (64, 163)] {
            let source = values(n, k);
            let to_bf16 = |v: &f32| bf16::from_f32(*v);
            let to_f16 = |v: &f32| f16::from_f32(*v);
            let wide: Vec<u8> = source.iter().flat_map(|v| v.to_le_bytes()).collect();
            let brain: Vec<u8> = source
                .iter()
                .flat_map(|v| to_bf16(v).to_le_bytes())
                .collect();
            let half: Vec<u8> = source
                .iter()
                .flat_map(|v| to_f16(v).to_le_bytes())
                .collect();
            let brain_values: Vec<f32> = source.iter().map(|v| to_bf16(v).to_f32()).collect();
            for (data, exact) in [
                (WeightData::F32(&wide), &source),
                (WeightData::Bf16(&brain), &brain_values),
                (WeightData::F16(&half), &source),
            ] {
                let part = [WeightPart::new(data, n)];
                for dtype in [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::F16] {
                    let weight = Weight::pack(&part, k, dtype).expect("sizes fit");
                    assert_eq!((weight.n(), weight.k(), weight.dtype()), (n, k, dtype));
                    let bf16_exact = dtype == WeightDtype::Bf16;
                    round_trip(&weight, if bf16_exact { &brain_values } else { exact });
                }
            }
        }
    }

    #[test]
    fn parts_are_concatenated_across_panels_at_any_alignment() {
        let (k, sizes) = (3, [10, 30, 1]);
        let source = values(41, k);
        let mut bytes = vec![0];
        bytes.extend(source.iter().flat_map(|v| v.to_le_bytes()));
        let mut start = 1;
        let parts = sizes.map(|n| {
            let data = WeightData::F32(&bytes[start..start + n * k * 4]);
            start += n * k * 4;
            WeightPart::new(data, n)
        });
        round_trip(
            &Weight::pack(&parts, k, WeightDtype::F32).expect("sizes fit"),
            &source,
        );
    }

    #[test]
    fn packed_bytes_make_the_same_weight_again() {
        let (n, k) = (70, 35);
        let bytes: Vec<u8> = values(n, k).iter().flat_map(|v| v.to_le_bytes()).collect();
        let data = WeightData::F32(&bytes);
        for dtype in [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::F16] {
            let weight = Weight::pack(&[WeightPart::new(data, n)], k, dtype).expect("sizes fit");
            let packed = PackedBytes::copied(weight.packed_bytes());
            assert_eq!(packed.len(), packed_len(n, k, dtype));
            let again = Weight::from_packed(n, k, dtype, packed.clone()).expect("sizes fit");
            let (mut row, mut row_again) = (vec![0.0; k], vec![0.0; k]);
            for row_index in 0..n {
                weight.read_row(row_index, &mut row);
                again.read_row(row_index, &mut row_again);
                assert_eq!(row, row_again, "{dtype:?} {row_index}");
            }
            let error = Weight::from_packed(n + 32, k, dtype, packed).expect_err("wrong");
            assert!(error.to_string().contains("pack it again"), "{error}");
        }
        assert_eq!(
            packed_len(usize::MAX, usize::MAX, WeightDtype::Bf16),
            usize::MAX
        );
    }

    /// Scaled while it is packed, in memory that was another weight's, it is the weight of scaled values.
    #[test]
    fn scales_and_used_memory_make_no_difference() {
        let (n, k) = (70, 64);
        let all = values(n, k);
        let rows: Vec<f32> = (0..n).map(|i| f32::exp2((i % 5) as f32 - 2.0)).collect();
        let columns: Vec<f32> = (0..k).map(|i| f32::exp2((i % 7) as f32 - 3.0)).collect();
        let scaled: Vec<f32> = (0..n * k)
            .map(|i| all[i] * rows[i / k] * columns[i % k])
            .collect();
        let code = crate::bnb::Code4::Nf4;
        let compute = Compute::F32;
        for dtype in [
            WeightDtype::F32,
            WeightDtype::Bf16,
            WeightDtype::F16,
            WeightDtype::Q8,
            WeightDtype::Q4,
            WeightDtype::Bnb4(Bnb4 { code, compute }),
            WeightDtype::Int8(Int8::new(6.0)),
        ] {
            let plain = [WeightPart::new(
                WeightData::F32(bytemuck::cast_slice(&scaled)),
                n,
            )];
            let expected = Weight::pack(&plain, k, dtype).expect("sizes fit");
            let given = [WeightPart {
                scales: PartScales {
                    rows: Some(&rows),
                    columns: Some(&columns),
                },
                ..WeightPart::new(WeightData::F32(bytemuck::cast_slice(&all)), n)
            }];
            let other = Weight::pack(
                &[WeightPart {
                    scales: PartScales::default(),
                    ..given[0]
                }],
                k,
                dtype,
            );
            let other = other.expect("sizes fit");
            let address = other.packed_bytes().as_ptr();
            let found = other.pack_over(&given, k).expect("sizes fit");
            assert_eq!(found.packed_bytes().as_ptr(), address);
            assert_eq!(found.packed_bytes(), expected.packed_bytes(), "{dtype:?}");
            // Memory that somebody holds is left alone.
            let held = found.clone();
            let again = found.pack_over(&plain, k).expect("sizes fit");
            assert_ne!(again.packed_bytes().as_ptr(), held.packed_bytes().as_ptr());
        }
    }

    #[test]
    fn wrong_sizes_are_told() {
        let part = [WeightPart::new(WeightData::Bf16(&[0; 11]), 2)];
        let error = Weight::pack(&part, 3, WeightDtype::Bf16).expect_err("wrong");
        assert!(
            error
                .to_string()
                .contains("takes 12 bytes, but there are 11"),
            "{error}"
        );
    }
}
