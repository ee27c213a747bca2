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

/// Returns the GPU's form, where there is one.
macro_rules! on_cuda {
    ($ops:expr, $cuda:ident => $work:expr) => {
        #[cfg(feature = "cuda")]
        if let Some($cuda) = &$ops.cuda {
            return $work;
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
#[cfg(feature = "cuda")]
use std::sync::Arc;
use std::sync::Once;

use crate::KernelError;
use crate::buffer::Buffer;
#[cfg(feature = "cuda")]
use crate::cuda::{Cuda, Half, Kind};
use crate::isa::{Device, Isa};
use crate::kv_cache::{Heads, KvCache, KvDtype};
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
    /// The GPU, where it is not the processor that computes.
    #[cfg(feature = "cuda")]
    cuda: Option<Arc<Cuda>>,
}

impl Ops {
    /// The operations of a device, with the fastest instruction set or the one that `LNV_ISA`
    /// names. On a GPU scratch is f32; [`Ops::of_type`] says another type.
    ///
    /// # Errors
    /// The program was built without the device, the device is not there or too old, or `LNV_ISA`
    /// cannot be honoured.
    pub fn new(device: Device) -> Result<Ops, KernelError> {
        Ops::of_type(device, WeightDtype::F32)
    }

    /// The same for a model whose matrices are of a float type, which a GPU keeps them and scratch in
    /// (bf16 for other types); the processor keeps scratch in f32.
    ///
    /// # Errors
    /// As [`Ops::new`].
    pub fn of_type(device: Device, dtype: WeightDtype) -> Result<Ops, KernelError> {
        #[cfg(not(feature = "cuda"))]
        let _ = dtype;
        match device {
            Device::Cpu => Ok(Ops::with_isa(Isa::detect()?)),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => Err(KernelError::NoCuda(device.to_string())),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => {
                let mut ops = Ops::with_isa(Isa::detect()?);
                ops.cuda = Some(Cuda::open(number, Half::of(dtype))?);
                Ok(ops)
            }
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self) -> Option<&Arc<Cuda>> {
        self.cuda.as_ref()
    }

    /// Where the arithmetic runs, in words: an instruction set, or a GPU's name.
    pub fn device_name(&self) -> String {
        on_cuda!(self, cuda => format!("{cuda:?}"));
        self.isa.to_string()
    }

    /// Whether a GPU computes.
    pub fn is_cuda(&self) -> bool {
        on_cuda!(self, _cuda => true);
        false
    }

    /// Bytes of the GPU's memory, `(free, all)`; `None` where the processor computes.
    pub fn device_memory(&self) -> Option<(usize, usize)> {
        on_cuda!(self, cuda => Some(cuda.memory()));
        None
    }

    /// Waits until everything that was begun is done: what is measured between two calls has happened.
    pub fn wait(&self) {
        on_cuda!(self, cuda => cuda.wait());
    }

    /// Makes the GPU's kernels ready, which takes seconds on a machine's first run; for a thread beside
    /// the one that loads weights. Nothing for the processor.
    ///
    /// # Errors
    /// The driver does not take them.
    pub fn prepare(&self) -> Result<(), KernelError> {
        on_cuda!(self, cuda => cuda.prepare());
        Ok(())
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
        Ops {
            isa,
            #[cfg(feature = "cuda")]
            cuda: None,
        }
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
        // A GPU's operations only begin here.
        on_cuda!(self, _cuda => work());
        awake::keep(work)
    }

    /// A zeroed matrix, `[rows, cols]`.
    pub fn buffer(&self, rows: usize, cols: usize) -> Buffer {
        on_cuda!(self, cuda => {
            let buffer = Buffer::on_device(cuda, rows, cols, Kind::F32);
            cuda.zero(buffer.device().0);
            buffer
        });
        Buffer::zeroed(rows, cols)
    }

    /// A matrix, `[rows, cols]`, whose values may be anything: for what is written before it is read. Its
    /// memory is that of scratch that is no longer in use, if there is any of about this size. On a GPU its
    /// values have the model's type.
    pub fn scratch(&self, rows: usize, cols: usize) -> Buffer {
        on_cuda!(self, cuda => Buffer::on_device(cuda, rows, cols, Kind::Half));
        Buffer::scratch(rows, cols)
    }

    /// A matrix `[rows, cols]` of these values.
    ///
    /// # Panics
    /// `data` has not `rows * cols` values.
    pub fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Buffer {
        require("upload", "values", data.len(), rows * cols);
        on_cuda!(self, cuda => {
            let buffer = Buffer::on_device(cuda, rows, cols, Kind::F32);
            buffer.write(0, data);
            buffer
        });
        let mut buffer = Buffer::zeroed(rows, cols);
        buffer.host_mut().copy_from_slice(data);
        buffer
    }

    /// The matrix's values, row-major.
    pub fn download(&self, buffer: &Buffer) -> Vec<f32> {
        self.download_rows(buffer, 0..buffer.rows())
    }

    /// The values of some rows.
    ///
    /// # Panics
    /// Rows that do not exist.
    pub fn download_rows(&self, buffer: &Buffer, rows: Range<usize>) -> Vec<f32> {
        let cols = buffer.cols();
        on_cuda!(self, _cuda => {
            let mut values = vec![0.0; rows.len() * cols];
            buffer.read(rows.start * cols, &mut values);
            values
        });
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
        on_cuda!(self, _cuda => buffer.write(start, data));
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
        on_cuda!(self, cuda => Weight::pack_on(cuda, parts, k, dtype));
        Weight::pack(parts, k, dtype)
    }

    /// As [`Ops::pack`] to the type of `old`, whose memory is used again where it has the same size and
    /// nobody else holds it: pages that the system has to clear cost more than packing.
    ///
    /// # Errors
    /// As [`Ops::pack`].
    pub fn pack_over(
        &self,
        old: Weight,
        parts: &[WeightPart<'_>],
        k: usize,
    ) -> Result<Weight, KernelError> {
        on_cuda!(self, cuda => Weight::pack_on(cuda, parts, k, old.dtype()));
        old.pack_over(parts, k)
    }

    /// A weight that was packed before ([`Weight::from_packed`]), where the arithmetic needs it: the same,
    /// or a copy in the GPU's memory.
    ///
    /// # Errors
    /// The GPU has no room.
    pub fn place(&self, weight: Weight) -> Result<Weight, KernelError> {
        on_cuda!(self, cuda => weight.place_on(cuda));
        Ok(weight)
    }

    /// A weight with the same values in memory of its own.
    ///
    /// # Errors
    /// The GPU has no room.
    pub fn duplicate(&self, weight: &Weight) -> Result<Weight, KernelError> {
        on_cuda!(self, cuda => weight.copy_on(cuda));
        let bytes = crate::PackedBytes::copied(weight.packed_bytes());
        Weight::from_packed(weight.n(), weight.k(), weight.dtype(), bytes)
    }

    /// A cache of `blocks` blocks for each of `layers` layers.
    ///
    /// # Errors
    /// The GPU has no room.
    pub fn kv_cache(
        &self,
        layers: usize,
        heads: Heads,
        blocks: usize,
        dtype: KvDtype,
    ) -> Result<KvCache, KernelError> {
        let mut cache = self.empty_kv_cache(layers, heads, dtype);
        cache.grow(blocks)?;
        Ok(cache)
    }

    /// A cache without blocks, to be grown.
    pub fn empty_kv_cache(&self, layers: usize, heads: Heads, dtype: KvDtype) -> KvCache {
        on_cuda!(self, cuda => KvCache::on_device(cuda, layers, heads, dtype));
        KvCache::new(layers, heads, 0, dtype)
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
