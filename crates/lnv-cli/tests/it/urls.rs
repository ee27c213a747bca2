//! Media behind addresses: what arrives is used, what does not is one sentence.

use crate::support::{Server, golden, respond, run};

const ASK: [&str; 7] = [
    "ask",
    "--model",
    "llama-default",
    "--max-new-tokens",
    "4",
    "What is this?",
    "--image",
];

fn ask(what: &str) -> crate::support::Said {
    run(&[&ASK[..], &[what]].concat())
}

fn server() -> Server {
    let png = std::fs::read(golden().join("media/rgb-64x64.png")).unwrap();
    Server::start(Box::new(move |path, _, stream| match path {
        "/ok.png" => respond(stream, "200 OK", &png, usize::MAX),
        "/moved.png" => respond(stream, "302 Found\r\nLocation: /ok.png", b"", 0),
        "/loop.png" => respond(stream, "302 Found\r\nLocation: /loop.png", b"", 0),
        "/short.png" => respond(stream, "200 OK", &png, png.len() / 2),
        "/text.png" => respond(stream, "200 OK", b"<html>", usize::MAX),
        "/empty.png" => respond(stream, "200 OK", b"", 0),
        "/denied.png" => respond(stream, "403 Forbidden", b"no", 2),
        "/broken.png" => respond(stream, "500 Oops", b"no", 2),
        "/file.png" => respond(stream, "302 Found\r\nLocation: file:///etc/passwd", b"", 0),
        _ => respond(stream, "404 Not Found", b"no", 2),
    }))
}

#[test]
fn what_a_server_sends_is_what_a_file_holds() {
    let server = server();
    let local = ask("media/rgb-64x64.png").answer();
    for path in ["ok.png", "moved.png"] {
        assert_eq!(ask(&format!("{}/{path}", server.url)).answer(), local);
    }
    let file = format!(
        "file://{}/media/rgb%2D64x64.png",
        golden().canonicalize().unwrap().display()
    );
    assert_eq!(ask(&file).answer(), local);
}

#[test]
fn addresses_that_fail_are_named_with_the_reason() {
    let server = server();
    let rows: [(&str, &[&str]); 8] = [
        ("none.png", &["404", "check the address"]),
        ("denied.png", &["403", "download"]),
        ("broken.png", &["500", "try again"]),
        ("loop.png", &["redirect"]),
        ("short.png", &["broke off", "try again"]),
        ("text.png", &["text.png", "not a PNG"]),
        ("empty.png", &["empty.png", "empty"]),
        ("file.png", &["file.png", "check the address"]),
    ];
    for (path, words) in rows {
        ask(&format!("{}/{path}", server.url)).refuses(1, words);
    }
    let elsewhere: [(&str, &[&str]); 8] = [
        (
            "http://127.0.0.1:1/a.png",
            &["connection refused", "check the address"],
        ),
        ("http://", &["no valid address"]),
        ("http://a b/", &["no valid address"]),
        ("ftp://127.0.0.1/a.png", &["neither an http nor an https"]),
        ("rtsp://127.0.0.1/a.png", &["neither an http nor an https"]),
        (
            "wobble://127.0.0.1/a.png",
            &["neither an http nor an https"],
        ),
        (
            "file:///nonexistent/a.png",
            &["cannot open /nonexistent/a.png"],
        ),
        ("data:image/png;base64,aGVsbG8=", &["not a PNG"]),
    ];
    for (url, words) in elsewhere {
        ask(url).refuses(1, words);
    }
}
