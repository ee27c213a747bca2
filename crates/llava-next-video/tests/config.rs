//! Configuration and weights: rotary frequencies against Transformers, defaults, both spellings, and
//! what is refused, with the words that a person needs.

#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};

use llava_next_video::config::{
    CheckpointFiles, GenerationConfig, LlavaNextVideoConfig, SelectStrategy, SpatialPoolMode,
    linear_factor_for_frames,
};
use llava_next_video::media::ImageSize;
use llava_next_video::model::{Checkpoint, LlavaNextVideoModel, LoadOptions};
use serde_json::{Value, json};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden")
}

fn parse(config: &Value) -> Result<LlavaNextVideoConfig, String> {
    LlavaNextVideoConfig::from_json("config.json", config).map_err(|e| e.to_string())
}

#[test]
fn rotary_frequencies_equal_transformers() {
    let bytes = std::fs::read(golden().join("functions/rope.json")).unwrap();
    let json: Value = serde_json::from_slice(&bytes).unwrap();
    let mut compared = 0;
    for entry in json["entries"].as_array().unwrap() {
        let head_dim = entry["head_dim"].as_u64().unwrap() as usize;
        let mut text = json!({
            "hidden_size": head_dim, "num_attention_heads": 1, "num_key_value_heads": 1,
        });
        for (key, value) in entry.as_object().unwrap() {
            if !["seq_len", "attention_scaling", "inv_freq"].contains(&key.as_str()) {
                text[key] = value.clone();
            }
        }
        let config = parse(&json!({"text_config": text})).unwrap();
        let seq_len = entry["seq_len"].as_u64().unwrap_or(0) as usize;
        let ours = config.text_config.rope.frequencies(head_dim, seq_len);
        let theirs: Vec<f32> = serde_json::from_value(entry["inv_freq"].clone()).unwrap();
        assert_eq!(ours.inv_freq.len(), theirs.len());
        for (a, b) in ours.inv_freq.iter().zip(&theirs) {
            // torch's f32 power may round the last bit differently.
            assert!(
                (a - b).abs() <= 2.5e-7 * b.abs(),
                "{entry}: {a} instead of {b}"
            );
        }
        let scaling = entry["attention_scaling"].as_f64().unwrap() as f32;
        assert!((ours.attention_scaling - scaling).abs() <= 1e-6, "{entry}");
        compared += 1;
    }
    assert!(compared >= 30, "only {compared}");
}

#[test]
fn absent_keys_take_the_class_defaults() {
    let config = parse(&json!({})).unwrap();
    assert_eq!(config.image_token_index, 32_001);
    assert_eq!(config.video_token_index, 32_000);
    assert_eq!(config.vision_feature_layer, [-2]);
    assert_eq!(
        config.vision_feature_select_strategy,
        SelectStrategy::Default
    );
    assert_eq!(config.spatial_pool_mode, SpatialPoolMode::Average);
    assert_eq!(config.spatial_pool_stride, 2);
    assert_eq!(
        (config.image_seq_length, config.video_seq_length),
        (576, 288)
    );
    assert_eq!(config.image_grid_pinpoints[0], ImageSize::new(336, 672));
    assert_eq!(
        config.vision_config.image_size, 336,
        "no vision_config: CLIP-L/14-336"
    );
    assert_eq!(config.text_config.max_position_embeddings, 2048);
    assert_eq!(config.tokens_per_frame(), 144);

    let config = parse(&json!({"vision_config": {"hidden_size": 36}})).unwrap();
    assert_eq!(
        config.vision_config.image_size, 224,
        "a partial one: the class's own"
    );
    assert_eq!(config.vision_config.patch_size, 32);

    let mistral = json!({"text_config": {"model_type": "mistral"}});
    let config = parse(&mistral).unwrap();
    assert_eq!(config.text_config.num_key_value_heads, 8);
    assert!(config.text_config.windows.iter().all(|w| *w == Some(4096)));
    let open = json!({"text_config": {"model_type": "mistral", "sliding_window": null}});
    assert!(
        parse(&open)
            .unwrap()
            .text_config
            .windows
            .iter()
            .all(Option::is_none)
    );
    let qwen = json!({"text_config": {"model_type": "qwen2", "use_sliding_window": true,
        "sliding_window": 9, "num_hidden_layers": 3, "max_window_layers": 1}});
    assert_eq!(
        parse(&qwen).unwrap().text_config.windows,
        [None, Some(9), Some(9)]
    );
}

#[test]
fn both_spellings_say_the_same() {
    let old = json!({"image_token_index": 7, "torch_dtype": "bfloat16",
        "text_config": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.5}}});
    let new = json!({"image_token_id": 7, "dtype": "bfloat16",
        "text_config": {"rope_parameters":
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.5}}});
    assert_eq!(parse(&old).unwrap(), parse(&new).unwrap());
    // A stray factor beside rope_scaling is inert.
    let stray = json!({"text_config": {"factor": 2.0, "type": "linear"}});
    assert_eq!(
        parse(&stray).unwrap().text_config.rope,
        parse(&json!({})).unwrap().text_config.rope
    );
}

#[test]
fn the_research_rule_stretches_long_clips() {
    assert_eq!(linear_factor_for_frames(8, 144), None);
    assert_eq!(linear_factor_for_frames(32, 144), Some(2.0));
    assert_eq!(linear_factor_for_frames(56, 144), Some(3.0));
}

/// Each row: a change to an otherwise empty configuration, and words that the refusal must hold.
#[test]
fn what_cannot_run_is_refused_by_name() {
    let rows: &[(Value, &[&str])] = &[
        (
            json!({"model_type": "llava_next"}),
            &["model_type", "llava_next", "llava_next_video"],
        ),
        (
            json!({"text_config": {"model_type": "gemma"}}),
            &["text_config.model_type", "gemma"],
        ),
        (
            json!({"vision_config": {"model_type": "vit"}}),
            &["vision_config.model_type", "vit"],
        ),
        (
            json!({"text_config": {"rope_scaling": {"rope_type": "su", "factor": 2.0}}}),
            &["text_config.rope_scaling.rope_type", "su", "longrope"],
        ),
        (
            json!({"text_config": {"rope_scaling": {"rope_type": "linear"}}}),
            &["text_config.rope_scaling.factor", "missing"],
        ),
        (
            json!({"text_config": {"rope_scaling": {"rope_type": "longrope",
                "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0}}}),
            &["short_factor", "1 numbers", "64"],
        ),
        (
            json!({"text_config": {"partial_rotary_factor": 0.5}}),
            &["partial_rotary_factor", "0.5"],
        ),
        (
            json!({"text_config": {"hidden_act": "mish"}}),
            &["text_config.hidden_act", "mish"],
        ),
        (
            json!({"text_config": {"hidden_size": "big"}}),
            &["text_config.hidden_size", "big"],
        ),
        (
            json!({"text_config": {"hidden_size": -4}}),
            &["hidden_size", "-4", "whole number"],
        ),
        (
            json!({"text_config": {"num_hidden_layers": 1e9}}),
            &["num_hidden_layers", "1024"],
        ),
        (
            json!({"text_config": {"num_attention_heads": 32, "num_key_value_heads": 5}}),
            &["num_key_value_heads", "5", "32"],
        ),
        (
            json!({"vision_feature_select_strategy": "full"}),
            &["full", "class token"],
        ),
        (
            json!({"vision_feature_select_strategy": "half"}),
            &["half", "default"],
        ),
        (
            json!({"vision_feature_layer": 40}),
            &["vision_feature_layer", "40", "24 layers"],
        ),
        (
            json!({"vision_feature_layer": []}),
            &["vision_feature_layer"],
        ),
        (
            json!({"spatial_pool_mode": "median"}),
            &["median", "average", "max", "conv"],
        ),
        (
            json!({"spatial_pool_stride": 30}),
            &["spatial_pool_stride", "30", "24"],
        ),
        (
            json!({"spatial_pool_mode": "conv", "spatial_pool_out_channels": 7}),
            &["spatial_pool_out_channels", "7", "1024"],
        ),
        (
            json!({"spatial_pool_mode": "conv", "vision_feature_layer": [-1, -2]}),
            &["conv", "single vision_feature_layer"],
        ),
        (
            json!({"image_grid_pinpoints": []}),
            &["image_grid_pinpoints", "[height, width]"],
        ),
        (
            json!({"image_grid_pinpoints": [[336]]}),
            &["image_grid_pinpoints"],
        ),
        (
            json!({"torch_dtype": "int4"}),
            &["torch_dtype", "int4", "bfloat16"],
        ),
        (
            json!({"quantization_config": {"quant_method": "gptq"}}),
            &["gptq", "not supported"],
        ),
        (json!([1, 2]), &["a list", "JSON object"]),
        (json!({"text_config": 3}), &["text_config", "object"]),
    ];
    for (config, words) in rows {
        let error = parse(config).unwrap_err();
        assert!(error.starts_with("config.json"), "{error}");
        for word in *words {
            assert!(error.contains(word), "{error:?} does not say {word:?}");
        }
        assert!(!error.contains('\n'), "{error:?} is more than a sentence");
    }
}

/// A checkpoint in a temporary directory, to be damaged.
fn copy_of(name: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden().join(name)).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        if file.starts_with("model") || file.ends_with("config.json") {
            std::fs::copy(&path, directory.path().join(file)).unwrap();
        }
    }
    directory
}

fn load_error(directory: &Path) -> String {
    let files = CheckpointFiles::open(directory).unwrap();
    match LlavaNextVideoModel::load(&files, &LoadOptions::default()) {
        Ok(_) => panic!("{} loads", directory.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn damaged_weights_are_named() {
    let directory = copy_of("llama-default");
    let file = directory.path().join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let cuts: [(usize, &str); 5] = [
        (0, "is empty"),
        (5, "is cut short"),
        (8 + header / 2, "is cut short: its header"),
        (8 + header, "is cut short: its tensors need"),
        (whole.len() - 1, "is cut short: its tensors need"),
    ];
    for (length, words) in cuts {
        std::fs::write(&file, &whole[..length]).unwrap();
        let error = load_error(directory.path());
        assert!(
            error.contains(words) && error.contains("model.safetensors"),
            "{error}"
        );
    }
    let mut garbage = whole.clone();
    garbage[8..8 + header].fill(b'x');
    std::fs::write(&file, &garbage).unwrap();
    assert!(load_error(directory.path()).contains("is damaged"));
    garbage[..8].fill(0xff);
    std::fs::write(&file, &garbage).unwrap();
    assert!(load_error(directory.path()).contains("not a safetensors file"));
    std::fs::remove_file(&file).unwrap();
    assert!(load_error(directory.path()).contains("no *.safetensors file"));
    std::fs::write(directory.path().join("pytorch_model.bin"), b"x").unwrap();
    assert!(load_error(directory.path()).contains("pickled weights"));
}

#[test]
fn a_tensor_that_does_not_fit_is_named_with_both_shapes() {
    let directory = copy_of("llama-default");
    let path = directory.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let size = config["text_config"]["intermediate_size"].as_u64().unwrap();
    config["text_config"]["intermediate_size"] = json!(size + 1);
    std::fs::write(&path, config.to_string()).unwrap();
    let error = load_error(directory.path());
    for word in [
        "gate_proj.weight",
        "model.safetensors",
        &size.to_string(),
        &(size + 1).to_string(),
    ] {
        assert!(error.contains(word), "{error:?} does not say {word:?}");
    }
    config["text_config"]["intermediate_size"] = json!(size);
    let layers = config["text_config"]["num_hidden_layers"].as_u64().unwrap();
    config["text_config"]["num_hidden_layers"] = json!(layers + 1);
    std::fs::write(&path, config.to_string()).unwrap();
    let error = load_error(directory.path());
    assert!(
        error.contains(&format!("no tensor language_model.layers.{layers}.")),
        "{error}"
    );
}

#[test]
fn a_missing_shard_is_named() {
    let directory = copy_of("bf16-sharded-biases");
    let files = CheckpointFiles::open(directory.path()).unwrap();
    let shards = Checkpoint::open(&files).unwrap().shards();
    assert!(shards > 1);
    let name = format!("model-00002-of-{shards:05}.safetensors");
    std::fs::remove_file(directory.path().join(&name)).unwrap();
    let error = load_error(directory.path());
    assert!(error.contains(&name), "{error}");
}

#[test]
fn generation_defaults_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let files = CheckpointFiles::open(directory.path()).unwrap();
    assert_eq!(
        GenerationConfig::read(&files).unwrap(),
        GenerationConfig::default()
    );
    let path = directory.path().join("generation_config.json");
    std::fs::write(
        &path,
        r#"{"eos_token_id": [2, 5], "temperature": 0.5, "pad_token_id": -1}"#,
    )
    .unwrap();
    let config = GenerationConfig::read(&files).unwrap();
    assert_eq!(config.eos_token_ids, [2, 5]);
    assert_eq!(config.temperature, Some(0.5));
    assert_eq!(config.pad_token_id, None);
    std::fs::write(&path, "{").unwrap();
    assert!(
        GenerationConfig::read(&files)
            .unwrap_err()
            .to_string()
            .contains("not valid JSON")
    );
}
