//! What is counted, as text that Prometheus reads.
//!
//! Decision: the engine counts for itself; its figures are read at the moment of asking, so that nothing
//! is counted twice. Labels are routes and status codes only: nothing that a client may write at will.

use std::sync::atomic::AtomicU64;

use llava_next_video::engine::ServiceStats;
use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::log::Entry;
use super::state::Server;
use crate::memory;

/// The format of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Seconds: from a cached answer to one that waited in line.
const SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
    600.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    route: String,
    status: u16,
}

type Durations = Family<Outcome, Histogram, fn() -> Histogram>;
type Number = Gauge<f64, AtomicU64>;

/// All that is counted here.
pub struct Metrics {
    registry: Registry,
    durations: Durations,
    first_token: Histogram,
    per_token: Histogram,
    queue: Histogram,
    /// Connections that are open.
    pub connections: Gauge,
    /// Connections that were turned away.
    pub connections_refused: Counter,
    told: Vec<(Number, Told)>,
}

/// A figure that is asked for when it is told.
type Told = fn(&Server, &ServiceStats) -> f64;

/// What the engine, the system and the gates say.
const TOLD: [(&str, &str, Told); 29] = [
    (
        "lnv_requests_waiting",
        "Requests that wait for the engine",
        |_, s| s.waiting as f64,
    ),
    (
        "lnv_requests_running",
        "Requests that the engine runs",
        |_, s| s.running as f64,
    ),
    (
        "lnv_batch_sequences",
        "Sequences that decode now",
        |_, s| s.batch as f64,
    ),
    (
        "lnv_requests_answered",
        "Requests answered by the engine",
        |_, s| s.answered as f64,
    ),
    ("lnv_requests_cancelled", "Requests cancelled", |_, s| {
        s.cancelled as f64
    }),
    (
        "lnv_requests_failed",
        "Requests that ended with an error",
        |_, s| s.failed as f64,
    ),
    (
        "lnv_requests_preempted",
        "Requests put back for want of memory",
        |_, s| s.preempted as f64,
    ),
    ("lnv_prompt_tokens", "Prompt tokens", |_, s| {
        s.prompt_tokens as f64
    }),
    (
        "lnv_prompt_tokens_cached",
        "Prompt tokens found in the cache",
        |_, s| s.cached_tokens as f64,
    ),
    ("lnv_generation_tokens", "New tokens", |_, s| {
        s.new_tokens as f64
    }),
    ("lnv_engine_steps", "Steps of the engine", |_, s| {
        s.steps as f64
    }),
    (
        "lnv_features_found",
        "Pictures whose features were in the cache",
        |_, s| s.features_found as f64,
    ),
    (
        "lnv_features_encoded",
        "Pictures that were encoded",
        |_, s| s.features_encoded as f64,
    ),
    (
        "lnv_features_bytes",
        "Bytes of features that are kept",
        |_, s| s.features_bytes as f64,
    ),
    (
        "lnv_features_read",
        "Pictures whose features were read from disk",
        |_, s| s.features_read as f64,
    ),
    (
        "lnv_features_written",
        "Pictures whose features were written to disk",
        |_, s| s.features_on_disk.written as f64,
    ),
    (
        "lnv_features_unwritten",
        "Pictures whose features the disk did not take",
        |_, s| s.features_on_disk.unwritten as f64,
    ),
    (
        "lnv_features_disk_bytes",
        "Bytes of features on disk",
        |_, s| s.features_on_disk.bytes as f64,
    ),
    (
        "lnv_cache_blocks_in_use",
        "Cache blocks that sequences hold",
        |_, s| s.blocks_in_use as f64,
    ),
    (
        "lnv_cache_blocks_kept",
        "Cache blocks that a prefix may find",
        |_, s| s.blocks_kept as f64,
    ),
    ("lnv_cache_blocks", "Cache blocks there may be", |_, s| {
        s.blocks as f64
    }),
    ("lnv_cache_bytes", "Bytes of keys and values", |_, s| {
        s.cache_bytes as f64
    }),
    (
        "lnv_media_bytes",
        "Bytes of media that are kept",
        |server, _| server.media.stats().bytes as f64,
    ),
    (
        "lnv_upload_bytes",
        "Bytes of uploads that are kept",
        |server, _| server.media.stats().upload_bytes as f64,
    ),
    ("lnv_media_hits", "Media found in the cache", |server, _| {
        server.media.stats().hits as f64
    }),
    ("lnv_media_misses", "Media that were read", |server, _| {
        server.media.stats().misses as f64
    }),
    (
        "lnv_media_preparing_free",
        "Free places for reading media",
        |server, _| server.gates.preparing.available_permits() as f64,
    ),
    (
        "process_resident_memory_bytes",
        "Memory of the process",
        |_, _| memory::resident().unwrap_or(0) as f64,
    ),
    (
        "process_resident_memory_peak_bytes",
        "Most memory of the process at once",
        |_, _| memory::peak().unwrap_or(0) as f64,
    ),
];

fn histogram() -> Histogram {
    Histogram::new(SECONDS)
}

impl Metrics {
    /// Nothing counted yet.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let durations = Durations::new_with_constructor(histogram);
        let (first_token, per_token, queue) = (histogram(), histogram(), histogram());
        let connections = Gauge::default();
        let connections_refused = Counter::default();
        for (name, help, metric) in [
            (
                "lnv_time_to_first_token_seconds",
                "From a request's arrival to its first token",
                &first_token,
            ),
            (
                "lnv_time_per_output_token_seconds",
                "Between the tokens of an answer",
                &per_token,
            ),
            (
                "lnv_queue_seconds",
                "From a prompt that is ready to its first step",
                &queue,
            ),
        ] {
            registry.register(name, help, metric.clone());
        }
        registry.register(
            "lnv_request_duration_seconds",
            "Requests by route and status",
            durations.clone(),
        );
        registry.register("lnv_connections", "Open connections", connections.clone());
        registry.register(
            "lnv_connections_refused",
            "Connections beyond the limit",
            connections_refused.clone(),
        );
        let mut told = Vec::new();
        for (name, help, read) in TOLD {
            let gauge = Number::default();
            registry.register(name, help, gauge.clone());
            told.push((gauge, read));
        }
        Self {
            registry,
            durations,
            first_token,
            per_token,
            queue,
            connections,
            connections_refused,
            told,
        }
    }

    /// Counts a request that is over.
    pub fn request(&self, entry: &Entry, status: u16) {
        let outcome = Outcome {
            route: entry.route.clone(),
            status,
        };
        self.durations
            .get_or_create(&outcome)
            .observe(entry.start.elapsed().as_secs_f64());
        if let (Some(first), Some(last)) = (entry.first_token, entry.last_token) {
            self.first_token
                .observe((first - entry.start).as_secs_f64());
            self.queue.observe(entry.queue_s);
            if entry.new_tokens > 1 {
                let gaps = (entry.new_tokens - 1) as f64;
                self.per_token.observe((last - first).as_secs_f64() / gaps);
            }
        }
    }

    /// All of it, as text.
    pub fn text(&self, server: &Server) -> String {
        let stats = server.service.stats();
        for (gauge, read) in &self.told {
            gauge.set(read(server, &stats));
        }
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
