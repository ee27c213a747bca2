//! One line a request: who asked, how it ended, and what each stage took.
//!
//! Decision: the line is written when the answer's last byte is handed over, or when the client is gone,
//! by dropping a guard; so a request that is cut short has its line too (status 499, as nginx writes it).
//! The metrics are counted at the same moment from the same figures.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use llava_next_video::engine::RequestEvent;

use super::course::{Course, Stretch};
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
    /// When its media began to be read and scaled, and when they were.
    pub media: Option<(Instant, Option<Instant>)>,
    /// What it asked the engine, by number.
    questions: BTreeMap<u64, Course>,
    /// The next number.
    next: u64,
    /// Why it was not answered.
    pub error: Option<String>,
    /// The trace that it belongs to, where traces are made.
    pub caller: Option<opentelemetry::Context>,
}

impl Entry {
    /// What it asked the engine, in order.
    pub fn questions(&self) -> impl ExactSizeIterator<Item = &Course> {
        self.questions.values()
    }

    /// A sum over the questions.
    pub fn sum<T: std::iter::Sum>(&self, of: impl Fn(&Course) -> T) -> T {
        self.questions().map(of).sum()
    }

    /// From when to when its media were read, so far.
    pub fn media(&self) -> Option<Stretch> {
        let (from, to) = self.media?;
        Some((from, to.unwrap_or_else(Instant::now)))
    }

    /// The same in seconds.
    pub fn media_s(&self) -> f64 {
        let media = self.media();
        media.map_or(0.0, |(from, to)| (to - from).as_secs_f64())
    }

    /// Seconds that the question that waited longest for the engine did.
    pub fn queue_s(&self) -> f64 {
        self.questions().map(Course::queue_s).fold(0.0, f64::max)
    }

    /// When the first token came.
    pub fn first_token(&self) -> Option<Instant> {
        self.questions().filter_map(Course::first_token).min()
    }

    /// When the last came.
    pub fn last_token(&self) -> Option<Instant> {
        self.questions().filter_map(Course::last_token).max()
    }
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
            media: None,
            questions: BTreeMap::new(),
            next: 0,
            error: None,
            caller: None,
        })))
    }

    /// The entry.
    pub fn entry(&self) -> MutexGuard<'_, Entry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A question is handed to the engine: its number, and what is to hear of everything that happens to it.
    pub fn question(
        &self,
        prompt_tokens: usize,
    ) -> (u64, impl FnMut(&RequestEvent) + Send + use<>) {
        let log = self.clone();
        let mut entry = self.entry();
        let number = entry.next;
        entry.next += 1;
        entry.questions.insert(number, Course::new(prompt_tokens));
        let note = move |event: &RequestEvent| {
            if let Some(question) = log.entry().questions.get_mut(&number) {
                question.hear(event);
            }
        };
        (number, note)
    }

    /// A question is asked anew: what it came to so far does not count.
    pub fn withdraw(&self, number: u64) {
        self.entry().questions.remove(&number);
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
        let traces = self.server.traces.as_ref();
        let trace_id = traces.and_then(|traces| traces.request(&entry, self.server.name()));
        let seconds = |s: f64| (s > 0.0).then(|| (s * 1e4).round() / 1e4);
        let some = |n: usize| (n > 0).then_some(n);
        let first = entry.first_token().map(|t| (t - entry.start).as_secs_f64());
        tracing::info!(
            target: "lnv::request",
            id = entry.id,
            trace_id = trace_id.map(tracing::field::display),
            client = entry.client.map(tracing::field::display),
            method = entry.method,
            route = entry.route,
            model = self.server.name(),
            status,
            stream = entry.stream.then_some(true),
            pictures = some(entry.pictures),
            prompt_tokens = some(entry.sum(|q| q.prompt_tokens)),
            cached_tokens = some(entry.sum(|q| q.cached_tokens)),
            new_tokens = some(entry.sum(|q| q.new_tokens)),
            media_s = seconds(entry.media_s()),
            queue_s = seconds(entry.queue_s()),
            vision_s = seconds(entry.sum(|q| q.timings.vision_s)),
            prefill_s = seconds(entry.sum(|q| q.timings.prefill_s)),
            decode_s = seconds(entry.sum(|q| q.timings.decode_s)),
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
