//! Model inputs to hidden states and logits: vision tower, pooler, projector, pack, merge, decoder.
//!
//! Model code reads like the checkpoint: struct fields carry tensor names, `load` checks every shape,
//! `forward` is a straight line of operations from `lnv-kernels`. The device is chosen once, when
//! loading; no code here asks for it again. Knows no request, no text and no file other than weights.

mod balance;
pub mod batch;
mod bitsandbytes;
mod export;
mod fingerprint;
pub mod formats;
pub mod forward;
pub mod language_model;
pub mod layers;
pub mod llava_next_video;
pub mod loader;
pub mod merge;
pub mod pack;
pub mod projector;
pub mod save;
pub mod vision_tower;
pub mod weights;

pub use batch::{Batch, BatchSpan, DecoderOutput, Keep, Taps};
pub use formats::{Formats, Part};
pub use forward::{
    ForwardInputs, ForwardOptions, ForwardOutput, ForwardSource, IGNORE_INDEX, LogitsToKeep,
    PastKeyValues, Values,
};
pub(crate) use language_model::pick;
pub use language_model::{default_kv_dtype, kv_bytes_per_token};
pub(crate) use llava_next_video::numbers;
pub use llava_next_video::{
    EmbeddedRow, InputsEmbeds, LlavaNextVideoModel, LoadOptions, OnBytes, Placed,
};
pub use loader::PlannedWeight;
pub use save::Repacking;
pub use vision_tower::{TowerPass, pictures_per_pass};
pub use weights::Checkpoint;
