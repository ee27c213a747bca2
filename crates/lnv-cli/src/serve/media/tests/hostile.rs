//! Decoders that hang, crash, ask for too much or lie; and that the one there is says what the library says.

use std::fs;

use llava_next_video::media::{MediaLimits, decode_video};
use llava_next_video::processor::resize::{Arithmetic, Resample};
use llava_next_video::processor::settings::TargetSize;

use super::*;
use crate::args::DecodeMediaArgs;

/// No test: the decoder of all other tests, which is this program with these limits as its last words.
#[test]
fn the_decoder() {
    let words: Vec<String> = std::env::args().collect();
    let [.., memory, time] = &words[..] else {
        return;
    };
    let (Ok(memory_mib), Ok(cpu_seconds)) = (memory.parse(), time.parse()) else {
        return;
    };
    let done = decoder::run(&DecodeMediaArgs {
        memory_mib,
        cpu_seconds,
    });
    std::process::exit(i32::from(done.is_err()));
}

/// What libtest says before the first word.
const BEFORE: &str = "printf '\\nrunning 1 test\\n'";

/// A store whose first decoder does `evil` and whose later ones are as they should be.
struct Harmed {
    store: MediaStore,
    clip: MediaId,
    mark: String,
    evil: String,
    _folder: tempfile::TempDir,
}

impl Harmed {
    fn by(evil: &str, policy: MediaPolicy) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let flag = folder.path().join("evil");
        fs::write(&flag, "").unwrap();
        let mark = flag.display().to_string();
        let words = folder.path().join("words");
        fs::write(&words, format!("{BEFORE}\n{evil}\n")).unwrap();
        // What is evil can be told by its environment, even where the shell becomes something else.
        let script = format!(
            "rm '{mark}' 2>/dev/null && exec env EVIL='{mark}' sh '{}'",
            words.display()
        );
        let policy = MediaPolicy {
            max_parallel_decodes: 1,
            ..policy
        };
        let program = Program::own(&policy).unwrap().after(&script).unwrap();
        let store = MediaStore::with(policy, fetch::Guard::new(false), program).unwrap();
        let clip = store.add(&testdata("media/h264.mp4")).unwrap();
        // The one that waits must have begun its evil; later ones find no flag.
        wait_for("the decoder does not start", || !flag.exists());
        Self {
            store,
            clip,
            mark,
            evil: evil.to_owned(),
            _folder: folder,
        }
    }

    /// The error of the first decode, after which everything is as if it had not been.
    fn error(self) -> MediaError {
        let loaded = self.store.load(&video(self.clip.as_str()));
        let Err(error) = loaded else {
            panic!("no error: {}", self.evil);
        };
        assert!(error.message.contains(self.clip.as_str()), "{error}");
        assert!(!error.message.contains("lnv-media"), "{error}");
        self.check_health();
        error
    }

    fn check_health(self) {
        check_idle(&self.store);
        wait_for("an evil one is left", || processes(&self.mark) == 0);
        assert!(self.store.load(&video(self.clip.as_str())).is_ok());
        check_idle(&self.store);
        assert_eq!(files(&self.store), 1);
    }
}

/// That nothing is being decoded, as soon as the last process is gone.
fn check_idle(store: &MediaStore) {
    assert_eq!(store.stats().decode_bytes, 0);
    wait_for("a place stays taken", || store.stats().decoding == 0);
}

/// Processes that `mark` is known to.
fn processes(mark: &str) -> usize {
    let has = |entry: fs::DirEntry| {
        let known = fs::read(entry.path().join("environ")).unwrap_or_default();
        String::from_utf8_lossy(&known).contains(mark)
    };
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.map(has).filter(|has| *has).count()
}

fn impatient() -> MediaPolicy {
    MediaPolicy {
        decode_timeout: Duration::from_secs(2),
        ..quick()
    }
}

/// A decoder's words up to its first picture, of one pixel.
const BEGUN: &str = r#"read task; echo '{"needs":4096}'; read leave;
    echo '{"picture":{"position":0,"of":4,"size":{"height":1,"width":1},"whole":{"height":1,"width":1},"time":0}}'; printf 'abc'"#;

#[test]
fn a_decoder_that_hangs_is_ended() {
    for hang in [
        // Before it has read anything, before it says what it needs, at its work.
        "exec sleep 1000".to_owned(),
        "read task; exec sleep 1000".to_owned(),
        format!("{BEGUN}; exec sleep 1000"),
        // Stopped, it hears nothing but the last signal.
        format!("{BEGUN}; kill -STOP $$"),
    ] {
        let begun = Instant::now();
        let error = Harmed::by(&hang, impatient()).error();
        assert_eq!(error.kind, MediaErrorKind::Timeout, "{hang}: {error}");
        assert!(begun.elapsed() < Duration::from_secs(15), "{hang}");
    }
}

#[test]
fn a_decoder_that_crashes_is_an_error() {
    for crash in [
        "read task; kill -SEGV $$".to_owned(),
        "read task; kill -KILL $$".to_owned(),
        format!("{BEGUN}; kill -ABRT $$"),
        format!("{BEGUN}; exit 0"),
        "read task; exit 3".to_owned(),
        // Another holds the pipes open.
        format!("{BEGUN}; sleep 1 & kill -KILL $$"),
    ] {
        let error = Harmed::by(&crash, quick()).error();
        assert_eq!(error.kind, MediaErrorKind::Invalid, "{crash}: {error}");
        assert!(error.message.contains("the decoder crashed"), "{error}");
    }
    let hungry = "read task; echo 'memory allocation of 9 bytes failed' >&2; kill -ABRT $$";
    let error = Harmed::by(hungry, quick()).error();
    assert_eq!(error.kind, MediaErrorKind::TooLarge, "{error}");
    let busy = "ulimit -S -t 1; read task; while :; do :; done";
    let error = Harmed::by(busy, quick()).error();
    assert_eq!(error.kind, MediaErrorKind::Timeout, "{error}");
}

#[test]
fn a_decoder_that_crashed_before_is_not_taken() {
    let harmed = Harmed::by("exit 1", quick());
    thread::sleep(Duration::from_millis(200));
    wait_for("it does not end", || processes(&harmed.mark) == 0);
    harmed.check_health();
}

#[test]
fn a_decoder_that_lies_is_not_believed() {
    let picture = |n: usize| -> String {
        let one = |at: usize| {
            let head =
                r#""of":2,"size":{"height":1,"width":1},"whole":{"height":1,"width":1},"time":0}}"#;
            format!(r#"echo '{{"picture":{{"position":{at},{head}'; printf abc; "#)
        };
        (0..n).map(one).collect()
    };
    let end = |indices: &str, fps: u64| {
        format!(
            r#"echo '{{"end":{{"indices":{indices},"total":9,"fps":{fps},"duration":0,"notes":[]}}}}'"#
        )
    };
    let large = r#"echo '{"picture":{"position":0,"of":1,"size":{"height":9999999,"width":9999999},"whole":{"height":1,"width":1},"time":0}}'"#;
    let endless = "exec cat /dev/zero";
    let heard = |words: &str| {
        format!(r#"read task; echo '{{"needs":4096}}'; read leave; {words}; exec sleep 1000"#)
    };
    for lie in [
        "read task; echo hello".to_owned(),
        "read task; echo '{\"end\":null}'".to_owned(),
        endless.to_owned(),
        heard(endless),
        heard("echo '{\"needs\":1}'"),
        heard("echo '{\"end\":null}'"),
        heard(&end("[]", 0)),
        heard(&(picture(2) + &end("[0]", 0))),
        heard(&(picture(1) + &end("[0]", f64::NAN.to_bits()))),
        heard(&(picture(257) + "true")),
        heard(&(picture(1).repeat(9) + "true")),
        heard(large),
        // A size that is allowed, and more than was reserved.
        heard(
            r#"echo '{"picture":{"position":0,"of":1,"size":{"height":100,"width":100},"whole":{"height":1,"width":1},"time":0}}'"#,
        ),
        heard(
            &(picture(1)
                + r#"echo '{"picture":{"position":1,"of":2,"size":{"height":1,"width":2},"whole":{"height":1,"width":1},"time":0}}'"#),
        ),
    ] {
        let begun = Instant::now();
        let error = Harmed::by(&lie, quick()).error();
        assert_eq!(error.kind, MediaErrorKind::Invalid, "{lie}: {error}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{lie}");
    }
}

#[test]
fn a_decoder_that_nobody_waits_for_is_ended() {
    let harmed = Harmed::by(&format!("{BEGUN}; exec sleep 1000"), quick());
    let fetched = harmed.store.fetch(&video(harmed.clip.as_str())).unwrap();
    let asker = Arc::new(());
    let asks = Arc::downgrade(&asker);
    let begun = Instant::now();
    thread::scope(|scope| {
        let waits = scope.spawn(|| harmed.store.decode(&fetched, &asks, &mut |_, _| ()).err());
        while harmed.store.stats().decoding == 0 {
            thread::yield_now();
        }
        thread::sleep(Duration::from_millis(300));
        assert_eq!(harmed.store.stats().decoding, 1);
        drop(asker);
        assert_eq!(waits.join().unwrap().unwrap().kind, MediaErrorKind::Busy);
    });
    assert!(begun.elapsed() < Duration::from_secs(10));
    drop(fetched);
    harmed.check_health();
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_that_nobody_writes_is_given_up() {
    use rustix::fs::{CWD, Mode, mkfifoat};
    let store = store(impatient());
    let id = store.add(&testdata("demo/circle.png")).unwrap();
    let fetched = store.fetch(&image(id.as_str())).unwrap();
    let Content::File(blob) = &fetched.content else {
        panic!("not a file");
    };
    fs::remove_file(blob.path()).unwrap();
    mkfifoat(CWD, blob.path(), Mode::RWXU).unwrap();
    let error = decode(&store, &fetched).err().unwrap();
    assert_eq!(error.kind, MediaErrorKind::Timeout, "{error}");
    check_idle(&store);
    let other = store.add(&testdata("media/h264.mp4")).unwrap();
    assert!(store.load(&video(other.as_str())).is_ok());
}

/// A film of `frames` grey frames, uncompressed.
fn raw_film(side: usize, frames: usize) -> Vec<u8> {
    let mut film = format!("YUV4MPEG2 W{side} H{side} F25:1 Ip A1:1 C420jpeg\n").into_bytes();
    for _ in 0..frames {
        film.extend(b"FRAME\n");
        film.resize(film.len() + side * side * 3 / 2, 128);
    }
    film
}

#[cfg(target_os = "linux")]
#[test]
fn memory_has_a_ceiling_and_a_little_less_is_never_another_answer() {
    let film = raw_film(1600, 4);
    let mut picture = std::io::Cursor::new(Vec::new());
    let large = ::image::RgbImage::new(3000, 3000);
    large
        .write_to(&mut picture, ::image::ImageFormat::Png)
        .unwrap();
    let generous = MediaPolicy {
        max_bytes: 64 << 20,
        ..quick()
    };
    let truth = |bytes: &[u8], source: fn(&str) -> MediaSource| {
        let store = store(generous.clone());
        let id = store.add(bytes).unwrap();
        store.load(&source(id.as_str())).unwrap().bytes()
    };
    type Want<'a> = (&'a [u8], fn(&str) -> MediaSource, u64);
    let wants: [Want<'_>; 2] = [
        (&film, video, truth(&film, video)),
        (picture.get_ref(), image, truth(picture.get_ref(), image)),
    ];
    let mut refused = 0;
    for mib in (192..512).step_by(16) {
        let store = store(MediaPolicy {
            decoder_bytes: mib << 20,
            ..generous.clone()
        });
        for (bytes, source, want) in &wants {
            let id = store.add(bytes).unwrap();
            match store.load(&source(id.as_str())) {
                Ok(medium) => assert_eq!(medium.bytes(), *want, "{mib} MiB"),
                Err(error) => {
                    println!("{mib} MiB: {error}");
                    refused += usize::from(error.kind == MediaErrorKind::TooLarge);
                    let kinds = [MediaErrorKind::TooLarge, MediaErrorKind::Invalid];
                    assert!(kinds.contains(&error.kind), "{mib} MiB: {error}");
                    assert!(!error.message.contains("damaged"), "{mib} MiB: {error}");
                }
            }
        }
        check_idle(&store);
    }
    assert!(refused > 0);
}

#[test]
fn the_decoder_says_what_the_library_says() {
    let small = Resizing {
        size: TargetSize::ShortestEdge(40),
        resample: Resample::Bicubic,
        arithmetic: Arithmetic::Torchvision,
    };
    let store_small = store(MediaPolicy {
        shrinking: Some(small),
        ..quick()
    });
    let store = store(quick());
    let clips = fs::read_dir(testdata_path("media")).unwrap();
    let (mut seen, mut smaller) = (0, 0);
    for clip in clips.flatten().map(|entry| entry.path()) {
        let sampling = FrameSampling::Default(4);
        let Ok(want) = decode_video(&clip, sampling, &MediaLimits::default(), None) else {
            continue;
        };
        let id = store.add(&fs::read(&clip).unwrap()).unwrap();
        let Medium::Video(got, size) = store.load(&video(id.as_str())).unwrap() else {
            panic!("not a video");
        };
        assert_eq!(size, want.frames[0].size);
        let id_small = store_small.add(&fs::read(&clip).unwrap()).unwrap();
        let shrunk = store_small.load(&video(id_small.as_str())).unwrap();
        let Medium::Video(shrunk, whole) = shrunk else {
            panic!("not a video");
        };
        assert_eq!(whole, size);
        for (shrunk, want) in shrunk.frames.iter().zip(&want.frames) {
            let resizer = small.shrinking(size).unwrap();
            let small = resizer.map(|resizer| resizer.resize(want).unwrap());
            assert_eq!(shrunk, small.as_ref().unwrap_or(want));
            smaller += usize::from(small.is_some());
        }
        let notes = got.notes.iter();
        let notes = notes.map(|note| note.replace(id.as_str(), &clip.display().to_string()));
        assert_eq!(notes.collect::<Vec<_>>(), want.notes);
        assert_eq!(
            Video {
                notes: want.notes.clone(),
                ..(*got).clone()
            },
            want
        );
        seen += 1;
    }
    assert!(seen > 10 && smaller > 10, "{seen} {smaller}");
}
