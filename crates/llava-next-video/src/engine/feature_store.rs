//! Features of pictures on disk, for programs that begin later or beside this one.
//!
//! Decision: one file a picture in a directory that several processes may share, under a budget of bytes;
//! the file unused longest goes first, by its time. Files are written by a thread of their own, out of a
//! queue that takes what fits and refuses the rest, and appear under their name when they are whole. Reading
//! takes as long as the disk does, so that the engine has it done beside it (`recall.rs`). A store is
//! there to save time and nothing else: what cannot be read is encoded, what cannot be written is not,
//! and no request ever hears of it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use lnv_kernels::{Buffer, Ops};

use super::feature_file::{self, Found, Key, Kind};
use super::prefix::Digest;
use crate::error::{Error, Result, io_reason};
use crate::model::LlavaNextVideoModel;

/// Bytes of features that may wait to be written. They stay in memory meanwhile.
const QUEUE_BYTES: usize = 64 << 20;
/// Pictures that may wait to be written.
const QUEUE: usize = 256;
/// Nothing is written for so long after the disk has refused.
const REST: Duration = Duration::from_secs(60);
/// A file that is not finished after so long belongs to a process that is gone.
const ABANDONED: Duration = Duration::from_secs(3600);
/// The directory is looked at again after so many files, since others may have written too.
const LOOK_EVERY: usize = 64;

/// Opens a new file.
type Create = fn(&Path) -> io::Result<Box<dyn Write>>;

/// A directory of features.
pub struct FeatureStore {
    directory: PathBuf,
    model: Digest,
    ops: Ops,
    counts: Arc<Counts>,
    /// Until the store is dropped.
    queue: Option<SyncSender<Waiting>>,
    writer: Option<JoinHandle<()>>,
}

/// What has become of pictures, and what is there.
#[derive(Debug, Default)]
struct Counts {
    waiting: AtomicUsize,
    written: AtomicUsize,
    unwritten: AtomicUsize,
    bytes: AtomicU64,
}

/// A picture that is to be written.
struct Waiting {
    key: Key,
    features: Arc<Buffer>,
}

/// What a store has done, since it was opened unless said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Pictures written.
    pub written: usize,
    /// Pictures that were not: the disk was slow, full or not to be written to.
    pub unwritten: usize,
    /// Bytes in the directory, when it was looked at and by what was written since.
    pub bytes: u64,
}

impl FeatureStore {
    /// Opens a directory, which is made where it is not there, for the features of one model and at most
    /// `budget` bytes of files. Reads all weights that pictures go through.
    ///
    /// # Errors
    /// The directory is none and cannot be made. One that cannot be written to is no error: it is read.
    pub fn open(directory: &Path, budget: u64, model: &LlavaNextVideoModel) -> Result<Self> {
        let (name, ops) = (model.vision_fingerprint(), model.ops().clone());
        Self::with(directory, budget, (name, ops), create)
    }

    fn with(
        directory: &Path,
        budget: u64,
        (model, ops): (Digest, Ops),
        create: Create,
    ) -> Result<Self> {
        make(directory)?;
        let counts = Arc::new(Counts::default());
        let (queue, receiver) = mpsc::sync_channel(QUEUE);
        let writer = Writer {
            directory: directory.to_owned(),
            budget,
            counts: Arc::clone(&counts),
            ops: ops.clone(),
            there: 0,
            since_look: 0,
            resting: None,
            warned: false,
            create,
        };
        let writer = std::thread::Builder::new()
            .name("features".into())
            .spawn(move || writer.run(&receiver))
            .map_err(|cause| Error::io("start a thread that writes to", directory, &cause))?;
        Ok(Self {
            directory: directory.to_owned(),
            model,
            ops,
            counts,
            queue: Some(queue),
            writer: Some(writer),
        })
    }

    /// The features of a picture, of this shape, where they are there and whole.
    pub fn get(&self, picture: &Digest, shape: (usize, usize)) -> Option<Buffer> {
        let key = self.key(picture, shape);
        let path = self.directory.join(key.name());
        match feature_file::read(&path, &key) {
            Found::Nothing => None,
            Found::Values(values) => Some(self.ops.upload(shape.0, shape.1, &values)),
            Found::Broken => {
                // It stays where that is not allowed, and is found broken again.
                let _ = std::fs::remove_file(&path);
                None
            }
        }
    }

    /// Lets the features of a picture be written, if there is room in the queue.
    pub fn put(&self, picture: &Digest, features: &Arc<Buffer>) {
        let key = self.key(picture, (features.rows(), features.cols()));
        let bytes = bytes_of(features);
        let before = self.counts.waiting.fetch_add(bytes, Ordering::SeqCst);
        let waiting = Waiting {
            key,
            features: Arc::clone(features),
        };
        let room = before + bytes <= QUEUE_BYTES;
        let taken = room && (self.queue.as_ref()).is_some_and(|q| q.try_send(waiting).is_ok());
        if !taken {
            self.counts.waiting.fetch_sub(bytes, Ordering::SeqCst);
            self.counts.unwritten.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until all that was put is written or given up, at most for `time`; whether it was.
    pub fn flush(&self, time: Duration) -> bool {
        let begun = Instant::now();
        while self.counts.waiting.load(Ordering::SeqCst) > 0 {
            if begun.elapsed() >= time {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// What it has done.
    pub fn stats(&self) -> StoreStats {
        StoreStats {
            written: self.counts.written.load(Ordering::Relaxed),
            unwritten: self.counts.unwritten.load(Ordering::Relaxed),
            bytes: self.counts.bytes.load(Ordering::Relaxed),
        }
    }

    fn key(&self, picture: &Digest, shape: (usize, usize)) -> Key {
        Key {
            model: self.model,
            picture: *picture,
            shape,
        }
    }
}

/// What waits is still written.
impl Drop for FeatureStore {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take() {
            // It has nothing to say.
            let _ = writer.join();
        }
    }
}

fn bytes_of(features: &Buffer) -> usize {
    features.rows() * features.cols() * size_of::<f32>()
}

/// Makes a directory where there is none. What pictures show can be read out of their features, so that
/// a new one is its owner's alone.
fn make(directory: &Path) -> Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder
        .create(directory)
        .map_err(|cause| Error::io("make the directory", directory, &cause))
}

fn create(path: &Path) -> io::Result<Box<dyn Write>> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file: File = options.open(path)?;
    Ok(Box::new(file))
}

/// The thread that writes.
struct Writer {
    directory: PathBuf,
    budget: u64,
    counts: Arc<Counts>,
    ops: Ops,
    /// Bytes in the directory, as far as is known.
    there: u64,
    /// Files written since it was looked at.
    since_look: usize,
    /// Since when, where the disk has refused.
    resting: Option<Instant>,
    warned: bool,
    create: Create,
}

/// A file of the directory.
struct Listed {
    path: PathBuf,
    used: SystemTime,
    bytes: u64,
}

impl Writer {
    fn run(mut self, queue: &Receiver<Waiting>) {
        self.make_room(0);
        while let Ok(Waiting { key, features }) = queue.recv() {
            let bytes = bytes_of(&features);
            let values = self.ops.download(&features);
            drop(features);
            let counter = match self.write(&key, &values) {
                true => &self.counts.written,
                false => &self.counts.unwritten,
            };
            counter.fetch_add(1, Ordering::Relaxed);
            self.counts.bytes.store(self.there, Ordering::Relaxed);
            self.counts.waiting.fetch_sub(bytes, Ordering::SeqCst);
        }
    }

    /// Writes one picture; whether it is there afterwards.
    fn write(&mut self, key: &Key, values: &[f32]) -> bool {
        if self.resting.is_some_and(|since| since.elapsed() < REST) {
            return false;
        }
        self.resting = None;
        let path = self.directory.join(key.name());
        let there = std::fs::symlink_metadata(&path).map(|metadata| metadata.len());
        if there.is_ok_and(|bytes| Some(bytes) == key.bytes()) {
            // Another process was quicker.
            return true;
        }
        let Some(bytes) = key.bytes().filter(|bytes| *bytes <= self.budget) else {
            return false;
        };
        if self.since_look >= LOOK_EVERY || self.there.saturating_add(bytes) > self.budget {
            self.make_room(bytes);
            if self.there.saturating_add(bytes) > self.budget {
                return false;
            }
        }
        match self.write_whole(&path, key, values) {
            Ok(()) => {
                self.there += bytes;
                self.since_look += 1;
                true
            }
            Err(cause) => {
                self.resting = Some(Instant::now());
                self.warn(&cause);
                false
            }
        }
    }

    /// Under another name first, so that nobody reads half of it.
    fn write_whole(&self, path: &Path, key: &Key, values: &[f32]) -> io::Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let nanos = now.map_or(0, |time| time.as_nanos());
        // Processes of two containers may have one number.
        let mark = format!("{:x}-{nanos:x}", std::process::id());
        let unfinished = self.directory.join(key.unfinished(&mark));
        let mut out = (self.create)(&unfinished)?;
        let written = feature_file::write(out.as_mut(), key, values);
        drop(out);
        let done = written.and_then(|()| std::fs::rename(&unfinished, path));
        if done.is_err() {
            let _ = std::fs::remove_file(&unfinished);
        }
        done
    }

    /// Counts what is there, and throws away what was not used for longest where `bytes` more would not
    /// fit: some more than needed, so that the directory is not read for every file.
    fn make_room(&mut self, bytes: u64) {
        let mut files = self.list();
        self.there = files.iter().map(|file| file.bytes).sum();
        self.since_look = 0;
        if self.there.saturating_add(bytes) > self.budget {
            files.sort_by_key(|file| file.used);
            let aim = (self.budget - self.budget / 10).saturating_sub(bytes);
            for file in files {
                if self.there <= aim {
                    break;
                }
                match std::fs::remove_file(&file.path) {
                    Ok(()) => self.there -= file.bytes,
                    // Another process was quicker.
                    Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                        self.there -= file.bytes;
                    }
                    Err(_) => {}
                }
            }
        }
        self.counts.bytes.store(self.there, Ordering::Relaxed);
    }

    /// The files of the directory that are ours; those that nobody will finish are removed.
    fn list(&self) -> Vec<Listed> {
        let Ok(entries) = std::fs::read_dir(&self.directory) else {
            return Vec::new();
        };
        let mut files = Vec::new();
        for entry in entries.flatten() {
            let kind = entry.file_name().to_str().map(feature_file::kind);
            let Some(kind @ (Kind::Whole | Kind::Unfinished)) = kind else {
                continue;
            };
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            let file = Listed {
                path: entry.path(),
                used: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                bytes: metadata.len(),
            };
            let old = file.used.elapsed().is_ok_and(|age| age > ABANDONED);
            match kind {
                Kind::Unfinished if old => drop(std::fs::remove_file(&file.path)),
                _ if metadata.is_file() => files.push(file),
                _ => {}
            }
        }
        files
    }

    /// Once: what is wrong will be wrong for the next picture too.
    fn warn(&mut self, cause: &io::Error) {
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(
                "features of pictures cannot be written to {} ({}): going on without; make room or \
                 give another directory",
                self.directory.display(),
                io_reason(cause)
            );
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Barrier;

    use lnv_kernels::Isa;

    use super::*;

    const MODEL: Digest = [5; 32];
    const SHAPE: (usize, usize) = (3, 4);
    /// Bytes of a file of this shape.
    const FILE: u64 = (feature_file::HEADER + 48) as u64;

    fn ops() -> Ops {
        Ops::with_isa(Isa::Scalar)
    }

    fn open(directory: &Path, budget: u64) -> FeatureStore {
        FeatureStore::with(directory, budget, (MODEL, ops()), create).unwrap()
    }

    /// A picture's features, which say which one it is.
    fn features(picture: u8) -> Arc<Buffer> {
        Arc::new(ops().upload(SHAPE.0, SHAPE.1, &[f32::from(picture); 12]))
    }

    fn put(store: &FeatureStore, picture: u8) {
        store.put(&[picture; 32], &features(picture));
    }

    /// Which picture's features are found.
    fn get(store: &FeatureStore, picture: u8) -> Option<Vec<f32>> {
        let found = store.get(&[picture; 32], SHAPE)?;
        Some(ops().download(&found))
    }

    /// Where a picture's file is.
    fn path(directory: &Path, picture: u8) -> PathBuf {
        let key = Key {
            model: MODEL,
            picture: [picture; 32],
            shape: SHAPE,
        };
        directory.join(key.name())
    }

    /// Waits for the writer; closes the store.
    fn finish(store: FeatureStore) -> StoreStats {
        let counts = Arc::clone(&store.counts);
        drop(store);
        StoreStats {
            written: counts.written.load(Ordering::SeqCst),
            unwritten: counts.unwritten.load(Ordering::SeqCst),
            bytes: counts.bytes.load(Ordering::SeqCst),
        }
    }

    fn files(directory: &Path) -> usize {
        std::fs::read_dir(directory).unwrap().count()
    }

    #[test]
    fn the_next_program_finds_what_this_one_wrote_for_the_same_model_only() {
        let parent = tempfile::tempdir().unwrap();
        let directory = &parent.path().join("a/b");
        let store = open(directory, 1 << 20);
        assert_eq!(get(&store, 1), None);
        put(&store, 1);
        put(&store, 2);
        let stats = finish(store);
        assert_eq!((stats.written, stats.unwritten), (2, 0));
        assert_eq!(stats.bytes, 2 * FILE);
        let next = open(directory, 1 << 20);
        assert_eq!(get(&next, 1), Some(vec![1.0; 12]));
        assert_eq!(get(&next, 2), Some(vec![2.0; 12]));
        assert_eq!(get(&next, 3), None);
        let other = FeatureStore::with(directory, 1 << 20, ([6; 32], ops()), create).unwrap();
        assert_eq!(get(&other, 1), None);
        assert_eq!(files(directory), 2, "another model's files stay");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(directory), 0o700);
            assert_eq!(mode(&path(directory, 1)), 0o600);
        }
    }

    #[test]
    fn what_is_broken_cut_or_foreign_is_not_found_and_makes_way() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let store = open(directory, 1 << 20);
        put(&store, 1);
        put(&store, 2);
        finish(store);
        let store = open(directory, 1 << 20);
        let whole = std::fs::read(path(directory, 1)).unwrap();
        let mut wrong_value = whole.clone();
        *wrong_value.last_mut().unwrap() ^= 0x80;
        let cases: [&[u8]; 5] = [
            b"",
            b"PNG and not features",
            &whole[..whole.len() - 1],
            &wrong_value,
            // Another picture's, under this one's name.
            &std::fs::read(path(directory, 2)).unwrap(),
        ];
        for (case, bytes) in cases.iter().enumerate() {
            std::fs::write(path(directory, 1), bytes).unwrap();
            assert_eq!(get(&store, 1), None, "case {case}");
            assert!(!path(directory, 1).exists(), "case {case}");
        }
        put(&store, 1);
        finish(store);
        assert_eq!(
            get(&open(directory, 1 << 20), 1),
            Some(vec![1.0; 12]),
            "and is written again"
        );
    }

    #[test]
    fn the_budget_throws_away_what_was_not_used_for_longest_and_nothing_foreign() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        std::fs::write(directory.join("notes.txt"), [0; 4096]).unwrap();
        let store = open(directory, 1 << 20);
        (1..=10).for_each(|picture| put(&store, picture));
        finish(store);
        let hour = |picture: u8| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + 3600 * u64::from(picture))
        };
        for picture in 1..=10 {
            let file = File::options()
                .write(true)
                .open(path(directory, picture))
                .unwrap();
            file.set_modified(hour(picture)).unwrap();
        }
        let budget = 10 * FILE;
        let store = open(directory, budget);
        assert!(get(&store, 1).is_some(), "and used just now");
        put(&store, 11);
        let stats = finish(store);
        assert_eq!((stats.written, stats.unwritten), (1, 0));
        let there: Vec<u8> = (1..=11)
            .filter(|picture| path(directory, *picture).exists())
            .collect();
        assert_eq!(there, [1, 4, 5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(stats.bytes, 9 * FILE);
        assert!(directory.join("notes.txt").exists());
        // Less than is there, and less than one file.
        let stats = finish(open(directory, 3 * FILE));
        assert!(stats.bytes <= 3 * FILE);
        let store = open(directory, FILE - 1);
        put(&store, 20);
        let stats = finish(store);
        assert_eq!((stats.unwritten, stats.bytes), (1, 0));
        assert_eq!(files(directory), 1);
    }

    #[test]
    fn what_a_process_left_unfinished_is_removed_in_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let name = path(directory, 1).display().to_string();
        let (old, new) = (format!("{name}.1-1.part"), format!("{name}.1-2.part"));
        for path in [&old, &new] {
            std::fs::write(path, [0; 10]).unwrap();
        }
        let long_ago = SystemTime::now() - 2 * ABANDONED;
        let file = File::options().write(true).open(&old).unwrap();
        file.set_modified(long_ago).unwrap();
        finish(open(directory, 1 << 20));
        assert!(!Path::new(&old).exists());
        assert!(Path::new(&new).exists(), "somebody may be writing it");
    }

    /// A disk with room for some bytes of each file.
    struct Full(File, usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let fits = bytes.len().min(self.1);
            self.1 -= fits;
            match fits {
                0 => Err(io::ErrorKind::StorageFull.into()),
                _ => self.0.write(&bytes[..fits]),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }

    #[test]
    fn where_the_disk_is_full_nothing_is_left_and_it_rests() {
        let full: Create = |path| Ok(Box::new(Full(File::create_new(path)?, 100)));
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let mut writer = Writer {
            directory: directory.to_owned(),
            budget: 1 << 20,
            counts: Arc::default(),
            ops: ops(),
            there: 0,
            since_look: 0,
            resting: None,
            warned: false,
            create: full,
        };
        let key = |picture: u8| Key {
            model: MODEL,
            picture: [picture; 32],
            shape: SHAPE,
        };
        assert!(!writer.write(&key(1), &[1.0; 12]));
        assert!(writer.warned && writer.resting.is_some());
        assert_eq!(files(directory), 0, "no half file is left");
        writer.create = create;
        assert!(!writer.write(&key(1), &[1.0; 12]), "it rests");
        writer.resting = Instant::now().checked_sub(REST);
        assert!(writer.write(&key(1), &[1.0; 12]), "and tries again");
        assert_eq!((files(directory), writer.there), (1, FILE));

        let store = FeatureStore::with(directory, 1 << 20, (MODEL, ops()), full).unwrap();
        (2..9).for_each(|picture| put(&store, picture));
        assert_eq!(get(&store, 2), None);
        assert_eq!(get(&store, 1), Some(vec![1.0; 12]), "it still reads");
        assert_eq!(finish(store).unwritten, 7);
    }

    #[test]
    fn a_directory_that_vanishes_does_no_harm_and_a_file_is_none() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("features");
        let store = open(&directory, 1 << 20);
        std::fs::remove_dir_all(&directory).unwrap();
        put(&store, 1);
        assert_eq!(get(&store, 1), None);
        assert_eq!(finish(store).unwritten, 1);
        std::fs::write(&directory, "a file").unwrap();
        let error = FeatureStore::with(&directory, 1, (MODEL, ops()), create);
        let error = error.err().unwrap().to_string();
        assert!(error.contains("cannot make the directory"), "{error}");
    }

    #[test]
    fn who_puts_does_not_wait_for_a_slow_disk() {
        let slow: Create = |path| {
            std::thread::sleep(Duration::from_millis(400));
            create(path)
        };
        let directory = tempfile::tempdir().unwrap();
        let store = FeatureStore::with(directory.path(), 1 << 30, (MODEL, ops()), slow).unwrap();
        let large = Arc::new(ops().buffer(1024, 4096));
        let begun = Instant::now();
        for picture in 0..12 {
            store.put(&[picture; 32], &large);
        }
        assert!(begun.elapsed() < Duration::from_millis(300));
        assert!(
            !store.flush(Duration::from_millis(10)),
            "much is to be done"
        );
        assert!(store.flush(Duration::from_secs(60)));
        let stats = store.stats();
        assert_eq!(stats.written + stats.unwritten, 12);
        let most = QUEUE_BYTES / bytes_of(&large);
        assert!(stats.written <= most, "{stats:?}");
        assert!(stats.written > 0, "{stats:?}");
    }

    #[test]
    fn several_write_and_read_one_directory() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let barrier = Barrier::new(4);
        let budget = 6 * FILE;
        std::thread::scope(|scope| {
            for own in 0..4u32 {
                let barrier = &barrier;
                scope.spawn(move || {
                    let store = open(directory, budget);
                    barrier.wait();
                    for round in 0..40 {
                        // Each of ten pictures comes from several writers, and goes again.
                        let picture = (round * 7 + own) as u8 % 10;
                        put(&store, picture);
                        let found = get(&store, (picture + 3) % 10);
                        let right = vec![f32::from((picture + 3) % 10); 12];
                        assert!(found.is_none_or(|values| values == right));
                    }
                });
            }
        });
        let left = finish(open(directory, budget));
        assert!(left.bytes <= budget, "{left:?}");
        let names = std::fs::read_dir(directory).unwrap();
        for entry in names.flatten() {
            let name = entry.file_name();
            assert_eq!(feature_file::kind(name.to_str().unwrap()), Kind::Whole);
        }
    }
}
