//! A hub id: downloaded, resumed, taken from the cache; against a hub on loopback.

use std::collections::HashMap;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{Folder, Said, Server, checkpoint_files, lnv, respond, run};

const ID: &str = "someone/tiny-video";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one repository; it breaks off the weights once in their middle.
fn hub() -> Server {
    let mut files: HashMap<String, Vec<u8>> =
        checkpoint_files("llama-default").into_iter().collect();
    files.insert("README.md".into(), b"not wanted".to_vec());
    let whole = AtomicBool::new(false);
    Server::start(Box::new(move |path, range, stream| {
        if path.starts_with(&format!("/api/models/{ID}")) {
            return list(&files, stream);
        }
        let name = path.strip_prefix(&format!("/{ID}/resolve/main/"));
        let Some(body) = name.and_then(|name| files.get(name)) else {
            return respond(stream, "404 Not Found", b"", 0);
        };
        let range = range.and_then(|range| range.strip_prefix("bytes="));
        let (start, end) = range
            .and_then(|range| range.split_once('-'))
            .unwrap_or(("0", ""));
        let start: usize = start.parse().unwrap();
        let end = end
            .parse()
            .map_or(body.len(), |end: usize| (end + 1).min(body.len()));
        let breaks = path.ends_with("model.safetensors")
            && end == body.len()
            && !whole.swap(true, Ordering::SeqCst);
        let (part, total) = (&body[start..end], body.len());
        let head = format!(
            "206 Partial Content\r\nx-repo-commit: {COMMIT}\r\netag: \"{}\"\r\n\
             Content-Range: bytes {start}-{}/{total}",
            name.unwrap_or_default(),
            end.saturating_sub(1)
        );
        let sent = if breaks { part.len() / 2 } else { part.len() };
        respond(stream, &head, part, sent);
    }))
}

fn list(files: &HashMap<String, Vec<u8>>, stream: &mut TcpStream) {
    let names: Vec<_> = files
        .keys()
        .map(|name| serde_json::json!({"rfilename": name}))
        .collect();
    let body = serde_json::json!({"sha": COMMIT, "siblings": names}).to_string();
    respond(
        stream,
        "200 OK\r\nContent-Type: application/json",
        body.as_bytes(),
        usize::MAX,
    );
}

fn ask(endpoint: &str, home: &Folder) -> Said {
    let words = ["ask", "--model", ID, "--max-new-tokens", "4", "hello"];
    let mut command = lnv();
    command.args(words).env("HF_ENDPOINT", endpoint);
    command
        .env("HF_HOME", home.0.path())
        .output()
        .unwrap()
        .into()
}

#[test]
fn a_checkpoint_downloads_resumes_and_is_kept() {
    let (hub, home) = (hub(), Folder::new());
    let local = run(&[
        "ask",
        "--model",
        "llama-default",
        "--max-new-tokens",
        "4",
        "hello",
    ])
    .answer();
    assert_eq!(ask(&hub.url, &home).answer(), local);

    let seen = hub.seen.lock().unwrap().clone();
    let weights: Vec<&String> = seen
        .iter()
        .filter(|line| line.contains("model.safetensors") && !line.ends_with("bytes=0-0"))
        .collect();
    let [first, second] = weights[..] else {
        panic!("the weights were asked for other than twice: {seen:?}");
    };
    assert!(first.ends_with("bytes=0-"), "{first}");
    assert!(!second.ends_with("bytes=0-"), "it began anew: {second}");
    assert!(!seen.iter().any(|line| line.contains("README")), "{seen:?}");

    // Again: nothing but the listing is asked for. And with no hub at all.
    assert_eq!(ask(&hub.url, &home).answer(), local);
    let again = hub.seen.lock().unwrap().split_off(seen.len());
    assert!(
        again.iter().all(|line| line.starts_with("/api/")),
        "{again:?}"
    );
    let offline = ask("http://127.0.0.1:1", &home);
    assert!(offline.err.contains("already here"), "{}", offline.err);
    assert_eq!(offline.answer(), local);
}

#[test]
fn without_a_hub_the_directory_form_is_named() {
    let home = Folder::new();
    ask("http://127.0.0.1:1", &home).refuses(1, &[ID, "--model DIR"]);
    ask("no address", &home).refuses(1, &[ID, "--model DIR"]);
    let offline = lnv()
        .args(["inspect", "--model", ID])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    Said::from(offline).refuses(1, &["HF_HUB_OFFLINE", "--model DIR"]);
}

#[test]
fn a_repository_without_a_checkpoint_is_refused() {
    let hub = hub();
    let home = Folder::new();
    let words = ["inspect", "--model", "someone/else"];
    let said = lnv()
        .args(words)
        .env("HF_ENDPOINT", &hub.url)
        .env("HF_HOME", home.0.path())
        .output()
        .unwrap();
    Said::from(said).refuses(1, &["someone/else", "404", "--model DIR"]);
}
