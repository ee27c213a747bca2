//! What is counted, as text that Prometheus reads.
//!
//! Decision: the engine counts for itself; its figures are read at the moment of asking, so that nothing
//! is counted twice. Labels are routes and status codes only: nothing that a client may write at will.

use llava_next_video::engine::ServiceStats;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode, encode_registry};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
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
}

/// What the engine, the store and the traces have counted since the start; the names end in `_total`.
fn counted(told: &mut Registry, server: &Server, engine: &ServiceStats, media: &MediaStats) {
    let mut count =
        |name: &str, help: &str, n: u64| told.register(name, help, ConstCounter::new(n));
    count(
        "lnv_features_read",
        "Pictures whose features were read from disk",
        engine.features_read as u64,
    );
    count(
        "lnv_features_written",
        "Pictures whose features were written to disk",
        engine.features_on_disk.written as u64,
    );
    count(
        "lnv_features_unwritten",
        "Pictures whose features the disk did not take",
        engine.features_on_disk.unwritten as u64,
    );
    count(
        "lnv_requests_answered",
        "Requests answered by the engine",
        engine.answered as u64,
    );
    count(
        "lnv_requests_cancelled",
        "Requests cancelled",
        engine.cancelled as u64,
    );
    count(
        "lnv_requests_failed",
        "Requests that ended with an error",
        engine.failed as u64,
    );
    count(
        "lnv_requests_preempted",
        "Requests put back for want of memory",
        engine.preempted as u64,
    );
    count(
        "lnv_prompt_tokens",
        "Prompt tokens",
        engine.prompt_tokens as u64,
    );
    count(
        "lnv_prompt_tokens_cached",
        "Prompt tokens found in the cache",
        engine.cached_tokens as u64,
    );
    count(
        "lnv_generation_tokens",
        "New tokens",
        engine.new_tokens as u64,
    );
    count(
        "lnv_engine_steps",
        "Steps of the engine",
        engine.steps as u64,
    );
    count(
        "lnv_features_found",
        "Pictures whose features were in the cache",
        engine.features_found as u64,
    );
    count(
        "lnv_features_encoded",
        "Pictures that were encoded",
        engine.features_encoded as u64,
    );
    count("lnv_media_hits", "Media found in the cache", media.hits);
    count("lnv_media_misses", "Media that were decoded", media.misses);
    count(
        "lnv_trace_spans_dropped",
        "Spans of traces that did not reach their collector",
        server.traces.as_ref().map_or(0, |traces| traces.dropped()),
    );
}

/// What the engine, the store, the system and the gates have now.
fn present(told: &mut Registry, server: &Server, engine: &ServiceStats, media: &MediaStats) {
    let mut now = |name: &str, help: &str, x: f64| told.register(name, help, ConstGauge::new(x));
    now(
        "lnv_requests_waiting",
        "Requests that wait for the engine",
        engine.waiting as f64,
    );
    now(
        "lnv_requests_running",
        "Requests that the engine runs",
        engine.running as f64,
    );
    now(
        "lnv_batch_sequences",
        "Sequences that decode now",
        engine.batch as f64,
    );
    now(
        "lnv_features_bytes",
        "Bytes of features that are kept",
        engine.features_bytes as f64,
    );
    now(
        "lnv_features_disk_bytes",
        "Bytes of features on disk",
        engine.features_on_disk.bytes as f64,
    );
    now(
        "lnv_cache_blocks_in_use",
        "Cache blocks that sequences hold",
        engine.blocks_in_use as f64,
    );
    now(
        "lnv_cache_blocks_kept",
        "Cache blocks that a prefix may find",
        engine.blocks_kept as f64,
    );
    now(
        "lnv_cache_blocks",
        "Cache blocks there may be",
        engine.blocks as f64,
    );
    now(
        "lnv_cache_bytes",
        "Bytes of keys and values",
        engine.cache_bytes as f64,
    );
    now(
        "lnv_media_bytes",
        "Bytes of decoded media that are kept",
        media.bytes as f64,
    );
    now(
        "lnv_decode_bytes",
        "Bytes that decodes may take and decoded media under way have",
        media.decode_bytes as f64,
    );
    now(
        "lnv_upload_bytes",
        "Bytes of uploads that are kept",
        media.upload_bytes as f64,
    );
    now(
        "lnv_fetched_bytes",
        "Bytes of fetched files that are kept",
        media.fetched_bytes as f64,
    );
    now(
        "lnv_media_fetching",
        "Fetches that run",
        media.fetching as f64,
    );
    now(
        "lnv_media_decoding",
        "Decodes that run",
        media.decoding as f64,
    );
    now(
        "lnv_media_preparing_free",
        "Free places for reading media",
        server.gates.preparing.available_permits() as f64,
    );
    now(
        "lnv_engine_broken",
        "1 after a bug has ended the engine",
        f64::from(u8::from(server.service.is_broken())),
    );
    now(
        "process_resident_memory_bytes",
        "Memory of the process",
        memory::resident().unwrap_or(0) as f64,
    );
    now(
        "process_resident_memory_peak_bytes",
        "Most memory of the process at once",
        memory::peak().unwrap_or(0) as f64,
    );
}

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
        Self {
            registry,
            durations,
            first_token,
            per_token,
            queue,
            connections,
            connections_refused,
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
        let mut told = Registry::default();
        counted(&mut told, server, &stats, &media);
        present(&mut told, server, &stats, &media);
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode_registry(&mut text, &self.registry);
        let _ = encode(&mut text, &told);
        text
    }
}
