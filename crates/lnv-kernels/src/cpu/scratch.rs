//! Memory that a kernel needs while it runs.
//!
//! Decision: each thread keeps one piece per kind and type, grown to the largest size it was asked
//! for, so that a step allocates nothing once it has run. It is taken out of its place while in use:
//! a thread that waits inside one operation may be given a part of another, which then finds the place
//! empty and makes a piece of its own. Contents are unspecified: every kernel writes before it reads.

use std::cell::Cell;
use std::thread::LocalKey;

use crate::buffer::Aligned;

/// A thread's kept piece.
pub(crate) type Place<T> = LocalKey<Cell<Option<Aligned<T>>>>;

/// Runs `work` with at least `len` values of the thread's scratch, 64-byte aligned.
pub(crate) fn with<T, R>(
    place: &'static Place<T>,
    len: usize,
    work: impl FnOnce(&mut [T]) -> R,
) -> R
where
    T: Copy + bytemuck::Zeroable,
{
    let kept = place.take().filter(|kept| kept.as_slice().len() >= len);
    let mut piece = kept.unwrap_or_else(|| Aligned::zeroed(len));
    let result = work(&mut piece.as_mut_slice()[..len]);
    place.set(Some(piece));
    result
}

/// A pointer that several threads write through, each to places of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: only a way to carry the address; whoever writes through it says why no other thread does.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(values: &mut [T]) -> Shared<T> {
        Shared(values.as_mut_ptr())
    }

    /// The address of value `index`.
    ///
    /// # Safety
    /// `index` is within the slice that it was made of.
    #[inline(always)]
    pub(crate) unsafe fn at(self, index: usize) -> *mut T {
        // SAFETY: the caller's contract.
        unsafe { self.0.add(index) }
    }
}
