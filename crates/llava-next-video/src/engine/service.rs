//! The engine on a thread of its own, for callers that come and go.
//!
//! Decision: requests go in over a channel and events come out through each request's own callback, so
//! that the library starts no async runtime and a caller may bring its own. Every accepted request hears
//! [`RequestEvent::Done`] exactly once, whatever happens; one that no longer wants to says so by `Break`.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak, mpsc};

use super::constraint::Constraints;
use super::feature_store::StoreStats;
use super::job::Prepared;
use super::request::{Event, Generation, GenerationOptions};
use super::runner::Engine;
use super::stop::TokenText;
use crate::config::GenerationConfig;
use crate::error::{Error, Result};
use crate::model::LlavaNextVideoModel;
use crate::processor::inputs::ModelInputs;

/// Called with what happens to a request; `Break` cancels it.
pub type OnRequestEvent = Box<dyn FnMut(RequestEvent) -> ControlFlow<()> + Send>;

/// One question of many.
pub struct Request {
    /// Prompt rows and their pixels, as far as they are there: frames may still be arriving.
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
    /// It waits no longer; told once, and not where it is over before.
    Started,
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
    /// The engine broke off and answers nobody any more.
    Broken,
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
    /// Pictures whose features were read from disk instead.
    pub features_read: usize,
    /// Bytes of features that are kept now.
    pub features_bytes: usize,
    /// What was written to disk, and is there.
    pub features_on_disk: StoreStats,
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
    sender: Mutex<mpsc::Sender<Command>>,
    model: Arc<LlavaNextVideoModel>,
    defaults: GenerationConfig,
    limits: ServiceLimits,
    next: AtomicU64,
    /// Requests that were accepted and are not over.
    open: AtomicUsize,
    closing: AtomicBool,
    broken: AtomicBool,
    stats: Mutex<ServiceStats>,
}

enum Command {
    Submit(Box<Submitted>),
    Cancel(RequestId),
    /// A frame has arrived, or will not: worth another step.
    Wake,
}

struct Submitted {
    id: RequestId,
    prepared: Prepared,
    client: u64,
    on_event: OnRequestEvent,
}

impl Service {
    /// Starts the engine's thread. It ends when every handle is gone and nothing runs.
    pub fn start(
        engine: Engine,
        text: Arc<dyn TokenText + Send + Sync>,
        limits: ServiceLimits,
    ) -> Service {
        let (sender, receiver) = mpsc::channel();
        let shared = Arc::new(Shared {
            sender: Mutex::new(sender),
            model: Arc::clone(engine.model()),
            defaults: engine.defaults().clone(),
            limits,
            next: AtomicU64::new(0),
            open: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            stats: Mutex::new(engine.stats()),
        });
        let worker = Worker {
            engine,
            text,
            receiver,
            callbacks: HashMap::new(),
            shared: Arc::downgrade(&shared),
        };
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || worker.run())
            .expect("a thread can be started");
        Service { shared }
    }

    /// The model that answers.
    pub fn model(&self) -> &LlavaNextVideoModel {
        &self.shared.model
    }

    /// Hands a request over. It is checked here, on the caller's thread; one that is wrong hears
    /// [`RequestEvent::Done`] before this returns.
    ///
    /// # Errors
    /// Too many wait, the service is closing, or its engine broke off; the request has then heard nothing.
    pub fn submit(&self, request: Request) -> std::result::Result<RequestId, Refused> {
        let shared = &self.shared;
        if self.is_broken() {
            return Err(Refused::Broken);
        }
        if shared.closing.load(Ordering::SeqCst) {
            return Err(Refused::Closing);
        }
        let open = shared.open.fetch_add(1, Ordering::SeqCst);
        let waiting = open.saturating_sub(self.stats().running);
        if waiting >= shared.limits.waiting {
            shared.open.fetch_sub(1, Ordering::SeqCst);
            return Err(Refused::Full(waiting));
        }
        let id = RequestId(shared.next.fetch_add(1, Ordering::SeqCst) + 1);
        let Request {
            inputs,
            options,
            constraints,
            client,
            mut on_event,
        } = request;
        // Before the engine looks at the frames for the first time, so that no arrival goes unheard.
        inputs.listen(|| {
            let sender = shared.sender.lock().ok().map(|sender| sender.clone());
            Box::new(move || {
                let _ = sender.as_ref().map(|sender| sender.send(Command::Wake));
            })
        });
        let (model, defaults) = (&shared.model, &shared.defaults);
        let prepared = match Prepared::new(model, defaults, inputs, &options, constraints) {
            Ok(prepared) => prepared,
            Err(error) => {
                shared.open.fetch_sub(1, Ordering::SeqCst);
                let _ = on_event(RequestEvent::Done(Err(error)));
                return Ok(id);
            }
        };
        let submitted = Box::new(Submitted {
            id,
            prepared,
            client,
            on_event,
        });
        if !self.send(Command::Submit(submitted)) {
            shared.open.fetch_sub(1, Ordering::SeqCst);
            return Err(Refused::Broken);
        }
        Ok(id)
    }

    /// Cancels a request, waiting or running; it hears `Done` with what there is.
    pub fn cancel(&self, id: RequestId) {
        self.send(Command::Cancel(id));
    }

    fn send(&self, command: Command) -> bool {
        match self.shared.sender.lock() {
            Ok(sender) => sender.send(command).is_ok(),
            Err(_) => false,
        }
    }

    /// What the engine has done and is doing, as of its last step.
    pub fn stats(&self) -> ServiceStats {
        self.shared.stats.lock().map(|s| *s).unwrap_or_default()
    }

    /// Takes no more requests; those taken are still answered.
    pub fn close(&self) {
        self.shared.closing.store(true, Ordering::SeqCst);
    }

    /// True after a bug has ended the engine's thread; only another service answers again.
    pub fn is_broken(&self) -> bool {
        self.shared.broken.load(Ordering::SeqCst)
    }

    /// True where every request that was accepted is over.
    pub fn is_idle(&self) -> bool {
        self.shared.open.load(Ordering::SeqCst) == 0
    }
}

/// The engine's thread.
struct Worker {
    engine: Engine,
    text: Arc<dyn TokenText + Send + Sync>,
    receiver: mpsc::Receiver<Command>,
    callbacks: HashMap<RequestId, OnRequestEvent>,
    shared: Weak<Shared>,
}

impl Worker {
    fn run(mut self) {
        // Whether nothing can happen before a command comes: all that there is waits for frames.
        let mut stalled = false;
        loop {
            let next = match self.engine.is_idle() || stalled {
                true => self.receiver.recv().ok(),
                false => self.receiver.try_recv().ok(),
            };
            match next {
                Some(command) => {
                    self.obey(command);
                    stalled = false;
                    continue;
                }
                None if self.engine.is_idle() => return,
                None => {}
            }
            match catch_unwind(AssertUnwindSafe(|| self.step())) {
                Ok(busy) => stalled = !busy,
                Err(_) => return self.break_off(),
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submitted) => {
                self.callbacks.insert(submitted.id, submitted.on_event);
                self.engine
                    .submit_as(submitted.id, submitted.prepared, submitted.client);
            }
            Command::Cancel(id) => self.engine.cancel(id),
            Command::Wake => {}
        }
    }

    fn step(&mut self) -> bool {
        let callbacks = &mut self.callbacks;
        let mut over = 0;
        let mut sink = |id: RequestId, event: RequestEvent| match event {
            RequestEvent::Done(_) => {
                over += 1;
                match callbacks.remove(&id) {
                    Some(mut on_event) => on_event(event),
                    None => ControlFlow::Continue(()),
                }
            }
            RequestEvent::Started | RequestEvent::Progress(_) => match callbacks.get_mut(&id) {
                Some(on_event) => on_event(event),
                None => ControlFlow::Break(()),
            },
        };
        let busy = self.engine.step(self.text.as_ref(), &mut sink);
        let stats = self.engine.stats();
        if let Some(shared) = self.shared.upgrade() {
            if let Ok(mut told) = shared.stats.lock() {
                *told = stats;
            }
            shared.open.fetch_sub(over, Ordering::SeqCst);
        }
        busy
    }

    /// After a panic nothing is known of the engine's state: everybody hears so, and no more is taken.
    fn break_off(mut self) {
        let shared = self.shared.upgrade();
        if let Some(shared) = &shared {
            shared.broken.store(true, Ordering::SeqCst);
        }
        while let Ok(command) = self.receiver.try_recv() {
            if let Command::Submit(submitted) = command {
                self.callbacks.insert(submitted.id, submitted.on_event);
            }
        }
        let open = self.callbacks.len();
        for (_, mut on_event) in self.callbacks.drain() {
            let broken = "the engine broke off. This is a bug: please report it";
            let done = RequestEvent::Done(Err(Error::Internal(broken.into())));
            // Perhaps it was this one that panicked; the others are told all the same.
            let _ = catch_unwind(AssertUnwindSafe(|| on_event(done)));
        }
        if let Some(shared) = shared {
            shared.open.fetch_sub(open, Ordering::SeqCst);
        }
    }
}
