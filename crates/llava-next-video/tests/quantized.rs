//! Quantised weights: the same while loading and saved, near to the f32 truth, and refused by name where
//! a saved one is not what it says.

#![allow(clippy::unwrap_used, missing_docs)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use llava_next_video::config::{CheckpointFiles, Dtype, LlavaNextVideoConfig, Quantization};
use llava_next_video::model::{
    Checkpoint, ForwardOptions, LlavaNextVideoModel, LoadOptions, Repacking,
};
use llava_next_video::processor::ModelFacts;
use llava_next_video::processor::inputs::ModelInputs;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A separate and a tied head, biases and three files, a convolutional pooler, several vision layers.
const MODELS: [&str; 5] = [
    "llama-default",
    "qwen2-windows",
    "bf16-sharded-biases",
    "llama3-rope-conv-pool",
    "siglip-full",
];

/// The formats of the packed layout.
const PACKED: [Quantization; 2] = [Quantization::Q8, Quantization::Q4];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden")
}

fn files(directory: &Path) -> CheckpointFiles {
    CheckpointFiles::open(directory).unwrap()
}

fn load(directory: &Path, options: &LoadOptions<'_>) -> LlavaNextVideoModel {
    LlavaNextVideoModel::load(&files(directory), options).unwrap()
}

fn quantising(quantization: Quantization) -> LoadOptions<'static> {
    LoadOptions {
        quantization: Some(quantization),
        ..LoadOptions::default()
    }
}

/// Quantises a golden checkpoint into a new directory; files of at most so many bytes.
fn saved(model: &str, quantization: Quantization, max_file_bytes: usize) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let source = files(&golden().join(model));
    let mut repacking = Repacking::open(&source, quantization, None).unwrap();
    repacking.max_file_bytes = max_file_bytes;
    let total = repacking.bytes_after();
    let last = std::cell::Cell::new(0);
    let watch = |done: usize, all: usize| {
        assert!(done > last.get() && done <= all && all == total);
        last.set(done);
        ControlFlow::Continue(())
    };
    repacking.write(directory.path(), &watch).unwrap();
    assert_eq!(last.get(), total);
    directory
}

/// Logits of every case of a golden configuration with one image or video or none.
fn logits(name: &str, model: &LlavaNextVideoModel) -> Vec<Vec<f32>> {
    let text = std::fs::read(golden().join(name).join("cases.json")).unwrap();
    let cases: Value = serde_json::from_slice(&text).unwrap();
    let mut logits = Vec::new();
    for case in cases["cases"].as_array().unwrap() {
        if !["text-only", "one-image", "one-video"].contains(&case["name"].as_str().unwrap()) {
            continue;
        }
        let bytes = std::fs::read(golden().join(case["inputs"].as_str().unwrap())).unwrap();
        let facts = ModelFacts::from(model.config());
        let inputs = ModelInputs::from_safetensors(&bytes, &facts)
            .unwrap()
            .inputs;
        let out = model
            .forward(&inputs, None, &ForwardOptions::default())
            .unwrap();
        logits.push(out.logits.data);
    }
    assert!(logits.len() >= 2, "{name}: {}", logits.len());
    logits
}

/// Root mean square of the difference, as a share of the truth's.
fn apart(ours: &[Vec<f32>], truth: &[Vec<f32>]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let pairs = || ours.iter().flatten().zip(truth.iter().flatten());
    let difference: f64 = pairs().map(|(a, b)| square(a - b)).sum();
    (difference / pairs().map(|(_, b)| square(*b)).sum::<f64>()).sqrt()
}

#[test]
fn a_saved_checkpoint_is_the_one_quantised_while_loading_bit_for_bit() {
    for name in MODELS {
        for quantization in PACKED {
            let model = load(&golden().join(name), &quantising(quantization.clone()));
            let truth = logits(name, &model);
            for max_file_bytes in [usize::MAX, 50_000] {
                let directory = saved(name, quantization.clone(), max_file_bytes);
                let again = load(directory.path(), &LoadOptions::default());
                assert_eq!(again.quantization(), Some(&quantization));
                assert_eq!(
                    (again.dtype(), again.bytes()),
                    (model.dtype(), model.bytes())
                );
                assert_eq!(logits(name, &again), truth, "{name} {quantization:?}");
                let index = directory.path().join("model.safetensors.index.json");
                assert_eq!(index.exists(), max_file_bytes < usize::MAX);
            }
        }
    }
}

#[test]
fn quantised_logits_stay_near_those_of_the_weights_they_come_from() {
    for name in MODELS {
        let exact = LoadOptions {
            dtype: Some(Dtype::F32),
            ..LoadOptions::default()
        };
        let truth = logits(name, &load(&golden().join(name), &exact));
        // Random weights are the worst case: nothing in them makes up for a rounding.
        for (quantization, most) in [(Quantization::Q8, 0.08), (Quantization::Q4, 0.5)] {
            let ours = logits(
                name,
                &load(&golden().join(name), &quantising(quantization.clone())),
            );
            let apart = apart(&ours, &truth);
            assert!(apart < most, "{name} {quantization:?}: {apart}");
        }
    }
}

#[test]
fn the_files_beside_the_weights_come_along() {
    let directory = saved("llama-default", Quantization::Q4, usize::MAX);
    for name in [
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    ] {
        let copy = std::fs::read(directory.path().join(name)).unwrap();
        assert_eq!(
            copy,
            std::fs::read(golden().join("llama-default").join(name)).unwrap()
        );
    }
    let text = std::fs::read(directory.path().join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&text).unwrap();
    let expected = json!({"quant_method": "lnv", "version": 3, "format": "q4", "dense": "bf16"});
    assert_eq!(config["quantization_config"], expected);
    assert!(
        !directory
            .path()
            .join("text-only.inputs.safetensors")
            .exists()
    );
}

#[test]
fn packed_tensors_begin_at_multiples_of_64_bytes_and_any_reader_reads_them() {
    let directory = saved("bf16-sharded-biases", Quantization::Q8, usize::MAX);
    let bytes = std::fs::read(directory.path().join("model.safetensors")).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    for (name, tensor) in metadata.tensors() {
        if tensor.dtype == safetensors::Dtype::U8 {
            assert_eq!((8 + header + tensor.data_offsets.0) % 64, 0, "{name}");
        }
    }
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let qkv = "language_model.layers.0.self_attn.q_proj+k_proj+v_proj.weight";
    assert!(read.tensor(qkv).is_ok(), "{:?}", read.names());
}

/// Says how a damaged copy of a saved checkpoint is refused.
fn refusal(change: &dyn Fn(&Path)) -> String {
    let directory = saved("llama-default", Quantization::Q8, usize::MAX);
    change(directory.path());
    let loaded = LlavaNextVideoModel::load(&files(directory.path()), &LoadOptions::default());
    loaded.err().unwrap().to_string()
}

fn edit_config(directory: &Path, edit: &dyn Fn(&mut Value)) {
    let path = directory.join("config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn what_is_not_what_it_says_is_refused_by_name() {
    let rows: [(&str, Value, &[&str]); 6] = [
        (
            "version",
            json!(1),
            &["version is 1", "version 3", "lnv quantize"],
        ),
        ("version", Value::Null, &["version is 0"]),
        ("format", json!("q2"), &["format", "q2", "q4"]),
        ("dense", json!("f8"), &["dense", "f8", "bf16"]),
        ("quant_method", json!("gptq"), &["quant_method", "gptq"]),
        // The file holds q8.
        (
            "format",
            json!("q4"),
            &["q_proj+k_proj+v_proj.weight", "model.safetensors", "Q4"],
        ),
    ];
    for (key, value, words) in rows {
        let error = refusal(&|directory| {
            edit_config(directory, &|config| {
                config["quantization_config"][key] = value.clone()
            });
        });
        for word in words {
            assert!(
                error.contains(word),
                "{key} {value}: {word:?} is not in {error}"
            );
        }
    }
    let error = refusal(&|directory| {
        edit_config(directory, &|config| {
            let width = config["text_config"]["intermediate_size"].as_u64().unwrap();
            config["text_config"]["intermediate_size"] = json!(width + 32);
        });
    });
    assert!(
        error.contains("gate_proj+up_proj.weight") && error.contains("damaged"),
        "{error}"
    );
    let error = refusal(&|directory| {
        let path = directory.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() - 100]).unwrap();
    });
    assert!(error.contains("cut short"), "{error}");
}

#[test]
fn a_quantised_checkpoint_becomes_nothing_else() {
    let directory = saved("llama-default", Quantization::Q8, usize::MAX);
    let files = files(directory.path());
    let refused = |options: &LoadOptions<'_>| {
        let loaded = LlavaNextVideoModel::load(&files, options);
        loaded.err().unwrap().to_string()
    };
    let error = refused(&quantising(Quantization::Q4));
    assert!(
        error.contains("q8 already") && error.contains("q4"),
        "{error}"
    );
    let error = refused(&LoadOptions {
        dtype: Some(Dtype::F32),
        ..LoadOptions::default()
    });
    assert!(
        error.contains("bf16") && error.contains("--dtype f32"),
        "{error}"
    );
    LlavaNextVideoModel::load(&files, &quantising(Quantization::Q8)).unwrap();
    let error = Repacking::open(&files, Quantization::Q8, None)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("q8 already"), "{error}");
}

/// The plan is what loading makes: bytes for bytes, on every dimension.
#[test]
fn the_plan_is_what_is_loaded() {
    for name in MODELS {
        let files = files(&golden().join(name));
        let config = LlavaNextVideoConfig::read(&files).unwrap();
        let checkpoint = Checkpoint::open(&files).unwrap();
        for quantization in [None, Some(Quantization::Q8), Some(Quantization::Q4)] {
            let options = LoadOptions {
                quantization: quantization.clone(),
                ..LoadOptions::default()
            };
            let formats =
                llava_next_video::model::Formats::choose(&config, &checkpoint, &options).unwrap();
            let plan = LlavaNextVideoModel::plan(&config, &formats).unwrap();
            let matrices = plan.iter().filter(|weight| weight.format.is_some());
            // The pooler's convolution is not counted among the model's bytes.
            let matrices = matrices.filter(|weight| !weight.name.starts_with("vision_resampler"));
            let planned: usize = matrices.map(|weight| weight.bytes).sum();
            let model = load(&golden().join(name), &options);
            assert_eq!(planned, model.bytes(), "{name} {quantization:?}");
            for tensor in plan.iter().flat_map(|weight| &weight.tensors) {
                assert!(checkpoint.contains(tensor), "{name}: {tensor}");
            }
        }
    }
}
