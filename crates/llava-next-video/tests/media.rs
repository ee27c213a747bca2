//! Pictures and clips of `testdata/media` against Pillow and PyAV, seeking against decoding from the start, and
//! what bad input is answered with. `tools/media/make.py` makes the files and the hashes.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use base64::Engine;
use llava_next_video::Error;
use llava_next_video::media::{
    FrameSampling, ImageSize, MediaLimits, SampledFrame, Video, VideoPart,
    decode_data_uri_or_base64, decode_image, decode_video, decode_video_everything,
    decode_video_part, decode_video_with, load_image, probe_video,
};
use serde_json::Value;

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/media")
}

fn expected(part: &str) -> Vec<(String, Value)> {
    let text = std::fs::read_to_string(testdata().join("expected.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    let part = all[part].as_object().unwrap();
    part.iter()
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

fn fnv(data: &[u8]) -> String {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", data.iter().fold(0xcbf2_9ce4_8422_2325, step))
}

fn size_of(value: &Value) -> ImageSize {
    let side = |name: &str| value[name].as_u64().unwrap() as usize;
    ImageSize::new(side("height"), side("width"))
}

fn whole(path: &Path) -> Video {
    decode_video_everything(
        path,
        FrameSampling::All,
        VideoPart::WHOLE,
        &MediaLimits::default(),
    )
    .unwrap()
}

fn sampled(path: &Path, sampling: FrameSampling) -> Result<Video, Error> {
    decode_video(path, sampling, &MediaLimits::default(), None)
}

/// The same frames, times and count as the whole decode has.
fn assert_agrees(name: &str, sampled: &Video, whole: &Video) {
    let total = whole.metadata.total_num_frames;
    assert_eq!(
        sampled.metadata.total_num_frames, total,
        "{name}: frames in all"
    );
    assert_eq!(sampled.frames.len(), sampled.frames_indices.len(), "{name}");
    for (at, index) in sampled.frames_indices.iter().enumerate() {
        assert!(
            sampled.frames[at] == whole.frames[*index],
            "{name}: frame {index} differs"
        );
        let apart = (sampled.timestamps[at] - whole.timestamps[*index]).abs();
        assert!(
            apart < 1e-9,
            "{name}: time of frame {index} is off by {apart} s"
        );
    }
}

#[test]
fn pictures_equal_pillow() {
    let limits = MediaLimits::default();
    let pictures = expected("images");
    assert!(pictures.len() > 40);
    for (name, value) in pictures {
        let image = load_image(testdata().join(&name), &limits).unwrap();
        assert_eq!(image.size, size_of(&value), "{name}");
        assert_eq!(
            fnv(&image.data),
            value["fnv"].as_str().unwrap(),
            "{name}: pixels differ"
        );
    }
}

#[test]
fn clips_equal_pyav() {
    let clips = expected("clips");
    assert!(clips.len() > 30);
    for (name, value) in clips {
        let video = whole(&testdata().join(&name));
        let hashes = value["fnv"].as_array().unwrap();
        assert_eq!(video.frames.len(), hashes.len(), "{name}: number of frames");
        for (at, (frame, hash)) in video.frames.iter().zip(hashes).enumerate() {
            assert_eq!(frame.size, size_of(&value), "{name}");
            assert_eq!(
                fnv(&frame.data),
                hash.as_str().unwrap(),
                "{name}: frame {at} differs"
            );
        }
    }
}

#[test]
fn seeking_gives_the_frames_of_a_whole_decode() {
    for (name, _) in expected("clips") {
        let path = testdata().join(&name);
        let whole = whole(&path);
        for n in [1, 2, 3, 5, 8, 17, 40] {
            assert_agrees(
                &name,
                &sampled(&path, FrameSampling::Default(n)).unwrap(),
                &whole,
            );
        }
        assert_agrees(&name, &sampled(&path, FrameSampling::All).unwrap(), &whole);
    }
}

#[test]
fn seeking_is_used_wherever_the_packets_allow() {
    let sequential = ["gif.gif", "h264-cut-across.mp4", "h264.avi", "h264.h264"];
    for (name, value) in expected("clips") {
        let info = probe_video(testdata().join(&name)).unwrap();
        assert_eq!(
            info.seekable,
            !sequential.contains(&name.as_str()),
            "{name}"
        );
        if info.seekable {
            assert_eq!(
                info.frames,
                value["fnv"].as_array().unwrap().len(),
                "{name}"
            );
        }
        assert_eq!(info.size, size_of(&value), "{name}");
        let limits = MediaLimits::default();
        for n in [1, 3, 8, 30] {
            let path = testdata().join(&name);
            let sampling = FrameSampling::Default(n);
            let summary =
                decode_video_with(path, sampling, VideoPart::WHOLE, &limits, None, &mut |_| {
                    Ok(())
                })
                .unwrap();
            assert_eq!(summary.seeked, info.seekable, "{name}, {n} frames");
        }
    }
}

#[test]
fn metadata_is_that_of_the_container() {
    let path = testdata().join("h264.mp4");
    let info = probe_video(&path).unwrap();
    assert_eq!(
        (info.codec.as_str(), info.frames, info.fps),
        ("h264", 75, 25.0)
    );
    assert_eq!((info.duration, info.rotation), (3.0, 0));
    let video = sampled(&path, FrameSampling::NumFrames(3)).unwrap();
    assert_eq!(video.frames_indices, [0, 25, 50]);
    assert_eq!(video.timestamps, [0.0, 1.0, 2.0]);
    assert_eq!(video.metadata.duration, 3.0);
    assert!(video.notes.is_empty());
    let video = sampled(&path, FrameSampling::Fps(2.0)).unwrap();
    assert_eq!(video.frames_indices.len(), 6);
}

#[test]
fn rotation_is_applied_and_said() {
    let path = testdata().join("h264-turned-90.mp4");
    let video = sampled(&path, FrameSampling::Default(1)).unwrap();
    assert_eq!(video.frames[0].size, ImageSize::new(64, 48));
    assert_eq!(video.notes.len(), 1);
    assert!(video.notes[0].ends_with("was rotated by 90 degrees clockwise, as the file asks"));
    let rotation = |name: &str| probe_video(testdata().join(name)).unwrap().rotation;
    assert_eq!(rotation("h264-turned-90.mp4"), 90);
    assert_eq!(rotation("h264-turned-180.mp4"), 180);
    assert_eq!(rotation("h264-turned-270.mp4"), 270);
}

#[test]
fn few_frames_are_a_note_or_an_error() {
    let path = testdata().join("h264-one.mp4");
    let video = sampled(&path, FrameSampling::Default(8)).unwrap();
    assert_eq!(video.frames.len(), 1);
    assert!(video.notes[0].ends_with("fewer than 8: all of them were taken"));
    let error = sampled(&path, FrameSampling::NumFrames(8)).unwrap_err();
    assert!(matches!(error, Error::Input(_)));
    assert!(
        error
            .to_string()
            .contains("8 frames were asked for, but the video has only 1")
    );
}

#[test]
fn a_file_cut_off_yields_what_is_there_every_time() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["h264.mkv", "h264.ts", "vp9.webm", "h264.avi"] {
        let bytes = std::fs::read(testdata().join(name)).unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, &bytes[..bytes.len() * 6 / 10]).unwrap();
        let whole = whole(&path);
        let total = whole.frames.len();
        assert!(total > 20 && total < 75, "{name}: {total} frames");
        for n in [1, 4, 8] {
            assert_agrees(
                name,
                &sampled(&path, FrameSampling::Default(n)).unwrap(),
                &whole,
            );
        }
        // What is there is what the sound file has there, but for the last frames.
        let sound = self::whole(&testdata().join(name));
        assert!(
            whole.frames[..total - 4] == sound.frames[..total - 4],
            "{name}"
        );
    }
}

/// The packets of these promise 75 frames, but fewer can be decoded.
#[test]
fn a_broken_promise_begins_again_and_mixes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut begun_again = 0;
    for name in ["h264.mp4", "h264.mkv", "vp9.webm", "vp8.webm", "mpeg2.ts"] {
        let bytes = std::fs::read(testdata().join(name)).unwrap();
        let path = dir.path().join(name);
        for eighths in 1..7 {
            let mut broken = bytes.clone();
            let at = bytes.len() * eighths / 8;
            broken[at..at + bytes.len() / 12].fill(0x5a);
            std::fs::write(&path, &broken).unwrap();
            let everything = FrameSampling::All;
            let limits = MediaLimits::default();
            let whole = decode_video_everything(&path, everything, VideoPart::WHOLE, &limits);
            for n in [3, 8, 40] {
                let sampling = FrameSampling::Default(n);
                let got = sampled(&path, sampling);
                let mut starts = 0;
                let mut sink = |frame: SampledFrame| {
                    starts += usize::from(frame.position == 0);
                    Ok(())
                };
                let all = VideoPart::WHOLE;
                let summary = decode_video_with(&path, sampling, all, &limits, None, &mut sink);
                begun_again += usize::from(starts > 1);
                // Where no sampled frame is hit, nobody finds out.
                if let (Ok(got), Ok(whole)) = (&got, &whole)
                    && !summary.unwrap().seeked
                {
                    assert_agrees(&format!("{name} {eighths} {n}"), got, whole);
                }
            }
        }
    }
    assert!(begun_again > 3, "{begun_again}");
}

/// The sentence with which `path` is refused.
fn refusal(path: &Path) -> String {
    let error = sampled(path, FrameSampling::Default(8)).unwrap_err();
    assert!(matches!(error, Error::Media(_) | Error::Io(_)), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains(&*path.file_name().unwrap().to_string_lossy()),
        "{text}"
    );
    assert!(!text.contains('\n') && !text.contains("os error"), "{text}");
    text
}

/// A second of silence.
fn wav() -> Vec<u8> {
    let mut bytes = b"RIFF".to_vec();
    bytes.extend(16036u32.to_le_bytes());
    bytes.extend(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    bytes.extend(8000u32.to_le_bytes());
    bytes.extend(16000u32.to_le_bytes());
    bytes.extend(b"\x02\0\x10\0data");
    bytes.extend(16000u32.to_le_bytes());
    bytes.resize(44 + 16000, 0);
    bytes
}

#[test]
fn bad_videos_are_refused_in_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let missing = dir.path().join("clip.mp4");
    let text = format!(
        "cannot open {}: no such file or directory",
        missing.display()
    );
    assert_eq!(refusal(&missing), text);
    assert!(refusal(&write("empty.mp4", b"")).ends_with("the file is empty"));
    assert!(refusal(dir.path()).ends_with("it is not a regular file"));
    let no_video = "it is not a video file, or it is cut off or damaged before its first frame";
    let prose = "no video at all ".repeat(200);
    assert!(refusal(&write("text.mp4", prose.as_bytes())).ends_with(no_video));
    let mut state = 1u32;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    refusal(&write(
        "noise.mp4",
        &noise.take(100_000).collect::<Vec<u8>>(),
    ));
    let mp4 = std::fs::read(testdata().join("h264.mp4")).unwrap();
    assert!(refusal(&write("cut.mp4", &mp4[..mp4.len() / 2])).ends_with(no_video));
    assert!(refusal(&write("a.wav", &wav())).ends_with("it has sound but no video stream"));
    let png = std::fs::read(testdata().join("alpha.png")).unwrap();
    assert!(refusal(&write("picture.png", &png)).contains("playlists, pictures and formats"));
}

#[test]
fn files_that_refer_to_other_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let clip = dir.path().join("clip.ts");
    std::fs::copy(testdata().join("h264.ts"), &clip).unwrap();
    let shown = clip.display();
    let lists = [
        ("a.m3u8", format!("#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\n{shown}\n#EXT-X-ENDLIST\n")),
        ("a.ffconcat", format!("ffconcat version 1.0\nfile '{shown}'\n")),
        ("a.mpd", "<MPD xmlns=\"urn:mpeg:dash:schema:mpd:2011\"></MPD>".into()),
        ("a.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n".into()),
    ];
    for (name, text) in lists {
        // Neither under its own name nor under another.
        for name in [name.to_string(), format!("{name}.mp4")] {
            let path = dir.path().join(name);
            std::fs::write(&path, &text).unwrap();
            refusal(&path);
        }
    }
    for name in [
        "http://127.0.0.1:9/a.mp4",
        "concat:a|b",
        "data:video/mp4;base64,AA",
        "pipe:0",
        "-",
    ] {
        let error = sampled(Path::new(name), FrameSampling::Default(1)).unwrap_err();
        assert!(error.to_string().contains("no such file"), "{error}");
    }
}

#[test]
fn limits_hold() {
    let path = testdata().join("h264.mp4");
    let refused = |limits: MediaLimits, sampling| {
        decode_video(&path, sampling, &limits, None)
            .unwrap_err()
            .to_string()
    };
    let base = MediaLimits::default;
    let few = || MediaLimits {
        sampled_frames: 4,
        ..base()
    };
    assert!(refused(few(), FrameSampling::Default(5)).contains("at most 4 are taken"));
    assert!(refused(few(), FrameSampling::All).contains("at most 4 are taken"));
    let limits = MediaLimits {
        sampled_bytes: 20_000,
        ..base()
    };
    assert!(refused(limits, FrameSampling::Default(3)).contains("sampled frames take more than"));
    let limits = MediaLimits {
        packets: 10,
        ..base()
    };
    assert!(refused(limits, FrameSampling::Default(3)).contains("more than 10 packets"));
    let limits = MediaLimits {
        decoded_frames: 10,
        ..base()
    };
    assert!(refused(limits, FrameSampling::All).contains("more than 10 frames would have to be"));
    let past = Instant::now().checked_sub(Duration::from_secs(1));
    let limits = MediaLimits {
        deadline: past,
        ..base()
    };
    assert!(refused(limits, FrameSampling::Default(3)).contains("took longer than allowed"));
    let limits = MediaLimits {
        video_pixels: 1000,
        ..base()
    };
    assert!(refused(limits, FrameSampling::Default(3)).contains("64x48 is more than 1000 pixels"));
}

#[test]
fn the_caller_can_stop_and_can_stream() {
    let path = testdata().join("h264.mp4");
    let limits = MediaLimits::default();
    let stop = AtomicBool::new(true);
    let error = decode_video(&path, FrameSampling::Default(8), &limits, Some(&stop)).unwrap_err();
    assert!(matches!(error, Error::Cancelled));
    let mut seen = Vec::new();
    let mut sink = |frame: SampledFrame| {
        assert_eq!((frame.position, frame.of), (seen.len(), 8));
        seen.push(frame.index);
        Ok(())
    };
    let (eight, whole) = (FrameSampling::Default(8), VideoPart::WHOLE);
    let summary = decode_video_with(&path, eight, whole, &limits, None, &mut sink);
    assert_eq!(seen, summary.unwrap().frames_indices);
    let mut count = 0;
    let mut full = |_| {
        count += 1;
        Err(Error::Input("enough".into()))
    };
    let error = decode_video_with(&path, eight, whole, &limits, None, &mut full);
    assert_eq!(
        (error.unwrap_err().to_string().as_str(), count),
        ("enough", 1)
    );
}

#[test]
fn data_uris_and_base64() {
    let limits = MediaLimits::default();
    let bytes = std::fs::read(testdata().join("palette.png")).unwrap();
    let image = decode_image(&bytes, "x", &limits).unwrap();
    let text = base64::engine::general_purpose::STANDARD.encode(&bytes);
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(60)
        .map(|c| std::str::from_utf8(c).unwrap())
        .collect();
    let png = format!("data:image/png;base64,{text}");
    // Pillow looks at the bytes, not at the type that the URI claims.
    let jpeg = format!("data:image/jpeg;base64,{text}");
    for form in [text.clone(), lines.join("\n"), png, jpeg] {
        assert!(decode_data_uri_or_base64(&form, &limits).unwrap() == image);
    }
    let no_comma = "data:image/png;base64";
    for bad in [
        "",
        no_comma,
        "data:text/plain;base64,AAAA",
        "photo.jpg",
        "AAAA",
        "data:image/png;base64,A",
    ] {
        let error = decode_data_uri_or_base64(bad, &limits).unwrap_err();
        assert!(error.to_string().len() > 20, "{error}");
    }
}

#[test]
fn bad_pictures_are_refused_in_a_sentence() {
    let limits = MediaLimits::default();
    let refuse = |bytes: &[u8], limits: &MediaLimits| {
        decode_image(bytes, "photo", limits)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(refuse(b"", &limits), "cannot read photo: it is empty");
    let unknown = "cannot read photo: it is not a PNG, JPEG, WebP, GIF or BMP image";
    assert_eq!(refuse(b"hello", &limits), unknown);
    let few_pixels = MediaLimits {
        still_pixels: 100,
        ..MediaLimits::default()
    };
    let few_bytes = MediaLimits {
        still_bytes: 100,
        ..MediaLimits::default()
    };
    for name in [
        "420-61x45.jpg",
        "progressive-61x45.jpg",
        "cmyk.jpg",
        "alpha.png",
        "lossy.webp",
        "lossless.webp",
        "palette.gif",
        "rgb.bmp",
    ] {
        let bytes = std::fs::read(testdata().join(name)).unwrap();
        for eighths in [2, 3, 4, 6] {
            let cut = &bytes[..bytes.len() * eighths / 8];
            let outcome = decode_image(cut, "photo", &limits);
            assert!(outcome.is_err(), "{name} cut to {eighths}/8 was read");
            assert!(
                refuse(cut, &limits).starts_with("cannot read photo: "),
                "{name}"
            );
        }
        assert!(
            refuse(&bytes, &few_pixels).contains("more than 100 pixels, the limit"),
            "{name}"
        );
        assert!(
            refuse(&bytes, &few_bytes).contains("more than 100 bytes, the limit"),
            "{name}"
        );
        // No byte may make it panic.
        for at in (0..bytes.len()).step_by(7) {
            let mut broken = bytes.clone();
            broken[at] ^= 0x55;
            let _ = decode_image(&broken, "photo", &limits);
        }
    }
    let missing = load_image(testdata().join("nowhere.png"), &limits).unwrap_err();
    assert!(matches!(missing, Error::Io(_)));
}

#[test]
fn broken_clips_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("broken");
    for name in [
        "h264.mp4",
        "h264-open.mkv",
        "vp8.webm",
        "gif.gif",
        "mpeg4.avi",
    ] {
        let bytes = std::fs::read(testdata().join(name)).unwrap();
        for seed in 0..12usize {
            let mut broken = bytes.clone();
            for hit in 0..8 {
                let at = (seed * 7919 + hit * 104_729 + seed * seed * 31) % broken.len();
                broken[at] ^= 1 << hit;
            }
            std::fs::write(&path, &broken).unwrap();
            let _ = sampled(&path, FrameSampling::Default(4));
        }
    }
}

#[test]
fn shared_clips() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/media");
    let shared = if shared.exists() {
        shared
    } else {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../../shared/media")
    };
    for (name, total, size) in [
        ("bikes.mp4", 250, ImageSize::new(272, 640)),
        ("bigbuckbunny.mp4", 132, ImageSize::new(720, 1280)),
    ] {
        let path = shared.join(name);
        if !path.exists() {
            println!("skipped: shared/media/{name} is not here");
            continue;
        }
        let whole = whole(&path);
        assert_eq!(
            (whole.frames.len(), whole.frames[0].size),
            (total, size),
            "{name}"
        );
        for n in [1, 8, 16, 40] {
            assert_agrees(
                name,
                &sampled(&path, FrameSampling::NumFrames(n)).unwrap(),
                &whole,
            );
        }
    }
}

/// A download that broke off is answered from what is there, and says so.
#[test]
fn a_cut_off_file_says_what_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(testdata().join("../golden/media/clip-64x48.mp4")).unwrap();
    let path = dir.path().join("clip.mp4");
    std::fs::write(&path, &whole).unwrap();
    let limits = MediaLimits::default();
    let all = decode_video(&path, FrameSampling::All, &limits, None).unwrap();
    assert!(all.notes.is_empty());
    std::fs::write(&path, &whole[..whole.len() * 2 / 3]).unwrap();
    let left = decode_video(&path, FrameSampling::All, &limits, None).unwrap();
    assert!(left.frames.len() < all.frames.len());
    let note = format!("only the {} frames that are left", left.frames.len());
    assert!(
        left.notes.iter().any(|text| text.contains(&note)),
        "{:?}",
        left.notes
    );
}

#[test]
fn a_part_of_a_video_holds_the_frames_shown_in_it() {
    let limits = MediaLimits::default();
    // By an MP4 table, by packets, by decoding all; with frames of unequal length; turned; damaged order.
    for name in [
        "h264.mp4",
        "h264.mkv",
        "h264.avi",
        "h264.h264",
        "h264-vfr.mp4",
        "h264-turned-90.mp4",
        "vp9.webm",
        "mpeg2.ts",
    ] {
        let path = testdata().join(name);
        let whole = whole(&path);
        let end = whole.timestamps.last().unwrap();
        let (from, to) = (end * 0.37, end * 0.81);
        let part = VideoPart {
            start: Some(from),
            end: Some(to),
        };
        let got = decode_video_part(&path, FrameSampling::All, part, &limits, None).unwrap();
        assert_agrees(name, &got, &whole);
        let first = whole
            .timestamps
            .iter()
            .rposition(|time| *time <= from + 1e-6);
        let behind = whole.timestamps.iter().position(|time| *time >= to - 1e-6);
        let wanted: Vec<usize> = (first.unwrap()..behind.unwrap()).collect();
        assert_eq!(got.frames_indices, wanted, "{name}");
        let two = FrameSampling::Default(2);
        let few = decode_video_part(&path, two, part, &limits, None).unwrap();
        assert_eq!(few.frames_indices, [wanted[0], wanted[wanted.len() / 2]]);
        let behind = VideoPart {
            start: Some(1e6),
            end: None,
        };
        let error = decode_video_part(&path, two, behind, &limits, None).unwrap_err();
        assert!(matches!(error, Error::Input(_)), "{name}: {error}");
    }
}

#[test]
fn a_video_that_lasts_too_long_is_refused() {
    let limits = MediaLimits {
        duration: Some(Duration::from_millis(100)),
        ..MediaLimits::default()
    };
    let error = decode_video(
        testdata().join("h264.mp4"),
        FrameSampling::Default(2),
        &limits,
        None,
    );
    let message = error.unwrap_err().to_string();
    assert!(message.contains("the limit"), "{message}");
}
