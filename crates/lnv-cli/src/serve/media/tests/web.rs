//! Fetching: what is connected to, and servers that mean no good.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::thread;

use super::super::{address, fetch};
use super::*;

fn load(
    servers: &[&Server],
    names: &[(&str, &[&str])],
    source: &MediaSource,
) -> Result<Medium, MediaError> {
    load_with(quick(), servers, names, source)
}

fn load_with(
    policy: MediaPolicy,
    servers: &[&Server],
    names: &[(&str, &[&str])],
    source: &MediaSource,
) -> Result<Medium, MediaError> {
    let store = MediaStore::with_guard(policy, guard(servers, names)).unwrap();
    let begun = Instant::now();
    let result = store.load(source);
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "took {:?}",
        begun.elapsed()
    );
    assert_eq!(files(&store), 0, "a file was left");
    assert_eq!(store.stats().fetching, 0);
    wait_for("a place stays taken", || store.stats().decoding == 0);
    result
}

#[test]
fn types_and_names_that_a_server_claims_are_not_believed() {
    let (clip, picture) = (testdata("media/h264.mp4"), testdata("demo/circle.png"));
    let server = Server::start(move |path, stream| match path {
        "/film.png" => send(stream, "200 OK", "Content-Type: image/png\r\n", &clip),
        "/film.m3u8" => send(
            stream,
            "200 OK",
            "Content-Type: application/vnd.apple.mpegurl\r\n",
            &clip,
        ),
        _ => send(stream, "200 OK", "Content-Type: text/html\r\n", &picture),
    });
    assert!(load(&[&server], &[], &video(&server.url("/film.png"))).is_ok());
    assert!(load(&[&server], &[], &video(&server.url("/film.m3u8"))).is_ok());
    assert!(load(&[&server], &[], &image(&server.url("/page.html"))).is_ok());
    let error = load(&[&server], &[], &image(&server.url("/film.png"))).unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Invalid);
    assert!(error.message.contains(&server.url("/film.png")), "{error}");
}

#[test]
fn inner_addresses_are_refused_alike_whether_something_listens_or_not() {
    let inner = Server::start(|_, stream| send(stream, "200 OK", "", b"secret"));
    let port = inner.address.port();
    // Bound, so that nobody else takes it, and closed as far as anyone can tell.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let names: &[(&str, &[&str])] = &[
        ("localhost", &["127.0.0.1", "::1"]),
        ("inside.test", &["10.1.2.3"]),
        ("mixed.test", &["93.184.216.34", "127.0.0.1"]),
        ("mapped.test", &["::ffff:127.0.0.1"]),
        ("linklocal.test", &["169.254.169.254"]),
        ("six.test", &["fd00::1"]),
        ("zero.test", &["0.0.0.0"]),
        ("nat64.test", &["64:ff9b::7f00:1"]),
    ];
    let mut reasons = std::collections::BTreeSet::new();
    for host in [
        "127.0.0.1",
        "127.1.2.3",
        "[::1]",
        "0.0.0.0",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[2002:7f00:1::]",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "[fd00::1]",
        "[fe80::1]",
        "224.0.0.1",
        "255.255.255.255",
        "localhost",
        "LOCALHOST",
        "inside.test",
        "mixed.test",
        "mapped.test",
        "linklocal.test",
        "six.test",
        "zero.test",
        "nat64.test",
    ] {
        for port in [port, closed.local_addr().unwrap().port()] {
            let url = format!("http://{host}:{port}/x");
            let error = load(&[], names, &image(&url)).unwrap_err();
            assert_eq!(error.kind, MediaErrorKind::Refused, "{url}: {error}");
            reasons.insert(error.message.replace(&url, "URL"));
        }
    }
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert_eq!(inner.hits(), 0);
}

#[test]
fn private_addresses_by_option() {
    let picture = testdata("demo/circle.png");
    let server = Server::start(move |_, stream| send(stream, "200 OK", "", &picture));
    let policy = MediaPolicy {
        allow_private: true,
        ..quick()
    };
    let store = MediaStore::new(policy).unwrap();
    assert!(store.load(&image(&server.url("/"))).is_ok());
    let local = format!("http://localhost:{}/", server.address.port());
    assert!(store.load(&image(&local)).is_ok());
    let error = store
        .load(&image("http://169.254.169.254/latest/meta-data/"))
        .unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Refused);
}

#[test]
fn redirects_lead_no_further_than_a_first_address_would() {
    let inner = Server::start(|_, stream| send(stream, "200 OK", "", b"secret"));
    let port = inner.address.port();
    let picture = testdata("demo/circle.png");
    let outer = Server::start(move |path, stream| {
        let location = |to: &str| format!("Location: {to}\r\n");
        let to = match path {
            "/picture" => return send(stream, "200 OK", "", &picture),
            "/relative" => "picture".into(),
            "/fragment" => "/picture#x".into(),
            "/twice" => "/relative".into(),
            "/loop" => "/loop".into(),
            "/none" => return send(stream, "302 Found", "", b""),
            "/junk" => "http://[".into(),
            // The rest is the place itself, in which P stands for the inner port.
            other => other[1..].replace("PORT", &port.to_string()),
        };
        send(stream, "302 Found", &location(&to), b"ignored");
    });
    let names: &[(&str, &[&str])] = &[
        ("inside.test", &["127.0.0.1"]),
        ("localhost", &["127.0.0.1"]),
    ];
    for path in ["/relative", "/fragment", "/twice"] {
        assert!(
            load(&[&outer], names, &image(&outer.url(path))).is_ok(),
            "{path}"
        );
    }
    for path in ["/loop", "/none", "/junk"] {
        let error = load(&[&outer], names, &image(&outer.url(path))).unwrap_err();
        assert_eq!(error.kind, MediaErrorKind::Unreachable, "{path}: {error}");
    }
    for to in [
        "http://127.0.0.1:PORT/",
        "//127.0.0.1:PORT/",
        "http://[::1]:PORT/",
        "http://[::ffff:127.0.0.1]:PORT/",
        "http://2130706433:PORT/",
        "http://0x7f.1:PORT/",
        "http://localhost:PORT/",
        "http://inside.test:PORT/",
        "https://127.0.0.1:PORT/",
        "http://169.254.169.254/latest/meta-data/",
        "http://user:secret@127.0.0.1:PORT/",
        "http://127.0.0.1:22/",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "ftp://127.0.0.1:PORT/",
        "gopher://127.0.0.1:PORT/_x",
        "data:image/png;base64,AAAA",
    ] {
        let url = outer.url(&format!("/{to}"));
        let error = load(&[&outer], names, &image(&url)).unwrap_err();
        assert_eq!(error.kind, MediaErrorKind::Refused, "{to}: {error}");
    }
    assert_eq!(inner.hits(), 0);
}

#[test]
fn a_redirect_is_not_told_to_the_client() {
    let outer = Server::start(|_, stream| {
        send(
            stream,
            "302 Found",
            "Location: http://vault.internal:8080/secret\r\n",
            b"",
        );
    });
    let names: &[(&str, &[&str])] = &[("vault.internal", &["10.9.8.7"])];
    let error = load(&[&outer], names, &image(&outer.url("/x"))).unwrap_err();
    assert_eq!(
        error.message,
        format!(
            "{} is at an address that may not be fetched from, or leads to one: use a public address",
            outer.url("/x")
        )
    );
}

#[test]
fn a_name_is_looked_up_once_and_the_connection_goes_there() {
    let picture = testdata("demo/circle.png");
    let outer = Server::start(move |_, stream| send(stream, "200 OK", "", &picture));
    let inner = Server::start(|_, stream| send(stream, "200 OK", "", b"secret"));
    let (public, private) = (outer.address, inner.address);
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    // Public for the check and private for the connection, if there were a second look-up.
    let guard = fetch::Guard::with(
        move |_, _| match count.fetch_add(1, Ordering::SeqCst) % 2 {
            0 => Ok(vec![public]),
            _ => Ok(vec![private]),
        },
        move |at| at == public || address::allowed(at, false),
    );
    let store = MediaStore::with_guard(quick(), guard).unwrap();
    assert!(store.load(&image("http://rebinding.test/a.png")).is_ok());
    assert_eq!((asked.load(Ordering::SeqCst), outer.hits()), (1, 1));
    let error = store
        .load(&image("http://rebinding.test/a.png"))
        .unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Refused);
    assert_eq!((asked.load(Ordering::SeqCst), inner.hits()), (2, 0));
}

#[test]
fn names_that_are_not_there_and_name_servers_that_hang() {
    let error = load(&[], &[("empty.test", &[])], &image("http://nowhere.test/")).unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Unreachable);
    let error = load(&[], &[("empty.test", &[])], &image("http://empty.test/")).unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Unreachable);
    let hangs = fetch::Guard::with(
        |_, _| {
            thread::sleep(Duration::from_secs(30));
            Ok(Vec::new())
        },
        |_| true,
    );
    let policy = MediaPolicy {
        fetch_timeout: Duration::from_millis(200),
        ..quick()
    };
    let store = MediaStore::with_guard(policy, hangs).unwrap();
    let begun = Instant::now();
    let error = store.load(&image("http://hangs.test/")).unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Timeout, "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

/// Sends `piece` again and again, with pauses, as long as anyone reads.
fn trickle(stream: &mut TcpStream, piece: &[u8], pause: u64) {
    while stream.write_all(piece).is_ok() {
        thread::sleep(Duration::from_millis(pause));
    }
}

#[test]
fn slow_servers_are_left() {
    let server = Server::start(|path, stream| match path {
        "/silent" => thread::sleep(Duration::from_secs(30)),
        "/head" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nX-Slow: ");
            trickle(stream, b"a", 20);
        }
        "/heads" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
            trickle(stream, b"X-Slow: a\r\n", 20);
        }
        "/body" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n");
            trickle(stream, b"a", 20);
        }
        "/chunks" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
            trickle(stream, b"1\r\na\r\n", 20);
        }
        "/stops" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nabc");
            thread::sleep(Duration::from_secs(30));
        }
        // Each step is quick; all of them together are not.
        _ => {
            thread::sleep(Duration::from_millis(150));
            send(stream, "302 Found", "Location: /redirects\r\n", b"");
        }
    });
    for path in [
        "/silent",
        "/head",
        "/heads",
        "/body",
        "/chunks",
        "/stops",
        "/redirects",
    ] {
        let policy = MediaPolicy {
            fetch_timeout: Duration::from_millis(400),
            ..quick()
        };
        let begun = Instant::now();
        let error = load_with(policy, &[&server], &[], &image(&server.url(path))).unwrap_err();
        assert_eq!(error.kind, MediaErrorKind::Timeout, "{path}: {error}");
        assert!(
            begun.elapsed() < Duration::from_secs(3),
            "{path}: {:?}",
            begun.elapsed()
        );
    }
}

#[test]
fn endless_and_false_lengths() {
    let picture = testdata("demo/circle.png");
    let whole = picture.clone();
    let server = Server::start(move |path, stream| match path {
        "/endless" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            trickle(stream, &[0; 1 << 16], 0);
        }
        "/chunks" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
            let chunk = [b"10000\r\n".as_slice(), &[0; 1 << 16], b"\r\n"].concat();
            trickle(stream, &chunk, 0);
        }
        "/claims" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\nabc");
        }
        "/longer" => {
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
                picture.len() + 1
            );
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&picture);
        }
        "/negative" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc");
        }
        "/headers" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
            trickle(
                stream,
                &[b"X-Long: ".as_slice(), &[b'a'; 1000], b"\r\n"].concat(),
                0,
            );
        }
        "/junk" => {
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.9\r\n");
        }
        "/empty" => send(stream, "200 OK", "", b""),
        "/part" => send(stream, "206 Partial Content", "", &picture),
        "/nothing" => {
            let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n");
        }
        "/gone" => send(stream, "404 Not Found", "", b"secret"),
        _ => send(stream, "200 OK", "", &whole),
    });
    use MediaErrorKind as K;
    for (path, kind) in [
        ("/endless", K::TooLarge),
        ("/chunks", K::TooLarge),
        ("/claims", K::TooLarge),
        ("/longer", K::Unreachable),
        ("/negative", K::Unreachable),
        ("/headers", K::Unreachable),
        ("/junk", K::Unreachable),
        ("/empty", K::Invalid),
        ("/part", K::Unreachable),
        ("/nothing", K::Unreachable),
        ("/gone", K::Unreachable),
    ] {
        let error = load(&[&server], &[], &image(&server.url(path))).unwrap_err();
        assert_eq!(error.kind, kind, "{path}: {error}");
        assert!(!error.message.contains("secret"), "{error}");
    }
    assert!(load(&[&server], &[], &image(&server.url("/whole"))).is_ok());
}

#[test]
fn a_server_that_is_not_there() {
    let gone = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let guard = fetch::Guard::with(|_, _| Ok(Vec::new()), move |at: SocketAddr| at == gone);
    let store = MediaStore::with_guard(quick(), guard).unwrap();
    let error = store.load(&image(&format!("http://{gone}/"))).unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Unreachable, "{error}");
    // Nothing there speaks TLS.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        send(&mut stream, "400 Bad Request", "", b"not TLS");
    });
    let guard = fetch::Guard::with(|_, _| Ok(Vec::new()), move |to: SocketAddr| to == at);
    let store = MediaStore::with_guard(quick(), guard).unwrap();
    let error = store.load(&image(&format!("https://{at}/"))).unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Unreachable, "{error}");
}

#[test]
fn what_a_server_calls_unchanged_is_not_sent_again() {
    let (left, right) = (testdata("demo/left.mp4"), testdata("demo/up.mp4"));
    let state = Arc::new(AtomicUsize::new(0));
    let (now, sent) = (Arc::clone(&state), Arc::new(AtomicUsize::new(0)));
    let bodies = Arc::clone(&sent);
    let server = Server::hearing(move |head, stream| {
        let path = head.split(' ').nth(1).unwrap();
        let head = head.to_ascii_lowercase();
        let date = "Wed, 01 Jan 2025 00:00:00 GMT";
        let (tag, same) = match (path, now.load(Ordering::SeqCst)) {
            ("/go", _) => return send(stream, "302 Found", "Location: /tag\r\n", b""),
            ("/tag", 0) => ("ETag: \"a\"".to_owned(), "if-none-match: \"a\"".to_owned()),
            ("/tag", 1) => ("ETag: \"b\"".to_owned(), "if-none-match: \"b\"".to_owned()),
            ("/tag", _) => return send(stream, "410 Gone", "", b""),
            ("/date", _) => (
                format!("Last-Modified: {date}"),
                format!("if-modified-since: {date}").to_ascii_lowercase(),
            ),
            ("/secret", _) => {
                let tag = "ETag: \"s\"\r\nCache-Control: private, No-Store".to_owned();
                (tag, "if-none-match".to_owned())
            }
            ("/liar", _) => ("X: y".to_owned(), "get /liar".to_owned()),
            _ => ("X: y".to_owned(), "nothing".to_owned()),
        };
        if head.contains(&same) {
            return send(stream, "304 Not Modified", "", b"");
        }
        bodies.fetch_add(1, Ordering::SeqCst);
        let body = [&left, &right][now.load(Ordering::SeqCst)];
        send(stream, "200 OK", &format!("{tag}\r\n"), body);
    });
    let policy = MediaPolicy {
        fetched_bytes: 100 << 10,
        ..quick()
    };
    let store = MediaStore::with_guard(policy, guard(&[&server], &[])).unwrap();
    let get = |path: &str| {
        let before = sent.load(Ordering::SeqCst);
        let digest = match store.fetch(&video(&server.url(path)))?.content {
            Content::File(blob) => blob.digest,
            Content::Frames(_) => panic!("no file"),
        };
        Ok::<_, MediaError>((digest, sent.load(Ordering::SeqCst) - before))
    };
    let (first, _) = get("/tag").unwrap();
    for path in ["/tag", "/tag", "/go"] {
        assert_eq!(get(path), Ok((first, 0)), "{path}");
    }
    assert_eq!(get("/date"), Ok((first, 1)));
    assert_eq!(get("/date"), Ok((first, 0)));
    assert_eq!(files(&store), 2);
    // Without a tag, and what is not to be kept, is sent each time.
    for path in ["/none", "/none", "/secret", "/secret"] {
        assert_eq!(get(path), Ok((first, 1)), "{path}");
    }
    assert_eq!(files(&store), 2);
    let error = get("/liar").unwrap_err();
    assert!(error.message.contains("status 304"), "{error}");
    // What has changed is seen, and what is gone is gone.
    state.store(1, Ordering::SeqCst);
    let (second, bodies) = get("/tag").unwrap();
    assert_ne!((second, bodies), (first, 0));
    assert_eq!(get("/go"), Ok((second, 0)));
    state.store(2, Ordering::SeqCst);
    assert_eq!(get("/tag").unwrap_err().kind, MediaErrorKind::Unreachable);
    assert!(store.stats().fetched_bytes <= 100 << 10);
    assert!(store.load(&video(&server.url("/date"))).is_ok());
}
