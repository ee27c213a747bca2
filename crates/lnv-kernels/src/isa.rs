//! Which instructions run, and on which device.
//!
//! Decision: the instruction set is chosen once, at run time, from what the processor reports, so
//! one binary serves every x86-64 machine. `LNV_ISA` forces another: to test it, or to
//! reproduce the bits of another machine. The fastest is the highest, except that the bf16 dot product
//! is left alone where it is slower than f32 arithmetic. Asking for more than the machine has is an error, never a
//! silent downgrade.

use std::fmt;
use std::str::FromStr;

use crate::KernelError;

/// An instruction set that the kernels are written for, from slow to fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust: the reference functions. Runs on every processor.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX2 with the byte dot product (AVX-VNNI), which quantised weights use: Intel's processors without AVX-512
    /// since 2021.
    AvxVnni,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with the byte dot product (VNNI), which quantised weights use.
    Avx512Vnni,
    /// The same with the bf16 dot product.
    Avx512Bf16,
    /// The same with the tile registers of AMX for bytes and bf16.
    Amx,
}

impl Isa {
    /// All instruction sets, from slow to fast.
    const ALL: [Isa; 7] = [
        Isa::Scalar,
        Isa::Avx2,
        Isa::AvxVnni,
        Isa::Avx512,
        Isa::Avx512Vnni,
        Isa::Avx512Bf16,
        Isa::Amx,
    ];

    /// The fastest instruction set of this processor, or the one that `LNV_ISA` names.
    ///
    /// # Errors
    /// `LNV_ISA` names no instruction set, or one that this processor lacks.
    pub fn detect() -> Result<Isa, KernelError> {
        match std::env::var("LNV_ISA") {
            Ok(name) => Isa::from_name(&name),
            Err(_) => Ok(Isa::fastest()),
        }
    }

    /// The instruction sets that this processor has, from slow to fast; the first is `Scalar`.
    pub fn available() -> Vec<Isa> {
        Isa::ALL
            .into_iter()
            .filter(|isa| isa.is_available())
            .collect()
    }

    /// Whether this processor has it.
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        // Every processor with the bf16 dot product has the byte dot product too.
        let vnni = avx512 && is_x86_feature_detected!("avx512vnni");
        match self {
            Isa::Scalar => true,
            Isa::Avx2 => avx2,
            Isa::AvxVnni => avx2 && is_x86_feature_detected!("avxvnni"),
            Isa::Avx512 => avx512,
            Isa::Avx512Vnni => vnni,
            Isa::Avx512Bf16 => vnni && is_x86_feature_detected!("avx512bf16"),
            Isa::Amx => Isa::Avx512Bf16.is_available() && crate::cpu::amx::is_available(),
        }
    }

    /// Whether this processor has it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Isa::Scalar
    }

    /// The fastest instruction set of this processor.
    fn fastest() -> Isa {
        let slow_bf16 = |isa: &Isa| *isa == Isa::Avx512Bf16 && has_slow_bf16();
        let mut best = Isa::available();
        best.retain(|isa| !slow_bf16(isa));
        best.last().copied().unwrap_or(Isa::Scalar)
    }

    /// The widest registers of this processor, for work whose bits are the same everywhere, so that
    /// `LNV_ISA` is not asked; `None` if there are no kernels for it.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn widest() -> Option<Isa> {
        [Isa::Avx512, Isa::Avx2]
            .into_iter()
            .find(|isa| isa.is_available())
    }

    fn from_name(name: &str) -> Result<Isa, KernelError> {
        let isa = Isa::ALL
            .into_iter()
            .find(|isa| isa.to_string() == name)
            .ok_or_else(|| KernelError::UnknownIsa(name.to_string()))?;
        if isa.is_available() {
            return Ok(isa);
        }
        let names: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
        Err(KernelError::MissingIsa {
            wanted: isa.to_string(),
            available: names.join(", "),
        })
    }
}

/// Whether the bf16 dot product is slower than f32 arithmetic. Measured on two cores: 190 GFLOP/s
/// against 383 on an Emerald Rapids, 450 against about 230 on a Zen 4; other processors are taken to be
/// as their maker's are.
#[cfg(target_arch = "x86_64")]
fn has_slow_bf16() -> bool {
    crate::cpu::is_intel()
}

/// As above.
#[cfg(not(target_arch = "x86_64"))]
fn has_slow_bf16() -> bool {
    false
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
        })
    }
}

/// Where the arithmetic runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Device {
    /// The processor.
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
}

impl Device {
    /// What the environment variable `LNV_DEVICE` names; without it the processor.
    ///
    /// # Errors
    /// It names no device.
    pub fn preferred() -> Result<Device, KernelError> {
        std::env::var("LNV_DEVICE").map_or(Ok(Device::Cpu), |name| name.parse())
    }
}

impl FromStr for Device {
    type Err = KernelError;

    /// Takes `cpu`, `cuda` (the first device) or `cuda:N`.
    fn from_str(name: &str) -> Result<Device, KernelError> {
        let unknown = || KernelError::UnknownDevice(name.to_string());
        match name.split_once(':') {
            None if name == "cpu" => Ok(Device::Cpu),
            None if name == "cuda" => Ok(Device::Cuda(0)),
            Some(("cuda", number)) => number.parse().map(Device::Cuda).map_err(|_| unknown()),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_isa_has_a_name_and_an_unknown_name_is_refused() {
        assert_eq!(Isa::from_name("scalar"), Ok(Isa::Scalar));
        let error = Isa::from_name("sse9").expect_err("wrong");
        assert!(
            error
                .to_string()
                .contains("scalar, avx2, avxvnni, avx512, avx512vnni, avx512bf16 or amx"),
            "{error}"
        );
        assert_eq!(Isa::available()[0], Isa::Scalar);
        for isa in Isa::ALL {
            let found = Isa::from_name(&isa.to_string());
            assert_eq!(found.is_ok(), isa.is_available(), "{isa}");
        }
        let sorted = Isa::available().is_sorted() && Isa::ALL.is_sorted();
        assert!(sorted, "from slow to fast");
    }

    #[test]
    fn devices_parse_and_print() {
        assert_eq!("cpu".parse(), Ok(Device::Cpu));
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(Device::Cuda(3)));
        for wrong in ["", "cpu:0", "cuda:", "cuda:x", "tpu"] {
            assert!(wrong.parse::<Device>().is_err(), "{wrong}");
        }
        assert_eq!(Device::Cuda(3).to_string(), "cuda:3");
    }
}
