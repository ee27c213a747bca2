//! URLs to files: the only place of the program that opens a socket for media.
//!
//! Only http and https; bounded in bytes, time and redirects. The bytes go to a temporary file that is
//! gone when the command ends, because FFmpeg opens local files only.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use crate::progress::{Unit, bar};

/// The largest file that is fetched.
pub const MAX_BYTES: u64 = 4 << 30;

/// How long a server may be silent, and how long a whole download may take.
const CONNECT: Duration = Duration::from_secs(15);
const WHOLE: Duration = Duration::from_secs(3600);

/// Redirects that are followed.
const MAX_REDIRECTS: u32 = 5;

/// True where `text` is to be fetched rather than opened.
pub fn is_url(text: &str) -> bool {
    let scheme = text
        .split_once("://")
        .map(|(scheme, _)| scheme.to_ascii_lowercase());
    matches!(
        scheme.as_deref(),
        Some("http" | "https" | "ftp" | "file" | "rtsp" | "rtmp" | "data")
    )
}

/// Downloads `url` into a temporary file.
pub fn download(url: &str) -> Result<NamedTempFile> {
    let scheme = url
        .split_once("://")
        .map_or("", |(scheme, _)| scheme)
        .to_ascii_lowercase();
    if scheme != "http" && scheme != "https" {
        bail!("{url} is no http or https address: give one of these, or a local file");
    }
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_connect(Some(CONNECT))
        .timeout_global(Some(WHOLE))
        .max_redirects(MAX_REDIRECTS)
        .user_agent(concat!("lnv/", env!("CARGO_PKG_VERSION")))
        .build()
        .into();
    let mut response = agent
        .get(url)
        .call()
        .with_context(|| format!("cannot fetch {url}"))?;
    let length = response.body().content_length().unwrap_or(0);
    if length > MAX_BYTES {
        bail!("{url} has {length} bytes, more than the {MAX_BYTES} that are fetched");
    }
    let progress = bar(length, Unit::Bytes, "fetching");
    let mut file = NamedTempFile::new().context("cannot create a temporary file")?;
    let mut reader = response
        .body_mut()
        .with_config()
        .limit(MAX_BYTES + 1)
        .reader();
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0;
    loop {
        let n = reader
            .read(&mut buffer)
            .with_context(|| format!("{url} broke off"))?;
        if n == 0 {
            break;
        }
        total += n as u64;
        if total > MAX_BYTES {
            bail!("{url} has more than the {MAX_BYTES} bytes that are fetched");
        }
        file.write_all(&buffer[..n])
            .context("cannot write a temporary file")?;
        progress.inc(n as u64);
    }
    progress.finish_and_clear();
    if length > 0 && total < length {
        bail!("{url} broke off after {total} of {length} bytes: try again");
    }
    Ok(file)
}
