//! What all requests share: the checkpoint but for its weights, the engine, the media, and the gates that
//! bound how much is held at once.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use llava_next_video::engine::{Service, TokenText};
use llava_next_video::processor::tokenizer::Tokenizer;
use tokio::sync::Semaphore;

use super::content::MediaBounds;
use super::error::{ApiError, ApiResult};
use super::json_schema::JsonGrammars;
use super::media::MediaStore;
use super::metrics::Metrics;
use super::request::{AnswerBounds, random};
use super::trace::Traces;
use crate::pipeline::Pipeline;
use crate::stream::Text;

/// What was asked for on the command line, checked.
pub struct Settings {
    /// Names that the model goes by; the first is the one that answers carry.
    pub names: Vec<String>,
    /// When the model was loaded, in seconds since 1970.
    pub created: u64,
    /// What `/v1` asks for, if anything.
    pub api_key: Option<String>,
    /// Origins of pages that may ask, besides our own.
    pub origins: Vec<String>,
    /// Names that the server may be called by, besides addresses and localhost; `None` where any will do.
    pub hosts: Option<Vec<String>>,
    /// Whether X-Forwarded-For tells whose a request is.
    pub trust_proxy: bool,
    /// Bytes of a JSON body.
    pub max_body: usize,
    /// Bytes of an uploaded file.
    pub max_upload: usize,
    /// How long a request may take.
    pub timeout: Duration,
    /// Tokens of the context.
    pub context: usize,
    /// What may be asked of media.
    pub media: MediaBounds,
    /// What may be asked of answers.
    pub answers: AnswerBounds,
    /// Ids that end an answer.
    pub eos: Vec<u32>,
}

/// Budgets that requests take from and give back.
pub struct Gates {
    /// KiB of bodies in memory.
    pub bodies: Arc<Semaphore>,
    /// Requests that were taken and do not run yet.
    pub waiting: Arc<Semaphore>,
    /// Requests whose media are being fetched from elsewhere and read.
    pub fetching: Arc<Semaphore>,
    /// Requests whose media are here and are being read.
    pub preparing: Arc<Semaphore>,
    /// KiB of pixels that wait for the engine.
    pub pixels: Arc<Semaphore>,
    /// All of `pixels`.
    pub pixels_kib: usize,
}

/// The server.
pub struct Server {
    /// Configuration, tokenizer, templates.
    pub pipeline: Arc<Pipeline>,
    /// The engine.
    pub service: Service,
    /// Pictures and clips.
    pub media: Arc<MediaStore>,
    /// Forms that answers can be held to; none where the tokenizer cannot be followed.
    pub grammars: Option<JsonGrammars>,
    /// What was asked for on the command line.
    pub settings: Settings,
    /// What is counted.
    pub metrics: Metrics,
    /// What makes spans, where somebody wants them.
    pub traces: Option<Arc<Traces>>,
    /// What bounds memory.
    pub gates: Gates,
    /// True once the server is to stop.
    pub draining: AtomicBool,
    /// Makes ids.
    pub ids: Ids,
}

/// Ids that nobody can foresee and that do not repeat.
pub struct Ids {
    start: u64,
    next: AtomicU64,
}

impl Ids {
    /// Another series on each start.
    pub fn new() -> Self {
        Self {
            start: random(),
            next: AtomicU64::new(0),
        }
    }

    /// The next one, after `prefix`.
    pub fn next(&self, prefix: &str) -> String {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}{:016x}{n:08x}", self.start)
    }
}

/// The tokenizer on the engine's thread.
pub struct OwnText(pub Tokenizer);

impl TokenText for OwnText {
    fn text(&self, ids: &[u32]) -> String {
        Text(&self.0).text(ids)
    }
}

/// Where a request comes from.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

impl Server {
    /// The name that answers carry.
    pub fn name(&self) -> &str {
        self.settings.names.first().map_or("", String::as_str)
    }

    /// Refuses another model's name; none at all means ours.
    pub fn check_name(&self, name: Option<&str>) -> ApiResult<()> {
        match name {
            Some(name) if !self.settings.names.iter().any(|own| own == name) => {
                let name: String = name.chars().take(100).collect();
                let message = format!(
                    "there is no model \"{name}\" here, only \"{}\": ask for that one",
                    self.name()
                );
                Err(ApiError::not_found("model", "model_not_found", message))
            }
            _ => Ok(()),
        }
    }

    /// True once the server is to stop.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }
}
