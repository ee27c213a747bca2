//! What a client wrote for a source, told apart and checked before anything is opened.
//!
//! Decision: addresses are read by the WHATWG rules (`url`), since those are what the connection uses too; a reading of
//! our own beside it is where filters and clients come to differ. It refuses schemes that are not allowed, user names
//! and passwords, ports of other services, and IPv4 addresses that are not written as four decimal numbers: nobody
//! means well by `0x7f.1`.

use std::path::PathBuf;

use url::{Host, Url};

use super::{MediaError, MediaErrorKind, MediaPolicy};

/// Bytes of an address or a path.
const MAX_TEXT: usize = 8192;

/// Characters of a source that errors show.
const SHOWN: usize = 80;

/// Base64 without a scheme is longer than any name one may type.
const MIN_BARE_BASE64: usize = 128;

/// The last port that is some other service's, but for those of the web.
const LAST_SYSTEM_PORT: u16 = 1023;

/// One source.
pub(super) enum Source<'a> {
    /// To be fetched.
    Web(Url),
    /// A data URI.
    Data(&'a str),
    /// Bare base64.
    Base64(&'a str),
    /// A local file.
    File(PathBuf),
    /// An upload.
    Stored,
}

fn refused(message: String) -> MediaError {
    MediaError::new(MediaErrorKind::Refused, message)
}

fn invalid(message: String) -> MediaError {
    MediaError::new(MediaErrorKind::Invalid, message)
}

/// How errors name the source `text`: shortened, without a password, a query or control characters.
pub(super) fn shown(text: &str) -> String {
    let scheme = scheme_of(text).unwrap_or_default();
    if scheme == "data" {
        return "the data URI".into();
    }
    if is_bare_base64(text) {
        return "the base64 text".into();
    }
    let mut text = text;
    let mut cut = false;
    if scheme == "http" || scheme == "https" {
        let end = text.find(['?', '#']).unwrap_or(text.len());
        cut = end < text.len();
        text = &text[..end];
        let from = text.find("//").map_or(0, |at| at + 2);
        let until = text[from..]
            .find(['/', '\\'])
            .map_or(text.len(), |at| from + at);
        if let Some(at) = text[from..until].rfind('@') {
            let clean = format!("{}{}", &text[..from], &text[from + at + 1..]);
            return shorten(&clean, cut);
        }
    }
    shorten(text, cut)
}

fn shorten(text: &str, cut: bool) -> String {
    let clean = |c: char| if c.is_control() { '?' } else { c };
    let mut short: String = text.chars().take(SHOWN).map(clean).collect();
    if cut || text.chars().nth(SHOWN).is_some() {
        short.push('…');
    }
    short
}

/// The scheme in small letters; one letter would be a drive.
fn scheme_of(text: &str) -> Option<String> {
    let (scheme, _) = text.split_once(':')?;
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
    let begins = scheme.starts_with(|first: char| first.is_ascii_alphabetic());
    (begins && scheme.len() > 1 && scheme.len() < 32 && scheme.bytes().all(legal))
        .then(|| scheme.to_ascii_lowercase())
}

fn is_bare_base64(text: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=\r\n".contains(&byte);
    text.len() >= MIN_BARE_BASE64 && text.bytes().all(legal)
}

/// What kind of source `text` is.
pub(super) fn parse<'a>(text: &'a str, policy: &MediaPolicy) -> Result<Source<'a>, MediaError> {
    // Browsers drop spaces around an address; nothing else may stand there.
    let text = text.trim_matches(|c: char| c.is_ascii_whitespace());
    let scheme = scheme_of(text);
    match scheme.as_deref() {
        Some("data") if policy.data => return Ok(Source::Data(text)),
        None if policy.data && is_bare_base64(text) => return Ok(Source::Base64(text)),
        Some("data") => return Err(refused("data URIs are not allowed here".into())),
        _ => {}
    }
    let name = shown(text);
    if text.len() > MAX_TEXT {
        return Err(invalid(format!(
            "{name} has more than {MAX_TEXT} characters: upload the file instead"
        )));
    }
    match scheme.as_deref() {
        Some("http" | "https") => web(text, &name, policy).map(Source::Web),
        Some("media") => Ok(Source::Stored),
        Some("file") => file_url(text, &name).map(Source::File),
        Some(_) => Err(refused(format!(
            "{name} is of a kind that is not allowed here: use {}",
            allowed_schemes(policy)
        ))),
        None if text.starts_with('/') => Ok(Source::File(text.into())),
        None => Err(invalid(format!(
            "{name:?} is not a source: use {}",
            allowed_schemes(policy)
        ))),
    }
}

fn allowed_schemes(policy: &MediaPolicy) -> String {
    let all = [
        (policy.http, "http:"),
        (policy.https, "https:"),
        (policy.data, "data:"),
        (true, "media: (an upload)"),
        (!policy.allowed_local.is_empty(), "file:"),
    ];
    let names: Vec<&str> = all
        .iter()
        .filter_map(|(is, name)| is.then_some(*name))
        .collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => names.concat(),
    }
}

/// An address as a client wrote it.
fn web(text: &str, name: &str, policy: &MediaPolicy) -> Result<Url, MediaError> {
    let url = Url::parse(text)
        .map_err(|cause| invalid(format!("{name} is not a valid address ({cause})")))?;
    // Where the reading changed an IPv4 address, it was written in an odd way.
    if let Some(Host::Ipv4(ip)) = url.host() {
        let begins = format!("{}://{ip}", url.scheme());
        let rest = text.get(begins.len()..).unwrap_or_default();
        let same = text.to_ascii_lowercase().starts_with(&begins);
        if !same || !(rest.is_empty() || rest.starts_with([':', '/', '?', '#'])) {
            return Err(refused(format!(
                "{name} writes its address in an unusual way: write it as four decimal numbers"
            )));
        }
    }
    check_web(&url, name, policy)?;
    Ok(url)
}

/// What every address must keep to, also one that another led to.
pub(super) fn check_web(url: &Url, name: &str, policy: &MediaPolicy) -> Result<(), MediaError> {
    let allowed = match url.scheme() {
        "http" => policy.http,
        "https" => policy.https,
        _ => false,
    };
    if !allowed {
        return Err(refused(format!(
            "{name} is of a kind that is not allowed here, or leads to one: use {}",
            allowed_schemes(policy)
        )));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refused(format!(
            "{name} has a user name or a password in it, or leads to such an address: they are not sent"
        )));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(invalid(format!("{name} names no server")));
    }
    // `port()` is none for the scheme's own.
    match url.port() {
        Some(port) if port <= LAST_SYSTEM_PORT && port != 80 && port != 443 => {
            Err(refused(format!(
                "{name} names a port of another service than the web, or leads to one: use 80, 443 or one above {LAST_SYSTEM_PORT}"
            )))
        }
        _ => Ok(()),
    }
}

/// The path of `file:///path`. No other form: a host, even `localhost`, would be somebody else's file.
fn file_url(text: &str, name: &str) -> Result<PathBuf, MediaError> {
    let wrong = || {
        refused(format!(
            "{name} is not a local file that may be read here: write it as file:///path"
        ))
    };
    if !text
        .get(..8)
        .is_some_and(|head| head.eq_ignore_ascii_case("file:///"))
    {
        return Err(wrong());
    }
    let url = Url::parse(text).map_err(|_| wrong())?;
    if url.host().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err(wrong());
    }
    url.to_file_path().map_err(|()| wrong())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn outcome(text: &str) -> &'static str {
        match parse(text, &MediaPolicy::default()) {
            Ok(Source::Web(_)) => "web",
            Ok(Source::Data(_)) => "data",
            Ok(Source::Base64(_)) => "base64",
            Ok(Source::File(_)) => "file",
            Ok(Source::Stored) => "stored",
            Err(error) if error.kind == MediaErrorKind::Refused => "refused",
            Err(error) if error.kind == MediaErrorKind::Invalid => "invalid",
            Err(_) => "other",
        }
    }

    #[test]
    fn the_table_of_sources() {
        let table = [
            // What is connected to is checked later; these are well written.
            ("http://example.org/a.mp4", "web"),
            ("HTTPS://EXAMPLE.org:8443/a.mp4?x=1#y", "web"),
            (" http://example.org ", "web"),
            ("http://1.2.3.4", "web"),
            ("http://1.2.3.4:8080/x", "web"),
            ("http://1.2.3.4?x", "web"),
            ("http://[2606:4700::1]/x", "web"),
            ("http://[::1]:80/x", "web"),
            ("http://bücher.example/x", "web"),
            ("data:image/png;base64,AAAA", "data"),
            ("DATA:,x", "data"),
            ("media:0123", "stored"),
            ("file:///etc/passwd", "file"),
            ("file:///tmp/a%20b.mp4", "file"),
            ("/etc/passwd", "file"),
            // Odd spellings of 127.0.0.1 and of public addresses.
            ("http://2130706433/", "refused"),
            ("http://0x7f000001/", "refused"),
            ("http://0x7f.0.0.1/", "refused"),
            ("http://0177.0.0.1/", "refused"),
            ("http://127.1/", "refused"),
            ("http://127.0.1/", "refused"),
            ("http://0/", "refused"),
            ("http://017700000001/", "refused"),
            ("http://①②⑦.⓪.⓪.①/", "refused"),
            ("http://127。0。0。1/", "refused"),
            ("http://%31%32%37.0.0.1/", "refused"),
            ("http://127.0.0.1./", "refused"),
            ("http:127.0.0.1/", "refused"),
            ("http:/127.0.0.1/", "refused"),
            ("http:\\\\127.0.0.1/", "refused"),
            ("http:///127.0.0.1/", "refused"),
            ("http://1.1/", "refused"),
            ("http://127.0.0.1\t.example/", "web"),
            // User names, ports, zones.
            ("http://me@example.org/", "refused"),
            ("http://me:secret@example.org/", "refused"),
            ("http://:secret@example.org/", "refused"),
            ("http://example.org@127.0.0.1/", "refused"),
            ("http://1.2.3.4@127.0.0.1/", "refused"),
            ("http://example.org:22/", "refused"),
            ("http://example.org:25/", "refused"),
            ("http://example.org:0/", "refused"),
            ("http://example.org:443/", "web"),
            ("https://example.org:80/", "web"),
            ("http://example.org:99999/", "invalid"),
            ("http://[fe80::1%25eth0]/", "invalid"),
            ("http://[fe80::1%eth0]/", "invalid"),
            ("http://[::1/", "invalid"),
            ("http://256.1.1.1/", "invalid"),
            ("http://1.2.3.4.5/", "invalid"),
            ("http://", "invalid"),
            ("http://exa mple.org/", "invalid"),
            // Other schemes.
            ("ftp://example.org/a.mp4", "refused"),
            ("gopher://127.0.0.1:6379/_x", "refused"),
            ("concat:/etc/passwd|/etc/group", "refused"),
            ("subfile,,start,0,end,9,,:/etc/passwd", "invalid"),
            ("pipe:0", "refused"),
            ("rtsp://127.0.0.1/", "refused"),
            ("rtmp://127.0.0.1/", "refused"),
            ("tcp://127.0.0.1:22", "refused"),
            ("crypto:file:///etc/passwd", "refused"),
            ("unix:/var/run/docker.sock", "refused"),
            ("jar:http://127.0.0.1!/", "refused"),
            ("javascript:alert(1)", "refused"),
            ("blob:http://x/", "refused"),
            ("file://localhost/etc/passwd", "refused"),
            ("file://127.0.0.1/etc/passwd", "refused"),
            ("file://attacker.example/share/x", "refused"),
            ("file:/etc/passwd", "refused"),
            ("file:etc/passwd", "refused"),
            ("file:////host/share", "file"),
            ("file:///a?b", "refused"),
            ("//example.org/x", "file"),
            ("example.org/x", "invalid"),
            ("../../etc/passwd", "invalid"),
            ("C:\\clip.mp4", "invalid"),
            ("\\\\host\\share", "invalid"),
            ("", "invalid"),
        ];
        for (text, wanted) in table {
            assert_eq!(outcome(text), wanted, "{text:?}");
        }
        assert_eq!(outcome(&"A".repeat(200)), "base64");
        assert_eq!(outcome(&format!("/9j/{}", "A".repeat(200))), "base64");
        assert_eq!(
            outcome(&format!("http://x/{}", "a".repeat(9000))),
            "invalid"
        );
    }

    #[test]
    fn schemes_are_as_the_policy_says() {
        let policy = MediaPolicy {
            http: false,
            data: false,
            ..MediaPolicy::default()
        };
        assert!(parse("https://x/", &policy).is_ok());
        for text in ["http://x/", "data:,x"] {
            let error = parse(text, &policy).err().unwrap();
            assert_eq!(error.kind, MediaErrorKind::Refused, "{text}");
        }
        let error = parse("ftp://x/y", &policy).err().unwrap();
        assert_eq!(
            error.message,
            "ftp://x/y is of a kind that is not allowed here: use https: or media: (an upload)"
        );
    }

    #[test]
    fn errors_show_a_source_without_its_secrets() {
        let table = [
            ("http://me:secret@x/a.mp4?token=1#f", "http://x/a.mp4…"),
            ("http://a@b@x/", "http://x/"),
            ("data:image/png;base64,AAAA", "the data URI"),
            ("media:ab\n", "media:ab?"),
        ];
        for (text, wanted) in table {
            assert_eq!(shown(text), wanted, "{text:?}");
        }
        assert_eq!(shown(&"ü".repeat(99)).chars().count(), SHOWN + 1);
    }
}
