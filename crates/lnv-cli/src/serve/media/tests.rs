//! The store as a whole: what is kept, what is done once, what waits; and what the other tests share.

#![allow(clippy::unwrap_used)]

mod files;
mod hostile;
mod web;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;

/// A file of `testdata/`.
pub(super) fn testdata(name: &str) -> Vec<u8> {
    std::fs::read(testdata_path(name)).unwrap()
}

pub(super) fn testdata_path(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
    root.join(name).canonicalize().unwrap()
}

/// A web server on loopback that counts its connections.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    hits: Arc<AtomicUsize>,
}

impl Server {
    /// Calls `answer` with the path of each request.
    pub(super) fn start(answer: impl Fn(&str, &mut TcpStream) + Send + Sync + 'static) -> Self {
        Self::hearing(move |head, stream| {
            answer(head.split(' ').nth(1).unwrap_or_default(), stream);
        })
    }

    /// Calls `answer` with the head of each request.
    pub(super) fn hearing(answer: impl Fn(&str, &mut TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let hits = Arc::new(AtomicUsize::new(0));
        let (count, answer) = (Arc::clone(&hits), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming() {
                count.fetch_add(1, Ordering::SeqCst);
                let (mut stream, answer) = (stream.unwrap(), Arc::clone(&answer));
                thread::spawn(move || {
                    let mut head = Vec::new();
                    let mut byte = [0];
                    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
                        head.push(byte[0]);
                    }
                    answer(&String::from_utf8_lossy(&head), &mut stream);
                });
            }
        });
        Self { address, hits }
    }

    pub(super) fn hits(&self) -> usize {
        self.hits.load(Ordering::SeqCst)
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

/// Sends a whole answer; a reader that left is no concern.
pub(super) fn send(stream: &mut TcpStream, status: &str, head: &str, body: &[u8]) {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{head}\r\n");
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body);
}

/// A guard that takes `servers` for public and knows `names`; everything else is as outside of tests.
pub(super) fn guard(servers: &[&Server], names: &[(&str, &[&str])]) -> fetch::Guard {
    let public: Vec<SocketAddr> = servers.iter().map(|server| server.address).collect();
    let names: Vec<(String, Vec<IpAddr>)> = names
        .iter()
        .map(|(name, ips)| {
            let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
            ((*name).to_owned(), ips)
        })
        .collect();
    fetch::Guard::with(
        move |host, port| {
            let found = names.iter().find(|(name, _)| name == host);
            let (_, ips) = found.ok_or(std::io::ErrorKind::NotFound)?;
            Ok(ips.iter().map(|ip| SocketAddr::new(*ip, port)).collect())
        },
        move |at| public.contains(&at) || address::allowed(at, false),
    )
}

pub(super) fn quick() -> MediaPolicy {
    MediaPolicy {
        fetch_timeout: Duration::from_secs(20),
        max_bytes: 1 << 20,
        ..MediaPolicy::default()
    }
}

pub(super) fn video(url: &str) -> MediaSource {
    MediaSource {
        kind: MediaKind::Video,
        url: url.into(),
        sampling: FrameSampling::Default(4),
        start: None,
        end: None,
    }
}

pub(super) fn image(url: &str) -> MediaSource {
    MediaSource {
        kind: MediaKind::Image,
        ..video(url)
    }
}

pub(super) fn store(policy: MediaPolicy) -> MediaStore {
    MediaStore::new(policy).unwrap()
}

/// Decodes for somebody who waits.
pub(super) fn decode(store: &MediaStore, fetched: &Fetched) -> Result<Loaded, MediaError> {
    let asker = Arc::new(());
    store.decode(fetched, &Arc::downgrade(&asker), &mut |_, _| ())
}

/// Describes for somebody who waits.
pub(super) fn describe(store: &MediaStore, source: &MediaSource) -> Result<Described, MediaError> {
    let asker = Arc::new(());
    store.describe(source, &Arc::downgrade(&asker))
}

/// Waits until `done`.
pub(super) fn wait_for(what: &str, done: impl Fn() -> bool) {
    let late = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < late, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Files that the store holds.
pub(super) fn files(store: &MediaStore) -> usize {
    store.workshop.files()
}

#[test]
fn an_upload_is_kept_described_and_pushed_out() {
    let clip = testdata("media/h264.mp4");
    let picture = testdata("demo/circle.png");
    let policy = MediaPolicy {
        upload_bytes: (clip.len() + picture.len()) as u64,
        ..quick()
    };
    let store = store(policy);
    let id = store.add(&clip).unwrap();
    assert_eq!(id.as_str().len(), "media:".len() + 64);
    assert_eq!(store.add(&clip).unwrap(), id);
    assert_eq!(store.kind_of(id.as_str()).unwrap(), MediaKind::Video);
    let still = store.add(&picture).unwrap();
    assert_eq!(store.kind_of(still.as_str()).unwrap(), MediaKind::Image);
    assert_eq!(
        store.stats().upload_bytes,
        (clip.len() + picture.len()) as u64
    );

    let described = describe(&store, &video(id.as_str())).unwrap();
    let whole = llava_next_video::media::probe_video(testdata_path("media/h264.mp4")).unwrap();
    assert_eq!(
        (described.width, described.height),
        (whole.size.width, whole.size.height)
    );
    assert_eq!(described.total_frames, Some(whole.frames));
    assert_eq!(described.frames.len(), 4);
    assert!(
        described
            .frames
            .windows(2)
            .all(|pair| pair[0].time_s < pair[1].time_s)
    );
    for frame in &described.frames {
        let small = ::image::load_from_memory(&frame.thumbnail).unwrap();
        assert!(small.width() <= 160 && small.height() <= 160);
    }

    // In capitals it is the same upload.
    let loud = id.as_str().to_uppercase().replace("MEDIA:", "media:");
    assert!(store.load(&video(&loud)).is_ok());
    // One byte more than there is room for pushes out what was not used for longest.
    assert!(store.load(&image(still.as_str())).is_ok());
    let other = store.add(b"x").unwrap();
    let error = store.load(&video(id.as_str())).unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::NotFound);
    assert!(store.load(&image(still.as_str())).is_ok());
    assert_eq!(
        store.load(&image(other.as_str())).unwrap_err().kind,
        MediaErrorKind::Invalid
    );
    for id in ["media:", "media:zz", "media:../../etc/passwd"] {
        assert_eq!(
            store.load(&video(id)).unwrap_err().kind,
            MediaErrorKind::NotFound
        );
    }
    assert_eq!(files(&store), 2);
}

#[test]
fn an_upload_in_pieces_is_the_whole_and_bounded() {
    let policy = MediaPolicy {
        max_bytes: 100,
        ..quick()
    };
    let store = store(policy);
    let mut upload = store.begin_upload().unwrap();
    upload.write(b"ab").unwrap();
    upload.write(b"cd").unwrap();
    let uploaded = store.finish_upload(upload).unwrap();
    assert!(uploaded.is_new);
    assert_eq!(uploaded.id, store.add(b"abcd").unwrap());
    let mut again = store.begin_upload().unwrap();
    again.write(b"abcd").unwrap();
    assert!(!store.finish_upload(again).unwrap().is_new);
    let mut upload = store.begin_upload().unwrap();
    upload.write(&[0; 100]).unwrap();
    assert_eq!(
        upload.write(b"x").unwrap_err().kind,
        MediaErrorKind::TooLarge
    );
    drop(upload);
    assert_eq!(store.add(b"").unwrap_err().kind, MediaErrorKind::Invalid);
    drop(uploaded);
    assert_eq!(files(&store), 1);
}

/// Bytes of one frame of `h264.mp4`.
const FRAME: u64 = 64 * 48 * 3;

#[test]
fn what_was_decoded_is_kept_under_the_budget() {
    let store = store(MediaPolicy {
        cache_bytes: FRAME * 5,
        ..quick()
    });
    let id = store.add(&testdata("media/h264.mp4")).unwrap();
    let source = |n| MediaSource {
        sampling: FrameSampling::Default(n),
        ..video(id.as_str())
    };
    let frame = store.load(&source(1)).unwrap().bytes();
    assert_eq!(frame, FRAME);
    let first = store.load(&source(4)).unwrap();
    let again = store.load(&source(4)).unwrap();
    let (Medium::Video(first, _), Medium::Video(again, _)) = (first, again) else {
        panic!("not videos");
    };
    assert!(Arc::ptr_eq(&first, &again));
    let stats = store.stats();
    assert_eq!((stats.hits, stats.misses, stats.bytes), (1, 2, 5 * frame));
    // Two frames more push out the one, which was not used for longest.
    store.load(&source(1)).unwrap();
    store.load(&source(2)).unwrap();
    let stats = store.stats();
    assert_eq!((stats.hits, stats.misses, stats.bytes), (2, 3, 3 * frame));
    // More than the budget is not kept, but handed out.
    assert_eq!(store.load(&source(6)).unwrap().bytes(), 6 * frame);
    assert_eq!(store.stats().bytes, 3 * frame);
}

#[test]
fn a_part_of_a_clip() {
    let store = store(quick());
    let id = store.add(&testdata("media/h264.mp4")).unwrap();
    let whole = MediaSource {
        sampling: FrameSampling::All,
        ..video(id.as_str())
    };
    let Medium::Video(all, _) = store.load(&whole).unwrap() else {
        panic!("not a video");
    };
    let (from, to) = (all.timestamps[3], all.timestamps[7]);
    let part = MediaSource {
        start: Some(from),
        end: Some(to),
        ..whole.clone()
    };
    let Medium::Video(some, _) = store.load(&part).unwrap() else {
        panic!("not a video");
    };
    assert_eq!(some.frames_indices, [3, 4, 5, 6]);
    assert_eq!(some.frames[..], all.frames[3..7]);
    let late = MediaSource {
        start: Some(1e4),
        ..whole.clone()
    };
    let error = store.load(&late).unwrap_err();
    assert_eq!(
        (error.kind, error.param),
        (MediaErrorKind::Invalid, "start")
    );
    assert!(error.message.contains(id.as_str()), "{error}");
    let many = MediaSource {
        sampling: FrameSampling::NumFrames(10_000),
        ..whole.clone()
    };
    assert_eq!(store.load(&many).unwrap_err().param, "num_frames");
    let fast = MediaSource {
        sampling: FrameSampling::Fps(1e9),
        ..whole
    };
    assert_eq!(store.load(&fast).unwrap_err().param, "fps");
}

#[test]
fn decodes_wait_for_a_place_but_not_for_ever() {
    let policy = MediaPolicy {
        max_parallel_decodes: 1,
        wait_timeout: Duration::from_millis(50),
        ..quick()
    };
    let store = store(policy);
    let id = store.add(&testdata("media/h264.mp4")).unwrap();
    let place = store.decodes.gate.enter(Instant::now()).unwrap();
    let error = store.load(&video(id.as_str())).unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Busy);
    drop(place);
    assert!(store.load(&video(id.as_str())).is_ok());
    wait_for("a place stays taken", || store.stats().decoding == 0);
}

#[test]
fn decoded_media_share_one_budget_of_bytes() {
    let policy = MediaPolicy {
        decode_bytes: 1 << 20,
        cache_bytes: FRAME * 4,
        wait_timeout: Duration::from_millis(50),
        ..quick()
    };
    let store = store(policy);
    let id = store.add(&testdata("media/h264.mp4")).unwrap();
    let clip = store.fetch(&video(id.as_str())).unwrap();
    assert_eq!(clip.bytes, 0);
    let loaded = decode(&store, &clip).unwrap();
    assert_eq!(store.stats().decode_bytes, FRAME * 4);
    let again = decode(&store, &clip).unwrap();
    assert_eq!(store.stats().decode_bytes, FRAME * 8);
    drop((loaded, again));
    assert_eq!(store.stats().decode_bytes, 0);
    // Nothing is decoded, nor taken from the cache, while others hold all.
    let all = store.decodes.memory.take(1 << 20, Instant::now()).unwrap();
    let error = decode(&store, &clip).err().unwrap();
    assert_eq!(error.kind, MediaErrorKind::Busy);
    let other = store.fetch(&image(id.as_str())).unwrap();
    assert!(!other.equals(&clip));
    let error = decode(&store, &other).err().unwrap();
    assert_eq!(error.kind, MediaErrorKind::Busy);
    drop(all);
    assert!(decode(&store, &clip).is_ok());
    // A picture that the budget has no room for is beyond the limit.
    let large = ::image::RgbImage::new(300, 300);
    let mut bytes = std::io::Cursor::new(Vec::new());
    large
        .write_to(&mut bytes, ::image::ImageFormat::Png)
        .unwrap();
    let id = store.add(bytes.get_ref()).unwrap();
    let error = store.load(&image(id.as_str())).unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::TooLarge, "{error}");
}

#[test]
fn a_decode_that_takes_too_long_is_given_up() {
    let policy = MediaPolicy {
        decode_timeout: Duration::ZERO,
        ..quick()
    };
    let store = store(policy);
    let id = store.add(&testdata("media/h264.mp4")).unwrap();
    let error = store.load(&video(id.as_str())).unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Timeout, "{error}");
    let freed = Instant::now() + Duration::from_secs(20);
    while store.stats().decoding > 0 {
        assert!(Instant::now() < freed, "the place was not given back");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn equal_sources_at_once_are_fetched_and_decoded_once() {
    let clip = testdata("media/h264.mp4");
    let server = Server::start(move |_, stream| {
        thread::sleep(Duration::from_millis(300));
        send(stream, "200 OK", "", &clip);
    });
    let store = MediaStore::with_guard(quick(), guard(&[&server], &[])).unwrap();
    let source = video(&server.url("/clip"));
    thread::scope(|scope| {
        let loads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| store.load(&source)))
            .collect();
        for load in loads {
            assert!(load.join().unwrap().is_ok());
        }
    });
    assert_eq!((server.hits(), store.stats().misses), (1, 1));
    // Later it is fetched again, for it may have changed; its pictures are known.
    store.load(&source).unwrap();
    assert_eq!((server.hits(), store.stats().misses), (2, 1));
    assert_eq!(files(&store), 0);
}

#[test]
fn a_failure_is_not_remembered() {
    let picture = testdata("demo/circle.png");
    let count = AtomicUsize::new(0);
    let server = Server::start(
        move |_, stream| match count.fetch_add(1, Ordering::SeqCst) {
            0 => send(stream, "500 Oops", "", b""),
            1 => send(stream, "200 OK", "", &picture[..picture.len() / 2]),
            _ => send(stream, "200 OK", "", &picture),
        },
    );
    let store = MediaStore::with_guard(quick(), guard(&[&server], &[])).unwrap();
    let source = image(&server.url("/"));
    assert_eq!(
        store.load(&source).unwrap_err().kind,
        MediaErrorKind::Unreachable
    );
    assert_eq!(
        store.load(&source).unwrap_err().kind,
        MediaErrorKind::Invalid
    );
    assert!(store.load(&source).is_ok());
    assert_eq!(files(&store), 0);
}

#[test]
fn an_upload_is_taken_back_unless_others_have_sent_the_same() {
    let store = store(quick());
    let send = || {
        let mut upload = store.begin_upload().unwrap();
        upload.write(b"no picture").unwrap();
        store.finish_upload(upload).unwrap()
    };
    let (first, second) = (send(), send());
    store.take_back(&first);
    assert_eq!(store.kind_of(second.id.as_str()).unwrap(), MediaKind::Video);
    store.take_back(&second);
    assert!(
        store.kind_of(second.id.as_str()).is_ok(),
        "it was there before"
    );
    drop((first, second));
    let store = self::store(quick());
    let mut upload = store.begin_upload().unwrap();
    upload.write(b"no picture").unwrap();
    let alone = store.finish_upload(upload).unwrap();
    store.take_back(&alone);
    assert_eq!(
        store.kind_of(alone.id.as_str()).unwrap_err().kind,
        MediaErrorKind::NotFound
    );
}
