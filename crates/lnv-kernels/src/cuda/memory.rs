//! The device's memory: taken from the driver once, then passed on.
//!
//! Decision: everything runs on one stream, so memory that is given back may be handed out again at once:
//! whoever writes it next does so after all that was begun before. Pieces are kept by size and come back
//! without a call of the driver, which would wait for the GPU. Only when the GPU has no memory left are
//! they returned to it, and asked for again.
//!
//! Bytes from the host go through a few pinned buffers in turn: while some are on their way, the threads of
//! the pool fill another.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::Cuda;
use super::driver::{DevicePtr, Driver, Handle, OUT_OF_MEMORY};

/// A piece of the device's memory.
pub(crate) struct Memory {
    cuda: Arc<Cuda>,
    ptr: DevicePtr,
    /// As the pool knows it.
    size: usize,
    len: usize,
}

impl Memory {
    /// Where it begins: a multiple of 256.
    pub(crate) fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// The GPU that it is on.
    pub(crate) fn cuda(&self) -> &Arc<Cuda> {
        &self.cuda
    }

    /// Bytes that were asked for.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.size > 0 {
            self.cuda.pool.put(self.size, self.ptr);
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory[{}]", self.len)
    }
}

/// Pieces that are not in use, by size.
#[derive(Default)]
pub(super) struct Pool(Mutex<BTreeMap<usize, Vec<DevicePtr>>>);

impl Pool {
    /// A piece of this size, or of one that is at most an eighth larger.
    fn take(&self, size: usize) -> Option<(usize, DevicePtr)> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = free
            .range_mut(size..=size + size / 8)
            .find(|(_, pieces)| !pieces.is_empty());
        found.and_then(|(size, pieces)| Some((*size, pieces.pop()?)))
    }

    fn put(&self, size: usize, ptr: DevicePtr) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.entry(size).or_default().push(ptr);
    }

    /// Gives all pieces back to the driver.
    #[allow(unsafe_code)]
    pub(super) fn clear(&self, driver: &Driver) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for ptr in std::mem::take(&mut *free).into_values().flatten() {
            // SAFETY: from `mem_alloc`, and in nobody's hands. The driver waits for what still runs.
            unsafe { (driver.mem_free)(ptr) };
        }
    }
}

/// What a piece is rounded up to: few sizes, little waste.
fn rounded(bytes: usize) -> usize {
    match bytes {
        0..=512 => 512,
        513..=1_048_576 => bytes.next_power_of_two(),
        _ => bytes.next_multiple_of(1 << 20),
    }
}

/// Bytes of a pinned buffer.
const PINNED: usize = 8 << 20;
/// How many there are.
const BUFFERS: usize = 4;
/// Copies below this are left to the driver, which takes them at once.
const SMALL: usize = 64 << 10;

/// Pinned buffers of the host, and what says that one is free again.
pub(super) struct Staging {
    buffers: [*mut c_void; BUFFERS],
    events: [Handle; BUFFERS],
    next: usize,
}

// SAFETY: plain memory and handles that any thread may use; the lock around it lets one at a time.
#[allow(unsafe_code)]
unsafe impl Send for Staging {}

impl Staging {
    #[allow(unsafe_code)]
    fn new(driver: &Driver) -> Result<Staging, String> {
        let mut new = Staging {
            buffers: [std::ptr::null_mut(); BUFFERS],
            events: [std::ptr::null_mut(); BUFFERS],
            next: 0,
        };
        for i in 0..BUFFERS {
            // SAFETY: both calls write one handle; 2 is CU_EVENT_DISABLE_TIMING.
            unsafe {
                driver.check((driver.mem_host_alloc)(&mut new.buffers[i], PINNED, 0))?;
                driver.check((driver.event_create)(&mut new.events[i], 2))?;
            }
        }
        Ok(new)
    }

    #[allow(unsafe_code)]
    pub(super) fn free(&mut self, driver: &Driver) {
        for i in 0..BUFFERS {
            // SAFETY: made by `new`, and no copy is under way when the device is given up.
            unsafe {
                (driver.event_destroy)(self.events[i]);
                (driver.mem_free_host)(self.buffers[i]);
            }
        }
    }
}

impl Cuda {
    /// Memory for so many bytes, which may be any.
    ///
    /// # Errors
    /// The GPU has no room: one sentence.
    pub(crate) fn try_alloc(self: &Arc<Cuda>, bytes: usize) -> Result<Memory, String> {
        if bytes == 0 {
            return Ok(self.nothing());
        }
        let size = rounded(bytes);
        if let Some((size, ptr)) = self.pool.take(size) {
            return Ok(self.piece(ptr, size, bytes));
        }
        let mut ptr = self.take_from_driver(size);
        if ptr == Err(OUT_OF_MEMORY) {
            self.wait();
            self.pool.clear(&self.driver);
            ptr = self.take_from_driver(size);
        }
        match ptr {
            Ok(ptr) => Ok(self.piece(ptr, size, bytes)),
            Err(OUT_OF_MEMORY) => Err(self.no_room(bytes)),
            Err(status) => Err(self.sentence(status)),
        }
    }

    /// No memory.
    pub(crate) fn nothing(self: &Arc<Cuda>) -> Memory {
        self.piece(0, 0, 0)
    }

    fn piece(self: &Arc<Cuda>, ptr: DevicePtr, size: usize, len: usize) -> Memory {
        Memory {
            cuda: Arc::clone(self),
            ptr,
            size,
            len,
        }
    }

    /// Memory for so many bytes, which may be any.
    ///
    /// # Panics
    /// The GPU has no room; what is planned for is asked for by [`Cuda::try_alloc`].
    pub(crate) fn alloc(self: &Arc<Cuda>, bytes: usize) -> Memory {
        self.try_alloc(bytes).unwrap_or_else(|e| panic!("{e}"))
    }

    fn no_room(&self, bytes: usize) -> String {
        let (free, total) = self.memory();
        let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
        format!(
            "{} has no room for {:.2} GiB more ({:.1} of {:.1} GiB are free); quantise the weights \
             (--quantize q4), use fewer frames, or give the cache less memory",
            self.name(),
            gib(bytes),
            gib(free),
            gib(total)
        )
    }

    #[allow(unsafe_code)]
    fn take_from_driver(&self, size: usize) -> Result<DevicePtr, i32> {
        self.enter();
        let mut ptr = 0;
        // SAFETY: writes one address.
        match unsafe { (self.driver.mem_alloc)(&mut ptr, size) } {
            0 => Ok(ptr),
            status => Err(status),
        }
    }

    /// Free and all bytes of the GPU.
    #[allow(unsafe_code)]
    pub(crate) fn memory(&self) -> (usize, usize) {
        self.enter();
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two sizes.
        self.done(unsafe { (self.driver.mem_get_info)(&mut free, &mut total) });
        (free, total)
    }

    /// Bytes of the host to memory of the device; they may change when this returns.
    ///
    /// # Panics
    /// They do not fit.
    #[allow(unsafe_code)]
    pub(crate) fn write(&self, to: &Memory, at: usize, bytes: &[u8]) {
        assert!(
            at + bytes.len() <= to.len,
            "{} bytes at {at} of {}. This is a bug.",
            bytes.len(),
            to.len
        );
        if bytes.is_empty() {
            return;
        }
        self.enter();
        if bytes.len() <= SMALL {
            let from = bytes.as_ptr().cast();
            // SAFETY: inside both; the driver takes pageable bytes before it returns.
            let status = unsafe {
                (self.driver.memcpy_to_device)(to.ptr + at as u64, from, bytes.len(), self.stream)
            };
            return self.done(status);
        }
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        if staging.is_none() {
            *staging = Some(Staging::new(&self.driver).unwrap_or_else(|e| panic!("{e}")));
        }
        let Some(staging) = staging.as_mut() else {
            return;
        };
        for (i, part) in bytes.chunks(PINNED).enumerate() {
            let turn = staging.next;
            staging.next = (turn + 1) % BUFFERS;
            // SAFETY: the event belongs to the buffer's last copy; one never recorded is over.
            self.done(unsafe { (self.driver.event_synchronize)(staging.events[turn]) });
            // SAFETY: `PINNED` bytes that no copy reads any more, under the lock.
            let pinned = unsafe {
                std::slice::from_raw_parts_mut(staging.buffers[turn].cast::<u8>(), part.len())
            };
            pinned
                .par_chunks_mut(512 << 10)
                .zip(part.par_chunks(512 << 10))
                .for_each(|(to, from)| to.copy_from_slice(from));
            let place = to.ptr + (at + i * PINNED) as u64;
            // SAFETY: inside both; the buffer stays as it is until its event is over.
            unsafe {
                self.done((self.driver.memcpy_to_device)(
                    place,
                    staging.buffers[turn],
                    part.len(),
                    self.stream,
                ));
                self.done((self.driver.event_record)(
                    staging.events[turn],
                    self.stream,
                ));
            }
        }
    }

    /// Memory with these bytes.
    ///
    /// # Errors
    /// The GPU has no room.
    pub(crate) fn upload(self: &Arc<Cuda>, bytes: &[u8]) -> Result<Memory, String> {
        let memory = self.try_alloc(bytes.len())?;
        self.write(&memory, 0, bytes);
        Ok(memory)
    }

    /// Bytes of the device, once everything begun before is done.
    ///
    /// # Panics
    /// They are not there.
    #[allow(unsafe_code)]
    pub(crate) fn read(&self, from: &Memory, at: usize, bytes: &mut [u8]) {
        assert!(
            at + bytes.len() <= from.len,
            "{} bytes at {at} of {}. This is a bug.",
            bytes.len(),
            from.len
        );
        if bytes.is_empty() {
            return;
        }
        self.enter();
        let to = bytes.as_mut_ptr().cast();
        // SAFETY: inside both; waited for before the borrow ends.
        self.done(unsafe {
            (self.driver.memcpy_to_host)(to, from.ptr + at as u64, bytes.len(), self.stream)
        });
        self.wait();
    }

    /// Copies bytes on the device.
    ///
    /// # Panics
    /// They are not there.
    #[allow(unsafe_code)]
    pub(crate) fn copy(&self, from: (&Memory, usize), to: (&Memory, usize), bytes: usize) {
        let fits = from.1 + bytes <= from.0.len && to.1 + bytes <= to.0.len;
        assert!(fits, "{bytes} bytes on the device. This is a bug.");
        if bytes == 0 {
            return;
        }
        self.enter();
        let (source, target) = (from.0.ptr + from.1 as u64, to.0.ptr + to.1 as u64);
        // SAFETY: inside both.
        self.done(unsafe { (self.driver.memcpy_on_device)(target, source, bytes, self.stream) });
    }

    /// Zeros.
    #[allow(unsafe_code)]
    pub(crate) fn zero(&self, memory: &Memory) {
        if memory.len == 0 {
            return;
        }
        self.enter();
        // SAFETY: inside the piece.
        self.done(unsafe { (self.driver.memset)(memory.ptr, 0, memory.len, self.stream) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_few_and_waste_little() {
        assert_eq!(
            [0, 1, 513, 1 << 20, (1 << 20) + 1].map(rounded),
            [512, 512, 1024, 1 << 20, 2 << 20]
        );
    }

    #[test]
    fn a_piece_comes_back_for_about_its_size() {
        let pool = Pool::default();
        pool.put(1 << 20, 7);
        assert_eq!(pool.take(1 << 19), None);
        assert_eq!(pool.take(1 << 20), Some((1 << 20, 7)));
        assert_eq!(pool.take(1 << 20), None);
    }
}
