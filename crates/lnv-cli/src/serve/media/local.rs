//! Local files, where the person who started the server allowed some.
//!
//! Decision: a path is followed to its end (links, `..`) before it is compared with the allowed directories, the file
//! is opened without following a link in its last part and without waiting (a FIFO would hang), and what was opened is
//! compared with what was named, so that swapping a link in between gains nothing. It is then
//! copied: a file that changes while it is decoded is another matter than one that does not. Everything that may not
//! be read gets one answer, whether it is there or not.

use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::blob::{Blob, BlobWriter};
use super::{MediaError, MediaErrorKind, MediaPolicy};

fn refused(name: &str, policy: &MediaPolicy) -> MediaError {
    let message = match policy.allowed_local.is_empty() {
        true => format!(
            "{name} is a local file, and this server reads none: upload it or use a data URI"
        ),
        false => format!("{name} is not a file below the directories that this server may read"),
    };
    MediaError::new(MediaErrorKind::Refused, message)
}

/// Copies the file `path` to `out`.
pub(super) fn read(
    name: &str,
    path: &Path,
    policy: &MediaPolicy,
    mut out: BlobWriter,
) -> Result<Blob, MediaError> {
    let mut file = open(path, policy).ok_or_else(|| refused(name, policy))?;
    let deadline = Instant::now() + policy.fetch_timeout;
    let mut buffer = vec![0; 1 << 18];
    loop {
        let n = file.read(&mut buffer).map_err(|_| {
            let message = format!("{name} cannot be read to its end");
            MediaError::new(MediaErrorKind::Unreachable, message)
        })?;
        if n == 0 {
            return out.finish();
        }
        if Instant::now() >= deadline {
            let message = format!("reading {name} takes too long: try again later");
            return Err(MediaError::new(MediaErrorKind::Timeout, message));
        }
        out.write(&buffer[..n])?;
    }
}

fn open(path: &Path, policy: &MediaPolicy) -> Option<File> {
    let real = allowed(path, policy)?;
    let file = open_itself(&real)?;
    let meta = file.metadata().ok()?;
    // Still what the name leads to, and the name still leads to an allowed place.
    let again = allowed(path, policy)?;
    let now = std::fs::symlink_metadata(&again).ok()?;
    (meta.is_file() && again == real && same(&meta, &now)).then_some(file)
}

/// Where `path` leads, if that is below an allowed directory.
fn allowed(path: &Path, policy: &MediaPolicy) -> Option<PathBuf> {
    if !path.is_absolute() {
        return None;
    }
    let real = path.canonicalize().ok()?;
    let below = |directory: &PathBuf| {
        let directory = directory.canonicalize();
        directory.is_ok_and(|directory| real.starts_with(directory))
    };
    policy.allowed_local.iter().any(below).then_some(real)
}

#[cfg(unix)]
fn open_itself(path: &Path) -> Option<File> {
    use rustix::fs::{Mode, OFlags};
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    // A device may do something on being opened: look first.
    if !std::fs::symlink_metadata(path).ok()?.is_file() {
        return None;
    }
    rustix::fs::open(path, flags, Mode::empty())
        .ok()
        .map(File::from)
}

#[cfg(not(unix))]
fn open_itself(path: &Path) -> Option<File> {
    if !std::fs::symlink_metadata(path).ok()?.is_file() {
        return None;
    }
    File::open(path).ok()
}

#[cfg(unix)]
fn same(one: &Metadata, other: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

#[cfg(not(unix))]
fn same(one: &Metadata, other: &Metadata) -> bool {
    one.len() == other.len() && one.is_file() == other.is_file()
}
