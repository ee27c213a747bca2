//! Files to pictures, on a thread that may be given up.
//!
//! Decision: decoding happens in C libraries that cannot be interrupted between two packets, so it runs on a thread of
//! its own that keeps one of a few places until it really ends; the caller waits no longer than the limit. The
//! library's own deadline and cancel flag end nearly all of them soon after. What one decode may take
//! in memory is bounded by pixels and by the bytes of its samples; what all may take together by one budget, of which
//! a decode takes what it may need at worst before it begins, and keeps what its pictures have until nobody has them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use llava_next_video::Error;
use llava_next_video::media::{
    FrameSampling, Image, MediaLimits, SampledFrame, Video, VideoMetadata, VideoPart, decode_image,
    decode_video_watched, sample_indices,
};
use sha2::{Digest, Sha256};

use super::blob::Blob;
use super::gate::{Budget, Gate, Room};
use super::{MediaError, MediaErrorKind, MediaKind, MediaPolicy, MediaSource, Medium};

/// How much longer than its deadline a decode is waited for, so that its own words are heard.
const GRACE: Duration = Duration::from_millis(500);

/// Bytes that decoding a picture takes for each pixel at most: 16 bits of RGBA beside the result and a turned copy, or
/// a progressive JPEG's coefficients beside its planes and the result.
pub(super) const PIXEL_BYTES: u64 = 12;

/// Pictures and the room that they take.
#[derive(Clone)]
pub struct Loaded {
    /// The pictures.
    pub medium: Medium,
    _room: Arc<Room>,
}

impl Loaded {
    /// `medium`, which takes `room` until the last copy is dropped.
    pub(super) fn new(medium: Medium, room: Room) -> Self {
        Self {
            medium,
            _room: Arc::new(room),
        }
    }
}

/// What is decoded.
#[derive(Clone)]
pub(super) enum Content {
    /// One file.
    File(Arc<Blob>),
    /// A video as one picture file a frame.
    Frames(Arc<[Vec<u8>]>),
}

impl Content {
    fn digest(&self) -> [u8; 32] {
        match self {
            Self::File(blob) => blob.digest,
            Self::Frames(frames) => {
                let mut hasher = Sha256::new();
                for frame in frames.iter() {
                    hasher.update((frame.len() as u64).to_le_bytes());
                    hasher.update(frame);
                }
                hasher.finalize().into()
            }
        }
    }
}

/// What tells decoded media apart: their bytes, and which frames were asked for.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct DecodeKey {
    digest: [u8; 32],
    is_list: bool,
    kind: MediaKind,
    sampling: (u8, u64),
    part: [Option<u64>; 2],
}

impl DecodeKey {
    /// The key of `source`, whose bytes are `content`.
    pub(super) fn new(content: &Content, source: &MediaSource) -> Self {
        let video = source.kind == MediaKind::Video;
        let bits = |time: Option<f64>| time.filter(|_| video).map(f64::to_bits);
        Self {
            digest: content.digest(),
            is_list: matches!(content, Content::Frames(_)),
            kind: source.kind,
            sampling: match source.sampling {
                _ if !video => (0, 0),
                FrameSampling::Default(n) => (1, n as u64),
                FrameSampling::NumFrames(n) => (2, n as u64),
                FrameSampling::Fps(fps) => (3, fps.to_bits()),
                FrameSampling::All => (4, 0),
            },
            part: [bits(source.start), bits(source.end)],
        }
    }
}

/// Sees each frame of a video as it is decoded, in order; from position 0 again where the file turns out to be
/// damaged. It runs on the decoder's thread.
pub type Watch = Box<dyn FnMut(&SampledFrame) + Send>;

/// One decode.
pub(super) struct Job {
    pub(super) content: Content,
    /// What errors call the source.
    pub(super) name: String,
    pub(super) kind: MediaKind,
    pub(super) sampling: FrameSampling,
    pub(super) part: VideoPart,
}

/// Decodes once there is a place.
pub(super) fn decode(
    job: Job,
    mut watch: Watch,
    policy: &MediaPolicy,
    gate: &Arc<Gate>,
    budget: &Arc<Budget>,
) -> Result<Loaded, MediaError> {
    let name = job.name.clone();
    let place = gate
        .enter(Instant::now() + policy.wait_timeout)
        .ok_or_else(|| {
            let message =
                format!("too many sources are being decoded to begin with {name}: try again later");
            MediaError::new(MediaErrorKind::Busy, message)
        })?;
    let mut room = take(budget, job.worst(policy), policy, &name)?;
    let deadline = Instant::now() + policy.decode_timeout;
    let limits = limits(policy, deadline);
    let cancel = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&cancel);
    let (sender, receiver) = mpsc::sync_channel(1);
    let started = std::thread::Builder::new()
        .name("decode".into())
        .spawn(move || {
            let result = job.run(&limits, &stop, &mut watch).map(|medium| {
                room.shrink(medium.bytes());
                Loaded::new(medium, room)
            });
            // Whoever hears the result may count on the file and the place being free.
            drop(job);
            drop(place);
            // Nobody may be waiting any more.
            let _ = sender.send(result);
        });
    if started.is_err() {
        let message = format!("there is no room to decode {name} at the moment: try again later");
        return Err(MediaError::new(MediaErrorKind::Busy, message));
    }
    match receiver.recv_timeout(policy.decode_timeout + GRACE) {
        Ok(Err(_)) if Instant::now() >= deadline => Err(too_slow(&name)),
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => {
            cancel.store(true, Ordering::Relaxed);
            Err(too_slow(&name))
        }
        Err(RecvTimeoutError::Disconnected) => {
            let message = format!("{name} cannot be decoded: it is damaged in an unexpected way");
            Err(MediaError::new(MediaErrorKind::Invalid, message))
        }
    }
}

/// Takes `bytes` of what all decoded media may have, waiting for them.
pub(super) fn take(
    budget: &Arc<Budget>,
    bytes: u64,
    policy: &MediaPolicy,
    name: &str,
) -> Result<Room, MediaError> {
    let room = budget.take(bytes, Instant::now() + policy.wait_timeout);
    room.ok_or_else(|| {
        let message = format!(
            "the decoded pictures of other requests leave no memory for {name}: try again later"
        );
        MediaError::new(MediaErrorKind::Busy, message)
    })
}

fn too_slow(name: &str) -> MediaError {
    let message = format!("decoding {name} takes too long: use a shorter or smaller file");
    MediaError::new(MediaErrorKind::Timeout, message)
}

fn limits(policy: &MediaPolicy, deadline: Instant) -> MediaLimits {
    let duration = Duration::try_from_secs_f64(policy.max_duration_s);
    MediaLimits {
        still_bytes: policy.max_bytes.min(policy.decode_bytes / 2),
        still_pixels: policy.max_pixels,
        video_pixels: policy.max_pixels,
        sampled_frames: policy.max_frames,
        sampled_bytes: policy.max_decoded_bytes,
        duration: duration.ok(),
        deadline: Some(deadline),
        ..MediaLimits::default()
    }
}

impl Job {
    /// Bytes that this may take at worst.
    fn worst(&self, policy: &MediaPolicy) -> u64 {
        match (&self.content, self.kind) {
            (Content::File(blob), MediaKind::Image) => {
                // Only the first bytes are read; what they say is checked again while decoding.
                let told = image::ImageReader::open(blob.path())
                    .and_then(image::ImageReader::with_guessed_format)
                    .ok()
                    .and_then(|reader| reader.into_dimensions().ok());
                let pixels = told.map(|(width, height)| u64::from(width) * u64::from(height));
                let pixels = pixels.unwrap_or(u64::MAX).min(policy.max_pixels);
                pixels * PIXEL_BYTES + blob.bytes
            }
            _ => {
                let frames = match self.sampling {
                    FrameSampling::Default(n) | FrameSampling::NumFrames(n) => n,
                    FrameSampling::Fps(_) | FrameSampling::All => policy.max_frames,
                };
                let frames = frames.min(policy.max_frames) as u64;
                let bytes = frames.saturating_mul(policy.max_pixels * 3);
                bytes.min(policy.max_decoded_bytes)
            }
        }
    }

    fn run(
        &self,
        limits: &MediaLimits,
        cancel: &AtomicBool,
        watch: &mut Watch,
    ) -> Result<Medium, MediaError> {
        match (&self.content, self.kind) {
            (Content::File(blob), MediaKind::Image) => {
                let bytes = std::fs::read(blob.path()).map_err(|_| self.lost())?;
                let image = self.image(&bytes, limits)?;
                Ok(Medium::Image(Arc::new(image)))
            }
            (Content::File(blob), MediaKind::Video) => {
                let path = blob.path();
                let (sampling, part) = (self.sampling, self.part);
                let video = decode_video_watched(path, sampling, part, limits, Some(cancel), watch);
                let mut video = video.map_err(|cause| self.plain(&cause))?;
                let file = path.display().to_string();
                for note in &mut video.notes {
                    *note = note.replace(&file, &self.name);
                }
                Ok(Medium::Video(Arc::new(video)))
            }
            (Content::Frames(frames), _) => {
                let video = self.video_of(frames, limits, cancel)?;
                Ok(Medium::Video(Arc::new(video)))
            }
        }
    }

    fn image(&self, bytes: &[u8], limits: &MediaLimits) -> Result<Image, MediaError> {
        decode_image(bytes, &self.name, limits).map_err(|cause| self.plain(&cause))
    }

    /// A video given as pictures, one a second as vLLM counts them.
    fn video_of(
        &self,
        frames: &[Vec<u8>],
        limits: &MediaLimits,
        cancel: &AtomicBool,
    ) -> Result<Video, MediaError> {
        let indices = sample_indices(frames.len(), 1.0, self.sampling);
        let indices = indices.map_err(|cause| self.plain(&cause))?;
        if indices.len() > limits.sampled_frames {
            return Err(self.error(
                MediaErrorKind::TooLarge,
                format!(
                    "{} has more than {} frames, the limit: send fewer",
                    self.name, limits.sampled_frames
                ),
            ));
        }
        let mut images: Vec<Image> = Vec::new();
        let mut bytes = 0;
        for index in &indices {
            let late = limits.deadline.is_some_and(|end| Instant::now() >= end);
            if late || cancel.load(Ordering::Relaxed) {
                return Err(too_slow(&self.name));
            }
            let image = self.image(&frames[*index], limits)?;
            bytes += image.data.len() as u64;
            if bytes > limits.sampled_bytes {
                return Err(self.error(
                    MediaErrorKind::TooLarge,
                    format!(
                        "the frames of {} take more than {} bytes, the limit: send fewer",
                        self.name, limits.sampled_bytes
                    ),
                ));
            }
            if images.first().is_some_and(|first| first.size != image.size) {
                return Err(self.error(
                    MediaErrorKind::Invalid,
                    format!("the frames of {} are not of one size", self.name),
                ));
            }
            images.push(image);
        }
        Ok(Video {
            timestamps: indices.iter().map(|index| *index as f64).collect(),
            frames_indices: indices,
            frames: images,
            metadata: VideoMetadata {
                total_num_frames: frames.len(),
                fps: 1.0,
                duration: frames.len() as f64,
            },
            notes: Vec::new(),
        })
    }

    fn error(&self, kind: MediaErrorKind, message: String) -> MediaError {
        MediaError::new(kind, message)
    }

    fn lost(&self) -> MediaError {
        let message = format!("{} is no longer stored: send it again", self.name);
        MediaError::new(MediaErrorKind::Busy, message)
    }

    /// The library's error in the client's words: it names our file, which the client has never heard of.
    fn plain(&self, cause: &Error) -> MediaError {
        let mut message = cause.to_string();
        if let Content::File(blob) = &self.content {
            message = message.replace(&blob.path().display().to_string(), &self.name);
        }
        let mut error = match cause {
            Error::Cancelled => return too_slow(&self.name),
            Error::Io(_) => return self.lost(),
            // Every limit of the library calls itself one.
            Error::Media(_) if message.contains("the limit") => {
                MediaError::new(MediaErrorKind::TooLarge, message)
            }
            _ => MediaError::new(MediaErrorKind::Invalid, message),
        };
        if matches!(cause, Error::Input(_)) {
            error.param = match self.sampling {
                _ if error.message.contains("the part of the video") => "start",
                FrameSampling::Fps(_) => "fps",
                _ => "num_frames",
            };
        }
        error
    }
}
