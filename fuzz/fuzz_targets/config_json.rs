//! `config.json` and `generation_config.json`: any JSON gives a configuration or an error, and the sizes
//! that follow from an accepted one can be computed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llava_next_video::config::{CheckpointFiles, GenerationConfig, LlavaNextVideoConfig};
use llava_next_video::media::ImageSize;
use llava_next_video::processor::anyres::AnyResLayout;

fuzz_target!(|bytes: &[u8]| {
    let (folder, _) = llava_next_video_fuzz::file("generation_config.json", bytes);
    let files = CheckpointFiles::open(&folder).expect("the folder exists");
    let _ = GenerationConfig::read(&files);

    let Ok(json) = serde_json::from_slice(bytes) else {
        return;
    };
    let Ok(config) = LlavaNextVideoConfig::from_json("config.json", &json) else {
        return;
    };
    let _ = config.vision_feature_indices();
    let _ = config.tokens_per_frame();
    let _ = config.projector_inputs();
    for (height, width) in [(1, 1), (1, 4000), (4000, 1), (480, 640)] {
        let _ = AnyResLayout::new(
            ImageSize::new(height, width),
            &config.image_grid_pinpoints,
            config.vision_config.image_size,
            config.vision_config.patch_size,
        );
    }
});
