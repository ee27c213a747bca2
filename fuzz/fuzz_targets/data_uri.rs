//! Data URIs and bare base64: any text gives a picture, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llava_next_video::media::{MediaLimits, decode_data_uri_or_base64};

fuzz_target!(|text: &str| {
    let limits = MediaLimits {
        still_pixels: 1 << 20,
        ..MediaLimits::default()
    };
    if let Ok(image) = decode_data_uri_or_base64(text, &limits) {
        assert_eq!(image.data.len(), image.size.area() * 3);
        assert!(image.size.area() as u64 <= limits.still_pixels);
    }
});
