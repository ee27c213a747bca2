//! Addresses to files.
//!
//! Decision: `ureq` with a resolver of ours. Every connection, also the one after a redirect, goes to an address that
//! the resolver handed out, and it hands out none that was not checked; there is no second look-up between the check and the
//! connection for a name server to lie to. One bad address among several refuses the name. Proxies from the
//! environment are off, connections are not kept, redirects are followed here, each checked like the first. The time is
//! one limit for all of it, so that a server that trickles gains nothing.
//!
//! A chat names its clip again with every turn. What was fetched is therefore kept under a budget, and asked for with
//! the tag or the date that its server gave it: if that says that it is unchanged (304), it is not sent again. Nothing is
//! used without asking, so whoever may not fetch it (any more) does not get it, and a changed file is seen at once.

use std::fmt;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use ureq::http::{HeaderMap, HeaderName, HeaderValue, Uri, header};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Connector, NextTimeout, RustlsConnector, TcpConnector};
use url::Url;

use super::blob::{Blob, BlobWriter};
use super::cache::Budgeted;
use super::gate::Gate;
use super::source::check_web;
use super::{MediaError, MediaErrorKind, MediaPolicy, address, held};

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 5;

/// How long a look-up, and how long a connection may take.
const RESOLVE: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(10);

/// Look-ups at once. One that hangs cannot be stopped; it keeps its place.
const MAX_LOOKUPS: usize = 32;

/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 16;

type Lookup = dyn Fn(&str, u16) -> std::io::Result<Vec<SocketAddr>> + Send + Sync;
type Judge = dyn Fn(SocketAddr) -> bool + Send + Sync;

/// Names to addresses that may be connected to.
#[derive(Clone)]
pub(super) struct Guard {
    lookup: Arc<Lookup>,
    judge: Arc<Judge>,
    lookups: Arc<Gate>,
}

/// An address that is not connected to.
#[derive(Debug, thiserror::Error)]
#[error("an address that is not allowed")]
struct NotAllowed;

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

impl Guard {
    /// The system's look-up; private addresses where `allow_private`.
    pub(super) fn new(allow_private: bool) -> Self {
        Self::with(
            |host, port| Ok((host, port).to_socket_addrs()?.collect()),
            move |address| address::allowed(address, allow_private),
        )
    }

    /// Another look-up and another judgement, for tests.
    pub(super) fn with(
        lookup: impl Fn(&str, u16) -> std::io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
        judge: impl Fn(SocketAddr) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self {
            lookup: Arc::new(lookup),
            judge: Arc::new(judge),
            lookups: Gate::new(MAX_LOOKUPS),
        }
    }

    /// The addresses of `host`, unchecked.
    fn addresses(
        &self,
        host: &str,
        port: u16,
        limit: Duration,
    ) -> Result<Vec<SocketAddr>, ureq::Error> {
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        if let Ok(ip) = bare.unwrap_or(host).parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        let late = || ureq::Error::Timeout(ureq::Timeout::Resolve);
        let deadline = Instant::now() + limit;
        let place = self.lookups.enter(deadline).ok_or_else(late)?;
        let (sender, receiver) = mpsc::sync_channel(1);
        let (lookup, host) = (Arc::clone(&self.lookup), host.to_owned());
        std::thread::Builder::new()
            .name("lookup".into())
            .spawn(move || {
                let found = lookup(&host, port);
                drop(place);
                // Nobody may be waiting any more.
                let _ = sender.send(found);
            })
            .map_err(ureq::Error::Io)?;
        let left = deadline.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(left) {
            Ok(found) => found.map_err(|_| ureq::Error::HostNotFound),
            Err(_) => Err(late()),
        }
    }
}

impl Resolver for Guard {
    fn resolve(
        &self,
        uri: &Uri,
        _: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().ok_or(ureq::Error::HostNotFound)?;
        let usual = if uri.scheme_str() == Some("https") {
            443
        } else {
            80
        };
        let port = uri.port_u16().unwrap_or(usual);
        let found = self.addresses(host, port, RESOLVE.min(*timeout.after))?;
        if !found.iter().all(|address| (self.judge)(*address)) {
            return Err(ureq::Error::Other(Box::new(NotAllowed)));
        }
        let mut out = self.empty();
        for address in found.into_iter().take(MAX_ADDRESSES) {
            out.push(address);
        }
        match out.is_empty() {
            true => Err(ureq::Error::HostNotFound),
            false => Ok(out),
        }
    }
}

/// What came from an address, and how to ask whether it is still the same.
#[derive(Clone)]
struct Kept {
    blob: Arc<Blob>,
    validators: Vec<(HeaderName, HeaderValue)>,
}

/// Bytes of a tag that are sent back.
const MAX_TAG: usize = 1024;

/// The conditions under which a file with this head need not be sent again; none where it is not to be kept.
fn validators(head: &HeaderMap) -> Vec<(HeaderName, HeaderValue)> {
    let control = head.get_all(header::CACHE_CONTROL).iter();
    let is_secret = |value: &HeaderValue| {
        let text = value.to_str().unwrap_or("no-store");
        let mut words = text.split(',').map(str::trim);
        words.any(|word| word.eq_ignore_ascii_case("no-store"))
    };
    if { control }.any(is_secret) {
        return Vec::new();
    }
    let conditions = [
        (header::ETAG, header::IF_NONE_MATCH),
        (header::LAST_MODIFIED, header::IF_MODIFIED_SINCE),
    ];
    let of = |(from, to)| {
        Some((
            to,
            head.get(from).filter(|tag| tag.len() <= MAX_TAG)?.clone(),
        ))
    };
    conditions.into_iter().filter_map(of).collect()
}

/// The client.
pub(super) struct Fetcher {
    agent: ureq::Agent,
    gate: Arc<Gate>,
    /// By address, redirects followed.
    kept: Mutex<Budgeted<String, Kept>>,
    policy: MediaPolicy,
}

impl Fetcher {
    /// A client that connects where `guard` allows.
    pub(super) fn new(policy: &MediaPolicy, guard: Guard) -> Self {
        let config = ureq::config::Config::builder()
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .max_idle_connections(0)
            .timeout_connect(Some(CONNECT))
            .accept("*/*")
            .accept_encoding("identity")
            .user_agent(concat!("lnv/", env!("CARGO_PKG_VERSION")))
            .build();
        let connector = ().chain(TcpConnector::default()).chain(RustlsConnector::default());
        Self {
            agent: ureq::Agent::with_parts(config, connector, guard),
            gate: Gate::new(policy.max_parallel_fetches),
            kept: Mutex::new(Budgeted::new(policy.fetched_bytes)),
            policy: policy.clone(),
        }
    }

    /// Fetches that run now.
    pub(super) fn running(&self) -> usize {
        self.gate.taken()
    }

    /// Bytes of files that are kept.
    pub(super) fn kept_bytes(&self) -> u64 {
        held(&self.kept).bytes()
    }

    /// Fetches `url`, which errors call `name`, to `out`, unless what is kept is still the same.
    pub(super) fn fetch(
        &self,
        name: &str,
        url: Url,
        out: BlobWriter,
    ) -> Result<Arc<Blob>, MediaError> {
        let wait = Instant::now() + self.policy.wait_timeout;
        let place = self.gate.enter(wait).ok_or_else(|| {
            let message =
                format!("too many sources are being fetched to begin with {name}: try again later");
            MediaError::new(MediaErrorKind::Busy, message)
        })?;
        let deadline = Instant::now() + self.policy.fetch_timeout;
        let blob = self.follow(name, url, out, deadline);
        drop(place);
        blob
    }

    fn follow(
        &self,
        name: &str,
        mut url: Url,
        out: BlobWriter,
        deadline: Instant,
    ) -> Result<Arc<Blob>, MediaError> {
        for _ in 0..=MAX_REDIRECTS {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(too_slow(name));
            }
            // A fragment is not sent.
            url.set_fragment(None);
            let kept = held(&self.kept).get(&url.to_string());
            let mut request = self.agent.get(url.as_str());
            for (condition, tag) in kept.iter().flat_map(|kept| &kept.validators) {
                request = request.header(condition, tag);
            }
            let request = request.config().timeout_global(Some(left)).build();
            let response = request.call().map_err(|cause| failed(name, &cause))?;
            let status = response.status().as_u16();
            match (status, kept) {
                (200, _) => return self.receive(name, &url, response, out, deadline),
                (304, Some(kept)) => return Ok(kept.blob),
                (300..=399, _) if status != 304 => {}
                _ => {
                    return Err(unreachable(format!(
                        "the server of {name} answers with status {status}: check the address"
                    )));
                }
            }
            url = self.next(name, &url, &response)?;
        }
        Err(unreachable(format!(
            "{name} is redirected more than {MAX_REDIRECTS} times: check the address"
        )))
    }

    fn receive(
        &self,
        name: &str,
        url: &Url,
        response: ureq::http::Response<ureq::Body>,
        out: BlobWriter,
        deadline: Instant,
    ) -> Result<Arc<Blob>, MediaError> {
        let key = url.to_string();
        let validators = validators(response.headers());
        let received = receive(name, response, out, deadline).map(Arc::new);
        let mut kept = held(&self.kept);
        match &received {
            Ok(blob) if !validators.is_empty() => {
                let blob = Arc::clone(blob);
                let bytes = blob.bytes;
                kept.insert(key, Kept { blob, validators }, bytes);
            }
            _ => kept.remove(&key),
        }
        received
    }

    /// Where a redirect leads. It is not shown: it may tell of another's network.
    fn next(
        &self,
        name: &str,
        from: &Url,
        response: &ureq::http::Response<ureq::Body>,
    ) -> Result<Url, MediaError> {
        let to = response.headers().get(header::LOCATION);
        let url = to
            .and_then(|to| to.to_str().ok())
            .filter(|to| to.len() <= 8192)
            .and_then(|to| from.join(to).ok())
            .ok_or_else(|| {
                unreachable(format!(
                    "the server of {name} redirects to no valid address"
                ))
            })?;
        check_web(&url, name, &self.policy)?;
        Ok(url)
    }
}

fn unreachable(message: String) -> MediaError {
    MediaError::new(MediaErrorKind::Unreachable, message)
}

fn too_slow(name: &str) -> MediaError {
    let message = format!("fetching {name} takes too long: use a faster server or upload the file");
    MediaError::new(MediaErrorKind::Timeout, message)
}

fn receive(
    name: &str,
    mut response: ureq::http::Response<ureq::Body>,
    mut out: BlobWriter,
    deadline: Instant,
) -> Result<Blob, MediaError> {
    let length = response.body().content_length();
    if length.is_some_and(|length| length > out.most()) {
        return Err(out.too_large());
    }
    let limit = out.most().saturating_add(1);
    let mut reader = response.body_mut().with_config().limit(limit).reader();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = match reader.read(&mut buffer) {
            Ok(n) => n,
            Err(cause) => return Err(broke_off(name, &out, cause)),
        };
        if n == 0 {
            break;
        }
        if Instant::now() >= deadline {
            return Err(too_slow(name));
        }
        out.write(&buffer[..n])?;
    }
    if length.is_some_and(|length| out.bytes() < length) {
        return Err(unreachable(format!(
            "{name} broke off before its end: try again"
        )));
    }
    out.finish()
}

fn broke_off(name: &str, out: &BlobWriter, cause: std::io::Error) -> MediaError {
    match ureq::Error::from(cause) {
        ureq::Error::Timeout(_) => too_slow(name),
        ureq::Error::BodyExceedsLimit(_) => out.too_large(),
        _ => unreachable(format!("{name} broke off before its end: try again")),
    }
}

/// What went wrong with a request, in words that tell nothing of what lies behind a name.
fn failed(name: &str, cause: &ureq::Error) -> MediaError {
    use ureq::Error as E;
    match cause {
        E::Other(other) if other.is::<NotAllowed>() => MediaError::new(
            MediaErrorKind::Refused,
            format!(
                "{name} is at an address that may not be fetched from, or leads to one: use a public address"
            ),
        ),
        E::Timeout(_) => too_slow(name),
        E::HostNotFound => unreachable(format!(
            "there is no server of the name in {name}: check the address"
        )),
        E::Http(_) | E::BadUri(_) => MediaError::new(
            MediaErrorKind::Invalid,
            format!("{name} is not a valid address, or leads to none"),
        ),
        E::Tls(_) | E::Rustls(_) => unreachable(format!(
            "the server of {name} offers no connection that can be trusted: check its certificate"
        )),
        E::Protocol(_) | E::LargeResponseHeader(..) => unreachable(format!(
            "the server of {name} does not answer as a web server does"
        )),
        _ => unreachable(format!(
            "the server of {name} cannot be reached: check the address"
        )),
    }
}
