//! How code gets compiled for an instruction set.
//!
//! Decision: a [`Kernel`] is a struct of arguments with one generic `run`, which everything it calls inlines into. A
//! launcher runs it inside a function that has the target features, and which is itself never inlined: what is
//! launched has all the registers. Each of these functions lies in a module of its own, for rustc compiles the
//! kernels of one module in one piece, on one thread: all in one took two thirds of the time for which the crate
//! compiles.

use crate::cpu::simd::{Avx2, Avx512, Simd};
use crate::isa::Isa;

/// Work that is compiled once per instruction set. `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    /// Does the work.
    fn run<S: Simd>(self, s: S);
}

/// Runs a kernel with the instruction set, but without its dot products.
///
/// # Panics
/// The instruction set is scalar, or the processor lacks it.
pub(crate) fn launch<K: Kernel>(isa: Isa, kernel: K) {
    match isa {
        Isa::Avx2 | Isa::AvxVnni => launch_avx2(kernel),
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 | Isa::Amx => launch_avx512(kernel),
        Isa::Scalar => panic!("the scalar instruction set has no kernels. This is a bug."),
    }
}

/// A function that runs kernels, and its module.
macro_rules! launcher {
    ($(#[$doc:meta])* $name:ident, $module:ident, $token:ident, $isa:expr, $features:literal) => {
        mod $module {
            use super::*;

            #[inline(never)]
            #[target_feature(enable = $features)]
            pub(super) fn run<K: Kernel>(s: $token, kernel: K) {
                kernel.run(s);
            }
        }

        $(#[$doc])*
        ///
        /// # Panics
        /// The processor lacks the instructions.
        pub(crate) fn $name<K: Kernel>(kernel: K) {
            assert!(
                $isa.is_available(),
                "this processor lacks {}. This is a bug.",
                $isa
            );
            // SAFETY: the instruction set was asked for, and has these features and those of the token.
            unsafe { $module::run($token::new(), kernel) };
        }
    };
}

launcher! {
    /// Runs a kernel with registers of 8.
    launch_avx2, avx2, Avx2, Isa::Avx2, "avx2,fma,f16c"
}

launcher! {
    /// Runs a kernel that calls [`Ints::dot_bytes`](crate::cpu::int::Ints::dot_bytes) on registers of 8.
    launch_avx_vnni, avx_vnni, Avx2, Isa::AvxVnni, "avxvnni,avx2,fma,f16c"
}

launcher! {
    /// Runs a kernel with registers of 16.
    launch_avx512, avx512, Avx512, Isa::Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
}

launcher! {
    /// Runs a kernel that calls [`Ints::dot_bytes`](crate::cpu::int::Ints::dot_bytes) on registers of 16.
    launch_vnni, avx512_vnni, Avx512, Isa::Avx512Vnni,
    "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
}

launcher! {
    /// Runs a kernel that calls [`Simd::dot_bf16`].
    launch_bf16_dot, avx512_bf16, Avx512, Isa::Avx512Bf16,
    "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
}
