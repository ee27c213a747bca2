//! Traces by OpenTelemetry: each request a span, its stages spans within.
//!
//! Decision: the spans are made of a request's entry in the log when it is over, not by code along its way: a request
//! that is cut short has its spans too, and nothing that a person has asked, shown or been answered can get into one.
//! They go to the library's queue, which takes them or lets them fall and never waits; a thread of the library sends
//! what is there through `ureq`, which the program has anyway. A collector that is away costs spans and a warning
//! a minute, nothing else.
//!
//! It refuses at the start what it would send nowhere: an address that is none, another protocol.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use async_trait::async_trait;
use axum::http::HeaderMap;
use llava_next_video::error::io_reason;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{
    Span as _, SpanKind, Status, TraceContextExt, TraceId, Tracer, TracerProvider,
};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use url::Url;

use super::course::{Course, Stage};
use super::log::Entry;

/// How long sending may take.
const SEND: Duration = Duration::from_secs(10);

/// How long the last spans may take when the server ends.
const FLUSH: Duration = Duration::from_secs(5);

/// Between two warnings that nothing arrives.
const QUIET: Duration = Duration::from_secs(60);

/// Bytes of a collector's answer that are read.
const MAX_ANSWER: u64 = 64 << 10;

/// The longest `tracestate` that is passed on; a client could fill the queue with them.
const MAX_STATE: usize = 512;

/// Where OTLP's receivers for traces are, below the address of a collector.
const PATH: &str = "v1/traces";

/// Makes spans and has them sent.
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    propagator: TraceContextPropagator,
}

impl Traces {
    /// Sends to the collector at `endpoint`, such as `http://localhost:4318`, by OTLP over HTTP.
    ///
    /// # Errors
    /// The address is none, or the environment asks for what is not there.
    pub fn start(endpoint: &str) -> Result<Self> {
        for name in [
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            "OTEL_EXPORTER_OTLP_PROTOCOL",
        ] {
            let asked = std::env::var(name).unwrap_or_default();
            if !matches!(asked.as_str(), "" | "http/protobuf") {
                bail!(
                    "{name} is \"{asked}\", but traces are sent as http/protobuf only: set it to that"
                );
            }
        }
        let url = address(endpoint)?;
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Collector::new(&url))
            .with_endpoint(url.as_str())
            .with_protocol(Protocol::HttpBinary)
            .build()
            .context("traces cannot be sent")?;
        let provider = SdkTracerProvider::builder()
            .with_resource(resource())
            .with_batch_exporter(exporter)
            .build();
        Ok(Self {
            tracer: provider.tracer("lnv"),
            provider,
            propagator: TraceContextPropagator::new(),
        })
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

/// The receiver of a collector at `endpoint`.
fn address(endpoint: &str) -> Result<Url> {
    let wrong = |what: &str| {
        format!("--otlp-endpoint {what}: give a collector's address, such as http://localhost:4318")
    };
    let mut url = Url::parse(endpoint).map_err(|_| anyhow::anyhow!(wrong("is no address")))?;
    if !matches!(url.scheme(), "http" | "https") {
        bail!(wrong("is neither an http nor an https address"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        bail!("--otlp-endpoint names a user: send keys by OTEL_EXPORTER_OTLP_HEADERS instead");
    }
    if url.query().is_some() || url.fragment().is_some() {
        bail!(wrong("has more than a path"));
    }
    let path = format!("{}/{PATH}", url.path().trim_end_matches('/'));
    url.set_path(&path);
    Ok(url)
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

/// The way to a collector.
#[derive(Debug)]
struct Collector {
    agent: ureq::Agent,
    url: String,
    /// When it was last said that nothing arrives.
    warned: Mutex<Option<Instant>>,
}

impl Collector {
    fn new(url: &Url) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_global(Some(SEND))
            .user_agent(concat!("lnv/", env!("CARGO_PKG_VERSION")));
        Self {
            agent: config.build().into(),
            url: url.to_string(),
            warned: Mutex::new(None),
        }
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, ureq::Error> {
        let (head, body) = request.into_parts();
        let request = Request::from_parts(head, &body[..]);
        let (head, mut body) = self.agent.run(request)?.into_parts();
        let body = body.with_config().limit(MAX_ANSWER).read_to_vec()?;
        Ok(Response::from_parts(head, body.into()))
    }

    /// Says that nothing arrives, once in a while.
    fn warn(&self, reason: &str) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_some_and(|last| last.elapsed() < QUIET) {
            return;
        }
        *warned = Some(Instant::now());
        tracing::warn!(
            target: "lnv::serve",
            "traces do not reach {} ({reason}): start a collector there, or serve without --otlp-endpoint",
            self.url
        );
    }
}

#[async_trait]
impl HttpClient for Collector {
    /// Blocks: the exporter calls it on a thread of its own.
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent = self.send(request);
        match &sent {
            Ok(answer) if answer.status().is_success() => {}
            Ok(answer) => self.warn(&format!(
                "it answers with status {}",
                answer.status().as_u16()
            )),
            Err(ureq::Error::Io(cause)) => self.warn(&io_reason(cause)),
            Err(ureq::Error::Timeout(_)) => self.warn("it takes too long"),
            Err(ureq::Error::HostNotFound) => self.warn("there is no such host"),
            Err(cause) => self.warn(&cause.to_string()),
        }
        Ok(sent?)
    }
}

/// Traces where they are asked for.
pub fn wanted(endpoint: Option<&str>) -> Result<Option<Arc<Traces>>> {
    // An empty variable is as good as none.
    let endpoint = endpoint.filter(|endpoint| !endpoint.trim().is_empty());
    let traces = endpoint.map(|endpoint| Traces::start(endpoint.trim()));
    Ok(traces.transpose()?.map(Arc::new))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_collectors() {
        let path = |endpoint: &str| address(endpoint).expect(endpoint).to_string();
        assert_eq!(
            path("http://localhost:4318"),
            "http://localhost:4318/v1/traces"
        );
        assert_eq!(
            path("https://a.example/otlp/"),
            "https://a.example/otlp/v1/traces"
        );
        for endpoint in [
            "localhost:4318",
            "4318",
            "grpc://a:4317",
            "http://a:b@c",
            "http://a/?x=1",
        ] {
            let refused = address(endpoint).expect_err(endpoint).to_string();
            assert!(refused.starts_with("--otlp-endpoint "), "{refused}");
        }
    }

    #[test]
    fn a_callers_trace_is_read_and_nonsense_is_not() {
        let traces = Traces::start("http://127.0.0.1:1").expect("starts");
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
