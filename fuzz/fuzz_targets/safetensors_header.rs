//! Weight files: any bytes give tensors that lie within the file, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llava_next_video::config::CheckpointFiles;
use llava_next_video::model::Checkpoint;

fuzz_target!(|bytes: &[u8]| {
    let (folder, _) = llava_next_video_fuzz::file("model.safetensors", bytes);
    let files = CheckpointFiles::open(&folder).expect("the folder exists");
    let Ok(checkpoint) = Checkpoint::open(&files) else {
        return;
    };
    let _ = checkpoint.stored_dtype();
    for tensor in checkpoint.tensors() {
        assert!(tensor.bytes <= bytes.len());
        let _ = checkpoint.values(&tensor.name, &tensor.shape);
    }
});
