//! Traces: what a collector on loopback receives of the server's requests, and what becomes of them without one.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value as Any};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode};
use prost::Message;
use serde_json::{Value, json};

use crate::served::{Answered, Served, about, content, data_uri};
use crate::support::{lnv, run};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// A head, in lower case, and a body.
type Sent = (String, Vec<u8>);

/// A collector: all that came to it.
struct Collector {
    url: String,
    came: Arc<Mutex<Vec<Sent>>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let came = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&came);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                receive(stream, &kept);
            }
        });
        Self { url, came }
    }

    fn heads(&self) -> Vec<String> {
        let came = self.came.lock().unwrap();
        came.iter().map(|(head, _)| head.clone()).collect()
    }

    fn requests(&self) -> Vec<ExportTraceServiceRequest> {
        let came = self.came.lock().unwrap();
        let read = |(_, body): &Sent| ExportTraceServiceRequest::decode(body.as_slice()).unwrap();
        came.iter().map(read).collect()
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.requests().into_iter();
        requests
            .flat_map(|request| request.resource_spans)
            .flat_map(|of| of.scope_spans)
            .flat_map(|of| of.spans)
            .collect()
    }

    fn has_seen(&self, text: &str) -> bool {
        let came = self.came.lock().unwrap();
        came.iter()
            .any(|(_, body)| body.windows(text.len()).any(|part| part == text.as_bytes()))
    }
}

/// One request a connection.
fn receive(mut stream: TcpStream, came: &Mutex<Vec<Sent>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut head, mut length) = (String::new(), 0);
    while reader.read_line(&mut head).unwrap() > 2 {
        let line = head.lines().last().unwrap().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().unwrap();
        }
    }
    let head = head.to_ascii_lowercase();
    assert!(
        head.contains("content-type: application/x-protobuf"),
        "{head}"
    );
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    came.lock().unwrap().push((head, body));
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        .unwrap();
}

fn find<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a AnyValue> {
    let one = attributes.iter().find(|one| one.key == key)?;
    one.value.as_ref()
}

fn text(span: &Span, key: &str) -> Option<String> {
    match find(&span.attributes, key)?.value.as_ref()? {
        Any::StringValue(text) => Some(text.clone()),
        _ => None,
    }
}

fn number(span: &Span, key: &str) -> Option<i64> {
    match find(&span.attributes, key)?.value.as_ref()? {
        Any::IntValue(number) => Some(*number),
        _ => None,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    since.as_nanos() as u64
}

/// The spans of requests.
fn requests(spans: &[Span]) -> Vec<&Span> {
    let is_server = |span: &&Span| span.kind == SpanKind::Server as i32;
    spans.iter().filter(is_server).collect()
}

/// The stages within a request, each with its name, by their beginnings.
fn stages<'a>(spans: &'a [Span], of: &Span) -> Vec<(&'a str, &'a Span)> {
    let own = spans
        .iter()
        .filter(|span| span.parent_span_id == of.span_id);
    let mut own: Vec<&Span> = own.collect();
    own.sort_by_key(|span| span.start_time_unix_nano);
    own.into_iter()
        .map(|span| (span.name.as_str(), span))
        .collect()
}

/// Asks in the name of a caller's span.
fn ask_within(server: &Served, body: &Value, flags: &str) -> Answered {
    let request = Served::agent().post(format!("{}/v1/chat/completions", server.url));
    let request = request
        .header("traceparent", format!("00-{TRACE}-{PARENT}-{flags}"))
        .content_type("application/json");
    Served::answered(request.send(body.to_string()))
}

/// The line of the log for a request.
fn line<'a>(said: &'a [Value], route: &str) -> &'a Value {
    let line = said.iter().find(|line| line["route"] == route);
    line.unwrap_or_else(|| panic!("{route} is not in {said:?}"))
}

fn lines(said: &str) -> Vec<Value> {
    said.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

#[test]
fn a_request_is_a_span_with_its_stages_and_without_its_words() {
    let collector = Collector::start();
    let words = ["--log-format", "json", "--otlp-endpoint", &collector.url];
    let server = Served::start_with(&words, &[("OTEL_RESOURCE_ATTRIBUTES", "team=video")]);
    let from = nanoseconds(SystemTime::now());
    let body = about("left.mp4", "Describe the video.");
    let answer = server.chat(&body);
    let to = nanoseconds(SystemTime::now());
    let said = content(&answer, 0);
    let usage = &answer.json()["usage"];
    assert_eq!(server.get("/health").status, 200);
    server.signal("TERM");
    let (status, err) = server.end();
    assert_eq!(status, Some(0), "{err}");

    // What the server had left is sent before it ends.
    let resource = collector.requests()[0].resource_spans[0]
        .resource
        .clone()
        .unwrap();
    let of = |key: &str| find(&resource.attributes, key).unwrap().value.clone();
    assert_eq!(of("service.name"), Some(Any::StringValue("lnv".into())));
    assert_eq!(of("team"), Some(Any::StringValue("video".into())));
    let spans = collector.spans();
    let servers = requests(&spans);
    let [server] = servers[..] else {
        panic!("{servers:?}");
    };
    assert_eq!(server.name, "POST /v1/chat/completions");
    assert!(server.parent_span_id.is_empty());
    for (key, value) in [
        ("http.request.method", "POST"),
        ("http.route", "/v1/chat/completions"),
        ("url.path", "/v1/chat/completions"),
        ("gen_ai.operation.name", "chat"),
        ("gen_ai.request.model", "lnv-demo"),
    ] {
        assert_eq!(text(server, key).as_deref(), Some(value), "{key}");
    }
    assert_eq!(number(server, "http.response.status_code"), Some(200));
    let tokens = |key: &str| usage[key].as_i64();
    let (input, output) = (tokens("prompt_tokens"), tokens("completion_tokens"));
    assert_eq!(number(server, "gen_ai.usage.input_tokens"), input);
    assert_eq!(number(server, "gen_ai.usage.output_tokens"), output);
    let reasons = find(&server.attributes, "gen_ai.response.finish_reasons");
    let Some(Any::ArrayValue(reasons)) = reasons.unwrap().value.clone() else {
        panic!("{reasons:?}");
    };
    assert_eq!(
        reasons.values[0].value,
        Some(Any::StringValue("stop".into()))
    );
    assert_eq!(text(server, "error.type"), None);
    assert_eq!(
        server.status.clone().unwrap_or_default().code,
        StatusCode::Unset as i32
    );

    let stages = stages(&spans, server);
    let names: Vec<&str> = stages.iter().map(|stage| stage.0).collect();
    assert_eq!(names, ["media", "queue", "vision", "prefill", "decode"]);
    let mut last = server.start_time_unix_nano;
    assert!(from <= last && server.end_time_unix_nano <= to + 1_000_000_000);
    for (name, stage) in &stages {
        assert_eq!(stage.trace_id, server.trace_id, "{name}");
        let (start, end) = (stage.start_time_unix_nano, stage.end_time_unix_nano);
        assert!(
            last <= start && start <= end && end <= server.end_time_unix_nano,
            "{name}"
        );
        // They begin one after another; a clip may still be read while it waits and is looked at, and be looked at
        // while the prompt is read.
        last = match *name {
            "media" | "vision" => start,
            _ => end,
        };
    }
    let decode = stages[4].1;
    assert!(decode.end_time_unix_nano > decode.start_time_unix_nano);

    assert_eq!(
        hex(&server.trace_id),
        line(&lines(&err), "/v1/chat/completions")["trace_id"]
    );
    let uri = data_uri("left.mp4");
    for private in [
        "Describe",
        "moves",
        said.as_str(),
        "data:video",
        &uri[30..60],
    ] {
        assert!(!collector.has_seen(private), "{private}");
    }
}

#[test]
fn a_callers_trace_goes_on_and_what_is_refused_is_no_error() {
    let collector = Collector::start();
    let words = ["--log-format", "json", "--otlp-endpoint", &collector.url];
    let server = Served::start_with(&words, &[("OTEL_SERVICE_NAME", "mine")]);
    let body = json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2});
    assert_eq!(ask_within(&server, &body, "01").status, 200);
    // The caller does not keep this one, so nobody does.
    assert_eq!(ask_within(&server, &body, "00").status, 200);
    let refused = server.post("/v1/videos/questions", &json!({"questions": ["Why?"]}));
    assert_eq!(refused.status, 400);
    let asked = ["Which way does it move?", "What colour is it?"];
    let body = json!({"video": data_uri("left.mp4"), "questions": asked});
    assert_eq!(server.post("/v1/videos/questions", &body).status, 200);
    server.signal("TERM");
    let (status, err) = server.end();
    assert_eq!(status, Some(0), "{err}");
    let said = lines(&err);
    let traced = said.iter().filter(|line| line["trace_id"] == TRACE);
    assert_eq!(traced.count(), 2, "{err}");

    let resource = collector.requests()[0].resource_spans[0]
        .resource
        .clone()
        .unwrap();
    let name = find(&resource.attributes, "service.name").unwrap();
    assert_eq!(name.value, Some(Any::StringValue("mine".into())));
    let spans = collector.spans();
    let servers = requests(&spans);
    let [callers, refused, several] = servers[..] else {
        panic!("{servers:?}");
    };
    assert_eq!(hex(&callers.trace_id), TRACE);
    assert_eq!(hex(&callers.parent_span_id), PARENT);
    assert_eq!(stages(&spans, callers).len(), 3);

    assert_eq!(number(refused, "http.response.status_code"), Some(400));
    assert_eq!(text(refused, "error.type"), None);
    assert_eq!(stages(&spans, refused).len(), 0);
    assert!(!collector.has_seen("Why?"));

    assert_eq!(
        text(several, "gen_ai.operation.name").as_deref(),
        Some("generate_content")
    );
    let stages = stages(&spans, several);
    let decodes = stages.iter().filter(|stage| stage.0 == "decode");
    let questions: Vec<_> = decodes
        .map(|(_, span)| number(span, "lnv.question"))
        .collect();
    assert_eq!(questions, [Some(0), Some(1)]);
}

#[test]
fn a_client_that_goes_away_leaves_its_spans() {
    let collector = Collector::start();
    let words = ["--log-format", "json", "--otlp-endpoint", &collector.url];
    let server = Served::start_with(&words, &[]);
    let mut stream = server.connect();
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{{"
    )
    .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    drop(stream);
    std::thread::sleep(Duration::from_millis(300));
    server.signal("TERM");
    let (status, err) = server.end();
    assert_eq!(status, Some(0), "{err}");
    let spans = collector.spans();
    let servers = requests(&spans);
    assert_eq!(servers.len(), 1, "{err}");
    let route = line(&lines(&err), "/v1/chat/completions").clone();
    assert_eq!(hex(&servers[0].trace_id), route["trace_id"]);
}

#[test]
fn a_collector_that_is_away_or_silent_costs_a_warning() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    for (url, wait) in [("http://127.0.0.1:1", 5), (&silent, 10)] {
        let words = ["--otlp-endpoint", url];
        // Spans are sent at once, and few may wait.
        let often = [
            ("OTEL_BSP_SCHEDULE_DELAY", "20"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "4"),
        ];
        let server = Served::start_with(&words, &often);
        let body = about("circle.png", "What shape is it?");
        let start = Instant::now();
        for _ in 0..6 {
            assert_eq!(content(&server.chat(&body), 0), "circle");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{:?}",
            start.elapsed()
        );
        // Some found the queue full, whatever becomes of those that are on their way.
        assert!(server.metric("lnv_trace_spans_dropped_total") >= 1.0);
        let start = Instant::now();
        server.signal("TERM");
        let (status, err) = server.end();
        assert_eq!(status, Some(0), "{err}");
        assert!(
            start.elapsed() < Duration::from_secs(wait),
            "{:?}",
            start.elapsed()
        );
        let warned =
            err.matches("traces do not reach").count() + err.matches("the last traces").count();
        assert_eq!(warned, 1, "{err}");
    }
}

/// What the environment says of one request, one row each.
#[test]
fn the_environment_says_where_spans_go_and_which() {
    const GENERAL: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    const OWN: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
    const HEADERS: &str = "OTEL_EXPORTER_OTLP_HEADERS";
    const OWN_HEADERS: &str = "OTEL_EXPORTER_OTLP_TRACES_HEADERS";
    const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
    type Row<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
    let collector = || {
        let collector = Collector::start();
        let own = format!("{}/own/path?key=1", collector.url);
        (collector, own)
    };
    let nowhere = "http://127.0.0.1:1";
    let rows: [Row<'_>; 9] = [
        (&[(GENERAL, "here")], &["post /v1/traces http"]),
        (
            &[(OWN, "own"), (GENERAL, nowhere)],
            &["post /own/path?key=1 http"],
        ),
        (
            &[(OWN, "own"), (HEADERS, "x-key=a%20b,x-other=c")],
            &["x-key: a b\r\n", "x-other: c\r\n"],
        ),
        (
            &[(OWN, "own"), (HEADERS, "x-key=a"), (OWN_HEADERS, "x-key=b")],
            &["x-key: b\r\n"],
        ),
        (&[(OWN, "own"), (SAMPLER, "always_on")], &["/own/path"]),
        (&[(OWN, "own"), (SAMPLER, "always_off")], &[]),
        (
            &[
                (OWN, "own"),
                (SAMPLER, "parentbased_traceidratio"),
                ("OTEL_TRACES_SAMPLER_ARG", "0"),
            ],
            &[],
        ),
        (&[(OWN, "own"), ("OTEL_SDK_DISABLED", "true")], &[]),
        (&[(OWN, "own"), ("OTEL_SDK_DISABLED", "false")], &["/own"]),
    ];
    for (variables, expected) in rows {
        let (collector, own) = collector();
        let place = |value| match value {
            "own" => own.as_str(),
            "here" => collector.url.as_str(),
            other => other,
        };
        let said = variables.iter().map(|(name, value)| (*name, place(value)));
        let server = Served::start_with(&[], &said.collect::<Vec<_>>());
        assert_eq!(server.get("/v1/models").status, 200);
        server.signal("TERM");
        let (status, err) = server.end();
        assert_eq!(status, Some(0), "{err}");
        let heads = collector.heads();
        assert_eq!(
            heads.len(),
            usize::from(!expected.is_empty()),
            "{variables:?}"
        );
        for part in expected {
            assert!(heads[0].contains(part), "{variables:?}: {}", heads[0]);
        }
        let disabled = variables.contains(&("OTEL_SDK_DISABLED", "true"));
        assert_eq!(err.contains("trace_id"), !disabled, "{err}");
    }
    // The option goes before all of them.
    let (collector, own) = collector();
    let words = ["--otlp-endpoint", &collector.url];
    let server = Served::start_with(&words, &[(OWN, &own), (GENERAL, nowhere)]);
    assert_eq!(server.get("/v1/models").status, 200);
    assert_eq!(server.metric("lnv_trace_spans_dropped_total"), 0.0);
    server.signal("TERM");
    server.end();
    assert!(collector.heads()[0].starts_with("post /v1/traces http"));
}

#[test]
fn nothing_is_sent_where_nothing_is_asked_for_and_nonsense_is_refused() {
    let collector = Collector::start();
    let server = Served::start_with(&[], &[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]);
    assert_eq!(server.get("/v1/models").status, 200);
    server.signal("TERM");
    let (_, err) = server.end();
    assert!(!err.contains("trace"), "{err}");
    run(&["serve", "--port", "0", "--otlp-endpoint", "localhost:4318"])
        .refuses(1, &["--otlp-endpoint", "http://localhost:4318"]);
    for (name, value, reason) in [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere", "cannot read"),
    ] {
        let mut command = lnv();
        command.args(["serve", "--port", "0", "--otlp-endpoint", &collector.url]);
        command.env(name, value);
        crate::support::Said::from(command.output().unwrap()).refuses(1, &[name, value, reason]);
    }
    assert!(collector.heads().is_empty());
}
