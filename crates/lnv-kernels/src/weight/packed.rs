//! Where a packed weight's bytes lie: in memory of their own, or in someone else's.
//!
//! Decision: bytes are shared, never copied, and start on a 64-byte boundary. Whoever maps a file
//! keeps the mapping in an [`Arc`] and hands out ranges of it: this crate opens no file, and a
//! mapping lives as long as the last weight inside it. The owner is asked for its bytes each time,
//! and the range is checked each time, so an owner that answers differently is a panic, not a read
//! of memory that is not there. On a GPU they are in its memory, and the host sees copies only.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::KernelError;
use crate::buffer::Aligned;
#[cfg(feature = "cuda")]
use crate::cuda::memory::Memory as DeviceMemory;

/// The bytes of a packed weight. Cheap to clone: the clones share the memory.
#[derive(Clone)]
pub struct PackedBytes(Memory);

#[derive(Clone)]
enum Memory {
    Own(Arc<Aligned<u8>>),
    Shared(Arc<dyn AsRef<[u8]> + Send + Sync>, Range<usize>),
    #[cfg(feature = "cuda")]
    Device(Arc<DeviceMemory>),
}

impl PackedBytes {
    /// A part of someone else's memory, a mapped file for example, which must not change while the
    /// weight lives.
    ///
    /// # Errors
    /// The range is not inside the memory, or does not start on a 64-byte boundary of the address
    /// space.
    pub fn shared(
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        range: Range<usize>,
    ) -> Result<PackedBytes, KernelError> {
        let bytes = (*owner).as_ref();
        let Some(part) = bytes.get(range.clone()) else {
            return Err(KernelError::PackedRange {
                start: range.start,
                end: range.end,
                len: bytes.len(),
            });
        };
        if part.as_ptr().align_offset(64) != 0 {
            return Err(KernelError::PackedAlignment(range.start));
        }
        Ok(PackedBytes(Memory::Shared(owner, range)))
    }

    /// A copy of these bytes, which may lie at any address.
    pub fn copied(bytes: &[u8]) -> PackedBytes {
        let mut copy = Aligned::zeroed(bytes.len());
        copy.as_mut_slice().copy_from_slice(bytes);
        PackedBytes::own(copy)
    }

    pub(crate) fn own(bytes: Aligned<u8>) -> PackedBytes {
        PackedBytes(Memory::Own(Arc::new(bytes)))
    }

    /// The memory, where it is this weight's alone.
    pub(crate) fn into_own(self) -> Option<Aligned<u8>> {
        match self.0 {
            Memory::Own(bytes) => Arc::into_inner(bytes),
            _ => None,
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(memory: DeviceMemory) -> PackedBytes {
        PackedBytes(Memory::Device(Arc::new(memory)))
    }

    /// The GPU's memory that holds the bytes, if one does.
    #[cfg(feature = "cuda")]
    pub(crate) fn device(&self) -> Option<&DeviceMemory> {
        match &self.0 {
            Memory::Device(memory) => Some(memory),
            Memory::Own(_) | Memory::Shared(..) => None,
        }
    }

    /// The bytes, brought from the GPU if they are there.
    pub fn to_host(&self) -> Cow<'_, [u8]> {
        #[cfg(feature = "cuda")]
        if let Memory::Device(memory) = &self.0 {
            let mut bytes = vec![0; memory.len()];
            memory.cuda().read(memory, 0, &mut bytes);
            return Cow::Owned(bytes);
        }
        Cow::Borrowed(self.as_slice())
    }

    /// The bytes.
    ///
    /// # Panics
    /// The owner of the memory has fewer bytes than when it was shared; they are on a GPU.
    pub fn as_slice(&self) -> &[u8] {
        match &self.0 {
            Memory::Own(bytes) => bytes.as_slice(),
            Memory::Shared(owner, range) => &(**owner).as_ref()[range.clone()],
            #[cfg(feature = "cuda")]
            Memory::Device(_) => panic!("a weight's bytes are on a GPU. This is a bug."),
        }
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        match &self.0 {
            Memory::Own(bytes) => bytes.bytes(),
            Memory::Shared(_, range) => range.len(),
            #[cfg(feature = "cuda")]
            Memory::Device(memory) => memory.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for PackedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedBytes[{}]", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 256 bytes of which the first is at a 64-byte boundary.
    fn memory() -> Arc<dyn AsRef<[u8]> + Send + Sync> {
        struct Mapped(Aligned<u8>);
        impl AsRef<[u8]> for Mapped {
            fn as_ref(&self) -> &[u8] {
                self.0.as_slice()
            }
        }
        let mut bytes = Aligned::zeroed(256);
        bytes.as_mut_slice()[64] = 7;
        Arc::new(Mapped(bytes))
    }

    #[test]
    fn a_part_of_shared_memory_is_used_where_it_lies() {
        let owner = memory();
        let address = (*owner).as_ref().as_ptr() as usize;
        let part = PackedBytes::shared(owner, 64..192).expect("aligned and inside");
        assert_eq!((part.len(), part.as_slice()[0]), (128, 7));
        assert_eq!(part.as_slice().as_ptr() as usize, address + 64);
        let copy = PackedBytes::copied(&part.as_slice()[1..]);
        assert_eq!(
            (copy.len(), copy.as_slice().as_ptr().align_offset(64)),
            (127, 0)
        );
    }

    #[test]
    fn wrong_parts_are_told() {
        let error = |range| {
            let wrong = PackedBytes::shared(memory(), range).expect_err("wrong");
            wrong.to_string()
        };
        assert!(error(64..300).contains("64 to 300"), "{}", error(64..300));
        assert!(
            error(32..64).contains("multiple of 64"),
            "{}",
            error(32..64)
        );
    }
}
