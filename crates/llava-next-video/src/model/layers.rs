//! The three layers that everything is made of, loaded by their checkpoint names.
//!
//! A struct holds packed weights; the arithmetic is an operation of [`Ops`]. Projections that read the
//! same input (q, k, v; gate, up) are packed as one weight, so that the input is streamed once.

use lnv_kernels::{Activation, Buffer, Epilogue, Ops, Vector, Weight};

use super::fingerprint::Fingerprint;
use super::loader::Loader;
use crate::error::Result;

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

    /// Its weight alone.
    pub(super) fn into_weight(self) -> Weight {
        self.weight
    }

    /// Output columns.
    pub fn out_features(&self) -> usize {
        self.weight.n()
    }

    /// Bytes kept in memory.
    pub fn bytes(&self) -> usize {
        self.weight.bytes()
    }

    /// Adds its weights.
    pub(super) fn fingerprint(&self, to: &mut Fingerprint) {
        let Self { weight, bias } = self;
        to.weight(weight);
        to.vector(bias.as_ref());
    }

    /// `x [rows, k]` to `out [rows, n]`.
    pub fn forward(&self, ops: &Ops, x: &Buffer, then: Epilogue, out: &mut Buffer) {
        ops.linear(x, &self.weight, self.bias.as_ref(), then, out);
    }

    /// As the gate and up projections of a gated MLP, one above the other: `x [rows, k]` to
    /// `act(gate) * up [rows, n / 2]`; `gate_up [rows, n]` is scratch.
    pub fn forward_gated(
        &self,
        ops: &Ops,
        x: &Buffer,
        act: Activation,
        buffers: (&mut Buffer, &mut Buffer),
    ) {
        ops.gated_linear(x, &self.weight, self.bias.as_ref(), act, buffers);
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

    /// Adds its weights.
    pub(super) fn fingerprint(&self, to: &mut Fingerprint) {
        let Self { weight, bias, eps } = self;
        to.vector(Some(weight));
        to.vector(Some(bias));
        to.values(&[*eps]);
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
