//! The demo model, built into the program: a tiny checkpoint in plain Hugging Face layout, trained by
//! `tools/demo_model` on drawn shapes that move. It is read like any other checkpoint, from memory.

use crate::config::CheckpointFiles;

/// Every file of the checkpoint.
static FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../demo/config.json")),
    (
        "generation_config.json",
        include_bytes!("../demo/generation_config.json"),
    ),
    (
        "model.safetensors",
        include_bytes!("../demo/model.safetensors"),
    ),
    ("tokenizer.json", include_bytes!("../demo/tokenizer.json")),
    (
        "tokenizer_config.json",
        include_bytes!("../demo/tokenizer_config.json"),
    ),
    (
        "special_tokens_map.json",
        include_bytes!("../demo/special_tokens_map.json"),
    ),
    (
        "processor_config.json",
        include_bytes!("../demo/processor_config.json"),
    ),
    (
        "preprocessor_config.json",
        include_bytes!("../demo/preprocessor_config.json"),
    ),
    (
        "video_preprocessor_config.json",
        include_bytes!("../demo/video_preprocessor_config.json"),
    ),
    (
        "chat_template.jinja",
        include_bytes!("../demo/chat_template.jinja"),
    ),
];

/// The files of the demo model.
pub fn checkpoint_files() -> CheckpointFiles {
    CheckpointFiles::Embedded(FILES)
}
