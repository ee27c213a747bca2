//! A video whose frames are still being read: how many there will be is known, the rest comes one by one.
//!
//! Decision: a list that only grows, shared by whoever reads it. Who decodes holds the [`FrameFeed`] and may be
//! any thread, or the end of any pipe; who waits is told after each change and looks when it likes, so that nobody
//! is held up by a slow decoder. A prompt needs only the number of frames, so it is made before they are there.
//! A feed that is dropped early, or given up, ends the video with an error that every reader hears; once nobody
//! reads any more, the feed is told to stop.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::inputs::{Pixels, VideoInput};
use super::video_processor::FrameScaler;
use crate::error::{Error, Result};
use crate::media::{Image, ImageSize};

/// The reader's side. Copies read the same frames.
#[derive(Clone)]
pub struct Arriving(Arc<Mutex<State>>);

struct State {
    count: usize,
    size: ImageSize,
    frames: Vec<Pixels>,
    failed: Option<Error>,
    /// Called after each change.
    listeners: Vec<Box<dyn Fn() + Send>>,
}

impl VideoInput {
    /// A video of `count` frames of `size` that are pushed into the feed, in order. The engine takes it as it is;
    /// everything else that wants pixels needs a whole one.
    ///
    /// # Errors
    /// `count` is 0.
    pub fn arriving(count: usize, size: ImageSize) -> Result<(FrameFeed, VideoInput)> {
        if count == 0 {
            return Err(Error::Media(
                "a video without frames has nothing in it".into(),
            ));
        }
        let arriving = Arriving(Arc::new(Mutex::new(State {
            count,
            size,
            frames: Vec::new(),
            failed: None,
            listeners: Vec::new(),
        })));
        let feed = FrameFeed(Arc::downgrade(&arriving.0));
        let frames = Pixels {
            count,
            size,
            data: Arc::default(),
        };
        let video = VideoInput {
            frames,
            arriving: Some(arriving),
        };
        Ok((feed, video))
    }
}

impl Arriving {
    /// Calls `listener` after each change from now on, until the last; on the feed's thread, so it must be quick.
    pub(crate) fn listen(&self, listener: Box<dyn Fn() + Send>) {
        let mut state = held(&self.0);
        if !state.is_over() {
            state.listeners.push(listener);
        }
    }

    /// The frames behind the first `taken` that are there, and whether more are to come.
    ///
    /// # Errors
    /// The feed gave up.
    pub(crate) fn behind(&self, taken: usize) -> Result<(Vec<Pixels>, bool)> {
        let state = held(&self.0);
        match &state.failed {
            Some(error) => Err(error.clone()),
            None => Ok((state.frames[taken..].to_vec(), !state.is_over())),
        }
    }
}

impl fmt::Debug for Arriving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = held(&self.0);
        write!(f, "Arriving({} of {})", state.frames.len(), state.count)
    }
}

/// Equal where they are the same frames on their way.
impl PartialEq for Arriving {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl State {
    fn is_over(&self) -> bool {
        self.frames.len() == self.count || self.failed.is_some()
    }

    fn changed(&mut self) {
        self.listeners.iter().for_each(|listener| listener());
        if self.is_over() {
            self.listeners.clear();
        }
    }
}

/// The decoder's side. Dropped before the last frame it ends the video with an error.
pub struct FrameFeed(Weak<Mutex<State>>);

impl FrameFeed {
    /// Adds the next frame, one picture of the size that was announced.
    ///
    /// # Errors
    /// [`Error::Cancelled`] where nobody reads any more; a picture of another size, or one too many.
    pub fn push(&mut self, frame: Pixels) -> Result<()> {
        let Some(state) = self.0.upgrade() else {
            return Err(Error::Cancelled);
        };
        let mut state = held(&state);
        if (frame.count, frame.size) != (1, state.size) || frame.data.len() != frame.stride() {
            return Err(Error::Internal(format!(
                "{} frames of {} x {} pixels came where one of {} x {} was to come",
                frame.count,
                frame.size.width,
                frame.size.height,
                state.size.width,
                state.size.height
            )));
        }
        if state.frames.len() == state.count {
            return Err(Error::Internal(format!(
                "a frame came behind the last of {}",
                state.count
            )));
        }
        state.frames.push(frame);
        state.changed();
        Ok(())
    }

    /// Gives up: whoever reads hears `error`, unless all frames are there.
    pub fn fail(self, error: Error) {
        self.end(error);
    }

    fn end(&self, error: Error) {
        if let Some(state) = self.0.upgrade() {
            let mut state = held(&state);
            if !state.is_over() {
                state.failed = Some(error);
                state.changed();
            }
        }
    }
}

impl Drop for FrameFeed {
    fn drop(&mut self) {
        self.end(Error::Media(
            "reading the video ended before its last frame: ask again".into(),
        ));
    }
}

/// A [`FrameFeed`] that takes frames as they were decoded, and scales them.
pub struct ScalingFeed {
    feed: FrameFeed,
    scaler: FrameScaler,
}

impl ScalingFeed {
    /// For a video of `count` frames, each of which `scaler` makes what the model takes.
    ///
    /// # Errors
    /// As [`VideoInput::arriving`].
    pub fn new(scaler: FrameScaler, count: usize) -> Result<(Self, VideoInput)> {
        let (feed, video) = VideoInput::arriving(count, scaler.size())?;
        Ok((Self { feed, scaler }, video))
    }

    /// Adds the next frame.
    ///
    /// # Errors
    /// As [`FrameFeed::push`] and [`FrameScaler::scale`].
    pub fn push(&mut self, frame: &Image) -> Result<()> {
        self.feed.push(self.scaler.scale(frame)?)
    }
}

/// Nothing panics while it holds this lock but a listener, and then the list is whole.
fn held(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn frame(side: usize) -> Pixels {
        let size = ImageSize::square(side);
        Pixels {
            count: 1,
            size,
            data: Arc::new(vec![0.5; 3 * size.area()]),
        }
    }

    fn three() -> (FrameFeed, Arriving) {
        let (feed, video) = VideoInput::arriving(3, ImageSize::square(2)).unwrap();
        (feed, video.arriving.unwrap())
    }

    #[test]
    fn frames_come_in_order_and_every_reader_sees_them() {
        let (mut feed, video) = three();
        let told = Arc::new(AtomicUsize::new(0));
        let tells = Arc::clone(&told);
        video.listen(Box::new(move || {
            tells.fetch_add(1, Ordering::SeqCst);
        }));
        assert_eq!(video.behind(0).unwrap(), (vec![], true));
        feed.push(frame(2)).unwrap();
        feed.push(frame(2)).unwrap();
        let other = video.clone();
        assert_eq!(other, video);
        assert_eq!(other.behind(1).unwrap(), (vec![frame(2)], true));
        feed.push(frame(2)).unwrap();
        assert_eq!(video.behind(2).unwrap(), (vec![frame(2)], false));
        assert!(feed.push(frame(2)).is_err());
        drop(feed);
        assert!(!other.behind(3).unwrap().1);
        assert_eq!(told.load(Ordering::SeqCst), 3);
        assert_eq!(Arc::strong_count(&told), 1, "nothing more will be told");
    }

    #[test]
    fn a_feed_that_ends_early_is_an_error_and_one_that_nobody_reads_stops() {
        let (mut feed, video) = three();
        assert!(feed.push(frame(3)).is_err(), "another size");
        feed.push(frame(2)).unwrap();
        drop(feed);
        let error = video.behind(1).unwrap_err().to_string();
        assert!(error.contains("before its last frame"), "{error}");

        let (feed, video) = three();
        feed.fail(Error::Media("the disk is gone".into()));
        assert_eq!(video.behind(0).unwrap_err().to_string(), "the disk is gone");

        let (mut feed, video) = three();
        drop(video);
        assert!(matches!(feed.push(frame(2)), Err(Error::Cancelled)));
        assert!(VideoInput::arriving(0, ImageSize::square(2)).is_err());
    }
}
