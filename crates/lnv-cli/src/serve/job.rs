//! One question on its way through the engine: its media read, its prompt made, its tokens received.
//!
//! Decision: tokens go from the engine's thread to the request over a channel that never makes the engine
//! wait. It holds ids only, no more than were asked for, so a reader that is slow, or gone, costs some
//! kilobytes. Dropping the [`Job`] cancels the question, whatever the reason.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use llava_next_video::engine::{
    Constraints, Event, Generation, GenerationOptions, Request, RequestEvent, RequestId,
};
use llava_next_video::media::{Image, Video};
use llava_next_video::processor::conversation::{Content, Conversation};
use llava_next_video::processor::inputs::ModelInputs;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::content::Named;
use super::error::{ApiError, ApiResult};
use super::media::{MediaError, MediaErrorKind, Medium};
use super::state::Server;
use crate::media::LoadedMedia;

/// Tiles of a picture, for the reckoning of memory: the overview and a grid.
const TILES_OF_IMAGE: usize = 10;

/// Runs what computes or waits for files away from the threads that answer; a panic there is one request's.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> ApiResult<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| ApiError::internal("the server ran into a bug of its own: please report it"))
}

/// Takes `n` of a budget, waiting for it in line.
pub async fn take(budget: &Arc<Semaphore>, n: usize) -> ApiResult<OwnedSemaphorePermit> {
    let n = u32::try_from(n).unwrap_or(u32::MAX);
    let permit = Arc::clone(budget).acquire_many_owned(n).await;
    permit.map_err(|_| ApiError::draining())
}

/// A question's right to be in the server although it does not run yet.
pub struct Place {
    _held: OwnedSemaphorePermit,
}

impl Place {
    /// One more, if that many may wait.
    pub fn take(server: &Server) -> ApiResult<Self> {
        if server.is_draining() {
            return Err(ApiError::draining());
        }
        let waiting = Arc::clone(&server.gates.waiting).try_acquire_owned();
        waiting
            .map(|held| Self { _held: held })
            .map_err(|_| ApiError::busy("as many requests wait as may: try again in a moment"))
    }
}

/// A prompt that the engine can run.
pub struct Prepared {
    inputs: ModelInputs,
    /// Its tokens.
    pub prompt_tokens: usize,
    /// Seconds to read and scale the media.
    pub media_s: f64,
    /// Pictures and frames.
    pub pictures: usize,
    room: Option<OwnedSemaphorePermit>,
}

/// Reads media and makes the prompt.
pub async fn prepare(
    server: &Arc<Server>,
    conversation: Conversation,
    named: Vec<Named>,
) -> ApiResult<Prepared> {
    let start = Instant::now();
    // Decoded media and pixels are large, so few requests hold them on their way; those that fetch have
    // a line of their own, since another's server may be slow. Those without media wait in neither.
    let fetched = named.iter().any(|named| is_fetched(&named.source.url));
    let line = match fetched {
        true => &server.gates.fetching,
        false => &server.gates.preparing,
    };
    let turn = match named.is_empty() {
        true => None,
        false => Some(take(line, 1).await?),
    };
    let media = load(server, named).await?;
    let pictures = media.images.len() + media.frames();
    let most = server.settings.media.max_frames;
    if media.frames() > most {
        return Err(ApiError::bad(format!(
            "the clips have {} frames together, more than the {most} that one request may have: set \
             num_frames lower",
            media.frames()
        ))
        .code("too_many_frames"));
    }
    let facts = server.pipeline.processor.facts();
    let least = media.frames() * facts.tokens_per_frame()?;
    if least >= server.settings.context {
        return Err(too_long(server, least));
    }
    let tiles = media.frames() + media.images.len() * TILES_OF_IMAGE;
    let room = match tiles {
        0 => None,
        tiles => {
            let side = server.pipeline.config.vision_config.image_size;
            let kib = (tiles * side * side * 3 * 4) >> 10;
            // A request that is larger than the whole budget runs alone.
            let kib = kib.clamp(1, server.gates.pixels_kib);
            Some(take(&server.gates.pixels, kib).await?)
        }
    };
    let pipeline = Arc::clone(&server.pipeline);
    let inputs = aside(move || {
        let inputs = pipeline.inputs(&[conversation], &media, true);
        inputs.map_err(|error| match error.downcast::<llava_next_video::Error>() {
            Ok(error) => ApiError::from(error),
            Err(error) => ApiError::internal(crate::output::sentence(&error)),
        })
    })
    .await??;
    drop(turn);
    let prompt_tokens = inputs.input_ids.first().map_or(0, Vec::len);
    if prompt_tokens >= server.settings.context {
        return Err(too_long(server, prompt_tokens));
    }
    Ok(Prepared {
        inputs,
        prompt_tokens,
        media_s: start.elapsed().as_secs_f64(),
        pictures,
        room,
    })
}

/// Whether an address leads to another machine.
fn is_fetched(url: &str) -> bool {
    let url = url.trim_start();
    let begins = |scheme: &str| {
        let head = url.get(..scheme.len());
        head.is_some_and(|head| head.eq_ignore_ascii_case(scheme))
    };
    begins("http:") || begins("https:")
}

/// A prompt of so many tokens does not fit.
fn too_long(server: &Server, tokens: usize) -> ApiError {
    let context = server.settings.context;
    ApiError::bad(format!(
        "the prompt has {tokens} tokens, but the model's context holds {context} and at least one must \
         be left for the answer: use fewer frames (num_frames) or images, or ask shorter"
    ))
    .at("messages")
    .code("context_length_exceeded")
}

/// The media of a request, in order. The rest is not read when the request is given up meanwhile.
async fn load(server: &Arc<Server>, named: Vec<Named>) -> ApiResult<LoadedMedia> {
    let mut media = LoadedMedia::default();
    for Named { param, source } in named {
        let store = Arc::clone(&server.media);
        let loaded = aside(move || store.load(&source)).await?;
        match loaded.map_err(|error| refusal(error, &param, false))? {
            Medium::Image(image) => media.images.push(own_image(image)),
            Medium::Video(video) => media.videos.push(own_video(video)),
        }
    }
    Ok(media)
}

fn own_image(image: Arc<Image>) -> Image {
    Arc::unwrap_or_clone(image)
}

fn own_video(video: Arc<Video>) -> Video {
    Arc::unwrap_or_clone(video)
}

/// A medium that was not read, as an answer. `own` where the request is about the medium itself, so that
/// one that is not there is 404; a chat that names one is 400.
pub fn refusal(error: MediaError, place: &str, own: bool) -> ApiError {
    let code = match error.kind {
        MediaErrorKind::Busy => return ApiError::busy(error.message),
        MediaErrorKind::NotFound if own => {
            return ApiError::not_found("id", "media_not_found", error.message);
        }
        MediaErrorKind::TooLarge if own => return ApiError::too_large(error.message),
        MediaErrorKind::NotFound => "media_not_found",
        MediaErrorKind::Refused => "media_refused",
        MediaErrorKind::Invalid => "invalid_media",
        MediaErrorKind::TooLarge => "media_too_large",
        MediaErrorKind::Unreachable => "media_unreachable",
        MediaErrorKind::Timeout => "media_timeout",
    };
    let param = match (error.param, own) {
        ("url", _) => place.to_owned(),
        (field, true) => field.to_owned(),
        (field, false) => format!("{place}.{field}"),
    };
    ApiError::invalid(param, error.message).code(code)
}

/// What happens to a question.
#[derive(Debug)]
pub enum Update {
    /// It goes on.
    Progress(Event),
    /// It is over.
    Done(Box<llava_next_video::error::Result<Generation>>),
}

/// How to answer a question, and for whom.
pub struct Asked {
    /// The engine's options.
    pub options: GenerationOptions,
    /// What keeps the answer in form.
    pub constraints: Option<Arc<dyn Constraints>>,
    /// Whose it is: clients that wait take turns.
    pub client: u64,
    /// Tell of each stage, not only of tokens.
    pub progress: bool,
}

/// A question that the engine has.
pub struct Job {
    server: Arc<Server>,
    id: RequestId,
    updates: mpsc::UnboundedReceiver<Update>,
    gone: Arc<AtomicBool>,
    over: bool,
}

impl Job {
    /// Hands a question to the engine.
    pub async fn start(
        server: &Arc<Server>,
        prepared: Prepared,
        place: Place,
        asked: Asked,
    ) -> ApiResult<Self> {
        let Asked {
            mut options,
            constraints,
            client,
            progress,
        } = asked;
        let left = server.settings.context - prepared.prompt_tokens;
        options.max_new_tokens = options.max_new_tokens.map(|n| n.min(left));
        let (sender, updates) = mpsc::unbounded_channel();
        let gone = Arc::new(AtomicBool::new(false));
        let dropped = Arc::clone(&gone);
        let room = prepared.room;
        let mut place = Some(place);
        let on_event = move |event: RequestEvent| {
            // The first event says that it runs; later ones are told where somebody wants to know.
            let first = place.take().is_some();
            let token = |event: &RequestEvent| {
                let RequestEvent::Progress(event) = event else {
                    return true;
                };
                matches!(event, Event::Token { .. })
            };
            if !(first || progress || token(&event)) {
                return match dropped.load(Ordering::Relaxed) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                };
            }
            let update = match event {
                RequestEvent::Progress(event) => Update::Progress(event),
                RequestEvent::Done(result) => Update::Done(Box::new(result)),
            };
            // The room is given back with this closure.
            let _held = &room;
            match sender.send(update) {
                Ok(()) if !dropped.load(Ordering::Relaxed) => ControlFlow::Continue(()),
                _ => ControlFlow::Break(()),
            }
        };
        let own = Arc::clone(server);
        // Pixels are looked through on the way in; and a job that nobody waits for is cancelled.
        aside(move || {
            let id = own.service.submit(Request {
                inputs: prepared.inputs,
                options,
                constraints,
                client,
                on_event: Box::new(on_event),
            })?;
            Ok(Self {
                server: own,
                id,
                updates,
                gone,
                over: false,
            })
        })
        .await?
    }

    /// What happens next; `None` after the end.
    pub async fn next(&mut self) -> Option<Update> {
        if self.over {
            return None;
        }
        let update = self.updates.recv().await;
        Some(self.seen(update))
    }

    /// What has happened already, if anything.
    pub fn ready(&mut self) -> Option<Update> {
        if self.over {
            return None;
        }
        match self.updates.try_recv() {
            Err(mpsc::error::TryRecvError::Empty) => None,
            Ok(update) => Some(self.seen(Some(update))),
            Err(mpsc::error::TryRecvError::Disconnected) => Some(self.seen(None)),
        }
    }

    fn seen(&mut self, update: Option<Update>) -> Update {
        // The engine tells every request how it ended; that it did not is a bug.
        let lost = || {
            let error = llava_next_video::Error::Device("the engine stopped".into());
            Update::Done(Box::new(Err(error)))
        };
        let update = update.unwrap_or_else(lost);
        self.over = matches!(update, Update::Done(_));
        update
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Relaxed);
        if !self.over {
            self.server.service.cancel(self.id);
        }
    }
}

/// The conversation of one question about one clip.
pub fn question(text: &str) -> Vec<Content> {
    vec![Content::Video(None), Content::Text(text.to_owned())]
}
