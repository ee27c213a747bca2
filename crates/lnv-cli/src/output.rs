//! Writing to stdout: answers only, flushed as they come, and no panic when the reader goes away.

use std::io::{self, Write};

use anyhow::{Context, Result};

/// The reader of stdout closed it: the command ends quietly, as `head` expects.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads the output any more")]
pub struct ReaderGone;

/// Writes and flushes.
pub fn write(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(cause) if cause.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        Err(cause) => Err(cause).context("cannot write to stdout"),
    }
}

/// Writes a line.
pub fn line(text: &str) -> Result<()> {
    write(&format!("{text}\n"))
}
