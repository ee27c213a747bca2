//! Media by link: what the server fetches for whoever names it, and what it does not.

use serde_json::{Value, json};

use crate::served::{Served, content, demo};
use crate::support::{Server, respond};

/// A server on loopback with a clip, a page and nothing else.
fn web() -> Server {
    Server::start(Box::new(|path, _, stream| {
        let (head, body) = match path {
            "/left.mp4" => ("200 OK", demo("left.mp4")),
            "/page.html" => ("200 OK", b"<html>no clip</html>".to_vec()),
            _ => ("404 Not Found", Vec::new()),
        };
        respond(stream, head, &body, body.len());
    }))
}

fn link(url: &str) -> Value {
    json!({"url": url})
}

#[test]
fn a_link_is_fetched_once_shown_and_asked_about() {
    let web = web();
    let server = Served::start(&["--allow-private-addresses"]);
    let url = format!("{}/left.mp4", web.url);
    let shown = server.post("/v1/media?num_frames=4", &link(&url));
    assert_eq!(shown.status, 200, "{}", shown.text);
    let shown = shown.json();
    assert_eq!(shown["kind"], "video");
    assert_eq!(shown["frames"].as_array().unwrap().len(), 4);
    let id = shown["id"].as_str().unwrap();
    let sent = server.send("/v1/media", "video/mp4", &demo("left.mp4"));
    assert_eq!(sent.json()["id"], id, "the name is that of the bytes");
    let body = json!({"messages": [{"role": "user", "content": [
        {"type": "video_url", "video_url": {"url": id}},
        {"type": "text", "text": "Which way does it move?"},
    ]}]});
    assert_eq!(content(&server.chat(&body), 0), "left");
    assert_eq!(web.seen.lock().unwrap().len(), 1);
}

#[test]
fn links_that_lead_nowhere_or_inside_are_refused_in_words() {
    let web = web();
    let server = Served::start(&["--allow-private-addresses"]);
    let kept = server.metric("lnv_upload_bytes");
    for (path, word) in [("/none.mp4", "404"), ("/page.html", "not a video file")] {
        let answer = server.post("/v1/media", &link(&format!("{}{path}", web.url)));
        let message = answer.refuses(400, Some("url"));
        assert!(message.contains(word), "{message}");
    }
    assert_eq!(server.metric("lnv_upload_bytes"), kept);
    for body in [
        json!({}),
        link(""),
        link("circle.png"),
        link("/etc/passwd"),
        link("file:///etc/passwd"),
        link("ftp://127.0.0.1/a.mp4"),
        link("data:image/png;base64,AAAA"),
        link(&format!("media:{}", "0".repeat(64))),
        json!({"url": 4}),
    ] {
        server.post("/v1/media", &body).refuses(400, Some("url"));
    }
    let long = link(&format!("http://127.0.0.1/{}", "a".repeat(70_000)));
    server.post("/v1/media", &long).refuses(413, None);
    let small = Served::start(&["--upload-cache-mib", "0", "--allow-private-addresses"]);
    let answer = small.post("/v1/media", &link(&format!("{}/left.mp4", web.url)));
    answer.refuses(400, Some("url"));

    let strict = Served::start(&[]);
    let before = web.seen.lock().unwrap().len();
    let answer = strict.post("/v1/media", &link(&format!("{}/left.mp4", web.url)));
    let message = answer.refuses(400, Some("url"));
    assert!(message.contains("may not be fetched from"), "{message}");
    assert_eq!(web.seen.lock().unwrap().len(), before);
}
