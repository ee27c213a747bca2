//! One line a request: who asked, how it ended, and what each stage took.
//!
//! Decision: the line is written when the answer's last byte is handed over, or when the client is gone,
//! by dropping a guard; so a request that is cut short has its line too (status 499, as nginx writes it).
//! The metrics are counted at the same moment from the same figures.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use llava_next_video::engine::Generation;

use super::state::Server;

/// The client went away before it was answered.
const GONE: u16 = 499;

/// What is known of a request.
#[derive(Debug)]
pub struct Entry {
    /// When it came.
    pub start: Instant,
    /// Its id, as in `x-request-id`.
    pub id: String,
    /// Where it came from.
    pub client: Option<IpAddr>,
    /// GET, POST.
    pub method: String,
    /// The route, without what a client may write at will.
    pub route: String,
    /// As answered; none while it is not.
    pub status: Option<u16>,
    /// By SSE.
    pub stream: bool,
    /// Pictures and frames.
    pub pictures: usize,
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Of these, found in the cache.
    pub cached_tokens: usize,
    /// Of the answers.
    pub new_tokens: usize,
    /// Reading and scaling media.
    pub media_s: f64,
    /// Waiting for the engine.
    pub queue_s: f64,
    /// The engine's stages.
    pub vision_s: f64,
    /// See `vision_s`.
    pub prefill_s: f64,
    /// See `vision_s`.
    pub decode_s: f64,
    /// When the first token came.
    pub first_token: Option<Instant>,
    /// When the last came.
    pub last_token: Option<Instant>,
    /// Why it was not answered.
    pub error: Option<String>,
}

/// A request's entry, for all who know something of it.
#[derive(Debug, Clone)]
pub struct RequestLog(Arc<Mutex<Entry>>);

impl RequestLog {
    /// An entry that begins now.
    pub fn new(id: String, client: Option<IpAddr>, method: String, route: String) -> Self {
        Self(Arc::new(Mutex::new(Entry {
            start: Instant::now(),
            id,
            client,
            method,
            route,
            status: None,
            stream: false,
            pictures: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            new_tokens: 0,
            media_s: 0.0,
            queue_s: 0.0,
            vision_s: 0.0,
            prefill_s: 0.0,
            decode_s: 0.0,
            first_token: None,
            last_token: None,
            error: None,
        })))
    }

    /// The entry.
    pub fn entry(&self) -> MutexGuard<'_, Entry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A token came.
    pub fn token(&self) {
        let now = Instant::now();
        let mut entry = self.entry();
        entry.first_token.get_or_insert(now);
        entry.last_token = Some(now);
    }

    /// Adds what the engine says at the end.
    pub fn generation(&self, generation: &Generation) {
        let mut entry = self.entry();
        entry.prompt_tokens += generation.prompt_tokens.iter().sum::<usize>();
        entry.cached_tokens += generation.cached_tokens;
        let ids = generation.completions.iter().map(|c| c.ids.len());
        entry.new_tokens += ids.sum::<usize>();
        entry.vision_s += generation.timings.vision_s;
        entry.prefill_s += generation.timings.prefill_s;
        entry.decode_s += generation.timings.decode_s;
    }
}

/// Writes the line when dropped.
pub struct LogGuard {
    log: RequestLog,
    server: Arc<Server>,
}

impl LogGuard {
    /// For a request that has just come.
    pub fn new(log: RequestLog, server: Arc<Server>) -> Self {
        Self { log, server }
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        let entry = self.log.entry();
        let status = entry.status.unwrap_or(GONE);
        self.server.metrics.request(&entry, status);
        let seconds = |s: f64| (s > 0.0).then(|| (s * 1e4).round() / 1e4);
        let some = |n: usize| (n > 0).then_some(n);
        let first = entry.first_token.map(|t| (t - entry.start).as_secs_f64());
        tracing::info!(
            target: "lnv::request",
            id = entry.id,
            client = entry.client.map(tracing::field::display),
            method = entry.method,
            route = entry.route,
            model = self.server.name(),
            status,
            stream = entry.stream.then_some(true),
            pictures = some(entry.pictures),
            prompt_tokens = some(entry.prompt_tokens),
            cached_tokens = some(entry.cached_tokens),
            new_tokens = some(entry.new_tokens),
            media_s = seconds(entry.media_s),
            queue_s = seconds(entry.queue_s),
            vision_s = seconds(entry.vision_s),
            prefill_s = seconds(entry.prefill_s),
            decode_s = seconds(entry.decode_s),
            first_token_s = first.and_then(seconds),
            total_s = seconds(entry.start.elapsed().as_secs_f64()),
            error = entry.error,
        );
    }
}

/// A body that holds a guard until it is over.
pub struct Guarded {
    /// The body.
    inner: Body,
    _guard: LogGuard,
}

impl Guarded {
    /// `inner`, as it was.
    pub fn body(inner: Body, guard: LogGuard) -> Body {
        Body::new(Self {
            inner,
            _guard: guard,
        })
    }
}

impl HttpBody for Guarded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
