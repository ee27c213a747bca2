//! From the vision tower's width to the language model's: the spatial pooler (videos only), then two
//! linear layers.
//!
//! A video is pooled **before** it is projected, the order of `get_video_features`: the projector is
//! not linear, and pooling first leaves it a quarter of the rows.

use lnv_kernels::{Activation, Buffer, Epilogue, Ops, PoolMode};

use super::fingerprint::Fingerprint;
use super::layers::Linear;
use super::loader::Loader;
use crate::config::{LlavaNextVideoConfig, SpatialPoolMode};
use crate::error::{Error, Result};

/// `LlavaNextVideoMultiModalProjector`: `linear_2(act(linear_1(x)))`.
pub struct MultiModalProjector {
    linear_1: Linear,
    act: Activation,
    linear_2: Linear,
}

impl MultiModalProjector {
    /// Loads `multi_modal_projector.*`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn load(loader: &Loader<'_>, config: &LlavaNextVideoConfig) -> Result<Self> {
        let (k, d) = (config.projector_inputs(), config.text_config.hidden_size);
        let bias = config.multimodal_projector_bias;
        Ok(Self {
            linear_1: Linear::load(loader, "multi_modal_projector.linear_1", d, k, bias)?,
            act: config.projector_hidden_act,
            linear_2: Linear::load(loader, "multi_modal_projector.linear_2", d, d, bias)?,
        })
    }

    /// Bytes kept in memory.
    pub fn bytes(&self) -> usize {
        self.linear_1.bytes() + self.linear_2.bytes()
    }

    /// Adds its weights and settings.
    pub(super) fn fingerprint(&self, to: &mut Fingerprint) {
        let Self {
            linear_1,
            act,
            linear_2,
        } = self;
        linear_1.fingerprint(to);
        to.setting(act);
        linear_2.fingerprint(to);
    }

    /// `[rows, Dv * layers]` to `[rows, D]`.
    pub fn forward(&self, ops: &Ops, x: &Buffer) -> Buffer {
        let mut inner = ops.scratch(x.rows(), self.linear_1.out_features());
        self.linear_1
            .forward(ops, x, Epilogue::Store(Some(self.act)), &mut inner);
        let mut out = ops.buffer(x.rows(), self.linear_2.out_features());
        self.linear_2
            .forward(ops, &inner, Epilogue::Store(None), &mut out);
        out
    }
}

/// `LlavaNextVideoPooler` (`vision_resampler`): windows of `stride` by `stride` patches become one.
pub struct Pooler {
    side: usize,
    stride: usize,
    kind: PoolKind,
}

enum PoolKind {
    Plain(PoolMode),
    Conv(Linear),
}

impl Pooler {
    /// Builds the pooler; only the convolutional one has weights.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn load(loader: &Loader<'_>, config: &LlavaNextVideoConfig) -> Result<Self> {
        let kind = match config.spatial_pool_mode {
            SpatialPoolMode::Average => PoolKind::Plain(PoolMode::Average),
            SpatialPoolMode::Max => PoolKind::Plain(PoolMode::Max),
            SpatialPoolMode::Conv => PoolKind::Conv(load_conv(loader, config)?),
        };
        Ok(Self {
            side: config.vision_config.patches_per_side(),
            stride: config.spatial_pool_stride,
            kind,
        })
    }

    /// Adds its weights and settings.
    pub(super) fn fingerprint(&self, to: &mut Fingerprint) {
        let Self { side, stride, kind } = self;
        to.setting(&(side, stride));
        match kind {
            PoolKind::Plain(mode) => to.setting(mode),
            PoolKind::Conv(conv) => conv.fingerprint(to),
        }
    }

    /// Tokens of a pooled frame.
    pub fn tokens(&self) -> usize {
        (self.side / self.stride).pow(2)
    }

    /// `[frames * side², C]` to `[frames * tokens, C_out]`; an odd side loses its last row and column.
    ///
    /// # Errors
    /// The rows are not whole frames.
    pub fn forward(&self, ops: &Ops, x: &Buffer) -> Result<Buffer> {
        let per_frame = self.side * self.side;
        if !x.rows().is_multiple_of(per_frame) {
            return Err(Error::Config(format!(
                "{} vision features are no whole frames of {side} x {side} patches",
                x.rows(),
                side = self.side
            )));
        }
        let rows = x.rows() / per_frame * self.tokens();
        Ok(match &self.kind {
            PoolKind::Plain(mode) => {
                let mut out = ops.buffer(rows, x.cols());
                ops.pool(x, self.side, self.stride, *mode, &mut out);
                out
            }
            PoolKind::Conv(conv) => {
                let mut windows = ops.scratch(rows, self.stride * self.stride * x.cols());
                ops.pool_windows(x, self.side, self.stride, &mut windows);
                let mut out = ops.buffer(rows, conv.out_features());
                conv.forward(ops, &windows, Epilogue::Store(None), &mut out);
                out
            }
        })
    }
}

/// The convolution as a matrix over flattened windows: `[out, in, s, s]` to `[out, (s, s, in)]`.
fn load_conv(loader: &Loader<'_>, config: &LlavaNextVideoConfig) -> Result<Linear> {
    const NAME: &str = "vision_resampler.pool";
    let (s, c_in) = (config.spatial_pool_stride, config.vision_config.hidden_size);
    let c_out = config.spatial_pool_out_channels.unwrap_or(c_in);
    let arrange = |stored: &[f32]| {
        let mut matrix = Vec::with_capacity(stored.len());
        for out in 0..c_out {
            for cell in 0..s * s {
                let place = |channel| (out * c_in + channel) * s * s + cell;
                matrix.extend((0..c_in).map(|channel| stored[place(channel)]));
            }
        }
        matrix
    };
    let shape = [c_out, c_in, s, s];
    let weight = loader.reshaped(&format!("{NAME}.weight"), &shape, Some(&arrange))?;
    Ok(Linear::from_parts(
        weight,
        Some(loader.vector(&format!("{NAME}.bias"), c_out)?),
    ))
}
