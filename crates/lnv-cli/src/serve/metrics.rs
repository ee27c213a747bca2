//! What is counted, as text that Prometheus reads.
//!
//! Decision: the engine counts for itself; its figures are read at the moment of asking, so that nothing
//! is counted twice. Labels are routes and status codes only: nothing that a client may write at will.

use std::sync::atomic::{AtomicU64, Ordering};

use llava_next_video::engine::ServiceStats;
use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::log::Entry;
use super::media::MediaStats;
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
    counted: Vec<(Counter, Told<u64>)>,
    told: Vec<(Number, Told<f64>)>,
}

/// A figure that is asked for when it is told.
type Told<T> = fn(&Server, &ServiceStats, &MediaStats) -> T;

/// What the engine and the store have counted since the start; their names end in `_total`.
const COUNTED: [(&str, &str, Told<u64>); 15] = [
    (
        "lnv_features_read",
        "Pictures whose features were read from disk",
        |_, s, _| s.features_read as u64,
    ),
    (
        "lnv_features_written",
        "Pictures whose features were written to disk",
        |_, s, _| s.features_on_disk.written as u64,
    ),
    (
        "lnv_features_unwritten",
        "Pictures whose features the disk did not take",
        |_, s, _| s.features_on_disk.unwritten as u64,
    ),
    (
        "lnv_requests_answered",
        "Requests answered by the engine",
        |_, s, _| s.answered as u64,
    ),
    ("lnv_requests_cancelled", "Requests cancelled", |_, s, _| {
        s.cancelled as u64
    }),
    (
        "lnv_requests_failed",
        "Requests that ended with an error",
        |_, s, _| s.failed as u64,
    ),
    (
        "lnv_requests_preempted",
        "Requests put back for want of memory",
        |_, s, _| s.preempted as u64,
    ),
    ("lnv_prompt_tokens", "Prompt tokens", |_, s, _| {
        s.prompt_tokens as u64
    }),
    (
        "lnv_prompt_tokens_cached",
        "Prompt tokens found in the cache",
        |_, s, _| s.cached_tokens as u64,
    ),
    ("lnv_generation_tokens", "New tokens", |_, s, _| {
        s.new_tokens as u64
    }),
    ("lnv_engine_steps", "Steps of the engine", |_, s, _| {
        s.steps as u64
    }),
    (
        "lnv_features_found",
        "Pictures whose features were in the cache",
        |_, s, _| s.features_found as u64,
    ),
    (
        "lnv_features_encoded",
        "Pictures that were encoded",
        |_, s, _| s.features_encoded as u64,
    ),
    ("lnv_media_hits", "Media found in the cache", |_, _, m| {
        m.hits
    }),
    ("lnv_media_misses", "Media that were decoded", |_, _, m| {
        m.misses
    }),
];

/// What the engine, the store, the system and the gates have now.
const TOLD: [(&str, &str, Told<f64>); 18] = [
    (
        "lnv_requests_waiting",
        "Requests that wait for the engine",
        |_, s, _| s.waiting as f64,
    ),
    (
        "lnv_requests_running",
        "Requests that the engine runs",
        |_, s, _| s.running as f64,
    ),
    (
        "lnv_batch_sequences",
        "Sequences that decode now",
        |_, s, _| s.batch as f64,
    ),
    (
        "lnv_features_bytes",
        "Bytes of features that are kept",
        |_, s, _| s.features_bytes as f64,
    ),
    (
        "lnv_features_disk_bytes",
        "Bytes of features on disk",
        |_, s, _| s.features_on_disk.bytes as f64,
    ),
    (
        "lnv_cache_blocks_in_use",
        "Cache blocks that sequences hold",
        |_, s, _| s.blocks_in_use as f64,
    ),
    (
        "lnv_cache_blocks_kept",
        "Cache blocks that a prefix may find",
        |_, s, _| s.blocks_kept as f64,
    ),
    (
        "lnv_cache_blocks",
        "Cache blocks there may be",
        |_, s, _| s.blocks as f64,
    ),
    ("lnv_cache_bytes", "Bytes of keys and values", |_, s, _| {
        s.cache_bytes as f64
    }),
    (
        "lnv_media_bytes",
        "Bytes of decoded media that are kept",
        |_, _, m| m.bytes as f64,
    ),
    (
        "lnv_decode_bytes",
        "Bytes that decodes may take and decoded media under way have",
        |_, _, m| m.decode_bytes as f64,
    ),
    (
        "lnv_upload_bytes",
        "Bytes of uploads that are kept",
        |_, _, m| m.upload_bytes as f64,
    ),
    ("lnv_media_fetching", "Fetches that run", |_, _, m| {
        m.fetching as f64
    }),
    ("lnv_media_decoding", "Decodes that run", |_, _, m| {
        m.decoding as f64
    }),
    (
        "lnv_media_preparing_free",
        "Free places for reading media",
        |server, _, _| server.gates.preparing.available_permits() as f64,
    ),
    (
        "lnv_engine_broken",
        "1 after a bug has ended the engine",
        |server, _, _| f64::from(u8::from(server.service.is_broken())),
    ),
    (
        "process_resident_memory_bytes",
        "Memory of the process",
        |_, _, _| memory::resident().unwrap_or(0) as f64,
    ),
    (
        "process_resident_memory_peak_bytes",
        "Most memory of the process at once",
        |_, _, _| memory::peak().unwrap_or(0) as f64,
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
        let mut counted = Vec::new();
        for (name, help, read) in COUNTED {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counted.push((counter, read));
        }
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
            counted,
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
        if let (Some(first), Some(last)) = (entry.first_token(), entry.last_token()) {
            self.first_token
                .observe((first - entry.start).as_secs_f64());
            self.queue.observe(entry.queue_s());
            let new_tokens: usize = entry.sum(|question| question.new_tokens);
            if new_tokens > 1 {
                let gaps = (new_tokens - 1) as f64;
                self.per_token.observe((last - first).as_secs_f64() / gaps);
            }
        }
    }

    /// All of it, as text.
    pub fn text(&self, server: &Server) -> String {
        let stats = server.service.stats();
        let media = server.media.stats();
        for (counter, read) in &self.counted {
            // The count is another's: it is taken over, not added to, and never falls.
            let count = read(server, &stats, &media);
            counter.inner().fetch_max(count, Ordering::Relaxed);
        }
        for (gauge, read) in &self.told {
            gauge.set(read(server, &stats, &media));
        }
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
