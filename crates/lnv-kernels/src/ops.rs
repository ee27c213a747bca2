//! The operations: the crate's public face.
//!
//! Decision: each public function checks its shapes and then dispatches on the instruction set that
//! was chosen when the [`Ops`] was made. Nothing is allocated in proportion to the input: kernels
//! work in scratch that each thread keeps. All threads are rayon's global pool.

/// Returns the fast form, unless the instruction set is scalar; what follows is the slow form.
macro_rules! fast {
    ($ops:expr, $fast:expr) => {
        #[cfg(target_arch = "x86_64")]
        if $ops.isa != crate::isa::Isa::Scalar {
            return $fast;
        }
    };
}

mod attention;
mod awake;
mod linear;
mod rows;
mod vision;

pub use attention::{AttentionShape, Precision, Span};
pub use linear::Epilogue;
pub use vision::{PatchGeometry, PoolMode};

use std::ops::Range;
use std::sync::Once;

use crate::KernelError;
use crate::buffer::Buffer;
use crate::isa::{Device, Isa};
use crate::weight::{Weight, WeightDtype, WeightPart};

/// A function of one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x/2 * (1 + erf(x/√2))`.
    Gelu,
    /// Gelu by its tanh approximation.
    GeluTanh,
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// `max(x, 0)`.
    Relu,
}

/// The operations of one device with one instruction set. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Ops {
    isa: Isa,
}

impl Ops {
    /// The operations of a device, with the fastest instruction set or the one that `LNV_ISA`
    /// names.
    ///
    /// # Errors
    /// The program was built without the device, or `LNV_ISA` cannot be honoured.
    pub fn new(device: Device) -> Result<Ops, KernelError> {
        match device {
            Device::Cpu => Ok(Ops::with_isa(Isa::detect()?)),
            Device::Cuda(_) => Err(KernelError::NoCuda(device.to_string())),
        }
    }

    /// The operations of the processor with this instruction set.
    ///
    /// # Panics
    /// The processor lacks it.
    pub fn with_isa(isa: Isa) -> Ops {
        assert!(
            isa.is_available(),
            "this processor lacks {isa}. This is a bug."
        );
        start_threads();
        Ops { isa }
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Number of threads that share an operation.
    pub fn threads(&self) -> usize {
        rayon::current_num_threads()
    }

    /// Runs `work`, many operations, on one of the threads that share them, and keeps the others awake
    /// meanwhile: each operation then starts at once, where a thread that sleeps or is outside would wait
    /// to be heard (20 to 50 µs).
    pub fn together<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        awake::keep(work)
    }

    /// A zeroed matrix, `[rows, cols]`.
    pub fn buffer(&self, rows: usize, cols: usize) -> Buffer {
        Buffer::zeroed(rows, cols)
    }

    /// A matrix, `[rows, cols]`, whose values may be anything: for what is written before it is read. Its
    /// memory is that of scratch that is no longer in use, if there is any of about this size.
    pub fn scratch(&self, rows: usize, cols: usize) -> Buffer {
        Buffer::scratch(rows, cols)
    }

    /// A matrix `[rows, cols]` of these values.
    ///
    /// # Panics
    /// `data` has not `rows * cols` values.
    pub fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Buffer {
        let mut buffer = Buffer::zeroed(rows, cols);
        require("upload", "values", data.len(), rows * cols);
        buffer.host_mut().copy_from_slice(data);
        buffer
    }

    /// The matrix's values, row-major.
    pub fn download(&self, buffer: &Buffer) -> Vec<f32> {
        buffer.host().to_vec()
    }

    /// The values of some rows.
    ///
    /// # Panics
    /// Rows that do not exist.
    pub fn download_rows(&self, buffer: &Buffer, rows: Range<usize>) -> Vec<f32> {
        let cols = buffer.cols();
        buffer.host()[rows.start * cols..rows.end * cols].to_vec()
    }

    /// Overwrites rows from `first_row` on with `data`.
    ///
    /// # Panics
    /// `data` is no whole number of rows, or reaches beyond the last.
    pub fn write_rows(&self, buffer: &mut Buffer, first_row: usize, data: &[f32]) {
        let cols = buffer.cols();
        require(
            "write_rows",
            "values beyond whole rows",
            data.len() % cols.max(1),
            0,
        );
        let start = first_row * cols;
        buffer.host_mut()[start..start + data.len()].copy_from_slice(data);
    }

    /// Packs a weight `[n, k]`: the parts, each `[n_i, k]` row-major as stored in a checkpoint,
    /// concatenated along n (a fused qkv, gate and up). Converts to `dtype` where the parts differ.
    ///
    /// # Errors
    /// A part's bytes do not make up `n_i * k` values.
    pub fn pack(
        &self,
        parts: &[WeightPart<'_>],
        k: usize,
        dtype: WeightDtype,
    ) -> Result<Weight, KernelError> {
        Weight::pack(parts, k, dtype)
    }
}

/// Sizes rayon's global pool: `LNV_THREADS`, else what the cgroup and the affinity mask allow. If
/// the program has made a pool already, that one stays.
fn start_threads() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let wanted = std::env::var("LNV_THREADS")
            .ok()
            .and_then(|n| n.parse().ok());
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = wanted.filter(|n| *n > 0).unwrap_or(available);
        let _ = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("lnv-{index}"))
            .build_global();
    });
}

/// Panics unless a count is what the operation needs.
#[track_caller]
fn require(op: &str, what: &str, found: usize, expected: usize) {
    assert!(
        found == expected,
        "{op}: {what}: {found} instead of {expected}. This is a bug."
    );
}

/// Panics unless every index is below the bound.
#[track_caller]
fn require_below(op: &str, what: &str, indices: &[u32], bound: usize) {
    let wrong = indices.iter().find(|index| **index as usize >= bound);
    assert!(
        wrong.is_none(),
        "{op}: {what} {wrong:?} of {bound}. This is a bug."
    );
}
