//! A conversation through a pipe.

use crate::support::{run, run_with_input};

const CHAT: [&str; 5] = ["chat", "--model", "llama-default", "--max-new-tokens", "6"];

#[test]
fn a_chat_attaches_answers_remembers_and_forgets() {
    let lines = b"/image /nonexistent.png\n/image media/rgb-64x64.png\nWhat is this?\n/history\n\
                  /clear\n/history\n/image\n/wobble\nHello\n/quit\nnever asked\n";
    let said = run_with_input(&CHAT, lines);
    assert_eq!(said.status, Some(0), "{}", said.err);
    let asked = ["ask", "--model", "llama-default", "--max-new-tokens", "6"];
    let first = run(&[
        &asked[..],
        &["--image", "media/rgb-64x64.png", "What is this?"],
    ]
    .concat());
    let second = run(&[&asked[..], &["Hello"]].concat()).answer();
    let first = first.answer();
    let history = format!("user: [image] What is this?\nassistant: {first}");
    assert_eq!(said.out, format!("{first}{history}{second}"));
    for words in [
        "error: cannot open /nonexistent.png",
        "attached an image",
        "/image needs a file",
        "/wobble is no command",
    ] {
        assert!(
            said.err.contains(words),
            "{words:?} is not in: {}",
            said.err
        );
    }
    assert!(!said.err.contains("panicked"), "{}", said.err);
}

#[test]
fn a_later_turn_keeps_what_was_read() {
    let said = run_with_input(
        &CHAT,
        b"/video media/clip-64x48.mp4\nWhat is this?\nAnd now?\n",
    );
    assert!(
        said.err.contains("attached a video, 8 frames"),
        "{}",
        said.err
    );
    assert!(said.err.contains(" kept)"), "{}", said.err);
    assert_eq!(said.status, Some(0));
}

#[test]
fn odd_bytes_and_wrong_media_are_survived_or_named() {
    let said = run_with_input(&CHAT, b"\xff\xfe\nHello\n");
    assert_eq!(said.status, Some(0), "{}", said.err);
    let said = run_with_input(
        &[&CHAT[..], &["--image", "/nonexistent.png"]].concat(),
        b"Hello\n",
    );
    said.refuses(1, &["cannot open /nonexistent.png"]);
}
