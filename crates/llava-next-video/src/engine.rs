//! Requests to tokens: schedule, prefill, decode, pick. The only loop of the program is here.
//!
//! Five nouns: a *request* (options), a *sequence*, the *block manager* (integers only), the *strategy*
//! (which token goes on) and the *runner*, which drives the model. The engine knows only tokens: text
//! enters through [`TokenText`], for stop strings.

mod beam;
pub mod block_manager;
mod constraint;
pub mod logits;
mod request;
mod runner;
mod sequence;
mod service;
mod stop;
mod strategy;

pub use constraint::{Constraint, Constraints};
pub use request::{
    Completion, DEFAULT_NEW_TOKENS, EarlyStopping, Event, FinishReason, Generation,
    GenerationOptions, MAX_NEW_TOKENS, MAX_SEQUENCES, MAX_STOP_STRINGS, Sampling, Timings,
};
pub use runner::{Engine, OnEvent, Session, context_length};
pub use sequence::{MediaSpan, Sequence};
pub use service::{
    OnRequestEvent, Refused, Request, RequestEvent, RequestId, Service, ServiceLimits, ServiceStats,
};
pub use stop::{StopStrings, TokenText};
