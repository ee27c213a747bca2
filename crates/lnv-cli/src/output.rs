//! Writing: answers to stdout, flushed as they come, and everything else to stderr. Neither panics when
//! its reader goes away.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use llava_next_video::error::io_reason;

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
        Err(cause) => Err(anyhow!("cannot write to stdout: {}", io_reason(&cause))),
    }
}

/// A line on stderr. Where nobody listens (a closed pipe, a full disk) the work goes on regardless,
/// which `eprintln!` would end with a panic.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Refuses a place that cannot be written to before any work is done for it.
pub fn check_target(path: &Path) -> Result<()> {
    if path.is_dir() {
        bail!("cannot write {}: it is a directory", path.display());
    }
    match path.parent() {
        Some(parent) if parent != Path::new("") && !parent.is_dir() => bail!(
            "cannot write {}: there is no directory {}; create it first",
            path.display(),
            parent.display()
        ),
        _ => Ok(()),
    }
}

/// `n` things, in words.
pub fn count(n: usize, thing: &str) -> String {
    match n {
        1 => format!("1 {thing}"),
        n => format!("{n} {thing}s"),
    }
}

/// Bytes for people.
pub fn size(bytes: usize) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} bytes"),
        10_000..=9_999_999 => format!("{:.1} kB", bytes as f64 / 1e3),
        10_000_000..=9_999_999_999 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// A flag that Ctrl-C raises, so that a command can end in its own way.
pub fn stop_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&flag);
    ctrlc::set_handler(move || raised.store(true, Ordering::SeqCst))
        .context("cannot listen for Ctrl-C")?;
    Ok(flag)
}

/// Writes a line.
pub fn line(text: &str) -> Result<()> {
    write(&format!("{text}\n"))
}

/// The error with its causes as one sentence, each said once.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        let line = cause
            .lines()
            .next()
            .unwrap_or_default()
            .trim_end_matches('.');
        if text.contains(line) {
            continue;
        }
        if !text.is_empty() {
            text += ": ";
        }
        text += line;
    }
    text
}
