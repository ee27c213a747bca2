//! The model against Transformers: logits, loss, every hidden state, attentions, media features, for
//! every configuration of `testdata/golden`. Tolerances are relative to the largest value.

#![allow(clippy::unwrap_used, missing_docs)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llava_next_video::config::{CheckpointFiles, Dtype, GenerationConfig, LlavaNextVideoConfig};
use llava_next_video::engine::{EarlyStopping, Engine, GenerationOptions};
use llava_next_video::model::{ForwardOptions, LlavaNextVideoModel, LoadOptions, LogitsToKeep};
use llava_next_video::processor::ModelFacts;
use llava_next_video::processor::inputs::ModelInputs;
use safetensors::SafeTensors;

/// What f32 results may differ by, as a share of the largest value.
const F32_TOLERANCE: f32 = 2e-4;

fn golden() -> PathBuf {
    // Held-out data of the same format: tools/golden/random_case.py --seed N --out DIR.
    match std::env::var_os("LNV_GOLDEN") {
        Some(directory) => directory.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden"),
    }
}

fn f32s(t: &safetensors::tensor::TensorView<'_>) -> Vec<f32> {
    t.data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

fn read_inputs(path: &Path, config: &LlavaNextVideoConfig) -> (ModelInputs, Option<Vec<Vec<i64>>>) {
    let bytes = std::fs::read(path).unwrap();
    let read = ModelInputs::from_safetensors(&bytes, &ModelFacts::from(config)).unwrap();
    (read.inputs, read.labels)
}

/// Largest difference over the positions that the mask shows, as a share of the largest value there.
fn difference(ours: &[f32], theirs: &[f32], shown: &dyn Fn(usize) -> bool) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let mut worst = 0.0f32;
    let mut largest = 0.0f32;
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!(a.is_finite(), "value {i} is {a}");
        if shown(i) {
            worst = worst.max((a - b).abs());
            largest = largest.max(b.abs());
        }
    }
    worst / largest.max(1e-30)
}

/// How many there must be in the checked-in data; held-out data may be as few as one wants to try.
fn at_least(checked_in: usize) -> usize {
    match std::env::var_os("LNV_GOLDEN") {
        Some(_) => 1,
        None => checked_in,
    }
}

fn configurations() -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(golden())
        .unwrap()
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.join("cases.json").exists())
        .map(|p| p.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    // Held-out data may be as few as one wants to try.
    let least = if std::env::var_os("LNV_GOLDEN").is_some() {
        1
    } else {
        8
    };
    assert!(names.len() >= least, "only {names:?}");
    names
}

fn check_configuration(name: &str) -> Vec<String> {
    let directory = golden().join(name);
    let files = CheckpointFiles::open(&directory).unwrap();
    let options = LoadOptions {
        dtype: Some(Dtype::F32),
        ..LoadOptions::default()
    };
    let model = LlavaNextVideoModel::load(&files, &options).unwrap();
    let cases: serde_json::Value =
        serde_json::from_slice(&std::fs::read(directory.join("cases.json")).unwrap()).unwrap();
    let mut failures = Vec::new();
    for case in cases["cases"].as_array().unwrap() {
        let Some(outputs) = case["outputs"].as_str() else {
            continue;
        };
        let (inputs, labels) = read_inputs(
            &golden().join(case["inputs"].as_str().unwrap()),
            model.config(),
        );
        let bytes = std::fs::read(golden().join(outputs)).unwrap();
        let st = SafeTensors::deserialize(&bytes).unwrap();
        let options = ForwardOptions {
            hidden_states: true,
            attentions: st.names().iter().any(|n| n.starts_with("attentions")),
            ..ForwardOptions::default()
        };
        let out = model.forward(&inputs, labels.as_deref(), &options).unwrap();
        let (b, s) = (inputs.input_ids.len(), inputs.input_ids[0].len());
        let mut check =
            |what: &str, ours: &[f32], theirs: &[f32], shown: &dyn Fn(usize) -> bool| {
                let d = difference(ours, theirs, shown);
                if d > F32_TOLERANCE {
                    failures.push(format!("{name}/{}: {what}: {d:e}", case["name"]));
                }
            };
        for tensor in st.names() {
            let t = st.tensor(tensor).unwrap();
            let theirs = f32s(&t);
            let mask = |row: usize| inputs.attention_mask[row / s][row % s];
            if let Some(i) = tensor.strip_prefix("hidden_states.") {
                let v = &out.hidden_states[i.parse::<usize>().unwrap()];
                let d = v.shape[2];
                check(tensor, &v.data, &theirs, &|i| mask(i / d));
            } else if let Some(i) = tensor.strip_prefix("attentions.") {
                let v = &out.attentions[i.parse::<usize>().unwrap()];
                let h = v.shape[1];
                check(tensor, &v.data, &theirs, &|i| {
                    inputs.attention_mask[i / (h * s * s)][i / s % s]
                });
            } else if tensor == "logits" {
                let d = out.logits.shape[2];
                check(tensor, &out.logits.data, &theirs, &|i| mask(i / d));
            } else if tensor == "logits_tail" {
                let (d, n) = (out.logits.shape[2], t.shape()[1]);
                let tail: Vec<f32> = out
                    .logits
                    .data
                    .chunks(s * d)
                    .flat_map(|row| row[(s - n) * d..].to_vec())
                    .collect();
                check(tensor, &tail, &theirs, &|i| {
                    inputs.attention_mask[i / (n * d)][s - n + i / d % n]
                });
            } else if tensor == "image_hidden_states" {
                check(
                    tensor,
                    &out.image_hidden_states.as_ref().unwrap().data,
                    &theirs,
                    &|_| true,
                );
            } else if tensor == "video_hidden_states" {
                check(
                    tensor,
                    &out.video_hidden_states.as_ref().unwrap().data,
                    &theirs,
                    &|_| true,
                );
            } else if tensor == "loss" {
                check(tensor, &[out.loss.unwrap()], &theirs, &|_| true);
            } else if tensor == "logits_keep_3" {
                let options = ForwardOptions {
                    logits_to_keep: LogitsToKeep::Last(3),
                    ..ForwardOptions::default()
                };
                let kept = model.forward(&inputs, None, &options).unwrap();
                let d = kept.logits.shape[2];
                assert_eq!(kept.logits.shape, [b, 3, d]);
                check(tensor, &kept.logits.data, &theirs, &|i| {
                    mask(i / (3 * d) * s + s - 3 + i / d % 3)
                });
            }
        }
    }
    failures
}

#[test]
fn forward_equals_transformers() {
    let mut failures = Vec::new();
    for name in configurations() {
        failures.extend(check_configuration(&name));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn options(kwargs: &serde_json::Value) -> GenerationOptions {
    let size = |k: &str| kwargs[k].as_u64().map(|n| n as usize);
    let number = |k: &str| kwargs[k].as_f64().map(|x| x as f32);
    for key in kwargs.as_object().unwrap().keys() {
        let known = [
            "do_sample",
            "max_new_tokens",
            "num_beams",
            "num_return_sequences",
            "eos_token_id",
            "repetition_penalty",
            "length_penalty",
            "early_stopping",
            "no_repeat_ngram_size",
            "min_new_tokens",
            "max_length",
        ];
        assert!(
            known.contains(&key.as_str()),
            "unknown generation argument {key}"
        );
    }
    GenerationOptions {
        max_new_tokens: size("max_new_tokens"),
        max_length: size("max_length"),
        min_new_tokens: size("min_new_tokens").unwrap_or(0),
        num_beams: size("num_beams"),
        num_return_sequences: size("num_return_sequences").unwrap_or(1),
        repetition_penalty: number("repetition_penalty"),
        length_penalty: number("length_penalty"),
        no_repeat_ngram_size: size("no_repeat_ngram_size").unwrap_or(0),
        early_stopping: match &kwargs["early_stopping"] {
            serde_json::Value::Bool(true) => EarlyStopping::WhenFull,
            serde_json::Value::String(_) => EarlyStopping::Never,
            _ => EarlyStopping::Heuristic,
        },
        eos_token_ids: match &kwargs["eos_token_id"] {
            serde_json::Value::Null => None,
            serde_json::Value::Array(list) => {
                Some(list.iter().map(|v| v.as_u64().unwrap() as u32).collect())
            }
            one => Some(vec![one.as_u64().unwrap() as u32]),
        },
        ..GenerationOptions::default()
    }
}

/// Greedy and beam-search ids are the reference's, for every configuration, case and batch.
#[test]
fn generation_equals_transformers() {
    let mut failures = Vec::new();
    let mut compared = 0;
    for name in configurations() {
        let directory = golden().join(&name);
        let files = CheckpointFiles::open(&directory).unwrap();
        let load = LoadOptions {
            dtype: Some(Dtype::F32),
            ..LoadOptions::default()
        };
        let model = LlavaNextVideoModel::load(&files, &load).unwrap();
        let config = model.config().clone();
        let defaults = GenerationConfig::read(&files).unwrap();
        let mut engine = Engine::new(Arc::new(model), defaults);
        let cases: serde_json::Value =
            serde_json::from_slice(&std::fs::read(directory.join("cases.json")).unwrap()).unwrap();
        for case in cases["cases"].as_array().unwrap() {
            let (inputs, _) =
                read_inputs(&golden().join(case["inputs"].as_str().unwrap()), &config);
            for wanted in case["generate"].as_array().unwrap() {
                let options = options(&wanted["kwargs"]);
                let got =
                    engine.generate(&inputs, &options, &(), &mut |_| ControlFlow::Continue(()));
                let got = got.unwrap();
                let theirs: Vec<Vec<u32>> = wanted["new_ids"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|r| {
                        r.as_array()
                            .unwrap()
                            .iter()
                            .map(|v| v.as_u64().unwrap() as u32)
                            .collect()
                    })
                    .collect();
                assert_eq!(got.completions.len(), theirs.len());
                for (ours, theirs) in got.completions.iter().zip(&theirs) {
                    compared += 1;
                    // The reference pads a finished row; we end it.
                    let n = ours.ids.len().min(theirs.len());
                    if ours.ids[..n] != theirs[..n] || ours.ids.len() > theirs.len() {
                        failures.push(format!(
                            "{name}/{}/{} row {}: {:?} instead of {theirs:?}",
                            case["name"], wanted["name"], ours.row, ours.ids
                        ));
                    }
                }
                if let Some(scores) = wanted["sequences_scores"].as_array() {
                    for (ours, theirs) in got.completions.iter().zip(scores) {
                        let (a, b) = (ours.score.unwrap() as f64, theirs.as_f64().unwrap());
                        if (a - b).abs() > 1e-4 * b.abs().max(1.0) {
                            failures.push(format!("{name}/{}: beam score {a}, {b}", case["name"]));
                        }
                    }
                }
                assert_eq!(engine.blocks_in_use(), 0, "blocks leak");
            }
        }
    }
    assert!(compared >= at_least(200), "only {compared} rows");
    assert!(
        failures.is_empty(),
        "{} of {compared}:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// In bf16 our logits are nearer to the f32 truth of the same weights than the reference's bf16 logits:
/// weights and the inputs of products are rounded as there, the residual stream is not.
#[test]
fn bf16_is_at_least_as_exact_as_the_reference() {
    let mut compared = 0;
    for name in configurations() {
        let directory = golden().join(&name);
        let files = CheckpointFiles::open(&directory).unwrap();
        let load = LoadOptions {
            dtype: Some(Dtype::Bf16),
            ..LoadOptions::default()
        };
        let model = LlavaNextVideoModel::load(&files, &load).unwrap();
        let cases: serde_json::Value =
            serde_json::from_slice(&std::fs::read(directory.join("cases.json")).unwrap()).unwrap();
        for case in cases["cases"].as_array().unwrap() {
            let Some(outputs) = case["outputs"].as_str() else {
                continue;
            };
            let bytes = std::fs::read(golden().join(outputs)).unwrap();
            let st = SafeTensors::deserialize(&bytes).unwrap();
            let Ok(theirs) = st.tensor("logits_bf16") else {
                continue;
            };
            let tail = st.tensor("logits").is_err();
            let truth = st
                .tensor(if tail { "logits_tail" } else { "logits" })
                .unwrap();
            let (columns, vocab) = (theirs.shape()[1], theirs.shape()[2]);
            let inputs = &golden().join(case["inputs"].as_str().unwrap());
            let (inputs, _) = read_inputs(inputs, model.config());
            let out = model
                .forward(&inputs, None, &ForwardOptions::default())
                .unwrap();
            let s = inputs.input_ids[0].len();
            let ours: Vec<f32> = out
                .logits
                .data
                .chunks(s * vocab)
                .flat_map(|row| row[(s - columns) * vocab..].to_vec())
                .collect();
            let truth = f32s(&truth);
            let rows = truth.len() / (columns * vocab);
            let truth: Vec<f32> = truth
                .chunks(truth.len() / rows)
                .flat_map(|row| row[row.len() - columns * vocab..].to_vec())
                .collect();
            let shown = |i: usize| {
                inputs.attention_mask[i / (columns * vocab)][s - columns + i / vocab % columns]
            };
            let own = difference(&ours, &truth, &shown);
            let reference = difference(&f32s(&theirs), &truth, &shown);
            assert!(
                own <= reference,
                "{name}/{}: {own} against {reference}",
                case["name"]
            );
            compared += 1;
        }
    }
    assert!(
        compared > 0 || std::env::var_os("LNV_GOLDEN").is_some(),
        "nothing compared"
    );
}
