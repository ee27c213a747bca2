//! Processed inputs: any bytes give rows and media that fit the model, or an error; what is written
//! again reads the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llava_next_video::media::ImageSize;
use llava_next_video::processor::ModelFacts;
use llava_next_video::processor::inputs::ModelInputs;
use llava_next_video::processor::tensors::TensorInputs;

// The facts of the golden checkpoints, whose inputs are the seeds.
fuzz_target!(|bytes: &[u8]| {
    let facts = ModelFacts {
        text_model_type: "llama".into(),
        image_size: 20,
        patch_size: 5,
        has_cls: true,
        vision_feature_select_strategy: "default".into(),
        image_token_id: 348,
        video_token_id: 347,
        spatial_pool_stride: 2,
        image_grid_pinpoints: vec![ImageSize::new(20, 40), ImageSize::new(40, 20)],
    };
    let Ok(TensorInputs { inputs, .. }) = ModelInputs::from_safetensors(bytes, &facts) else {
        return;
    };
    assert_eq!(inputs.input_ids.len(), inputs.attention_mask.len());
    let tiles = |image: &llava_next_video::processor::inputs::ImageInput| {
        image.tiles.count == image.layout.tiles
            && image.tiles.data.len() == image.tiles.count * image.tiles.stride()
    };
    assert!(inputs.images.iter().all(tiles));
    if let Ok(written) = inputs.to_safetensors() {
        let again = ModelInputs::from_safetensors(&written, &facts).expect("our own file");
        assert_eq!(again.inputs.input_ids, inputs.input_ids);
    }
});
