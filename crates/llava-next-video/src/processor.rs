//! Conversations, text and pixels to model inputs.
pub mod anyres;
pub mod inputs;
