//! Where spans go: to a collector, by the words of the command line and of the environment.
//!
//! Decision: what OpenTelemetry's library reads of the environment it reads itself (headers, compression, sampler,
//! names, sizes of its queue). What it leaves to the program is here: which of three addresses holds, a collector's own
//! certificates, and that nothing is to be sent. Its queue lets spans fall and tells nobody how many, so they are
//! counted before it; the bytes go through `ureq`, which the program has anyway.
//!
//! It refuses at the start what it would send nowhere: an address that is none, another protocol, certificates that
//! are not there.

use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use async_trait::async_trait;
use llava_next_video::error::io_reason;
use opentelemetry::Context;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, OTEL_BSP_MAX_QUEUE_SIZE,
    OTEL_BSP_MAX_QUEUE_SIZE_DEFAULT, Span, SpanData, SpanExporter, SpanProcessor,
};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use url::Url;

use crate::pipeline::read_file;

/// How long sending may take.
const SEND: Duration = Duration::from_secs(10);

/// Between two warnings that nothing arrives.
const QUIET: Duration = Duration::from_secs(60);

/// Bytes of a collector's answer that are read.
const MAX_ANSWER: u64 = 64 << 10;

/// Where OTLP's receivers for traces are, below the address of a collector.
const PATH: &str = "v1/traces";

/// The address, taken as it is, and that of a collector for everything.
const ENDPOINT: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
];
const PROTOCOL: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
];
const CERTIFICATE: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CERTIFICATE",
];

/// What a variable says; `None` where it is empty or not there.
type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A collector.
#[derive(Debug)]
pub struct Destination {
    url: Url,
    /// The option or variable that says so.
    source: &'static str,
    /// Whom its certificate must come from, where the environment says.
    roots: Option<RootCerts>,
}

impl Destination {
    /// Where the option or else the environment sends traces, if anywhere.
    ///
    /// # Errors
    /// The address is none, or the environment asks for what is not there.
    pub fn find(option: Option<&str>) -> Result<Option<Self>> {
        let said = |name: &str| Some(std::env::var(name).ok()?.trim().to_owned());
        Self::find_in(option, &|name| said(name).filter(|said| !said.is_empty()))
    }

    fn find_in(option: Option<&str>, environment: Environment<'_>) -> Result<Option<Self>> {
        let disabled = environment("OTEL_SDK_DISABLED");
        if disabled.is_some_and(|said| said.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        // An empty option is as good as none.
        let option = option.map(str::trim).filter(|said| !said.is_empty());
        let option = option.map(|said| ("--otlp-endpoint", said.to_owned()));
        let Some((source, said)) = option.or_else(|| first(ENDPOINT, environment)) else {
            return Ok(None);
        };
        if let Some((name, asked)) = first(PROTOCOL, environment)
            && asked != "http/protobuf"
        {
            bail!(
                "{name} is \"{asked}\", but traces are sent as http/protobuf only: set it to that"
            );
        }
        Ok(Some(Self {
            url: address(source, &said)?,
            source,
            roots: roots(environment)?,
        }))
    }

    /// What sends there.
    ///
    /// # Errors
    /// The library refuses what the environment says.
    pub fn queue(self) -> Result<Queue> {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_endpoint(self.url.as_str())
            .with_http_client(Collector::new(self))
            .with_protocol(Protocol::HttpBinary)
            .build()
            .context("traces cannot be sent")?;
        let room = std::env::var(OTEL_BSP_MAX_QUEUE_SIZE).ok();
        let room = room.and_then(|room| room.parse().ok());
        Ok(Queue::new(
            exporter,
            room.unwrap_or(OTEL_BSP_MAX_QUEUE_SIZE_DEFAULT),
        ))
    }
}

/// The first of two variables that says something: that for traces goes before that for everything.
fn first(names: [&'static str; 2], environment: Environment<'_>) -> Option<(&'static str, String)> {
    let mut said = names.into_iter();
    said.find_map(|name| Some((name, environment(name)?)))
}

/// The receiver of traces at an address: itself where it is for traces, else below it.
fn address(source: &str, said: &str) -> Result<Url> {
    let wrong = |what: &str| {
        format!("{source} {what}: give a collector's address, such as http://localhost:4318")
    };
    let mut url = Url::parse(said).map_err(|_| anyhow::anyhow!(wrong("is no address")))?;
    if !matches!(url.scheme(), "http" | "https") {
        bail!(wrong("is neither an http nor an https address"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        bail!("{source} names a user: send keys by OTEL_EXPORTER_OTLP_HEADERS instead");
    }
    if source == ENDPOINT[0] {
        return Ok(url);
    }
    if url.query().is_some() || url.fragment().is_some() {
        bail!(wrong("has more than a path"));
    }
    let path = format!("{}/{PATH}", url.path().trim_end_matches('/'));
    url.set_path(&path);
    Ok(url)
}

/// The certificates that the environment trusts instead of those that everybody trusts.
fn roots(environment: Environment<'_>) -> Result<Option<RootCerts>> {
    let Some((name, path)) = first(CERTIFICATE, environment) else {
        return Ok(None);
    };
    let pem = read_file(Path::new(&path)).context(name)?;
    let certificates: Vec<_> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        bail!("{name} names {path}, in which there is no certificate: give a file of them in PEM");
    }
    Ok(Some(certificates.into()))
}

/// The library's queue, and before it the count of what it cannot take.
#[derive(Debug)]
pub struct Queue {
    queue: BatchSpanProcessor,
    room: usize,
    counts: Arc<Counts>,
}

/// What becomes of spans.
#[derive(Debug, Default)]
struct Counts {
    waiting: AtomicUsize,
    dropped: AtomicU64,
}

/// How many spans did not arrive, so far.
#[derive(Debug, Clone)]
pub struct Dropped(Arc<Counts>);

impl Dropped {
    /// Because too many waited, or the collector did not take them.
    pub fn count(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }
}

impl Queue {
    fn new(exporter: impl SpanExporter + 'static, room: usize) -> Self {
        let counts = Arc::new(Counts::default());
        let exporter = Counted {
            exporter,
            counts: Arc::clone(&counts),
        };
        let config = BatchConfigBuilder::default().with_max_queue_size(room);
        let queue = BatchSpanProcessor::builder(exporter).with_batch_config(config.build());
        Self {
            queue: queue.build(),
            room,
            counts,
        }
    }

    /// Counts on, wherever the queue goes.
    pub fn dropped(&self) -> Dropped {
        Dropped(Arc::clone(&self.counts))
    }
}

impl SpanProcessor for Queue {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.queue.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.counts.waiting.fetch_add(1, Ordering::Relaxed) < self.room {
            return self.queue.on_end(span);
        }
        self.counts.waiting.fetch_sub(1, Ordering::Relaxed);
        self.counts.dropped.fetch_add(1, Ordering::Relaxed);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.queue.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.queue.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.queue.set_resource(resource);
    }
}

/// The end of the queue.
#[derive(Debug)]
struct Counted<E> {
    exporter: E,
    counts: Arc<Counts>,
}

impl<E: SpanExporter> SpanExporter for Counted<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.counts.waiting.fetch_sub(spans, Ordering::Relaxed);
        let sent = self.exporter.export(batch).await;
        if sent.is_err() {
            self.counts
                .dropped
                .fetch_add(spans as u64, Ordering::Relaxed);
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// The way to a collector.
#[derive(Debug)]
struct Collector {
    agent: ureq::Agent,
    url: Url,
    source: &'static str,
    /// When it was last said that nothing arrives.
    warned: Mutex<Option<Instant>>,
}

impl Collector {
    fn new(destination: Destination) -> Self {
        let mut tls = TlsConfig::builder();
        if let Some(roots) = destination.roots {
            tls = tls.root_certs(roots);
        }
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_global(Some(SEND))
            .tls_config(tls.build())
            .user_agent(concat!("lnv/", env!("CARGO_PKG_VERSION")));
        Self {
            agent: config.build().into(),
            url: destination.url,
            source: destination.source,
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
            "traces do not reach {} ({reason}): start a collector there, or serve without {}",
            self.url,
            self.source
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use opentelemetry::trace::{Span as _, Tracer, TracerProvider};
    use opentelemetry_sdk::error::OTelSdkError;
    use opentelemetry_sdk::trace::SdkTracerProvider;

    use super::*;

    const GENERAL: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    const OWN: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";

    fn find(option: Option<&str>, variables: &[(&str, &str)]) -> Result<Option<Destination>> {
        let said = |name: &str| {
            let own = variables.iter().find(|(own, _)| *own == name);
            own.map(|(_, value)| (*value).to_owned())
        };
        Destination::find_in(option, &said)
    }

    #[test]
    fn addresses_are_those_of_collectors() {
        let path = |said: &str| address("--otlp-endpoint", said).expect(said).to_string();
        assert_eq!(
            path("http://localhost:4318"),
            "http://localhost:4318/v1/traces"
        );
        assert_eq!(
            path("https://a.example/otlp/"),
            "https://a.example/otlp/v1/traces"
        );
        for said in [
            "localhost:4318",
            "4318",
            "grpc://a:4317",
            "http://a:b@c",
            "http://a/?x=1",
        ] {
            let refused = address("--otlp-endpoint", said)
                .expect_err(said)
                .to_string();
            assert!(refused.starts_with("--otlp-endpoint "), "{refused}");
        }
    }

    #[test]
    fn the_option_goes_first_then_the_variable_for_traces_as_it_is() {
        let (option, general, own) = ("http://o", (GENERAL, "http://g/x"), (OWN, "http://t/y?z=1"));
        for (said, variables, expected) in [
            (
                Some(option),
                &[general, own][..],
                Some("http://o/v1/traces"),
            ),
            (None, &[general, own], Some("http://t/y?z=1")),
            (Some(" "), &[(OWN, "https://t")], Some("https://t/")),
            (None, &[general], Some("http://g/x/v1/traces")),
            (None, &[], None),
            (Some(option), &[own, ("OTEL_SDK_DISABLED", "True")], None),
            (
                None,
                &[own, ("OTEL_SDK_DISABLED", "1")],
                Some("http://t/y?z=1"),
            ),
            (
                None,
                &[
                    own,
                    ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
                    ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
                ],
                Some("http://t/y?z=1"),
            ),
        ] {
            let found = find(said, variables).expect("an address");
            let url = found.map(|found| found.url.to_string());
            assert_eq!(url.as_deref(), expected, "{said:?} {variables:?}");
        }
        let refused = find(None, &[(OWN, "collector:4318")]).expect_err("no address");
        assert!(refused.to_string().starts_with(OWN), "{refused}");
        let grpc = [general, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")];
        let refused = find(None, &grpc).expect_err("another protocol").to_string();
        assert!(
            refused.starts_with("OTEL_EXPORTER_OTLP_PROTOCOL"),
            "{refused}"
        );
    }

    #[test]
    fn certificates_are_read_and_what_is_none_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).expect("written");
            path.display().to_string()
        };
        let block = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let (two, none) = (file("two.pem", &block.repeat(2)), file("none.pem", "PEM?"));
        let gone = directory.path().join("gone.pem").display().to_string();
        let with = |variables: &[(&str, &str)]| {
            find(Some("https://a"), variables).map(|found| found.expect("an address").roots)
        };
        let (general, own) = (
            "OTEL_EXPORTER_OTLP_CERTIFICATE",
            "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
        );
        assert!(with(&[]).expect("none is fine").is_none());
        let read = with(&[(general, &gone), (own, &two)]).expect("its own first");
        let Some(RootCerts::Specific(read)) = read else {
            panic!("{read:?}");
        };
        assert_eq!(read.len(), 2);
        for (path, reason) in [(&none, "there is no certificate"), (&gone, "cannot read")] {
            let refused = with(&[(general, path)]).expect_err(path);
            let refused = format!("{refused:#}");
            assert!(refused.starts_with(general), "{refused}");
            assert!(
                refused.contains(reason) && refused.contains(path),
                "{refused}"
            );
        }
    }

    /// A collector that says when spans come, and takes them or not when it is told.
    #[derive(Debug)]
    struct Told(mpsc::Sender<usize>, Mutex<mpsc::Receiver<bool>>);

    impl SpanExporter for Told {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            let _ = self.0.send(batch.len());
            let told = self.1.lock().expect("whole").recv();
            match told {
                Ok(true) => Ok(()),
                _ => Err(OTelSdkError::InternalFailure("no".into())),
            }
        }
    }

    #[test]
    fn every_span_that_does_not_arrive_is_counted() {
        let ((came, comes), (tell, told)) = (mpsc::channel(), mpsc::channel());
        let queue = Queue::new(Told(came, Mutex::new(told)), 4);
        let dropped = queue.dropped();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(queue)
            .build();
        let tracer = provider.tracer("test");
        let spans = |count: usize| (0..count).for_each(|_| tracer.start("a span").end());
        let arrives = || comes.recv_timeout(Duration::from_secs(60)).expect("spans");
        // A full queue is sent at once; meanwhile there is room for as many more.
        spans(4);
        assert_eq!(arrives(), 4);
        spans(7);
        assert_eq!(dropped.count(), 3);
        tell.send(true).expect("it waits");
        assert_eq!(arrives(), 4);
        assert_eq!(dropped.count(), 3, "those arrived");
        tell.send(false).expect("it waits");
        provider.force_flush().expect("nothing is left");
        assert_eq!(dropped.count(), 7, "and those did not");
    }
}
