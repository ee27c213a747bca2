//! The process that decodes one medium: `lnv decode-media`, which the server starts and nobody else.
//!
//! Decision: FFmpeg and the decoders of pictures read bytes of strangers, so they run in a process that has nothing to
//! lose: before it hears of a file it takes from itself memory, processor time, files, core dumps and privileges; once it
//! has, everything else in the file system and the network, where the system can (Landlock). It looks at one file and
//! ends. A flaw in a decoder then is worth that file; a hang or a crash costs an error.
//!
//! It refuses to work where the limits of a Linux system cannot be set. Elsewhere it does what the system offers.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use llava_next_video::Error;
use llava_next_video::media::{
    FrameSampling, Image, MediaLimits, VideoPart, decode_image, decode_video_with, sample_indices,
};
use llava_next_video::processor::resize::Resizer;

use super::words::{Facts, LINE_BYTES, Picture, Task, Word, sampling_of, too_hungry, too_slow};
use super::{MediaError, MediaErrorKind, MediaKind};
use crate::args::DecodeMediaArgs;

/// Bytes that decoding a picture takes for each pixel at most: 16 bits of RGBA beside the result and a turned copy, or
/// a progressive JPEG's coefficients beside its planes and the result.
pub(super) const PIXEL_BYTES: u64 = 12;

/// Runs the command: one task, or none where the server ends first.
///
/// # Errors
/// The limits cannot be set, the task cannot be read, or nobody reads the answer. What is wrong with the medium is an
/// answer.
pub fn run(args: &DecodeMediaArgs) -> Result<()> {
    let meter = sandbox::limit(args)?;
    let mut input = BufReader::new(std::io::stdin());
    let mut line = String::new();
    let most = (&mut input).take(LINE_BYTES);
    if { most }.read_line(&mut line)? == 0 {
        return Ok(());
    }
    let task: Task = serde_json::from_str(&line)?;
    let mut pictures = Vec::new();
    for bytes in &task.pictures {
        let mut picture = vec![0; *bytes];
        input.read_exact(&mut picture)?;
        pictures.push(picture);
    }
    sandbox::keep_only(task.file.as_deref())?;
    let say = |word: &Word, pixels: &[u8]| -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        serde_json::to_writer(&mut out, word)?;
        out.write_all(b"\n")?;
        out.write_all(pixels)?;
        out.flush()
    };
    let decoding = Decoding::new(&task, &pictures, args.memory_mib)?;
    say(&Word::Needs(decoding.needs()), &[])?;
    line.clear();
    if input.read_line(&mut line)? == 0 {
        return Ok(());
    }
    std::thread::Builder::new().spawn(move || {
        // Nothing is said any more: the server is gone, and perhaps this decoder hangs.
        let _ = input.read(&mut [0]);
        std::process::abort();
    })?;
    let last = decoding.run(&|picture, image| {
        say(&Word::Picture(picture), &image.data).map_err(|_| Error::Cancelled)
    });
    // What is missing may be missing for want of memory only; not all decoders say so.
    let is_doubtful = match &last {
        Ok(facts) => facts.as_ref().is_some_and(is_damaged),
        Err(error) => error.kind == MediaErrorKind::Invalid,
    };
    let last = match is_doubtful && meter.is_full() {
        true => Err(too_hungry(&task.name, args.memory_mib)),
        false => last,
    };
    let last = match last {
        Ok(facts) => Word::End(facts),
        Err(error) => Word::Failed {
            kind: error.kind,
            message: error.message,
            param: error.param.to_owned(),
        },
    };
    say(&last, &[]).context("nobody reads the answer")
}

fn is_damaged(facts: &Facts) -> bool {
    facts.notes.iter().any(|note| note.contains("damaged"))
}

/// A task under way.
struct Decoding<'a> {
    task: &'a Task,
    pictures: &'a [Vec<u8>],
    sampling: FrameSampling,
    part: VideoPart,
    memory_mib: u64,
}

type Sink<'a> = &'a dyn Fn(Picture, &Image) -> llava_next_video::Result<()>;

impl<'a> Decoding<'a> {
    fn new(task: &'a Task, pictures: &'a [Vec<u8>], memory_mib: u64) -> Result<Self> {
        let [start, end] = task.part.map(|bits| bits.map(f64::from_bits));
        Ok(Self {
            task,
            pictures,
            sampling: sampling_of(task.sampling).ok_or_else(|| anyhow!("no such sampling"))?,
            part: VideoPart { start, end },
            memory_mib,
        })
    }

    /// Bytes that this may take at worst.
    fn needs(&self) -> u64 {
        let most = &self.task.most;
        match (&self.task.file, self.task.kind) {
            (Some(file), MediaKind::Image) => {
                // Only the first bytes are read; what they say is checked again while decoding.
                let told = image::ImageReader::open(file)
                    .and_then(image::ImageReader::with_guessed_format)
                    .ok()
                    .and_then(|reader| reader.into_dimensions().ok());
                let pixels = told.map(|(width, height)| u64::from(width) * u64::from(height));
                let pixels = pixels.unwrap_or(u64::MAX).min(most.pixels);
                let bytes = std::fs::metadata(file).map_or(0, |file| file.len());
                pixels * PIXEL_BYTES + bytes
            }
            _ => {
                let frames = match self.sampling {
                    FrameSampling::Default(n) | FrameSampling::NumFrames(n) => n,
                    FrameSampling::Fps(_) | FrameSampling::All => most.frames,
                };
                let frames = frames.min(most.frames) as u64;
                frames.saturating_mul(most.pixels * 3).min(most.bytes)
            }
        }
    }

    fn limits(&self) -> MediaLimits {
        let most = &self.task.most;
        MediaLimits {
            still_bytes: most.file_bytes,
            still_pixels: most.pixels,
            video_pixels: most.pixels,
            sampled_frames: most.frames,
            // What counts is what is handed over.
            sampled_bytes: u64::MAX,
            duration: most.duration,
            deadline: Some(Instant::now() + most.time),
            ..MediaLimits::default()
        }
    }

    fn run(&self, sink: Sink<'_>) -> Result<Option<Facts>, MediaError> {
        let limits = self.limits();
        match (&self.task.file, self.task.kind) {
            (Some(file), MediaKind::Image) => {
                let bytes = std::fs::read(file).map_err(|cause| match cause.kind() {
                    ErrorKind::OutOfMemory => self.too_hungry(),
                    _ => self.lost(),
                })?;
                let image = self.image(&bytes, &limits)?;
                let picture = Picture {
                    position: 0,
                    of: 1,
                    size: image.size,
                    whole: image.size,
                    time: 0,
                };
                sink(picture, &image).map_err(|cause| self.plain(&cause))?;
                Ok(None)
            }
            (Some(file), MediaKind::Video) => {
                let mut out = Frames::new(self.task, sink);
                let summary = decode_video_with(
                    file,
                    self.sampling,
                    self.part,
                    &limits,
                    None,
                    &mut |frame| out.give((frame.position, frame.of), frame.timestamp, frame.image),
                );
                let summary = summary.map_err(|cause| self.plain(&cause))?;
                let shown = file.display().to_string();
                let named = |note: &String| note.replace(&shown, &self.task.name);
                Ok(Some(Facts {
                    indices: summary.frames_indices,
                    total: summary.metadata.total_num_frames,
                    fps: summary.metadata.fps.to_bits(),
                    duration: summary.metadata.duration.to_bits(),
                    notes: summary.notes.iter().map(named).collect(),
                }))
            }
            (None, _) => self.video_of_pictures(&limits, sink).map(Some),
        }
    }

    fn image(&self, bytes: &[u8], limits: &MediaLimits) -> Result<Image, MediaError> {
        decode_image(bytes, &self.task.name, limits).map_err(|cause| self.plain(&cause))
    }

    /// A video given as pictures, one a second as vLLM counts them.
    fn video_of_pictures(&self, limits: &MediaLimits, sink: Sink<'_>) -> Result<Facts, MediaError> {
        let name = &self.task.name;
        let indices = sample_indices(self.pictures.len(), 1.0, self.sampling);
        let indices = indices.map_err(|cause| self.plain(&cause))?;
        if indices.len() > limits.sampled_frames {
            let most = limits.sampled_frames;
            let message = format!("{name} has more than {most} frames, the limit: send fewer");
            return Err(MediaError::new(MediaErrorKind::TooLarge, message));
        }
        let mut size = None;
        let mut out = Frames::new(self.task, sink);
        for (position, index) in indices.iter().enumerate() {
            if limits.deadline.is_some_and(|end| Instant::now() >= end) {
                return Err(too_slow(name));
            }
            let image = self.image(&self.pictures[*index], limits)?;
            if *size.get_or_insert(image.size) != image.size {
                let message = format!("the frames of {name} are not of one size");
                return Err(MediaError::new(MediaErrorKind::Invalid, message));
            }
            let given = out.give((position, indices.len()), *index as f64, image);
            given.map_err(|cause| self.plain(&cause))?;
        }
        let total = self.pictures.len();
        Ok(Facts {
            indices,
            total,
            fps: 1f64.to_bits(),
            duration: (total as f64).to_bits(),
            notes: Vec::new(),
        })
    }

    fn lost(&self) -> MediaError {
        let message = format!("{} is no longer stored: send it again", self.task.name);
        MediaError::new(MediaErrorKind::Busy, message)
    }

    fn too_hungry(&self) -> MediaError {
        too_hungry(&self.task.name, self.memory_mib)
    }

    /// The library's error in the client's words: it names our file, which the client has never heard of.
    fn plain(&self, cause: &Error) -> MediaError {
        let mut message = cause.to_string();
        if let Some(file) = &self.task.file {
            message = message.replace(&file.display().to_string(), &self.task.name);
        }
        let mut error = match cause {
            Error::Cancelled => return too_slow(&self.task.name),
            Error::Io(_) => return self.lost(),
            Error::Media(_) if message.contains("more memory than there is") => {
                return self.too_hungry();
            }
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

/// Hands a video's frames over: smaller where the server wants them so, and no more bytes than it takes.
struct Frames<'a> {
    task: &'a Task,
    sink: Sink<'a>,
    resizer: Option<Resizer>,
    bytes: u64,
}

impl<'a> Frames<'a> {
    fn new(task: &'a Task, sink: Sink<'a>) -> Self {
        Self {
            task,
            sink,
            resizer: None,
            bytes: 0,
        }
    }

    fn give(
        &mut self,
        (position, of): (usize, usize),
        time: f64,
        image: Image,
    ) -> llava_next_video::Result<()> {
        let whole = image.size;
        if position == 0 {
            let shrinking = self.task.shrinking.map(|how| how.shrinking(whole));
            self.resizer = shrinking.transpose()?.flatten();
            self.bytes = 0;
        }
        let image = match &self.resizer {
            Some(resizer) => resizer.resize(&image)?,
            None => image,
        };
        self.bytes += image.data.len() as u64;
        let most = self.task.most.bytes;
        if self.bytes > most {
            return Err(Error::Media(format!(
                "the frames of {} take more than {} MiB, the limit: sample fewer",
                self.task.name,
                most >> 20
            )));
        }
        let picture = Picture {
            position,
            of,
            size: image.size,
            whole,
            time: time.to_bits(),
        };
        (self.sink)(picture, &image)
    }
}

/// What a process can take from itself.
mod sandbox {
    use std::fs::File;
    use std::io::{Read, Seek};
    use std::path::Path;

    use anyhow::Result;

    use crate::args::DecodeMediaArgs;

    /// Files that may be open: the pipes, the medium twice or thrice, and what a library looks up.
    #[cfg(unix)]
    const FILES: u64 = 32;

    /// How much memory was asked for so far.
    pub(super) struct Meter {
        status: Option<File>,
        most: u64,
    }

    impl Meter {
        /// Whether so much was asked for at some time that asking for more may have failed.
        pub(super) fn is_full(&self) -> bool {
            let mut text = String::new();
            let read = self.status.as_ref().and_then(|mut file| {
                file.rewind().ok()?;
                file.read_to_string(&mut text).ok()
            });
            let peak = read.and_then(|_| crate::memory::line_of(&text, "VmPeak:"));
            // What fails is a frame or a few planes of one, all of them small beside the ceiling.
            peak.is_some_and(|peak| peak > self.most - self.most / 4)
        }
    }

    /// Sets the limits, for good.
    pub(super) fn limit(args: &DecodeMediaArgs) -> Result<Meter> {
        let most = args.memory_mib << 20;
        // Opened before the file system is gone.
        let status = File::open("/proc/self/status").ok();
        #[cfg(unix)]
        limit_resources(most, args.cpu_seconds)?;
        Ok(Meter { status, most })
    }

    #[cfg(unix)]
    fn limit_resources(memory: u64, seconds: u64) -> Result<()> {
        use anyhow::Context as _;
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        // Where the machine's memory ends, this goes rather than the server.
        let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
        for (what, most, spare) in [
            (Resource::As, memory, 0),
            // A signal that tells why, before the one that does not.
            (Resource::Cpu, seconds, 1),
            (Resource::Core, 0, 0),
            (Resource::Fsize, 0, 0),
            (Resource::Nofile, FILES, 0),
        ] {
            let above = getrlimit(what).maximum.unwrap_or(u64::MAX);
            let limit = Rlimit {
                current: Some(most.min(above)),
                maximum: Some((most + spare).min(above)),
            };
            let set = setrlimit(what, limit);
            if cfg!(target_os = "linux") {
                set.with_context(|| format!("cannot limit {what:?}"))?;
            }
        }
        #[cfg(target_os = "linux")]
        {
            use rustix::process::{DumpableBehavior, set_dumpable_behavior};
            rustix::thread::set_no_new_privs(true).context("cannot give up privileges")?;
            // Nor is a program started that collects core dumps, which the limit does not reach.
            set_dumpable_behavior(DumpableBehavior::NotDumpable).context("cannot hide")?;
        }
        Ok(())
    }

    /// Gives up all files but `file`, and the network, as far as this kernel knows how (Landlock).
    #[cfg(target_os = "linux")]
    pub(super) fn keep_only(file: Option<&Path>) -> Result<()> {
        use landlock::{
            ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
            RulesetCreatedAttr, Scope,
        };
        // The newest that the library knows; what the kernel does not is left out.
        let all = ABI::V10;
        let mut rules = Ruleset::default()
            .handle_access(AccessFs::from_all(all))?
            .handle_access(AccessNet::from_all(all))?
            .scope(Scope::from_all(all))?
            .create()?;
        // A file that is gone is found to be so later.
        if let Some(Ok(file)) = file.map(PathFd::new) {
            rules = rules.add_rule(PathBeneath::new(file, AccessFs::ReadFile))?;
        }
        rules.restrict_self()?;
        Ok(())
    }

    /// There is no such thing here.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn keep_only(_file: Option<&Path>) -> Result<()> {
        Ok(())
    }
}
