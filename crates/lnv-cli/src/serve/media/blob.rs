//! A source's bytes in a file of our own.
//!
//! Decision: bytes of strangers lie in files, not in memory, because FFmpeg opens files and because a disk is larger;
//! in one directory that only this user may enter, under names that we chose. A file goes when its last user
//! goes. It refuses more bytes than the limit while they arrive, not after.

use std::io::Write;
use std::path::Path;

use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempDir, TempPath};

use super::{MediaError, MediaErrorKind, MediaKind};

/// The directory of the files.
pub(super) struct Workshop(TempDir);

/// Bytes in a file, by their digest.
pub(super) struct Blob {
    file: TempPath,
    /// SHA-256 of the bytes.
    pub(super) digest: [u8; 32],
    /// How many there are.
    pub(super) bytes: u64,
    head: Vec<u8>,
}

/// A file that is being written.
pub(super) struct BlobWriter {
    file: NamedTempFile,
    hasher: Sha256,
    bytes: u64,
    most: u64,
    head: Vec<u8>,
    name: String,
}

/// First bytes that tell pictures from films.
const HEAD: usize = 16;

impl Workshop {
    /// A new directory, gone when dropped.
    pub(super) fn new() -> anyhow::Result<Self> {
        let made = tempfile::Builder::new().prefix("lnv-media-").tempdir();
        let place = std::env::temp_dir();
        made.map(Self).map_err(|cause| {
            let reason = llava_next_video::error::io_reason(&cause);
            anyhow::anyhow!(
                "cannot make a directory for media in {}: {reason}; set TMPDIR to a directory with room",
                place.display()
            )
        })
    }

    /// Files that there are.
    #[cfg(test)]
    pub(super) fn files(&self) -> usize {
        std::fs::read_dir(self.0.path()).map_or(0, Iterator::count)
    }

    /// An empty file for at most `most` bytes of what errors call `name`.
    pub(super) fn begin(&self, name: &str, most: u64) -> Result<BlobWriter, MediaError> {
        Ok(BlobWriter {
            file: NamedTempFile::new_in(self.0.path()).map_err(|_| no_room(name))?,
            hasher: Sha256::new(),
            bytes: 0,
            most,
            head: Vec::new(),
            name: name.to_owned(),
        })
    }
}

// The cause is the server's affair and goes to its log, not to the client.
fn no_room(name: &str) -> MediaError {
    let message = format!("there is no room to store {name} at the moment: try again later");
    MediaError::new(MediaErrorKind::Busy, message)
}

impl BlobWriter {
    /// Bytes so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes there may be.
    pub(super) fn most(&self) -> u64 {
        self.most
    }

    /// Appends `piece`.
    pub(super) fn write(&mut self, piece: &[u8]) -> Result<(), MediaError> {
        self.bytes += piece.len() as u64;
        if self.bytes > self.most {
            return Err(self.too_large());
        }
        let missing = HEAD.saturating_sub(self.head.len()).min(piece.len());
        self.head.extend_from_slice(&piece[..missing]);
        self.hasher.update(piece);
        self.file.write_all(piece).map_err(|cause| {
            tracing::error!("cannot store media: {cause}");
            no_room(&self.name)
        })
    }

    /// The error for more bytes than there may be.
    pub(super) fn too_large(&self) -> MediaError {
        let message = format!(
            "{} has more than {} bytes, the limit: make it smaller or shorter",
            self.name, self.most
        );
        MediaError::new(MediaErrorKind::TooLarge, message)
    }

    /// The whole.
    pub(super) fn finish(self) -> Result<Blob, MediaError> {
        if self.bytes == 0 {
            let message = format!("{} is empty", self.name);
            return Err(MediaError::new(MediaErrorKind::Invalid, message));
        }
        Ok(Blob {
            file: self.file.into_temp_path(),
            digest: self.hasher.finalize().into(),
            bytes: self.bytes,
            head: self.head,
        })
    }
}

impl Blob {
    /// Where the bytes lie.
    pub(super) fn path(&self) -> &Path {
        &self.file
    }

    /// As what the bytes are best shown. A GIF may be either; it counts as a picture.
    pub(super) fn kind(&self) -> MediaKind {
        let head = &self.head;
        let pictures: [&[u8]; 4] = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM"];
        let webp = head.starts_with(b"RIFF") && head.get(8..12) == Some(b"WEBP");
        match webp || pictures.iter().any(|magic| head.starts_with(magic)) {
            true => MediaKind::Image,
            false => MediaKind::Video,
        }
    }
}
