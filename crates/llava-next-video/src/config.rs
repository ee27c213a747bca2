//! `config.json` and its neighbours, as they are on disk.

mod files;

pub use files::{CheckpointFiles, MAX_JSON_BYTES};
