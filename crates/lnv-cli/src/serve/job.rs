//! One question on its way through the engine: its media read, its prompt made, its tokens received.
//!
//! Decision: tokens go from the engine's thread to the request over a channel that never makes the engine
//! wait. It holds ids only, no more than were asked for, so a reader that is slow, or gone, costs some
//! kilobytes. Dropping the [`Job`] cancels the question, whatever the reason.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use llava_next_video::engine::{
    Constraints, Event, Generation, GenerationOptions, Request, RequestEvent, RequestId,
};
use llava_next_video::media::FrameSampling;
use llava_next_video::processor::conversation::{Content, Conversation};
use llava_next_video::processor::inputs::{ImageInput, ModelInputs, VideoInput};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::arriving::{self, Read};
use super::content::Named;
use super::error::{ApiError, ApiResult};
use super::log::RequestLog;
use super::media::{Fetched, MediaError, MediaErrorKind, MediaKind, Medium};
use super::state::Server;

/// Runs what computes or waits for files away from the threads that answer; a panic there is one request's.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> ApiResult<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| ApiError::bug())
}

/// Takes `n` of a budget, waiting for it in line.
pub async fn take(budget: &Arc<Semaphore>, n: usize) -> ApiResult<OwnedSemaphorePermit> {
    let n = u32::try_from(n).unwrap_or(u32::MAX);
    let permit = Arc::clone(budget).acquire_many_owned(n).await;
    permit.map_err(|_| ApiError::draining())
}

/// A request's right to be in the server although it does not run yet, or not all of its questions do.
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

/// A request's media as the model takes them. A copy costs nothing.
#[derive(Clone, Default)]
pub struct Pictures {
    images: Vec<ImageInput>,
    videos: Vec<VideoInput>,
    room: Option<Arc<OwnedSemaphorePermit>>,
}

impl Pictures {
    /// Pictures and frames.
    fn count(&self) -> usize {
        self.images.len() + self.frames()
    }

    fn frames(&self) -> usize {
        self.videos.iter().map(|video| video.frames.count).sum()
    }

    /// The video that was on its way has been read, and this is it.
    pub fn has_arrived(&mut self, whole: &VideoInput) {
        let arriving = |video: &&mut VideoInput| video.arriving.is_some();
        let arriving = self.videos.iter_mut().filter(arriving);
        arriving.for_each(|video| *video = whole.clone());
    }
}

/// A prompt that the engine can run.
pub struct Prepared {
    inputs: ModelInputs,
    /// Its tokens.
    pub prompt_tokens: usize,
    room: Option<Arc<OwnedSemaphorePermit>>,
}

/// Reads a request's media, in order.
///
/// Files lie on disk until there is room for what the model gets of all of them; then one after another is decoded,
/// scaled and dropped, so that a request holds one decoded medium at a time, and waits for memory only while it holds
/// none. What is named twice is read once. The last may be a video that goes on being read.
pub async fn pictures(
    server: &Arc<Server>,
    log: &RequestLog,
    named: Vec<Named>,
) -> ApiResult<Read> {
    if named.is_empty() {
        let pictures = Pictures::default();
        return Ok(Read {
            pictures,
            rest: None,
        });
    }
    let start = Instant::now();
    log.entry().media = Some((start, None));
    let read = read_all(server, named, start).await;
    let goes_on = read.as_ref().is_ok_and(|read| read.rest.is_some());
    let mut entry = log.entry();
    entry.media = Some((start, (!goes_on).then(Instant::now)));
    entry.pictures = read.as_ref().map_or(0, |read| read.pictures.count());
    read
}

async fn read_all(server: &Arc<Server>, named: Vec<Named>, start: Instant) -> ApiResult<Read> {
    // Reading takes memory and processors, so few requests do it at once; those that fetch have a line of
    // their own, since another's server may be slow.
    let fetched = named.iter().any(|named| is_fetched(&named.source.url));
    let line = match fetched {
        true => &server.gates.fetching,
        false => &server.gates.preparing,
    };
    let mut turn = Some(take(line, 1).await?);
    let (files, order) = fetch(server, named).await?;
    let side = server.pipeline.config.vision_config.image_size;
    let kib = |tiles: usize| (tiles * side * side * 3 * 4) >> 10;
    let most = server.settings.media.max_frames;
    let (mut tiles, mut frames) = (0, 0);
    for (_, file) in &files {
        match file.kind() {
            MediaKind::Image => tiles += most_tiles(server),
            MediaKind::Video => frames += file.frames(most),
        }
    }
    // A request that is larger than the whole budget runs alone.
    let taken = kib(tiles + frames.min(most)).clamp(1, server.gates.pixels_kib);
    let mut room = take(&server.gates.pixels, taken).await?;
    let mut pictures = Pictures::default();
    let mut scaled: Vec<Scaled> = Vec::new();
    let mut used = 0;
    let mut rest = None;
    for index in order {
        if index == scaled.len() {
            let one = match turn.take_if(|_| index + 1 == files.len()) {
                Some(turn) => {
                    let (one, more) = arriving::last(server, &files[index], turn, start).await?;
                    rest = more;
                    one
                }
                None => {
                    let (param, file) = &files[index];
                    let (own, file) = (Arc::clone(server), Arc::clone(file));
                    // Gone with this future, that is with whoever waits for it.
                    let asker = Arc::new(());
                    let asks = Arc::downgrade(&asker);
                    let one = aside(move || read(&own, &file, &asks)).await?;
                    one.map_err(|error| error.answer(param))?
                }
            };
            used += match &one {
                Scaled::Image(image) => image.tiles.count,
                Scaled::Video(video) => video.frames.count,
            };
            scaled.push(one);
        }
        match &scaled[index] {
            Scaled::Image(image) => pictures.images.push(image.clone()),
            Scaled::Video(video) => pictures.videos.push(video.clone()),
        }
        check_frames(server, pictures.frames())?;
    }
    let spare = taken.saturating_sub(kib(used).max(1));
    drop(room.split(spare));
    pictures.room = Some(Arc::new(room));
    Ok(Read { pictures, rest })
}

/// A request's files, each once, and which of them each of its media is.
type Files = (Vec<(String, Arc<Fetched>)>, Vec<usize>);

async fn fetch(server: &Arc<Server>, named: Vec<Named>) -> ApiResult<Files> {
    let most = server.settings.max_upload as u64;
    let (mut files, mut order): Files = (Vec::new(), Vec::new());
    let (mut bytes, mut frames) = (0, 0);
    for Named { param, source } in named {
        if let FrameSampling::NumFrames(n) = source.sampling
            && source.kind == MediaKind::Video
        {
            frames += n;
            check_frames(server, frames)?;
        }
        let store = Arc::clone(&server.media);
        let file = aside(move || store.fetch(&source)).await?;
        let file = file.map_err(|error| refusal(error, &param, false))?;
        let index = match files.iter().position(|(_, known)| known.equals(&file)) {
            Some(index) => index,
            None => {
                bytes += file.bytes;
                if bytes > most {
                    let message = format!(
                        "the pictures and clips of this request have more than {most} bytes together, the \
                         limit: send fewer or smaller ones, or upload them before"
                    );
                    return Err(ApiError::invalid(param, message).code("media_too_large"));
                }
                files.push((param, Arc::new(file)));
                files.len() - 1
            }
        };
        order.push(index);
    }
    Ok((files, order))
}

/// A medium as the model takes it.
pub enum Scaled {
    /// One picture.
    Image(ImageInput),
    /// A video.
    Video(VideoInput),
}

/// Why there is none.
pub enum Unread {
    /// It is no medium.
    Media(MediaError),
    /// The model does not take it.
    Model(llava_next_video::Error),
}

impl Unread {
    /// As the medium that the request names at `param`.
    pub fn answer(self, param: &str) -> ApiError {
        match self {
            Self::Media(error) => refusal(error, param, false),
            Self::Model(error) => ApiError::from(error),
        }
    }
}

/// Decodes and scales; what was decoded is gone afterwards, but for the cache's copy.
fn read(server: &Server, file: &Fetched, asker: &Weak<()>) -> Result<Scaled, Unread> {
    let loaded = server.media.decode(file, asker, &mut |_, _| ());
    scale(server, &loaded.map_err(Unread::Media)?.medium)
}

/// What was decoded, as the model takes it.
pub fn scale(server: &Server, medium: &Medium) -> Result<Scaled, Unread> {
    let processor = &server.pipeline.processor;
    let scaled = match medium {
        Medium::Image(image) => processor.scale_image(image).map(Scaled::Image),
        Medium::Video(video, _) => processor.scale_video(video).map(Scaled::Video),
    };
    scaled.map_err(Unread::Model)
}

/// Tiles that a picture may become: the overview and the largest grid.
fn most_tiles(server: &Server) -> usize {
    let processor = &server.pipeline.processor.image_processor;
    let side = processor.settings.crop_size.height.max(1);
    let grids = processor.image_grid_pinpoints.iter();
    let grid = grids.map(|size| size.height.div_ceil(side) * size.width.div_ceil(side));
    1 + grid.max().unwrap_or(0)
}

/// Refuses more frames than one request may have, or than the context has room for.
fn check_frames(server: &Server, frames: usize) -> ApiResult<()> {
    let most = server.settings.media.max_frames;
    if frames > most {
        return Err(ApiError::bad(format!(
            "the clips have {frames} frames together or more, but one request may have {most}: set \
             num_frames lower"
        ))
        .code("too_many_frames"));
    }
    let least = frames * server.pipeline.processor.facts().tokens_per_frame()?;
    match least >= server.settings.context {
        true => Err(too_long(server, least)),
        false => Ok(()),
    }
}

/// Makes a prompt of a conversation and its media.
pub async fn prepare(
    server: &Arc<Server>,
    conversation: Conversation,
    pictures: Pictures,
) -> ApiResult<Prepared> {
    let pipeline = Arc::clone(&server.pipeline);
    let Pictures {
        images,
        videos,
        room,
        ..
    } = pictures;
    let inputs = aside(move || pipeline.inputs_scaled(&[conversation], images, videos)).await??;
    let prompt_tokens = inputs.input_ids.first().map_or(0, Vec::len);
    if prompt_tokens >= server.settings.context {
        return Err(too_long(server, prompt_tokens));
    }
    Ok(Prepared {
        inputs,
        prompt_tokens,
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
#[derive(Clone)]
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
    /// Its number in the log.
    question: u64,
    updates: mpsc::UnboundedReceiver<Update>,
    gone: Arc<AtomicBool>,
    over: bool,
}

impl Job {
    /// Hands a question to the engine; the log hears of it.
    pub async fn start(
        server: &Arc<Server>,
        log: &RequestLog,
        prepared: Prepared,
        place: Arc<Place>,
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
        let (question, mut note) = log.question(prepared.prompt_tokens);
        let on_event = move |event: RequestEvent| {
            note(&event);
            // It runs, or is over: another may wait.
            drop(place.take());
            // The room is given back with this closure.
            let _held = &room;
            let update = match event {
                RequestEvent::Started => None,
                RequestEvent::Progress(event @ Event::Token { .. }) => {
                    Some(Update::Progress(event))
                }
                // Stages are told where somebody wants to know.
                RequestEvent::Progress(event) => progress.then_some(Update::Progress(event)),
                RequestEvent::Done(result) => Some(Update::Done(Box::new(result))),
            };
            let gone = update.is_some_and(|update| sender.send(update).is_err());
            match gone || dropped.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
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
                question,
                updates,
                gone,
                over: false,
            })
        })
        .await?
    }

    /// Takes it back, to be asked anew: the log is to forget it.
    pub fn withdraw(self, log: &RequestLog) {
        log.withdraw(self.question);
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
