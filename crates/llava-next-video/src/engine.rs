//! Requests to tokens: schedule, prefill, decode, pick. The only loop of the program is here.
//!
//! Five nouns: a *request* (options), a *sequence*, the *block manager* (integers only), the *strategy*
//! (which token goes on) and the *runner*, which drives the model. The engine knows only tokens: text
//! enters through [`TokenText`], for stop strings.

mod admission;
mod beam;
pub mod block_manager;
mod constraint;
mod context;
mod feature_file;
mod feature_store;
mod features;
mod job;
pub mod logits;
mod pace;
mod pass;
pub mod prefix;
mod recall;
mod request;
mod room;
mod runner;
mod sequence;
mod service;
mod sight;
mod stop;
mod strategy;

pub use constraint::{Constraint, Constraints};
pub(crate) use context::check_context;
pub use context::context_length;
pub use feature_store::{FeatureStore, StoreStats};
pub use job::Prepared;
pub use pace::Prefer;
pub use request::{
    Completion, DEFAULT_NEW_TOKENS, EarlyStopping, Event, FinishReason, Generation,
    GenerationOptions, MAX_LOGPROBS, MAX_NEW_TOKENS, MAX_SEQUENCES, MAX_STOP_STRINGS, Sampling,
    Timings, TokenLogprob,
};
pub use runner::{Engine, EngineLimits, OnEvent};
pub use sequence::Sequence;
pub use service::{
    OnRequestEvent, Refused, Request, RequestEvent, RequestId, Service, ServiceLimits, ServiceStats,
};
pub use stop::{StopStrings, TokenText};
