//! One error type for the library: each value is one plain sentence for a person, sorted by what went
//! wrong so that a program can tell the cases apart (a server answers `Input` and `Media` with 400).

use std::path::Path;

/// `Result` with the library's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as one sentence: what was wrong, the value, and what to do about it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration file is missing, malformed, or asks for something this program cannot do.
    #[error("{0}")]
    Config(String),
    /// A weight file is missing, truncated, corrupt or does not match the configuration.
    #[error("{0}")]
    Checkpoint(String),
    /// An image or a video cannot be read.
    #[error("{0}")]
    Media(String),
    /// The request is wrong: conversation, counts, lengths, generation options.
    #[error("{0}")]
    Input(String),
    /// The tokenizer files cannot be used.
    #[error("{0}")]
    Tokenizer(String),
    /// The chat template cannot be parsed or rendered.
    #[error("{0}")]
    Template(String),
    /// A file could not be read or written.
    #[error("{0}")]
    Io(String),
    /// The device asked for is not there.
    #[error("{0}")]
    Device(String),
    /// This program did something wrong: a bug, whatever the caller asked for.
    #[error("{0}")]
    Internal(String),
    /// The caller asked to stop.
    #[error("stopped")]
    Cancelled,
}

impl Error {
    /// An [`Error::Io`] that names the file, what was being done with it, and the cause.
    pub fn io(doing: &str, path: &Path, cause: &std::io::Error) -> Self {
        Error::Io(format!(
            "cannot {doing} {}: {}",
            path.display(),
            io_reason(cause)
        ))
    }
}

/// The operating system's reason without its error number, which helps nobody.
pub fn io_reason(cause: &std::io::Error) -> String {
    let text = cause.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_lowercase(),
        None => text,
    }
}
