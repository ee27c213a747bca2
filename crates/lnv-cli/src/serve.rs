//! `lnv serve`: answers over HTTP as OpenAI's API does, for many people at once, with a page to try it.
//!
//! Decision: the async runtime lives here and does nothing but wait: for sockets, for the engine's thread,
//! and for the blocking threads that read media. One listener speaks HTTP/1.1; TLS is a proxy's task.
//! Everything that a client makes the server hold has a budget, and a client that does not read, does not
//! send or is gone is cut off in bounded time.
//!
//! It refuses at the start what it cannot do (an address in use, an empty key), before the model is loaded.

mod arriving;
mod begin;
mod body;
mod chat;
mod content;
mod course;
mod error;
mod events;
mod fields;
mod job;
mod json_schema;
mod log;
mod logprobs;
pub mod media;
mod metrics;
mod openapi;
mod page;
mod request;
mod routes;
mod state;
mod trace;
mod uploads;
mod videos;

use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use llava_next_video::config::RopeOverride;
use llava_next_video::engine::{
    Engine, EngineLimits, FeatureStore, Service, ServiceLimits, context_length,
};
use llava_next_video::error::io_reason;
use llava_next_video::model::LlavaNextVideoModel;
use lnv_kernels::KV_BLOCK;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_io_timeout::TimeoutStream;

use crate::args::ServeArgs;
use crate::ask::DEFAULT_NEW_TOKENS;
use crate::memory;
use crate::model::RunOptions;
use crate::output;
use crate::pipeline::Pipeline;
use content::MediaBounds;
use error::{ApiError, ApiResult};
use json_schema::JsonGrammars;
use media::{MediaPolicy, MediaStore};
use metrics::Metrics;
use request::AnswerBounds;
use state::{Gates, Ids, OwnText, Peer, Server, Settings};

/// How long a client may take over a request's head, and an idle connection stays open.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a client may take to read what was sent before it is cut off.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// The largest head, in bytes.
const MAX_HEAD: usize = 64 << 10;

/// Threads for what blocks.
const BLOCKING_THREADS: usize = 64;

/// Requests whose media are fetched at once.
const FETCHING: usize = 16;

/// Bytes of one clip's frames before they are scaled.
const MAX_DECODED: u64 = 512 << 20;

/// The least memory of a process that decodes, in MiB: FFmpeg's libraries alone take half of it in addresses.
const LEAST_DECODER_MIB: usize = 512;

/// Connections that are told that there are too many, at once; more are closed without a word.
const TURNED_AWAY: usize = 64;

/// Keys and values may have this share of the memory that is left, where nothing is said.
const KV_SHARE: usize = 4;

/// The longest context that is reckoned with where it has no end.
const MAX_AUTO_CONTEXT: usize = 32 << 10;

/// Frames that `--rope-scaling auto` reckons with at least.
const ROPE_FRAMES: usize = 32;

/// How long the disk may take for features that were encoded last, when the server ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs the command.
pub fn run(args: &ServeArgs) -> Result<()> {
    check(args)?;
    let options = RunOptions::new(&args.model.run)?;
    // An address that is taken is found out before the model is loaded.
    let address = SocketAddr::new(args.host, args.port);
    let listener = TcpListener::bind(address).map_err(|cause| {
        let reason = io_reason(&cause);
        anyhow::anyhow!("cannot listen on {address} ({reason}): give another --port or --host")
    })?;
    let traces = trace::wanted(args.otlp_endpoint.as_deref())?;
    let mut settings = settings(args);
    let pipeline = Pipeline::open(args.model.model.as_deref(), true)?;
    let media = MediaStore::new(policy(args, &pipeline))?;
    let frames = match options.rope {
        Some(RopeOverride::Auto) => args.media.default_frames.max(ROPE_FRAMES),
        _ => 0,
    };
    let loaded = options.load(pipeline.config.clone(), &pipeline.files, frames)?;
    let mut engine = engine(args, loaded.model, &pipeline)?;
    let features = features(args, &engine)?;
    if let Some(features) = &features {
        engine.set_feature_store(Arc::clone(features));
    }
    let text = &engine.model().config().text_config;
    settings.context = context_length(text);
    settings.eos = match pipeline.generation.eos_token_ids.is_empty() {
        true => text.eos_token_ids.clone(),
        false => pipeline.generation.eos_token_ids.clone(),
    };
    settings.answers = answers(args, &pipeline);
    let grammars = grammars(&pipeline, &settings.eos);
    // The places in the line bound what waits. One place may be several questions, of which the engine must
    // turn none away: the others may be answered already.
    let waiting = args.limits.max_waiting.saturating_mul(videos::AT_ONCE + 1);
    let tokenizer = pipeline.processor.tokenizer.clone();
    let service = Service::start(
        engine,
        Arc::new(OwnText(tokenizer)),
        ServiceLimits { waiting },
    );
    let server = Arc::new(Server {
        pipeline: Arc::new(pipeline),
        service,
        media: Arc::new(media),
        grammars,
        settings,
        metrics: Metrics::new(),
        traces: traces.clone(),
        gates: gates(args),
        draining: AtomicBool::new(false),
        ids: Ids::new(),
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("lnv-http")
        .enable_all()
        .build()
        .context("cannot start the server's threads")?;
    let result = runtime.block_on(listen(server, listener, args));
    // What still blocks is reading some file; nobody waits for it.
    runtime.shutdown_timeout(Duration::from_millis(100));
    if let Some(features) = features {
        features.flush(FLUSH_TIMEOUT);
    }
    if let Some(traces) = traces {
        traces.end();
    }
    result
}

/// Refuses nonsense by the option's name.
fn check(args: &ServeArgs) -> Result<()> {
    let limits = &args.limits;
    for (name, value) in [
        ("--max-tokens", limits.max_tokens),
        ("--max-waiting", limits.max_waiting),
        ("--max-connections", limits.max_connections),
        ("--max-body-mib", limits.max_body_mib),
        ("--body-memory-mib", limits.body_memory_mib),
        ("--pixel-memory-mib", limits.pixel_memory_mib),
        ("--feature-cache-disk-mib", limits.feature_cache_disk_mib),
        ("--decode-memory-mib", limits.decode_memory_mib),
        ("--decoder-memory-mib", limits.decoder_memory_mib),
        ("--default-frames", args.media.default_frames),
        ("--max-frames", args.media.max_frames),
        ("--max-media", args.media.max_media),
        ("--max-media-mib", args.media.max_media_mib),
    ] {
        if value == 0 || value > 1 << 20 {
            bail!("{name} is {value}; it must be from 1 to {}", 1 << 20);
        }
    }
    if limits.request_timeout == 0 || limits.request_timeout > 1 << 24 {
        bail!("--request-timeout must be from 1 to {} seconds", 1 << 24);
    }
    if limits.decoder_memory_mib < LEAST_DECODER_MIB {
        bail!(
            "--decoder-memory-mib is {}; less than {LEAST_DECODER_MIB} is not enough to load FFmpeg and decode",
            limits.decoder_memory_mib
        );
    }
    if args.media.default_frames > args.media.max_frames {
        bail!(
            "--default-frames is {}, more than --max-frames ({})",
            args.media.default_frames,
            args.media.max_frames
        );
    }
    match &args.api_key {
        Some(key) if key.trim().is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) => {
            bail!("the API key must be letters, digits and signs without blanks, and not empty")
        }
        _ => Ok(()),
    }
}

/// The engine with its memory: as asked for, or a share of what the machine has left.
fn engine(args: &ServeArgs, model: LlavaNextVideoModel, pipeline: &Pipeline) -> Result<Engine> {
    let one = model.language_model().new_cache(model.ops(), 1)?;
    let block = one.bytes().max(1);
    let context = context_length(&model.config().text_config);
    let longest = context.min(MAX_AUTO_CONTEXT).div_ceil(KV_BLOCK);
    let least = (longest + 1).saturating_mul(block).div_ceil(1 << 20);
    let bytes = match args.limits.kv_cache_mib {
        Some(mib) if mib < least => bail!(
            "--kv-cache-mib is {mib}, but one prompt of {} tokens takes {least}: give at least {least}",
            longest * KV_BLOCK
        ),
        Some(mib) => mib.saturating_mul(1 << 20),
        None => match model.ops().device_memory() {
            // The weights are there; a quarter is left for activations.
            Some((free, _)) => free / 4 * 3,
            None => memory::available().unwrap_or(1 << 32) as usize / KV_SHARE,
        },
    };
    let usual = EngineLimits::default();
    // More than all sequences at their longest is never used; less than one of them could never run.
    let most = longest.saturating_mul(usual.batch);
    let limits = EngineLimits {
        cache_blocks: Some((bytes / block).clamp(longest + 1, most.max(longest + 1))),
        feature_bytes: args.limits.feature_cache_mib << 20,
        prefer: args.prefer.into(),
        ..usual
    };
    let (model, defaults) = (Arc::new(model), pipeline.generation.clone());
    Ok(Engine::with_limits(model, defaults, limits)?)
}

/// The directory of features, if there is to be one.
fn features(args: &ServeArgs, engine: &Engine) -> Result<Option<Arc<FeatureStore>>> {
    let Some(directory) = &args.limits.feature_cache else {
        return Ok(None);
    };
    let budget = (args.limits.feature_cache_disk_mib as u64) << 20;
    let store = FeatureStore::open(directory, budget, engine.model());
    let store = store.map_err(|cause| {
        anyhow::anyhow!("{cause}: give another --feature-cache, or none to do without")
    })?;
    Ok(Some(Arc::new(store)))
}

/// What holds answers to JSON. A tokenizer that it cannot follow is said and does no other harm.
fn grammars(pipeline: &Pipeline, eos: &[u32]) -> Option<JsonGrammars> {
    let bytes = pipeline.files.read("tokenizer.json").ok().flatten()?;
    match JsonGrammars::new(&bytes, eos) {
        Ok(grammars) => Some(grammars),
        Err(cause) => {
            let cause = output::sentence(&cause);
            tracing::warn!(target: "lnv::serve", "answers cannot be held to JSON here: {cause}");
            None
        }
    }
}

/// `--model` as a name: what was typed, and its last part.
fn names(args: &ServeArgs) -> Vec<String> {
    if !args.served_model_name.is_empty() {
        return args.served_model_name.clone();
    }
    let Some(model) = args.model.model.as_deref() else {
        return vec!["lnv-demo".to_owned()];
    };
    let last = std::path::Path::new(model).file_name();
    let last = last.map(|name| name.to_string_lossy().into_owned());
    // A path of this machine is nobody's business; a hub id is the name that people know.
    match last {
        Some(last) if std::path::Path::new(model).exists() => vec![last, model.to_owned()],
        Some(last) => vec![model.to_owned(), last],
        None => vec![model.to_owned()],
    }
}

fn settings(args: &ServeArgs) -> Settings {
    Settings {
        names: names(args),
        created: chat::now(),
        api_key: args.api_key.clone(),
        origins: args.allow_origin.clone(),
        hosts: hosts(args),
        trust_proxy: args.trust_proxy,
        max_body: args.limits.max_body_mib << 20,
        max_upload: args.media.max_media_mib << 20,
        timeout: Duration::from_secs(args.limits.request_timeout),
        context: 0,
        media: MediaBounds {
            default_frames: args.media.default_frames,
            max_frames: args.media.max_frames,
            max_media: args.media.max_media,
        },
        answers: AnswerBounds {
            max_tokens: args.limits.max_tokens,
            default_tokens: DEFAULT_NEW_TOKENS,
            defaults: Default::default(),
        },
        eos: Vec::new(),
    }
}

/// Names that the server answers to. Whoever listens beyond this machine and asks for a key answers to any: a page
/// that had its own name lead here would still need the key.
fn hosts(args: &ServeArgs) -> Option<Vec<String>> {
    let guarded = args.host.is_loopback() || args.api_key.is_none();
    guarded.then(|| args.allow_host.clone())
}

fn answers(args: &ServeArgs, pipeline: &Pipeline) -> AnswerBounds {
    let usual = pipeline.generation.max_new_tokens;
    AnswerBounds {
        max_tokens: args.limits.max_tokens,
        default_tokens: usual.unwrap_or(DEFAULT_NEW_TOKENS),
        defaults: pipeline.generation.clone(),
    }
}

fn policy(args: &ServeArgs, pipeline: &Pipeline) -> MediaPolicy {
    MediaPolicy {
        allowed_local: args.media.allow_local.clone(),
        allow_private: args.media.allow_private_addresses,
        max_bytes: (args.media.max_media_mib as u64) << 20,
        max_frames: args.media.max_frames,
        shrinking: pipeline.processor.video_processor.settings.resizing(),
        max_decoded_bytes: MAX_DECODED,
        decode_bytes: (args.limits.decode_memory_mib as u64) << 20,
        decoder_bytes: (args.limits.decoder_memory_mib as u64) << 20,
        cache_bytes: (args.media.media_cache_mib as u64) << 20,
        fetched_bytes: (args.media.fetch_cache_mib as u64) << 20,
        upload_bytes: (args.media.upload_cache_mib as u64) << 20,
        ..MediaPolicy::default()
    }
}

fn gates(args: &ServeArgs) -> Gates {
    let semaphore = |n: usize| Arc::new(Semaphore::new(n.min(Semaphore::MAX_PERMITS)));
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let pixels_kib = args.limits.pixel_memory_mib << 10;
    Gates {
        bodies: semaphore(args.limits.body_memory_mib << 10),
        waiting: semaphore(args.limits.max_waiting),
        fetching: semaphore(FETCHING),
        preparing: semaphore(cores.clamp(2, 16)),
        pixels: semaphore(pixels_kib),
        pixels_kib,
    }
}

/// Accepts until told to stop, then lets what runs finish.
async fn listen(server: Arc<Server>, listener: TcpListener, args: &ServeArgs) -> Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut signals = Signals::new()?;
    let address = listener.local_addr()?;
    // The one line of this command on stdout, for people and for scripts that took port 0.
    output::line(&format!("lnv serves {} at http://{address}", server.name()))?;
    let router = routes::router(Arc::clone(&server));
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(args.limits.max_connections));
    let turned_away = Arc::new(Semaphore::new(TURNED_AWAY));
    loop {
        let accepted = tokio::select! {
            () = signals.next() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(cause) => {
                // Out of file descriptors, most likely: others must end first.
                tracing::warn!(target: "lnv::serve", "cannot accept: {}", io_reason(&cause));
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            server.metrics.connections_refused.inc();
            if let Ok(place) = Arc::clone(&turned_away).try_acquire_owned() {
                tokio::spawn(async move {
                    turn_away(stream).await;
                    drop(place);
                });
            }
            continue;
        };
        let connection = connection(stream, peer, router.clone());
        let connection = graceful.watch(connection);
        let server = Arc::clone(&server);
        server.metrics.connections.inc();
        tokio::spawn(async move {
            // How a connection broke is nobody's news.
            let _ = connection.await;
            server.metrics.connections.dec();
            drop(place);
        });
    }
    drop(listener);
    server.draining.store(true, Ordering::SeqCst);
    tracing::info!(target: "lnv::serve", "stopping: no more requests, those taken are answered");
    tokio::select! {
        () = graceful.shutdown() => {}
        () = sleep(Duration::from_secs(args.limits.drain_seconds)) => {
            tracing::warn!(target: "lnv::serve", "some requests took too long and were cut off");
        }
        () = signals.next() => {}
    }
    server.service.close();
    Ok(())
}

/// HTTP on one connection.
fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = hyper::Error> + Send + 'static {
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIMEOUT));
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer.ip()));
        router.call(request)
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(Box::pin(stream)), service)
}

/// Says that there are too many connections.
async fn turn_away(mut stream: TcpStream) {
    let body = ApiError::busy("too many connections are open: try again in a moment").json();
    let body = body.to_string();
    let answer = format!(
        "HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 2\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let until = Instant::now() + Duration::from_secs(1);
    let talk = async {
        // A close with unread bytes would reset the connection and lose the answer.
        let _ = timeout(Duration::from_millis(200), stream.read(&mut [0; 4096])).await;
        let _ = stream.write_all(answer.as_bytes()).await;
        let _ = stream.shutdown().await;
        while matches!(stream.read(&mut [0; 4096]).await, Ok(n) if n > 0) {}
    };
    let _ = timeout_at(until, talk).await;
}

/// Ctrl-C and SIGTERM.
struct Signals {
    #[cfg(unix)]
    term: tokio::signal::unix::Signal,
    #[cfg(unix)]
    int: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let listen = |kind| signal(kind).context("cannot listen for signals");
            Ok(Self {
                term: listen(SignalKind::terminate())?,
                int: listen(SignalKind::interrupt())?,
            })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
        #[cfg(not(unix))]
        let _ = tokio::signal::ctrl_c().await;
    }
}

/// Runs a request's work up to its deadline.
async fn within<T>(
    server: &Server,
    deadline: Instant,
    work: impl Future<Output = ApiResult<T>>,
) -> ApiResult<T> {
    let done = timeout_at(deadline, work).await;
    done.unwrap_or_else(|_| Err(timed_out(server)))
}

/// A request took longer than it may.
fn timed_out(server: &Server) -> ApiError {
    ApiError::timeout(format!(
        "the request took more than {} seconds and was given up: ask for fewer tokens or frames, or \
         again when the server has less to do",
        server.settings.timeout.as_secs()
    ))
}
