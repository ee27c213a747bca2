//! URLs to files: the only place of the program that opens a socket for media.
//!
//! Only http and https; bounded in bytes, time and redirects. The bytes go to a temporary file that is
//! gone when the command ends, because FFmpeg opens local files only.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use llava_next_video::error::io_reason;
use tempfile::NamedTempFile;

use crate::progress::{Unit, bar};

/// The largest file that is fetched.
pub const MAX_BYTES: u64 = 4 << 30;

/// How long a server may be silent, and how long a whole download may take.
const CONNECT: Duration = Duration::from_secs(15);
const WHOLE: Duration = Duration::from_secs(3600);

/// Redirects that are followed.
const MAX_REDIRECTS: u32 = 5;

/// True where `text` has a scheme, as in `http://`: it is to be fetched rather than opened.
pub fn is_url(text: &str) -> bool {
    let scheme = text.split_once("://").map_or("", |(scheme, _)| scheme);
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"+-.".contains(&b);
    // One letter would be a drive.
    scheme.len() > 1 && scheme.bytes().all(legal)
}

/// The path of a `file://` URL, with its `%20` and the like undone.
pub fn file_url(text: &str) -> Option<PathBuf> {
    let rest = text.strip_prefix("file://")?;
    let rest = rest.strip_prefix("localhost").unwrap_or(rest);
    let mut bytes = Vec::with_capacity(rest.len());
    let mut left = rest.as_bytes();
    while let Some((first, after)) = left.split_first() {
        let hex = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let code = hex.and_then(|two| u8::from_str_radix(two, 16).ok());
        let (byte, rest) = match (first, code) {
            (b'%', Some(code)) => (code, &after[2..]),
            _ => (*first, after),
        };
        bytes.push(byte);
        left = rest;
    }
    Some(PathBuf::from(String::from_utf8_lossy(&bytes).into_owned()))
}

/// What went wrong with a request, in words for the person who typed the address.
fn plain(url: &str, cause: &ureq::Error) -> anyhow::Error {
    use ureq::Error as E;
    let reason = match cause {
        E::StatusCode(404 | 410) => "the server has no such file (404): check the address".into(),
        E::StatusCode(code @ (401 | 403)) => {
            format!("the server does not allow it ({code}): download the file yourself")
        }
        E::StatusCode(code) => format!("the server answers with status {code}: try again later"),
        E::TooManyRedirects => format!("more than {MAX_REDIRECTS} redirects: check the address"),
        E::Timeout(_) => "the server takes too long: try again later".into(),
        E::HostNotFound => "there is no such host: check the address and the network".into(),
        E::Http(_) | E::BadUri(_) => "it is no valid address: check how it is written".into(),
        E::Io(cause) => {
            let reason = io_reason(cause);
            format!("{reason}: check the address and the network")
        }
        other => format!("{other}: check the address and the network"),
    };
    anyhow!("cannot fetch {url}: {reason}")
}

/// Downloads `url` into a temporary file.
pub fn download(url: &str) -> Result<NamedTempFile> {
    let scheme = url
        .split_once("://")
        .map_or("", |(scheme, _)| scheme)
        .to_ascii_lowercase();
    if scheme != "http" && scheme != "https" {
        bail!("{url} is neither an http nor an https address: give one of these, or a local file");
    }
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_connect(Some(CONNECT))
        .timeout_global(Some(WHOLE))
        .max_redirects(MAX_REDIRECTS)
        .user_agent(concat!("lnv/", env!("CARGO_PKG_VERSION")))
        .build()
        .into();
    let mut response = agent.get(url).call().map_err(|cause| plain(url, &cause))?;
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
        let n = reader.read(&mut buffer).map_err(|cause| {
            let reason = io_reason(&cause);
            anyhow!("{url} broke off after {total} bytes ({reason}): try again")
        })?;
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
