//! Traces by OpenTelemetry: each request a span, its stages spans within.
//!
//! Decision: the spans are made of a request's entry in the log when it is over, not by code along its way: a request
//! that is cut short has its spans too, and nothing that a person has asked, shown or been answered can get into one.
//! They go to the library's queue, which takes them or lets them fall and never waits; a thread of the library sends
//! what is there (`export.rs`). A collector that is away costs spans and a warning a minute, nothing else.

mod export;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use axum::http::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{
    Span as _, SpanKind, Status, TraceContextExt, TraceId, Tracer, TracerProvider,
};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

use super::course::{Course, Stage};
use super::log::Entry;
use export::{Destination, Dropped};

/// How long the last spans may take when the server ends.
const FLUSH: Duration = Duration::from_secs(5);

/// The longest `tracestate` that is passed on; a client could fill the queue with them.
const MAX_STATE: usize = 512;

/// Makes spans and has them sent.
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    propagator: TraceContextPropagator,
    dropped: Dropped,
}

impl Traces {
    /// Sends to a collector, by OTLP over HTTP.
    ///
    /// # Errors
    /// The environment asks for what is not there.
    pub fn start(destination: Destination) -> Result<Self> {
        let queue = destination.queue()?;
        let dropped = queue.dropped();
        let provider = SdkTracerProvider::builder()
            .with_resource(resource())
            .with_span_processor(queue)
            .build();
        Ok(Self {
            tracer: provider.tracer("lnv"),
            provider,
            propagator: TraceContextPropagator::new(),
            dropped,
        })
    }

    /// How many spans did not arrive, so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.count()
    }

    /// The trace that a request belongs to by its `traceparent`; empty where it has none.
    pub fn caller(&self, headers: &HeaderMap) -> Context {
        self.propagator
            .extract_with_context(&Context::new(), &Headers(headers))
    }

    /// Makes the spans of a request that is over; the name of its trace. Requests for other things than answers and
    /// media have none.
    pub fn request(&self, entry: &Entry, model: &str) -> Option<TraceId> {
        if !entry.route.starts_with("/v1/") {
            return None;
        }
        let clock = Clock::now();
        let span = self
            .tracer
            .span_builder(format!("{} {}", entry.method, entry.route))
            .with_kind(SpanKind::Server)
            .with_start_time(clock.at(entry.start))
            .with_attributes(attributes(entry, model));
        let caller = entry.caller.clone().unwrap_or_default();
        let mut span = self.tracer.build_with_context(span, &caller);
        if error_type(entry).is_some() {
            // The sentence may quote the request.
            span.set_status(Status::error(""));
        }
        let context = Context::new().with_span(span);
        if let Some(media) = entry.media() {
            self.stage(&clock, ("media", media, None), None, &context);
        }
        let several = entry.questions().len() > 1;
        for (index, question) in entry.questions().enumerate() {
            for stage in question.stages() {
                self.stage(&clock, stage, several.then_some(index), &context);
            }
        }
        let span = context.span();
        span.end_with_timestamp(clock.wall);
        Some(span.span_context().trace_id())
    }

    fn stage(&self, clock: &Clock, stage: Stage, question: Option<usize>, parent: &Context) {
        let (name, (from, to), spent) = stage;
        let attributes = [
            spent.map(|seconds| KeyValue::new("lnv.engine_seconds", seconds)),
            question.map(|index| KeyValue::new("lnv.question", index as i64)),
        ];
        let span = self
            .tracer
            .span_builder(name)
            .with_start_time(clock.at(from))
            .with_attributes(attributes.into_iter().flatten());
        let mut span = self.tracer.build_with_context(span, parent);
        span.end_with_timestamp(clock.at(to));
    }

    /// Sends what is left, within bounded time.
    pub fn end(&self) {
        if self.provider.shutdown_with_timeout(FLUSH).is_err() {
            tracing::warn!(target: "lnv::serve", "the last traces did not reach their collector");
        }
    }
}

/// What the spans come from: as the environment has it, by default `lnv`.
fn resource() -> Resource {
    let told = Resource::builder().build();
    let name = told.get(&"service.name".into());
    let named = name.is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let mut resource = Resource::builder();
    if !named {
        resource = resource.with_service_name("lnv");
    }
    if told.get(&"service.version".into()).is_none() {
        resource = resource.with_attribute(version);
    }
    resource.build()
}

/// What went wrong on this side, or that a request was not answered to its end. By the conventions for HTTP what a
/// client did wrong is no error of the server.
fn error_type(entry: &Entry) -> Option<String> {
    let cut = |question: &Course| question.finish_reasons.is_empty();
    match entry.status {
        None => Some("cancelled".to_owned()),
        Some(status) if status >= 500 => Some(status.to_string()),
        Some(200) if entry.error.is_some() => Some("_OTHER".to_owned()),
        Some(200) if entry.questions().any(cut) => Some("cancelled".to_owned()),
        Some(_) => None,
    }
}

/// The semantic conventions' names for what the log has.
fn attributes(entry: &Entry, model: &str) -> Vec<KeyValue> {
    let text = |name: &'static str, value: &str| Some(KeyValue::new(name, value.to_owned()));
    let count = |name: &'static str, value: usize| {
        (value > 0).then(|| KeyValue::new(name, i64::try_from(value).unwrap_or(i64::MAX)))
    };
    let status = |status: u16| KeyValue::new("http.response.status_code", i64::from(status));
    let mut all = vec![
        text("http.request.method", &entry.method),
        text("http.route", &entry.route),
        text("url.scheme", "http"),
        // With a part of the client's own in it, the route says enough.
        (!entry.route.contains('{')).then(|| KeyValue::new("url.path", entry.route.clone())),
        entry.status.map(status),
        entry
            .client
            .map(|client| KeyValue::new("client.address", client.to_string())),
        error_type(entry).map(|kind| KeyValue::new("error.type", kind)),
        text("lnv.request_id", &entry.id),
        count("lnv.pictures", entry.pictures),
    ];
    let operation = match entry.route.as_str() {
        "/v1/chat/completions" => Some("chat"),
        "/v1/videos/questions" => Some("generate_content"),
        _ => None,
    };
    if let Some(operation) = operation {
        let reasons = entry.questions().flat_map(|q| &q.finish_reasons);
        let reasons: Vec<StringValue> = reasons.map(|reason| (*reason).into()).collect();
        let reasons = (!reasons.is_empty()).then_some(Value::Array(Array::String(reasons)));
        all.extend([
            text("gen_ai.operation.name", operation),
            text("gen_ai.provider.name", "lnv"),
            text("gen_ai.request.model", model),
            text("gen_ai.response.model", model),
            count("gen_ai.usage.input_tokens", entry.sum(|q| q.prompt_tokens)),
            count(
                "gen_ai.usage.cache_read.input_tokens",
                entry.sum(|q| q.cached_tokens),
            ),
            count("gen_ai.usage.output_tokens", entry.sum(|q| q.new_tokens)),
            reasons.map(|reasons| KeyValue::new("gen_ai.response.finish_reasons", reasons)),
        ]);
    }
    all.into_iter().flatten().collect()
}

/// The two clocks at one moment.
struct Clock {
    own: Instant,
    wall: SystemTime,
}

impl Clock {
    fn now() -> Self {
        Self {
            own: Instant::now(),
            wall: SystemTime::now(),
        }
    }

    /// What a wall clock showed.
    fn at(&self, moment: Instant) -> SystemTime {
        let ago = self.own.saturating_duration_since(moment);
        self.wall.checked_sub(ago).unwrap_or(self.wall)
    }
}

/// A request's headers, for the propagator.
struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let value = self.0.get(key)?.to_str().ok()?;
        (value.len() <= MAX_STATE).then_some(value)
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|name| name.as_str()).collect()
    }
}

/// Traces where they are asked for, by an option or by the environment.
///
/// # Errors
/// What is asked for is not there.
pub fn wanted(endpoint: Option<&str>) -> Result<Option<Arc<Traces>>> {
    let traces = Destination::find(endpoint)?.map(Traces::start);
    Ok(traces.transpose()?.map(Arc::new))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_trace_is_read_and_nonsense_is_not() {
        let traces = wanted(Some("http://127.0.0.1:1")).expect("starts");
        let traces = traces.expect("asked for");
        let caller = |pairs: &[(&'static str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, value.parse().expect("a header"));
            }
            traces.caller(&headers).span().span_context().clone()
        };
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let long = format!("a={}", "x".repeat(MAX_STATE));
        let read = caller(&[("traceparent", parent), ("tracestate", &long)]);
        assert_eq!(
            read.trace_id().to_string(),
            "4bf92f3577b34da6a3ce929d0e0e4736"
        );
        assert_eq!(read.span_id().to_string(), "00f067aa0ba902b7");
        assert!(read.is_sampled() && read.trace_state().header().is_empty());
        for wrong in [
            "",
            "00-0-0-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        ] {
            assert!(!caller(&[("traceparent", wrong)]).is_valid(), "{wrong}");
        }
    }
}
