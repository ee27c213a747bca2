//! Pictures: any bytes give an RGB picture within the limits, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llava_next_video::media::{MediaLimits, decode_image};

fuzz_target!(|bytes: &[u8]| {
    let limits = MediaLimits {
        still_pixels: 1 << 20,
        ..MediaLimits::default()
    };
    if let Ok(image) = decode_image(bytes, "fuzz", &limits) {
        assert_eq!(image.data.len(), image.size.area() * 3);
        assert!(image.size.area() as u64 <= limits.still_pixels);
    }
});
