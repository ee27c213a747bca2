//! The arithmetic of LLaVA-NeXT-Video: about twenty fused operations over buffers that the caller owns.
//!
//! There is no tensor library here. An activation is a row-major `[rows, cols]` matrix of f32 in a
//! [`Buffer`]; a weight is a [`Weight`], packed once into the layout that its kernels stream. [`Ops`]
//! is the one seam where the device and the instruction set are chosen: afterwards a caller says *what*
//! to compute. Every operation has a scalar twin (`Isa::Scalar`, module `reference`) that is the oracle
//! of the tests, and the same tests run every implementation that the machine has.
//!
//! Guarantees:
//! - With f32 weights a row of a result is bit-identical whatever the number of rows in the call: every
//!   reduction runs in one fixed order (an ascending chain over k; attention in key blocks of
//!   [`KV_BLOCK`] counted from the start of the sequence).
//! - No operation allocates in proportion to its input: scratch is kept per thread and reused.
//!
//! This crate knows no image, no tokenizer and no model name.
