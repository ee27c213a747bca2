//! Weights in a GPU's memory.
//!
//! Decision: floats lie row by row in the device's type T, as checkpoints have them, which is what the
//! products of many rows take; a checkpoint in T goes up as it is. Quantised weights keep the panels of the
//! processor, byte for byte, so that the codes are the same and a saved checkpoint goes up unchanged.

use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use super::{Weight, WeightDtype, WeightPart, check_parts};
use crate::KernelError;
use crate::cuda::memory::Memory;
use crate::cuda::{Cuda, DeviceWeight, Half};
use crate::weight::PackedBytes;

/// Bytes of a weight that are converted at once.
const STRIP: usize = 64 << 20;

impl Half {
    fn dtype(self) -> WeightDtype {
        match self {
            Half::F32 => WeightDtype::F32,
            Half::Bf16 => WeightDtype::Bf16,
            Half::F16 => WeightDtype::F16,
        }
    }

    /// The value's bytes.
    fn put(self, value: f32, bytes: &mut [u8]) {
        match self {
            Half::F32 => bytes.copy_from_slice(&value.to_le_bytes()),
            Half::Bf16 => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            Half::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        }
    }
}

fn is_float(dtype: WeightDtype) -> bool {
    matches!(
        dtype,
        WeightDtype::F32 | WeightDtype::Bf16 | WeightDtype::F16
    )
}

impl Weight {
    /// Packs the parts and takes them to the GPU.
    pub(crate) fn pack_on(
        cuda: &Arc<Cuda>,
        parts: &[WeightPart<'_>],
        k: usize,
        dtype: WeightDtype,
    ) -> Result<Weight, KernelError> {
        if !is_float(dtype) {
            return Weight::pack(parts, k, dtype)?.place_on(cuda);
        }
        check_parts(parts, k, dtype)?;
        let n: usize = parts.iter().map(|part| part.n).sum();
        let row_bytes = k * cuda.half().bytes();
        let memory = cuda.try_alloc(n * row_bytes).map_err(KernelError::Cuda)?;
        let mut at = 0;
        for part in parts {
            if part.data.dtype() == Some(cuda.half().dtype()) && !part.is_scaled() {
                cuda.write(&memory, at, part.data.bytes());
            } else {
                let row = |row: usize, out: &mut [f32]| part.row(row, k).widen(out);
                write_rows(cuda, &memory, at, (part.n, k), row);
            }
            at += part.n * row_bytes;
        }
        Ok(Weight::of_device(memory, (n, k), cuda.half().dtype()))
    }

    /// A weight of the host, taken to the GPU.
    pub(crate) fn place_on(&self, cuda: &Arc<Cuda>) -> Result<Weight, KernelError> {
        let (n, k) = (self.n, self.k);
        if !is_float(self.dtype) {
            let memory = cuda
                .upload(self.packed_bytes())
                .map_err(KernelError::Cuda)?;
            return Ok(Weight::of_device(memory, (n, k), self.dtype));
        }
        let memory = cuda
            .try_alloc(n * k * cuda.half().bytes())
            .map_err(KernelError::Cuda)?;
        write_rows(cuda, &memory, 0, (n, k), |row, out| self.read_row(row, out));
        Ok(Weight::of_device(memory, (n, k), cuda.half().dtype()))
    }

    /// Another weight with the same values, in memory of its own.
    pub(crate) fn copy_on(&self, cuda: &Arc<Cuda>) -> Result<Weight, KernelError> {
        let Some(from) = self.packed.device() else {
            return self.place_on(cuda);
        };
        let memory = cuda.try_alloc(from.len()).map_err(KernelError::Cuda)?;
        cuda.copy((from, 0), (&memory, 0), from.len());
        Ok(Weight::of_device(memory, (self.n, self.k), self.dtype))
    }

    fn of_device(memory: Memory, (n, k): (usize, usize), dtype: WeightDtype) -> Weight {
        Weight {
            n,
            k,
            dtype,
            packed: PackedBytes::on_device(memory),
        }
    }

    /// What kernels take.
    ///
    /// # Panics
    /// The weight is the host's.
    pub(crate) fn device(&self) -> DeviceWeight {
        let Some(memory) = self.packed.device() else {
            panic!("{self:?} is not on the GPU. This is a bug.");
        };
        DeviceWeight {
            ptr: memory.ptr(),
            n: self.n,
            k: self.k,
            dtype: self.dtype,
        }
    }
}

/// Writes rows in the device's type, from byte `at` on.
fn write_rows(
    cuda: &Arc<Cuda>,
    memory: &Memory,
    at: usize,
    (n, k): (usize, usize),
    row: impl Fn(usize, &mut [f32]) + Sync,
) {
    let half = cuda.half();
    let row_bytes = k * half.bytes();
    if row_bytes == 0 {
        return;
    }
    let rows = (STRIP / row_bytes).max(1);
    for first in (0..n).step_by(rows) {
        let mut strip = vec![0; row_bytes * rows.min(n - first)];
        strip
            .par_chunks_exact_mut(row_bytes)
            .enumerate()
            .for_each_init(
                || vec![0.0; k],
                |values, (i, bytes)| {
                    row(first + i, values);
                    let places = bytes.chunks_exact_mut(half.bytes());
                    values
                        .iter()
                        .zip(places)
                        .for_each(|(value, place)| half.put(*value, place));
                },
            );
        cuda.write(memory, at + first * row_bytes, &strip);
    }
}
