//! What an answer must look like, as a set of tokens that may come next.
//!
//! The engine knows no grammar: whoever asks for one brings the machine that follows it. That keeps
//! grammars, and the library that compiles them, out of the model.

use crate::error::Result;

/// Follows one answer.
pub trait Constraint: Send {
    /// Sets the scores of ids that must not come next to minus infinity. An end-of-sequence id is left
    /// where the answer may end.
    ///
    /// # Errors
    /// The constraint cannot go on.
    fn restrict(&mut self, scores: &mut [f32]) -> Result<()>;

    /// Told which id came.
    ///
    /// # Errors
    /// It must not have come.
    fn accept(&mut self, id: u32) -> Result<()>;
}

/// Gives each answer of a request a [`Constraint`] of its own.
pub trait Constraints: Send + Sync {
    /// One from the beginning.
    fn begin(&self) -> Box<dyn Constraint>;
}
