//! The tile registers of AMX: eight matrices of 16 rows of 64 bytes, and their products.
//!
//! Decision: the compiler's own functions for these instructions are not stable, so they are written
//! as assembly, one instruction a function; registers are numbered by constants. [`Tiles`] is the
//! proof that this thread's registers are set up, and gives them back when dropped, so that whatever
//! runs next on the core saves and restores nothing for them. Linux hands the registers out on
//! request only; [`is_available`] asks once for the whole process.
//!
//! All kernels lay out the registers alike: 0 to 3 are sums, of two tiles of rows (0, 1 and 2, 3) and
//! two of columns; 4 and 5 are right factors, 6 and 7 left ones. A register of sums has 16 columns of
//! 32 bits.

mod formats;

use std::arch::asm;
use std::sync::OnceLock;

pub(crate) use formats::{AmxBf16, AmxBnb4, AmxInt8, AmxQ4, AmxQ8, InOrder};

/// Rows of a register.
pub(crate) const ROWS: usize = 16;
/// Bytes of a row of a register.
pub(crate) const ROW_BYTES: usize = 64;
/// Packed elements of a row of a register.
pub(crate) const PIECE: usize = ROW_BYTES / 4;

/// Whether the processor has AMX for bytes and for bf16, and the operating system lets us use it.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| processor_has_it() && permitted())
}

#[allow(unused_unsafe)] // a later Rust than this crate asks for calls the instruction safe
fn processor_has_it() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    // SAFETY: every x86-64 processor has the instruction; leaf 7 is asked for only where there is one.
    let features = unsafe {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        if __cpuid(0).eax < 7 {
            return false;
        }
        __cpuid_count(7, 0).edx
    };
    features & (BF16 | TILE | INT8) == BF16 | TILE | INT8
}

/// Asks the kernel for the registers' contents (18) on behalf of all threads.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: a system call that reads and writes no memory of ours.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        ) == 0
    }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// This thread's tile registers, set up for so many rows of the left factor.
pub(crate) struct Tiles {
    rows: usize,
}

impl Tiles {
    /// No registers yet.
    ///
    /// # Panics
    /// AMX is not available.
    pub(crate) fn new() -> Tiles {
        assert!(is_available(), "this processor lacks AMX. This is a bug.");
        Tiles { rows: 0 }
    }

    /// Sets the registers up for left factors and sums of `rows` rows in all, 1 to 32, in one register
    /// or two, and right factors of 16. Their contents are lost if they were set up for others.
    #[inline(always)]
    pub(crate) fn set(&mut self, rows: usize) {
        if self.rows == rows {
            return;
        }
        assert!(rows > 0 && rows <= 2 * ROWS);
        self.rows = rows;
        let first = rows.min(ROWS) as u8;
        // A register must have a row, used or not.
        let second = (rows.saturating_sub(ROWS) as u8).max(1);
        let all = ROWS as u8;
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        config.row_bytes[..8].fill(ROW_BYTES as u16);
        config.rows[..8].copy_from_slice(&[first, first, second, second, all, all, first, second]);
        // SAFETY: AMX is there, `new` asserted; a whole configuration, within its limits.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, preserves_flags))
        };
    }

    /// Whether there are rows in the second registers.
    #[inline(always)]
    pub(crate) fn two(&self) -> bool {
        self.rows > ROWS
    }

    /// Rows of the left factor.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: AMX is there.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
    }
}

/// Register T from memory, a row each `stride` bytes.
///
/// # Safety
/// Inside [`Tiles::set`]; all rows of the register can be read.
#[inline(always)]
pub(crate) unsafe fn load<const T: u8>(from: *const u8, stride: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("tileloadd tmm{t}, [{from} + {stride}*1]", t = const T, from = in(reg) from,
            stride = in(reg) stride, options(nostack, preserves_flags, readonly));
    }
}

/// Register T to memory, a row each `stride` bytes.
///
/// # Safety
/// Inside [`Tiles::set`]; all rows of the register can be written.
#[inline(always)]
pub(crate) unsafe fn store<const T: u8>(to: *mut u8, stride: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("tilestored [{to} + {stride}*1], tmm{t}", t = const T, to = in(reg) to,
            stride = in(reg) stride, options(nostack, preserves_flags));
    }
}

/// Register T becomes zero.
///
/// # Safety
/// Inside [`Tiles::set`].
#[inline(always)]
pub(crate) unsafe fn zero<const T: u8>() {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("tilezero tmm{t}", t = const T, options(nostack, preserves_flags, nomem));
    }
}

/// What registers are multiplied as.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// Signed bytes on the left, unsigned ones on the right; exact.
    SignedUnsigned,
    /// Signed bytes on both sides; exact.
    Signed,
    /// bf16. For each column of sums: a chain of fused multiply-adds in f32 over the even values of k,
    /// from zero on, one over the odd ones; both added, then added to the sum. Subnormal values count
    /// as zero.
    Bf16,
}

/// A multiplication, as a type.
pub(crate) trait Multiply: Copy + Send + Sync + 'static {
    const KIND: Kind;
}

macro_rules! multiplications {
    ($($name:ident)*) => {$(
        #[derive(Clone, Copy)]
        pub(crate) struct $name;
        impl Multiply for $name {
            const KIND: Kind = Kind::$name;
        }
    )*};
}
multiplications!(SignedUnsigned Signed Bf16);

/// `sums C += left A * right B`.
///
/// # Safety
/// Inside [`Tiles::set`].
#[inline(always)]
pub(crate) unsafe fn multiply<M: Multiply, const C: u8, const A: u8, const B: u8>() {
    macro_rules! instruction {
        ($name:literal) => {
            asm!(concat!($name, " tmm{c}, tmm{a}, tmm{b}"), c = const C, a = const A, b = const B,
                options(nostack, preserves_flags, nomem))
        };
    }
    // SAFETY: the caller's contract.
    unsafe {
        match M::KIND {
            Kind::SignedUnsigned => instruction!("tdpbsud"),
            Kind::Signed => instruction!("tdpbssd"),
            Kind::Bf16 => instruction!("tdpbf16ps"),
        }
    }
}

/// Multiplies registers of zeros, `times` times into each of the four sums: the peak. Returns how many
/// operations that were.
///
/// # Panics
/// AMX is not available.
pub(crate) fn spin<M: Multiply>(times: usize) -> usize {
    let mut tiles = Tiles::new();
    tiles.set(2 * ROWS);
    // SAFETY: they were just set up.
    unsafe {
        zero_sums();
        zero::<4>();
        zero::<5>();
        zero::<6>();
        zero::<7>();
        for _ in 0..times {
            multiply::<M, 0, 6, 4>();
            multiply::<M, 1, 6, 5>();
            multiply::<M, 2, 7, 4>();
            multiply::<M, 3, 7, 5>();
        }
    }
    let values = match M::KIND {
        Kind::Bf16 => ROW_BYTES / 2,
        Kind::Signed | Kind::SignedUnsigned => ROW_BYTES,
    };
    times * 4 * 2 * ROWS * ROWS * values
}

/// The sums become zero.
///
/// # Safety
/// Inside [`Tiles::set`].
#[inline(always)]
pub(crate) unsafe fn zero_sums() {
    // SAFETY: the caller's contract.
    unsafe {
        zero::<0>();
        zero::<1>();
        zero::<2>();
        zero::<3>();
    }
}

/// The sums from `[rows, 32]` values of 32 bits.
///
/// # Safety
/// They can be read.
#[inline(always)]
pub(crate) unsafe fn load_sums(tiles: &Tiles, from: *const f32, stride: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        load::<0>(from.cast(), 4 * stride);
        load::<1>(from.add(ROWS).cast(), 4 * stride);
        if tiles.two() {
            let from = from.add(ROWS * stride);
            load::<2>(from.cast(), 4 * stride);
            load::<3>(from.add(ROWS).cast(), 4 * stride);
        }
    }
}

/// The sums to `[rows, 32]` values of 32 bits, rows `stride` values apart.
///
/// # Safety
/// They can be written.
#[inline(always)]
pub(crate) unsafe fn store_sums(tiles: &Tiles, to: *mut f32, stride: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        store::<0>(to.cast(), 4 * stride);
        store::<1>(to.add(ROWS).cast(), 4 * stride);
        if tiles.two() {
            let to = to.add(ROWS * stride);
            store::<2>(to.cast(), 4 * stride);
            store::<3>(to.add(ROWS).cast(), 4 * stride);
        }
    }
}

/// The sums plus one product: left factors of `rows` rows of 64 bytes one after the other at `a`; right
/// factors of 32 columns at `b`, rows `b_stride` bytes apart.
///
/// # Safety
/// Inside [`Tiles::set`]; the factors can be read.
#[inline(always)]
pub(crate) unsafe fn add_product<M: Multiply>(
    tiles: &Tiles,
    a: *const u8,
    (b, b_stride): (*const u8, usize),
) {
    // SAFETY: the caller's contract.
    unsafe {
        load::<6>(a, ROW_BYTES);
        load::<4>(b, b_stride);
        load::<5>(b.add(ROW_BYTES), b_stride);
        if tiles.two() {
            load::<7>(a.add(ROWS * ROW_BYTES), ROW_BYTES);
        }
        multiply::<M, 0, 6, 4>();
        multiply::<M, 1, 6, 5>();
        if tiles.two() {
            multiply::<M, 2, 7, 4>();
            multiply::<M, 3, 7, 5>();
        }
    }
}
