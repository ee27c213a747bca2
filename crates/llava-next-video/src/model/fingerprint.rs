//! What a picture's features depend on besides its pixels, as one name.
//!
//! Decision: a digest of all bytes of the vision tower, the pooler and the projector as they lie in
//! memory, of the settings that they are run with, of the instruction set and of the program's version.
//! All bytes, not a sample: a model that was trained further may differ from its origin in one matrix.
//! Only who keeps features beyond the program's life asks, and a gigabyte takes a fraction of a second.

use std::fmt::Debug;

use lnv_kernels::{Vector, Weight};

/// A digest in the making. Each part goes in with its length, so that none can pass for two.
pub(super) struct Fingerprint(blake3::Hasher);

impl Fingerprint {
    /// Of nothing but the program's version: another may round otherwise.
    pub fn new() -> Self {
        let mut new = Self(blake3::Hasher::new());
        new.bytes(env!("CARGO_PKG_VERSION").as_bytes());
        new
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// Adds a setting.
    pub fn setting(&mut self, setting: &dyn Debug) {
        self.bytes(format!("{setting:?}").as_bytes());
    }

    /// Adds values.
    pub fn values(&mut self, values: &[f32]) {
        self.bytes(bytemuck::cast_slice(values));
    }

    /// Adds a vector where there is one.
    pub fn vector(&mut self, vector: Option<&Vector>) {
        self.setting(&vector.is_some());
        if let Some(vector) = vector {
            self.values(vector.as_slice());
        }
    }

    /// Adds a matrix.
    pub fn weight(&mut self, weight: &Weight) {
        self.setting(&(weight.n(), weight.k(), weight.dtype()));
        self.bytes(&weight.to_host());
    }

    /// The name.
    pub fn finish(self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}
