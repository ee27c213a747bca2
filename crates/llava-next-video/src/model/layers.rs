//! The three layers that everything is made of, loaded by their checkpoint names.
//!
//! A struct holds packed weights; the arithmetic is an operation of [`Ops`]. Projections that read the
//! same input (q, k, v; gate, up) are packed as one weight, so that the input is streamed once.

use lnv_kernels::{Buffer, Epilogue, Ops, Vector, Weight, WeightData, WeightDtype, WeightPart};

use super::weights::Checkpoint;
use crate::config::Dtype;
use crate::error::{Error, Result};

/// Where weights come from and how they are to be kept: what every `load` needs.
#[derive(Clone, Copy)]
pub struct Loader<'a> {
    /// Device and instruction set.
    pub ops: &'a Ops,
    /// The tensors.
    pub checkpoint: &'a Checkpoint,
    /// The type that matrices are kept in.
    pub dtype: Dtype,
    /// Called with the bytes of each tensor once it is loaded.
    pub progress: &'a (dyn Fn(usize) + Sync),
}

impl Loader<'_> {
    /// The matrices `names`, each `(name, rows)` with `k` columns, packed one under the other.
    pub fn matrix(&self, names: &[(String, usize)], k: usize) -> Result<Weight> {
        let mut parts = Vec::with_capacity(names.len());
        for (name, n) in names {
            let data = self.checkpoint.tensor(name, &[*n, k])?;
            parts.push(WeightPart { data, n: *n });
        }
        self.pack(&parts, k)
    }

    /// Packs matrices that are already at hand.
    pub fn pack(&self, parts: &[WeightPart<'_>], k: usize) -> Result<Weight> {
        let dtype = match self.dtype {
            Dtype::F32 => WeightDtype::F32,
            Dtype::Bf16 => WeightDtype::Bf16,
            Dtype::F16 => WeightDtype::F16,
        };
        let weight = self
            .ops
            .pack(parts, k, dtype)
            .map_err(|e| Error::Checkpoint(e.to_string()))?;
        (self.progress)(parts.iter().map(|part| stored_bytes(&part.data)).sum());
        Ok(weight)
    }

    /// A vector of `n` values, rounded to the model's type as the reference keeps it.
    pub fn vector(&self, name: &str, n: usize) -> Result<Vector> {
        Ok(Vector::new(self.rounded(name, &[n])?))
    }

    /// The values of any tensor, rounded to the model's type.
    pub fn rounded(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let mut values = self.checkpoint.values(name, shape)?;
        (self.progress)(stored_bytes(&self.checkpoint.tensor(name, shape)?));
        match self.dtype {
            Dtype::F32 => {}
            Dtype::Bf16 => {
                values
                    .iter_mut()
                    .for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
            }
            Dtype::F16 => values
                .iter_mut()
                .for_each(|x| *x = half::f16::from_f32(*x).to_f32()),
        }
        Ok(values)
    }
}

fn stored_bytes(data: &WeightData<'_>) -> usize {
    match data {
        WeightData::F32(b) | WeightData::Bf16(b) | WeightData::F16(b) => b.len(),
    }
}

/// `y = x Wᵀ + b`; `torch.nn.Linear`, perhaps several of them side by side.
pub struct Linear {
    weight: Weight,
    bias: Option<Vector>,
}

impl Linear {
    /// Loads `{name}.weight` and, where `bias`, `{name}.bias`.
    pub fn load(loader: &Loader<'_>, name: &str, n: usize, k: usize, bias: bool) -> Result<Self> {
        Self::load_fused(loader, &[(name.to_owned(), n)], k, bias)
    }

    /// Loads several projections of one input as one.
    pub fn load_fused(
        loader: &Loader<'_>,
        parts: &[(String, usize)],
        k: usize,
        bias: bool,
    ) -> Result<Self> {
        let named = |suffix: &str| -> Vec<(String, usize)> {
            parts
                .iter()
                .map(|(name, n)| (format!("{name}.{suffix}"), *n))
                .collect()
        };
        let weight = loader.matrix(&named("weight"), k)?;
        let bias = match bias {
            false => None,
            true => {
                let mut values = Vec::new();
                for (name, n) in named("bias") {
                    values.extend(loader.rounded(&name, &[n])?);
                }
                Some(Vector::new(values))
            }
        };
        Ok(Self { weight, bias })
    }

    /// From a packed weight.
    pub fn from_parts(weight: Weight, bias: Option<Vector>) -> Self {
        Self { weight, bias }
    }

    /// Output columns.
    pub fn out_features(&self) -> usize {
        self.weight.n()
    }

    /// Bytes kept in memory.
    pub fn bytes(&self) -> usize {
        self.weight.bytes()
    }

    /// `x [rows, k]` to `out [rows, n]`.
    pub fn forward(&self, ops: &Ops, x: &Buffer, then: Epilogue, out: &mut Buffer) {
        ops.linear(x, &self.weight, self.bias.as_ref(), then, out);
    }
}

/// `torch.nn.LayerNorm` over the columns.
pub struct LayerNorm {
    weight: Vector,
    bias: Vector,
    eps: f32,
}

impl LayerNorm {
    /// Loads `{name}.weight` and `{name}.bias`.
    pub fn load(loader: &Loader<'_>, name: &str, n: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: loader.vector(&format!("{name}.weight"), n)?,
            bias: loader.vector(&format!("{name}.bias"), n)?,
            eps: eps as f32,
        })
    }

    /// Normalises each row of `x` into `out`.
    pub fn forward(&self, ops: &Ops, x: &Buffer, out: &mut Buffer) {
        ops.layer_norm(x, &self.weight, &self.bias, self.eps, out);
    }
}

/// Root-mean-square norm over the columns (`LlamaRMSNorm`).
pub struct RmsNorm {
    weight: Vector,
    eps: f32,
}

impl RmsNorm {
    /// Loads `{name}.weight`.
    pub fn load(loader: &Loader<'_>, name: &str, n: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: loader.vector(&format!("{name}.weight"), n)?,
            eps: eps as f32,
        })
    }

    /// Normalises each row of `x` into `out`.
    pub fn forward(&self, ops: &Ops, x: &Buffer, out: &mut Buffer) {
        ops.rms_norm(x, &self.weight, self.eps, out);
    }
}
