//! Local files, data URIs, and files that mean no good.

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::*;

fn data_uri(kind: &str, bytes: &[u8]) -> String {
    format!("data:{kind};base64,{}", STANDARD.encode(bytes))
}

#[test]
fn data_uris_are_read_as_what_they_hold() {
    let store = store(quick());
    let clip = testdata("media/h264.mp4");
    let picture = testdata("demo/circle.png");
    assert!(store.load(&video(&data_uri("video/mp4", &clip))).is_ok());
    assert!(store.load(&video(&data_uri("image/png", &clip))).is_ok());
    assert!(store.load(&image(&data_uri("text/html", &picture))).is_ok());
    assert!(store.load(&image(&STANDARD.encode(&picture))).is_ok());
    // Three sources with the same picture are one.
    assert_eq!(store.stats().misses, 2);
    let error = store
        .load(&image(&data_uri("image/png", &[0; (1 << 20) + 1])))
        .unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::TooLarge);
    let policy = MediaPolicy {
        data: false,
        ..quick()
    };
    let none = super::store(policy);
    let error = none
        .load(&image(&data_uri("image/png", &picture)))
        .unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Refused);
    assert_eq!(files(&store), 0);
}

#[test]
fn a_video_of_pictures_as_vllm_sends_it() {
    let store = store(quick());
    let (one, other) = (
        testdata("media/420-64x64.jpg"),
        testdata("media/444-64x64.jpg"),
    );
    let list = |frames: &[&[u8]]| {
        let frames: Vec<String> = frames.iter().map(|frame| STANDARD.encode(frame)).collect();
        format!("data:video/jpeg;base64,{}", frames.join(","))
    };
    let uri = list(&[&one, &other, &one, &other]);
    let source = MediaSource {
        sampling: FrameSampling::Default(2),
        ..video(&uri)
    };
    let Medium::Video(got, _) = store.load(&source).unwrap() else {
        panic!("not a video");
    };
    assert_eq!(got.frames_indices, [0, 2]);
    assert_eq!(
        store.load(&image(&uri)).unwrap_err().kind,
        MediaErrorKind::Invalid
    );
    let odd = list(&[&one, &testdata("media/420-17x33.jpg")]);
    assert_eq!(
        store.load(&video(&odd)).unwrap_err().kind,
        MediaErrorKind::Invalid
    );
    let broken = list(&[&one, b"x"]);
    assert_eq!(
        store.load(&video(&broken)).unwrap_err().kind,
        MediaErrorKind::Invalid
    );
}

#[cfg(unix)]
#[test]
fn local_files_only_where_allowed_and_with_one_answer_elsewhere() {
    use std::os::unix::fs::symlink;
    let all = tempfile::tempdir().unwrap();
    let root = all.path().canonicalize().unwrap();
    let (allowed, evil, outside) = (
        root.join("films"),
        root.join("films-of-others"),
        root.join("out"),
    );
    for directory in [&allowed, &evil, &outside, &allowed.join("sub")] {
        fs::create_dir(directory).unwrap();
    }
    let picture = testdata("demo/circle.png");
    for file in [
        allowed.join("a.png"),
        allowed.join("sub/b c.png"),
        evil.join("a.png"),
        outside.join("a.png"),
    ] {
        fs::write(file, &picture).unwrap();
    }
    symlink(outside.join("a.png"), allowed.join("link-out.png")).unwrap();
    symlink(&outside, allowed.join("dir-out")).unwrap();
    symlink(allowed.join("a.png"), allowed.join("link-in.png")).unwrap();
    symlink("loop", allowed.join("loop")).unwrap();
    symlink("/dev/zero", allowed.join("zero")).unwrap();
    symlink(&allowed, outside.join("back")).unwrap();
    let fifo = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        allowed.join("fifo"),
        rustix::fs::FileType::Fifo,
        fifo,
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(allowed.join("socket")).unwrap();

    let policy = MediaPolicy {
        allowed_local: vec![allowed.clone()],
        ..quick()
    };
    let store = store(policy);
    let at = |path: &Path| path.display().to_string();
    for good in [
        at(&allowed.join("a.png")),
        format!("file://{}", at(&allowed.join("a.png"))),
        format!("file://{}/sub/b%20c.png", at(&allowed)),
        at(&allowed.join("sub/../a.png")),
        at(&allowed.join("link-in.png")),
        at(&outside.join("back/a.png")),
    ] {
        assert!(store.load(&image(&good)).is_ok(), "{good}");
    }
    let mut reasons = std::collections::BTreeSet::new();
    for bad in [
        at(&outside.join("a.png")),
        at(&evil.join("a.png")),
        at(&allowed.join("../out/a.png")),
        at(&allowed.join("sub/../../out/a.png")),
        format!("file://{}/%2e%2e/out/a.png", at(&allowed)),
        format!("file://{}/..%2fout/a.png", at(&allowed)),
        at(&allowed.join("link-out.png")),
        at(&allowed.join("dir-out/a.png")),
        at(&allowed.join("loop")),
        at(&allowed.join("zero")),
        at(&allowed.join("fifo")),
        at(&allowed.join("socket")),
        at(&allowed.join("sub")),
        at(&allowed),
        at(&allowed.join("none.png")),
        at(&outside.join("none.png")),
        "/etc/passwd".into(),
        "/proc/self/environ".into(),
        "/proc/self/fd/0".into(),
        "/dev/stdin".into(),
        "/dev/zero".into(),
        "/".into(),
        "file:///etc/passwd".into(),
    ] {
        let error = store.load(&image(&bad)).unwrap_err();
        assert_eq!(error.kind, MediaErrorKind::Refused, "{bad}: {error}");
        reasons.insert(error.message.replace(&source::shown(&bad), "FILE"));
    }
    for bad in [
        format!("file://localhost{}", at(&allowed.join("a.png"))),
        format!("file://127.0.0.1{}", at(&allowed.join("a.png"))),
        format!("file:{}", at(&allowed.join("a.png"))),
    ] {
        assert_eq!(
            store.load(&image(&bad)).unwrap_err().kind,
            MediaErrorKind::Refused,
            "{bad}"
        );
    }
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    let none = super::store(quick());
    let error = none.load(&image(&at(&allowed.join("a.png")))).unwrap_err();
    assert_eq!(error.kind, MediaErrorKind::Refused);
    assert!(error.message.contains("reads none"), "{error}");
}

/// The clip with its sample data said to lie in the file `other`, by a Macintosh alias as FFmpeg reads it.
fn with_data_elsewhere(clip: &[u8], other: &Path) -> Vec<u8> {
    let path = other.display().to_string().replace('/', ":");
    let mut alias = vec![0; 4 + 10];
    alias.push(0);
    alias.extend([0; 27 + 12]);
    alias.push(0);
    alias.extend([0; 63 + 16]);
    alias.extend([0, 1, 0, 1]);
    alias.extend([0; 16]);
    alias.extend([0, 2]);
    alias.extend((path.len() as u16).to_be_bytes());
    alias.extend(path.as_bytes());
    alias.extend(vec![0; path.len() % 2]);
    alias.extend([0xff, 0xff, 0, 0]);
    let mut entry = (alias.len() as u32 + 8).to_be_bytes().to_vec();
    entry.extend(b"alis");
    entry.extend(alias);
    let find = |name: &[u8; 4]| clip.windows(4).position(|window| window == name).unwrap() - 4;
    let old = find(b"url ");
    let grown = entry.len() as u32 - 12;
    let mut out = clip.to_vec();
    for name in [b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"] {
        let at = find(name);
        let size = u32::from_be_bytes(clip[at..at + 4].try_into().unwrap()) + grown;
        out[at..at + 4].copy_from_slice(&size.to_be_bytes());
    }
    out.splice(old..old + 12, entry);
    out
}

#[test]
fn media_files_open_no_other_file_and_no_address() {
    let clip = testdata_path("media/h264.mp4");
    let name = clip.display();
    let server = Server::start(|_, stream| send(stream, "200 OK", "", &testdata("media/h264.ts")));
    let url = server.url("/clip.ts");
    let table: Vec<(&str, Vec<u8>)> = vec![
        ("hls, path", format!("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{name}\n#EXT-X-ENDLIST\n").into()),
        ("hls, file", format!("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{name}\n#EXT-X-ENDLIST\n").into()),
        ("hls, address", format!("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n").into()),
        ("hls, concat", format!("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nconcat:{name}|{name}\n#EXT-X-ENDLIST\n").into()),
        ("hls, key", format!("#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI=\"{url}\"\n#EXTINF:9,\n{name}\n#EXT-X-ENDLIST\n").into()),
        ("hls, list of lists", format!("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}\n").into()),
        ("ffconcat", format!("ffconcat version 1.0\nfile '{name}'\n").into()),
        ("concat", format!("file '{name}'\n").into()),
        ("concat, address", format!("ffconcat version 1.0\nfile '{url}'\n").into()),
        ("dash", format!(
            "<?xml version=\"1.0\"?><MPD xmlns=\"urn:mpeg:dash:schema:mpd:2011\" type=\"static\" mediaPresentationDuration=\"PT9S\">\
             <Period><AdaptationSet mimeType=\"video/mp4\"><Representation id=\"1\" bandwidth=\"1\">\
             <BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>").into()),
        ("sdp", format!("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {} RTP/AVP 96\na=rtpmap:96 H264/90000\n", server.address.port()).into()),
        ("asx", format!("<asx version=\"3.0\"><entry><ref href=\"{url}\"/></entry></asx>").into()),
        ("rtsptext", format!("RTSPtext\r\n{url}\r\n").into()),
        ("reference", format!("[Reference]\r\nRef1={url}\r\n").into()),
        ("imf", format!("<CompositionPlaylist xmlns=\"http://www.smpte-ra.org/schemas/2067-3/2016\"><Id>urn:uuid:0</Id><x>{name}</x></CompositionPlaylist>").into()),
        ("avisynth", format!("AVISource(\"{name}\")\n").into()),
        ("vapoursynth", format!("import vapoursynth as vs\nvs.core.ffms2.Source('{name}').set_output()\n").into()),
        ("svg", format!("<svg xmlns=\"http://www.w3.org/2000/svg\"><image href=\"file://{name}\"/></svg>").into()),
        ("subtitles", format!("WEBVTT\n\n00:00.000 --> 00:01.000\n{name}\n").into()),
        ("a path", name.to_string().into()),
        ("mov", with_data_elsewhere(&testdata("media/h264.mp4"), &clip)),
    ];
    let store = store(MediaPolicy {
        max_bytes: 1 << 20,
        ..quick()
    });
    for (what, bytes) in table {
        let id = store.add(&bytes).unwrap();
        let error = store.load(&video(id.as_str())).unwrap_err();
        assert_eq!(error.kind, MediaErrorKind::Invalid, "{what}: {error}");
        assert!(!error.message.contains("lnv-media"), "{what}: {error}");
        assert!(error.message.contains(id.as_str()), "{what}: {error}");
        let error = store.load(&image(id.as_str())).unwrap_err();
        assert_eq!(error.kind, MediaErrorKind::Invalid, "{what}: {error}");
    }
    assert_eq!(server.hits(), 0);
}

/// A PNG that claims `width` x `height`, and holds next to nothing.
fn png_bomb(width: u32, height: u32) -> Vec<u8> {
    let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |name: &[u8; 4], body: &[u8]| {
        out.extend((body.len() as u32).to_be_bytes());
        let checked = [name.as_slice(), body].concat();
        out.extend(&checked);
        out.extend(crc(&checked).to_be_bytes());
    };
    let size = [width.to_be_bytes(), height.to_be_bytes()].concat();
    chunk(b"IHDR", &[&size[..], &[8, 2, 0, 0, 0]].concat());
    chunk(b"IDAT", &[0x78, 0x9c, 0x63, 0, 0, 0, 1, 0, 1]);
    chunk(b"IEND", b"");
    out
}

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |mut crc, byte| {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
        crc
    })
}

#[test]
fn bombs_and_broken_media() {
    let store = store(quick());
    let kind = |bytes: &[u8], source: fn(&str) -> MediaSource| {
        let id = store.add(bytes).unwrap();
        let error = store.load(&source(id.as_str())).unwrap_err();
        assert!(!error.message.contains("lnv-media"), "{error}");
        error.kind
    };
    use MediaErrorKind as K;
    let gif = b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;";
    let mut jpeg = testdata("media/420-64x64.jpg");
    let frame = jpeg
        .windows(2)
        .position(|pair| pair == [0xff, 0xc0])
        .unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0xff, 0xdc, 0xff, 0xdc]);
    let mut bmp = testdata("media/rgb.bmp");
    bmp[18..26].copy_from_slice(&[0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0, 0]);
    for (what, bytes) in [
        ("png", png_bomb(100_000, 100_000)),
        ("gif", gif.to_vec()),
        ("jpeg", jpeg),
    ] {
        assert_eq!(kind(&bytes, image), K::TooLarge, "{what}");
    }
    // Sizes at which the decoders stop by themselves.
    for bytes in [bmp, png_bomb(i32::MAX as u32, i32::MAX as u32)] {
        assert!(matches!(kind(&bytes, image), K::TooLarge | K::Invalid));
    }
    // Claims what fits and holds nothing.
    assert_eq!(kind(&png_bomb(4000, 4000), image), K::Invalid);
    let clip = testdata("media/h264.mp4");
    for (what, bytes) in [
        ("a byte", &b"x"[..]),
        ("zeros", &[0; 4096]),
        ("text", b"hello, this is no film"),
        ("half a header", &clip[..20]),
        ("no index", &clip[..clip.len() / 2]),
        ("html", b"<!DOCTYPE html><html><body>secret</body></html>"),
        ("a picture", &testdata("demo/circle.png")),
    ] {
        assert_eq!(kind(bytes, video), K::Invalid, "{what}");
    }
    assert_eq!(kind(&clip, image), K::Invalid);
    // A film of frames too large.
    let small = super::store(MediaPolicy {
        max_pixels: 1000,
        ..quick()
    });
    let id = small.add(&clip).unwrap();
    assert_eq!(
        small.load(&video(id.as_str())).unwrap_err().kind,
        K::TooLarge
    );
    let short = super::store(MediaPolicy {
        max_duration_s: 0.1,
        ..quick()
    });
    let id = short.add(&clip).unwrap();
    assert_eq!(
        short.load(&video(id.as_str())).unwrap_err().kind,
        K::TooLarge
    );
    let few = super::store(MediaPolicy {
        max_decoded_bytes: 20_000,
        ..quick()
    });
    let id = few.add(&clip).unwrap();
    assert_eq!(few.load(&video(id.as_str())).unwrap_err().kind, K::TooLarge);
}

#[test]
fn every_cut_of_a_clip_is_an_answer_or_an_error() {
    let store = store(quick());
    for name in [
        "media/h264.ts",
        "media/vp9.webm",
        "media/h264.avi",
        "demo/circle.png",
    ] {
        let bytes = testdata(name);
        for eighth in 1..8 {
            let id = store.add(&bytes[..bytes.len() * eighth / 8]).unwrap();
            for source in [video(id.as_str()), image(id.as_str())] {
                if let Err(error) = store.load(&source) {
                    assert_eq!(error.kind, MediaErrorKind::Invalid, "{name}: {error}");
                }
            }
        }
    }
}
