//! What sampling a long file costs. In a process of its own, since it looks at the peak of memory.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use ffmpeg::media::Type;
use ffmpeg_next as ffmpeg;
use llava_next_video::media::{
    FrameSampling, MediaLimits, VideoPart, decode_video, decode_video_everything,
};

/// Writes the video packets of `source` `times` times, one after another, to `target`.
fn repeat(source: &Path, target: &Path, times: i64) {
    ffmpeg::init().unwrap();
    let mut output = ffmpeg::format::output(target).unwrap();
    let mut base = ffmpeg::Rational(1, 25);
    let mut shift = 0;
    for round in 0..times {
        let mut input = ffmpeg::format::input(source).unwrap();
        let stream = input.streams().best(Type::Video).unwrap();
        let (index, from) = (stream.index(), stream.time_base());
        if round == 0 {
            let codec = ffmpeg::encoder::find(ffmpeg::codec::Id::None);
            let mut added = output.add_stream(codec).unwrap();
            added.set_parameters(stream.parameters());
            added.set_time_base(from);
            output.write_header().unwrap();
            base = output.stream(0).unwrap().time_base();
        }
        let mut end = 0;
        loop {
            let mut packet = ffmpeg::Packet::empty();
            if packet.read(&mut input).is_err() {
                break;
            }
            if packet.stream() != index {
                continue;
            }
            packet.rescale_ts(from, base);
            end = end.max(packet.pts().unwrap() + packet.duration());
            packet.set_pts(packet.pts().map(|ticks| ticks + shift));
            packet.set_dts(packet.dts().map(|ticks| ticks + shift));
            packet.set_stream(0);
            packet.set_position(-1);
            packet.write_interleaved(&mut output).unwrap();
        }
        shift += end;
    }
    output.write_trailer().unwrap();
}

/// Processor time that this process has used, where the system tells, else time: other tests share the machine.
fn now(began: Instant) -> Duration {
    let used = || {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        // User and system time, in hundredths of a second.
        let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
        Some(Duration::from_millis(ticks * 10))
    };
    used().unwrap_or_else(|| began.elapsed())
}

/// Frames in all, and the cost of taking eight, on average over five calls after the first.
fn sample(path: &Path) -> (usize, Duration) {
    let limits = MediaLimits::default();
    let call = || decode_video(path, FrameSampling::NumFrames(8), &limits, None).unwrap();
    let total = call().metadata.total_num_frames;
    let began = Instant::now();
    let start = now(began);
    for _ in 0..5 {
        assert_eq!(call().frames.len(), 8);
    }
    (total, (now(began) - start) / 5)
}

/// The most memory that this process has held, in MiB, where the system tells.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024)
}

#[test]
fn eight_frames_of_ten_minutes_cost_eight_groups() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    for name in ["long.mp4", "long.mkv"] {
        let long = dir.path().join(name);
        repeat(&here.join("../../testdata/media/h264.mp4"), &long, 200);
        let (total, fast) = sample(&long);
        assert_eq!(total, 15000, "{name}");
        let began = Instant::now();
        let start = now(began);
        let limits = MediaLimits::default();
        let whole = decode_video_everything(
            &long,
            FrameSampling::NumFrames(8),
            VideoPart::WHOLE,
            &limits,
        )
        .unwrap();
        // It decodes the file twice, to count and to pick; once is the fair measure.
        let slow = (now(began) - start) / 2;
        let quick = decode_video(&long, FrameSampling::NumFrames(8), &limits, None).unwrap();
        assert!(quick.frames == whole.frames, "{name}: frames differ");
        println!("{name}: 8 of {total} frames in {fast:?}, the whole file in {slow:?}");
        assert!(
            fast * 10 < slow,
            "{name}: 8 frames took {fast:?}, the whole file {slow:?}"
        );
    }
    let clip = [
        here.join("../../../shared/media"),
        here.join("../../../../shared/media"),
    ]
    .map(|folder| folder.join("bigbuckbunny.mp4"))
    .into_iter()
    .find(|path| path.exists());
    let Some(clip) = clip else {
        println!("skipped: shared/media/bigbuckbunny.mp4 is not here");
        return;
    };
    let long = dir.path().join("long720.mp4");
    repeat(&clip, &long, 113);
    let (total, cost) = sample(&long);
    let peak = peak_mib();
    println!("8 of {total} frames of 1280x720 in {cost:?} of processor time; peak {peak:?} MiB");
    // The promise is a second on two idle processors.
    assert!(cost < Duration::from_secs(2), "{cost:?}");
    assert!(peak.is_none_or(|mib| mib < 300), "{peak:?} MiB");
}
