//! The server's side of a process that decodes.
//!
//! Decision: a fresh process for each medium, started from this very program, so that nothing that one file does to its
//! decoder reaches another's; starting one takes longer (loading FFmpeg) than decoding a clip, so a few are started ahead
//! and wait. What a process says is believed as far as it was asked and reserved for: one that says more, or
//! otherwise, is taken for broken. It is killed at the end whatever it said, and its place is free once it is gone.
//!
//! Whoever waits on a process waits with a deadline and looks up now and then whether anybody still wants the answer.

use std::ffi::OsString;
use std::path::PathBuf;
use std::pin::pin;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use llava_next_video::media::{Image, ImageSize, Video, VideoMetadata};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout};
use tokio::time::{Instant, timeout, timeout_at};

use super::decode::Watch;
use super::words::{Facts, LINE_BYTES, Picture, Task, Word, too_hungry, too_slow};
use super::{MediaError, MediaErrorKind, MediaKind, MediaPolicy, Medium, held};

/// How much longer than its deadline a process is waited for, so that its own words are heard.
const GRACE: Duration = Duration::from_millis(500);

/// How often to look whether anybody still waits.
const LOOK: Duration = Duration::from_millis(100);

/// How long a process that has closed its output may take to end.
const END: Duration = Duration::from_millis(500);

/// Bytes of its last words that are looked at.
const LAST_WORDS: u64 = 4 << 10;

/// Characters of an error that are passed on.
const MESSAGE: usize = 4096;

/// Bytes that a frame's place in the list of frames takes in a line at most.
const INDEX_BYTES: u64 = 24;

/// How often the frames of a file may begin. There are fewer ways to read one that does not keep what it promised.
const BEGINNINGS: u32 = 8;

/// Variables that the loader may need to find FFmpeg. All others stay with the server.
const KEPT: [&str; 5] = [
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "DYLD_FALLBACK_LIBRARY_PATH",
    "PATH",
    "SystemRoot",
];

/// glibc's heap: one for all threads, since each of its own would count as 64 MiB of addresses, which keeps the memory of
/// a frame for the next one.
const HEAP: [(&str, &str); 3] = [
    ("MALLOC_ARENA_MAX", "1"),
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
    ("MALLOC_TRIM_THRESHOLD_", "268435456"),
];

/// Bytes that a pipe of pixels holds.
#[cfg(target_os = "linux")]
const PIPE_BYTES: usize = 1 << 20;

/// What is started.
pub(super) struct Program {
    path: PathBuf,
    words: Vec<OsString>,
    /// What comes before its first word: something only where libtest runs it.
    preamble: &'static str,
}

impl Program {
    /// This program, as a decoder with the limits of `policy`.
    pub(super) fn own(policy: &MediaPolicy) -> anyhow::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let seconds = (policy.decode_timeout.as_secs() + 1) * cores + 10;
        // In tests what runs is libtest, which can only run a test: there is one that is the decoder.
        let (words, preamble): (&[&str], _) = match cfg!(test) {
            false => (&["decode-media"], ""),
            true => (
                &[
                    "serve::media::tests::hostile::the_decoder",
                    "--exact",
                    "--nocapture",
                ],
                "\nrunning 1 test\n",
            ),
        };
        let limits = [policy.decoder_bytes >> 20, seconds].map(|n| n.to_string().into());
        Ok(Self {
            path: own_path()?,
            words: words.iter().map(OsString::from).chain(limits).collect(),
            preamble,
        })
    }

    /// This program, started by a shell that runs `script` first.
    #[cfg(test)]
    pub(super) fn after(self, script: &str) -> anyhow::Result<Self> {
        let script = format!("{script}\nexec \"$0\" \"$@\"");
        let words = ["-c".into(), script.into(), std::env::current_exe()?.into()];
        Ok(Self {
            path: "/bin/sh".into(),
            words: words.into_iter().chain(self.words).collect(),
            ..self
        })
    }

    fn start(&self) -> std::io::Result<Process> {
        let mut command = Command::new(&self.path);
        #[cfg(unix)]
        {
            use std::os::unix::process::CommandExt as _;
            // A group of its own: Ctrl-C in a terminal is for the server, which ends when all is answered.
            command.arg0("lnv").process_group(0);
        }
        command
            .args(&self.words)
            .env_clear()
            .envs(
                KEPT.iter()
                    .filter_map(|key| Some((key, std::env::var_os(key)?))),
            )
            .envs(HEAP)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn()?;
        #[cfg(target_os = "linux")]
        if let Some(stdout) = &child.stdout {
            // Fewer turns between the two. Where a user's pipes have no more room it stays as it is.
            let _ = rustix::pipe::fcntl_setpipe_size(stdout, PIPE_BYTES);
        }
        Ok(Process(child))
    }
}

/// The file of this program. On Linux what runs, even where the file has been replaced since.
fn own_path() -> anyhow::Result<PathBuf> {
    let running = PathBuf::from("/proc/self/exe");
    match cfg!(target_os = "linux") && running.exists() {
        true => Ok(running),
        false => Ok(std::env::current_exe()?),
    }
}

/// A process that ends when dropped.
pub(super) struct Process(Child);

impl Process {
    fn lives(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }

    /// Ends it, and says how it ended if it did so by itself.
    fn end(&mut self, patience: Duration) -> Option<ExitStatus> {
        let late = std::time::Instant::now() + patience;
        while self.lives() && std::time::Instant::now() < late {
            std::thread::sleep(Duration::from_millis(2));
        }
        let by_itself = self.0.try_wait().ok().flatten();
        if by_itself.is_none() {
            // It may be gone by now, which is as good.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
        by_itself
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

/// Processes that wait for a task.
pub(super) struct Decoders {
    program: Program,
    ahead: usize,
    waiting: Mutex<Vec<Process>>,
}

impl Decoders {
    /// Starts `ahead` processes.
    ///
    /// # Errors
    /// The program cannot be started.
    pub(super) fn new(program: Program, ahead: usize) -> anyhow::Result<Self> {
        let decoders = Self {
            program,
            ahead,
            waiting: Mutex::default(),
        };
        decoders.refill().map_err(|cause| {
            let reason = llava_next_video::error::io_reason(&cause);
            anyhow::anyhow!("cannot start this program once more, for decoding media: {reason}")
        })?;
        Ok(decoders)
    }

    /// Starts as many as are missing.
    ///
    /// # Errors
    /// The program cannot be started now.
    pub(super) fn refill(&self) -> std::io::Result<()> {
        let mut waiting = held(&self.waiting);
        while waiting.len() < self.ahead {
            waiting.push(self.program.start()?);
        }
        Ok(())
    }

    fn take(&self) -> std::io::Result<Process> {
        loop {
            let Some(mut process) = held(&self.waiting).pop() else {
                return self.program.start();
            };
            if process.lives() {
                return Ok(process);
            }
        }
    }

    /// Gives `task` to a process, not yet started on it.
    ///
    /// # Errors
    /// None can be started.
    pub(super) fn begin<'a>(
        &self,
        task: &'a Task,
        policy: &'a MediaPolicy,
        abandoned: &'a dyn Fn() -> bool,
    ) -> Result<Talk<'a>, MediaError> {
        let talk = self
            .take()
            .and_then(|process| Talk::new(process, self.program.preamble, task, policy, abandoned));
        talk.map_err(|cause| {
            tracing::error!(target: "lnv::serve", "cannot start a decoder: {cause}");
            let name = &task.name;
            let message =
                format!("there is no room to decode {name} at the moment: try again later");
            MediaError::new(MediaErrorKind::Busy, message)
        })
    }
}

/// Why there is no answer.
enum Broken {
    /// Its time is over.
    Late,
    /// Nobody wants it any more.
    Abandoned,
    /// The process ended, or talks no more.
    Gone,
    /// It said what it must not.
    Lies(&'static str),
}

impl From<std::io::Error> for Broken {
    fn from(_: std::io::Error) -> Self {
        Self::Gone
    }
}

/// One task in the hands of a process, which ends with this.
pub(super) struct Talk<'a> {
    task: &'a Task,
    policy: &'a MediaPolicy,
    abandoned: &'a dyn Fn() -> bool,
    preamble: &'static str,
    process: Process,
    pipes: Pipes,
    runtime: tokio::runtime::Runtime,
}

/// What is said and heard.
struct Pipes {
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    stderr: ChildStderr,
}

impl<'a> Talk<'a> {
    fn new(
        mut process: Process,
        preamble: &'static str,
        task: &'a Task,
        policy: &'a MediaPolicy,
        abandoned: &'a dyn Fn() -> bool,
    ) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let inside = runtime.enter();
        let missing = || std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        let child = &mut process.0;
        let pipes = Pipes {
            stdin: ChildStdin::from_std(child.stdin.take().ok_or_else(missing)?)?,
            stdout: BufReader::new(ChildStdout::from_std(
                child.stdout.take().ok_or_else(missing)?,
            )?),
            stderr: ChildStderr::from_std(child.stderr.take().ok_or_else(missing)?)?,
        };
        drop(inside);
        Ok(Self {
            task,
            policy,
            abandoned,
            preamble,
            process,
            pipes,
            runtime,
        })
    }

    /// Bytes that the pictures will take. `pictures` are those that the task says will follow.
    ///
    /// # Errors
    /// The process ended or said something else.
    pub(super) fn needs(&mut self, pictures: &[Vec<u8>]) -> Result<u64, MediaError> {
        let deadline = Instant::now() + self.policy.decode_timeout + GRACE;
        let (task, pipes, preamble) = (self.task, &mut self.pipes, self.preamble);
        let asked = async {
            let mut line = serde_json::to_vec(task).map_err(|_| Broken::Lies("no task"))?;
            line.push(b'\n');
            pipes.stdin.write_all(&line).await?;
            for picture in pictures {
                pipes.stdin.write_all(picture).await?;
            }
            let mut before = vec![0; preamble.len()];
            pipes.stdout.read_exact(&mut before).await?;
            match pipes.word(LINE_BYTES).await? {
                Word::Needs(bytes) => Ok(bytes),
                _ => Err(Broken::Lies("something else than what it needs")),
            }
        };
        let asked = self
            .runtime
            .block_on(watched(asked, deadline, self.abandoned));
        asked.map_err(|broken| self.why(&broken))
    }

    /// The pictures, which take no more than `room` bytes.
    ///
    /// # Errors
    /// Whatever the process found wrong, or is wrong with it.
    pub(super) fn answer(&mut self, room: u64, watch: Watch<'_>) -> Result<Medium, MediaError> {
        let deadline = Instant::now() + self.policy.decode_timeout;
        let mut hearing = Hearing {
            task: self.task,
            room,
            frames: Vec::new(),
            times: Vec::new(),
            whole: ImageSize::new(0, 0),
            begun: 0,
            watch,
        };
        let pipes = &mut self.pipes;
        let heard = async {
            pipes.stdin.write_all(b"\n").await?;
            hearing.all(pipes).await
        };
        let heard = watched(heard, deadline + GRACE, self.abandoned);
        match self.runtime.block_on(heard) {
            Ok(Err(_)) if Instant::now() >= deadline => Err(too_slow(&self.task.name)),
            Ok(answer) => answer,
            Err(broken) => Err(self.why(&broken)),
        }
    }

    /// The process, of which nothing is wanted any more.
    pub(super) fn over(self) -> Process {
        self.process
    }

    /// `broken` in the client's words.
    fn why(&mut self, broken: &Broken) -> MediaError {
        let name = &self.task.name;
        match broken {
            Broken::Late => too_slow(name),
            Broken::Abandoned => {
                let message = format!("nobody waits for {name} any more");
                MediaError::new(MediaErrorKind::Busy, message)
            }
            Broken::Lies(what) => {
                tracing::error!(target: "lnv::serve", "the decoder of {name} said {what}");
                broken_off(name)
            }
            Broken::Gone => self.gone(),
        }
    }

    fn gone(&mut self) -> MediaError {
        let name = &self.task.name;
        let ended = self.process.end(END);
        let mut words = Vec::new();
        let mut stderr = (&mut self.pipes.stderr).take(LAST_WORDS);
        // Another process may hold its end open, if it came to start one.
        let read = async { timeout(LOOK, stderr.read_to_end(&mut words)).await };
        let _ = self.runtime.block_on(read);
        let words = String::from_utf8_lossy(&words);
        let how = ended.map_or("without ending".to_owned(), |status| status.to_string());
        // They may be anybody's, so no line and no colour of theirs gets into the log.
        let said = words.trim().escape_debug();
        tracing::warn!(target: "lnv::serve", "the decoder of {name} broke off ({how}): {said}");
        if is_out_of_time(ended) {
            return too_slow(name);
        }
        // So Rust ends where there is no memory.
        if words.contains("memory allocation of") {
            return too_hungry(name, self.policy.decoder_bytes >> 20);
        }
        broken_off(name)
    }
}

#[cfg(unix)]
fn is_out_of_time(ended: Option<ExitStatus>) -> bool {
    use std::os::unix::process::ExitStatusExt;
    let signal = ended.and_then(|status| status.signal());
    signal == Some(rustix::process::Signal::XCPU.as_raw())
}

#[cfg(not(unix))]
fn is_out_of_time(_ended: Option<ExitStatus>) -> bool {
    false
}

fn broken_off(name: &str) -> MediaError {
    let message = format!("{name} could not be decoded: the decoder crashed on it; re-encode it");
    MediaError::new(MediaErrorKind::Invalid, message)
}

/// Does `work` until `deadline`, as long as somebody wants it.
async fn watched<T>(
    work: impl Future<Output = Result<T, Broken>>,
    deadline: Instant,
    abandoned: &dyn Fn() -> bool,
) -> Result<T, Broken> {
    let mut work = pin!(work);
    while !abandoned() {
        let look = deadline.min(Instant::now() + LOOK);
        match timeout_at(look, &mut work).await {
            Ok(done) => return done,
            Err(_) if Instant::now() >= deadline => return Err(Broken::Late),
            Err(_) => {}
        }
    }
    Err(Broken::Abandoned)
}

impl Pipes {
    /// The next word, of at most `most` bytes.
    async fn word(&mut self, most: u64) -> Result<Word, Broken> {
        let mut line = Vec::new();
        let mut stdout = (&mut self.stdout).take(most);
        stdout.read_until(b'\n', &mut line).await?;
        match line.last() {
            Some(b'\n') => serde_json::from_slice(&line).map_err(|_| Broken::Lies("no word")),
            _ if line.len() as u64 == most => Err(Broken::Lies("a line without end")),
            _ => Err(Broken::Gone),
        }
    }
}

/// An answer on its way, held to what was asked.
struct Hearing<'a> {
    task: &'a Task,
    /// Bytes that are left for pictures.
    room: u64,
    frames: Vec<Image>,
    times: Vec<f64>,
    /// The size of the frames in the file.
    whole: ImageSize,
    /// How often frames began.
    begun: u32,
    watch: Watch<'a>,
}

impl Hearing<'_> {
    async fn all(&mut self, pipes: &mut Pipes) -> Result<Result<Medium, MediaError>, Broken> {
        let most = LINE_BYTES + INDEX_BYTES * self.task.most.frames as u64;
        loop {
            match pipes.word(most).await? {
                Word::Needs(_) => return Err(Broken::Lies("what it needs, again")),
                Word::Picture(picture) => {
                    let mut image = self.frame(&picture)?;
                    pipes.stdout.read_exact(&mut image.data).await?;
                    if self.task.kind == MediaKind::Video {
                        (self.watch)((picture.position, picture.of), &image);
                    }
                    self.frames.push(image);
                    self.times.push(f64::from_bits(picture.time));
                }
                Word::End(facts) => return self.medium(facts).map(Ok),
                Word::Failed {
                    kind,
                    message,
                    param,
                } => {
                    let param = ["num_frames", "fps", "start"]
                        .into_iter()
                        .find(|known| *known == param);
                    return Ok(Err(MediaError {
                        kind,
                        message: message.chars().take(MESSAGE).collect(),
                        param: param.unwrap_or("url"),
                    }));
                }
            }
        }
    }

    /// The frame that `picture` announces, still without its pixels.
    fn frame(&mut self, picture: &Picture) -> Result<Image, Broken> {
        let most = &self.task.most;
        let frames = match self.task.kind {
            MediaKind::Image => 1,
            MediaKind::Video => most.frames,
        };
        if picture.position == 0 {
            // Those that came before do not count.
            let held: usize = self.frames.iter().map(|frame| frame.data.len()).sum();
            self.room += held as u64;
            (self.frames, self.times) = (Vec::new(), Vec::new());
            self.whole = picture.whole;
            self.begun += 1;
            if self.begun > BEGINNINGS {
                return Err(Broken::Lies("too many beginnings"));
            }
        }
        if picture.position != self.frames.len() {
            return Err(Broken::Lies("a picture out of turn"));
        }
        if picture.of > frames || picture.position >= picture.of {
            return Err(Broken::Lies("more pictures than were asked for"));
        }
        let size = picture.size;
        let pixels = [size, picture.whole]
            .map(|size| (size.height as u64).saturating_mul(size.width as u64));
        if !(1..=most.pixels).contains(&pixels[0]) || !(1..=most.pixels).contains(&pixels[1]) {
            return Err(Broken::Lies("a picture of no or too many pixels"));
        }
        if self.frames.first().is_some_and(|first| first.size != size) {
            return Err(Broken::Lies("pictures of several sizes"));
        }
        let left = self.room.checked_sub(pixels[0] * 3);
        self.room = left.ok_or(Broken::Lies("more than it needed"))?;
        Ok(Image {
            size,
            data: vec![0; size.area() * 3],
        })
    }

    fn medium(&mut self, facts: Option<Facts>) -> Result<Medium, Broken> {
        let mut frames = std::mem::take(&mut self.frames);
        match (self.task.kind, facts) {
            (MediaKind::Image, None) => {
                let image = frames.pop().ok_or(Broken::Lies("no picture"))?;
                Ok(Medium::Image(Arc::new(image)))
            }
            (MediaKind::Video, Some(facts)) => {
                let (fps, duration) = (f64::from_bits(facts.fps), f64::from_bits(facts.duration));
                let times = std::mem::take(&mut self.times);
                let is_finite = times
                    .iter()
                    .chain([&fps, &duration])
                    .all(|time| time.is_finite());
                if frames.is_empty() || facts.indices.len() != frames.len() || !is_finite {
                    return Err(Broken::Lies("what does not go together"));
                }
                let video = Video {
                    frames,
                    frames_indices: facts.indices,
                    timestamps: times,
                    metadata: VideoMetadata {
                        total_num_frames: facts.total,
                        fps,
                        duration,
                    },
                    notes: facts.notes,
                };
                Ok(Medium::Video(Arc::new(video), self.whole))
            }
            _ => Err(Broken::Lies("the end of something else")),
        }
    }
}
