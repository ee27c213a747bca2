//! Media for requests from strangers: sources to pictures, safely and once.
//!
//! Decision: one store takes every source (addresses, data URIs, uploads, local files where allowed) to a file of its own
//! making, named by what it holds, and only then looks at it. What FFmpeg opens is therefore always a regular file
//! in a private directory; nothing that a source says of itself (type, length, name) is believed. Each
//! step is bounded in bytes, time and how many run at once; equal work that is asked for at the same time is done once,
//! and what was decoded is kept under a budget of bytes.
//!
//! It refuses addresses inside (`address`), local files outside the directories that were named (`local`), and every
//! scheme that was not allowed. Errors name the source as the client wrote it, shortened, and nothing that the client
//! could not know.

mod address;
mod blob;
mod cache;
mod child;
mod data_uri;
mod decode;
pub mod decoder;
mod describe;
mod fetch;
pub(super) mod gate;
mod local;
mod source;
#[cfg(test)]
mod tests;
mod words;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use llava_next_video::media::{FrameSampling, Image, ImageSize, Video, VideoPart};
use llava_next_video::processor::settings::Resizing;
use serde::{Deserialize, Serialize};
use url::Url;

use blob::{Blob, BlobWriter, Workshop};
use cache::{Asker, Budgeted, Flights};
use child::{Decoders, Program};
use decode::{Content, DecodeKey, Decodes, Job};
use fetch::Fetcher;
use gate::{Budget, Gate};
use source::Source;

pub use decode::{Loaded, Watch};
pub use describe::{Described, DescribedFrame};

/// What sources are taken and how much of each.
#[derive(Debug, Clone)]
pub struct MediaPolicy {
    /// Directories below which local files may be named. None by default.
    pub allowed_local: Vec<PathBuf>,
    /// Whether addresses of this machine and of private networks may be fetched from. Link-local ones, where clouds
    /// hand out credentials, may not be even then.
    pub allow_private: bool,
    /// Whether `http:` is fetched.
    pub http: bool,
    /// Whether `https:` is fetched.
    pub https: bool,
    /// Whether `data:` and bare base64 are read.
    pub data: bool,
    /// Bytes of one source, encoded.
    pub max_bytes: u64,
    /// Pixels of one picture or frame.
    pub max_pixels: u64,
    /// Frames that are sampled of one video.
    pub max_frames: usize,
    /// Bytes of the sampled frames of one video, as RGB.
    pub max_decoded_bytes: u64,
    /// How frames of videos are made smaller, where that makes them so: then they are sent, kept and scaled once for all
    /// questions as the model's processor would resize them first.
    pub shrinking: Option<Resizing>,
    /// Length of a video in seconds.
    pub max_duration_s: f64,
    /// How long fetching may take, redirects and all.
    pub fetch_timeout: Duration,
    /// How long decoding may take.
    pub decode_timeout: Duration,
    /// How long to wait for one of the places below.
    pub wait_timeout: Duration,
    /// Sources that are fetched at once.
    pub max_parallel_fetches: usize,
    /// Sources that are decoded at once.
    pub max_parallel_decodes: usize,
    /// Bytes of media that are being decoded or were and are in some request's hands, all together.
    pub decode_bytes: u64,
    /// Bytes of memory that a process that decodes may have, its code and all.
    pub decoder_bytes: u64,
    /// Bytes of decoded media that are kept, as RGB in memory.
    pub cache_bytes: u64,
    /// Bytes of what was fetched that are kept, as files, to be asked whether they are still the same.
    pub fetched_bytes: u64,
    /// Bytes of uploads that are kept, as files.
    pub upload_bytes: u64,
}

impl Default for MediaPolicy {
    fn default() -> Self {
        Self {
            allowed_local: Vec::new(),
            allow_private: false,
            http: true,
            https: true,
            data: true,
            max_bytes: 512 << 20,
            // A frame of 8K.
            max_pixels: 7680 * 4320,
            max_frames: 256,
            max_decoded_bytes: 1 << 30,
            shrinking: None,
            max_duration_s: 4.0 * 3600.0,
            fetch_timeout: Duration::from_secs(60),
            decode_timeout: Duration::from_secs(60),
            wait_timeout: Duration::from_secs(60),
            max_parallel_fetches: 16,
            max_parallel_decodes: 2,
            decode_bytes: 1 << 30,
            decoder_bytes: 2 << 30,
            cache_bytes: 512 << 20,
            fetched_bytes: 1 << 30,
            upload_bytes: 4 << 30,
        }
    }
}

/// Whether a source is shown to the model as one picture or as a film.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MediaKind {
    /// One picture; of a film of pictures (GIF) the first.
    Image,
    /// A film.
    Video,
}

/// What a request names.
#[derive(Debug, Clone)]
pub struct MediaSource {
    /// As what.
    pub kind: MediaKind,
    /// `http:`, `https:`, `data:`, `media:` and, where allowed, `file:` or an absolute path; bare base64.
    pub url: String,
    /// Which frames of a video.
    pub sampling: FrameSampling,
    /// Where the part begins that frames are taken from, in seconds.
    pub start: Option<f64>,
    /// Where it ends.
    pub end: Option<f64>,
}

/// A source's pictures.
#[derive(Debug, Clone)]
pub enum Medium {
    /// One picture.
    Image(Arc<Image>),
    /// Sampled frames, and the size that they have in the file.
    Video(Arc<Video>, ImageSize),
}

impl Medium {
    /// Bytes that its pictures take.
    pub fn bytes(&self) -> u64 {
        let bytes = |image: &Image| image.data.len() as u64;
        match self {
            Self::Image(image) => bytes(image),
            Self::Video(video, _) => video.frames.iter().map(bytes).sum(),
        }
    }
}

/// The name of an upload: `media:` and the SHA-256 of its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MediaId(String);

impl MediaId {
    /// `media:` and 64 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn of(digest: &[u8; 32]) -> Self {
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Self(format!("media:{hex}"))
    }
}

impl std::fmt::Display for MediaId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a source gave no pictures.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct MediaError {
    /// One plain sentence.
    pub message: String,
    /// Which of the fields beside the source is wrong: `url`, `num_frames`, `fps`, `start`.
    pub param: &'static str,
    /// What kind of reason.
    pub kind: MediaErrorKind,
}

/// The kinds of [`MediaError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MediaErrorKind {
    /// Not allowed here.
    Refused,
    /// Not a source, not media, damaged, or not what was asked for.
    Invalid,
    /// Beyond a limit.
    TooLarge,
    /// No such server or file, or it does not hand it out.
    Unreachable,
    /// It took too long.
    Timeout,
    /// No upload of that name (any more).
    NotFound,
    /// No room or no turn now; later perhaps. The one kind that is not the client's.
    Busy,
}

impl MediaError {
    fn new(kind: MediaErrorKind, message: String) -> Self {
        Self {
            message,
            param: "url",
            kind,
        }
    }
}

/// What the store holds and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MediaStats {
    /// Bytes of decoded media that are kept.
    pub bytes: u64,
    /// Sources whose decoded media were found.
    pub hits: u64,
    /// Sources that were decoded.
    pub misses: u64,
    /// Bytes of uploads that are kept.
    pub upload_bytes: u64,
    /// Bytes of what was fetched that are kept.
    pub fetched_bytes: u64,
    /// Decodes that run now, those included that nobody waits for any more.
    pub decoding: usize,
    /// Bytes that decodes may take and decoded media in some request's hands have.
    pub decode_bytes: u64,
    /// Fetches that run now.
    pub fetching: usize,
}

/// A source whose bytes are here and whose pictures are not.
pub struct Fetched {
    content: Content,
    key: DecodeKey,
    source: MediaSource,
    /// Bytes that only this holds; none of an upload.
    pub bytes: u64,
}

impl Fetched {
    /// Whether its pictures are those of `other`.
    pub fn equals(&self, other: &Self) -> bool {
        self.key == other.key
    }

    /// As what it is shown.
    pub fn kind(&self) -> MediaKind {
        self.source.kind
    }

    /// Frames it may have, `most` where nothing says.
    pub fn frames(&self, most: usize) -> usize {
        match self.source.sampling {
            FrameSampling::Default(n) | FrameSampling::NumFrames(n) => n.min(most),
            FrameSampling::Fps(_) | FrameSampling::All => most,
        }
    }
}

/// Sources to pictures. Shared by all requests; its methods block.
pub struct MediaStore {
    policy: MediaPolicy,
    workshop: Workshop,
    fetcher: Fetcher,
    decodes: Decodes,
    fetching: Flights<String, Arc<Blob>>,
    decoding: Flights<DecodeKey, Loaded>,
    decoded: Mutex<Budgeted<DecodeKey, Medium>>,
    uploads: Mutex<Budgeted<MediaId, Arc<Blob>>>,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl MediaStore {
    /// A store with nothing in it.
    ///
    /// # Errors
    /// No directory for temporary files can be made.
    pub fn new(policy: MediaPolicy) -> anyhow::Result<Self> {
        let guard = fetch::Guard::new(policy.allow_private);
        Self::with_guard(policy, guard)
    }

    fn with_guard(policy: MediaPolicy, guard: fetch::Guard) -> anyhow::Result<Self> {
        let decoder = Program::own(&policy)?;
        Self::with(policy, guard, decoder)
    }

    fn with(
        mut policy: MediaPolicy,
        guard: fetch::Guard,
        decoder: Program,
    ) -> anyhow::Result<Self> {
        // No single one may need more than there is for all.
        let most = policy.decode_bytes;
        policy.max_decoded_bytes = policy.max_decoded_bytes.min(most);
        policy.max_pixels = policy.max_pixels.min(most / 2 / decoder::PIXEL_BYTES);
        Ok(Self {
            workshop: Workshop::new()?,
            fetcher: Fetcher::new(&policy, guard),
            decodes: Decodes {
                gate: Gate::new(policy.max_parallel_decodes),
                memory: Budget::new(policy.decode_bytes),
                decoders: Arc::new(Decoders::new(decoder, policy.max_parallel_decodes)?),
            },
            fetching: Flights::default(),
            decoding: Flights::default(),
            decoded: Mutex::new(Budgeted::new(policy.cache_bytes)),
            uploads: Mutex::new(Budgeted::new(policy.upload_bytes)),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            policy,
        })
    }

    /// The pictures of `source`, without the room that they take.
    #[cfg(test)]
    pub fn load(&self, source: &MediaSource) -> Result<Medium, MediaError> {
        let asker = Arc::new(());
        let fetched = self.fetch(source)?;
        let asker = Arc::downgrade(&asker);
        Ok(self.decode(&fetched, &asker, &mut |_, _| ())?.medium)
    }

    /// The bytes of `source`, on disk. Blocks, at most for the sum of the policy's times.
    ///
    /// # Errors
    /// See [`MediaErrorKind`].
    pub fn fetch(&self, source: &MediaSource) -> Result<Fetched, MediaError> {
        let (content, bytes) = self.content(source)?;
        let name = source::shown(&source.url);
        Ok(Fetched {
            key: DecodeKey::new(&content, source),
            content,
            bytes,
            // A data URI is as long as its bytes.
            source: MediaSource {
                url: name,
                ..source.clone()
            },
        })
    }

    /// The pictures of what was fetched, for `asker`: the decoder is stopped once all who asked for the same are gone.
    /// Blocks, at most for the sum of the policy's times. Whoever holds decoded media must not wait here for more:
    /// others wait for theirs. `watch` sees frames on their way where they are decoded for this call, and none where
    /// they were decoded before or are for another.
    ///
    /// # Errors
    /// See [`MediaErrorKind`].
    pub fn decode(
        &self,
        fetched: &Fetched,
        asker: &Asker,
        watch: Watch<'_>,
    ) -> Result<Loaded, MediaError> {
        let (policy, source) = (&self.policy, &fetched.source);
        let key = &fetched.key;
        if let Some(found) = self.found(key, &source.url)? {
            return Ok(found);
        }
        let patience = policy.wait_timeout * 2 + policy.decode_timeout;
        self.decoding
            .run(key.clone(), Instant::now() + patience, asker, |abandoned| {
                // Whoever flew before may have landed between the look and the start.
                if let Some(found) = self.found(key, &source.url)? {
                    return Ok(found);
                }
                self.misses.fetch_add(1, Ordering::Relaxed);
                let job = Job {
                    content: fetched.content.clone(),
                    name: source.url.clone(),
                    kind: source.kind,
                    sampling: source.sampling,
                    part: VideoPart {
                        start: source.start,
                        end: source.end,
                    },
                };
                let loaded = self.decodes.decode(&job, policy, abandoned, watch)?;
                let medium = loaded.medium.clone();
                let bytes = medium.bytes();
                held(&self.decoded).insert(key.clone(), medium, bytes);
                Ok(loaded)
            })
    }

    /// What was decoded before. It takes room too: the cache may drop it while it is used.
    fn found(&self, key: &DecodeKey, name: &str) -> Result<Option<Loaded>, MediaError> {
        let Some(medium) = held(&self.decoded).get(key) else {
            return Ok(None);
        };
        self.hits.fetch_add(1, Ordering::Relaxed);
        let room = decode::take(&self.decodes.memory, medium.bytes(), &self.policy, name)?;
        Ok(Some(Loaded::new(medium, room)))
    }

    /// Keeps `bytes` until others push them out.
    ///
    /// # Errors
    /// Too many bytes, or no room.
    #[cfg(test)]
    pub fn add(&self, bytes: &[u8]) -> Result<MediaId, MediaError> {
        let mut upload = self.begin_upload()?;
        upload.write(bytes)?;
        Ok(self.finish_upload(upload)?.id)
    }

    /// Begins an upload that comes in pieces.
    ///
    /// # Errors
    /// No room.
    pub fn begin_upload(&self) -> Result<Upload, MediaError> {
        let most = self.policy.max_bytes.min(self.policy.upload_bytes);
        let writer = self.workshop.begin("the upload", most)?;
        Ok(Upload(writer))
    }

    /// Ends an upload.
    ///
    /// # Errors
    /// No room, or nothing was written.
    pub fn finish_upload(&self, upload: Upload) -> Result<Uploaded, MediaError> {
        Ok(self.keep(Arc::new(upload.0.finish()?)))
    }

    /// Fetches what an address of the web leads to, and keeps it like an upload. Blocks like [`MediaStore::fetch`].
    ///
    /// # Errors
    /// It is another kind of source; it is too large to be kept; see [`MediaErrorKind`].
    pub fn fetch_and_keep(&self, url: &str) -> Result<Uploaded, MediaError> {
        let (name, most) = (source::shown(url), self.policy.upload_bytes);
        let Source::Web(url) = source::parse(url, &self.policy)? else {
            let message = format!("{name} is no http or https address: send the file itself");
            return Err(MediaError::new(MediaErrorKind::Invalid, message));
        };
        let blob = self.fetch_web(&name, url)?;
        if blob.bytes > most {
            let message = format!(
                "{name} has {} bytes, more than the {most} of all files that are kept: use a smaller one",
                blob.bytes
            );
            return Err(MediaError::new(MediaErrorKind::TooLarge, message));
        }
        Ok(self.keep(blob))
    }

    fn keep(&self, blob: Arc<Blob>) -> Uploaded {
        let id = MediaId::of(&blob.digest);
        let mut uploads = held(&self.uploads);
        let is_new = uploads.get(&id).is_none();
        uploads.insert(id.clone(), Arc::clone(&blob), blob.bytes);
        Uploaded { id, is_new, blob }
    }

    /// Keeps an upload no longer, unless the same bytes were there before, or have been sent again since:
    /// whoever sent them then is still looking at them.
    pub fn take_back(&self, uploaded: &Uploaded) {
        let mut uploads = held(&self.uploads);
        let own = uploads.get(&uploaded.id);
        if uploaded.is_new && own.is_some_and(|blob| Arc::ptr_eq(&blob, &uploaded.blob)) {
            uploads.remove(&uploaded.id);
        }
    }

    /// As what an upload is best shown: pictures are told from films by their first bytes.
    ///
    /// # Errors
    /// No upload has that name.
    pub fn kind_of(&self, id: &str) -> Result<MediaKind, MediaError> {
        Ok(self.upload(id)?.kind())
    }

    /// What a person wants to see of `source`: its size, its length, and its frames as thumbnails.
    ///
    /// # Errors
    /// As [`MediaStore::fetch`] and [`MediaStore::decode`].
    pub fn describe(&self, source: &MediaSource, asker: &Asker) -> Result<Described, MediaError> {
        let loaded = self.decode(&self.fetch(source)?, asker, &mut |_, _| ())?;
        describe::describe(&loaded.medium)
    }

    /// What there is now and what was done.
    pub fn stats(&self) -> MediaStats {
        MediaStats {
            bytes: held(&self.decoded).bytes(),
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            upload_bytes: held(&self.uploads).bytes(),
            fetched_bytes: self.fetcher.kept_bytes(),
            decoding: self.decodes.gate.taken(),
            decode_bytes: self.decodes.memory.taken(),
            fetching: self.fetcher.running(),
        }
    }

    fn upload(&self, id: &str) -> Result<Arc<Blob>, MediaError> {
        let found = held(&self.uploads).get(&MediaId(id.to_ascii_lowercase()));
        found.ok_or_else(|| {
            let message = format!(
                "{} is not there, or no longer: upload the file again",
                source::shown(id)
            );
            MediaError::new(MediaErrorKind::NotFound, message)
        })
    }

    /// The bytes of a source, as files of our own, and how many belong to nobody else.
    fn content(&self, source: &MediaSource) -> Result<(Content, u64), MediaError> {
        let policy = &self.policy;
        let name = source::shown(&source.url);
        let blob = match source::parse(&source.url, policy)? {
            Source::Stored => return Ok((Content::File(self.upload(&source.url)?), 0)),
            Source::Web(url) => self.fetch_web(&name, url)?,
            Source::File(path) => {
                let out = self.workshop.begin(&name, policy.max_bytes)?;
                Arc::new(local::read(&name, &path, policy, out)?)
            }
            Source::Data(text) => match data_uri::read(text, policy.max_bytes)? {
                data_uri::Data::Bytes(bytes) => self.kept(&name, &bytes)?,
                data_uri::Data::Frames(frames) if source.kind == MediaKind::Video => {
                    let bytes = frames.iter().map(|frame| frame.len() as u64).sum();
                    return Ok((Content::Frames(frames.into()), bytes));
                }
                data_uri::Data::Frames(_) => {
                    let message = format!("{name} holds several pictures where one is expected");
                    return Err(MediaError::new(MediaErrorKind::Invalid, message));
                }
            },
            Source::Base64(text) => self.kept(&name, &data_uri::base64(text, &name)?)?,
        };
        let bytes = blob.bytes;
        Ok((Content::File(blob), bytes))
    }

    fn fetch_web(&self, name: &str, url: Url) -> Result<Arc<Blob>, MediaError> {
        let policy = &self.policy;
        let deadline = Instant::now() + policy.wait_timeout + policy.fetch_timeout;
        // What was begun to be fetched is fetched: it may be kept from there on.
        let asker = Arc::new(());
        let asker = Arc::downgrade(&asker);
        self.fetching.run(url.to_string(), deadline, &asker, |_| {
            let out = self.workshop.begin(name, policy.max_bytes)?;
            self.fetcher.fetch(name, url, out)
        })
    }

    fn kept(&self, name: &str, bytes: &[u8]) -> Result<Arc<Blob>, MediaError> {
        let mut out = self.workshop.begin(name, self.policy.max_bytes)?;
        out.write(bytes)?;
        Ok(Arc::new(out.finish()?))
    }
}

/// An upload that is kept.
pub struct Uploaded {
    /// Its name.
    pub id: MediaId,
    /// Whether it was not there before.
    pub is_new: bool,
    blob: Arc<Blob>,
}

/// An upload on its way in. Dropped before its end it leaves nothing.
pub struct Upload(BlobWriter);

impl Upload {
    /// Takes the next piece.
    ///
    /// # Errors
    /// Too many bytes, or no room.
    pub fn write(&mut self, piece: &[u8]) -> Result<(), MediaError> {
        self.0.write(piece)
    }
}

/// Nothing that is done under these locks can leave them half done, so a panic elsewhere does no harm.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
