//! The arithmetic of LLaVA-NeXT-Video: about twenty fused, shape-specific operations ([`Ops`]) over
//! buffers that the caller owns.
//!
//! Decision: the project exists to run one model family fast, so this is no tensor library. An
//! operation takes row-major matrices of f32 ([`Buffer`]), packed weights ([`Weight`]) or the paged
//! key/value cache ([`KvCache`]), checks the shapes (a mismatch is a bug of the caller: it panics
//! and says so), and runs the kernel of the instruction set chosen when the [`Ops`] was made
//! ([`Isa`]). Every operation has a slow, obvious twin in `reference.rs`: the scalar instruction
//! set *is* those functions, and the tests hold every other one against them.
//!
//! Guarantee: for one instruction set and number format, a row of a result has the same bits
//! whatever the other rows of the call, the chunking of a prompt, the batch or the number of threads.
//! Matrix products reduce in one ascending chain over k; attention goes through blocks of
//! [`KV_BLOCK`] keys counted from the start of the sequence, where it multiplies in bf16 through
//! segments of 1024 keys that are added up in ascending order.
//!
//! Refused here: knowing an image, a tokenizer or a model's name; strides, broadcasting, autograd.
//!
//! `unsafe` exists only in this crate: in `cpu` (SIMD), in `cuda` (the driver) and in the few places that
//! hand disjoint parts of one buffer to several threads.

#![deny(unsafe_op_in_unsafe_fn)]

mod buffer;
#[cfg(target_arch = "x86_64")]
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod isa;
mod kv_cache;
mod ops;
pub mod probe;
mod reference;
mod weight;

pub use buffer::{Buffer, Vector};
pub use error::KernelError;
pub use isa::{Device, Isa};
pub use kv_cache::{Heads, KV_BLOCK, KvCache, KvDtype, Slot};
pub use ops::{
    Activation, AttentionShape, Epilogue, Ops, PatchGeometry, PoolMode, Precision, Span,
};
pub use weight::bnb;
pub use weight::bnb::Code4;
pub use weight::{
    Bnb4, Compute, Int8, PackedBytes, PartScales, Weight, WeightData, WeightDtype, WeightPart,
    packed_len,
};
