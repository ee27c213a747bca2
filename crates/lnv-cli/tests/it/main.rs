//! The command as people use it: the built binary, its exit status, its two streams and its files.
//!
//! One binary, so that it links once. Nothing here leaves the loopback interface.

#![allow(clippy::unwrap_used)]

mod chat;
mod contract;
mod demo;
mod hub;
mod links;
mod quantize;
mod refusals;
mod serve;
mod served;
mod support;
mod traces;
mod urls;
