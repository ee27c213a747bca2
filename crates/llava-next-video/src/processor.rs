//! Conversations, text and pixels to model inputs.
pub mod anyres;
pub mod image_processor;
pub mod inputs;
pub mod resize;
pub mod settings;
pub mod video_processor;
