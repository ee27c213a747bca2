//! The features of one picture as a file.
//!
//! Decision: a header that says everything the features depend on, a checksum of all the rest, and the
//! values as they lie in memory. A reader knows beforehand what the header must be and how long the file
//! is, so that it parses nothing and asks for no more memory than the picture needs: any other header is
//! a foreign file, whatever is wrong with it. A system that loses its power may leave any content behind
//! under any name; the checksum finds that out, so that nothing waits for the disk to be sure.

use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::SystemTime;

use super::prefix::Digest;

/// What the name of a file ends with.
const SUFFIX: &str = ".features";
/// What follows while it is being written, by the process that does it.
const UNFINISHED: &str = ".part";
/// Characters of a digest in a name.
const HEX: usize = 64;

const MAGIC: [u8; 8] = *b"lnvfeat\0";
/// In the machine's byte order: one of the other order reads a version that is not there.
const VERSION: u64 = 1;
const HEAD: usize = 96;
/// Bytes before the values: the head and the checksum.
pub const HEADER: usize = HEAD + 32;

/// What features belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Everything but the picture that they depend on.
    pub model: Digest,
    /// The picture.
    pub picture: Digest,
    /// Rows and columns.
    pub shape: (usize, usize),
}

impl Key {
    /// The name of the file.
    pub fn name(&self) -> String {
        let digest = blake3::keyed_hash(&self.model, &self.picture);
        format!("{}{SUFFIX}", digest.to_hex())
    }

    /// The name while it is being written; `mark` must be the writer's own.
    pub fn unfinished(&self, mark: &str) -> String {
        format!("{}.{mark}{UNFINISHED}", self.name())
    }

    /// How long the file is; `None` where no file is as long.
    pub fn bytes(&self) -> Option<u64> {
        let (rows, cols) = self.shape;
        let values = (rows as u64).checked_mul(cols as u64)?.checked_mul(4)?;
        values.checked_add(HEADER as u64)
    }

    fn head(&self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        let (rows, cols) = self.shape;
        let parts: [&[u8]; 6] = [
            &MAGIC,
            &VERSION.to_ne_bytes(),
            &self.model,
            &self.picture,
            &(rows as u64).to_ne_bytes(),
            &(cols as u64).to_ne_bytes(),
        ];
        let mut rest = head.as_mut_slice();
        for part in parts {
            let (own, behind) = rest.split_at_mut(part.len());
            own.copy_from_slice(part);
            rest = behind;
        }
        head
    }
}

/// Whose a file is, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Features.
    Whole,
    /// Being written, or left behind by a process that did not come to the end.
    Unfinished,
    /// None of ours.
    Other,
}

/// Whose a file of this name is.
pub fn kind(name: &str) -> Kind {
    let hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
    match name.split_at_checked(HEX) {
        Some((digest, SUFFIX)) if digest.bytes().all(hex) => Kind::Whole,
        Some((digest, rest))
            if digest.bytes().all(hex)
                && rest.starts_with(SUFFIX)
                && rest.ends_with(UNFINISHED) =>
        {
            Kind::Unfinished
        }
        _ => Kind::Other,
    }
}

/// What there is under a name.
#[derive(Debug, PartialEq)]
pub enum Found {
    /// Nothing, or nothing that may be read.
    Nothing,
    /// Something that should not be there.
    Broken,
    /// The values.
    Values(Vec<f32>),
}

/// Reads the features of `key`, and marks the file as used now.
pub fn read(path: &Path, key: &Key) -> Found {
    // Asked before it is opened: to open a pipe could take for ever.
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return Found::Nothing;
    };
    if !fits(&metadata, key) {
        return Found::Broken;
    }
    let Ok(file) = File::open(path) else {
        return Found::Nothing;
    };
    match values(&file, key) {
        Some(values) => {
            // Where that is not allowed the file looks older than it is, and goes sooner.
            let _ = file.set_modified(SystemTime::now());
            Found::Values(values)
        }
        None => Found::Broken,
    }
}

fn fits(metadata: &Metadata, key: &Key) -> bool {
    metadata.is_file() && Some(metadata.len()) == key.bytes()
}

fn values(mut file: &File, key: &Key) -> Option<Vec<f32>> {
    let mut header = [0; HEADER];
    file.read_exact(&mut header).ok()?;
    let (head, checksum) = header.split_at(HEAD);
    if head != key.head() {
        return None;
    }
    let mut values = vec![0.0; key.shape.0 * key.shape.1];
    file.read_exact(bytemuck::cast_slice_mut(&mut values))
        .ok()?;
    (checksum_of(key, &values) == *checksum).then_some(values)
}

fn checksum_of(key: &Key, values: &[f32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&key.head());
    hasher.update(bytemuck::cast_slice(values));
    *hasher.finalize().as_bytes()
}

/// Writes the features of `key`.
///
/// # Errors
/// What the system says.
pub fn write(out: &mut dyn Write, key: &Key, values: &[f32]) -> io::Result<()> {
    out.write_all(&key.head())?;
    out.write_all(&checksum_of(key, values))?;
    out.write_all(bytemuck::cast_slice(values))?;
    out.flush()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const KEY: Key = Key {
        model: [7; 32],
        picture: [9; 32],
        shape: (2, 3),
    };
    const VALUES: [f32; 6] = [1.0, -2.0, f32::MIN_POSITIVE, 0.0, -0.0, 6.5];

    fn written() -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&mut bytes, &KEY, &VALUES).unwrap();
        bytes
    }

    #[test]
    fn what_was_written_comes_back_and_nothing_else_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(KEY.name());
        assert_eq!(read(&path, &KEY), Found::Nothing);
        let bytes = written();
        assert_eq!(Some(bytes.len() as u64), KEY.bytes());
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path, &KEY), Found::Values(VALUES.to_vec()));
        let others = [
            Key {
                model: [8; 32],
                ..KEY
            },
            Key {
                picture: [8; 32],
                ..KEY
            },
            Key {
                shape: (3, 2),
                ..KEY
            },
            Key {
                shape: (2, 4),
                ..KEY
            },
        ];
        for other in &others {
            assert_eq!(read(&path, other), Found::Broken, "{other:?}");
        }
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert_eq!(read(&path, &KEY), Found::Broken, "{length} bytes");
        }
        std::fs::write(&path, [bytes.as_slice(), &[0]].concat()).unwrap();
        assert_eq!(read(&path, &KEY), Found::Broken, "a byte too many");
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            std::fs::write(&path, wrong).unwrap();
            assert_eq!(read(&path, &KEY), Found::Broken, "byte {at}");
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert_eq!(read(&path, &KEY), Found::Broken, "a directory");
    }

    #[test]
    fn names_tell_models_and_pictures_apart_and_foreign_files_from_ours() {
        let name = KEY.name();
        assert_eq!(kind(&name), Kind::Whole);
        assert_eq!(kind(&KEY.unfinished("1-2")), Kind::Unfinished);
        let swapped = Key {
            model: KEY.picture,
            picture: KEY.model,
            ..KEY
        };
        assert_ne!(swapped.name(), name);
        let upper = name.replace(|c: char| c.is_ascii_hexdigit(), "A");
        for other in [
            "",
            "notes.features",
            "photo.part",
            &name[1..],
            upper.as_str(),
        ] {
            assert_eq!(kind(other), Kind::Other, "{other}");
        }
        assert_eq!(kind(&"ä".repeat(40)), Kind::Other);
    }
}
