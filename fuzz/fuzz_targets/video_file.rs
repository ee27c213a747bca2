//! Videos: any bytes give frames of one size within the limits, or an error. FFmpeg itself is not
//! instrumented; what is searched is the code around it (index, bitstream, conversion).
#![no_main]

use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use llava_next_video::media::{FrameSampling, MediaLimits, decode_video};

fuzz_target!(|bytes: &[u8]| {
    let (_, path) = llava_next_video_fuzz::file("clip", bytes);
    let limits = MediaLimits {
        video_pixels: 1 << 20,
        sampled_frames: 16,
        sampled_bytes: 64 << 20,
        decoded_frames: 500,
        packets: 10_000,
        deadline: Some(Instant::now() + Duration::from_secs(2)),
        ..MediaLimits::default()
    };
    if let Ok(video) = decode_video(&path, FrameSampling::Default(4), &limits, None) {
        assert!(!video.frames.is_empty() && video.frames.len() <= 4);
        assert_eq!(video.frames.len(), video.frames_indices.len());
        assert!(video.frames.iter().all(|f| f.size == video.frames[0].size));
    }
});
