//! Where the files of a checkpoint come from: a directory in Hugging Face layout, or bytes built into
//! the program (the demo model). Everything that reads a checkpoint asks here, so both behave alike.
//!
//! Refuses a JSON file larger than [`MAX_JSON_BYTES`]: a vocabulary of a million tokens fits well below.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The largest configuration, tokenizer or template file that is read.
pub const MAX_JSON_BYTES: u64 = 256 << 20;

/// The files of one checkpoint.
#[derive(Debug, Clone)]
pub enum CheckpointFiles {
    /// A directory in Hugging Face layout.
    Directory(PathBuf),
    /// `(file name, contents)` built into the program.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

impl CheckpointFiles {
    /// The files of the directory `path`.
    ///
    /// # Errors
    /// `path` is not a directory.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let what = if path.exists() {
            "is not a directory"
        } else {
            "does not exist"
        };
        Err(Error::Checkpoint(format!(
            "{} {what}: give a directory in Hugging Face layout, with config.json and *.safetensors",
            path.display()
        )))
    }

    /// What to call the checkpoint in a message.
    pub fn name(&self) -> String {
        match self {
            Self::Directory(path) => path.display().to_string(),
            Self::Embedded(_) => "the built-in demo model".into(),
        }
    }

    /// What to call one of its files in a message.
    pub fn display(&self, file: &str) -> String {
        match self {
            Self::Directory(path) => path.join(file).display().to_string(),
            Self::Embedded(_) => format!("{file} of the built-in demo model"),
        }
    }

    /// The names of all files, those one folder down as `folder/name`; hidden ones are left out.
    ///
    /// # Errors
    /// The directory cannot be listed.
    pub fn list(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        match self {
            Self::Embedded(files) => names.extend(files.iter().map(|(name, _)| (*name).to_owned())),
            Self::Directory(directory) => {
                for name in entries(directory)? {
                    let path = directory.join(&name);
                    if path.is_dir() {
                        let inner = entries(&path)?.into_iter();
                        let file = inner.filter(|inner| path.join(inner).is_file());
                        names.extend(file.map(|inner| format!("{name}/{inner}")));
                    } else if path.is_file() {
                        names.push(name);
                    }
                }
            }
        }
        names.sort();
        Ok(names)
    }

    /// The contents of `file`, or `None` where the checkpoint has no such file.
    ///
    /// # Errors
    /// The file is there but cannot be read, or is absurdly large.
    pub fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Embedded(files) => Ok(files
                .iter()
                .find(|(name, _)| *name == file)
                .map(|(_, b)| Cow::Borrowed(*b))),
            Self::Directory(directory) => read_bounded(&directory.join(file)),
        }
    }

    /// As [`CheckpointFiles::read`], as UTF-8 text.
    ///
    /// # Errors
    /// As `read`, or the file is not UTF-8.
    pub fn read_text(&self, file: &str) -> Result<Option<String>> {
        let Some(bytes) = self.read(file)? else {
            return Ok(None);
        };
        match String::from_utf8(bytes.into_owned()) {
            Ok(text) => Ok(Some(text)),
            Err(_) => Err(Error::Config(format!(
                "{} is not text in UTF-8: download it again",
                self.display(file)
            ))),
        }
    }

    /// As [`CheckpointFiles::read_text`], parsed as JSON.
    ///
    /// # Errors
    /// As `read_text`, or the file is not JSON (with line and column).
    pub fn read_json(&self, file: &str) -> Result<Option<serde_json::Value>> {
        let Some(text) = self.read_text(file)? else {
            return Ok(None);
        };
        match serde_json::from_str(&text) {
            Ok(value) => Ok(Some(value)),
            Err(cause) => Err(Error::Config(format!(
                "{} is not valid JSON ({cause}): repair it or download it again",
                self.display(file)
            ))),
        }
    }
}

/// The names in a directory, but for hidden ones and those that are not text.
fn entries(directory: &Path) -> Result<Vec<String>> {
    let failed = |cause: std::io::Error| Error::io("list", directory, &cause);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().into_string();
        names.extend(name.ok().filter(|name| !name.starts_with('.')));
    }
    Ok(names)
}

fn read_bounded(path: &Path) -> Result<Option<Cow<'static, [u8]>>> {
    let length = match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => metadata.len(),
        Ok(_) => return Err(Error::Config(format!("{} is not a file", path.display()))),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(Error::io("read", path, &cause)),
    };
    if length > MAX_JSON_BYTES {
        return Err(Error::Config(format!(
            "{} has {length} bytes, more than the {MAX_JSON_BYTES} that a configuration file may have",
            path.display()
        )));
    }
    std::fs::read(path)
        .map(|b| Some(Cow::Owned(b)))
        .map_err(|e| Error::io("read", path, &e))
}
