//! What can go wrong that is not a bug of the caller: the machine lacks something, or the data that
//! came from a file has the wrong size. Each sentence says what to do.

/// An error that a user can act on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// `LNV_ISA` names no instruction set.
    #[error(
        "LNV_ISA is \"{0}\"; it takes scalar, avx2, avxvnni, avx512, avx512vnni, avx512bf16 or amx"
    )]
    UnknownIsa(String),
    /// `LNV_ISA` names an instruction set that this processor lacks.
    #[error("LNV_ISA asks for {wanted}, which this processor lacks; it has {available}")]
    MissingIsa {
        /// What was asked for.
        wanted: String,
        /// What the processor has, comma-separated.
        available: String,
    },
    /// A device name that is neither `cpu` nor `cuda[:N]`.
    #[error("\"{0}\" is no device; it takes cpu, cuda or cuda:N")]
    UnknownDevice(String),
    /// CUDA was asked for, and the program was built without it.
    #[error("this program was built without CUDA, so it cannot use {0}; use --device cpu")]
    NoCuda(String),
    /// The GPU, its driver or its memory: the sentence says what is wrong.
    #[error("{0}")]
    Cuda(String),
    /// A weight's bytes do not make up its shape.
    #[error("a weight of {rows} rows of {k} values takes {expected} bytes, but there are {found}")]
    WeightSize {
        /// Rows of the part (its `n`).
        rows: usize,
        /// Values in a row.
        k: usize,
        /// Bytes that the shape takes.
        expected: usize,
        /// Bytes that were given.
        found: usize,
    },
    /// A row of a weight is too long for the integer sums of its type.
    #[error(
        "a weight of rows of {k} values cannot be 8-bit (at most {limit}); choose another type"
    )]
    WeightDepth {
        /// Values in a row.
        k: usize,
        /// The most that there may be.
        limit: usize,
    },
    /// A row of a weight does not divide into the groups of its type.
    #[error(
        "a weight of rows of {k} values cannot be 4-bit (no multiple of {group}); choose another type"
    )]
    WeightGroups {
        /// Values in a row.
        k: usize,
        /// Values in a group.
        group: usize,
    },
    /// The bytes of a packed weight are not as many as its shape takes.
    #[error(
        "a packed weight of {n} rows of {k} values takes {expected} bytes, but there are {found}; \
         pack it again"
    )]
    PackedSize {
        /// Rows.
        n: usize,
        /// Values in a row.
        k: usize,
        /// Bytes that the shape takes.
        expected: usize,
        /// Bytes that were given.
        found: usize,
    },
    /// The bytes of a packed weight are not inside the memory that was given.
    #[error(
        "a packed weight at bytes {start} to {end} is not inside the {len} bytes that are there; \
         the file is cut off or not what it says"
    )]
    PackedRange {
        /// The first byte.
        start: usize,
        /// The byte after the last.
        end: usize,
        /// Bytes that are there.
        len: usize,
    },
    /// The bytes of a packed weight start at an address that is no multiple of 64.
    #[error(
        "a packed weight starts at byte {0}, whose address is no multiple of 64; \
         write it at a multiple of 64"
    )]
    PackedAlignment(usize),
}
