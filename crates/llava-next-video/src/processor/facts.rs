//! What the processor must know of the model, as plain numbers, so that a processor can be made and
//! tested without a configuration.

use super::anyres::AnyResLayout;
use super::image_processor::LlavaNextImageProcessor;
use super::resize::Arithmetic;
use super::settings::{PixelSettings, TargetSize};
use crate::config::LlavaNextVideoConfig;
use crate::error::{Error, Result};
use crate::media::ImageSize;

/// Facts of a model's `config.json` that the processor needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFacts {
    /// `text_config.model_type`, such as `llama`: chooses a chat template where the checkpoint has none.
    pub text_model_type: String,
    /// `vision_config.image_size`: the side of a tile in pixels.
    pub image_size: usize,
    /// `vision_config.patch_size` in pixels.
    pub patch_size: usize,
    /// The vision tower puts a CLS token before the patches (CLIP does, SigLIP does not).
    pub has_cls: bool,
    /// `vision_feature_select_strategy`: `default` or `full`.
    pub vision_feature_select_strategy: String,
    /// `image_token_index`.
    pub image_token_id: u32,
    /// `video_token_index`.
    pub video_token_id: u32,
    /// `spatial_pool_stride`.
    pub spatial_pool_stride: usize,
    /// `image_grid_pinpoints`.
    pub image_grid_pinpoints: Vec<ImageSize>,
}

impl From<&LlavaNextVideoConfig> for ModelFacts {
    fn from(config: &LlavaNextVideoConfig) -> Self {
        let vision = &config.vision_config;
        Self {
            text_model_type: config.text_config.backbone.name().to_owned(),
            image_size: vision.image_size,
            patch_size: vision.patch_size,
            has_cls: vision.has_class_token(),
            vision_feature_select_strategy: config.vision_feature_select_strategy.name().to_owned(),
            image_token_id: config.image_token_index,
            video_token_id: config.video_token_index,
            spatial_pool_stride: config.spatial_pool_stride,
            image_grid_pinpoints: config.image_grid_pinpoints.clone(),
        }
    }
}

impl ModelFacts {
    /// The layout that the model gives an image.
    ///
    /// # Errors
    /// An empty image or an impossible configuration.
    pub fn layout(&self, size: ImageSize) -> Result<AnyResLayout> {
        if self.patch_size == 0 || self.image_size < self.patch_size {
            return Err(Error::Config(format!(
                "vision_config has image_size {} and patch_size {}: an image must hold at least one patch",
                self.image_size, self.patch_size
            )));
        }
        AnyResLayout::new(
            size,
            &self.image_grid_pinpoints,
            self.image_size,
            self.patch_size,
        )
    }

    /// Feature vectors of one video frame: `(patches per side / stride)^2`.
    ///
    /// # Errors
    /// The pooler would have nothing to pool.
    pub fn tokens_per_frame(&self) -> Result<usize> {
        let side = self.image_size / self.patch_size.max(1);
        match side.checked_div(self.spatial_pool_stride) {
            Some(pooled) if pooled > 0 => Ok(pooled * pooled),
            _ => Err(Error::Config(format!(
                "spatial_pool_stride {} does not fit the {side} x {side} patches of a frame",
                self.spatial_pool_stride
            ))),
        }
    }

    /// Refuses a layout that the model would not pack the same way.
    ///
    /// # Errors
    /// The image processor's settings do not belong to this model.
    pub fn check_layout(&self, layout: &AnyResLayout, tile: ImageSize) -> Result<()> {
        self.check_pixels("image", tile)?;
        let own = self.layout(layout.image_size)?;
        if own != *layout {
            return Err(Error::Config(format!(
                "the image processor cuts an image of {} x {} pixels into {} tiles for {} features, but the model \
                 expects {} tiles and {} features: make image_grid_pinpoints, crop_size and patch_size of the \
                 processor's files those of config.json",
                layout.image_size.width,
                layout.image_size.height,
                layout.tiles,
                layout.feature_tokens(),
                own.tiles,
                own.feature_tokens()
            )));
        }
        Ok(())
    }

    /// Refuses pictures that the vision tower cannot take.
    ///
    /// # Errors
    /// The size is not the model's.
    pub fn check_pixels(&self, what: &str, size: ImageSize) -> Result<()> {
        if size == ImageSize::square(self.image_size) {
            return Ok(());
        }
        Err(Error::Config(format!(
            "the {what} processor makes pictures of {} x {} pixels, but the vision tower takes {n} x {n}: set size and \
             crop_size in the processor's files to {n}",
            size.width,
            size.height,
            n = self.image_size
        )))
    }

    /// Settings that fit the model, for checkpoints without a processor file.
    pub(super) fn settings(&self, arithmetic: Arithmetic) -> PixelSettings {
        PixelSettings {
            size: TargetSize::ShortestEdge(self.image_size),
            crop_size: ImageSize::square(self.image_size),
            ..PixelSettings::class_default(arithmetic)
        }
    }

    /// As [`ModelFacts::settings`], with the model's pinpoints.
    pub(super) fn image_processor(&self, arithmetic: Arithmetic) -> LlavaNextImageProcessor {
        LlavaNextImageProcessor {
            settings: self.settings(arithmetic),
            image_grid_pinpoints: self.image_grid_pinpoints.clone(),
            do_pad: true,
        }
    }
}
