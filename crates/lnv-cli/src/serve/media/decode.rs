//! Files to pictures, in turn and within a budget.
//!
//! Decision: decoding happens in C libraries that may hang, crash or ask for any memory, so each medium has a process of
//! its own (`child`) and one of a few places; the place is free once the process is gone. What one decode may hold in
//! this process is bounded by pixels and by the bytes of its samples; what all may hold together by one budget, of which
//! a decode takes what it may need at worst before it begins, and keeps what its pictures have until nobody has them.
//! What it may hold in its own process has a ceiling there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use llava_next_video::media::{FrameSampling, Image, VideoPart};
use sha2::{Digest, Sha256};

use super::blob::Blob;
use super::child::{Decoders, Talk};
use super::gate::{Budget, Gate, Place, Room};
use super::words::{Most, Task, sampling_code};
use super::{MediaError, MediaErrorKind, MediaKind, MediaPolicy, MediaSource, Medium};

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
            sampling: match video {
                true => sampling_code(source.sampling),
                false => (0, 0),
            },
            part: [bits(source.start), bits(source.end)],
        }
    }
}

/// Sees each frame of a video as it is decoded, in order; from position 0 again where the file turns out to be
/// damaged: which of how many it is, and the picture.
pub type Watch<'a> = &'a mut dyn FnMut((usize, usize), &Image);

/// One decode.
pub(super) struct Job {
    pub(super) content: Content,
    /// What errors call the source.
    pub(super) name: String,
    pub(super) kind: MediaKind,
    pub(super) sampling: FrameSampling,
    pub(super) part: VideoPart,
}

/// What decodes share.
pub(super) struct Decodes {
    pub(super) gate: Arc<Gate>,
    pub(super) memory: Arc<Budget>,
    pub(super) decoders: Arc<Decoders>,
}

impl Decodes {
    /// Decodes once there is a place, unless it turns out to be `abandoned`.
    pub(super) fn decode(
        &self,
        job: &Job,
        policy: &MediaPolicy,
        abandoned: &dyn Fn() -> bool,
        watch: Watch<'_>,
    ) -> Result<Loaded, MediaError> {
        let name = &job.name;
        let place = self
            .gate
            .enter(Instant::now() + policy.wait_timeout)
            .ok_or_else(|| {
                let message = format!(
                    "too many sources are being decoded to begin with {name}: try again later"
                );
                MediaError::new(MediaErrorKind::Busy, message)
            })?;
        let (task, pictures) = job.task(policy);
        let mut talk = self.decoders.begin(&task, policy, abandoned)?;
        let loaded = self.hear(&mut talk, pictures, job, policy, watch);
        self.end(talk, place);
        loaded
    }

    fn hear(
        &self,
        talk: &mut Talk<'_>,
        pictures: &[Vec<u8>],
        job: &Job,
        policy: &MediaPolicy,
        watch: Watch<'_>,
    ) -> Result<Loaded, MediaError> {
        let needs = talk.needs(pictures)?;
        let mut room = take(&self.memory, needs, policy, &job.name)?;
        let medium = talk.answer(room.bytes(), watch)?;
        room.shrink(medium.bytes());
        Ok(Loaded::new(medium, room))
    }

    /// Ends the process, gives its place back once it is gone, and starts the next one: whoever has the answer does
    /// not wait for that.
    fn end(&self, talk: Talk<'_>, place: Place) {
        let (process, decoders) = (talk.over(), Arc::clone(&self.decoders));
        let end = move || {
            drop(process);
            // Loading takes processors: not from the decode before. What fails now is tried again when it is needed.
            let _ = decoders.refill();
            drop(place);
        };
        // Without a thread it ends here, and the next one is started when it is needed.
        let _ = std::thread::Builder::new()
            .name("lnv-decoder-end".into())
            .spawn(end);
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

impl Job {
    /// What a decoder is told, and the pictures that it gets besides.
    fn task(&self, policy: &MediaPolicy) -> (Task, &[Vec<u8>]) {
        let (file, pictures) = match &self.content {
            Content::File(blob) => (Some(blob.path().to_owned()), &[][..]),
            Content::Frames(frames) => (None, &frames[..]),
        };
        let task = Task {
            name: self.name.clone(),
            kind: self.kind,
            file,
            pictures: pictures.iter().map(Vec::len).collect(),
            sampling: sampling_code(self.sampling),
            part: [self.part.start, self.part.end].map(|time| time.map(f64::to_bits)),
            shrinking: policy.shrinking,
            most: Most {
                file_bytes: policy.max_bytes.min(policy.decode_bytes / 2),
                pixels: policy.max_pixels,
                frames: policy.max_frames,
                bytes: policy.max_decoded_bytes,
                duration: Duration::try_from_secs_f64(policy.max_duration_s).ok(),
                time: policy.decode_timeout,
            },
        };
        (task, pictures)
    }
}
