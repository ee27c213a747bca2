//! Ask questions about videos and images with the LLaVA-NeXT-Video checkpoints: decode, preprocess,
//! encode, generate, exact to Hugging Face Transformers 4.53.3.
//!
//! The modules stand in the order that data visits them, and a module uses only those above it:
//!
//! ```text
//! bytes          --media-->      Image | Video
//! Conversation   --processor-->  ModelInputs      pixels, token ids, AnyRes layouts
//! ModelInputs    --model-->      InputsEmbeds     vision tower, pooler, projector, pack, merge
//! Request        --engine-->     tokens           prefill, decode, sample: the only loop
//! tokens         --processor::Detokenizer--> text
//! ```
//!
//! The library opens no socket and starts no async runtime: fetching is the caller's task.

pub mod error;

pub mod media;

pub mod config;
pub mod processor;

pub mod model;

pub mod engine;

pub mod demo;

pub use config::LlavaNextVideoConfig;
pub use engine::Engine;
pub use error::{Error, Result};
pub use model::LlavaNextVideoModel;
pub use processor::LlavaNextVideoProcessor;
