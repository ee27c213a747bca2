//! Packets to frames. FFmpeg's decoders run with frame and slice threads, whose results do not depend
//! on the number of threads as long as the stream is sound; damaged streams are decoded by one thread,
//! because error concealment does depend on it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ffmpeg::codec::{self, decoder};
use ffmpeg::{Discard, Packet, frame};
use ffmpeg_next as ffmpeg;

use super::demux::Demuxer;
use super::{ImageSize, MediaLimits};
use crate::{Error, Result};

/// When to give up: the caller's wish or the deadline.
pub(super) struct Control<'a> {
    pub(super) cancel: Option<&'a AtomicBool>,
    pub(super) deadline: Option<Instant>,
}

impl Control<'_> {
    /// [`Error::Cancelled`] on the caller's wish, a sentence once time is up.
    pub(super) fn check(&self) -> Result<()> {
        if self.cancel.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            return Err(Error::Cancelled);
        }
        if self.deadline.is_some_and(|end| Instant::now() >= end) {
            return Err(Error::Media(
                "decoding the video took longer than allowed: use a shorter file or allow more time"
                    .into(),
            ));
        }
        Ok(())
    }
}

/// A decoder of one video stream.
pub(super) struct Decoder {
    inner: decoder::Video,
    /// Whether a packet could not be decoded.
    pub(super) failed: bool,
    decoded: u64,
    most: u64,
}

impl Decoder {
    /// Opens a decoder with as many threads as there are processors, or with one.
    pub(super) fn open(demuxer: &Demuxer, limits: &MediaLimits, threaded: bool) -> Result<Self> {
        let fail = |cause: String| {
            let shown = demuxer.path().display();
            Error::Media(format!("cannot decode {shown}: {cause}"))
        };
        let name = demuxer.codec.name();
        let found = decoder::find(demuxer.codec);
        let codec = found
            .ok_or_else(|| fail(format!("this FFmpeg has no decoder for its codec ({name})")))?;
        let threads = if threaded {
            std::thread::available_parallelism().map_or(1, |n| n.get().min(16))
        } else {
            1
        };
        let mut options = ffmpeg::Dictionary::new();
        options.set("threads", &threads.to_string());
        options.set("thread_type", "frame+slice");
        options.set("max_pixels", &limits.video_pixels.to_string());
        let open = |options| -> std::result::Result<decoder::Video, ffmpeg::Error> {
            let parameters = demuxer
                .parameters()
                .map_err(|_| ffmpeg::Error::StreamNotFound)?;
            let mut context = codec::Context::from_parameters(parameters)?.decoder();
            context.set_packet_time_base(demuxer.time_base);
            context.open_as_with(codec, options)?.video()
        };
        let inner = match open(options) {
            Ok(inner) => inner,
            // Without the limit it may open, and then tell its size.
            Err(cause) => open(ffmpeg::Dictionary::new()).map_err(|_| {
                fail(format!(
                    "its {name} stream is damaged or not supported ({cause})"
                ))
            })?,
        };
        let (height, width) = (inner.height(), inner.width());
        if u64::from(height) * u64::from(width) > limits.video_pixels {
            return Err(fail(format!(
                "{width}x{height} is more than {} pixels, the limit for a video",
                limits.video_pixels
            )));
        }
        Ok(Self {
            inner,
            failed: false,
            decoded: 0,
            most: limits.decoded_frames,
        })
    }

    /// The size of the stream's frames by its header.
    pub(super) fn size(&self) -> ImageSize {
        ImageSize::new(self.inner.height() as usize, self.inner.width() as usize)
    }

    /// Hands in a packet; `needed` false lets the decoder skip it if no other picture refers to it.
    pub(super) fn send(&mut self, packet: &Packet, needed: bool, path: &Path) -> Result<()> {
        self.decoded += 1;
        if self.decoded > self.most {
            return Err(Error::Media(format!(
                "cannot use {}: more than {} frames would have to be decoded, the limit; cut it into shorter files",
                path.display(),
                self.most
            )));
        }
        self.inner.skip_frame(if needed {
            Discard::Default
        } else {
            Discard::NonReference
        });
        match self.inner.send_packet(packet) {
            Ok(()) => Ok(()),
            Err(cause) => self.note(cause, path),
        }
    }

    /// No more packets: the frames still inside come out.
    pub(super) fn finish(&mut self) {
        // Fails only when called twice, which changes nothing.
        let _ = self.inner.send_eof();
    }

    /// Forgets everything, for a new beginning after a seek.
    pub(super) fn flush(&mut self) {
        self.inner.flush();
    }

    /// The next frame in order of presentation, if the decoder has one ready.
    pub(super) fn receive(&mut self, path: &Path) -> Result<Option<frame::Video>> {
        loop {
            let mut frame = frame::Video::empty();
            match self.inner.receive_frame(&mut frame) {
                Ok(()) => return Ok(Some(frame)),
                Err(ffmpeg::Error::Eof) => return Ok(None),
                Err(ffmpeg::Error::Other { errno }) if errno == ffmpeg::error::EAGAIN => {
                    return Ok(None);
                }
                // With frame threads a packet's failure shows here; the frames behind it still come.
                Err(cause) => self.note(cause, path)?,
            }
        }
    }

    /// A packet that cannot be decoded is damage, of which a note tells; memory that is not there says nothing
    /// about the file, and must not look like it.
    fn note(&mut self, cause: ffmpeg::Error, path: &Path) -> Result<()> {
        self.failed = true;
        match cause {
            ffmpeg::Error::Other { errno } if errno == ffmpeg::error::ENOMEM => {
                Err(Error::Media(format!(
                    "cannot decode {}: it asks for more memory than there is",
                    path.display()
                )))
            }
            _ => Ok(()),
        }
    }
}
