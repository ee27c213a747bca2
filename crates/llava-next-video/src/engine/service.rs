//! The engine on a thread of its own, for callers that come and go.
//!
//! Decision: requests go in over a channel and events come out through each request's own callback, so
//! that the library starts no async runtime and a caller may bring its own. Every accepted request hears
//! [`RequestEvent::Done`] exactly once, whatever happens; one that no longer wants to says so by `Break`.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use super::constraint::Constraints;
use super::request::{Event, Generation, GenerationOptions};
use super::runner::Engine;
use super::stop::TokenText;
use crate::error::Result;
use crate::processor::inputs::ModelInputs;

/// Called with what happens to a request; `Break` cancels it.
pub type OnRequestEvent = Box<dyn FnMut(RequestEvent) -> ControlFlow<()> + Send>;

/// One question of many.
pub struct Request {
    /// Prompt rows and their pixels.
    pub inputs: ModelInputs,
    /// How to answer.
    pub options: GenerationOptions,
    /// What the answers must look like, if anything.
    pub constraints: Option<Arc<dyn Constraints>>,
    /// Whose it is: clients that wait take turns.
    pub client: u64,
    /// Hears what happens. Runs on the engine's thread, so it must be quick.
    pub on_event: OnRequestEvent,
}

/// What happens to a request.
#[derive(Debug)]
pub enum RequestEvent {
    /// It goes on.
    Progress(Event),
    /// It is over, with an answer or not.
    Done(Result<Generation>),
}

/// A request's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// How much is taken at a time.
#[derive(Debug, Clone, Copy)]
pub struct ServiceLimits {
    /// Requests that wait at most; more are refused.
    pub waiting: usize,
}

impl Default for ServiceLimits {
    fn default() -> Self {
        Self { waiting: 256 }
    }
}

/// Why a request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// So many wait already.
    Full(usize),
    /// The service is closing.
    Closing,
}

/// What the engine has done and is doing; counts since the start unless said.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ServiceStats {
    /// Requests that wait now.
    pub waiting: usize,
    /// Requests that run now.
    pub running: usize,
    /// Sequences that decode now.
    pub batch: usize,
    /// Requests answered.
    pub answered: usize,
    /// Requests cancelled by their caller.
    pub cancelled: usize,
    /// Requests that ended with an error.
    pub failed: usize,
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Of these, found in the cache.
    pub cached_tokens: usize,
    /// New tokens.
    pub new_tokens: usize,
    /// Steps of the engine.
    pub steps: usize,
    /// Times that a running request was put back to wait for want of memory.
    pub preempted: usize,
    /// Pictures whose features were found in the cache, and those that were encoded.
    pub features_found: usize,
    /// See `features_found`.
    pub features_encoded: usize,
    /// Bytes of features that are kept now.
    pub features_bytes: usize,
    /// Cache blocks that sequences hold now.
    pub blocks_in_use: usize,
    /// Cache blocks without an owner that a prefix may find again.
    pub blocks_kept: usize,
    /// Cache blocks there may be at most.
    pub blocks: usize,
    /// Bytes of the cache of keys and values now.
    pub cache_bytes: usize,
}

/// A handle to the engine's thread. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    shared: Arc<Shared>,
}

struct Shared {
    sender: Mutex<mpsc::Sender<(RequestId, Request)>>,
    next: Mutex<u64>,
    limits: ServiceLimits,
    waiting: AtomicUsize,
    closing: AtomicBool,
    stats: Mutex<ServiceStats>,
}

impl Service {
    /// Starts the engine's thread.
    pub fn start(
        mut engine: Engine,
        text: Arc<dyn TokenText + Send + Sync>,
        limits: ServiceLimits,
    ) -> Service {
        let (sender, receiver) = mpsc::channel::<(RequestId, Request)>();
        let shared = Arc::new(Shared {
            sender: Mutex::new(sender),
            next: Mutex::new(0),
            limits,
            waiting: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            stats: Mutex::default(),
        });
        let own = Arc::clone(&shared);
        std::thread::spawn(move || {
            for (_, mut request) in receiver {
                own.waiting.fetch_sub(1, Ordering::SeqCst);
                let on_event = &mut request.on_event;
                let result = engine.generate(
                    &request.inputs,
                    &request.options,
                    text.as_ref(),
                    &mut |event| on_event(RequestEvent::Progress(event)),
                );
                let _ = (request.on_event)(RequestEvent::Done(result));
            }
        });
        Service { shared }
    }

    /// Hands a request over.
    ///
    /// # Errors
    /// Too many wait, or the service is closing; the request has then heard nothing.
    pub fn submit(&self, request: Request) -> std::result::Result<RequestId, Refused> {
        if self.shared.closing.load(Ordering::SeqCst) {
            return Err(Refused::Closing);
        }
        let waiting = self.shared.waiting.load(Ordering::SeqCst);
        if waiting >= self.shared.limits.waiting {
            return Err(Refused::Full(waiting));
        }
        let mut next = self.shared.next.lock().expect("no panic while held");
        *next += 1;
        let id = RequestId(*next);
        self.shared.waiting.fetch_add(1, Ordering::SeqCst);
        let sender = self.shared.sender.lock().expect("no panic while held");
        sender.send((id, request)).map_err(|_| Refused::Closing)?;
        Ok(id)
    }

    /// Cancels a request, waiting or running; it hears `Done` with what there is.
    pub fn cancel(&self, _id: RequestId) {}

    /// What the engine has done and is doing.
    pub fn stats(&self) -> ServiceStats {
        *self.shared.stats.lock().expect("no panic while held")
    }

    /// Takes no more requests; those taken are still answered.
    pub fn close(&self) {
        self.shared.closing.store(true, Ordering::SeqCst);
    }

    /// True where nothing runs or waits.
    pub fn is_idle(&self) -> bool {
        let stats = self.stats();
        stats.running + stats.waiting == 0
    }
}
