//! The processes that decode, as the system sees them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Served, about, content};

/// Where the system tells of each decoder of `server` that has set its limits.
fn decoders(server: u32) -> Vec<PathBuf> {
    let is_one = |process: &PathBuf| {
        let read = |name: &str| fs::read(process.join(name)).unwrap_or_default();
        let text = |name: &str| String::from_utf8_lossy(&read(name)).into_owned();
        text("status").contains(&format!("PPid:\t{server}\n"))
            && text("status").contains("NoNewPrivs:\t1")
            && text("cmdline").starts_with("lnv\0decode-media\0")
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.map(|entry| entry.path()).filter(is_one).collect()
}

fn wait_for<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let late = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < late, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn two_of(server: &Served) -> Vec<PathBuf> {
    let id = server.child.id();
    wait_for("two decoders do not wait", || {
        Some(decoders(id)).filter(|all| all.len() == 2)
    })
}

/// What a process has open.
fn links(process: &Path) -> Vec<String> {
    let files = fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    let links = files.filter_map(|file| fs::read_link(file.path()).ok());
    links
        .map(|link| link.to_string_lossy().into_owned())
        .collect()
}

#[test]
fn decoders_have_nothing_to_lose() {
    let server = Served::start(&["--api-key", "secret", "--decoder-memory-mib", "1000"]);
    let given = links(Path::new("/proc/self"));
    for decoder in two_of(&server) {
        let limits = fs::read_to_string(decoder.join("limits")).unwrap();
        let limit = |name: &str| {
            let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
            let soft = line[name.len()..].split_whitespace().next();
            soft.unwrap().parse::<u64>().unwrap()
        };
        assert_eq!(limit("Max address space"), 1000 << 20);
        assert_eq!(limit("Max core file size"), 0);
        assert_eq!(limit("Max file size"), 0);
        assert!(limit("Max open files") <= 32);
        assert!(limit("Max cpu time") < 10_000);
        // Only root may look further.
        let Ok(environment) = fs::read(decoder.join("environ")) else {
            continue;
        };
        // The rest of the server's environment is the server's.
        let environment = String::from_utf8(environment).unwrap();
        for variable in environment.split_terminator('\0') {
            let name = variable.split('=').next().unwrap();
            assert!(
                ["PATH", "LD_LIBRARY_PATH"].contains(&name) || name.starts_with("MALLOC_"),
                "{variable}"
            );
        }
        // Three pipes, and what the system tells of the process itself; and what we were given when started,
        // which every program passes on.
        for file in links(&decoder) {
            let known = file.starts_with("pipe:") || file.ends_with("/status");
            assert!(known || given.contains(&file), "{file}");
        }
    }
}

#[test]
fn decoders_that_are_killed_are_replaced_and_go_with_the_server() {
    let mut server = Served::start(&[]);
    // Where nobody asks how they ended, they stay in the list, dead.
    let is_gone = |decoder: &PathBuf| {
        let status = fs::read_to_string(decoder.join("status")).unwrap_or_default();
        status.is_empty() || status.contains("State:\tZ")
    };
    let first = two_of(&server);
    for decoder in &first {
        let id = decoder.file_name().unwrap();
        let killed = std::process::Command::new("kill")
            .arg("-KILL")
            .arg(id)
            .status();
        assert!(killed.unwrap().success());
    }
    wait_for("decoders outlive a signal", || {
        first.iter().all(is_gone).then_some(())
    });
    let answer = server.chat(&about("left.mp4", "Which way does it move?"));
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert!(!content(&answer, 0).is_empty());
    let second = two_of(&server);
    assert!(second.iter().all(|decoder| !first.contains(decoder)));
    wait_for("a place stays taken", || {
        (server.metric("lnv_media_decoding") == 0.0).then_some(())
    });
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    wait_for("decoders outlive their server", || {
        second.iter().all(is_gone).then_some(())
    });
}
