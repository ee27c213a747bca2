//! Matrices of activations.
//!
//! Decision: activations are f32, row-major and contiguous: no strides, no views, no other type. A
//! kernel that wants bf16 activations converts a block of them into its own scratch, which costs
//! nothing beside the product that follows. The storage is an enum so that a device's memory can be
//! another variant behind the same [`crate::Ops`].

use std::fmt;
#[cfg(feature = "cuda")]
use std::sync::{Arc, OnceLock};
use std::sync::{Mutex, PoisonError};

#[cfg(feature = "cuda")]
use crate::cuda::memory::Memory;
#[cfg(feature = "cuda")]
use crate::cuda::{Cuda, Half, Kind, View};

/// Zeroed values that start on a 64-byte boundary (one cache line, one AVX-512 register).
///
/// The vector is over-allocated and the start found inside it: allocation stays safe code, and
/// large zeroed ones come from the system lazily (`calloc`), page by page as they are touched.
pub(crate) struct Aligned<T> {
    raw: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + bytemuck::Zeroable> Aligned<T> {
    pub(crate) fn zeroed(len: usize) -> Self {
        let mut raw = vec![T::zeroed(); len + 64 / size_of::<T>()];
        let start = raw.as_ptr().align_offset(64);
        prefer_huge_pages(&mut raw);
        Aligned { raw, start, len }
    }
}

/// Asks the system to back a large allocation with huge pages, before it is touched: faulting a
/// weight in is several times faster, and a stream through it meets no page boundary every 4 KB.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn prefer_huge_pages<T>(raw: &mut [T]) {
    const HUGE: usize = 2 << 20;
    let start = (raw.as_mut_ptr() as usize).next_multiple_of(HUGE);
    let end = (raw.as_ptr() as usize + size_of_val(raw)) / HUGE * HUGE;
    if start < end {
        // SAFETY: whole pages inside an allocation that is borrowed mutably; the advice changes no
        // contents, and a system that refuses it changes nothing.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn prefer_huge_pages<T>(_: &mut [T]) {}

impl<T> Aligned<T> {
    pub(crate) fn as_slice(&self) -> &[T] {
        &self.raw[self.start..self.start + self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.raw[self.start..self.start + self.len]
    }

    pub(crate) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

enum Storage {
    Host(Aligned<f32>),
    #[cfg(feature = "cuda")]
    Device(Memory, Kind),
}

/// A matrix of f32, `[rows, cols]`, row-major, made by [`crate::Ops::buffer`] or [`crate::Ops::scratch`].
pub struct Buffer {
    rows: usize,
    cols: usize,
    storage: Storage,
    /// Whether the memory goes to [`LEFT`] in the end.
    scratch: bool,
}

/// Memory that scratch has left behind, the latest last. A pass over a long prompt takes hundreds of
/// megabytes; from the system each page of it would come zeroed, which costs a tenth of a prefill.
static LEFT: Mutex<Vec<Aligned<f32>>> = Mutex::new(Vec::new());
/// Bytes that are kept; the oldest go first.
const LEFT_BYTES: usize = 512 << 20;
/// Values below which the system's own allocator is as quick.
const SMALL: usize = 1 << 18;

/// Memory for `len` values, which may be any.
fn left(len: usize) -> Aligned<f32> {
    if len >= SMALL {
        let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |piece: &Aligned<f32>| (len..=2 * len).contains(&piece.len);
        let best = (0..left.len())
            .filter(|i| fits(&left[*i]))
            .min_by_key(|i| left[*i].len);
        if let Some(index) = best {
            return left.remove(index);
        }
    }
    Aligned::zeroed(len)
}

/// Keeps a piece for [`left`].
fn leave(piece: Aligned<f32>) {
    if piece.len < SMALL {
        return;
    }
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    left.push(piece);
    let mut bytes: usize = left.iter().map(Aligned::bytes).sum();
    while bytes > LEFT_BYTES {
        bytes -= left.remove(0).bytes();
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        #[cfg_attr(not(feature = "cuda"), allow(irrefutable_let_patterns))]
        if self.scratch
            && let Storage::Host(data) = &mut self.storage
        {
            let none = Aligned {
                raw: Vec::new(),
                start: 0,
                len: 0,
            };
            leave(std::mem::replace(data, none));
        }
    }
}

impl Buffer {
    pub(crate) fn zeroed(rows: usize, cols: usize) -> Buffer {
        Buffer {
            rows,
            cols,
            storage: Storage::Host(Aligned::zeroed(rows * cols)),
            scratch: false,
        }
    }

    pub(crate) fn scratch(rows: usize, cols: usize) -> Buffer {
        Buffer {
            rows,
            cols,
            storage: Storage::Host(left(rows * cols)),
            scratch: true,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Makes the matrix `[rows, ..]` with fewer or again more rows, inside what it was made with: a
    /// buffer planned for the largest step serves every smaller one. Values stay.
    ///
    /// # Panics
    /// More rows than the buffer was made with.
    pub fn set_rows(&mut self, rows: usize) {
        let room = match &self.storage {
            Storage::Host(data) => data.as_slice().len(),
            #[cfg(feature = "cuda")]
            Storage::Device(memory, kind) => memory.len() / memory.cuda().bytes_of(*kind),
        };
        assert!(
            rows * self.cols <= room,
            "set_rows: {rows} rows of {} do not fit into {room} values. This is a bug.",
            self.cols
        );
        self.rows = rows;
    }

    pub(crate) fn host(&self) -> &[f32] {
        match &self.storage {
            Storage::Host(data) => &data.as_slice()[..self.rows * self.cols],
            #[cfg(feature = "cuda")]
            Storage::Device(..) => panic!("{self:?} is on a GPU. This is a bug."),
        }
    }

    pub(crate) fn host_mut(&mut self) -> &mut [f32] {
        let len = self.rows * self.cols;
        match &mut self.storage {
            Storage::Host(data) => &mut data.as_mut_slice()[..len],
            #[cfg(feature = "cuda")]
            Storage::Device(..) => panic!("a matrix is on a GPU. This is a bug."),
        }
    }
}

/// Matrices on a GPU.
#[cfg(feature = "cuda")]
impl Buffer {
    /// A matrix that may hold anything.
    pub(crate) fn on_device(cuda: &Arc<Cuda>, rows: usize, cols: usize, kind: Kind) -> Buffer {
        let kind = if cuda.half() == Half::F32 {
            Kind::F32
        } else {
            kind
        };
        let memory = cuda.alloc(rows * cols * cuda.bytes_of(kind));
        Buffer {
            rows,
            cols,
            storage: Storage::Device(memory, kind),
            scratch: false,
        }
    }

    /// What kernels take.
    ///
    /// # Panics
    /// The matrix is the host's.
    pub(crate) fn view(&self) -> View {
        let (memory, kind) = self.device();
        View {
            ptr: memory.ptr(),
            rows: self.rows,
            cols: self.cols,
            kind,
        }
    }

    /// Its memory.
    ///
    /// # Panics
    /// The matrix is the host's.
    pub(crate) fn device(&self) -> (&Memory, Kind) {
        match &self.storage {
            Storage::Device(memory, kind) => (memory, *kind),
            Storage::Host(_) => panic!("{self:?} is not on the GPU. This is a bug."),
        }
    }

    /// Values from value `first` on, as f32.
    pub(crate) fn read(&self, first: usize, out: &mut [f32]) {
        let (memory, kind) = self.device();
        let half = match kind {
            Kind::F32 => {
                return memory
                    .cuda()
                    .read(memory, first * 4, bytemuck::cast_slice_mut(out));
            }
            Kind::Half => memory.cuda().half(),
        };
        let mut bits = vec![0u16; out.len()];
        memory
            .cuda()
            .read(memory, first * 2, bytemuck::cast_slice_mut(&mut bits));
        half.widen(&bits, out);
    }

    /// Overwrites values from value `first` on.
    pub(crate) fn write(&self, first: usize, values: &[f32]) {
        let (memory, kind) = self.device();
        match kind {
            Kind::F32 => memory
                .cuda()
                .write(memory, first * 4, bytemuck::cast_slice(values)),
            Kind::Half => {
                let bits = memory.cuda().half().narrow(values);
                memory
                    .cuda()
                    .write(memory, first * 2, bytemuck::cast_slice(&bits));
            }
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer[{}, {}]", self.rows, self.cols)
    }
}

/// A vector of f32 parameters, `[n]`: a norm's weight, a bias, a class embedding.
#[derive(Debug, Clone)]
pub struct Vector {
    values: Vec<f32>,
    /// Where a GPU has them, from the first time on that it needs them.
    #[cfg(feature = "cuda")]
    device: Arc<OnceLock<Memory>>,
}

impl Vector {
    /// Takes the values.
    pub fn new(values: Vec<f32>) -> Vector {
        Vector {
            values,
            #[cfg(feature = "cuda")]
            device: Arc::default(),
        }
    }

    /// The values in a GPU's memory.
    #[cfg(feature = "cuda")]
    pub(crate) fn on(&self, cuda: &Arc<Cuda>) -> u64 {
        let upload = || {
            let bytes = bytemuck::cast_slice(&self.values);
            cuda.upload(bytes).unwrap_or_else(|e| panic!("{e}"))
        };
        self.device.get_or_init(upload).ptr()
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The values.
    pub fn as_slice(&self) -> &[f32] {
        &self.values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_and_zeroed_and_shrinks() {
        let mut buffer = Buffer::zeroed(5, 7);
        assert_eq!(buffer.host().as_ptr().align_offset(64), 0);
        assert!(buffer.host().iter().all(|v| *v == 0.0));
        buffer.set_rows(2);
        assert_eq!((buffer.rows(), buffer.host().len()), (2, 14));
        buffer.set_rows(5);
        assert_eq!(buffer.host_mut().len(), 35);
    }

    #[test]
    fn scratch_gets_the_memory_that_scratch_left() {
        // A size that no other test has.
        let (rows, cols) = (1031, 1033);
        let address = |buffer: &Buffer| buffer.host().as_ptr() as usize;
        let first = Buffer::scratch(rows, cols);
        let left = address(&first);
        drop(first);
        let second = Buffer::scratch(rows - 31, cols);
        assert_eq!((second.host().len(), address(&second)), (1000 * cols, left));
        assert_ne!(address(&Buffer::scratch(rows - 31, cols)), left);
        let zeroed = Buffer::zeroed(rows, cols);
        assert!(zeroed.host().iter().all(|v| *v == 0.0));
        drop(second);
        let small = Buffer::scratch(rows / 4, cols);
        assert_ne!(address(&small), left, "not for so little");
    }

    #[test]
    #[should_panic(expected = "This is a bug")]
    fn a_buffer_does_not_grow() {
        Buffer::zeroed(2, 3).set_rows(3);
    }
}
