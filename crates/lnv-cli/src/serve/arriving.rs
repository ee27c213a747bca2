//! A request's last video on its way: the engine looks at its first frames while the next are being decoded.
//!
//! Decision: only the request that has a video decoded sees its frames come; those who ask for the same meanwhile, or
//! later, get it whole, as the store keeps it. The answer to the client still begins when the video has been
//! read, so that what is wrong with it is refused in the same words and with the same status as ever. Where a
//! damaged file's frames begin again, the question is asked anew with all of them.

use std::sync::Arc;
use std::time::Instant;

use llava_next_video::media::Image;
use llava_next_video::processor::arriving::ScalingFeed;
use llava_next_video::processor::conversation::Conversation;
use llava_next_video::processor::inputs::VideoInput;
use llava_next_video::{Error, Result};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::task::JoinHandle;

use super::error::{ApiError, ApiResult};
use super::job::{Asked, Job, Pictures, Place, Scaled, Unread, prepare, scale};
use super::log::RequestLog;
use super::media::Fetched;
use super::state::Server;

/// A request's media, of which the last may still be being read.
pub struct Read {
    /// As far as they are there.
    pub pictures: Pictures,
    /// What is to come.
    pub rest: Option<Rest>,
}

/// The reading of a video that has begun.
pub struct Rest {
    reader: JoinHandle<Result<Option<Scaled>, Unread>>,
    param: String,
    start: Instant,
    /// Gone with the request.
    _asker: Arc<()>,
}

impl Rest {
    /// Waits for the end. The video read whole where the frames that came do not count.
    async fn end(self, log: &RequestLog) -> ApiResult<Option<VideoInput>> {
        let whole = joined(self.reader.await)?;
        log.entry().media = Some((self.start, Some(Instant::now())));
        let whole = whole.map_err(|error| error.answer(&self.param))?;
        Ok(match whole {
            Some(Scaled::Video(video)) => Some(video),
            Some(Scaled::Image(_)) | None => None,
        })
    }
}

/// Reads the last of a request's files, in its `turn`; of a video no more than its first frame if it is decoded here.
pub async fn last(
    server: &Arc<Server>,
    (param, file): &(String, Arc<Fetched>),
    turn: OwnedSemaphorePermit,
    start: Instant,
) -> ApiResult<(Scaled, Option<Rest>)> {
    let (begun, begins) = oneshot::channel();
    let (own, file) = (Arc::clone(server), Arc::clone(file));
    let asker = Arc::new(());
    let asks = Arc::downgrade(&asker);
    let mut reader = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        let mut watcher = Watcher {
            server: Arc::clone(&own),
            begun: Some(begun),
            feed: None,
            settled: false,
        };
        let watch = &mut |place, image: &Image| watcher.see(place, image);
        let loaded = own.media.decode(&file, &asks, watch);
        let loaded = loaded.map_err(Unread::Media)?;
        match watcher.settled {
            true => Ok(None),
            false => scale(&own, &loaded.medium).map(Some),
        }
    });
    tokio::select! {
        biased;
        Ok(video) = begins => {
            let param = param.clone();
            let rest = Rest { reader, param, start, _asker: asker };
            Ok((Scaled::Video(video), Some(rest)))
        }
        whole = &mut reader => {
            let whole = joined(whole)?.map_err(|error| error.answer(param))?;
            let none = || ApiError::internal("a medium became nothing");
            Ok((whole.ok_or_else(none)?, None))
        }
    }
}

fn joined<T>(done: std::result::Result<T, tokio::task::JoinError>) -> ApiResult<T> {
    done.map_err(|_| ApiError::bug())
}

/// Scales the frames that it sees and pushes them on.
struct Watcher {
    server: Arc<Server>,
    /// Where the video goes once its first frame is there.
    begun: Option<oneshot::Sender<VideoInput>>,
    feed: Option<ScalingFeed>,
    /// Whether nothing is owed: all frames were pushed, or nobody wants them.
    settled: bool,
}

impl Watcher {
    fn see(&mut self, (position, of): (usize, usize), image: &Image) {
        self.settled = match self.push((position, of), image) {
            Ok(()) => self.feed.is_some() && position + 1 == of,
            Err(error) => {
                self.feed = None;
                matches!(error, Error::Cancelled)
            }
        };
    }

    fn push(&mut self, (position, of): (usize, usize), image: &Image) -> Result<()> {
        if position == 0 {
            // Those that came before, if any, do not count; the video is told of once.
            self.feed = None;
            if let Some(begun) = self.begun.take() {
                let scaler = self.server.pipeline.processor.frame_scaler(image.size)?;
                let (feed, video) = ScalingFeed::new(scaler, of)?;
                begun.send(video).map_err(|_| Error::Cancelled)?;
                self.feed = Some(feed);
            }
        }
        match &mut self.feed {
            Some(feed) => feed.push(image),
            None => Ok(()),
        }
    }
}

/// Hands a question to the engine and waits until all of its media have been read; also how long its prompt is.
pub async fn begin(
    server: &Arc<Server>,
    log: &RequestLog,
    read: &mut Read,
    (conversation, place, asked): (Conversation, Arc<Place>, Asked),
) -> ApiResult<(Job, usize)> {
    loop {
        let prepared = prepare(server, conversation.clone(), read.pictures.clone()).await?;
        let tokens = prepared.prompt_tokens;
        let job = Job::start(server, log, prepared, Arc::clone(&place), asked.clone()).await?;
        let Some(rest) = read.rest.take() else {
            return Ok((job, tokens));
        };
        let Some(whole) = rest.end(log).await? else {
            return Ok((job, tokens));
        };
        job.withdraw(log);
        read.pictures.has_arrived(&whole);
    }
}
